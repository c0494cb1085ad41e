"""Attention that reads each shared prefix once a step, as a backend of SGLang. Runs in the scheduler's process.

(Upstream: ``srt/layers/attention/torch_native_backend.py``, ``attention_registry.py``.)
"""

from __future__ import annotations

import logging
from typing import Any

import numpy as np
import torch
from sglang.srt.configs.model_config import AttentionArch
from sglang.srt.layers import rotary_embedding
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.layers.attention.torch_native_backend import TorchNativeAttnBackend
from sglang.srt.mem_cache.memory_pool import KVWriteLoc

from batchllm.attention.base import LayerShape, StepAttention
from batchllm.attention.cpu_shared import CompiledSharedAttention, make_cpu_attention
from batchllm.attention.layout import AttentionLayout
from batchllm.errors import EngineError
from batchllm.kernels.cpu import CpuKernels
from batchllm.kernels.cpu import load as load_kernels
from batchllm.srt.configs.model_windows import layer_windows
from batchllm.srt.layers.step_layout import SharesPrefixes, StepPlanner, why_unsupported
from batchllm.srt.layers.wanted_rows import WANTED, last_rows, narrowed

logger = logging.getLogger(__name__)

_MIN_SEGMENT_LEN = 16
"""Tokens. Shorter shared parts are read by each request: what sharing saves does not pay for a segment's overhead."""


class SharedCpuAttnBackend(SharesPrefixes, TorchNativeAttnBackend):
    """On CPU: `batchllm.attention` for decoder layers, SGLang's own for all others."""

    def __init__(self, model_runner: Any) -> None:
        super().__init__(model_runner)
        self._table = self.req_to_token_pool.req_to_token
        self._planner = StepPlanner(min_segment_len=_MIN_SEGMENT_LEN, max_nested_segments=8)
        self._layout: AttentionLayout | None = None
        self._kernels = load_kernels()
        # By shape, and per layer which one it takes; None where SGLang's code does.
        self._attention: dict[LayerShape, StepAttention] = {}
        self._of_layer: dict[int, StepAttention | None] = {}
        config = model_runner.model_config
        self._architectures: list[str] = config.hf_config.architectures or []
        self._windows = layer_windows(config.hf_text_config, self._architectures[0]) if self._architectures else None
        self._has_latent_kv = config.attention_arch == AttentionArch.MLA
        if self._has_latent_kv:
            _absorb_always()
        self._last_layer_id: int = config.num_hidden_layers - 1
        self._wanted_rows: torch.Tensor | None = None
        self._last_attention: StepAttention | None = None

    @property
    def kv_read_tokens(self) -> int:
        """KV tokens that attention reads in the step that was planned last."""
        return 0 if self._layout is None else self._layout.num_kv_read_tokens

    def init_forward_metadata(self, forward_batch: Any) -> None:
        super().init_forward_metadata(forward_batch)
        rows = forward_batch.req_pool_indices.numpy().astype(np.int32)
        kv_len = forward_batch.seq_lens_cpu.numpy().astype(np.int32)
        if forward_batch.forward_mode.is_extend():
            qo_len = np.asarray(forward_batch.extend_seq_lens_cpu, np.int32)
        else:
            qo_len = np.ones(len(rows), np.int32)
        layout = self._planner.plan(rows, qo_len, kv_len)
        self._planner.check(layout, self._table.numpy)
        self._layout = layout
        for attention in self._attention.values():
            attention.plan(layout, self._table)
        WANTED.widen()
        self._wanted_rows = last_rows(forward_batch, layout, self._architectures)

    def compiled_attention(self, layer_id: int) -> CompiledSharedAttention | None:
        """What computes attention of this layer in this step, over all rows of it; None where that is something else,
        or not known yet.
        """
        attention = self._of_layer.get(layer_id)
        is_narrowed = self._wanted_rows is not None and layer_id == self._last_layer_id
        return attention if isinstance(attention, CompiledSharedAttention) and not is_narrowed else None

    def forward_decode(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        attention = self._attention_of(layer, q)
        if attention is None:
            return super().forward_decode(q, k, v, layer, forward_batch, save_kv_cache)
        return self._run(attention, q, k, v, layer, forward_batch, save_kv_cache)

    def forward_extend(
        self, q: Any, k: Any, v: Any, layer: Any, forward_batch: Any, save_kv_cache: bool = True
    ) -> torch.Tensor:
        attention = self._attention_of(layer, q)
        if attention is None:
            return super().forward_extend(q, k, v, layer, forward_batch, save_kv_cache)
        return self._run(attention, q, k, v, layer, forward_batch, save_kv_cache)

    def _run(
        self,
        attention: StepAttention,
        q: torch.Tensor,
        k: torch.Tensor | None,
        v: torch.Tensor | None,
        layer: Any,
        forward_batch: Any,
        save_kv_cache: bool,
    ) -> torch.Tensor:
        keys = self.token_to_kv_pool.get_key_buffer(layer.layer_id)
        values = self.token_to_kv_pool.get_value_buffer(layer.layer_id)
        if save_kv_cache and k is not None and v is not None:
            self._store(k, v, keys, values, layer, forward_batch.out_cache_loc)
        is_narrowed = self._wanted_rows is not None and layer.layer_id == self._last_layer_id
        if is_narrowed:
            WANTED.narrow(self._wanted_rows, len(q))
            q = q.index_select(0, self._wanted_rows)
            attention = self._attention_of_last_rows(layer, q)
        is_as_wide = layer.v_head_dim == layer.head_dim
        output = q.new_empty(q.shape if is_as_wide else (len(q), layer.tp_q_head_num * layer.v_head_dim))
        heads = (-1, layer.tp_q_head_num)
        attention.run(q.view(*heads, layer.head_dim), keys, values, output.view(*heads, layer.v_head_dim))
        return WANTED.put_back(output) if is_narrowed else output

    def _attention_of_last_rows(self, layer: Any, q: torch.Tensor) -> StepAttention:
        if self._last_attention is None:
            self._last_attention, _ = make_cpu_attention(self._shape_of(layer, q))
        assert self._layout is not None
        self._last_attention.plan(narrowed(self._layout), self._table)
        return self._last_attention

    def _store(
        self,
        k: torch.Tensor,
        v: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        layer: Any,
        slots: torch.Tensor,
    ) -> None:
        if isinstance(self._kernels, CpuKernels) and not self._has_latent_kv:
            self._kernels.store_kv(k, v, keys, values, slots)
        else:
            self.token_to_kv_pool.set_kv_buffer(layer, KVWriteLoc(slots, None), k, v)

    def _attention_of(self, layer: Any, q: torch.Tensor) -> StepAttention | None:
        if layer.layer_id not in self._of_layer:
            self._of_layer[layer.layer_id] = self._choose(layer, q)
        return self._of_layer[layer.layer_id]

    def _choose(self, layer: Any, q: torch.Tensor) -> StepAttention | None:
        reason = why_unsupported(layer, q, self.token_to_kv_pool.get_key_buffer(layer.layer_id))
        if reason is not None and layer.logit_cap:
            raise EngineError(
                f"layer {layer.layer_id}: {reason}, and scores capped at {layer.logit_cap}: nobody computes it"
            )
        if reason is not None:
            logger.warning("layer %d: %s; SGLang's torch_native computes it", layer.layer_id, reason)
            return None
        shape = self._shape_of(layer, q)
        if shape not in self._attention:
            attention, reason = make_cpu_attention(shape)
            if reason is not None and isinstance(self._kernels, CpuKernels):  # else `cpu_ops` has said it
                logger.warning("attention: %s", reason)
            assert self._layout is not None
            attention.plan(self._layout, self._table)
            self._attention[shape] = attention
        return self._attention[shape]

    def _shape_of(self, layer: Any, q: torch.Tensor) -> LayerShape:
        heads = (layer.tp_q_head_num, layer.tp_k_head_num, layer.head_dim)
        # SGLang counts a token's window without the token itself.
        window = layer.sliding_window_size + 1 if self._windows is None else self._windows[layer.layer_id]
        value_dim = 0 if layer.v_head_dim == layer.head_dim else layer.v_head_dim
        return LayerShape(*heads, q.dtype, layer.scaling, layer.logit_cap or 0.0, window, value_dim)


def _absorb_always() -> None:
    """Have latent attention computed over what is kept of a token, the latent, in prompts too.

    Upstream expands the latents of a prompt of which nothing is cached to keys and values of all heads, and hands these
    to its attention; its ``torch_native`` does not look at them and reads the cache, where they are not.
    """
    from sglang.srt.models.deepseek_common.attention_backend_handler import AttentionBackendRegistry
    from sglang.srt.models.deepseek_common.attention_forward_methods.forward_methods import AttnForwardMethod

    AttentionBackendRegistry.register("torch_native", lambda attention, forward_batch: AttnForwardMethod.MLA)


def register() -> None:
    """Make `SharedCpuAttnBackend` what SGLang makes for ``torch_native`` in this process.

    Under a name of its own SGLang would launch Triton kernels beside it, which a CPU has not
    (``support_triton`` in ``srt/utils/common.py``, ``srt/mem_cache/allocation.py``).
    """
    ATTENTION_BACKENDS["torch_native"] = SharedCpuAttnBackend
    # For latent attention, whose models upstream lets end here unless their embedding is scaled in one certain way.
    upstream = rotary_embedding.get_rope_wrapper
    rotary_embedding.get_rope_wrapper = lambda *args, device, **kwargs: upstream(*args, device=None, **kwargs)
