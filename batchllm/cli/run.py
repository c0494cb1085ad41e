"""``batchllm run`` and ``batchllm retry``: a job, its folder, and how they come together."""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil

from batchllm.cli.collector import rare_collections
from batchllm.cli.engine_flags import adapter_identities, flag_value, flags_of_answers, with_config
from batchllm.cli.inputs import NO_MODEL, rows_of
from batchllm.cli.outcome import (
    DEMO_MODEL,
    EXIT_CANNOT_RUN,
    EXIT_OK,
    EXIT_ROWS_FAILED,
    EXIT_STOPPED,
    say,
    say_failed,
    show,
)
from batchllm.cli.replicas import check_replicas, start_replicas
from batchllm.cli.run_command import RunCommand
from batchllm.dataset import BadRow, Input, Row, check_writable, open_input
from batchllm.dataset.writers import is_same_output
from batchllm.default_model import default_model_path
from batchllm.distributed.runtime import ReplicatedRuntime
from batchllm.errors import BatchLLMError, ConfigError, EngineError, JournalError, WorkloadError
from batchllm.host import template
from batchllm.host.runtime import HostedRuntime
from batchllm.offline.fingerprint import Fingerprint, check_same, model_identity
from batchllm.offline.journal import Journal
from batchllm.offline.journal.database import damaged, database_path
from batchllm.offline.metrics import MetricsServer
from batchllm.offline.outputs import Outputs, check_outputs
from batchllm.offline.progress import Progress
from batchllm.offline.recorder import Recorder
from batchllm.offline.runner import Runner, RunOptions
from batchllm.offline.runtime import Runtime
from batchllm.offline.stats import make_trace
from batchllm.offline.stop import StopSignal

OUTPUT_FORMAT = "1"
"""Of the lines; a job begun with another one cannot go on with this."""

_COLUMN_FLAGS = ("prompt_column", "messages_column", "template", "id_column", "carry", "input_format", "schema")
_DEFAULT_MEMORY_SHARE = 0.5
_TOKEN_BYTES = 4


def run(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Run a job, or what is left of it; returns the exit status."""
    command = RunCommand.of_run(args, server_flags)
    with StopSignal(command.grace) as stop, _job_folder(command) as folder:
        command = replace(command, job_dir=str(folder.path) if folder.is_temporary else command.job_dir)
        folder.status = _run_job(command, folder, stop)
        return folder.status


def retry(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Run again what failed in a job, and whatever has no result yet; returns the exit status."""
    folder = _JobFolder(Path(args.job_dir))
    with Journal.open(folder.path) as journal:
        try:
            command = RunCommand.of_retry(args, server_flags, journal.command)
        except (AttributeError, KeyError, TypeError) as error:
            raise damaged(database_path(folder.path), f"what was asked for cannot be read: {error!r}") from error
    with _held_template(command), StopSignal(command.grace) as stop:
        return _run_job(command, folder, stop, runs_failed=True)


@dataclass(slots=True)
class _JobFolder:
    """Where a job lives.

    Attributes:
        path: The folder.
        is_temporary: The same command would not find it again.
        status: How the run in it has ended; None if it has not.
    """

    path: Path
    is_temporary: bool = False
    status: int | None = None

    @property
    def go_on(self) -> str:
        """What to do to go on with the job, in words."""
        how = f"with --job-dir {self.path}" if self.is_temporary else "again"
        return f"run the same command {how} to go on"


def _run_job(
    command: RunCommand,
    folder: _JobFolder,
    stop: StopSignal,
    *,
    runs_failed: bool = False,
) -> int:
    started = time.perf_counter()
    input_path = None if command.input == "-" else command.input
    check_outputs(command.output, errors_path=command.errors, input_path=input_path)
    _check_other_files(command, folder.path)
    if command.output == "-" and sys.stdout is None:
        raise ConfigError("-o -: standard output is closed; give a path")
    options = _options(command)
    check_replicas(command)
    if command.is_on_ray and command.trace is not None:
        raise ConfigError("--trace: the steps of several engines are not on one clock; trace one, without --replicas")
    with ExitStack() as stack:
        source = _open_source(command, folder.path, stack)
        rows = _as_hashed(rows_of(command, source), source, source.states())
        if command.restart and Journal.exists(folder.path):
            Journal.remove(folder.path)
        journal = stack.enter_context(_open_journal(command, folder, source))
        if runs_failed:
            journal.set_failed_aside()
        num_before = journal.num_rows
        outputs = stack.enter_context(
            Outputs(command.output, errors_path=command.errors, order=command.order, journal=journal)
        )
        progress = stack.enter_context(
            Progress(
                None,
                show=command.progress,
                num_done_before=num_before,
                file=None if command.progress_file is None else Path(command.progress_file),
            )
        )
        if command.metrics_port is not None:
            stack.enter_context(MetricsServer(progress, command.metrics_port))
        recorder = Recorder(journal, outputs, progress, command.max_failures)
        runner = Runner(
            lambda: _start_engine(command, journal),
            journal=journal,
            recorder=recorder,
            progress=progress,
            stop=stop,
            folder=folder.path,
            options=options,
        )
        stack.callback(runner.close)
        journal.event("start", f"{num_before} rows had a result")
        outputs.begin()
        with rare_collections():
            is_complete = _run_and_note_end(runner, rows, journal, stop)
        run_ended = time.perf_counter()
        if not is_complete:
            done = f"{journal.num_rows} of {runner.num_rows} rows have their result"
            say(f"stopped by {stop.name}: {done}, in {folder.path}; {folder.go_on}")
            return EXIT_STOPPED
        outputs.finish()
    runner.stats.write_s = time.perf_counter() - run_ended
    return _tell(command, runner, recorder, num_before, time.perf_counter() - started)


def _run_and_note_end(runner: Runner, rows: Iterable[Row | BadRow], journal: Journal, stop: StopSignal) -> bool:
    """Run the job and write in its journal how that has ended; returns whether every row has a result."""
    try:
        is_complete = runner.run(rows)
    except (EngineError, KeyboardInterrupt, WorkloadError) as error:
        kind, detail = "error", str(error)
        if isinstance(error, KeyboardInterrupt):  # while nobody looked at `stop`: an engine was starting, say
            kind, detail = "stop", stop.name or ""
        with suppress(JournalError):  # why the run has ended is the news
            journal.event(kind, detail)
        raise
    journal.event("end" if is_complete else "stop", stop.name or "")
    journal.commit()
    return is_complete


def _check_other_files(command: RunCommand, folder: Path) -> None:
    """The files about the run can be written, and none takes the place of another, of the answers or of the job.

    Raises:
        ConfigError: One cannot, or does.
    """
    others = {"--report": command.report, "--trace": command.trace, "--progress-file": command.progress_file}
    taken = {"-o": command.output, "--errors": command.errors}
    for flag, path in others.items():
        if path is None:
            continue
        check_writable(path, flag, input_path=command.input)
        for other_flag, other in taken.items():
            if other is not None and is_same_output(path, other):
                raise ConfigError(f"{flag} {path}: is what {other_flag} writes; write to another file")
        taken[flag] = path
    for flag, path in taken.items():
        if path is not None and is_same_output(path, str(folder)):
            raise ConfigError(f"{flag} {path}: is the job's folder; write elsewhere, or give another --job-dir")


@contextmanager
def _job_folder(command: RunCommand) -> Iterator[_JobFolder]:
    """The job's folder; a temporary one, gone when all is done, where the output has no folder of its own."""
    if command.job_dir is not None:
        yield _JobFolder(Path(command.job_dir))
        return
    if command.output != "-" and "://" not in command.output:
        yield _JobFolder(Path(f"{command.output}.job"))
        return
    try:
        folder = _JobFolder(Path(tempfile.mkdtemp(prefix="batchllm-job-")), is_temporary=True)
    except OSError as error:
        raise ConfigError(f"no folder can be made for the job: {error}; give one, --job-dir") from error
    try:
        yield folder
    finally:
        if folder.status not in (None, EXIT_STOPPED) or not Journal.exists(folder.path):  # else what is done stays
            shutil.rmtree(folder.path, ignore_errors=True)


def _open_source(command: RunCommand, folder: Path, stack: ExitStack) -> Input:
    """The input. A URL is read once for a job; standard input comes again with each run, and is compared."""
    is_begun = Journal.exists(folder) and not command.restart
    if command.input == "-" and is_begun:
        # It may be another input: it must not replace the job's own copy, which `retry` reads.
        try:
            copies = tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)
        except OSError as error:
            raise ConfigError(f"-i -: cannot be copied to {folder}: {error.strerror}") from error
        folder = Path(stack.enter_context(copies))
    return open_input(
        command.input,
        spool_folder=folder,
        input_format=command.input_format,
        reuse_spool=command.input != "-" and is_begun,
    )


def _as_hashed(rows: Iterable[Row | BadRow], source: Input, states: list[tuple[int, int]]) -> Iterator[Row | BadRow]:
    """The rows of an input that stays what it was when its contents were taken for the job's fingerprint.

    Raises:
        WorkloadError: At the end: it did not.
    """
    yield from rows
    if source.states() != states:
        raise WorkloadError(f"-i {source.name}: was changed while it was being read; run the job on a file that stays")


@contextmanager
def _open_journal(command: RunCommand, folder: _JobFolder, source: Input) -> Iterator[Journal]:
    """The journal of this very job. One that has nothing in it when an error ends the run is not left behind."""
    fingerprint = _fingerprint(command, source)
    is_new = not Journal.exists(folder.path)
    if is_new:
        journal = Journal.create(folder.path, fingerprint=fingerprint, command=command.to_journal(source.spool_path))
    else:
        journal = Journal.open(folder.path)
    try:
        with journal:
            if journal.recovery:
                say(journal.recovery)
            check_same(folder.path, journal.fingerprint, fingerprint)
            yield journal
            return
    except (BatchLLMError, OSError, KeyboardInterrupt, MemoryError) as error:
        if is_new and journal.num_rows == 0:
            _remove_job(folder.path, source)
        elif isinstance(error, JournalError):  # it says itself what is safe
            if folder.is_temporary:
                error.add_note(folder.go_on)
        elif not isinstance(error, ConfigError):
            error.add_note(f"what is done is safe in {folder.path}; {folder.go_on}")
        raise


def _remove_job(folder: Path, source: Input) -> None:
    """Nothing has come of it. What cannot be removed stays: why the run has ended is the news."""
    if source.spool_path is not None and source.spool_path.is_dir():
        shutil.rmtree(source.spool_path, ignore_errors=True)
    with suppress(OSError, ConfigError):
        if source.spool_path is not None:
            source.spool_path.unlink(missing_ok=True)
        Journal.remove(folder)
        folder.rmdir()  # unless there are other things in it


def _fingerprint(command: RunCommand, source: Input) -> Fingerprint:
    """What the job's answers depend on."""
    columns = {name: getattr(command, name) for name in _COLUMN_FLAGS}
    server_flags = with_config(list(command.server_flags))
    adapters = adapter_identities(server_flags)
    parts = {
        "input": source.content_hash(),
        "model": model_identity(_model_path(command, server_flags)),
        "sampling": command.sampling or "{}",
        "columns": json.dumps({name: value for name, value in columns.items() if value is not None}),
        "engine": " ".join(flags_of_answers(server_flags)),
        **({"adapters": json.dumps(adapters)} if adapters else {}),
        "format": OUTPUT_FORMAT,
    }
    # What a shell hands over need not be text.
    return Fingerprint({name: part.encode(errors="backslashreplace").decode() for name, part in parts.items()})


def _model_path(command: RunCommand, server_flags: list[str]) -> str:
    given = command.model if command.model is not None else flag_value(server_flags, "model-path")
    if given == "":
        raise ConfigError(NO_MODEL)
    return given if given is not None else default_model_path()


def _held_template(command: RunCommand) -> AbstractContextManager[None]:
    """What `batchllm.cli.begin_engine` begins for ``run``: for ``retry``, whose folder says whether it is needed."""
    return nullcontext() if command.is_on_ray else template.held(is_verbose=_is_verbose(command))


def _is_verbose(command: RunCommand) -> bool:
    """Whether the engine's processes print to standard error."""
    return command.verbose or flag_value(list(command.server_flags), "log-level") is not None


def _start_engine(command: RunCommand, journal: Journal) -> Runtime:
    """An engine that draws the seeds of the job's first one, so that a resumed job samples what it would have."""
    seed = journal.notes.get("random_seed")
    server_flags = list(command.server_flags)
    model_path = _model_path(command, with_config(server_flags))
    options: dict[str, Any] = {
        "default_model_path": default_model_path(),
        "flags": command.server_flags,
        "is_verbose": _is_verbose(command),
    }
    if seed is not None:
        options["random_seed"] = int(seed)
    if command.is_on_ray:
        runtime: Runtime = start_replicas(command, model_path, options, ReplicatedRuntime)
    else:
        runtime = HostedRuntime(command.model, **options)
    if seed is None:
        journal.note("random_seed", str(runtime.info.random_seed))
        if model_path == default_model_path() and command.model is None and not command.demo_model:
            say(DEMO_MODEL.format(flag="-m"))
    return runtime


def _options(command: RunCommand) -> RunOptions:
    if command.token_memory is None:
        max_token_bytes = int(psutil.virtual_memory().available * _DEFAULT_MEMORY_SHARE)
    else:
        if not _TOKEN_BYTES <= command.token_memory * 2**30 < math.inf:
            raise ConfigError(f"--token-memory {command.token_memory}: must be an amount of memory, in GiB")
        max_token_bytes = int(command.token_memory * 2**30)
    for name, value in (
        ("--retry", command.retry),
        ("--max-failures", command.max_failures),
        ("--grace", command.grace),
    ):
        if value is not None and not value >= 0:
            raise ConfigError(f"{name} {value}: must be at least 0")
    return RunOptions(
        num_retries=command.retry,
        shares_answers=command.dedupe,
        max_token_bytes=max_token_bytes,
        group_order=command.group_order,
        keep_steps=command.trace is not None,
    )


def _tell(command: RunCommand, runner: Runner, recorder: Recorder, num_before: int, elapsed_s: float) -> int:
    """Failed rows in words, the report, and the files about the run that were asked for; returns the exit status."""
    say_failed(recorder.first_failed, recorder.num_failed)
    if runner.num_lost_tokens:
        say(
            f"planned in shards, for want of memory: {runner.num_lost_tokens} prompt tokens are computed more than once"
        )
    report = runner.stats.report(
        runner.info,
        num_requests=runner.num_rows,
        num_failed=recorder.num_failed,
        num_done_before=num_before,
        num_engine_restarts=runner.restarts.num_deaths,
        elapsed_s=elapsed_s,
    )
    show(report.render())
    try:
        if command.trace is not None and runner.info is not None:
            make_trace(f"run {command.input}", runner.steps, runner.info, runner.started_at).write(command.trace)
        if command.report is not None:
            report.write_json(command.report)
    except OSError as error:
        say(f"--trace or --report: {error.filename}: {error.strerror}; the answers are whole, in {command.output}")
        return EXIT_CANNOT_RUN
    return EXIT_ROWS_FAILED if recorder.num_failed else EXIT_OK
