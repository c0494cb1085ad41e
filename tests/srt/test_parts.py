"""Claims about the parts that we put into SGLang, without a running engine."""

from __future__ import annotations

import argparse
import os
import random
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_type_hints

import numpy as np
import pytest
import torch

from batchllm.default_model import default_model_path
from batchllm.errors import ConfigError, SeamError
from batchllm.host import own_folder
from batchllm.srt import argument_values, compat, plugin
from batchllm.srt.entrypoints import processes
from batchllm.srt.layers import sampler
from batchllm.srt.managers.scheduler import BatchScheduler
from batchllm.srt.mem_cache import radix_cache
from batchllm.srt.mem_cache.allocator import CpuTokenAllocator
from batchllm.srt.platforms.platform_cpu import CpuPlatform, activate
from batchllm.srt.server_args import BatchServerArgs, make_parser, make_server_args, parse_server_flags


def _allocator(size: int, page_size: int = 1) -> CpuTokenAllocator:
    kwargs: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "kvcache": None, "need_sort": False}
    return CpuTokenAllocator(size, page_size=page_size, **kwargs)


def test_a_slot_is_never_given_out_twice() -> None:
    """Random takes and returns, in and out of free groups, against a set."""
    rng, allocator, held = random.Random(0), _allocator(200), []
    for _ in range(500):
        wanted = rng.randint(1, 40)
        slots = allocator.alloc(wanted)
        assert (slots is None) == (wanted > allocator.size - sum(map(len, held)))
        if slots is not None:
            held.append(slots)
        if held and rng.random() < 0.6:
            allocator.free_group_begin()
            allocator.free(held.pop(rng.randrange(len(held))))
            allocator.free_group_end()
        everything = torch.cat([*held, allocator.free_pages])
        assert sorted(everything.tolist()) == list(range(1, 201))
        assert allocator.available_size() == 200 - sum(map(len, held))


def test_freeing_more_than_there_is_raises() -> None:
    """Slots freed twice would be given out twice."""
    allocator = _allocator(4)
    slots = allocator.alloc(2)
    assert slots is not None
    allocator.free(slots)
    with pytest.raises(RuntimeError, match="freed twice"):
        allocator.free(slots)


def test_clearing_makes_all_slots_free() -> None:
    """As flushing the cache does."""
    allocator = _allocator(8)
    allocator.alloc(5)
    allocator.clear()
    assert allocator.available_size() == 8


def test_on_cpu_a_page_is_one_token() -> None:
    """Larger pages need Triton kernels."""
    with pytest.raises(ConfigError, match="--page-size 16"):
        _allocator(64, page_size=16)


def test_the_upstream_functions_are_the_ones_that_were_read() -> None:
    """Every pinned source is unchanged in what is installed."""
    compat.check()


def test_a_changed_upstream_function_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """An upgrade or a local edit does not go unnoticed."""
    name = "sglang.srt.managers.scheduler:Scheduler.run_batch"
    monkeypatch.setitem(compat.PINNED, name, "0" * 12)
    with pytest.raises(SeamError, match="run_batch"):
        compat.check()


def test_another_sglang_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """With both versions named."""
    monkeypatch.setattr(compat, "SGLANG_VERSION", "9.9.9")
    with pytest.raises(SeamError, match=r"0\.5\.17.*9\.9\.9"):
        compat.check()


def test_the_plugin_registers_the_cache_by_name_and_may_run_twice() -> None:
    """So that stock SGLang takes --radix-cache-backend batchllm too."""
    from sglang.srt.mem_cache.registry import registered_radix_cache_backends

    plugin.register()
    plugin.register()
    assert registered_radix_cache_backends().count(radix_cache.BACKEND_NAME) == 1


def test_the_cpu_platform_is_active_only_without_an_accelerator(monkeypatch: pytest.MonkeyPatch) -> None:
    """Or it would take a GPU machine's GPU away."""
    assert activate() == f"{CpuPlatform.__module__}.CpuPlatform"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert activate() is None


def test_seeded_draws_follow_the_probabilities() -> None:
    """Over many seeds the Gumbel-max draws of one row have its distribution."""
    probs = torch.tensor([0.5, 0.3, 0.15, 0.05]).repeat(20_000, 1)
    seeds, positions = torch.arange(20_000), torch.zeros(20_000, dtype=torch.int64)
    hashes = sampler._murmur_hash32(seeds, positions, torch.arange(4))
    assert int(hashes.min()) >= 0
    assert int(hashes.max()) < 2**32
    noise = -torch.log(-torch.log((hashes.to(torch.float64) + 0.5) / 2**32))
    drawn = (probs.log() + noise).argmax(-1)
    shares = torch.bincount(drawn, minlength=4) / len(drawn)
    assert torch.allclose(shares, probs[0], atol=0.012)


def test_server_flags_are_read_as_sglang_reads_them() -> None:
    """Only those given, under the names of its arguments."""
    flags = ["--max-total-tokens", "8192", "--tp-size", "2", "--enable-metrics", "--dtype", "bfloat16"]
    expected = {"max_total_tokens": 8192, "tp_size": 2, "enable_metrics": True, "dtype": "bfloat16"}
    assert parse_server_flags(flags) == expected
    with pytest.raises(ConfigError, match="--no-such-flag"):
        parse_server_flags(["--no-such-flag", "1"])


@pytest.mark.parametrize(
    ("name", "value", "wanted"),
    [
        ("max_total_tokens", "x", "an integer"),
        ("max_total_tokens", 0, "at least 2"),
        ("max_total_tokens", True, "an integer"),
        ("max_total_tokens", [3], "an integer"),
        ("context_length", -1, "at least 2"),
        ("max_running_requests", 0, "at least 1"),
        ("max_prefill_tokens", 0, "at least 1"),
        ("max_prefill_tokens", None, "an integer"),
        ("chunked_prefill_size", 0, "at least 1 token, or -1"),
        ("random_seed", -1, "at least 0"),
        ("random_seed", 2**32, "at most 4294967295"),
        ("mem_fraction_static", "x", "a number"),
        ("skip_tokenizer_init", "no", "True or False"),
        ("tokenizer_path", 3, "a string"),
        ("log_level", "nope", "one of critical"),
        ("schedule_policy", "x", "one of lpm"),
        ("dtype", "nope", "one of auto"),
    ],
)
def test_a_value_that_sglang_cannot_work_with_is_refused_by_name(name: str, value: object, wanted: str) -> None:
    """SGLang's Python interface takes any, and ends in words of Python's, or waits for ever."""
    with pytest.raises(ConfigError, match=f"^--{name.replace('_', '-')} .*: must be {wanted}"):
        make_server_args(default_model_path(), **{name: value})


def test_values_are_read_as_flags_and_numbers_of_numpy_are_numbers() -> None:
    given: dict[str, Any] = {"max_total_tokens": np.int64(512), "random_seed": "3", "attention_backend": "batchllm"}
    args = make_server_args(default_model_path(), context_length=None, skip_tokenizer_init=True, **given)
    assert [args.max_total_tokens, args.random_seed, args.context_length] == [512, 3, None]
    with pytest.raises(ConfigError, match="--model-path 3: must be a folder or a hub name"):
        make_server_args(*[3])


def test_every_flag_gives_a_value_of_the_type_that_its_argument_has() -> None:
    """Else a value that the command takes would be refused."""
    hints = get_type_hints(BatchServerArgs, include_extras=True)
    examples = {"int": "3", "float": "0.5", "human_readable_int": "3", "": "x", "str": "x", "nullable_str": "x"}
    for action in make_parser()._actions:
        read = getattr(action.type, "__name__", "")
        is_value = action.nargs is None and action.dest in hints and read in examples
        if is_value and isinstance(action, argparse._StoreAction) and action.dest != "log_level":
            text = str(next(iter(action.choices))) if action.choices else examples[read]
            values = parse_server_flags([action.option_strings[0], text])
            assert argument_values.checked(values, hints) == values


def test_live_requests_wait_in_our_order_unless_another_was_asked_for() -> None:
    """Also where what was asked for is SGLang's default."""
    model = default_model_path()
    assert make_server_args(model).orders_live
    assert not make_server_args(model, schedule_policy="fcfs").orders_live


def test_help_has_our_flags_in_a_group_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    """Beside all of SGLang's."""
    with pytest.raises(SystemExit):
        make_parser("the program").parse_args(["--help"])
    shown = capsys.readouterr().out
    assert "--mem-fraction-static" in shown
    assert "--kv-limit" in shown.partition("\nbatchllm:")[2]


def test_sockets_lie_elsewhere_where_names_of_temporary_files_are_too_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A socket's name has at most 107 bytes; the folder is removed as ever."""
    long = tmp_path / ("long " * 20)
    long.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(long))
    own = processes.EngineProcesses()
    with own.starting(SimpleNamespace(enable_memory_saver=False, numa_node=None)):
        folder = Path(tempfile.gettempdir())
        handle, name = tempfile.mkstemp()  # as upstream names sockets
        os.close(handle)
    assert len(name) <= 107
    own.end(None)
    assert not folder.exists()
    assert not list(long.iterdir())


def test_files_of_killed_servers_are_removed_by_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the temporary directory and in shared memory; not those of a process that lives."""
    memory, temporary = tmp_path / "shm", tmp_path / "tmp"
    memory.mkdir()
    temporary.mkdir()
    monkeypatch.setattr(processes, "_SHARED_MEMORY", memory)
    monkeypatch.setattr(tempfile, "tempdir", str(temporary))
    dead, alive = 4194305, os.getpid()  # above the largest pid there can be
    for pid in (dead, alive):
        folder = temporary / f"batchllm-{pid}-abcdefgh"
        folder.mkdir()
        own_folder.mark(folder)
        (memory / f"sglang_loads_batchllm-{pid}-x_1.shm").touch()
    own = processes.EngineProcesses()
    with own.starting(SimpleNamespace(enable_memory_saver=False, numa_node=None)):
        assert own.are_up
    own.end(None)
    assert [path.name for path in temporary.iterdir()] == [f"batchllm-{alive}-abcdefgh"]
    assert [path.name for path in memory.iterdir()] == [f"sglang_loads_batchllm-{alive}-x_1.shm"]


def test_a_scheduler_that_is_asked_to_end_does_not_sleep_before_it_does() -> None:
    """SGLang looks whether to end once its idle loop has slept, for a second or until somebody asks for something."""
    slept: list[bool] = []
    scheduler: Any = BatchScheduler.__new__(BatchScheduler)
    scheduler.idle_sleeper = SimpleNamespace(maybe_sleep=lambda: slept.append(scheduler.gracefully_exit))
    for scheduler.gracefully_exit in (False, True):
        scheduler.maybe_sleep_on_idle()
    assert slept == [False]
