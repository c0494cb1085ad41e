"""What a runtime says travels between processes as it is."""

from __future__ import annotations

import pickle
from array import array
from typing import Any

import numpy as np
import pytest

from batchllm.offline.runtime import FinishedRequests, LostEngine
from batchllm.request import Completion, PromptScore, TokenLogprob
from batchllm.scheduler.counters import JobCounters
from batchllm.trace.steps import STEP_DTYPE


def _completion(**fields: Any) -> Completion:
    given: dict[str, Any] = {"text": "é", "output_ids": [7, 8], "finish_reason": "stop", "prompt_tokens": 3}
    return Completion(**{"index": 0, "cached_tokens": 1} | given | fields)


@pytest.mark.parametrize(
    "completions",
    [
        [],
        [_completion(), _completion(text="", output_ids=array("i", [1]))],
        [
            _completion(),
            _completion(sample=2, matched_stop="\n", error="withdrawn", error_code="invalid_grammar", note="ended"),
            _completion(logprobs=(TokenLogprob(token_id=7, logprob=-0.5, top=((7, -0.5), (8, -float("inf")))),)),
            _completion(prompt_score=PromptScore(start=1, token_ids=[4], logprobs=[None], top=[()])),
            _completion(label_logprobs=[-1.0, -2.0], embedding=array("f", [0.1, 0.2]), message={"content": None}),
        ],
    ],
)
def test_finished_requests_travel_whole(completions: list[Completion]) -> None:
    sent = FinishedRequests(
        positions=list(range(len(completions))),
        completions=completions,
        counters=JobCounters(num_computed_prompt_tokens=5),
        steps=np.zeros(2, STEP_DTYPE),
        lost=LostEngine(1, "gone"),
    )
    received: FinishedRequests = pickle.loads(pickle.dumps(sent))
    assert (received.positions, received.completions) == (sent.positions, sent.completions)
    assert (received.counters, received.lost) == (sent.counters, sent.lost)
    assert np.array_equal(received.steps, sent.steps)
    assert [type(c.output_ids) for c in received.completions] == [type(c.output_ids) for c in completions]
