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


_KILLED = """The actor died unexpectedly before finishing this task.
\tclass_name: EngineActor
\tactor_id: abbf7f08e8bdbd7b3939777e01000000
\tpid: 11396
\tnamespace: 6f0c4963-654f-4f3e-8f40-66e3e55eee3f
\tip: 192.0.2.2
The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: Worker
unexpectedly exits with a connection error code 2. End of file. Some common causes include: (1) the process was killed
by the OOM killer due to high memory usage, (2) ray stop --force was called, or (3) the worker crashed unexpectedly"""


def test_of_a_process_that_was_killed_the_likely_cause_is_told_and_no_names_of_ray_s() -> None:
    words = words_of(_RayError(_KILLED))
    assert "pid: 11396 ip: 192.0.2.2" in words and "killed by the OOM killer due to high memory usage" in words
    assert "actor_id" not in words
