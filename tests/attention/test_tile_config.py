"""Tuned tile sizes are found again for what they were timed with, and for nothing else; the tuner's steps are steps."""

from __future__ import annotations

import json
import math
import pickle
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from triton.runtime.errors import OutOfResources

from batchllm.attention import check_layout
from batchllm.attention.tile_config import TileConfig, cache_path, default_config, load_config
from batchllm.errors import ConfigError
from eval import tile_tuner

_CUDA = torch.device("cuda", 0)
_TUNED = TileConfig(128, 32, 512, 4, 1, 8, 2, merge_slots=16)


@pytest.fixture(autouse=True)
def h200(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)


def test_a_choice_holds_for_its_device_heads_and_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    path = tile_tuner.save_config(_CUDA, 32, 8, 128, torch.bfloat16, _TUNED)
    assert path.parts[-3:] == ("batchllm", "attention", "nvidia-h200.json")
    assert load_config(_CUDA, 32, 8, 128, torch.bfloat16) == _TUNED
    default = default_config((9, 0), 128, torch.bfloat16)
    assert load_config(_CUDA, 32, 8, 128, torch.float16) == default
    assert load_config(_CUDA, 28, 4, 128, torch.bfloat16) == default
    assert load_config(torch.device("cpu"), 32, 8, 128, torch.bfloat16) == default_config((8, 0), 128, torch.bfloat16)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100")
    assert load_config(_CUDA, 32, 8, 128, torch.bfloat16) == default


def test_other_choices_stay() -> None:
    tile_tuner.save_config(_CUDA, 32, 8, 128, torch.bfloat16, _TUNED)
    path = tile_tuner.save_config(_CUDA, 28, 4, 128, torch.bfloat16, default_config((9, 0), 128, torch.bfloat16))
    assert load_config(_CUDA, 32, 8, 128, torch.bfloat16) == _TUNED
    assert len(json.loads(path.read_text())) == 2
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("content", ["[", '{"KEY": {"block_n": 32}}'])
def test_a_broken_file_is_named(content: str) -> None:
    path = tile_tuner.save_config(_CUDA, 32, 8, 128, torch.bfloat16, _TUNED)
    key = next(iter(json.loads(path.read_text())))
    path.write_text(content.replace("KEY", key))
    with pytest.raises(ConfigError, match=str(cache_path(_CUDA))):
        load_config(_CUDA, 32, 8, 128, torch.bfloat16)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
def test_candidates_are_different_and_begin_with_the_default(head_dim: int) -> None:
    configs = tile_tuner.candidates((9, 0), head_dim, torch.bfloat16)
    assert configs[0] == default_config((9, 0), head_dim, torch.bfloat16)
    assert len(set(configs)) == len(configs) > 10


@pytest.mark.parametrize(
    ("levels", "readers", "num_segments"), [([], 5, 0), ([(3, 20)], 4, 3), ([(1, 2), (2, 3), (2, 9)], 3, 7)]
)
def test_made_up_steps_share_what_they_say(levels: Sequence[tuple[int, int]], readers: int, num_segments: int) -> None:
    layout, table, num_slots = tile_tuner.made_up_step(levels, readers, private_len=7, query_len=2)
    check_layout(layout, table.numpy(), is_thorough=True)
    assert len(layout.kv_len) == readers * math.prod(fanout for fanout, _ in levels)
    assert len(layout.segment_readers) == num_segments
    assert (layout.private_start == sum(length for _, length in levels)).all()
    assert sorted(set(table.flatten().tolist())) == list(range(1, num_slots))


def test_tuning_keeps_the_fastest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sizes first, then each of the ways to cut, with the best so far; what does not fit is passed over.

    All that are timed have been compiled before, by processes that get what they need by pickle.
    """
    compiled: list[TileConfig] = []

    def compile_all(device: torch.device, heads: Any, configs: list[TileConfig]) -> None:
        pickle.loads(pickle.dumps([(tile_tuner._launch_once, device.index, heads, config) for config in configs]))
        compiled.extend(configs)

    def time_step(device: torch.device, heads: Any, config: TileConfig, step: Any) -> float:
        assert config in compiled
        if config.block_n == 128:
            raise OutOfResources(1, 0, "shared memory")
        wanted = {"block_n": 32, "num_stages": 4, "tiles_per_program": 4, "min_split": 128, "merge_slots": 16}
        return 1.0 + sum(getattr(config, name) != value for name, value in wanted.items())

    monkeypatch.setattr(tile_tuner, "_compile_all", compile_all)
    monkeypatch.setattr(tile_tuner, "_time_step", time_step)
    lines: list[str] = []
    best = tile_tuner.tune(_CUDA, 32, 8, 128, torch.bfloat16, report=lines.append)
    assert (best.block_n, best.num_stages) == (32, 4)
    assert (best.tiles_per_program, best.min_split, best.merge_slots) == (4, 128, 16)
    assert load_config(_CUDA, 32, 8, 128, torch.bfloat16) == best
    assert any("out of resource" in line for line in lines)


def test_nothing_is_tuned_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="captured"):
        tile_tuner.tune(_CUDA, 32, 8, 128, torch.bfloat16)
