"""An engine as a worker of Ray Data: units in, answers out.

A unit is a job: planned, run, recovered and recorded by what does it for files, in a folder that is gone afterwards.
The engine stays from unit to unit.

Knows how tables become jobs and results tables; not how Ray Data distributes them. One stage is in one process.

INVARIANT: each row that comes in goes out once, in its place, answered or with its error.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import orjson
import psutil
import pyarrow as pa
import xxhash

from batchllm.dataset import BadRow, ColumnMap, Row
from batchllm.dataset.parquet_table import answer_table
from batchllm.default_model import default_model_path
from batchllm.distributed.actor import free_port
from batchllm.errors import ConfigError
from batchllm.host import own_folder
from batchllm.host.runtime import HostedRuntime
from batchllm.offline.fingerprint import Fingerprint
from batchllm.offline.journal import Journal
from batchllm.offline.progress import Progress
from batchllm.offline.recorder import Recorder
from batchllm.offline.report import RunReport
from batchllm.offline.runner import Runner, RunOptions
from batchllm.offline.runtime import Runtime
from batchllm.offline.stop import StopSignal
from batchllm.ray.keys import TableReader
from batchllm.ray.units import plain, unpacked

_MEMORY_SHARE = 0.25


class BatchStage:
    """Answers units, or any tables of rows, in the order in which Ray Data gives them.

    For ``map_batches`` with ``batch_format="pyarrow"``, on units of `batchllm.ray.plan` with ``batch_size=1``.
    On a dataset that has not been planned what two batches share is computed in each.

    Args:
        model_path: A Hugging Face model, a directory or a hub name; the embedded model when None.
        columns: As in `batchllm.ray.plan`, and which columns are carried to the output.
        sampling: As in `batchllm.ray.plan`.
        num_retries: Times that a row which fails while it runs is run again, unless it is at fault itself.
        random_seed: What is drawn for a row that names no seed depends on this and its id alone.
        **server_args: As in `batchllm.BatchEngine`.

    Attributes:
        last_report: `RunReport` of the last batch, None before the first.

    Raises:
        ConfigError: An argument is wrong or not supported.
        EngineError: The engine did not start.
    """

    def __init__(
        self,
        model_path: str | None = None,
        *,
        columns: ColumnMap | None = None,
        sampling: Mapping[str, Any] | None = None,
        num_retries: int = 0,
        random_seed: int = 0,
        **server_args: Any,
    ) -> None:
        own_folder.remove_dead()  # that of an actor which was killed
        self._reader = TableReader(columns, sampling)
        self._num_retries, self._random_seed = num_retries, random_seed
        path = default_model_path() if model_path is None else model_path
        self._start: Callable[[], Runtime] = partial(self.start_engine, path, random_seed=random_seed, **server_args)
        engine = self._start()
        self._runtime: Runtime | None = engine
        self._takes_seeds = engine.info.has_seeded_sampling
        self.last_report: RunReport | None = None

    @staticmethod
    def start_engine(model_path: str, **server_args: Any) -> Runtime:
        """Start the engine. SGLang draws a port with the random seed, which is the same for all stages of a machine."""
        return HostedRuntime(model_path, **{"nccl_port": free_port()} | server_args)

    def __call__(self, batch: pa.Table) -> pa.Table:
        """Answer a batch.

        Args:
            batch: Units, or rows of a dataset.

        Returns:
            A row for each row: ``id``, ``text``, ``finish_reason``, ``output_ids``, ``prompt_tokens``,
            ``cached_tokens``, ``completion_tokens``, ``error_code``, ``error_message``, the carried columns, and
            ``record``, the line that ``batchllm run`` writes.

        Raises:
            ConfigError: The batch is no ``pyarrow.Table``, or lacks a column.
            EngineError: The engine dies again and again.
        """
        if not isinstance(batch, pa.Table):
            raise ConfigError('BatchStage takes tables: give batch_format="pyarrow" to map_batches')
        rows = plain(unpacked(batch))
        self._reader.columns.check_columns(rows.column_names, "the dataset")
        carried = {name: rows.column(name) for name in self._reader.columns.carry}
        return answer_table(self._answer(rows) if rows.num_rows else [], carried)

    def _answer(self, table: pa.Table) -> list[bytes]:
        began = time.perf_counter()
        with _unit_folder() as folder:
            fingerprint = Fingerprint({"unit": str(folder)})
            with (
                Journal.create(folder, fingerprint=fingerprint, command={}) as journal,
                Progress(show=False) as progress,
            ):
                recorder = Recorder(journal, None, progress, None, job_seed=self._random_seed)
                runner = Runner(
                    self._take_engine,
                    journal=journal,
                    recorder=recorder,
                    progress=progress,
                    stop=StopSignal(0.0),
                    folder=folder,
                    options=RunOptions(
                        num_retries=self._num_retries,
                        max_token_bytes=int(psutil.virtual_memory().available * _MEMORY_SHARE),
                        ends_engine=False,
                    ),
                )
                try:
                    runner.run(self._rows(table))
                    self._runtime = self._runtime or runner.runtime
                finally:
                    runner.close()
                    if self._runtime is None and runner.runtime is not None:
                        runner.runtime.shutdown()
                self.last_report = runner.stats.report(
                    runner.info,
                    num_requests=runner.num_rows,
                    num_failed=recorder.num_failed,
                    num_engine_restarts=runner.restarts.num_deaths,
                    elapsed_s=time.perf_counter() - began,
                )
                return list(journal.results("input"))

    def _take_engine(self) -> Runtime:
        """The engine, or another one where this batch has had it and it has died."""
        runtime, self._runtime = self._runtime, None
        return self._start() if runtime is None else runtime

    def _rows(self, table: pa.Table) -> Iterator[Row | BadRow]:
        """The rows; what is drawn depends on no place in a unit."""
        for row in self._reader.read(table):
            if self._takes_seeds and isinstance(row, Row) and row.request.sampling.seed is None:
                digest = xxhash.xxh64_intdigest(orjson.dumps([self._random_seed, row.request.row_id]))
                sampling = dataclasses.replace(row.request.sampling, seed=digest >> 1)
                row = msgspec.structs.replace(row, request=msgspec.structs.replace(row.request, sampling=sampling))
            yield row


@contextmanager
def _unit_folder() -> Iterator[Path]:
    """A folder that is known as this process's, so that it is found and removed where the process is killed."""
    folder = own_folder.make()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
