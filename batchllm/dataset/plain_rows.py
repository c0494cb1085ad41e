"""Plain rows: ``{"id", "prompt" | "input_ids" | "messages", "continuation", "score", "sampling_params", "lora_path",
"namespace", "task", "expected_new_tokens"}``.

Knows the fields of this row kind; not files, lines' neighbours or duplicate ids.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from batchllm.dataset.field_checks import adapter_name, closest, show, task_name, token_ids
from batchllm.dataset.prompts import check_messages, check_text
from batchllm.dataset.records import Row
from batchllm.dataset.sampling import SGLANG_FIELDS, expected_len, with_adapter
from batchllm.dataset.scoring import checked, read_score
from batchllm.errors import RowError
from batchllm.request import Request, SamplingParams

PROMPT_FIELDS = ("prompt", "input_ids", "messages")
SCORE_FIELDS = frozenset({"score", "continuation"})
_USUAL_FIELDS = frozenset({"id", "sampling_params", *PROMPT_FIELDS})
ROW_FIELDS = _USUAL_FIELDS | SCORE_FIELDS | {"lora_path", "namespace", "task", "expected_new_tokens"}

ReadSampling = Callable[[object], tuple[SamplingParams, bool]]
"""Gives the sampling of a row and whether the row set ``max_new_tokens`` itself."""


def parse_plain(
    record: dict[str, Any],
    *,
    given_id: str | int,
    index: int,
    line: int,
    sampling: ReadSampling,
    carried: dict[str, Any] | None = None,
) -> Row:
    """Reads one plain row.

    Raises:
        RowError: Anything in the row is wrong.
    """
    has_more = not record.keys() <= _USUAL_FIELDS
    if has_more and not record.keys() <= ROW_FIELDS:
        raise _unknown_field(record)
    get = record.get
    prompt, input_ids, messages = get("prompt"), get("input_ids"), get("messages")
    if (prompt is None) + (input_ids is None) + (messages is None) != 2:
        raise _not_one_prompt(record)
    params, given = sampling(get("sampling_params"))
    more = (
        _more_fields(record, params, sets_limit=given) if has_more else {"sampling": checked(params, sets_limit=given)}
    )
    request = Request(
        row_id=str(given_id),
        index=index,
        prompt=None if prompt is None else check_text("prompt", prompt),
        input_ids=None if input_ids is None else token_ids("input_ids", input_ids),
        messages=None if messages is None else check_messages(messages),
        may_lower_max_new_tokens=not given,
        **more,
    )
    return Row(request=request, kind="plain", given_id=given_id, line=line, carried=carried)


def _more_fields(record: dict[str, Any], params: SamplingParams, *, sets_limit: bool) -> dict[str, Any]:
    """What a row with fields that few rows have makes of its request, its sampling included."""
    get = record.get
    adapter = get("lora_path")
    if adapter is not None and adapter != params.lora_path:
        params = _with_adapter(params, adapter)
    score_from, continuation = 0, None
    if get("score") is not None or get("continuation") is not None:
        params, score_from, continuation = read_score(get("score"), get("continuation"), params, sets_limit=sets_limit)
    else:
        params = checked(params, sets_limit=sets_limit)
    return {
        "sampling": params,
        "namespace": _namespace(get("namespace")),
        "task": task_name(get("task")),
        "expected_new_tokens": expected_len(get("expected_new_tokens")),
        "score_from": score_from,
        "continuation": continuation,
    }


def _with_adapter(sampling: SamplingParams, value: object) -> SamplingParams:
    adapter = adapter_name("lora_path", value)
    return sampling if adapter is None else with_adapter(sampling, adapter)


def _namespace(value: object) -> str:
    if value is not None and not isinstance(value, str):
        raise RowError(f"namespace must be a string, not {show(value)}", code="invalid_namespace", param="namespace")
    return value or ""


def _unknown_field(record: dict[str, Any]) -> RowError:
    name = next(key for key in record if key not in ROW_FIELDS)
    hint = "; it belongs in sampling_params" if name in SGLANG_FIELDS else closest(name, ROW_FIELDS)
    return RowError(f"unknown field {show(name)}{hint}", code="unknown_field", param=name)


def _not_one_prompt(record: dict[str, Any]) -> RowError:
    found = [name for name in PROMPT_FIELDS if record.get(name) is not None]
    if not found:
        return RowError(
            "the row has no prompt; give prompt, input_ids or messages",
            code="missing_prompt",
            param="prompt",
        )
    return RowError(
        f"the row has {' and '.join(found)}; give exactly one, or say which with --prompt-column or --messages-column",
        code="ambiguous_prompt",
        param=found[1],
    )
