"""How many tokens will this request still generate? Known, bounded, or learned from those that have finished.

A request whose length is not known gets a *draw*, a fixed number in (0, 1): its expected length is that quantile of
the lengths of its kind, given that it has come as far as it has. Draws are spread evenly, so that the expected lengths
of all that runs together are distributed as true lengths are, and their sum is right even where each is wrong.

The distribution is estimated with what still runs counted as "longer than this" (Kaplan and Meier 1958): of those that
started together the short ones finish first, and a mean over finished ones alone would take every answer for short.
What is left of the distribution lies at ``max_new_len`` as long as nothing is known: safe at the start.
"""

from __future__ import annotations

import operator
from collections.abc import Hashable, Sequence
from dataclasses import astuple, dataclass

import numpy as np
import numpy.typing as npt

from batchllm.tokens import Int64Array

Float64 = npt.NDArray[np.float64]

MIN_FINISHED = 32
"""A kind with fewer finished requests is taken for its parent kind."""
_REFRESH_SHARE = 0.02
"""A distribution is estimated again when this share of its samples is new."""
_GOLDEN = 0.6180339887498949


def draw(position: int) -> float:
    """The draw of the request at a position: those of neighbours are far apart, and all together are spread evenly."""
    return (0.5 + position * _GOLDEN) % 1.0


def draws(positions: Int64Array) -> Float64:
    """The draws of several, float64, of the shape given."""
    spread: Float64 = np.mod(0.5 + positions * _GOLDEN, 1.0, dtype=np.float64)
    return spread


class OutputEstimate:
    """What is known of one request's output length.

    Attributes:
        max_new_len: It ends here at the latest.
        known_len: Its length, or 0 where it has to be learned. A hint that turns out too small counts as unknown from
            there on.
        kind: Number of the kind whose lengths it probably shares, from `OutputLengths.kind`.
        draw: Quantile that stands for this request, in (0, 1).
        predicted_len: Mean expected when it started for the first time, 0 before.
    """

    __slots__ = ("draw", "kind", "known_len", "max_new_len", "predicted_len")

    def __init__(self, *, max_new_len: int, known_len: int, kind: int, position: int) -> None:
        self.max_new_len = max_new_len
        self.known_len = min(known_len, max_new_len)
        self.kind = kind
        self.draw = draw(position)
        self.predicted_len = 0.0


@dataclass(frozen=True, slots=True, eq=False)
class EstimateColumns:
    """What is known of the output lengths of many requests, as columns.

    Attributes:
        max_new_len: As in `OutputEstimate`, int64[num_requests]; so are the others.
        known_len: int64[num_requests].
        kind: int64[num_requests].
        draw: float64[num_requests].
    """

    max_new_len: Int64Array
    known_len: Int64Array
    kind: Int64Array
    draw: Float64

    @classmethod
    def of(cls, estimates: Sequence[OutputEstimate]) -> EstimateColumns:
        """The columns of some requests."""
        return cls(
            np.array([estimate.max_new_len for estimate in estimates], np.int64),
            np.array([estimate.known_len for estimate in estimates], np.int64),
            np.array([estimate.kind for estimate in estimates], np.int64),
            np.array([estimate.draw for estimate in estimates], np.float64),
        )

    def at(self, places: Int64Array) -> EstimateColumns:
        """Those of some of the requests."""
        return EstimateColumns(self.max_new_len[places], self.known_len[places], self.kind[places], self.draw[places])


Estimates = Sequence[OutputEstimate] | EstimateColumns


@dataclass(slots=True)
class PredictionError:
    """How far off predictions were, over the requests whose length had to be learned.

    Attributes:
        num_requests: Requests predicted and finished.
        num_predicted_tokens: Sum of the means expected when they started.
        num_actual_tokens: Sum of what they generated.
        sum_absolute_error: Sum of the distances between the two, in tokens.
    """

    num_requests: int = 0
    num_predicted_tokens: float = 0.0
    num_actual_tokens: int = 0
    sum_absolute_error: float = 0.0

    def add(self, estimate: OutputEstimate, num_generated: int) -> None:
        """A request has ended after so many tokens. Does nothing where nothing had to be predicted."""
        if estimate.predicted_len:
            self.num_requests += 1
            self.num_predicted_tokens += estimate.predicted_len
            self.num_actual_tokens += num_generated
            self.sum_absolute_error += abs(estimate.predicted_len - num_generated)

    def __add__(self, other: PredictionError) -> PredictionError:
        return PredictionError(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: PredictionError) -> PredictionError:
        return PredictionError(*map(operator.sub, astuple(self), astuple(other)))


class _Kind:
    """Finished lengths of one kind, and the distribution made of them."""

    __slots__ = (
        "cut",
        "fallen",
        "finished",
        "is_known",
        "mean_up_to",
        "num_finished",
        "num_since",
        "parent",
        "survival",
    )

    def __init__(self, parent: int) -> None:
        self.parent = parent
        self.finished: dict[int, int] = {}
        self.cut: dict[int, int] = {}  # ended by the limit: would have gone on
        self.num_finished = 0
        self.num_since = 0
        self.is_known = False
        # Probability to generate more than l tokens, by l; of the last one for all beyond.
        self.survival: Float64 = np.ones(1)
        self.fallen = -self.survival  # ascending, to be searched
        self.mean_up_to: Float64 = np.zeros(1)

    @property
    def is_due(self) -> bool:
        return self.num_since > 0 and self.num_since >= _REFRESH_SHARE * self.num_finished

    def refresh(self, running: Int64Array) -> None:
        """Estimate the distribution from all samples; ``running`` are the tokens of those that have not finished."""
        self.num_since = 0
        self.is_known = True
        last = max(max(self.finished, default=0), max(self.cut, default=0))
        ended = np.zeros(last + 2)
        ended[list(self.finished)] = list(self.finished.values())
        left = ended.copy()
        left[list(self.cut)] += list(self.cut.values())
        left += np.bincount(np.minimum(running, last + 1), minlength=last + 2)
        at_risk = left[::-1].cumsum()[::-1]
        self.survival = np.cumprod(1.0 - ended / np.maximum(at_risk, 1.0))
        self.fallen = -self.survival
        self.mean_up_to = np.concatenate([[0.0], self.survival.cumsum()])

    def quantiles(self, num_generated: Int64Array, draws: Float64, max_new_len: Int64Array) -> Int64Array:
        last = len(self.survival) - 1
        now = self.survival[np.minimum(num_generated, last)]
        expected = np.searchsorted(self.fallen, -now * (1.0 - draws), "left")
        # Beyond all that is known, or nothing known of any that came so far: at the limit.
        expected = np.where((expected > last) | (now <= 0.0), max_new_len, np.maximum(expected, num_generated + 1))
        quantiles: Int64Array = np.minimum(expected, max_new_len).astype(np.int64)
        return quantiles

    def quantile(self, num_generated: int, draw: float, max_new_len: int) -> int:
        """The same of one request."""
        last = len(self.survival) - 1
        now = float(self.survival[min(num_generated, last)])
        expected = int(np.searchsorted(self.fallen, -now * (1.0 - draw), "left"))
        if expected > last or now <= 0.0:
            return max_new_len
        return min(max(expected, num_generated + 1), max_new_len)

    def mean_len(self, max_new_len: int) -> float:
        """Mean of a length that is cut at ``max_new_len``."""
        known = min(max_new_len, len(self.mean_up_to) - 1)
        return float(self.mean_up_to[known] + (max_new_len - known) * self.survival[-1])


class OutputLengths:
    """Learns output lengths while requests finish."""

    def __init__(self) -> None:
        self._kinds = {0: _Kind(parent=-1)}
        self._numbers: dict[Hashable, int] = {}
        self._next_number = 1
        self._touched: set[int] = set()

    def kind(self, name: Hashable, parent: int = 0) -> int:
        """Number of the kind of this name; made when new, under ``parent`` (0: all requests)."""
        number = self._numbers.get(name)
        if number is None:
            number = self._numbers[name] = self._next_number
            self._next_number += 1
            self._kinds[number] = _Kind(parent)
        return number

    @property
    def num_kinds(self) -> int:
        """Kinds that are known, that of all requests among them."""
        return len(self._kinds)

    def forget(self, *names: Hashable) -> None:
        """Drop the kinds of these names and all under them; no request of theirs is left."""
        gone = {self._numbers[name] for name in names if name in self._numbers}
        if not gone:
            return
        for number, kind in self._kinds.items():  # parents come before their children
            if kind.parent in gone:
                gone.add(number)
        self._kinds = {number: kind for number, kind in self._kinds.items() if number not in gone}
        self._numbers = {other: number for other, number in self._numbers.items() if number not in gone}
        self._touched -= gone

    def finish(self, estimate: OutputEstimate, num_generated: int) -> None:
        """A request has ended by itself or at its limit after so many tokens."""
        if estimate.known_len and num_generated <= estimate.known_len:
            return
        number = estimate.kind
        while number >= 0:
            kind = self._kinds[number]
            lens = kind.cut if num_generated >= estimate.max_new_len else kind.finished
            lens[num_generated] = lens.get(num_generated, 0) + 1
            kind.num_finished += 1
            kind.num_since += 1
            self._touched.add(number)
            number = kind.parent

    def start(self, estimate: OutputEstimate) -> None:
        """A request starts; what is expected of it now is what its end will be compared with."""
        if not estimate.known_len and not estimate.predicted_len:
            kind = self._kinds[self._stand_in(estimate.kind)]
            estimate.predicted_len = kind.mean_len(estimate.max_new_len)

    def refresh(self, estimates: Estimates, num_generated: Sequence[int] | Int64Array) -> None:
        """Bring the distributions up to date, given all that runs. Does nothing while little has finished."""
        if not self._kinds[0].is_due:
            return
        due = {
            number
            for number in self._touched
            if self._kinds[number].is_due and (number == 0 or self._kinds[number].num_finished >= MIN_FINISHED)
        }
        self._touched -= due
        kinds = _columns(estimates).kind
        generated = np.asarray(num_generated, np.int64)
        within = {number: np.zeros(len(kinds), np.bool_) for number in due}
        for kind in np.unique(kinds).tolist():
            number, of_kind = kind, kinds == kind
            while number >= 0:
                if number in due:
                    within[number] |= of_kind
                number = self._kinds[number].parent
        for number, of_kind in within.items():
            self._kinds[number].refresh(generated[of_kind])

    def expected_lens(self, estimates: Estimates, num_generated: Sequence[int] | Int64Array) -> Int64Array:
        """Tokens that each will have generated in all, given how many it has now and that it goes on.

        Returns:
            int64[num_requests], more than ``num_generated`` and at most ``max_new_len`` (or one more than generated).
        """
        generated = np.asarray(num_generated, np.int64)
        columns = _columns(estimates)
        known, max_new_len = columns.known_len, columns.max_new_len
        expected = np.where(known > generated, known, np.where(known > 0, max_new_len, 0))
        learned = np.flatnonzero(expected == 0)
        if len(learned):
            kinds, place = np.unique(columns.kind[learned], return_inverse=True)
            kinds = np.array([self._stand_in(number) for number in kinds.tolist()])[place]
            draws = columns.draw[learned]
            for number in np.unique(kinds).tolist():
                of_kind = kinds == number
                rows = learned[of_kind]
                kind = self._kinds[number]
                expected[rows] = kind.quantiles(generated[rows], draws[of_kind], max_new_len[rows])
        lens: Int64Array = np.maximum(expected, generated + 1)
        return lens

    def expected_len(self, estimate: OutputEstimate, num_generated: int) -> int:
        """The same of one request."""
        known, limit = estimate.known_len, estimate.max_new_len
        if known:
            expected = known if known > num_generated else limit
        else:
            expected = self._kinds[self._stand_in(estimate.kind)].quantile(num_generated, estimate.draw, limit)
        return max(expected, num_generated + 1)

    def _stand_in(self, number: int) -> int:
        """The nearest kind, itself or an ancestor, of which enough is known."""
        while number > 0 and not self._kinds[number].is_known:
            number = self._kinds[number].parent
        return number


def _columns(estimates: Estimates) -> EstimateColumns:
    return estimates if isinstance(estimates, EstimateColumns) else EstimateColumns.of(estimates)
