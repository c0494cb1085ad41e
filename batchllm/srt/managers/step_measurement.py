"""Steps that are run and timed before the first request. Runs in the scheduler's process.

(Upstream: ``bench_one_batch.py`` runs a model's steps in the same way, without a scheduler.)
"""

from __future__ import annotations

import random
import statistics
import time
from array import array
from typing import Any

from sglang.srt.managers.schedule_batch import Req, ScheduleBatch
from sglang.srt.mem_cache.common import release_kv_cache
from sglang.srt.sampling.sampling_params import SamplingParams

from batchllm.errors import ConfigError
from batchllm.scheduler.stall_free import StallFree
from batchllm.scheduler.step_time import StepLoad, StepTimeModel
from batchllm.srt.managers.coserving import Coserving
from batchllm.srt.managers.schedule_batch import prepare_live
from batchllm.srt.server_args import AUTO_TBT

AUTO_FACTOR = 5
"""``--max-tbt-ms auto`` is so many decode steps: Sarathi-Serve's strict bound (arXiv 2403.02310, section 5.1)."""
_NUM_DECODE_STEPS = 16
_NUM_ROWS, _ROW_LEN = 16, 128  # of the decode steps that are counted: some people at once
_SHARES = (1, 4, 1)  # of the longest prompt; the first is not counted, since it loads what the others use


def start_coserving(scheduler: Any) -> Coserving:
    """Measure steps, and bound the time of those to come by ``--max-tbt-ms``.

    Raises:
        ConfigError: The smallest step takes longer than the bound.
    """
    model = StepTimeModel()
    decode_s = _measure(scheduler, model)
    asked = scheduler.server_args.max_tbt_ms
    bound_s = AUTO_FACTOR * decode_s if asked == AUTO_TBT else float(asked) / 1e3
    least_s = model.upper(StepLoad(num_decode_rows=1))
    if bound_s < least_s:
        raise ConfigError(
            f"--max-tbt-ms {asked}: the smallest step takes {1e3 * least_s:.1f} ms on this machine; "
            f"give at least {1e3 * 2 * least_s:.0f}, or auto"
        )
    coserving = Coserving(scheduler, StallFree(bound_s, model), scheduler.step_clock)
    coserving.show_all_rows()
    return coserving


def _measure(scheduler: Any, model: StepTimeModel) -> float:
    """Show the model prefill and decode steps; returns the seconds of a decode step of a few rows."""
    metrics, scheduler.metrics = scheduler.metrics, None
    scheduler.schedule_stream = scheduler.device_module.current_stream()  # SGLang makes its own with its event loop
    longest = min(
        scheduler.chunked_prefill_size,
        scheduler.max_total_num_tokens // 4,
        scheduler.model_config.context_len - _NUM_DECODE_STEPS - 2,
    )
    for i, share in enumerate(_SHARES):
        steps = _run_prompts(scheduler, 1, max(longest // share, 1), seed=i)
        for load, seconds in steps if i else ():
            model.observe(load, seconds, is_bounded=False)
    num_rows = min(_NUM_ROWS, scheduler.max_running_requests)
    steps = _run_prompts(scheduler, num_rows, min(max(longest // num_rows, 1), _ROW_LEN), seed=len(_SHARES))
    for load, seconds in steps:
        model.observe(load, seconds, is_bounded=False)
    decode_s = [seconds for load, seconds in steps if not load.num_prefill_tokens]
    scheduler.metrics = metrics
    # The lowest tenth: what else starts at the same time slows some of them down.
    return statistics.quantiles(decode_s, n=10)[0]


def _run_prompts(scheduler: Any, num_rows: int, num_tokens: int, seed: int) -> list[tuple[StepLoad, float]]:
    """Compute prompts of made-up tokens and decode a few: what each step carried, and its seconds."""
    draw = random.Random(seed)
    reqs = [_made_up(scheduler, draw, num_tokens, f"batchllm:measurement:{i}") for i in range(num_rows)]
    batch = ScheduleBatch.init_new(
        reqs,
        scheduler.req_to_token_pool,
        scheduler.token_to_kv_pool_allocator,
        scheduler.tree_cache,
        scheduler.model_config,
        scheduler.enable_overlap,
        scheduler.spec_algorithm,
    )
    steps = []
    for i in range(_NUM_DECODE_STEPS + 1):
        start = time.monotonic()
        if i == 0:
            batch.prepare_for_extend()
        else:
            batch.prepare_for_decode()
        result = scheduler.run_batch(batch)
        if result.copy_done is not None:
            result.copy_done.synchronize()
        for req, token_id in zip(reqs, result.next_token_ids.tolist(), strict=True):
            req.output_ids.append(token_id)
        load = StepLoad(num_rows, num_rows * (num_tokens + i))
        if i == 0:
            load = StepLoad(0, 0, num_rows * num_tokens, num_rows * num_tokens * (num_tokens + 1) // 2)
        steps.append((load, time.monotonic() - start))
    for req in reqs:
        release_kv_cache(req, scheduler.tree_cache, is_insert=False)
    return steps


def _made_up(scheduler: Any, draw: random.Random, num_tokens: int, name: str) -> Req:
    """A request whose prompt is about to be computed whole."""
    params = SamplingParams(max_new_tokens=_NUM_DECODE_STEPS + 1, temperature=0, ignore_eos=True)
    params.normalize(None)
    vocab_size = scheduler.model_config.vocab_size
    prompt = array("q", (draw.randrange(vocab_size) for _ in range(num_tokens)))
    req = Req(name, "", prompt, params, vocab_size=vocab_size)
    prepare_live(req)
    req.init_next_round_input(scheduler.tree_cache)
    req.set_extend_range(0, num_tokens)
    return req
