"""Linear layers on a CPU: compiled kernels, which keep weights packed and once, or torch's own products where those are
much faster. Runs in the scheduler's process.

(Upstream: ``srt/layers/quantization/unquant.py``, ``logits_processor.py``, ``models/llama.py``.)

INVARIANT: a weight is in memory once. What is packed is a tensor without numbers meanwhile, which nobody can read by
mistake; `restore_weights` comes before whatever reads or writes weights.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import torch.nn.functional as F
from sglang.srt.layers.activation import SiluAndMul
from sglang.srt.layers.linear import LinearBase, MergedColumnParallelLinear
from sglang.srt.layers.logits_processor import LogitsProcessor, should_apply_lm_head_quant_method
from sglang.srt.layers.quantization.unquant import UnquantizedLinearMethod
from sglang.srt.layers.vocab_parallel_embedding import ParallelLMHead

from batchllm.kernels.cpu import MIN_GAIN, CpuKernels, PackedWeight, best_seconds, load
from batchllm.srt.layers.wanted_rows import WANTED

logger = logging.getLogger(__name__)

_DTYPES = (torch.float32, torch.bfloat16)
# SGLang's own, for whatever ours does not take.
_stock_linear = UnquantizedLinearMethod.apply
_stock_lm_head = LogitsProcessor._compute_lm_head

_KERNELS: dict[torch.dtype, CpuKernels] = {}
"""For the types of which torch is not much faster."""
_OWNERS = "_batchllm_owners"
"""Attribute of layers whose weight nobody else computes with: the modules that have it."""
_IS_GATED = "_batchllm_is_gated"
"""Attribute of layers, and of their outputs: whether the activation behind the layer is computed with it."""
_GATED_MLPS = ("LlamaMLP", "Qwen2MLP")
"""Of SGLang's modules, those that were read: the activation takes what ``gate_up_proj`` gives, and nobody else does."""
_PACKED = "_batchllm_packed"
_TRIAL_SHAPE = (64, 512, 1024)
FUSED = "_batchllm_fused"
"""Attribute of modules: what holds packed weights of their parts, and goes before these do."""


def install() -> None:
    """Put our linear layers in SGLang's place in this process."""
    UnquantizedLinearMethod.apply = _linear
    LogitsProcessor._compute_lm_head = _compute_lm_head


def choose_products() -> None:
    """Find out whether torch's products are much faster on this machine, and say so.

    The processor's features do not tell: one that has instructions for bfloat16 may have them at a quarter of the rate
    of those for float32, and another matrix units.
    """
    kernels = load()
    if UnquantizedLinearMethod.apply is not _linear or isinstance(kernels, str):
        return
    for dtype in _DTYPES:
        ours, torchs = _rates(kernels, dtype)
        name = str(dtype).removeprefix("torch.")
        is_ours = torchs < MIN_GAIN * ours
        chosen = "compiled kernels" if is_ours else "torch"
        logger.info("linear layers of %s: %s (compiled %.0f GFLOP/s, torch %.0f)", name, chosen, ours, torchs)
        if is_ours:
            _KERNELS[dtype] = kernels


def _rates(kernels: CpuKernels, dtype: torch.dtype) -> tuple[float, float]:
    """GFLOP/s of a product by the compiled kernels and by torch, on one thread: the best of some milliseconds, in which
    they alternate.
    """
    num_rows, num_inputs, num_outputs = _TRIAL_SHAPE
    x, weight = torch.ones(num_rows, num_inputs, dtype=dtype), torch.ones(num_outputs, num_inputs, dtype=dtype)
    packed = kernels.pack(weight)
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seconds = best_seconds(lambda: kernels.linear(x, packed), lambda: F.linear(x, weight))
    torch.set_num_threads(num_threads)
    ours, torchs = (2e-9 * num_rows * num_inputs * num_outputs / s for s in seconds)
    return ours, torchs


def mark_layers(model: torch.nn.Module) -> None:
    """Say of each layer of a loaded model what may be done with it.

    A weight that another module computes with too, as an embedding that is also the output layer, stays as it is.
    """
    owners: dict[int, list[Any]] = {}
    for module in model.modules():
        weight = module._parameters.get("weight")
        if weight is not None:
            owners.setdefault(id(weight), []).append(module)
    for module in list(model.modules()):
        if isinstance(module, ParallelLMHead) or (
            isinstance(module, LinearBase) and isinstance(module.quant_method, UnquantizedLinearMethod)
        ):
            those = tuple(owners[id(module.weight)])
            is_plain = type(module.weight) is torch.nn.Parameter and module.weight.is_contiguous()
            # An adapter's layer has its base layer's weight and leaves computing with it to that.
            if is_plain and all(owner is module or getattr(owner, "base_layer", None) is module for owner in those):
                setattr(module, _OWNERS, those)
    for module in model.modules():  # whose layers are marked by now
        if type(module).__name__ in _GATED_MLPS and isinstance(module.act_fn, SiluAndMul):
            gate_up = module.gate_up_proj
            is_plain = type(gate_up) is MergedColumnParallelLinear and gate_up.bias is None
            setattr(gate_up, _IS_GATED, is_plain and hasattr(gate_up, _OWNERS))


def restore_weights(model: torch.nn.Module) -> None:
    """Make the weights of a model tensors with numbers again, to be read and written. The next step packs them."""
    for module in model.modules():
        module.__dict__.pop(FUSED, None)
        packed: PackedWeight | None = module.__dict__.pop(_PACKED, None)
        if packed is not None:
            weight = torch.empty(packed.shape, dtype=packed.data.dtype)
            _KERNELS[weight.dtype].unpack(packed, weight)
            _replace_weight(module, weight)


def kernels_for(dtype: torch.dtype) -> CpuKernels | None:
    """What computes linear layers of this type; None where that is torch."""
    return _KERNELS.get(dtype)


def packed_weight(layer: Any) -> PackedWeight | None:
    """The layer's weight, where it is packed."""
    return layer.__dict__.get(_PACKED)


def is_gated(layer: Any) -> bool:
    """Whether a packed weight of this layer computes the activation behind it too."""
    return bool(getattr(layer, _IS_GATED, False))


def _replace_weight(layer: Any, weight: torch.Tensor) -> None:
    parameter = torch.nn.Parameter(weight, requires_grad=False)
    parameter.__dict__.update(layer.weight.__dict__)  # how it is loaded
    for owner in getattr(layer, _OWNERS):
        owner.weight = parameter


def _weight_of(layer: Any, kernels: CpuKernels, dtype: torch.dtype) -> torch.Tensor | PackedWeight | None:
    """What is not packed yet, packed if it may be; None if its type is another."""
    weight: torch.Tensor = layer.weight
    if weight.dtype != dtype:
        return None
    if not hasattr(layer, _OWNERS):
        return weight
    packed = kernels.pack(weight, getattr(layer, _IS_GATED, False))
    _replace_weight(layer, torch.empty_like(weight, device="meta"))
    setattr(layer, _PACKED, packed)
    return packed


def _product(layer: Any, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor | None:
    """By the compiled kernels; None where they do not apply."""
    kernels = _KERNELS.get(x.dtype)
    if kernels is None or not x.is_cpu or x.dim() != 2 or x.stride(1) != 1:
        return None
    weight = layer.__dict__.get(_PACKED) or _weight_of(layer, kernels, x.dtype)
    return None if weight is None else kernels.linear(x, weight, bias)


def _linear(self: Any, layer: Any, x: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    wanted = WANTED.take(x)
    rows = x if wanted is None else wanted
    output = _product(layer, rows, bias)
    if output is None:
        output = _stock_linear(self, layer, _padded(rows), bias)[: len(rows)]
    if wanted is not None:
        output = WANTED.put_back(output)
    if getattr(layer, _IS_GATED, False):
        setattr(output, _IS_GATED, _PACKED in layer.__dict__)
    return output


def is_activated(x: torch.Tensor) -> bool:
    """Whether this output of a linear layer has been through the activation behind it."""
    return getattr(x, _IS_GATED, False)


def _compute_lm_head(
    self: Any, hidden_states: torch.Tensor, lm_head: Any, embedding_bias: torch.Tensor | None = None
) -> torch.Tensor:
    is_lora = hasattr(lm_head, "set_lora")
    quant_method = getattr(lm_head, "quant_method", None)
    is_plain = hasattr(lm_head, "weight") and not should_apply_lm_head_quant_method(lm_head, quant_method)
    if is_lora or not is_plain or self.use_fp32_lm_head or self.rl_on_policy_target is not None:
        return _stock_lm_head(self, hidden_states, lm_head, embedding_bias)
    output = _product(lm_head, hidden_states, None)
    if output is None:
        output = _stock_lm_head(self, _padded(hidden_states), lm_head, embedding_bias)[: len(hidden_states)]
    return output


_BUFFERS: dict[torch.dtype, torch.Tensor] = {}
"""For the input of torch's products, by type. A new tensor each time costs as much as the product: its memory comes
from the system, a page at a time."""


def _padded(x: torch.Tensor) -> torch.Tensor:
    """``x`` with rows behind it, whatever they hold, of ``[_padded_rows(len(x)), x.shape[1]]``; until the next call."""
    if x.dim() != 2 or x.dtype not in _DTYPES or x.device.type != "cpu":
        return x
    num_rows = _padded_rows(len(x))
    if num_rows == len(x):
        return x
    num_elements = num_rows * x.shape[1]
    buffer = _BUFFERS.get(x.dtype)
    if buffer is None or len(buffer) < num_elements:
        buffer = _BUFFERS[x.dtype] = x.new_zeros(num_elements)
    padded = buffer[:num_elements].view(num_rows, x.shape[1])
    padded[: len(x)] = x
    return padded


_ROW_BLOCKS = ((96, 6), (192, 12), (384, 24), (768, 48))
"""Up to so many rows a product has a multiple of so many: an eighth too many at most."""
_LARGE_ROW_BLOCK = 108
"""Of larger ones: steps of 2,048 and 4,096 tokens, which are full chunks, are all but a multiple of it."""


def _padded_rows(num_rows: int) -> int:
    """Rows that torch computes a product for.

    Behind it oneDNN compiles code for each number of rows, a millisecond and half a megabyte a layer shape, and keeps
    it of 1,024 shapes. Steps have any number of rows: with all of them the code is compiled again and again, and
    memory grows for hours.
    """
    if num_rows <= 4:
        return 4
    block = next((block for most, block in _ROW_BLOCKS if num_rows <= most), _LARGE_ROW_BLOCK)
    return -(-num_rows // block) * block
