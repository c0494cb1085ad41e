"""Results of rows on their way to safety: answer, line, journal, and only then the user's files and the counts.

Knows formats of lines through `dataset`, the journal and the outputs; not plans, or the engine but for what it says of
tokens.

INVARIANT: a row is recorded once; progress and outputs are told of it only after the journal has it on disk.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import orjson

from batchllm.dataset import BadRow, RowHead, find_abort, render_error, render_success
from batchllm.dataset.logprobs import Decode
from batchllm.dataset.responses import DecodePrompt, count_tokens
from batchllm.errors import ConfigError, WorkloadError
from batchllm.offline.identical import IdenticalRows
from batchllm.offline.job import FinishedRows
from batchllm.offline.journal import Journal
from batchllm.offline.outputs import Outputs
from batchllm.offline.progress import Progress
from batchllm.offline.row_spool import RowSpool
from batchllm.offline.runtime import BulkTokenizer, Runtime
from batchllm.offline.stats import JobStats
from batchllm.request import Completion
from batchllm.tokens import Int64Array

NUM_SHOWN = 5
_NUM_BETWEEN_LOOKS = 64
"""Answers between two looks whether a commit is due."""


class Recorder:
    """Takes the result of each row once.

    Args:
        journal: Keeps the results.
        outputs: The user's files; None where nothing is written as rows finish.
        progress: Told of rows that are safe.
        max_failures: More failed rows than this, those of earlier runs included, stop the job; None: never.
        job_seed: Goes into the ids of responses: the same row of another job has others.

    Attributes:
        num_failed: Rows of the job without an answer.
        failed_by_code: Those of each reason.
        first_failed: The first few of them in this run.
    """

    def __init__(
        self,
        journal: Journal,
        outputs: Outputs | None,
        progress: Progress,
        max_failures: int | None,
        *,
        job_seed: int = 0,
    ) -> None:
        self._job_seed = job_seed
        self._journal = journal
        self._outputs = outputs if outputs is not None and outputs.is_live else None
        self._progress = progress
        self._max_failures = max_failures
        self._created = int(time.time())
        self._num_unsafe = 0
        self._num_unsafe_failed = 0
        self._unsafe_lines: list[tuple[bytes, bool]] = []
        self.failed_by_code = Counter(journal.failed_by_code())
        self.num_failed = self.failed_by_code.total()
        self.first_failed: list[BadRow] = []

    def answer(
        self,
        head: RowHead,
        completions: Sequence[Completion],
        *,
        model: str,
        decode: Decode,
        decode_prompt: DecodePrompt,
    ) -> None:
        """All samples of a row have finished, none aborted; they come in their order."""
        record = render_success(
            head,
            completions,
            model=model,
            created=self._created,
            decode=decode,
            decode_prompt=decode_prompt,
            job_seed=self._job_seed,
        )
        num_prompt_tokens, _, num_output_tokens = count_tokens(head, completions)
        self._journal.append(
            head.position,
            self._keep(orjson.dumps(record), is_failed=False),
            num_prompt_tokens=num_prompt_tokens,
            num_output_tokens=num_output_tokens,
        )
        if self._num_unsafe % _NUM_BETWEEN_LOOKS == 0:
            self.commit_if_due()

    def fail(self, bad: BadRow) -> None:
        """A row has no answer.

        Raises:
            WorkloadError: One failure too many; everything recorded so far is safe.
        """
        self.num_failed += 1
        self.failed_by_code[bad.code] += 1
        if len(self.first_failed) < NUM_SHOWN:
            self.first_failed.append(bad)
        line = self._keep(orjson.dumps(render_error(bad, job_seed=self._job_seed)), is_failed=True)
        self._journal.append(bad.index, line, is_failed=True, code=bad.code)
        self.commit_if_due()
        if self._max_failures is not None and self.num_failed > self._max_failures:
            self.commit()
            raise WorkloadError(
                f"--max-failures {self._max_failures}: {self.num_failed} rows have failed, the last one on line "
                f"{bad.line}: {bad.message}"
            )

    def commit_if_due(self) -> None:
        """Make results safe if enough of them wait, or the first has waited long enough."""
        if self._journal.is_due(time.monotonic()):
            self.commit()

    def commit(self) -> None:
        """Make all results safe.

        Raises:
            JournalError: The disk refuses; what was safe stays safe.
        """
        self._journal.commit()
        if self._outputs is not None and self._unsafe_lines:
            self._outputs.append(self._unsafe_lines)
            self._unsafe_lines = []
        self._progress.update(num_rows=self._num_unsafe, num_failed=self._num_unsafe_failed)
        self._num_unsafe = self._num_unsafe_failed = 0

    def _keep(self, line: bytes, *, is_failed: bool) -> bytes:
        self._num_unsafe += 1
        self._num_unsafe_failed += is_failed
        if self._outputs is not None:
            self._unsafe_lines.append((line, is_failed))
        return line


class Answers:
    """Takes what the engine has answered: each row gets its result, and so do its doubles, or it runs again.

    Args:
        recorder: Takes the results.
        spool: Has the heads of the rows.
        identical: Which rows get the answer of another one too; None where none does.
        num_rows: Rows of the job.
        num_retries: Times that a row which fails while it runs is run again, unless it is at fault itself.
    """

    def __init__(
        self, recorder: Recorder, spool: RowSpool, identical: IdenticalRows | None, *, num_rows: int, num_retries: int
    ) -> None:
        self._recorder = recorder
        self._spool = spool
        self._identical = identical
        self._num_retries = num_retries
        self._is_done = np.zeros(num_rows, bool)
        self._num_tries: Counter[int] = Counter()
        self._to_retry: list[int] = []
        self._stats = JobStats()

    def take(self, finished: FinishedRows, runtime: Runtime) -> int:
        """Record the rows that have finished; returns how many of them were answered.

        Raises:
            ConfigError: An answer needs a tokenizer that the engine does without.
            WorkloadError: Too many rows have failed.
        """
        heads = [self._spool.read(row) for row in finished.rows]
        if runtime.info.parses_answers:
            _parse(heads, finished.completions, runtime.tokenizer)
        model, decode = runtime.info.model_name, _Decode(runtime.tokenizer)
        num_answered = 0
        for row, head, completions, optimal_len in zip(
            finished.rows, heads, finished.completions, finished.optimal_lens, strict=True
        ):
            num_answered += self._finish(row, head, completions, optimal_len, model, decode)
        return num_answered

    def fail(self, row: int, bad: BadRow) -> None:
        """Record that a row, and its doubles, have no answer."""
        for number in self._with_doubles(row):
            head = self._spool.read(number)
            self._is_done[number] = True
            own = replace(bad, kind=head.kind, given_id=head.given_id, line=head.line, carried=head.carried)
            self._recorder.fail(replace(own, index=head.position))

    def take_stats(self) -> JobStats:
        """What the rows that were recorded since the last time have cost, as far as it is a row's."""
        stats, self._stats = self._stats, JobStats()
        return stats

    def take_retries(self) -> list[int]:
        """Rows that are to be run again."""
        rows, self._to_retry = self._to_retry, []
        return rows

    def unfinished(self, rows: Int64Array | None) -> Int64Array:
        """Those of some rows, or of all, that have no result and are not to be run again either."""
        left = np.flatnonzero(~self._is_done) if rows is None else rows[~self._is_done[rows]]
        return np.setdiff1d(left, self._to_retry)

    def _finish(
        self, row: int, head: RowHead, completions: list[Completion], optimal_len: int, model: str, decode: _Decode
    ) -> bool:
        bad = find_abort(head, completions)
        if bad is not None and bad.status_code >= 500 and self._num_tries[row] < self._num_retries:
            self._num_tries[row] += 1
            self._to_retry.append(row)
            return False
        stats = self._stats
        stats.num_optimal_prompt_tokens += optimal_len
        for completion in completions:
            stats.num_prompt_tokens += completion.prompt_tokens
            stats.num_output_tokens += len(completion.output_ids)
        if bad is not None:
            self.fail(row, bad)
            return False
        for number in self._with_doubles(row):
            self._recorder.answer(
                head if number == row else self._spool.read(number),
                completions,
                model=model,
                decode=decode.token,
                decode_prompt=decode.prompt,
            )
            self._is_done[number] = True
        return True

    def _with_doubles(self, row: int) -> list[int]:
        return [row] if self._identical is None else [row, *self._identical.followers(row)]


class _Decode:
    """Ids to text, where a line needs it."""

    def __init__(self, tokenizer: BulkTokenizer | None) -> None:
        self._tokenizer = tokenizer

    def token(self, token_id: int) -> bytes | str:
        if self._tokenizer is None:
            raise ConfigError("--skip-tokenizer-init: OpenAI rows with logprobs need a tokenizer")
        return self._tokenizer.decode_token(token_id)

    def prompt(self, ids: Sequence[int]) -> str:
        if self._tokenizer is None:
            raise ConfigError("--skip-tokenizer-init: rows with echo need a tokenizer")
        return self._tokenizer.decode(ids)


def _parse(heads: Sequence[RowHead], answers: Sequence[list[Completion]], tokenizer: BulkTokenizer | None) -> None:
    """Look the answers to chats through for reasoning and tool calls."""
    assert tokenizer is not None
    chats = [(head, own) for head, own in zip(heads, answers, strict=True) if head.kind in ("chat", "responses")]
    parsed = iter(tokenizer.parse_answers([(head.chat or {}, completion) for head, own in chats for completion in own]))
    for _, completions in chats:
        completions[:] = [next(parsed) for _ in completions]
