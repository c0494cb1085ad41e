"""The steps of one run, in memory and as a file, and the numbers that sum them up.

Knows no engine, clock or plan; whoever runs the steps counts.

INVARIANT: a number is computed in one place, from the steps; of nothing it is 0, never an error.
"""

from __future__ import annotations

import operator
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from batchllm.errors import ConfigError
from batchllm.trace import chrome_trace
from batchllm.trace.steps import MAX_COUNT, STEP_KINDS, StepArray, checked_steps, step_kinds, used_tokens
from batchllm.trace.table import aligned
from batchllm.trace.whole_file import write_whole

_RAMP_END = 0.9


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class StepTrace:
    """What a run did in each of its forward steps.

    Attributes:
        label: What ran, one line, e.g. ``run rows.jsonl``; characters that cannot be printed are escaped.
        kv_capacity_tokens: Slots of the KV pool.
        kv_limit_tokens: Slots of it that may be used; occupancy is a part of this.
        steps: `STEP_DTYPE` ``[num_steps]``, in order of time; read only.

    Raises:
        ValueError: A count is negative or above `MAX_COUNT`, or `steps` are not what `checked_steps` takes.
    """

    label: str
    kv_capacity_tokens: int
    kv_limit_tokens: int
    steps: StepArray

    def __post_init__(self) -> None:
        object.__setattr__(self, "label", _one_line(self.label))
        for name in ("kv_capacity_tokens", "kv_limit_tokens"):
            count = operator.index(getattr(self, name))
            if not 0 <= count <= MAX_COUNT:
                raise ValueError(f"{name} is {count}, and must be from 0 to {MAX_COUNT:g}")
            object.__setattr__(self, name, count)
        object.__setattr__(self, "steps", checked_steps(self.steps))

    def write(self, path: str | os.PathLike[str]) -> None:
        """Writes Chrome Trace Event JSON, which Perfetto and chrome://tracing open; complete or not at all.

        Raises:
            OSError: The folder cannot be written.
        """
        header = chrome_trace.Header(
            label=self.label, kv_capacity_tokens=self.kv_capacity_tokens, kv_limit_tokens=self.kv_limit_tokens
        )
        write_whole(path, chrome_trace.encode(header, self.steps, self.summary()))

    @classmethod
    def read(cls, path: str | os.PathLike[str]) -> StepTrace:
        """The trace that `write` wrote, exactly.

        Raises:
            ConfigError: The file cannot be read, or is not such a trace, or not all of one.
        """
        try:
            raw = Path(path).read_bytes()
        except (OSError, ValueError) as error:  # ValueError: a null character in the path
            reason = getattr(error, "strerror", None) or str(error)
            raise ConfigError(f"{os.fspath(path)!r}: the trace cannot be read: {reason}; check the path") from error
        try:
            header, steps = chrome_trace.decode(raw)
            return cls(
                label=header.label,
                kv_capacity_tokens=header.kv_capacity_tokens,
                kv_limit_tokens=header.kv_limit_tokens,
                steps=steps,
            )
        except ValueError as error:
            raise ConfigError(
                f"{os.fspath(path)!r}: {error}; name a trace file as batchllm wrote it, or record the run again"
            ) from error

    @property
    def num_steps(self) -> int:
        """Forward steps of the run."""
        return len(self.steps)

    @property
    def elapsed_s(self) -> float:
        """Seconds from the start of the first step to the end of the last to end."""
        if not self.num_steps:
            return 0.0
        return float((self.steps["start_s"] + self.steps["duration_s"]).max() - self.steps["start_s"][0])

    @property
    def kind_shares(self) -> dict[str, float]:
        """Part of the steps that is of each of `STEP_KINDS`, 0 to 1."""
        counts = np.bincount(step_kinds(self.steps), minlength=len(STEP_KINDS)).tolist()
        return {kind: count / max(self.num_steps, 1) for kind, count in zip(STEP_KINDS, counts, strict=True)}

    @property
    def occupancy(self) -> npt.NDArray[np.float64]:
        """KV used in each step, pinned and private, as a part of the limit, float64 ``[num_steps]``."""
        return used_tokens(self.steps) / self.kv_limit_tokens if self.kv_limit_tokens else np.zeros(self.num_steps)

    @property
    def mean_occupancy(self) -> float:
        """Mean of `occupancy` over the time of all steps."""
        return self._occupancy_in(slice(None))

    @property
    def saturated(self) -> slice:
        """Steps in which more work was there than ran: where the KV should be full.

        Up to the last step in which anything waited, and from the first one that waited or, if that
        is later, from the first whose occupancy reached 90 % of its greatest (before it the run
        filled up). Empty if nothing waited after that.
        """
        waited = np.flatnonzero(self.steps["num_waiting"] > 0)
        if not len(waited):
            return slice(0, 0)
        occupancy = self.occupancy
        ramp_end = int(np.argmax(occupancy >= _RAMP_END * occupancy.max()))
        begin, end = max(int(waited[0]), ramp_end), int(waited[-1]) + 1
        return slice(begin, max(begin, end))

    @property
    def saturated_s(self) -> float:
        """Seconds spent in the steps of `saturated`."""
        return float(self.steps["duration_s"][self.saturated].sum())

    @property
    def saturated_occupancy(self) -> float:
        """Mean of `occupancy` over the time of the steps of `saturated`."""
        return self._occupancy_in(self.saturated)

    @property
    def median_step_s(self) -> float:
        """Half of the steps took at most this many seconds."""
        return self._percentile("duration_s", 50)

    @property
    def p99_step_s(self) -> float:
        """99 of 100 steps took at most this many seconds."""
        return self._percentile("duration_s", 99)

    @property
    def median_host_s(self) -> float:
        """In half of the steps the scheduler itself took at most this many seconds."""
        return self._percentile("host_s", 50)

    @property
    def mean_decode_rows(self) -> float:
        """Rows that decoded in a step, mean over all steps."""
        return float(self.steps["num_decode_tokens"].mean()) if self.num_steps else 0.0

    def summary(self) -> dict[str, int | float]:
        """All counts and ratios by name, in the order of the table; times in seconds."""
        shares = self.kind_shares
        return {
            "num_steps": self.num_steps,
            **{f"{kind}_share": shares[kind] for kind in STEP_KINDS},
            "elapsed_s": self.elapsed_s,
            "median_step_s": self.median_step_s,
            "p99_step_s": self.p99_step_s,
            "median_host_s": self.median_host_s,
            "num_prefill_tokens": int(self.steps["num_prefill_tokens"].sum(dtype=np.int64)),
            "num_decode_tokens": int(self.steps["num_decode_tokens"].sum(dtype=np.int64)),
            "mean_decode_rows": self.mean_decode_rows,
            "kv_capacity_tokens": self.kv_capacity_tokens,
            "kv_limit_tokens": self.kv_limit_tokens,
            "peak_kv_tokens": int(used_tokens(self.steps).max(initial=0.0)),
            "mean_occupancy": self.mean_occupancy,
            "saturated_occupancy": self.saturated_occupancy,
            "saturated_s": self.saturated_s,
            "num_retracted": int(self.steps["num_retracted"].sum(dtype=np.int64)),
        }

    def table(self) -> list[tuple[str, str, str]]:
        """`summary` in words: a name, a value with its unit, and a note on it (which may be empty)."""
        numbers = self.summary()
        kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in self.kind_shares.items() if share or kind != "idle")
        return [
            ("steps", f"{self.num_steps:,}", kinds),
            ("elapsed", f"{self.elapsed_s:,.2f} s", "first step to last"),
            ("step time", f"{self.median_step_s * 1e3:,.2f} ms", f"median; p99 {self.p99_step_s * 1e3:,.2f} ms"),
            ("host time", f"{self.median_host_s * 1e3:,.2f} ms", "median of the scheduler's own time in a step"),
            ("prefill tokens", f"{numbers['num_prefill_tokens']:,}", ""),
            ("decode tokens", f"{numbers['num_decode_tokens']:,}", f"{self.mean_decode_rows:,.1f} rows a step"),
            ("KV limit", f"{self.kv_limit_tokens:,}", f"tokens, of {self.kv_capacity_tokens:,}"),
            ("  peak", f"{numbers['peak_kv_tokens']:,}", "tokens pinned or private"),
            ("  mean use", f"{self.mean_occupancy:.1%}", "of the limit, over the time of all steps"),
            ("  saturated", f"{self.saturated_occupancy:.1%}", self._saturated_note()),
            ("retractions", f"{numbers['num_retracted']:,}", ""),
        ]

    def render(self) -> str:
        """The label, and `table` aligned for a terminal, without a final newline."""
        return f"{self.label}\n{aligned(self.table())}"

    def _occupancy_in(self, part: slice) -> float:
        seconds = self.steps["duration_s"][part]
        total_s = float(seconds.sum())
        return float(self.occupancy[part] @ (seconds / total_s)) if total_s > 0 else 0.0

    def _percentile(self, field: str, percent: int) -> float:
        return float(np.percentile(self.steps[field], percent)) if self.num_steps else 0.0

    def _saturated_note(self) -> str:
        part = self.saturated
        if part.start == part.stop:
            return "nothing waited once the KV was full"
        return f"while work waited: steps {part.start:,} to {part.stop - 1:,}, {self.saturated_s:,.2f} s"


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)
