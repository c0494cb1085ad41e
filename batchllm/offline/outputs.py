"""The user's files, made from the results that the journal keeps.

In input order, files are written when the job ends. In finishing order, files that can grow are kept up to date while
it runs; others are written at the end.

Knows which results go where and when; not formats, and not how results come about.

INVARIANT: a finished job's files hold each result of the journal once, in the order asked for.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol, Self

from batchllm.dataset.writers import LineWriter, can_append, check_output, is_same_output, open_appender, open_writer
from batchllm.errors import ConfigError

ResultOrder = Literal["input", "finished"]

OUTPUT_FLAG = "-o"
ERRORS_FLAG = "--errors"


class Results(Protocol):
    """What outputs need of a journal."""

    def results(self, order: ResultOrder, *, failed: bool | None = None) -> Iterator[bytes]:
        """Output lines of all results, or of the failed (True) or answered (False) ones only."""
        ...


def check_outputs(path: str, *, errors_path: str | None = None, input_path: str | None = None) -> None:
    """Checks what can be known of a job's outputs before anything runs; leaves no trace.

    Raises:
        ConfigError: One cannot be written, or two are the same.
    """
    check_output(path, OUTPUT_FLAG, input_path=input_path)
    if errors_path is not None:
        check_output(errors_path, ERRORS_FLAG, input_path=input_path)
        if is_same_output(path, errors_path):
            raise ConfigError(f"{ERRORS_FLAG} {errors_path}: is the output {OUTPUT_FLAG} too; write to another file")


@dataclass(slots=True, kw_only=True)
class _File:
    path: str
    flag: str
    failed: bool | None
    """Which results it takes: failed ones, answered ones, all."""
    appender: LineWriter | None = None
    """Open while the file grows."""


class Outputs:
    """The files of one run of a job.

    A context manager: leaving it closes what is open, and completes nothing.

    Args:
        path: Where results go: a path, a URL, or ``-``.
        errors_path: Where failed ones go; None for among the others.
        order: That of the input, or that in which rows finished.
        journal: Has the results.

    Attributes:
        is_live: A file grows while the job runs: `append` wants to hear of results.
    """

    def __init__(self, path: str, *, errors_path: str | None, order: ResultOrder, journal: Results) -> None:
        self._order = order
        self._journal = journal
        self._files = [_File(path=path, flag=OUTPUT_FLAG, failed=None if errors_path is None else False)]
        if errors_path is not None:
            self._files.append(_File(path=errors_path, flag=ERRORS_FLAG, failed=True))
        self.is_live = any(map(self._grows, self._files))

    def begin(self) -> None:
        """Brings growing files to what the journal has already.

        Raises:
            BatchLLMError: One cannot be written.
            BrokenPipeError: Nobody reads standard output any more.
        """
        for file in filter(self._grows, self._files):
            if file.path != "-":
                self._write_whole(file)
            file.appender = open_appender(file.path, flag=file.flag)
            if file.path == "-":
                for line in self._journal.results(self._order, failed=file.failed):
                    file.appender.write(line)
                file.appender.flush()

    def append(self, lines: Sequence[tuple[bytes, bool]]) -> None:
        """Adds results to growing files, for readers to see.

        Args:
            lines: Lines that the journal has safe, in finishing order, and whether each is a failed row's.

        Raises:
            BatchLLMError: A file cannot be written.
            BrokenPipeError: Nobody reads standard output any more.
        """
        for file in self._files:
            if file.appender is not None:
                for line, is_failed in lines:
                    if file.failed is None or file.failed == is_failed:
                        file.appender.write(line)
                file.appender.flush()

    def finish(self) -> None:
        """Completes all files.

        Raises:
            BatchLLMError: One cannot be written.
            BrokenPipeError: Nobody reads standard output any more.
        """
        for file in self._files:
            if self._grows(file):
                assert file.appender is not None, f"{file.path}: finished before it was begun"
                file.appender.close()
            else:
                self._write_whole(file)

    def close(self) -> None:
        """Closes what is open; what growing files have stays. Closing twice does nothing."""
        for file in self._files:
            if file.appender is not None:
                file.appender.abandon()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _grows(self, file: _File) -> bool:
        return self._order == "finished" and can_append(file.path)

    def _write_whole(self, file: _File) -> None:
        with open_writer(file.path, flag=file.flag) as writer:
            for line in self._journal.results(self._order, failed=file.failed):
                writer.write(line)
