"""OpenAI batch rows, ``{"custom_id", "method": "POST", "url", "body"}``, of the urls in `KIND_OF_URL`.

Knows what is around a body, and its prompt; what else a body asks for is in `openai_body`, bodies of scores and
rankings are in `ranking`, those of embeddings in `embedding`, of responses in `response_rows`. Not files or lines. What
a row leaves out takes the job's defaults, which are OpenAI's own unless the user changes them (temperature 1, top_p 1,
n 1), but for these: ``max_tokens`` is 16 for completions, as OpenAI documents, and the job's
``default_max_new_tokens`` for chats; chats are sampled as the model recommends, as on SGLang's server.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from batchllm.dataset import field_checks as checks
from batchllm.dataset.embedding import parse_embedding
from batchllm.dataset.openai_body import PROMPT_FIELD, BodySettings, settings_part
from batchllm.dataset.prompts import check_messages, check_prompts, prompt_fields
from batchllm.dataset.ranking import parse_ranking
from batchllm.dataset.records import Row, RowKind
from batchllm.dataset.response_rows import as_chat
from batchllm.dataset.sampling import expected_len, with_adapter
from batchllm.errors import RowError
from batchllm.request import Request

KIND_OF_URL: Mapping[object, RowKind] = {
    "/v1/chat/completions": "chat",
    "/v1/completions": "completions",
    "/v1/score": "score",
    "/v1/rerank": "rerank",
    "/v1/responses": "responses",
    "/v1/embeddings": "embeddings",
}
ROW_FIELDS = frozenset({"custom_id", "method", "url", "body"})
ReadBody = Callable[[dict[str, Any]], BodySettings]
"""Reads the part of a body beside its prompt (`settings_part`)."""
_MAX_DIGITS = 18
"""Of a number given as text; Python refuses to read one of thousands."""


def parse_openai(record: dict[str, Any], *, given_id: str | int, index: int, line: int, read_body: ReadBody) -> Row:
    """Reads one OpenAI batch row of the kind its url names.

    Args:
        read_body: Reads what the body asks for beside its prompt.

    Raises:
        RowError: Anything in the row is wrong.
    """
    kind, body = check_envelope(record)
    if kind in ("score", "rerank"):
        return parse_ranking(body, kind, given_id=given_id, index=index, line=line)
    if kind == "embeddings":
        return parse_embedding(body, given_id=given_id, index=index, line=line)
    answer = None
    if kind == "responses":
        body, answer = as_chat(body)
    of_body: RowKind = "completions" if kind == "completions" else "chat"
    model = body.get("model")
    adapter = None if model is None else _adapter_of(model)
    user = body.get("user")
    if user is not None and not isinstance(user, str):
        raise checks.wrong_type("user", "a string", user)
    metadata = body.get("metadata")
    if metadata is not None and not isinstance(metadata, dict):
        raise checks.wrong_type("metadata", "an object", metadata)
    settings = read_body(settings_part(body, of_body))
    if kind == "responses" and settings.sampling.n > 1:
        raise RowError("n must be 1: a response has one answer", code="conflicting_parameters", param="n")
    name = PROMPT_FIELD[of_body]
    if body.get(name) is None:
        raise RowError(f"the body has no {name}", code="missing_prompt", param=name)
    sampling = settings.sampling if adapter is None else with_adapter(settings.sampling, adapter)
    if of_body == "completions":
        prompt = prompt_fields(check_prompts("prompt", body[name]))
    else:
        prompt = {"messages": check_messages(body[name])}
    request = Request(
        row_id=str(given_id),
        index=index,
        sampling=sampling,
        **prompt,
        chat=settings.chat,
        model=model,
        namespace=settings.namespace,
        task=_task(metadata or {}),
        expected_new_tokens=_expected_len(metadata or {}),
        may_lower_max_new_tokens=not settings.sets_limit,
    )
    return Row(
        request=request,
        kind=kind,
        given_id=given_id,
        line=line,
        model=model,
        echoes=settings.echo,
        echoes_logprobs=settings.echoes_logprobs,
        answer=answer,
    )


def _adapter_of(model: object) -> str | None:
    """The adapter in ``base:adapter``, which wins over ``lora_path``; None where there is none.

    (Upstream: ``OpenAIServingBase._parse_model_parameter``.)
    """
    return checks.text("model", model).partition(":")[2].strip() or None


def _task(metadata: Mapping[str, Any]) -> str:
    """``metadata.task``: OpenAI gives metadata no meaning, so the same file still runs there."""
    task = metadata.get("task")
    return task if isinstance(task, str) else ""


def _expected_len(metadata: Mapping[str, Any]) -> int | None:
    """``metadata.expected_new_tokens``; OpenAI's metadata holds strings."""
    value = metadata.get("expected_new_tokens")
    if isinstance(value, str) and value.isdecimal() and len(value) <= _MAX_DIGITS:
        return expected_len(int(value))
    return expected_len(value)


def check_envelope(record: dict[str, Any]) -> tuple[RowKind, dict[str, Any]]:
    """Checks what is around the body; returns the kind that the url names, and the body."""
    for name in record:
        if name not in ROW_FIELDS:
            raise RowError(
                f"unknown field {checks.show(name)}{checks.closest(name, ROW_FIELDS)}",
                code="unknown_field",
                param=name,
            )
    if record.get("method") != "POST":
        raise RowError(
            f'method must be "POST", not {checks.show(record.get("method"))}',
            code="invalid_method",
            param="method",
        )
    url = record.get("url")
    kind = KIND_OF_URL.get(url) if isinstance(url, str) else None
    if kind is None:
        raise RowError(
            f"url must be {', '.join(map(str, KIND_OF_URL))}, not {checks.show(url)}",
            code="invalid_url",
            param="url",
        )
    body = record.get("body")
    if not isinstance(body, dict):
        raise RowError(f"body must be an object, not {checks.show(body)}", code="invalid_body", param="body")
    return kind, body
