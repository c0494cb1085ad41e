"""The backend for CUDA, without CUDA: what it plans, chooses and leaves to SGLang, and the numbers of its own steps.

SGLang's Triton backend needs a GPU, so its methods are replaced by ones that say they were called. Pools are SGLang's
own, on CPU; our kernels run in Triton's interpreter. No CUDA graph: what one would hold is run by itself.
"""

from __future__ import annotations

import inspect
import logging
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.layers.radix_attention import RadixAttention
from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool, ReqToTokenPool
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from triton.runtime.errors import OutOfResources

from batchllm.attention import reference
from batchllm.attention.base import LayerShape
from batchllm.attention.dispatch import Dispatcher
from batchllm.attention.triton_shared import SharedAttention
from batchllm.errors import LayoutError
from batchllm.prefix_cache.pin_ledger import PinLedger
from batchllm.srt.layers import gpu_attention_backend
from batchllm.srt.layers.gpu_attention_backend import SharedGpuAttnBackend
from batchllm.srt.mem_cache.shared_prefixes import SharedPrefixes
from tests.attention.test_triton import interpreter  # noqa: F401 - a fixture, for every test of this file
from tests.attention.tolerance import check_close

pytestmark = pytest.mark.filterwarnings("ignore:Conversion of an array:DeprecationWarning")

_HEADS, _KV_HEADS, _HEAD_DIM = 4, 2, 16
_STOCK = "computed by SGLang"

# What ours were written against: an upgrade that changes one of these shows here.
_FORWARD = ["self", "q", "k", "v", "layer", "forward_batch", "save_kv_cache", "sinks", "score_mod", "aux_tensors"]
_SIGNATURES = {
    "__init__": ["self", "model_runner", "skip_prefill", "kv_indptr_buf"],
    "init_forward_metadata": ["self", "forward_batch"],
    "init_forward_metadata_out_graph": ["self", "forward_batch", "in_capture"],
    "init_cuda_graph_state": ["self", "max_bs", "max_num_tokens", "kv_indices_buf", "cuda_graph_num_kv_splits_buf"],
    "forward_decode": _FORWARD,
    "forward_extend": _FORWARD,
}


class _World:
    """A backend over real pools, the prefixes that rows share, and the steps of a few sequences."""

    def __init__(self, num_layers: int = 1) -> None:
        pool: dict[str, Any] = {"dtype": torch.float32, "device": "cpu", "enable_memory_saver": False}
        self.kv = MHATokenToKVPool(
            2000, page_size=1, head_num=_KV_HEADS, head_dim=_HEAD_DIM, layer_num=num_layers, **pool
        )
        self.table = ReqToTokenPool(size=12, max_context_len=200, device="cpu", enable_memory_saver=False)
        torch.manual_seed(0)
        for buffer in (*self.kv.k_buffer, *self.kv.v_buffer):
            buffer.normal_()
        # Rows 1 to 6 share 100 slots, 1 to 3 share 70 more; rows 7 to 9 share nothing.
        slots = 1 + torch.arange(10 * 190, dtype=torch.int32).view(10, 190)
        slots[1:7, :100] = slots[1, :100].clone()
        slots[1:4, 100:170] = slots[1, 100:170].clone()
        self.table.req_to_token[:10, :190] = slots
        self.table.req_to_token[0, :190] = 0
        self.prefixes = SharedPrefixes(PinLedger(), num_table_rows=13, page_size=1)
        outer = self.prefixes.paths.add(-1, 100)
        self.prefixes.leaf[1:4] = self.prefixes.paths.add(outer, 170)
        self.prefixes.leaf[4:7] = outer
        runner = SimpleNamespace(req_to_token_pool=self.table, token_to_kv_pool=self.kv, dtype=torch.float32)
        self.backend = SharedGpuAttnBackend(runner)
        self.backend.follow(self.prefixes)

    def batch(self, rows: list[int], kv_len: list[int], qo_len: list[int] | None = None, **fields: Any) -> Any:
        """A batch of SGLang; with ``qo_len`` a prefill."""
        num_new = np.array(qo_len or [1] * len(rows))
        table = self.table.req_to_token
        new = [table[row, n - new : n] for row, n, new in zip(rows, kv_len, num_new, strict=True)]
        return SimpleNamespace(
            forward_mode=ForwardMode.EXTEND if qo_len else ForwardMode.DECODE,
            batch_size=len(rows),
            req_pool_indices=torch.tensor(rows, dtype=torch.int64),
            seq_lens_cpu=torch.tensor(kv_len, dtype=torch.int64),
            extend_seq_lens_cpu=qo_len,
            spec_info=None,
            out_cache_loc=torch.cat(new).long() if new else torch.empty(0, dtype=torch.int64),
            **fields,
        )

    def check(self, batch: Any, layer: Any, num_padding: int = 0) -> Any:
        """Run a layer of the planned step and compare it with the reference, if it is not left to SGLang."""
        num_tokens = len(batch.out_cache_loc)
        q = torch.randn(num_tokens + num_padding, _HEADS * _HEAD_DIM)
        k, v = torch.randn(2, num_tokens, _KV_HEADS, _HEAD_DIM)
        forward = self.backend.forward_extend if batch.extend_seq_lens_cpu else self.backend.forward_decode
        output = forward(q, k, v, layer, batch)
        if output is _STOCK:
            return output
        caches = self.kv.get_key_buffer(layer.layer_id), self.kv.get_value_buffer(layer.layer_id)
        assert torch.equal(caches[0][batch.out_cache_loc], k) and torch.equal(caches[1][batch.out_cache_loc], v)
        layout = self.backend._step.layout
        assert layout is not None
        heads = q[:num_tokens].view(-1, _HEADS, _HEAD_DIM)
        expected = reference.attention(heads, *caches, self.table.req_to_token, layout, layer.scaling)
        check_close(output[:num_tokens].view(heads.shape), expected, "triton")
        assert (output[num_tokens:] == 0).all()
        return output


def _layer(layer_id: int = 0, **options: Any) -> RadixAttention:
    options = {"num_heads": _HEADS, "head_dim": _HEAD_DIM, "num_kv_heads": _KV_HEADS, "scaling": 0.25} | options
    return RadixAttention(layer_id=layer_id, **options)


@pytest.fixture(autouse=True)
def stock(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Replaces what of SGLang's backend needs CUDA; the names of its methods as they are called."""
    calls: list[str] = []

    def init(self: Any, runner: Any) -> None:
        self.req_to_token_pool, self.token_to_kv_pool = runner.req_to_token_pool, runner.token_to_kv_pool
        self.req_to_token, self.device = runner.req_to_token_pool.req_to_token, "cpu"
        self.num_head, self.num_kv_head, self.v_head_dim = _HEADS, _KV_HEADS, _HEAD_DIM
        self.use_mla = self.enable_deterministic = self.use_sliding_window_kv_pool = False
        self.dcp_size, self._translate_kv_loc = 1, None

    monkeypatch.setattr(TritonAttnBackend, "__init__", init)
    for name in _SIGNATURES.keys() - {"__init__"}:
        monkeypatch.setattr(TritonAttnBackend, name, lambda *_, name=name: calls.append(name) or _STOCK)
    return calls


_UPSTREAM = {name: inspect.signature(getattr(TritonAttnBackend, name)) for name in _SIGNATURES}


@pytest.mark.parametrize("name", _SIGNATURES)
def test_upstream_methods_are_what_ours_override(name: str) -> None:
    """Names and order of parameters; ours take the same, but for the constructor."""
    assert list(_UPSTREAM[name].parameters) == _SIGNATURES[name]
    if name != "__init__":
        assert list(inspect.signature(getattr(SharedGpuAttnBackend, name)).parameters) == _SIGNATURES[name]


def test_eager_steps_follow_the_rows(stock: list[str]) -> None:
    """Shared decode and prefill, then other rows, then nothing shared; SGLang's metadata is there for each."""
    world, layer = _World(), _layer()
    steps: list[tuple[str, list[int], list[int], list[int] | None]] = [
        ("shared", [1, 9, 4, 2, 6], [175, 30, 101, 171, 130], None),
        ("shared", [3, 5, 2], [180, 110, 172], [10, 5, 2]),
        ("shared", [6, 4, 8], [131, 102, 7], None),
        ("plain", [7, 4, 9], [20, 103, 31], None),
    ]
    for kind, rows, kv_len, qo_len in steps:
        batch = world.batch(rows, kv_len, qo_len)
        world.backend.begin_step(np.array(rows, np.int32))
        world.backend.init_forward_metadata(batch)
        assert world.backend._step.kind == kind
        assert (world.check(batch, layer) is _STOCK) == (kind == "plain")
    assert stock == ["init_forward_metadata"] * 4 + ["forward_decode"]
    assert world.backend.kv_read_tokens == 20 + 103 + 31


def test_reads_are_counted_once_a_segment() -> None:
    """Rows 1 and 2 share 170 tokens, row 4 reads its own."""
    world = _World()
    world.backend.init_forward_metadata(world.batch([1, 2, 4], [175, 171, 101]))
    assert world.backend.kv_read_tokens == 170 + 5 + 1 + 1
    drafted = world.batch([1], [175])
    drafted.spec_info = "a draft"
    world.backend.init_forward_metadata(drafted)
    assert world.backend.kv_read_tokens is None


def test_nothing_is_planned_for_warm_ups() -> None:
    """Their lengths need not make sense."""
    backend = _World().backend
    backend.follow(SharedPrefixes.empty())
    backend.init_forward_metadata(SimpleNamespace(forward_mode=ForwardMode.EXTEND))
    assert backend._step.kind == "plain" and backend.kv_read_tokens is None


def test_rows_count_for_one_step() -> None:
    """A step that nobody announced reads its rows from the batch, and so does one that was announced wrongly."""
    world = _World()
    batch = world.batch([1, 2], [175, 171])
    for announced in ([4, 5], [4, 5, 6]):
        world.backend.begin_step(np.array(announced, np.int32))
        world.backend.init_forward_metadata(world.batch(announced[:2], [110, 110]))
        world.backend.init_forward_metadata(batch)
        assert world.backend._step.layout is not None
        assert world.backend._step.layout.table_rows.tolist() == [1, 2]


def test_a_graph_serves_every_decode_step(stock: list[str]) -> None:
    """Captured with nothing shared; then steps that share, fewer rows, none: buffers stay where they are."""
    world, layer = _World(), _layer()
    backend = world.backend
    backend.init_cuda_graph_state(8, 8)
    batch = world.batch([0] * 4, [1] * 4)
    backend.init_forward_metadata_out_graph(batch, in_capture=True)
    # All of the dummy batch write the same slot, so only the call is of interest.
    backend.forward_decode(torch.zeros(4, 64), torch.zeros(4, 2, 16), torch.zeros(4, 2, 16), layer, batch)
    (attention,) = backend._shared.values()
    addresses = [tensor.data_ptr() for tensor in (attention._lists, attention._part_o, attention._part_lse)]
    for rows, kv_len in (([1, 4, 2, 8], [175, 101, 171, 3]), ([7, 8], [5, 9]), ([6, 3, 5], [120, 172, 101]), ([], [])):
        num_padding = 4 - len(rows)
        view = world.batch(rows, kv_len, num_padding=num_padding)
        view.batch_size = 4
        view.seq_lens_cpu = torch.cat([view.seq_lens_cpu, torch.ones(num_padding, dtype=torch.int64)])
        backend.begin_step(np.array(rows, np.int32))
        backend.init_forward_metadata_out_graph(view)
        assert backend._step.kind == "graph"
        world.check(view, layer, num_padding)
        assert list(backend._shared.values()) == [attention]
        tensors = (attention._lists, attention._part_o, attention._part_lse)
        assert [tensor.data_ptr() for tensor in tensors] == addresses
    assert "forward_decode" not in stock


def test_eager_buffers_grow_and_graph_buffers_stay() -> None:
    """A long prefill gets larger buffers; where they would be too large, SGLang computes the step."""
    world, layer = _World(), _layer()
    world.backend.init_cuda_graph_state(8, 8)
    rows, kv_len, qo_len = [1, 2, 3, 4, 5], [185, 184, 183, 150, 140], [15, 14, 13, 50, 40]
    batch = world.batch(rows, kv_len, qo_len)
    world.backend.init_forward_metadata(batch)
    assert world.check(batch, layer) is not _STOCK
    assert world.backend._max_eager_rows == 256
    world.backend._max_eager_rows = 64  # as if steps so far had been shorter
    world.backend.init_forward_metadata(batch)
    assert world.check(batch, layer) is not _STOCK
    assert world.backend._max_eager_rows == 256


def test_without_room_the_step_is_a_plain_one(monkeypatch: pytest.MonkeyPatch, stock: list[str]) -> None:
    """At the first layer of a shape, and in later steps before any layer."""
    monkeypatch.setattr(gpu_attention_backend, "_MIN_SLOTS", 1)
    monkeypatch.setattr(gpu_attention_backend, "_MAX_PARTIAL_BYTES", 1)
    world, layer = _World(), _layer()
    batch = world.batch([1, 2], [175, 171])
    for _ in range(2):
        world.backend.init_forward_metadata(batch)
        assert world.check(batch, layer) is _STOCK
        assert world.backend.kv_read_tokens == 175 + 171
    assert stock.count("forward_decode") == 2


@pytest.mark.parametrize("group", [1, 5, 16, 64])
def test_a_graph_has_room_for_any_decode_step(group: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Deep and wide trees of prefixes, long and short: a step that does not fit could not be computed at all."""
    monkeypatch.setattr(gpu_attention_backend, "_MIN_SLOTS", 1)
    random = np.random.default_rng(group)
    for num_rows in (1, 7, 64):
        backend = _World().backend
        backend.init_cuda_graph_state(num_rows, num_rows)
        attention = backend._make_shared("graph", LayerShape(group, 1, 16, torch.float32, 1.0))
        for _ in range(30):
            prefixes = SharedPrefixes(PinLedger(), num_table_rows=num_rows, page_size=1)
            ends: list[int] = []
            for _ in range(random.integers(1, 40)):
                parent = int(random.integers(-1, len(ends)))
                end = (ends[parent] if parent >= 0 else 0) + int(random.choice([1, 64, 300, 5000]))
                assert prefixes.paths.add(parent, end) == len(ends)
                ends.append(end)
            rows = np.arange(num_rows, dtype=np.int32)
            prefixes.leaf[:] = random.integers(0, len(ends), num_rows)
            kv_len = np.array(ends, np.int32)[prefixes.leaf] + random.integers(1, 900, num_rows)
            backend.follow(prefixes)
            layout = backend._plan(rows, np.ones(num_rows, np.int32), kv_len.astype(np.int32))
            attention.plan(layout, torch.zeros(num_rows, 1, dtype=torch.int32), num_rows=num_rows)


@pytest.mark.parametrize(
    ("options", "fields", "reason"),
    [
        ({"sliding_window_size": 8}, {}, "sliding window"),
        ({"is_cross_attention": True}, {}, "self-attention"),
        ({"v_head_dim": 8}, {}, "keys of 16 and values of 8"),
        ({"head_dim": 24}, {}, "of 24 elements"),
        ({"num_kv_heads": 4}, {}, "KV buffer"),
        ({}, {"k_scale": torch.ones(1)}, "scaled KV"),
        ({}, {"xai_temperature_len": 9}, "temperature"),
        ({"logit_cap": 5.0, "logit_capping_method": "other"}, {}, "capped by other"),
    ],
)
def test_other_layers_are_left_to_sglang(
    options: dict[str, Any], fields: dict[str, Any], reason: str, caplog: pytest.LogCaptureFixture
) -> None:
    """Which is said once a layer."""
    caplog.set_level(logging.WARNING, logger="batchllm")  # an engine of another test has made the root logger quieter
    world, layer = _World(), _layer(**options)
    for name, value in fields.items():
        setattr(layer, name, value)
    q = torch.zeros(2, _HEADS * layer.head_dim)
    batch = world.batch([1, 2], [175, 171])
    for _ in range(2):
        world.backend.init_forward_metadata(batch)
        assert world.backend._step.kind == "shared"
        output: Any = world.backend.forward_decode(q, None, None, layer, batch)
        assert output is _STOCK
    assert len(caplog.records) == 1 and reason in caplog.text


@pytest.mark.parametrize("error", [OutOfResources(200_000, 101_376, "shared memory"), RuntimeError("no kernel image")])
def test_what_a_device_cannot_launch_is_left_to_sglang(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """From the first launch on, for all layers of the shape, with the reason once. A graph has no other path."""
    caplog.set_level(logging.WARNING, logger="batchllm")
    launches: list[Any] = []

    def launch(self: Any, *tensors: Any) -> None:
        launches.append(tensors)
        raise error

    monkeypatch.setattr(SharedAttention, "run", launch)
    world = _World()
    batch = world.batch([1, 2], [175, 171])
    for _ in range(3):
        world.backend.init_forward_metadata(batch)
        assert world.check(batch, _layer()) is _STOCK
        assert world.backend._step.kind == "plain"
    assert len(launches) == 1
    assert len(caplog.records) == 1 and str(error) in caplog.text
    world.backend.init_cuda_graph_state(4, 4)
    batch = world.batch([1, 2], [175, 171], num_padding=0)
    world.backend.init_forward_metadata_out_graph(batch)
    with pytest.raises(type(error)):
        world.check(batch, _layer())


def test_sinks_are_left_to_sglang() -> None:
    """Those of a layer that is called without them as well."""
    world, layer = _World(), _layer()
    batch = world.batch([1, 2], [175, 171])
    world.backend.init_forward_metadata(batch)
    assert world.check(batch, layer) is not _STOCK
    output: Any = world.backend.forward_decode(torch.zeros(2, 64), None, None, layer, batch, sinks=torch.ones(4))
    assert output is _STOCK


def test_cascade_where_it_was_measured_to_be_faster(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlashInfer is planned once a step, and knows the scale of the layers."""
    calls: list[Any] = []

    class Fake:
        def __init__(self, *args: Any, **options: Any) -> None:
            calls.append((args, options))

        def plan(self, layout: Any, table: torch.Tensor) -> None:
            calls.append(layout)

        def run(self, q: torch.Tensor, keys: Any, values: Any, output: torch.Tensor) -> None:
            calls.append("run")

    monkeypatch.setattr(gpu_attention_backend, "FlashInferSharedAttention", Fake)
    world = _World(num_layers=2)
    measured = {"group_sizes": [2], "shared_lens": [64], "paths": [["cascade"]]}
    world.backend.dispatcher = Dispatcher("cpu", table={"cpu": {"decode": measured}})
    batch = world.batch([1, 2], [175, 171])
    q, kv = torch.zeros(2, 64), torch.zeros(2, 2, 16)
    world.backend.init_forward_metadata(batch)
    for layer in (_layer(0), _layer(1)):
        world.backend.forward_decode(q, kv, kv, layer, batch)
    shape = LayerShape(_HEADS, _KV_HEADS, _HEAD_DIM, torch.float32, 0.25)
    assert calls == [((shape, "cpu"), {"max_levels": 3}), world.backend._step.layout, "run", "run"]


def test_layouts_are_checked_if_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row that does not hold the prefix it should is found."""
    monkeypatch.setenv(gpu_attention_backend.CHECK_VARIABLE, "1")
    world = _World()
    world.backend.init_forward_metadata(world.batch([1, 2], [175, 171]))
    world.table.req_to_token[3, 0] += 1
    with pytest.raises(LayoutError, match="slot"):
        world.backend.init_forward_metadata(world.batch([1, 3], [175, 171]))


def test_registering(monkeypatch: pytest.MonkeyPatch) -> None:
    """Under a name of its own; what decodes while the table is written waits for the step."""
    monkeypatch.setitem(ATTENTION_BACKENDS, "batchllm", None)
    monkeypatch.setenv("SGLANG_FORCE_COARSE_WAR_BARRIER", "0")
    gpu_attention_backend.register()
    assert gpu_attention_backend.envs.SGLANG_FORCE_COARSE_WAR_BARRIER.get()
    world = _World()
    runner: Any = SimpleNamespace(model_config=SimpleNamespace(is_encoder_decoder=False), dtype=torch.float32)
    runner.req_to_token_pool, runner.token_to_kv_pool = world.table, world.kv
    assert isinstance(ATTENTION_BACKENDS["batchllm"](runner), SharedGpuAttnBackend)
    runner.model_config.is_encoder_decoder = True
    with pytest.raises(ValueError, match="cross attention"):
        ATTENTION_BACKENDS["batchllm"](runner)
