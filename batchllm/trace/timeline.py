"""A run of any length in at most so many time buckets: mean and greatest value of each field.

INVARIANT: every step is in exactly one bucket. Means of KV, requests and prefixes are over time, those of tokens and
of times a step over the steps; so means of parts add up to the mean of their sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm.trace.steps import FIELD_NAMES, Float64Array, Int64Array, StepArray, used_tokens

MAX_BUCKETS = 1500

_PER_STEP = frozenset({"duration_s", "host_s", "num_prefill_tokens", "num_decode_tokens", "num_step_tokens"})


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Timeline:
    """The steps of a trace, bucket by bucket. No bucket is empty; without steps there are none.

    Attributes:
        edges_s: Seconds since the job began, float64 ``[num_buckets + 1]``, not falling: a bucket
            lasts from its first step's start to that of the next bucket, the last to the last step's end.
        num_steps: Steps in each bucket, int64 ``[num_buckets]``.
        mean: For each field of `STEP_DTYPE`, ``kv_used_tokens`` (pinned and private) and
            ``num_step_tokens`` (prefill and decode): float64 ``[num_buckets]``.
        peak: The same fields, greatest value.
    """

    edges_s: Float64Array
    num_steps: Int64Array
    mean: dict[str, Float64Array]
    peak: dict[str, Float64Array]

    @property
    def num_buckets(self) -> int:
        """Buckets, each with a step or more."""
        return len(self.num_steps)

    @property
    def is_exact(self) -> bool:
        """Whether every step has a bucket of its own, so that mean and peak are the value."""
        return bool((self.num_steps == 1).all())


def downsample(steps: StepArray, max_buckets: int = MAX_BUCKETS) -> Timeline:
    """The timeline of the steps: a bucket each, or, if there are more, buckets of equal time.

    Args:
        steps: `STEP_DTYPE` ``[num_steps]``, in order of time.
        max_buckets: At least 1.
    """
    first = _first_steps(steps, max_buckets)
    num_steps = np.diff(np.append(first, len(steps)))
    starts_s = steps["start_s"][first]
    end_s = (steps["start_s"] + steps["duration_s"]).max(initial=0.0)
    seconds = steps["duration_s"]
    # Parts of the bucket's longest step, so that no sum of weights is tiny. Steps that took no time count alike.
    longest = np.repeat(_peaks(seconds, first), num_steps)
    weights = np.divide(seconds, longest, out=np.ones(len(steps)), where=longest > 0)
    ones = np.ones(len(steps))
    mean, peak = {}, {}
    for name, values in _columns(steps).items():
        weight = ones if name in _PER_STEP else weights
        mean[name] = _sums(values * weight, first) / _sums(weight, first)
        peak[name] = _peaks(values, first)
    return Timeline(edges_s=np.append(starts_s, end_s), num_steps=num_steps, mean=mean, peak=peak)


def _columns(steps: StepArray) -> dict[str, Float64Array]:
    columns = {name: steps[name].astype(np.float64) for name in FIELD_NAMES}
    columns["kv_used_tokens"] = used_tokens(steps)
    columns["num_step_tokens"] = columns["num_prefill_tokens"] + columns["num_decode_tokens"]
    return columns


def _first_steps(steps: StepArray, max_buckets: int) -> Int64Array:
    """Index of the first step of each bucket, int64 ``[num_buckets]``, rising."""
    if len(steps) <= max_buckets:
        return np.arange(len(steps), dtype=np.int64)
    since_s = steps["start_s"] - steps["start_s"][0]
    # The last step starts before the end: all of them are spread over the time between starts.
    part = since_s / since_s[-1] if since_s[-1] > 0 else np.zeros(len(steps))
    bucket = np.minimum((part * max_buckets).astype(np.int64), max_buckets - 1)
    return np.flatnonzero(np.diff(bucket, prepend=-1))


def _sums(values: Float64Array, first: Int64Array) -> Float64Array:
    return np.add.reduceat(values, first) if len(first) else np.empty(0)


def _peaks(values: Float64Array, first: Int64Array) -> Float64Array:
    return np.maximum.reduceat(values, first) if len(first) else np.empty(0)
