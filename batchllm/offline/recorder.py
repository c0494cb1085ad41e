"""Results of rows on their way to safety: line, journal, and only then the user's files and the counts.

Knows formats of lines through `dataset`, the journal and the outputs; not engines or plans.

INVARIANT: progress and outputs are told of a row only after the journal has it on disk.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Sequence

import orjson

from batchllm.dataset import BadRow, RowHead, render_error, render_success
from batchllm.dataset.logprobs import Decode
from batchllm.dataset.responses import DecodePrompt, count_tokens
from batchllm.errors import WorkloadError
from batchllm.offline.journal import NUM_ROWS_PER_COMMIT, Journal
from batchllm.offline.outputs import Outputs
from batchllm.offline.progress import Progress
from batchllm.request import Completion

NUM_SHOWN = 5


class Recorder:
    """Takes the result of each row once.

    Args:
        journal: Keeps the results.
        outputs: The user's files.
        progress: Told of rows that are safe.
        max_failures: More failed rows than this, those of earlier runs included, stop the job; None: never.
        job_seed: Goes into the ids of responses: the same row of another job has others.

    Attributes:
        num_failed: Rows of the job without an answer.
        failed_by_code: Those of each reason.
        first_failed: The first few of them in this run.
    """

    def __init__(
        self, journal: Journal, outputs: Outputs, progress: Progress, max_failures: int | None, *, job_seed: int = 0
    ) -> None:
        self._job_seed = job_seed
        self._journal = journal
        self._outputs = outputs
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
        if self._num_unsafe >= NUM_ROWS_PER_COMMIT:  # how long they have waited is looked at once for many
            self.commit()

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
        if self._unsafe_lines:
            self._outputs.append(self._unsafe_lines)
            self._unsafe_lines = []
        self._progress.update(num_rows=self._num_unsafe, num_failed=self._num_unsafe_failed)
        self._num_unsafe = self._num_unsafe_failed = 0

    def _keep(self, line: bytes, *, is_failed: bool) -> bytes:
        self._num_unsafe += 1
        self._num_unsafe_failed += is_failed
        if self._outputs.is_live:
            self._unsafe_lines.append((line, is_failed))
        return line
