"""A live request that begins as rows of a batch do goes to an engine that has been given such a row."""

from __future__ import annotations

import io
from array import array
from typing import Any

import numpy as np
import orjson
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.dataset import Row, read_rows
from batchllm.distributed import beginnings
from batchllm.distributed.beginnings import BatchBeginnings, of_body, of_request
from batchllm.distributed.live_router import PIECE_LEN, LiveRouter
from batchllm.request import Request, SamplingParams
from tests.sizes import sized

_ENGINES = range(4)
_documents = st.lists(st.sampled_from("abcd"), min_size=1, max_size=4).map(
    lambda letters: "".join(letter * 2 * PIECE_LEN for letter in letters)
)


def _request(prompt: str) -> Request:
    return Request(row_id="", index=0, sampling=SamplingParams(), prompt=prompt)


@settings(deadline=None, max_examples=sized(50, 500))
@given(st.lists(st.tuples(_documents, st.sampled_from(_ENGINES)), min_size=2, max_size=12), st.data())
def test_a_beginning_that_rows_share_is_where_the_first_of_them_is(rows: list[tuple[str, int]], data: Any) -> None:
    router = LiveRouter()
    batch = BatchBeginnings(router)
    for place, (document, _) in enumerate(rows):
        batch.add(place, _request(f"{document}question {place}"))
    for place, (_, engine) in enumerate(rows):
        batch.give(np.array([place]), engine)
    document = data.draw(st.sampled_from([document for document, _ in rows]))
    engine = router.begin(of_body(orjson.dumps({"prompt": f"{document}another question"})), _ENGINES)
    is_shared = sum(other.startswith(document) for other, _ in rows) > 1
    if is_shared:
        assert engine in {engine for other, engine in rows if other.startswith(document)}


def test_what_no_two_rows_have_is_not_kept() -> None:
    router = LiveRouter()
    batch = BatchBeginnings(router)
    for place in range(50):
        batch.add(place, _request(f"{place:03}" * PIECE_LEN))
    batch.give(np.arange(50), 3)
    assert not batch._shared and not router._holders


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """And beginnings that come late are found all the same."""
    monkeypatch.setattr(beginnings, "_MAX_PIECES", 20)
    router = LiveRouter()
    batch = BatchBeginnings(router)
    for place in range(100):
        batch.add(place, _request(f"{place // 2:03}" * PIECE_LEN))
        assert len(batch._first_with) <= 20
    assert sum(map(len, batch._shared.values())) <= 20 + 64
    batch.give(np.arange(100), 2)
    assert router.begin(of_body(orjson.dumps({"text": "000" * PIECE_LEN})), _ENGINES) == 2


_CHAT = {
    "model": "m",
    "messages": [{"role": "system", "content": "Be short. " * 40}, {"role": "user", "content": "Why?"}],
    "tools": [{"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}],
}
_BODIES = [
    ("/v1/chat/completions", _CHAT),
    ("/v1/chat/completions", {"model": "m:adapter", "messages": _CHAT["messages"]}),
    ("/v1/completions", {"model": "m", "prompt": "A text. " * 40}),
    ("/v1/completions", {"model": "m", "prompt": [5] * 300}),
]


@pytest.mark.parametrize(("url", "body"), _BODIES)
def test_a_row_begins_as_the_live_request_with_its_body_does(url: str, body: dict[str, Any]) -> None:
    """However the client orders what it sends, and whatever it calls the model."""
    line = orjson.dumps({"custom_id": "a", "method": "POST", "url": url, "body": body})
    row = next(iter(read_rows(io.BytesIO(line), defaults=SamplingParams())))
    assert isinstance(row, Row)
    ours = of_request(row.request)
    assert len(ours) > 2 * PIECE_LEN
    others = {"temperature": 0, **{name: body[name] for name in reversed(body)}}
    assert of_body(orjson.dumps(others)) == ours
    if body["model"] == "m":
        assert of_body(orjson.dumps(others | {"model": "default"})) == ours
        assert of_body(orjson.dumps(others | {"model": "default:adapter"})) != ours
    else:
        assert of_body(orjson.dumps(others | {"model": "m"})) != ours


@pytest.mark.parametrize(
    ("longer", "beginning"),
    [
        ({"messages": [{"role": "system", "content": "S" * 50}, {"role": "user", "content": "1"}], "seed": 1},) * 2,
        ({"seed": 3, "prompt": "abc" * 50 + "1"}, {"prompt": "abc" * 50 + "2", "max_tokens": 3}),
        ({"input_ids": [*range(99), 1]}, {"input_ids": [*range(99), 2], "sampling_params": {}}),
    ],
)
def test_what_goes_to_the_router_begins_as_the_prompt_does(longer: dict[str, Any], beginning: dict[str, Any]) -> None:
    one, other = (of_body(orjson.dumps(body)) for body in (longer, beginning))
    assert one[:100] == other[:100] and len(one) > 100


@pytest.mark.parametrize(
    "body", [b"", b"[1]", b"{", b"\xff", b"3", b"{}", b'{"prompt": ' + b"[" * 300 + b"]" * 300 + b"}"]
)
def test_a_body_without_a_prompt_has_none(body: bytes) -> None:
    assert of_body(body) == b""


def test_a_row_of_several_prompts_begins_as_no_live_request() -> None:
    request = Request(row_id="", index=0, sampling=SamplingParams(), prompts=["a" * 500, array("i", [1])])
    assert of_request(request) == b""
