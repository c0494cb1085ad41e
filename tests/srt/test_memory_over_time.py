"""What a scheduler keeps of jobs and prefixes that are over: nothing that grows while another job is open."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from batchllm.planner import plan_batch
from batchllm.planner.planner import RunCutter
from batchllm.prefix_cache.pin_ledger import PinLedger
from batchllm.scheduler.output_length import MIN_FINISHED, OutputLengths
from batchllm.srt.managers.io_struct import PlannedRunReqInput
from batchllm.srt.managers.planned_intake import RunReader
from batchllm.tokens import TokenTable
from tests.srt.test_live_prefixes import _Cache, _tokens

GROUP = 4 * MIN_FINISHED
"""Consumers from which a prefix has a kind of its own."""


def test_lengths_of_a_prefix_are_forgotten_when_its_last_reader_has_finished() -> None:
    """A job of 40 groups, each large enough to have lengths of its own, keeps those of the groups that are open."""
    ledger, lengths = PinLedger(), OutputLengths()
    config: Any = SimpleNamespace(vocab_size=1000, hf_eos_token_id=None)
    reader = RunReader(ledger, lengths, None, config, learns_lengths=True)
    prompts = [[group + 1] * 20 + [100 + row] for group in range(40) for row in range(GROUP)]
    table = TokenTable.from_lists(prompts)
    cutter = RunCutter(plan_batch(table), table, np.full(len(prompts), 8))
    most = 0
    for first in range(0, len(prompts), GROUP):
        message = PlannedRunReqInput(
            job_id=0,
            run=cutter.cut(first, first + GROUP),
            sampling=[{"max_new_tokens": 8, "min_new_tokens": 0}],
            sampling_index=np.zeros(GROUP, np.int32),
            seeds=np.zeros(GROUP, np.int64),
            num_logprobs=np.full(GROUP, -1, np.int32),
            require_reasoning=[False],
            lora_paths=[None],
            lora_ids=[None],
        )
        reqs = list(reader.read(message))
        for req in reqs:
            lengths.finish(req.output, 3)
            ledger.finish_consumer(req.prefix_id)
        most = max(most, lengths.num_kinds)
    assert most <= 4  # all, the job, the group that is open and the one before it
    assert len(reader._prefix_tokens) <= 1


def test_what_was_withdrawn_is_not_kept_when_it_has_been_evicted() -> None:
    """A server that always has a batch never comes to `free_withdrawn`."""
    cache = _Cache()
    for start in range(1, 4000):
        prompt = _tokens((start, 60))
        cache.compute(prompt)
        node, _ = cache.live._match(prompt, None, len(prompt))
        cache.tree._set_withdrawn(node)
        cache.evict(max(0, 60 - cache.allocator.available_size()))
    assert len(cache.tree._withdrawn) < 1500
    cache.tree.free_withdrawn()
    assert cache.allocator.available_size() == 1000
    assert not cache.tree._withdrawn
