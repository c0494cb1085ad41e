"""Rows that ask for a vector of each of their prompts: ``/v1/embeddings``, and plain rows with ``embed``.

Knows the fields of the body, and the body of the answer, which are SGLang's; not models, or how they make a vector.
(Upstream: ``srt/entrypoints/openai/serving_embedding.py``.)
"""

from __future__ import annotations

import base64
import struct
from collections.abc import Mapping, Sequence
from typing import Any

from batchllm.dataset import field_checks as checks
from batchllm.dataset.openai_body import check_names
from batchllm.dataset.prompts import check_prompts, empty_prompt, prompt_fields
from batchllm.dataset.ranking import usage_of_prompts
from batchllm.dataset.records import Row, RowHead
from batchllm.dataset.scoring import only_embeds
from batchllm.errors import RowError
from batchllm.request import Completion, Request, SamplingParams

_FIELDS = frozenset({"input", "model", "encoding_format", "dimensions", "lora_path"})
_REFUSED = dict.fromkeys(
    ("embed_override_token_id", "embed_overrides"), "vectors in place of tokens cannot be planned; ask the live route"
)
_FORMATS = ("float", "base64")
DIMENSIONS = checks.integer(1)


def parse_embedding(body: Mapping[str, Any], *, given_id: str | int, index: int, line: int) -> Row:
    """Reads the body of such a row.

    Raises:
        RowError: Anything in it is wrong; of several inputs it says which.
    """
    check_names(body, _FIELDS, _REFUSED)
    model = None if body.get("model") is None else checks.text("model", body["model"])
    named = "" if model is None else model.partition(":")[2].strip()
    adapter = named or (None if body.get("lora_path") is None else checks.adapter_name("lora_path", body["lora_path"]))
    encoding = body.get("encoding_format") or "float"
    if encoding not in _FORMATS:
        raise RowError(
            f"encoding_format must be float or base64, not {checks.show(encoding)}",
            code="parameter_out_of_range",
            param="encoding_format",
        )
    dimensions = None if body.get("dimensions") is None else DIMENSIONS("dimensions", body["dimensions"])
    request = Request(
        row_id=str(given_id),
        index=index,
        sampling=only_embeds(dimensions, adapter),
        **prompt_fields(check_prompts("input", _input(body.get("input")))),
        prompts_name="input",
        model=model,
    )
    answer = {"encoding_format": encoding}
    return Row(request=request, kind="embeddings", given_id=given_id, line=line, model=model, answer=answer)


def _input(value: Any) -> Any:
    """The input as it is, if its texts have more than spaces in them."""
    if value is None:
        raise RowError("the body has no input", code="missing_prompt", param="input")
    value = checks.as_list(value)
    for i, item in enumerate(value if isinstance(value, list) else ()):
        if isinstance(item, Mapping):
            raise RowError(
                f"input[{i}]: only texts and token ids have vectors in batches, not parts",
                code="unsupported_content",
                param="input",
            )
        if isinstance(item, str) and not item.strip():
            raise empty_prompt(f"input[{i}]")
    if isinstance(value, str) and not value.strip():
        raise empty_prompt("input")
    return value


def embeddings_body(head: RowHead, samples: Sequence[Completion], model: str) -> dict[str, Any]:
    """The body of the answer to such a row, as SGLang's route has it.

    Args:
        samples: One of each input, in their order.
        model: Name of the model that runs.
    """
    is_packed = (head.answer or {})["encoding_format"] == "base64"
    vectors = [list(sample.embedding or ()) for sample in samples]
    return {
        "data": [
            {"embedding": _packed(vector) if is_packed else vector, "index": i, "object": "embedding"}
            for i, vector in enumerate(vectors)
        ],
        "model": model,
        "object": "list",
        "usage": usage_of_prompts(samples),
    }


def _packed(vector: Sequence[float]) -> str:
    return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()


def check_engine(
    sampling: SamplingParams, embeds: bool | None, max_dimensions: int | None, dimensions: Sequence[int]
) -> None:
    """Refuses a row that the engine's model is not for.

    Args:
        sampling: Of the row.
        embeds: As `RuntimeInfo` has it, like what follows.

    Raises:
        RowError: ``engine_embeds``, ``engine_generates``, or ``dimensions_not_supported``.
    """
    if embeds is None:
        return
    if sampling.embed and not embeds:
        raise RowError(
            "this engine generates, and the row asks for a vector; start it with --is-embedding, and run such rows in "
            "a job of their own",
            code="engine_generates",
        )
    if embeds and not sampling.embed:
        raise RowError(
            "this engine embeds (--is-embedding), and the row asks for something else; run it on an engine without "
            "--is-embedding, or ask for a vector by /v1/embeddings or sampling_params.embed",
            code="engine_embeds",
        )
    if sampling.dimensions is None:
        return
    if max_dimensions is None:
        reason = "this model's vectors cannot be shortened: its config.json says neither is_matryoshka nor "
        reason += "matryoshka_dimensions; leave it out"
    elif dimensions and sampling.dimensions not in dimensions:
        reason = f"this model's vectors have {', '.join(map(str, dimensions))} numbers, not {sampling.dimensions}"
    elif sampling.dimensions > max_dimensions:
        reason = f"this model's vectors have {max_dimensions} numbers, which is less than {sampling.dimensions}"
    else:
        return
    raise RowError(f"dimensions: {reason}", code="dimensions_not_supported", param="dimensions")
