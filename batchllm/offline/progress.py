"""A progress bar for a run: rows done, tokens per second, reuse so far, time left, failures.

Knows how to show counts on a terminal; whoever runs the job does the counting.

INVARIANT: nothing is written to a stream that is not a terminal, unless asked for by name.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import NoReturn, Self, TextIO

from tqdm import tqdm

REFRESH_EVERY_S = 0.2


class Progress:
    """Counts of a run under way, on one line of a terminal.

    Example:
        >>> with Progress(num_rows=1000) as progress:  # doctest: +SKIP
        ...     progress.update(num_rows=8, num_prompt_tokens=4096, num_computed=512)
    """

    def __init__(
        self,
        num_rows: int,
        *,
        show: bool | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the clock and draws the empty bar.

        Args:
            num_rows: Rows of the whole job.
            show: True and False force the bar on and off; None shows it on a terminal only.
            stream: Where to draw; standard error by default.
            clock: Seconds from any fixed moment.
        """
        stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._start = self._drawn_at = clock()
        self._num_rows = num_rows
        self._num_done = 0
        self._num_prompt_tokens = 0
        self._num_computed = 0
        self._num_output_tokens = 0
        self._num_failed = 0
        self._bar: tqdm[NoReturn] | None = None
        if stream.isatty() if show is None else show:
            self._bar = tqdm(
                total=num_rows,
                file=stream,
                dynamic_ncols=True,
                maxinterval=math.inf,  # drawn when `update` says so, by its clock, never by tqdm's
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows{postfix}",
                postfix=self.summary(),
            )

    def update(
        self,
        *,
        num_rows: int = 0,
        num_prompt_tokens: int = 0,
        num_computed: int = 0,
        num_output_tokens: int = 0,
        num_failed: int = 0,
    ) -> None:
        """Adds to the counts; draws at most every `REFRESH_EVERY_S`.

        Args:
            num_rows: Rows that are done now, failed ones included.
            num_prompt_tokens: Prompt tokens of rows or steps since the last call.
            num_computed: Those of them that were computed, not reused.
            num_output_tokens: Tokens generated since the last call.
            num_failed: Those of the rows that failed.
        """
        self._num_done += num_rows
        self._num_prompt_tokens += num_prompt_tokens
        self._num_computed += num_computed
        self._num_output_tokens += num_output_tokens
        self._num_failed += num_failed
        now = self._clock()
        if now - self._drawn_at >= REFRESH_EVERY_S:
            self._drawn_at = now
            self._draw()

    def summary(self) -> str:
        """The words beside the bar: speed, reuse, time left, failures."""
        elapsed = self._clock() - self._start
        num_tokens = self._num_prompt_tokens + self._num_output_tokens
        parts = [f"{num_tokens / elapsed if elapsed > 0 else 0.0:,.0f} tok/s"]
        if self._num_prompt_tokens:
            parts.append(f"reuse {1 - self._num_computed / self._num_prompt_tokens:.1%}")
        if self._num_failed:
            parts.append(f"{self._num_failed:,} failed")
        parts.append(f"{self._time_left(elapsed)} left")
        return ", ".join(parts)

    def close(self) -> None:
        """Draws the last state and ends the line. Closing twice does nothing."""
        if self._bar is not None:
            self._draw()
            self._bar.close()
            self._bar = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _draw(self) -> None:
        if self._bar is not None:
            self._bar.n = self._num_done
            self._bar.set_postfix_str(self.summary(), refresh=False)
            self._bar.refresh()

    def _time_left(self, elapsed: float) -> str:
        if self._num_done >= self._num_rows:
            return "0:00"
        if not self._num_done:
            return "?"
        seconds = round(elapsed / self._num_done * (self._num_rows - self._num_done))
        minutes, seconds = divmod(seconds, 60)
        hours, minutes = divmod(minutes, 60)
        return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
