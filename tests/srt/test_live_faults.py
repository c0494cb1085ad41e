"""Claims about answers that SGLang cannot make: its own code runs on a message that lacks what it reads."""

from __future__ import annotations

import asyncio
from http import HTTPStatus
from types import SimpleNamespace
from typing import Any

from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput
from sglang.srt.managers.tokenizer_manager import ReqState
from sglang.srt.observability.req_time_stats import APIServerReqTimeStats

from batchllm.srt.managers.known_scores import KnownScores
from batchllm.srt.managers.live_faults import fail_requests
from batchllm.srt.managers.tokenizer_manager import BatchTokenizerManager
from batchllm.trace.latency import LiveLatency


class _Manager(BatchTokenizerManager):
    """Without sockets, and without an engine behind them."""

    def __init__(self, states: dict[str, ReqState]) -> None:
        self.rid_to_state = dict(states)
        self.child_rid_to_logical_rid, self.logical_rid_to_child_rids = {}, {}
        self.live_latency, self.known_scores = LiveLatency(), KnownScores()
        self.sent: list[Any] = []

    def send(self, message: Any) -> None:
        self.sent.append(message)


def _state() -> ReqState:
    return ReqState([], False, asyncio.Event(), GenerateReqInput(text="x"), APIServerReqTimeStats())


def test_an_answer_that_cannot_be_made_fails_its_requests_and_nothing_else() -> None:
    """They hear why, with status 500, and are ended in the scheduler."""
    states = {"asked": _state(), "of another message": _state()}
    manager = _Manager(states)
    asyncio.run(manager._handle_batch_output(SimpleNamespace(rids=["asked", "gone"])))
    (told,) = states["asked"].out_list
    reason = told["meta_info"]["finish_reason"]
    assert reason["status_code"] == HTTPStatus.INTERNAL_SERVER_ERROR
    assert reason["message"].startswith("the answer cannot be made: AttributeError: ")
    assert states["asked"].finished and states["asked"].event.is_set()
    assert manager.rid_to_state == {"of another message": states["of another message"]}
    assert not states["of another message"].event.is_set()
    (abort,) = manager.sent
    assert isinstance(abort, AbortReq) and abort.rid == "asked"


def test_a_request_whose_end_cannot_be_told_ends_all_the_same() -> None:
    """By an abort: SGLang would add log probabilities, of which there are none in a form that it can read."""
    state = _state()
    state.obj.return_logprob, state.obj.top_logprobs_num = True, "two"
    manager = _Manager({"asked": state})
    manager._handle_abort_req(AbortReq(rid="asked"))
    assert state.out_list[0]["meta_info"]["finish_reason"]["type"] == "abort"
    assert state.event.is_set() and not manager.rid_to_state


def test_who_has_been_answered_before_it_failed_keeps_the_answer_and_is_told() -> None:
    state = _state()
    state.out_list.append({"text": "whole"})
    manager = _Manager({})  # SGLang has removed the state of who is answered in full
    fail_requests(manager, {"answered": state}, KeyError("of another one"))
    assert state.out_list == [{"text": "whole"}] and state.event.is_set()
    assert manager.sent == []
