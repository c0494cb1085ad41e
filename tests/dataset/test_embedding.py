"""What rows of ``/v1/embeddings`` ask, what is refused of them, and what their output lines have."""

from __future__ import annotations

import base64
import io
import json
from array import array
from typing import Any

import pytest

from batchllm.dataset import BadRow, Row, find_abort, read_rows, render_success
from batchllm.dataset.embedding import check_engine
from batchllm.errors import RowError
from batchllm.request import Completion, SamplingParams

EMBEDS = SamplingParams(max_new_tokens=0, temperature=0.0, ignore_eos=True, embed=True)


def read(record: dict[str, Any]) -> Row | BadRow:
    (row,) = read_rows(io.BytesIO(json.dumps(record).encode()), defaults=SamplingParams())
    return row


def of_body(**body: Any) -> Row | BadRow:
    return read({"custom_id": "a", "method": "POST", "url": "/v1/embeddings", "body": body})


def good(**body: Any) -> Row:
    row = of_body(**body)
    assert isinstance(row, Row), row
    return row


def completion(sample: int, *vector: float, **fields: Any) -> Completion:
    common: dict[str, Any] = {"index": 0, "sample": sample, "text": "", "output_ids": [], "finish_reason": "length"}
    common |= {"prompt_tokens": 7, "cached_tokens": 3, "embedding": array("f", vector)}
    return Completion(**common | fields)


def line_of(row: Row, completions: list[Completion]) -> dict[str, Any]:
    line = render_success(row.head, completions, model="m", created=1, decode=str, decode_prompt=str)
    return json.loads(json.dumps(line))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("given", "prompt", "input_ids", "prompts"),
    [
        ("x", "x", None, None),
        (["x"], "x", None, None),
        (["x", "y"], None, None, ["x", "y"]),
        ([1, 2], None, [1, 2], None),
        ([[1, 2]], None, [1, 2], None),
        ([[1, 2], [3]], None, None, [[1, 2], [3]]),
    ],
)
def test_an_input_is_a_prompt_for_each_of_its_texts(given: Any, prompt: Any, input_ids: Any, prompts: Any) -> None:
    request = good(input=given, model="x", user="u", encoding_format="float", embed_overrides=None).request
    assert request.prompt == prompt
    assert (None if request.input_ids is None else list(request.input_ids)) == input_ids
    found = None if request.prompts is None else [p if isinstance(p, str) else list(p) for p in request.prompts]
    assert found == prompts
    assert (request.sampling, request.prompts_name, request.model) == (EMBEDS, "input", "x")


def test_dimensions_and_adapters_go_to_the_engine() -> None:
    """What is behind a model's colon wins over ``lora_path``, as on SGLang's server."""
    assert good(input="x", dimensions=5).request.sampling.dimensions == 5
    assert good(input="x", lora_path="a").request.sampling.lora_path == "a"
    assert good(input="x", lora_path="a", model="m:b").request.sampling.lora_path == "b"


@pytest.mark.parametrize(
    ("body", "code", "said"),
    [
        ({}, "missing_prompt", "no input"),
        ({"input": ""}, "empty_prompt", "input is empty"),
        ({"input": " \n"}, "empty_prompt", "input is empty"),
        ({"input": []}, "empty_prompt", "input is empty"),
        ({"input": ["x", "  "]}, "empty_prompt", "input[1] is empty"),
        ({"input": ["x", 3]}, "invalid_prompt", "input[1]"),
        ({"input": [1, "x"]}, "invalid_input_ids", "input[1]"),
        ({"input": [1, -2]}, "invalid_input_ids", "input[1]"),
        ({"input": 5}, "invalid_prompt", "input"),
        ({"input": [{"text": "x", "image": "y"}]}, "unsupported_content", "input[0]"),
        ({"input": "x", "encoding_format": "int8"}, "parameter_out_of_range", "float or base64"),
        ({"input": "x", "dimensions": 0}, "parameter_out_of_range", "dimensions"),
        ({"input": "x", "dimensions": "5"}, "invalid_parameter_type", "dimensions"),
        ({"input": "x", "embed_overrides": [[[1.0]]]}, "unsupported_parameter", "ask the live route"),
        ({"input": "x", "dimension": 5}, "unknown_parameter", "dimensions"),
        ({"input": "x", "temperature": 0}, "unknown_parameter", "temperature"),
    ],
)
def test_what_is_wrong_is_named(body: dict[str, Any], code: str, said: str) -> None:
    row = of_body(**body)
    assert isinstance(row, BadRow) and row.code == code, row
    assert said in row.message


def test_an_answer_has_the_body_of_sglangs_route() -> None:
    """Its model is the one that runs, whatever the row calls it; a vector is numbers, or float32 in base64."""
    samples = [completion(1, 0.5, -2.0), completion(0, 0.25, 1.5)]
    numbers = [[0.25, 1.5], [0.5, -2.0]]
    body = line_of(good(input=["x", "y"], model="x"), samples)["response"]["body"]
    assert body == {
        "object": "list",
        "data": [{"object": "embedding", "index": i, "embedding": numbers[i]} for i in range(2)],
        "model": "m",
        "usage": {
            "prompt_tokens": 14,
            "total_tokens": 14,
            "completion_tokens": 0,
            "prompt_tokens_details": None,
            "reasoning_tokens": 0,
        },
    }
    packed = line_of(good(input=["x", "y"], encoding_format="base64"), samples)["response"]["body"]
    assert base64.b64decode(packed["data"][1]["embedding"]) == b"\x00\x00\x00\x3f\x00\x00\x00\xc0"


def test_an_input_that_fails_fails_its_row_and_is_named() -> None:
    failed = completion(1, finish_reason="abort", error="no room", error_code="aborted", embedding=None)
    bad = find_abort(good(input=["x", "y"]).head, [completion(0, 1.0), failed])
    assert bad is not None and bad.message == "input[1]: no room"


def test_plain_rows_ask_for_the_same() -> None:
    row = read({"id": 1, "prompt": "x", "sampling_params": {"embed": True, "dimensions": 2}})
    assert isinstance(row, Row)
    assert (row.request.sampling.embed, row.request.sampling.dimensions) == (True, 2)
    assert row.request.sampling.max_new_tokens == 0
    assert line_of(row, [completion(0, 0.5, 1.0)])["embedding"] == [0.5, 1.0]


@pytest.mark.parametrize(
    "fields",
    [
        {"sampling_params": {"embed": True, "max_new_tokens": 3}},
        {"sampling_params": {"embed": True, "n": 2}},
        {"sampling_params": {"embed": True, "label_token_ids": [5]}},
        {"sampling_params": {"embed": True}, "score": {}},
        {"sampling_params": {"embed": True}, "continuation": "y"},
        {"sampling_params": {"dimensions": 3}},
    ],
)
def test_a_row_that_asks_for_a_vector_asks_for_nothing_else(fields: dict[str, Any]) -> None:
    row = read({"id": 1, "prompt": "x", **fields})
    assert isinstance(row, BadRow) and (row.code, row.param) == ("conflicting_parameters", "embed")


def test_an_engine_answers_one_kind_of_rows() -> None:
    """The other kind fails with what to start; where nothing runs, both are taken."""
    for embeds, sampling, code in ((True, SamplingParams(), "engine_embeds"), (False, EMBEDS, "engine_generates")):
        with pytest.raises(RowError, match="--is-embedding") as refused:
            check_engine(sampling, embeds, None, ())
        assert refused.value.code == code
        check_engine(sampling, not embeds, None, ())
        check_engine(sampling, None, None, ())


@pytest.mark.parametrize(
    ("dimensions", "max_dimensions", "allowed", "said"),
    [
        (8, None, (), "cannot be shortened"),
        (9, 16, (), None),
        (17, 16, (), "have 16 numbers"),
        (9, 16, (8, 16), "have 8, 16 numbers"),
        (8, 16, (8, 16), None),
    ],
)
def test_dimensions_are_those_of_the_model(
    dimensions: int, max_dimensions: int | None, allowed: tuple[int, ...], said: str | None
) -> None:
    """As SGLang checks them (``TokenizerManager._validate_for_matryoshka_dim``)."""
    sampling = SamplingParams(embed=True, dimensions=dimensions)
    if said is None:
        check_engine(sampling, True, max_dimensions, allowed)
        return
    with pytest.raises(RowError, match=said) as refused:
        check_engine(sampling, True, max_dimensions, allowed)
    assert refused.value.code == "dimensions_not_supported"
