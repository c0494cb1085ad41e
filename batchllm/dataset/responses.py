"""Rows out: one output line for each row, in the format of the row's kind.

Knows the OpenAI batch formats and the plain one; not files, and not how answers were made.

    plain   {"id", "text", "output_ids", "finish_reason", "usage"} and, where there is one,
            "matched_stop", "logprobs", "note" (what was asked for and could not be kept; OpenAI's
            choices have it too, and "matched_stop", as on the live route). With n > 1:
            {"id", "choices": [those, "index"], "usage"}.
            Failed: {"id", "error": {"code", "message", "line", "param"}}.
    OpenAI  {"id", "custom_id", "response": {"status_code", "request_id", "body"}, "error": null};
            the body is a chat.completion, a text_completion, what SGLang answers to a score, a ranking or an
            embedding, or
            {"error": ...} with status >= 400.

All end with "carried", the input's columns that were to be carried, where there are any.

With n > 1 the usage counts the prompt once and the samples' tokens together; ``cached_tokens`` is
that of the sample which found least in the cache, so it is never more than was really saved.

INVARIANT: a line depends on nothing but its arguments: same row, answer and job seed, same bytes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from hashlib import blake2b
from typing import Any

from batchllm.dataset.embedding import embeddings_body
from batchllm.dataset.logprobs import (
    Decode,
    chat_logprobs,
    completion_logprobs,
    echoed_logprobs,
    plain_logprobs,
    plain_score,
    vllm_prompt_logprobs,
)
from batchllm.dataset.ranking import ranking_body
from batchllm.dataset.records import BadRow, RowHead, reject
from batchllm.dataset.response_rows import response_body
from batchllm.dataset.schema_answers import schema_error
from batchllm.errors import RowError
from batchllm.request import Completion

DecodePrompt = Callable[[Sequence[int]], str]


_PROMPTS = {"score": "items", "rerank": "documents", "embeddings": "input"}
"""What rows that have an answer for each of their prompts call these."""


def find_abort(head: RowHead, completions: Sequence[Completion]) -> BadRow | None:
    """The error record of a row of which a sample was aborted; None where all were finished."""
    for completion in completions:
        if completion.finish_reason == "abort":
            message = completion.error or "the runtime aborted the request and gave no reason"
            if head.kind in _PROMPTS:
                message = f"{_PROMPTS[head.kind]}[{completion.sample}]: {message}"
            if completion.error_code is not None:
                return reject(head, RowError(message, code=completion.error_code))
            return reject(head, RowError(message, code="aborted"), status_code=500)
    return None


def render_success(
    head: RowHead,
    completions: Sequence[Completion],
    *,
    model: str,
    created: int,
    decode: Decode,
    decode_prompt: DecodePrompt,
    job_seed: int = 0,
) -> dict[str, Any]:
    """Builds the output line of an answered row.

    Args:
        completions: All samples of the row, in any order, none aborted (`find_abort`).
        model: Name to report where the row names none.
        created: Unix seconds to report.
        decode: Text of one token id; used for OpenAI rows that ask for logprobs.
        decode_prompt: Text of token ids; used for rows whose answer repeats a prompt that they gave as ids.
        job_seed: Goes into the generated identifiers.
    """
    assert completions, f"row {head.given_id!r}: no completions to render"
    samples = completions
    if len(samples) > 1:
        samples = sorted(samples, key=lambda completion: completion.sample)
    if head.kind == "plain":
        return _plain_line(head, samples)
    chat = head.kind == "chat"
    digest = _digest(job_seed, head.given_id)
    if head.kind in ("score", "rerank"):
        return _openai_line(head, digest, 200, ranking_body(head, samples))
    if head.kind == "embeddings":
        return _openai_line(head, digest, 200, embeddings_body(head, samples, model))
    if head.kind == "responses":
        body = response_body(head, samples[0], digest=digest, model=model, created=created)
        return _openai_line(head, digest, 200, body)
    choices = [_openai_choice(head, sample, decode, digest) for sample in samples]
    if head.echo is not None:
        prompts = [prompt if isinstance(prompt, str) else decode_prompt(prompt) for prompt in head.echo]
        for choice, sample in zip(choices, samples, strict=True):
            choice["text"] = prompts[choice["index"] // (head.num_samples // head.num_prompts)] + choice["text"]
            if sample.prompt_score is not None and head.echoes_logprobs:
                choice["logprobs"] = echoed_logprobs(
                    sample.prompt_score,
                    sample.logprobs or (),
                    decode,
                    choice["text"],
                    with_top=head.num_alternatives > 0,
                )
    body = {
        "id": f"{'chatcmpl' if chat else 'cmpl'}-{digest}",
        "object": "chat.completion" if chat else "text_completion",
        "created": created,
        "model": head.model or model,
        "choices": choices,
        "usage": _openai_usage(head, samples),
    }
    if chat and samples[0].prompt_score is not None:
        body["prompt_logprobs"] = vllm_prompt_logprobs(samples[0].prompt_score, decode)
    return _openai_line(head, digest, 200, body)


def render_error(bad: BadRow, *, job_seed: int = 0) -> dict[str, Any]:
    """Builds the output line of a row that could not be read or answered."""
    if bad.kind == "plain":
        error = {"code": bad.code, "message": bad.message, "line": bad.line, "param": bad.param}
        return {"id": bad.given_id, "error": error, **_carried(bad)}
    body = {
        "error": {
            "message": f"line {bad.line}: {bad.message}",
            "type": "invalid_request_error" if bad.status_code < 500 else "server_error",
            "param": bad.param,
            "code": bad.code,
        }
    }
    # A duplicate has the identifier of another row; the position keeps its line's id apart.
    digest = _digest(job_seed, bad.given_id, bad.index)
    return _openai_line(bad, digest, bad.status_code, body)


def _plain_line(head: RowHead, samples: Sequence[Completion]) -> dict[str, Any]:
    num_prompt, num_cached, num_output = count_tokens(head, samples)
    usage = {
        "prompt_tokens": num_prompt,
        "cached_tokens": num_cached,
        "completion_tokens": num_output,
    }
    if head.num_samples == 1:
        return {"id": head.given_id, **_plain_answer(head, samples[0]), "usage": usage, **_carried(head)}
    choices = [{"index": s.sample, **_plain_answer(head, s)} for s in samples]
    return {"id": head.given_id, "choices": choices, "usage": usage, **_carried(head)}


def _carried(row: RowHead | BadRow) -> dict[str, Any]:
    return {} if row.carried is None else {"carried": row.carried}


def _plain_answer(head: RowHead, sample: Completion) -> dict[str, Any]:
    answer: dict[str, Any] = {
        "text": sample.text,
        "output_ids": list(sample.output_ids),
        "finish_reason": sample.finish_reason,
    }
    if sample.matched_stop is not None:
        answer["matched_stop"] = sample.matched_stop
    if sample.note is not None:
        answer["note"] = sample.note
    if head.wants_logprobs and sample.logprobs is not None:
        answer["logprobs"] = plain_logprobs(sample.logprobs)
    if sample.prompt_score is not None:
        answer["score"] = plain_score(sample.prompt_score)
    if sample.label_logprobs is not None:
        answer["label_logprobs"] = list(sample.label_logprobs)
    if sample.embedding is not None:
        answer["embedding"] = list(sample.embedding)
    if head.schema is not None:
        answer |= _schema_error(head, sample)
    return answer


def _openai_choice(head: RowHead, sample: Completion, decode: Decode, digest: str) -> dict[str, Any]:
    wanted = head.wants_logprobs and sample.logprobs is not None
    logprobs: dict[str, Any] | None = None
    answer: dict[str, Any]
    if head.kind == "chat":
        answer = {"message": {"role": "assistant", "content": sample.text, "refusal": None}}
        if sample.message is not None:
            answer["message"] |= _with_call_ids(sample, digest)
        if wanted:
            logprobs = chat_logprobs(sample.logprobs or (), decode)
    else:
        answer = {"text": sample.text}
        if wanted:
            logprobs = completion_logprobs(
                sample.logprobs or (), decode, sample.text, with_top=head.num_alternatives > 0
            )
    return {
        "index": sample.sample,
        **answer,
        "finish_reason": sample.finish_reason,
        "logprobs": logprobs,
        **({} if sample.matched_stop is None else {"matched_stop": sample.matched_stop}),
        **_prompt_logprobs(head, sample, decode),
        **({} if sample.note is None else {"note": sample.note}),
        **_schema_error(head, sample),
    }


def _prompt_logprobs(head: RowHead, sample: Completion, decode: Decode) -> dict[str, Any]:
    """Where vLLM has them: in a choice of completions, beside the choices of a chat."""
    if head.kind == "chat" or sample.prompt_score is None or head.echoes_logprobs:
        return {}
    return {"prompt_logprobs": vllm_prompt_logprobs(sample.prompt_score, decode)}


def _schema_error(head: RowHead, sample: Completion) -> dict[str, Any]:
    if head.schema is None:
        return {}
    text = sample.text if sample.message is None else sample.message.get("content") or ""  # without its reasoning
    error = schema_error(head.schema, text)
    return {} if error is None else {"schema_error": error}


def _with_call_ids(sample: Completion, digest: str) -> dict[str, Any]:
    """The message, with ids of tool calls that are the same each time."""
    assert sample.message is not None
    calls = sample.message.get("tool_calls") or []
    named = [
        call | {"id": f"call_{_digest(0, digest, sample.sample, i)}"} if call["id"].startswith("call_") else call
        for i, call in enumerate(calls)
    ]
    return sample.message | ({"tool_calls": named} if named else {})


def _openai_usage(head: RowHead, samples: Sequence[Completion]) -> dict[str, Any]:
    num_prompt, num_cached, num_output = count_tokens(head, samples)
    return {
        "prompt_tokens": num_prompt,
        "completion_tokens": num_output,
        "total_tokens": num_prompt + num_output,
        "prompt_tokens_details": {"cached_tokens": num_cached},
    }


def count_tokens(head: RowHead, samples: Sequence[Completion]) -> tuple[int, int, int]:
    """Prompt, cached and output tokens of a row over all its samples, which are in order; each prompt counts once."""
    if len(samples) == 1:
        only = samples[0]
        return only.prompt_tokens, only.cached_tokens, len(only.output_ids)
    n = head.num_samples // head.num_prompts
    of_prompts = [samples[first : first + n] for first in range(0, len(samples), n)]
    return (
        sum(of_prompt[0].prompt_tokens for of_prompt in of_prompts),
        sum(min(sample.cached_tokens for sample in of_prompt) for of_prompt in of_prompts),
        sum(sample.completion_tokens for sample in samples),
    )


def _openai_line(row: RowHead | BadRow, digest: str, status_code: int, body: Any) -> dict[str, Any]:
    return {
        "id": f"batch_req_{digest}",
        "custom_id": row.given_id,
        "response": {"status_code": status_code, "request_id": f"req_{digest}", "body": body},
        "error": None,
        **_carried(row),
    }


def _digest(job_seed: int, *parts: str | int | None) -> str:
    text = "\0".join(map(str, (job_seed, *parts)))
    return blake2b(text.encode(), digest_size=12).hexdigest()
