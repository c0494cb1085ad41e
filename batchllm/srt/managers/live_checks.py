"""Live requests with fields that SGLang takes and cannot carry out: it would end the scheduler, or the server. Runs in
the server's process.

(Upstream: ``GenerateReqInput.normalize_batch_and_arguments``.) What depends on the tokens of a prompt is checked in the
scheduler (`live_sampling`).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import Any, get_type_hints

import msgspec
from sglang.srt.managers.embed_types import PositionalEmbeds
from sglang.srt.sampling.sampling_params import SamplingParams

from batchllm.dataset.field_checks import closest, show
from batchllm.dataset.sampling import stop_regexes
from batchllm.errors import RowError
from batchllm.srt.managers.io_struct import PLANNED_ID

_MAX_ANSWERS = 1024
"""To one prompt."""
_OF_EACH_PROMPT = (
    *("rid", "sampling_params", "lora_path", "extra_key", "custom_logit_processor", "return_hidden_states"),
    *("return_logprob", "logprob_start_len", "top_logprobs_num", "token_ids_logprob", "return_sampling_mask"),
)
"""Fields that may be lists, with a value for each prompt."""
_INTERNAL = ("stop_strs", "stop_regex_strs", "stop_str_max_len", "stop_regex_max_len", "is_normalized")
"""What SGLang adds to sampling parameters itself."""
_TYPES: dict[str, Any] = {name: kind for name, kind in get_type_hints(SamplingParams).items() if name not in _INTERNAL}
_TYPES["stop_token_ids"] = list[int] | None  # SGLang makes a set of it, and logs what came as JSON
_LEAST = {"logprob_start_len": -1, "top_logprobs_num": 0}


def check_generate(obj: Any, label_names: Collection[str] | None) -> None:
    """Refuse a request that SGLang cannot carry out; sampling parameters are of the right types then.

    Args:
        obj: SGLang's ``GenerateReqInput``, as it came.
        label_names: Labels of the metrics that requests may set; None where no metrics are kept.

    Raises:
        ValueError: It says which field is at fault.
    """
    for params in _each(obj.sampling_params):
        _check_sampling(params or {})
    for name in _OF_EACH_PROMPT:
        _check_length(obj, name)
    for name, least in _LEAST.items():
        for value in _each(getattr(obj, name)):
            if value is not None and value < least:
                raise ValueError(f"{name} must be {least} or more, not {show(value)}")
    for rid in _each(obj.rid):
        if isinstance(rid, str) and rid.startswith(PLANNED_ID[0]):
            raise ValueError(f"rid must not begin with NUL: {show(rid)}")
    for embeds in _each(obj.positional_embed_overrides):
        if embeds is not None and not isinstance(embeds, PositionalEmbeds):
            raise ValueError("positional_embed_overrides cannot be given as JSON; leave it out")
    for label in obj.custom_labels or ():
        if label_names is not None and label not in label_names:
            raise ValueError(
                f"custom_labels: {show(label)} is no label of this server's metrics; leave it out, or start the server "
                "with --tokenizer-metrics-allowed-custom-labels"
            )


def _each(value: Any) -> Iterator[Any]:
    return iter(value if isinstance(value, list) else [value])


def _check_sampling(params: dict[str, Any]) -> None:
    num = params.get("n", 1)
    if not isinstance(num, int) or isinstance(num, bool) or not 1 <= num <= _MAX_ANSWERS:
        raise ValueError(f"n must be an integer from 1 to {_MAX_ANSWERS}, not {show(num)}")
    for name, value in params.items():
        if name not in _TYPES:
            raise ValueError(f"sampling_params: unknown parameter {show(name)}{closest(name, _TYPES)}")
        if value is not None:
            try:
                params[name] = msgspec.convert(value, _TYPES[name], strict=False)
            except msgspec.ValidationError as error:
                raise ValueError(f"sampling_params: {name} is {show(value)}: {error}") from error
    try:
        stop_regexes("stop_regex", params.get("stop_regex") or [])
    except RowError as error:
        raise ValueError(f"sampling_params: {error}") from error


def _check_length(obj: Any, name: str) -> None:
    """A list has a value for each prompt, where there are several; of one prompt SGLang would send the list itself."""
    value = getattr(obj, name)
    if not isinstance(value, list):
        return
    if name == "token_ids_logprob" and not any(isinstance(ids, list) for ids in value):
        return  # the same for all prompts
    num_prompts = _num_prompts(obj)
    if num_prompts is None and not _has_samples(obj):
        raise ValueError(f"{name} is a list, and there is one prompt: give one value, or a list of prompts")
    if len(value) != (num_prompts or 1):
        raise ValueError(f"{name} has {len(value)} values for {num_prompts or 1} prompts; give one for each")


def _num_prompts(obj: Any) -> int | None:
    """How many prompts are in the list of them; None where there is one prompt and no list."""
    if obj.text is not None:
        return len(obj.text) if isinstance(obj.text, list) else None
    if obj.input_ids is not None:
        return None if not obj.input_ids or isinstance(obj.input_ids[0], int) else len(obj.input_ids)
    embeds = obj.input_embeds
    return len(embeds) if embeds and embeds[0] and isinstance(embeds[0][0], list) else None


def _has_samples(obj: Any) -> bool:
    """SGLang makes a list of one prompt that is to be answered several times."""
    return isinstance(obj.sampling_params, dict) and obj.sampling_params.get("n", 1) > 1
