"""Claims about weights that are loaded into an engine that runs."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.managers.io_struct import UpdateWeightFromDiskReqInput
from transformers import AutoModelForCausalLM

from batchllm import BatchEngine, default_model
from tests.srt.live import GREEDY, run, tell_manager

pytestmark = pytest.mark.engine


def test_weights_that_are_loaded_answer_from_then_on_and_none_under_a_batch(engine: BatchEngine) -> None:
    """What is computed with is kept packed beside them, and must not outlive them."""
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


def _load(engine: BatchEngine, path: str) -> tuple[bool, str, int]:
    message = UpdateWeightFromDiskReqInput(model_path=path)
    result: tuple[bool, str, int] = run(engine, tell_manager(engine, "update_weights_from_disk", message))
    return result


def _greedy(engine: BatchEngine, prompts: list[list[int]]) -> list[list[int]]:
    return [list(c.output_ids) for c in engine.batch_generate(input_ids=prompts, sampling_params=GREEDY)]
