"""Attention that reads each shared prefix from memory once a step (`work_list`), as a backend of SGLang for CUDA
devices. Runs in the scheduler's process.

(Upstream: ``srt/layers/attention/triton_backend.py``, ``base_attn_backend.py``, ``attention_registry.py``,
``srt/model_executor/runner/decode_cuda_graph_runner.py``.)

SGLang's Triton backend prepares every step as it does alone, so that any layer and any step can be left to it. Beside
that a step is planned on the host, from lengths and table rows that the scheduler has there: nothing waits for the
device. An eager step takes the path that `Dispatcher` chooses for it. A decode step in a CUDA graph always takes
`SharedAttention`, for a graph must serve steps that share and steps that do not.

Not run so far: anything on a GPU, so no CUDA graph was captured and nothing was timed. Planning, choices, fallbacks
and the numbers of eager steps and of what a graph would hold were run on CPU, in Triton's interpreter.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from sglang.srt.environ import envs
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.triton_backend import TritonAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc
from sglang.srt.model_executor.forward_batch_info import ForwardMode
from sglang.srt.utils import is_flashinfer_available
from triton.runtime.errors import OutOfResources

from batchllm.attention.base import LayerShape
from batchllm.attention.dispatch import Dispatcher, table_key
from batchllm.attention.flashinfer_shared import FlashInferSharedAttention
from batchllm.attention.layout import AttentionLayout
from batchllm.attention.triton_shared import SharedAttention
from batchllm.errors import ConfigError
from batchllm.srt.layers.step_layout import SharesPrefixes, StepPlanner, why_unsupported
from batchllm.srt.server_args import ATTENTION_BACKEND
from batchllm.tokens import Int32Array

logger = logging.getLogger(__name__)

CHECK_VARIABLE = "BATCHLLM_CHECK_LAYOUT"
"""Environment variable: if set, layouts are checked against the table when other rows come together. The table is on
the device: each check copies all of it and waits for everything that was launched."""

_MIN_SEGMENT_LEN = 64
"""Tokens. For each reader of a segment a partial result is written and read back, which with 4 query heads for each KV
head is as much memory as 8 tokens of KV in 16 bits. Estimated, not measured."""

# With 3 a row has at most 4 partial results and 4 tiles if nothing is split, and that is what `SharedAttention` has
# room for where its buffers must not grow: a graph can hold any decode step.
_MAX_NESTED_SEGMENTS = 3
_SLOTS_PER_ROW = _MAX_NESTED_SEGMENTS + 1
_MIN_SLOTS = 4096

_MAX_PARTIAL_BYTES = 512 << 20
"""Of partial results in eager steps, per shape of heads; a step that needs more is left to SGLang. SGLang leaves a
few GiB of the device free for what a step allocates."""

_MAX_HEAD_DIM = 256

Kind = Literal["plain", "shared", "cascade", "graph"]


@dataclass(slots=True)
class _Step:
    """The step that was prepared last.

    Attributes:
        kind: A path of `Dispatcher`; ``graph`` is `SharedAttention` in a CUDA graph, ``plain`` is SGLang's own code.
        layout: None if the step is of a kind that is not planned.
        num_rows: Rows of the CUDA graph, padding included; without one, rows of the layout.
    """

    kind: Kind = "plain"
    layout: AttentionLayout | None = None
    num_rows: int = 0


class SharedGpuAttnBackend(SharesPrefixes, TritonAttnBackend):
    """On CUDA: `batchllm.attention` for decoder layers that it can do, SGLang's Triton backend for the rest."""

    # Lengths are planned with on the host.
    needs_cpu_seq_lens: bool = True

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._planner = StepPlanner(min_segment_len=_MIN_SEGMENT_LEN, max_nested_segments=_MAX_NESTED_SEGMENTS)
        is_cuda = torch.device(self.device).type == "cuda"
        has_cascade = is_cuda and is_flashinfer_available() and model_runner.dtype in (torch.float16, torch.bfloat16)
        device_name = torch.cuda.get_device_name(self.device) if is_cuda else str(self.device)
        heads = (self.num_head, self.num_kv_head, self.v_head_dim, model_runner.dtype)
        self.dispatcher = Dispatcher(table_key(device_name, *heads), has_cascade=has_cascade)
        self._has_fallen_back = False
        # What failed on this device, by path and shape; not tried again.
        self._failed: set[tuple[Kind, LayerShape]] = set()
        self._is_checking = bool(os.environ.get(CHECK_VARIABLE))
        self._why_never = self._why_unsupported_model()
        if self._why_never is not None:
            logger.warning("attention: %s; SGLang's triton backend computes all layers", self._why_never)
        self._rows: Int32Array | None = None
        self._step = _Step()
        self._max_graph_rows = 0
        self._max_eager_rows = 0
        # By layer, and whether it is called with arguments of its own; None where SGLang's code computes it.
        self._shape_of_layer: dict[tuple[int, bool], LayerShape | None] = {}
        self._shared: dict[tuple[Kind, LayerShape], SharedAttention] = {}
        self._cascade: dict[LayerShape, FlashInferSharedAttention] = {}

    def begin_step(self, rows: Int32Array) -> None:
        """Say which rows of the request-to-token table the next step has.

        ``ForwardBatch`` has them on the device only. They count for one step; a step without a call (a warm-up, say)
        fetches its own, and waits for the device.

        Args:
            rows: [S] in the order of the batch, without padding.
        """
        self._rows = rows

    @property
    def kv_read_tokens(self) -> int | None:
        """KV tokens that attention reads in the step that was prepared last; None if it was not planned."""
        step = self._step
        if step.layout is None:
            return None
        return int(step.layout.kv_len.sum()) if step.kind == "plain" else step.layout.num_kv_read_tokens

    # Once a step

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        self._step = _Step()
        layout = self._plan_eager(forward_batch)
        if layout is not None:
            choice = self.dispatcher.choose(layout)
            if self.dispatcher.counts[choice.path, choice.reason] == 1:
                logger.info("attention: steps like this one take the path %s: %s", choice.path, choice.reason)
            self._begin(_Step(choice.path, layout, int(layout.qo_indptr[-1])))

    def init_cuda_graph_state(
        self,
        max_bs: int,
        max_num_tokens: int,
        kv_indices_buf: torch.Tensor | None = None,
        cuda_graph_num_kv_splits_buf: torch.Tensor | None = None,
    ) -> None:
        super().init_cuda_graph_state(max_bs, max_num_tokens, kv_indices_buf, cuda_graph_num_kv_splits_buf)
        # Graphs captured before, if any, are thrown away by the runner; so are the buffers that they hold.
        self._max_graph_rows = max_bs
        self._shared = {key: attention for key, attention in self._shared.items() if key[0] != "graph"}

    def init_forward_metadata_out_graph(self, forward_batch: Any, in_capture: bool = False) -> None:
        super().init_forward_metadata_out_graph(forward_batch, in_capture)
        self._step = _Step()
        rows, self._rows = self._rows, None
        num_rows = forward_batch.batch_size
        is_decode = forward_batch.forward_mode.is_decode_or_idle() and forward_batch.spec_info is None
        if self._why_never is not None or not is_decode or num_rows > self._max_graph_rows:
            return
        # Padding has no sequence: its output is 0. The view of a batch for replay names how much there is.
        num_sequences = num_rows - getattr(forward_batch, "num_padding", 0)
        if in_capture:  # no requests yet: all read the padding row of the table
            rows = np.zeros(num_sequences, np.int32)
        rows = self._rows_or_fetch(rows, forward_batch, num_sequences)
        kv_len = forward_batch.seq_lens_cpu[:num_sequences].numpy().astype(np.int32)
        layout = self._plan(rows, np.ones(num_sequences, np.int32), kv_len)
        self._begin(_Step("graph", layout, num_rows))

    def _plan_eager(self, forward_batch: Any) -> AttentionLayout | None:
        rows, self._rows = self._rows, None
        mode = forward_batch.forward_mode
        # Before a scheduler is there SGLang runs steps of made-up lengths, to warm up.
        if (
            self._why_never is not None
            or len(self._planner.prefixes.leaf) == 0
            or mode not in (ForwardMode.DECODE, ForwardMode.EXTEND, ForwardMode.MIXED)
            or forward_batch.spec_info is not None
            or forward_batch.seq_lens_cpu is None
        ):
            return None
        kv_len = forward_batch.seq_lens_cpu.numpy().astype(np.int32)
        if mode == ForwardMode.DECODE:
            qo_len = np.ones(len(kv_len), np.int32)
        else:
            qo_len = np.asarray(forward_batch.extend_seq_lens_cpu, np.int32)
        return self._plan(self._rows_or_fetch(rows, forward_batch, len(kv_len)), qo_len, kv_len)

    def _rows_or_fetch(self, rows: Int32Array | None, forward_batch: Any, num_sequences: int) -> Int32Array:
        if rows is not None and len(rows) == num_sequences:
            return rows
        return forward_batch.req_pool_indices[:num_sequences].cpu().numpy().astype(np.int32)

    def _plan(self, rows: Int32Array, qo_len: Int32Array, kv_len: Int32Array) -> AttentionLayout:
        layout = self._planner.plan(rows, qo_len, kv_len)
        if self._is_checking:
            self._planner.check(layout, lambda: self.req_to_token.cpu().numpy())
        return layout

    def _begin(self, step: _Step) -> None:
        """Plan for the shapes that are known; those of layers that never ran follow at their first call."""
        self._step = step
        if step.kind == "shared" and step.num_rows > self._max_eager_rows:
            # Larger ones are made below. What still waits in the stream keeps the memory of the old ones.
            self._max_eager_rows = max(256, 1 << (step.num_rows - 1).bit_length())
            self._shared = {key: attention for key, attention in self._shared.items() if key[0] != "shared"}
        for shape in {shape for shape in self._shape_of_layer.values() if shape is not None}:
            if step.kind != "plain":
                self._plan_shape(shape)

    def _plan_shape(self, shape: LayerShape) -> None:
        """Plan the current step for layers of one shape. An eager step that cannot be done becomes a plain one."""
        step = self._step
        assert step.layout is not None
        if (step.kind, shape) in self._failed:
            step.kind = "plain"
            return
        try:
            if step.kind == "cascade":
                if shape not in self._cascade:
                    self._cascade[shape] = self._make_cascade(shape)
                self._cascade[shape].plan(step.layout, self.req_to_token)
            else:
                if (step.kind, shape) not in self._shared:
                    self._shared[step.kind, shape] = self._make_shared(step.kind, shape)
                self._shared[step.kind, shape].plan(step.layout, self.req_to_token, num_rows=step.num_rows)
        except (ConfigError, ValueError, RuntimeError) as error:  # a ValueError is of this step only: it is too large
            self._fall_back(error, None if isinstance(error, ValueError) else shape)

    def _fall_back(self, error: Exception, failed: LayerShape | None = None) -> None:
        """Leave this eager step to SGLang; with a shape, every step of the same kind that has layers of that shape."""
        if self._step.kind == "graph":  # a captured graph has no other path
            raise error
        if failed is not None:
            self._failed.add((self._step.kind, failed))
        if not self._has_fallen_back:
            reason = f"{type(error).__name__}: {error}"
            logger.warning("attention: %s; SGLang's triton backend computes this step, and others like it", reason)
        self._has_fallen_back = True
        self._step.kind = "plain"

    def _make_cascade(self, shape: LayerShape) -> FlashInferSharedAttention:
        return FlashInferSharedAttention(shape, self.device, max_levels=_MAX_NESTED_SEGMENTS)

    def _make_shared(self, kind: Kind, shape: LayerShape) -> SharedAttention:
        max_rows = self._max_graph_rows if kind == "graph" else self._max_eager_rows
        max_slots = max(_MIN_SLOTS, _SLOTS_PER_ROW * max_rows)
        if kind == "shared":
            slot_bytes = 4 * shape.num_heads * (shape.head_dim + 1)
            max_slots = max(_MIN_SLOTS, min(max_slots, _MAX_PARTIAL_BYTES // slot_bytes))
        return SharedAttention(shape, self.device, max_rows=max_rows, max_slots=max_slots, frozen=True)

    # Once a layer

    def forward_decode(
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: Any = None,
        score_mod: Any = None,
        aux_tensors: Any = None,
    ) -> torch.Tensor:
        extras = (sinks, score_mod, aux_tensors)
        output = self._run(q, k, v, layer, forward_batch, save_kv_cache, extras, None)
        if output is not None:
            return output
        return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache, *extras)

    def forward_extend(
        self,
        q: Any,
        k: Any,
        v: Any,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool = True,
        sinks: Any = None,
        score_mod: Any = None,
        aux_tensors: Any = None,
    ) -> torch.Tensor:
        extras = (sinks, score_mod, aux_tensors)
        # Where a prefill runs in pieces of CUDA graphs, the next piece reads from a buffer of its own.
        into = getattr(forward_batch, "_attn_output", None)
        output = self._run(q, k, v, layer, forward_batch, save_kv_cache, extras, into)
        if output is not None:
            return output
        return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache, *extras)

    # As upstream does with its kernels: what is chosen here is not for torch.compile to trace.
    @torch.compiler.disable
    def _run(
        self,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
        extras: tuple[Any, ...],
        output: torch.Tensor | None,
    ) -> torch.Tensor | None:
        """Save the KV and compute the layer, into ``output`` if given; None if SGLang has to do both."""
        shape = None if self._step.kind == "plain" else self._shape_of(layer, q, extras)
        if shape is None or self._step.kind == "plain":  # the first layer of a shape may find that it cannot be done
            return None
        if save_kv_cache and k is not None and v is not None:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(forward_batch.out_cache_loc, None), k, v)
        q = q.reshape(-1, layer.tp_q_head_num * layer.head_dim)
        output = torch.empty_like(q) if output is None else output
        heads = (-1, layer.tp_q_head_num, layer.head_dim)
        tensors = (
            q.view(heads),
            self.token_to_kv_pool.get_key_buffer(layer.layer_id),
            self.token_to_kv_pool.get_value_buffer(layer.layer_id),
            output.view(heads),
        )
        try:
            attention = self._cascade[shape] if self._step.kind == "cascade" else self._shared[self._step.kind, shape]
            attention.run(*tensors)
        except (OutOfResources, RuntimeError) as error:  # a kernel that this device cannot run is found at its launch
            self._fall_back(error, shape)
            return None
        return output

    def _shape_of(self, layer: Any, q: torch.Tensor, extras: tuple[Any, ...]) -> LayerShape | None:
        has_extras = any(extra is not None for extra in extras)
        key = (layer.layer_id, has_extras)
        if key in self._shape_of_layer:
            return self._shape_of_layer[key]
        shape, reason = None, "sinks or scores of its own" if has_extras else self._why_unsupported(layer, q)
        if reason is None:
            heads = (layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim)
            shape = LayerShape(*heads, q.dtype, float(layer.scaling), float(layer.logit_cap or 0.0))
            if shape not in self._shape_of_layer.values():
                self._plan_shape(shape)
        else:
            logger.warning("layer %d: %s; SGLang's triton backend computes it", layer.layer_id, reason)
        self._shape_of_layer[key] = shape
        return shape

    def _why_unsupported(self, layer: Any, q: torch.Tensor) -> str | None:
        """Why a layer is not one for the kernels; None if it is."""
        key_buffer = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        if (reason := why_unsupported(layer, q, key_buffer)) is not None:
            return reason
        if layer.qk_head_dim != layer.v_head_dim:
            return f"keys of {layer.qk_head_dim} and values of {layer.v_head_dim} elements"
        if layer.sliding_window_size > -1:
            return f"a sliding window of {layer.sliding_window_size} tokens"
        if layer.k_scale is not None or layer.v_scale is not None:
            return "scaled KV"
        if layer.logit_cap and layer.logit_capping_method != "tanh":
            return f"scores capped by {layer.logit_capping_method}"
        if layer.xai_temperature_len > 0:
            return "a temperature by position"
        head_dim = layer.head_dim
        is_power_of_two = not head_dim & (head_dim - 1)
        if layer.tp_q_head_num % layer.tp_k_head_num or not (is_power_of_two and 16 <= head_dim <= _MAX_HEAD_DIM):
            return f"{layer.tp_q_head_num} query heads for {layer.tp_k_head_num} KV heads of {head_dim} elements"
        if key_buffer.shape[1:] != (layer.tp_k_head_num, head_dim):
            return f"a KV buffer of {tuple(key_buffer.shape)}"
        return None

    def _why_unsupported_model(self) -> str | None:
        """Why no layer of the model is one for the kernels; None if some may be."""
        if self.use_mla:
            return "latent attention"
        if self.dcp_size > 1:
            return "KV spread over devices by position"
        if self.enable_deterministic:
            return "results are to be the same in any batch"
        if self._translate_kv_loc is not None or self.use_sliding_window_kv_pool:
            return "KV slots of this pool are not those of the request-to-token table"
        return None


def create(model_runner: Any) -> SharedGpuAttnBackend:
    """Make the backend, as upstream's ``create_triton_backend`` does."""
    if model_runner.model_config.is_encoder_decoder:
        raise ValueError(f"attention backend {ATTENTION_BACKEND} has no cross attention; use flashinfer")
    return SharedGpuAttnBackend(model_runner)


def register() -> None:
    """Make the backend known to SGLang in this process, as ``batchllm``.

    SGLang's decode graphs read the request-to-token table before they are replayed, and it may be written for the next
    step from then on. Ours read it while they run: a row that a finished request gave back may name a segment's slots,
    so the next writes must wait for the whole step.
    """
    ATTENTION_BACKENDS[ATTENTION_BACKEND] = create
    envs.SGLANG_FORCE_COARSE_WAR_BARRIER.set(True)
