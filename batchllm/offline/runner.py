"""Runs the rows of a file: every row gets its line, answered or failed, as soon as it has one."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from batchllm.dataset import (
    BadRow,
    JsonlSink,
    Row,
    find_abort,
    reject,
    render_error,
    render_success,
)
from batchllm.errors import ConfigError
from batchllm.offline.job import Job
from batchllm.offline.progress import Progress
from batchllm.offline.runtime import Runtime
from batchllm.request import Completion


class Runner:
    """Writes each row's line as it becomes known.

    Args:
        runtime: What answers.
        sink: Where the lines go.
        progress: Told of every row.
        job_options: Keyword arguments of `Job`.

    Attributes:
        failed: Rows without an answer so far.
        job: The job, for its report.
    """

    def __init__(self, runtime: Runtime, sink: JsonlSink, progress: Progress, **job_options: Any) -> None:
        self._runtime = runtime
        self._sink = sink
        self._progress = progress
        self._samples: dict[int, list[Completion]] = {}
        self._created = int(time.time())
        self.failed: list[BadRow] = []
        self.job = Job(runtime, **job_options)

    def run(self, rows: Sequence[Row]) -> None:
        """Answer these rows.

        Raises:
            EngineDiedError: The runtime is gone; what had been answered is written.
        """
        waiting = {row.request.index: row for row in rows}
        self.job.prepare(row.request for row in rows)
        for request, error in self.job.rejected:
            self.fail(reject(waiting.pop(request.index), error))
        num_computed = 0
        for completions in self._runtime.iterate(self.job.run()):
            self._progress.update(
                num_computed=self.job.stats.num_computed_prompt_tokens - num_computed,
                num_prompt_tokens=sum(c.prompt_tokens for c in completions),
                num_output_tokens=sum(c.completion_tokens for c in completions),
            )
            num_computed = self.job.stats.num_computed_prompt_tokens
            for completion in completions:
                self._take(waiting, completion)
        assert not waiting, f"{len(waiting)} rows have no answer"

    def fail(self, bad: BadRow) -> None:
        """This row has no answer."""
        self.failed.append(bad)
        self._sink.write_error(bad.index, render_error(bad))
        self._progress.update(num_rows=1, num_failed=1)

    def _take(self, waiting: dict[int, Row], completion: Completion) -> None:
        index = completion.index
        samples = self._samples.setdefault(index, [])
        samples.append(completion)
        if len(samples) < waiting[index].request.sampling.n:
            return
        row = waiting.pop(index)
        bad = find_abort(row, self._samples.pop(index))
        if bad is not None:
            self.fail(bad)
            return
        self._sink.write(
            index,
            render_success(
                row,
                samples,
                model=self._runtime.info.model_name,
                created=self._created,
                decode=self._decode,
            ),
        )
        self._progress.update(num_rows=1)

    def _decode(self, token_id: int) -> str:
        if self._runtime.tokenizer is None:
            raise ConfigError("--skip-tokenizer-init: OpenAI rows with logprobs need a tokenizer")
        return self._runtime.tokenizer.decode_token(token_id)
