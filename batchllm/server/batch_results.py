"""The end of a batch: lines for rows that never ran, and the two files of results.

Knows the journal, lines and files; not why a batch ends.

INVARIANT: each row of the batch is in one of the files, once; made again, they are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from hashlib import blake2b
from pathlib import Path

import numpy as np
import orjson

from batchllm.dataset.decompress import open_unwrapped
from batchllm.dataset.jsonl import parse_lines
from batchllm.dataset.records import BrokenRecord
from batchllm.offline.journal import Journal
from batchllm.offline.outputs import Outputs, ResultOrder

_NUM_ROWS_PER_COMMIT = 4096
"""More at once than of answers: what is lost is soon made again."""


def record_missing(
    journal: Journal, input_path: Path, num_rows: int, *, code: str, message: str, job_seed: int
) -> None:
    """Every row of the input without a result gets an error.

    Raises:
        JournalError: The disk refuses.
        OSError: The input cannot be read.
    """
    has_result = np.zeros(num_rows, bool)
    has_result[journal.finished()] = True
    if has_result.all():
        return
    error = {"code": code, "message": message}
    with open_unwrapped(input_path) as stream:
        num_appended = 0
        for index, (_, record) in enumerate(parse_lines(stream)):
            if has_result[index]:
                continue
            custom_id = None if isinstance(record, BrokenRecord) else record.get("custom_id")
            digest = blake2b(f"{job_seed}\0{index}\0{custom_id}".encode(), digest_size=12).hexdigest()
            line = {"id": f"batch_req_{digest}", "custom_id": custom_id, "response": None, "error": error}
            journal.append(index, orjson.dumps(line), is_failed=True, code=code)
            num_appended += 1
            if num_appended % _NUM_ROWS_PER_COMMIT == 0:
                journal.commit()
    journal.commit()


def write_results(journal: Journal, answers: Path, failures: Path) -> dict[str, int]:
    """Write the two files, in input order; one without lines is empty.

    Returns:
        Sums of ``input``, ``cached`` and ``output`` tokens over the answered rows.

    Raises:
        BatchLLMError: The disk refuses.
    """
    counted = _CountedResults(journal)
    with Outputs(str(answers), errors_path=str(failures), order="input", journal=counted) as outputs:
        outputs.finish()
    return counted.usage


class _CountedResults:
    """A journal's results, their tokens counted as they go by."""

    def __init__(self, journal: Journal) -> None:
        self._journal = journal
        self.usage = {"input": 0, "cached": 0, "output": 0}

    def results(self, order: ResultOrder, *, failed: bool | None = None) -> Iterator[bytes]:
        if failed is not False:
            return self._journal.results(order, failed=failed)
        return self._count(self._journal.results(order, failed=failed))

    def _count(self, lines: Iterator[bytes]) -> Iterator[bytes]:
        num_cached = 0
        for line in lines:
            yield line
            body = orjson.loads(line)["response"]["body"]
            # A ranking is a list, and SGLang's answers to scores do not say it.
            usage = body["usage"] if isinstance(body, dict) else {}
            details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details")
            num_cached += details["cached_tokens"] if details else 0
        num_input, num_output = self._journal.num_tokens()
        self.usage = {"input": num_input, "cached": num_cached, "output": num_output}
