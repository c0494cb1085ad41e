"""What Ray says of an actor that is gone is told in one line."""

from __future__ import annotations

from batchllm.distributed.replica import words_of

_CREATION = """The actor died because of an error raised in its creation task, \x1b[36mray::Engine()\x1b[39m
  At least one of the input arguments for this task could not be computed:
ray.exceptions.RaySystemError: System error: No module named 'mine'
traceback: Traceback (most recent call last):
  File "x.py", line 1, in <module>
ModuleNotFoundError: No module named 'mine'
"""


class _RayError(Exception):
    """As Ray's own are."""

    def __init__(self, error_msg: str) -> None:
        super().__init__()
        self.error_msg = error_msg


def test_the_cause_of_a_traceback_is_told() -> None:
    expected = (
        "The actor died because of an error raised in its creation task: ModuleNotFoundError: No module named 'mine'"
    )
    assert words_of(RuntimeError(_CREATION)) == expected
    assert words_of(_RayError(_CREATION)) == expected


def test_a_short_word_stays_as_it_is() -> None:
    assert words_of(_RayError("The actor is dead because its node\n\thas died.")) == (
        "The actor is dead because its node has died."
    )
    assert words_of(KeyError()) == "KeyError"
