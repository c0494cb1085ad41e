"""Sampling that SGLang lacks: a seed per request, and seeds and grammars on CPU.

SGLang honours ``sampling_seed`` only in its deterministic mode, where a request without one gets 42 (so that
n samples of one prompt come out equal). Here every planned request carries a seed of its own; with it the
n-th token depends on nothing but the seed, the position and the probabilities.
"""

from __future__ import annotations

from typing import Any

import sglang.srt.layers.sampler as sampler
import torch
import xxhash
from sglang.srt.runtime_context import get_exec
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo

from batchllm.srt.schedule_batch import PlannedReq

_MASK = 0xFFFFFFFF


def install() -> None:
    """Replace the three functions below in this process."""
    SamplingBatchInfo.adjusted_from_schedule_batch = _set_seeds
    if torch.cuda.is_available():
        return
    sampler.murmur_hash32 = murmur_hash32
    from sglang.srt.constrained.xgrammar_backend import XGrammarGrammar

    XGrammarGrammar.apply_vocab_mask = _apply_vocab_mask


def _set_seeds(info: SamplingBatchInfo, batch: Any, vocab_size: int) -> None:
    """Give every request of the batch its seed (``SamplingBatchInfo`` leaves this method for that)."""
    if get_exec().kernel.sampling_backend == "flashinfer":
        return  # its kernels take no seed
    info.sampling_seed = torch.tensor([_seed(req) for req in batch.reqs], dtype=torch.int64).to(
        batch.device, non_blocking=True
    )


def _seed(req: Any) -> int:
    if isinstance(req, PlannedReq):
        return req.seed
    if req.sampling_params.sampling_seed is not None:
        return int(req.sampling_params.sampling_seed)
    # The id of a live request is random, and the same on every rank.
    return xxhash.xxh64_intdigest(req.rid.encode()) >> 1


def murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, col_indices: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 of (64-bit seed, position, column), as SGLang's Triton kernel computes it, in plain torch.

    Args:
        seed: uint64 or int64, shape ``[n]``.
        positions: shape ``[n]``.
        col_indices: shape ``[m]``.

    Returns:
        Hashes in [0, 2**32), int64, shape ``[n, m]``.
    """
    seed = seed.to(torch.int64).unsqueeze(1)
    h = torch.zeros_like(seed)
    for block in (
        seed & _MASK,
        (seed >> 32) & _MASK,
        positions.to(torch.int64).unsqueeze(1) & _MASK,
        col_indices.to(torch.int64).unsqueeze(0),
    ):
        k = _rotl32((block * 0xCC9E2D51) & _MASK, 15)
        h = h ^ ((k * 0x1B873593) & _MASK)
        h = (_rotl32(h, 13) * 5 + 0xE6546B64) & _MASK
    h = h ^ 16
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _MASK
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _MASK
    return h ^ (h >> 16)


def _rotl32(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _MASK


def _apply_vocab_mask(self: Any, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """On CPU SGLang raises here, although xgrammar has the kernel."""
    import xgrammar

    xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)
