"""Rows that LoRA adapters answer, on a real engine."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from batchllm import BatchEngine, Completion
from batchllm.default_model import default_model_path
from batchllm.errors import ConfigError
from tests.srt.adapters import make_adapter, merge

pytestmark = pytest.mark.engine

NUM_NEW = 8
NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> dict[str | None, Any]:
    """The embedded model by ``transformers``, and with each adapter merged into its weights."""
    base = AutoModelForCausalLM.from_pretrained(default_model_path(), dtype=torch.float32).eval()
    networks: dict[str | None, Any] = {None: base}
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        adapter = make_adapter(folder / name, base, seed=seed, rank=4 + 4 * (seed % 2))
        networks[name] = copy.deepcopy(base)
        networks[name].folder = adapter
        merge(networks[name], adapter)
    return networks


@pytest.fixture(scope="module")
def engine(engines: None, networks: dict[str | None, Any]) -> Iterator[BatchEngine]:
    """Room for two of three adapters and the base model at once."""
    paths = {name: str(networks[name].folder) for name in NAMES}
    with BatchEngine(max_total_tokens=4096, lora_paths=paths, max_loras_per_batch=2) as engine:
        yield engine


def rows(num: int) -> tuple[list[list[int]], list[str | None]]:
    """Prompts that all begin alike, answered by the base model and each adapter in turn."""
    draw = random.Random(num)
    shared = [draw.randrange(10, 4000) for _ in range(60)]
    prompts = [shared + [draw.randrange(10, 4000) for _ in range(5)] for _ in range(num)]
    return prompts, [(None, *NAMES)[i % 4] for i in range(num)]


def sampling(adapter: str | None, **more: Any) -> dict[str, Any]:
    return {"temperature": 0, "max_new_tokens": NUM_NEW, "ignore_eos": True, "lora_path": adapter} | more


def answer(network: Any, prompt: list[int]) -> list[int]:
    """The greedy answer by ``transformers``."""
    ids = network.generate(
        torch.tensor([prompt]), max_new_tokens=NUM_NEW, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    answered: list[int] = ids[0, len(prompt) :].tolist()
    return answered


def test_each_row_is_answered_by_its_adapter_at_the_optimum(
    engine: BatchEngine, networks: dict[str | None, Any]
) -> None:
    """More adapters than there is room for at once. What rows of one adapter share is computed once for it."""
    prompts, adapters = rows(24)
    done = engine.batch_generate(input_ids=prompts, sampling_params=[sampling(name) for name in adapters])
    for prompt, adapter, completion in zip(prompts, adapters, done, strict=True):
        assert list(completion.output_ids) == answer(networks[adapter], prompt), adapter
    report = engine.last_report
    assert report is not None
    assert report.num_computed_prompt_tokens == report.num_optimal_prompt_tokens == 4 * 60 + 24 * 5


def test_the_same_prompt_of_two_adapters_shares_nothing(engine: BatchEngine) -> None:
    done = engine.batch_generate(input_ids=[[5] * 40] * 2, sampling_params=[sampling("a"), sampling("b")])
    assert [completion.cached_tokens for completion in done] == [0, 0]
    assert done[0].output_ids != done[1].output_ids


def test_an_adapter_that_is_not_loaded_fails_its_row_only(engine: BatchEngine) -> None:
    done = engine.batch_generate(input_ids=[[5, 6, 7]] * 2, sampling_params=[sampling("nobody"), sampling("a")])
    assert done[0].error is not None and "'nobody'" in done[0].error and "a, b, c" in done[0].error
    assert done[1].finish_reason == "length"


def test_adapters_go_with_samples_log_probabilities_and_grammars(engine: BatchEngine) -> None:
    """What else a row asks for is kept beside its adapter."""
    done = engine.batch_generate(
        ["Say a number: "] * 2,
        [
            sampling("a", ignore_eos=False, regex="[0-9]{3}"),
            sampling("b", temperature=1.0, n=3, seed=5, logprobs=True),
        ],
    )
    constrained, *samples = done
    assert len(constrained.text) == 3 and constrained.text.isdecimal()
    assert len({tuple(completion.output_ids) for completion in samples}) > 1
    assert all(completion.logprobs is not None for completion in samples)


def test_many_rows_of_many_adapters_with_a_pool_that_is_short_are_answered_as_alone(engine: BatchEngine) -> None:
    """Retractions and waiting for an adapter's place change no answer."""
    prompts, adapters = rows(120)
    long = [sampling(name, max_new_tokens=60) for name in adapters]
    together = engine.batch_generate(input_ids=prompts, sampling_params=long)
    for name in (None, *NAMES):
        own = [i for i, adapter in enumerate(adapters) if adapter == name]
        alone = engine.batch_generate(input_ids=[prompts[i] for i in own], sampling_params=[long[i] for i in own])
        assert _texts([together[i] for i in own]) == _texts(alone)


def _texts(completions: list[Completion]) -> list[str]:
    return [completion.text for completion in completions]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"lora_paths": {"x": "/no/such"}}, "--lora-paths x=/no/such: there is no such folder"),
        ({"lora_paths": ["EMPTY"]}, "adapter_config.json cannot be read"),
        ({"lora_paths": {"x": "DAMAGED"}}, "adapter_config.json is not JSON"),
        ({"lora_paths": {"x": "PROMPTS"}}, "only LoRA adapters"),
        ({"lora_paths": {"x": "NO_WEIGHTS"}}, "the folder has no weights"),
        ({"lora_paths": {"x": "GOOD"}, "lora_backend": "csgmv"}, "--lora-backend csgmv: it needs a GPU"),
        ({"lora_paths": {"x": "GOOD"}, "max_loaded_loras": 8}, "--max-loaded-loras 8"),
        ({"lora_paths": {"x": "GOOD"}, "enable_lora_overlap_loading": True}, "--enable-lora-overlap-loading"),
        ({"enable_lora": True}, "--max-lora-rank"),
    ],
)
def test_adapters_that_cannot_be_loaded_are_refused_before_anything_starts(
    engines: None, tmp_path: Path, networks: dict[str | None, Any], arguments: dict[str, Any], words: str
) -> None:
    configs = {"DAMAGED": "{", "PROMPTS": json.dumps({"peft_type": "PROMPT_TUNING"}), "NO_WEIGHTS": '{"r": 4}'}
    for name in ("EMPTY", *configs):
        (tmp_path / name).mkdir()
    for name, text in configs.items():
        (tmp_path / name / "adapter_config.json").write_text(text)
    folders = {name: str(tmp_path / name) for name in ("EMPTY", *configs)} | {"GOOD": str(networks["a"].folder)}
    paths = arguments.get("lora_paths")
    if isinstance(paths, dict):
        arguments = arguments | {"lora_paths": {name: folders.get(path, path) for name, path in paths.items()}}
    elif paths is not None:
        arguments = arguments | {"lora_paths": [folders[path] for path in paths]}
    with pytest.raises(ConfigError) as error:
        BatchEngine(**arguments)
    assert words in str(error.value)
