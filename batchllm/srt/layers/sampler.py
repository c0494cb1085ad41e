"""Sampling that SGLang lacks: a seed per request, and grammars on CPU. Runs in the scheduler's process.

SGLang honours ``sampling_seed`` only in its deterministic mode, where a request without one gets 42 (so that n samples
of one prompt come out equal) and ``min_p`` is refused. Here every request has a seed of its own; with it the n-th token
depends on nothing but the seed, the position and the probabilities. (Upstream: ``srt/layers/sampler.py``.)
"""

from __future__ import annotations

from typing import Any

import sglang.srt.layers.sampler as upstream
import torch
import xxhash
from sglang.srt.layers import logprob_processor
from sglang.srt.layers.logprob_processor import (
    LogprobStage,
    get_token_ids_logprobs_batch_optimized,
    get_token_ids_logprobs_raw,
)
from sglang.srt.layers.sampler import Sampler
from sglang.srt.runtime_context import get_exec
from sglang.srt.sampling.sampling_batch_info import SamplingBatchInfo
from sglang.srt.utils import is_pin_memory_available

from batchllm.srt.managers.schedule_batch import PlannedReq

_SEEDED_BACKEND = "pytorch"  # FlashInfer's sampling kernels take no seed per request
_UINT32 = 0xFFFFFFFF


def install() -> None:
    """Put the sampler and the functions below in SGLang's place in this process."""
    upstream.register_sampler_backend(_SEEDED_BACKEND, SeededSampler)
    SamplingBatchInfo.adjusted_from_schedule_batch = _set_seeds
    logprob_processor.get_token_ids_logprobs = _token_ids_logprobs
    if not torch.cuda.is_available():
        from sglang.srt.constrained import xgrammar_backend

        xgrammar_backend._allocate_token_bitmask = _allocate_token_bitmask
        xgrammar_backend.XGrammarGrammar.apply_vocab_mask = _apply_vocab_mask


class SeededSampler(Sampler):
    """Draws each row with its own seed, by the Gumbel-max trick."""

    def _sample_from_probs(
        self,
        probs: torch.Tensor,
        sampling_info: SamplingBatchInfo,
        positions: torch.Tensor,
        simple_sampling_case: bool,
    ) -> torch.Tensor:
        """Token ids of shape ``[num_rows]``, int32, from probabilities of shape ``[num_rows, vocab_size]``."""
        if sampling_info.sampling_seed is None:
            return super()._sample_from_probs(probs, sampling_info, positions, simple_sampling_case)
        columns = torch.arange(probs.shape[-1], device=probs.device)
        hashes = _murmur_hash32(sampling_info.sampling_seed, positions, columns)
        if not simple_sampling_case:
            probs, order = _filter(probs, sampling_info)
            hashes = hashes.gather(-1, order)
        # In float64: near 0 and 1 the noise is decided by bits that float32 does not have.
        uniform = (hashes.to(torch.float64) + 0.5) / (_UINT32 + 1)
        noise = -torch.log(-torch.log(uniform))
        token_ids = (probs.to(torch.float64).log() + noise).argmax(dim=-1, keepdim=True)
        if not simple_sampling_case:
            token_ids = order.gather(-1, token_ids)
        return token_ids.view(-1).to(torch.int32)


def _filter(probs: torch.Tensor, info: SamplingBatchInfo) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities in descending order, 0 where top-k, top-p or min-p drops them, and their token ids."""
    probs, order = probs.sort(dim=-1, descending=True)
    before = probs.cumsum(dim=-1) - probs
    ranks = torch.arange(probs.shape[-1], device=probs.device)
    dropped = (ranks >= info.top_ks.view(-1, 1)) | (before > info.top_ps.view(-1, 1))
    if info.need_min_p_sampling:
        dropped |= probs < probs[:, :1] * info.min_ps.view(-1, 1)
    return probs.masked_fill(dropped, 0.0), order


def _murmur_hash32(seed: torch.Tensor, positions: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """MurmurHash3 of (64-bit seed, position, column): hashes in [0, 2**32), int64, ``[num_rows, num_columns]``."""
    if seed.is_cuda:
        return upstream.murmur_hash32(seed.to(torch.uint64), positions, columns).to(torch.int64)
    seed = seed.unsqueeze(1)
    h = torch.zeros_like(seed)
    for block in (
        seed & _UINT32,
        (seed >> 32) & _UINT32,
        positions.to(torch.int64).unsqueeze(1) & _UINT32,
        columns.unsqueeze(0),
    ):
        k = _rotl32((block * 0xCC9E2D51) & _UINT32, 15)
        h = h ^ ((k * 0x1B873593) & _UINT32)
        h = (_rotl32(h, 13) * 5 + 0xE6546B64) & _UINT32
    h = h ^ 16
    h = ((h ^ (h >> 16)) * 0x85EBCA6B) & _UINT32
    h = ((h ^ (h >> 13)) * 0xC2B2AE35) & _UINT32
    return h ^ (h >> 16)


def _rotl32(x: torch.Tensor, bits: int) -> torch.Tensor:
    return ((x << bits) | (x >> (32 - bits))) & _UINT32


def _set_seeds(info: SamplingBatchInfo, batch: Any, vocab_size: int) -> None:
    """Give every request of the batch its seed (``SamplingBatchInfo`` leaves this method for that)."""
    if get_exec().kernel.sampling_backend == _SEEDED_BACKEND:
        # Pinned: the host would wait for the device otherwise, and with it for the step in flight.
        is_pinned = is_pin_memory_available(batch.device)
        seeds = torch.tensor([_seed(req) for req in batch.reqs], dtype=torch.int64, pin_memory=is_pinned)
        info.sampling_seed = seeds.to(batch.device, non_blocking=True)


def _seed(req: Any) -> int:
    if isinstance(req, PlannedReq):
        return req.seed
    if req.sampling_params.sampling_seed is not None:
        return int(req.sampling_params.sampling_seed)
    # The id of a live request is random, and the same on every rank.
    return xxhash.xxh64_intdigest(req.rid.encode()) >> 1


def _token_ids_logprobs(
    logprobs: torch.Tensor, token_ids_logprobs: list[list[int] | None], no_copy_to_cpu: bool = False
) -> tuple[list[Any], list[Any]]:
    """Log probabilities of the token ids that each row names, which may be None.

    SGLang gives such a row a list where its scheduler expects a tensor, and would end; its other function does not.
    """
    if no_copy_to_cpu:
        values, ids = get_token_ids_logprobs_batch_optimized(logprobs, token_ids_logprobs)
        return list(values), list(ids)
    values, ids = get_token_ids_logprobs_raw(logprobs, token_ids_logprobs, stage=LogprobStage.DECODE)
    return values, ids


def _allocate_token_bitmask(vocab_size: int, batch_size: int) -> torch.Tensor:
    """On CPU SGLang asks for pinned memory here, which needs a GPU driver."""
    import xgrammar

    return xgrammar.allocate_token_bitmask(batch_size, vocab_size)


def _apply_vocab_mask(self: Any, logits: torch.Tensor, vocab_mask: torch.Tensor) -> None:
    """On CPU SGLang raises here, although xgrammar has the kernel."""
    import xgrammar

    xgrammar.apply_token_bitmask_inplace(logits, vocab_mask)
