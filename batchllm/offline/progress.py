"""Where a run stands: a bar on a terminal, and lines of JSON in a file for whoever watches from outside.

Knows how to show counts; whoever runs the job does the counting.

INVARIANT: nothing is written to a stream that is not a terminal, unless asked for by name. What cannot be shown never
stops the run.
"""

from __future__ import annotations

import errno
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from typing import Literal, NoReturn, Self, TextIO

import orjson
from tqdm import tqdm

from batchllm.errors import ConfigError

REFRESH_EVERY_S = 0.2
HEARTBEAT_EVERY_S = 1.0

RunState = Literal["reading", "starting", "running", "stopping"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgressSnapshot:
    """A run at one moment; its fields are those of a line of the progress file. Tokens and failures are of this run."""

    time: float
    """Unix seconds."""
    state: RunState
    num_rows: int | None
    """Rows of the job; None until the input has been read."""
    num_done: int
    """Rows that are done, those of earlier runs included."""
    num_failed: int
    num_done_before: int
    """Rows that earlier runs of the job had finished."""
    num_prompt_tokens: int
    num_computed_prompt_tokens: int
    num_output_tokens: int
    tokens_per_s: float
    """Prompt and output tokens over the time since this run began."""
    reuse: float
    """Part of the prompt tokens that was not computed, 0 to 1."""
    time_left_s: float | None
    """At the speed so far; None until there is one."""
    num_engine_restarts: int
    elapsed_s: float


class Progress:
    """Counts of a run under way.

    Example:
        >>> with Progress(num_rows=1000) as progress:  # doctest: +SKIP
        ...     progress.update(num_rows=8, num_prompt_tokens=4096, num_computed=512)

    Attributes:
        started_at: Unix seconds.
    """

    def __init__(
        self,
        num_rows: int | None = None,
        *,
        num_done_before: int = 0,
        file: Path | None = None,
        show: bool | None = None,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Starts the clock, draws the bar, and writes the file's first line.

        Args:
            num_rows: Rows of the whole job; None if the input must be read first (`set_num_rows`).
            num_done_before: Rows of them that earlier runs have finished.
            file: Gets a line of JSON now and then, behind what it has.
            show: True and False force the bar on and off; None shows it on a terminal only.
            stream: Where to draw and warn; standard error by default.
            clock: Seconds from any fixed moment.

        Raises:
            ConfigError: The file cannot be opened.
        """
        self._stream = sys.stderr if stream is None else stream
        self._clock = clock
        self._start = self._drawn_at = self._told_at = clock()
        self._state: RunState = "reading"
        self._num_rows = num_rows
        self._num_done_before = num_done_before
        self._num_done = 0
        self._num_prompt_tokens = 0
        self._num_computed = 0
        self._num_output_tokens = 0
        self._num_failed = 0
        self._num_engine_restarts = 0
        self._bar: tqdm[NoReturn] | None = None
        self._file = None if file is None else _open_file(file)
        self.started_at = time.time()
        if self._stream.isatty() if show is None else show:
            self._bar = tqdm(
                total=num_rows,
                initial=num_done_before,
                file=self._stream,
                dynamic_ncols=True,
                maxinterval=math.inf,  # drawn when `tick` says so, by its clock, never by tqdm's
                bar_format="{percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} rows{postfix}",
                postfix=self.summary(),
            )
        self._tell()

    def update(
        self,
        *,
        num_rows: int = 0,
        num_prompt_tokens: int = 0,
        num_computed: int = 0,
        num_output_tokens: int = 0,
        num_failed: int = 0,
    ) -> None:
        """Adds to the counts, and ticks.

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
        self.tick()

    def tick(self) -> None:
        """Lets time pass: draws at most every `REFRESH_EVERY_S`, writes at most every `HEARTBEAT_EVERY_S`."""
        now = self._clock()
        if now - self._drawn_at >= REFRESH_EVERY_S:
            self._drawn_at = now
            self._draw()
        if now - self._told_at >= HEARTBEAT_EVERY_S:
            self._tell()

    def set_num_rows(self, num_rows: int) -> None:
        """The input has been read: the job has so many rows."""
        self._num_rows = num_rows
        self._draw()

    def set_state(self, state: RunState) -> None:
        """What the run does now; a change is written at once."""
        if state != self._state:
            self._state = state
            self._tell()

    def set_num_engine_restarts(self, num_engine_restarts: int) -> None:
        """Engines started so far in the place of one that died."""
        self._num_engine_restarts = num_engine_restarts

    def snapshot(self) -> ProgressSnapshot:
        """The run as it is now; other threads may ask too."""
        elapsed = self._clock() - self._start
        num_tokens = self._num_prompt_tokens + self._num_output_tokens
        # Tokens are counted as computed before their prompts are counted as answered.
        reuse = max(0.0, 1 - self._num_computed / self._num_prompt_tokens) if self._num_prompt_tokens else 0.0
        return ProgressSnapshot(
            time=time.time(),
            state=self._state,
            num_rows=self._num_rows,
            num_done=self._num_done_before + self._num_done,
            num_failed=self._num_failed,
            num_done_before=self._num_done_before,
            num_prompt_tokens=self._num_prompt_tokens,
            num_computed_prompt_tokens=self._num_computed,
            num_output_tokens=self._num_output_tokens,
            tokens_per_s=num_tokens / elapsed if elapsed > 0 else 0.0,
            reuse=reuse,
            time_left_s=self._time_left_s(elapsed),
            num_engine_restarts=self._num_engine_restarts,
            elapsed_s=elapsed,
        )

    def summary(self) -> str:
        """The words beside the bar: speed, reuse, time left, failures."""
        now = self.snapshot()
        parts = [f"{now.tokens_per_s:,.0f} tok/s"]
        if now.num_prompt_tokens:
            parts.append(f"reuse {now.reuse:.1%}")
        if now.num_failed:
            parts.append(f"{now.num_failed:,} failed")
        parts.append(f"{_in_words(now.time_left_s)} left")
        return ", ".join(parts)

    def close(self) -> None:
        """Draws the last state and ends the line; writes the file's last line. Closing twice does nothing."""
        if self._bar is not None:
            self._draw()
            self._bar.close()
            self._bar = None
        if self._file is not None:
            self._tell()
            self._close_file()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _draw(self) -> None:
        if self._bar is not None:
            self._bar.total = self._num_rows
            self._bar.n = self._num_done_before + self._num_done
            self._bar.set_postfix_str(self.summary(), refresh=False)
            self._bar.refresh()

    def _tell(self) -> None:
        if self._file is None:
            return
        self._told_at = self._clock()
        line = orjson.dumps(asdict(self.snapshot()), option=orjson.OPT_APPEND_NEWLINE)
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, "No space left on device")
        except OSError as error:
            message = f"--progress-file {self._file.name}: {error.strerror}; going on without it"
            tqdm.write(message, file=self._stream)  # above the bar
            self._close_file()

    def _close_file(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def _time_left_s(self, elapsed: float) -> float | None:
        if self._num_rows is None:
            return None
        num_left = self._num_rows - self._num_done_before - self._num_done
        if num_left <= 0:
            return 0.0
        return elapsed / self._num_done * num_left if self._num_done else None


def _open_file(path: Path) -> FileIO:
    try:
        # Unbuffered: a line is one write, whole for whoever reads meanwhile.
        return FileIO(path, "a")
    except OSError as error:
        raise ConfigError(f"--progress-file {path}: cannot be opened: {error.strerror}") from error


def _in_words(time_left_s: float | None) -> str:
    if time_left_s is None:
        return "?"
    minutes, seconds = divmod(round(time_left_s), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
