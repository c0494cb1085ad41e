"""How long will a step of this size take, on this machine, in this process?

A linear model of a step's counts, fitted to the steps that this very process has run: the seconds of a step, of each
row that decodes, of each token that such a row attends to, of a prefill at all, of each prompt token, and of each pair
of a prompt token and one it attends to. Every coefficient is at least 0, so that a larger step never seems shorter.

Knows counts and seconds. Must not know requests, KV, clocks.

INVARIANT: predictions are finite, at least 0, and never fall when a count grows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from operator import mul

import numpy as np
import numpy.typing as npt

Float64 = npt.NDArray[np.float64]

_NUM_FEATURES = 6
_MEMORY = 0.98
"""What an observation weighs after each further one of its kind: the last fifty or so count."""
_FIT_ALWAYS, _FIT_EVERY = 64, 4
"""A fit after each of the first observations, and then after so many."""
_SWEEPS = 16
"""Of coordinate descent at each fit, which begins where the last one ended."""
_QUANTILE = 0.995
"""Part of the steps that are to stay within their prediction times `StepTimeModel.margin`. It lags behind what the
machine does, so more than 0.99."""
_MARGIN_STEP = 0.02
_FIRST_MARGIN = 1.4
_MAX_MARGIN = 2.0


@dataclass(frozen=True, slots=True)
class StepLoad:
    """What a step carries.

    Attributes:
        num_decode_rows: Rows that decode, a token each.
        decode_kv_tokens: Sum over these rows of the tokens each attends to.
        num_prefill_tokens: Prompt tokens that are computed.
        prefill_pairs: Sum over these tokens of the tokens each attends to.
    """

    num_decode_rows: int = 0
    decode_kv_tokens: int = 0
    num_prefill_tokens: int = 0
    prefill_pairs: int = 0

    def with_prefill(self, num_tokens: int, cached_len: int) -> StepLoad:
        """The same with so many tokens of a prompt, behind ``cached_len`` that have KV."""
        pairs = num_tokens * cached_len + num_tokens * (num_tokens + 1) // 2
        return StepLoad(
            self.num_decode_rows,
            self.decode_kv_tokens,
            self.num_prefill_tokens + num_tokens,
            self.prefill_pairs + pairs,
        )


class StepTimeModel:
    """Predicts the seconds of steps; learns from each step that has run.

    Attributes:
        margin: What a prediction is multiplied by so that 99 % of the steps that a bound decided take no longer.
    """

    def __init__(self) -> None:
        # Steps with and without prefill are forgotten apart: thousands of decode steps say nothing of a prefill.
        self._gram = np.zeros((2, _NUM_FEATURES, _NUM_FEATURES))
        self._sums = np.zeros((2, _NUM_FEATURES))
        self.coefficients = np.zeros(_NUM_FEATURES)
        """Seconds of: a step, a decoding row, a token that such a row attends to, a prefill, a prompt token, a pair."""
        self._most_prefill_tokens = 0
        self._num_observed = 0
        self.margin = _FIRST_MARGIN

    def observe(self, load: StepLoad, seconds: float, *, is_bounded: bool = True) -> None:
        """A step of this size has taken so long. Errors are weighed relative to it.

        Args:
            load: What it carried.
            seconds: How long it took.
            is_bounded: The margin learns from it: its size is what the time left room for. What disturbs a step
                (another process, a message) takes as long beside a small one, and is a larger part of that.
        """
        if seconds <= 0.0:
            return
        if is_bounded and self._num_observed >= _NUM_FEATURES:
            self._adapt_margin(seconds / max(self.predict(load), 1e-9))
        features = _features(load) / seconds
        kind = int(load.num_prefill_tokens > 0)
        self._gram[kind] = _MEMORY * self._gram[kind] + np.outer(features, features)
        self._sums[kind] = _MEMORY * self._sums[kind] + features
        self._most_prefill_tokens = max(self._most_prefill_tokens, load.num_prefill_tokens)
        self._num_observed += 1
        if self._num_observed < _FIT_ALWAYS or self._num_observed % _FIT_EVERY == 0:
            self._fit()

    def _adapt_margin(self, ratio: float) -> None:
        change = _QUANTILE if ratio > self.margin else _QUANTILE - 1.0
        self.margin = min(max(self.margin + _MARGIN_STEP * change, 1.0), _MAX_MARGIN)

    def _fit(self) -> None:
        """Least squares with coefficients of at least 0, by coordinate descent on the normal equations."""
        # Lists: numpy takes longer to be called than six products take.
        gram, sums = self._gram.sum(axis=0).tolist(), self._sums.sum(axis=0).tolist()
        values = self.coefficients.tolist()
        used = [i for i in range(_NUM_FEATURES) if gram[i][i] > 0.0]
        for _ in range(_SWEEPS):
            for i in used:
                error = sums[i] - sum(map(mul, gram[i], values))
                values[i] = max(0.0, values[i] + error / gram[i][i])
        self.coefficients = np.array(values)

    def predict(self, load: StepLoad) -> float:
        """Seconds of such a step, without the margin."""
        return float(_features(load) @ self.coefficients)

    def upper(self, load: StepLoad) -> float:
        """Seconds that 99 % of such steps stay within."""
        return self.predict(load) * self.margin

    def prefill_that_fits(self, load: StepLoad, cached_len: int, limit_s: float) -> int:
        """Most prompt tokens that a step may carry beside ``load`` and stay within a limit.

        Args:
            load: What the step carries anyhow.
            cached_len: Tokens in front of the prompt's that have KV.
            limit_s: Seconds.

        Returns:
            At least 0; no more than twice as many as a step has carried so far, of which nothing is known.
        """
        _, _, _, fixed, per_token, per_pair = self.coefficients
        left = limit_s / self.margin - self.predict(load) - (0.0 if load.num_prefill_tokens else fixed)
        if left <= 0.0:
            return 0
        known = 2 * max(self._most_prefill_tokens, 1)
        linear, square = per_token + per_pair * (cached_len + 0.5), per_pair / 2
        # left = linear * n + square * n * n, in the form that does not cancel.
        root = linear + math.sqrt(linear * linear + 4 * square * left)
        return int(min(2 * left / root, known)) if root > 0.0 else known

    def rows_that_fit(self, load: StepLoad, kv_lens: npt.NDArray[np.int64], limit_s: float) -> int:
        """How many rows, taken from the first on, may decode beside ``load`` within a limit.

        Args:
            load: What the step carries anyhow.
            kv_lens: Tokens that each row attends to, int64 ``[num_rows]``.
            limit_s: Seconds.
        """
        _, per_row, per_kv_token, *_ = self.coefficients
        left = limit_s / self.margin - self.predict(load)
        seconds = per_row * np.arange(1, len(kv_lens) + 1) + per_kv_token * np.cumsum(kv_lens)
        return int(np.searchsorted(seconds, left, side="right"))


def _features(load: StepLoad) -> Float64:
    return np.array(
        (
            1.0,
            load.num_decode_rows,
            load.decode_kv_tokens,
            float(load.num_prefill_tokens > 0),
            load.num_prefill_tokens,
            load.prefill_pairs,
        )
    )
