"""Claims about weights that are loaded into an engine that runs."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

import psutil
import pytest
import torch
from sglang.srt.managers.io_struct import GetWeightsByNameReqInput, UpdateWeightFromDiskReqInput
from transformers import AutoModelForCausalLM

from batchllm import BatchEngine, default_model
from tests.srt.live import GREEDY, live_answer, run, tell_manager

pytestmark = pytest.mark.engine


def test_weights_that_are_loaded_answer_from_then_on_and_none_under_a_batch(engine: BatchEngine) -> None:
    """What is computed with is packed, and must not outlive them."""
    prompts = [[5, 6, 7, 8, 9], [11, 12, 13]]
    before = _greedy(engine, prompts)
    other = default_model.cached_model_path(default_model.DEFAULT, seed=1)
    loaded = AutoModelForCausalLM.from_pretrained(other, dtype=torch.float32)
    expected = [
        loaded.generate(torch.tensor([prompt]), max_new_tokens=8, min_new_tokens=8, do_sample=False)[0, len(prompt) :]
        for prompt in prompts
    ]
    stream = engine.batch_generate_iter(input_ids=prompts * 30, sampling_params=GREEDY | {"max_new_tokens": 100})
    next(stream)
    success, message, _ = _load(engine, other)
    assert not success and "a batch runs" in message
    list(stream)
    for path, answers in ((other, [ids.tolist() for ids in expected]), (default_model.default_model_path(), before)):
        assert _load(engine, path)[0]
        assert _greedy(engine, prompts) == answers


def test_weights_are_told_as_the_checkpoint_has_them(engine: BatchEngine) -> None:
    """Although they are packed between two steps, and answers are the same before and behind."""
    before = _greedy(engine, [[5, 6, 7, 8, 9]])
    state = AutoModelForCausalLM.from_pretrained(default_model.default_model_path(), dtype=torch.float32).state_dict()
    for name in (
        "lm_head",
        "model.layers.1.mlp.gate_proj",
        "model.layers.1.mlp.up_proj",
        "model.layers.0.self_attn.o_proj",
    ):
        message = GetWeightsByNameReqInput(name=f"{name}.weight", truncate_size=3)
        told = run(engine, tell_manager(engine, "get_weights_by_name", message))
        assert torch.equal(torch.tensor(told), state[f"{name}.weight"][:3])
    assert _greedy(engine, [[5, 6, 7, 8, 9]]) == before


@pytest.fixture
def one_core(engine: BatchEngine) -> Iterator[None]:
    """All threads of the engine on one core: who is told something runs before who has told it."""
    cores = os.sched_getaffinity(0)
    host = psutil.Process(engine.runtime.host_pid)
    processes = [psutil.Process(), host, *host.children(recursive=True)]
    threads = [thread.id for process in processes for thread in process.threads()]
    for thread in threads:
        os.sched_setaffinity(thread, {min(cores)})
    yield
    for thread in threads:
        with contextlib.suppress(ProcessLookupError):  # it has ended
            os.sched_setaffinity(thread, cores)


def test_an_engine_is_idle_as_soon_as_it_has_answered(engine: BatchEngine, one_core: None) -> None:
    """What it does only beside no request, it does then."""

    async def outcomes() -> list[bool]:
        found = []
        for i in range(40):
            await live_answer(engine, [5, 6, 7 + i], max_new_tokens=1)
            found.append((await tell_manager(engine, "flush_cache")).success)
        return found

    assert run(engine, outcomes()) == [True] * 40


def _load(engine: BatchEngine, path: str) -> tuple[bool, str, int]:
    message = UpdateWeightFromDiskReqInput(model_path=path)
    result: tuple[bool, str, int] = run(engine, tell_manager(engine, "update_weights_from_disk", message))
    return result


def _greedy(engine: BatchEngine, prompts: list[list[int]]) -> list[list[int]]:
    return [list(c.output_ids) for c in engine.batch_generate(input_ids=prompts, sampling_params=GREEDY)]
