"""Answers on their way out: each row that the engine has answered gets its result, or runs again; so do its doubles.

Knows rows, their heads and the recorder; not jobs, or the engine but for what it says of tokens.

INVARIANT: a row is recorded once; its doubles are recorded with it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from batchllm.dataset import BadRow, RowHead, find_abort
from batchllm.errors import ConfigError
from batchllm.offline.identical import IdenticalRows
from batchllm.offline.job import FinishedRows
from batchllm.offline.recorder import Recorder
from batchllm.offline.row_spool import RowSpool
from batchllm.offline.runtime import BulkTokenizer, Runtime
from batchllm.offline.stats import JobStats
from batchllm.request import Completion

Int64Array = npt.NDArray[np.int64]


class Answers:
    """Takes the answers of a job's rows.

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
        stats.num_prompt_tokens += sum([completion.prompt_tokens for completion in completions])
        stats.num_output_tokens += sum([completion.completion_tokens for completion in completions])
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
    chats = [(head, own) for head, own in zip(heads, answers, strict=True) if head.kind == "chat"]
    parsed = iter(tokenizer.parse_answers([(head.chat or {}, completion) for head, own in chats for completion in own]))
    for _, completions in chats:
        completions[:] = [next(parsed) for _ in completions]
