"""What a program asks, as bodies of SGLang's ``/generate``, and how their answers become what a program gets.

Knows `sglang.lang` and the fields of a body; not who answers it. (Upstream: ``lang/backend/runtime_endpoint.py``, whose
``select`` runs here, one request at a time.)

INVARIANT: an expression is executed again from its start with every answer that came, and asks the same again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from sglang.global_config import global_config
from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.lang.choices import (
    ChoicesDecision,
    ChoicesSamplingMethod,
    GreedyTokenSelection,
    UnconditionalLikelihoodNormalized,
)

Body = dict[str, Any]


class Asked(Exception):
    """An expression needs the answer to ``body`` to go on. Not an error: it leads out of upstream's code."""

    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body


class Answers:
    """What an executor takes for its backend: gives the answers that have come, or raises what is to be asked.

    Args:
        backend: Says everything else.

    Attributes:
        endpoint: The backend, where upstream looks for it when a program runs another one on this.
    """

    def __init__(self, backend: Any) -> None:
        self.endpoint = backend
        self._answers: list[Any] = []
        self._num_used = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self.endpoint, name)

    def add(self, answer: Any) -> None:
        """The answer to what was asked last, or an exception."""
        self._answers.append(answer)
        self._num_used = 0

    def clear(self) -> None:
        """Forget all answers: the next expression asks again."""
        self._answers.clear()
        self._num_used = 0

    def generate(self, s: Any, sampling_params: Any) -> tuple[Any, Any]:
        """Upstream's ``generate``; with ``n`` above 1, lists of texts and of what is known of each.

        Raises:
            Asked: It has not been answered yet.
        """
        answer = self._take(lambda: generate_body(s, sampling_params))
        if isinstance(answer, list):
            return [one["text"] for one in answer], [one["meta_info"] for one in answer]
        return answer["text"], answer["meta_info"]

    def select(self, s: Any, choices: list[str], temperature: float, choices_method: Any) -> Any:
        """Upstream's ``select``.

        Raises:
            Asked: One of its requests has not been answered yet.
        """
        if isinstance(choices_method, GreedyTokenSelection | UnconditionalLikelihoodNormalized):
            choices_method = _KnownTokens(choices_method, s.text_)
        return RuntimeEndpoint.select(self, s, choices, temperature, choices_method)

    def _generate_http_request(self, s: Any, body: Body) -> Any:
        """What upstream's ``select`` calls."""
        if "input_ids" in body and body.get("return_logprob"):
            # Upstream leaves this out, and the server then says nothing of the prompt.
            body |= {"logprob_start_len": 0}
        return self._take(lambda: body | _images(s))

    def commit_lazy_operations(self, s: Any) -> None:
        """Nothing: what forks share is found by the plan."""

    def _take(self, make_body: Callable[[], Body]) -> Any:
        if self._num_used == len(self._answers):
            raise Asked(make_body())
        answer = self._answers[self._num_used]
        self._num_used += 1
        if isinstance(answer, Exception):
            raise answer
        return answer


class _KnownTokens(ChoicesSamplingMethod):
    """Two of upstream's methods, shown only tokens of the choice whose log probability is known.

    A server says None of the first token it is asked about. Upstream takes that token for the prompt's last, which it
    drops; so these methods meet a None, and fail whatever the prompt. Its default method passes over it, and gets here
    what it gets upstream.

    Args:
        method: One of the two.
        text: Text of the prompt.
    """

    def __init__(self, method: Any, text: str) -> None:
        self._method = method
        self._text = text

    @property
    def requires_unconditional_logprobs(self) -> bool:
        return bool(self._method.requires_unconditional_logprobs)

    def __call__(
        self,
        *,
        input_token_logprobs: list[Any],
        unconditional_token_logprobs: list[Any] | None = None,
        **others: Any,
    ) -> ChoicesDecision:
        firsts = [self._num_to_drop(tokens) for tokens in input_token_logprobs]
        return self._method(
            input_token_logprobs=_without(input_token_logprobs, firsts),
            unconditional_token_logprobs=_without(unconditional_token_logprobs, firsts),
            **others,
        )

    def _num_to_drop(self, tokens: Sequence[Any]) -> int:
        first = int(tokens[0][0] is None)
        is_of_prompt = first < len(tokens) - 1 and self._text.endswith(tokens[first][-1])
        return first + is_of_prompt


def _without(choices: list[Any] | None, num_first: list[int]) -> list[Any] | None:
    return choices and [tokens[first:] for tokens, first in zip(choices, num_first, strict=True)]


_LOGPROB_FIELDS = ("return_logprob", "logprob_start_len", "top_logprobs_num", "return_text_in_logprobs")


def generate_body(s: Any, sampling_params: Any) -> Body:
    """The body that upstream's ``generate`` sends for an executor.

    Args:
        s: The executor.
        sampling_params: ``SglSamplingParams``; ``dtype`` becomes a regular expression.
    """
    RuntimeEndpoint._handle_dtype_to_regex(None, sampling_params)
    sampling = {
        "skip_special_tokens": global_config.skip_special_tokens_in_output,
        "spaces_between_special_tokens": global_config.spaces_between_special_tokens_in_out,
        **sampling_params.to_srt_kwargs(),
    }
    logprobs = {name: getattr(sampling_params, name) for name in _LOGPROB_FIELDS}
    logprobs = {name: value for name, value in logprobs.items() if value is not None}
    return {"text": s.text_, "sampling_params": sampling} | logprobs | _images(s)


def _images(s: Any) -> Body:
    if not s.images_:
        return {}
    assert len(s.images_) == 1, "Only support one image."
    return {"image_data": s.images_[0][1]}
