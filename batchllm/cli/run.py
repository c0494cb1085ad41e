"""``batchllm run`` and ``batchllm retry``: a job, its folder, and how they come together."""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from batchllm.cli.engine_flags import adapter_identities, flag_value, flags_of_answers, with_config
from batchllm.cli.inputs import rows_of
from batchllm.cli.outcome import EXIT_CANNOT_RUN, EXIT_OK, EXIT_ROWS_FAILED, EXIT_STOPPED, say, say_failed, show
from batchllm.dataset import BadRow, Input, Row, check_writable, open_input
from batchllm.dataset.writers import is_same_output
from batchllm.default_model import default_model_path
from batchllm.errors import BatchLLMError, ConfigError, JournalError, WorkloadError
from batchllm.host.runtime import HostedRuntime
from batchllm.offline.fingerprint import Fingerprint, check_same, model_identity
from batchllm.offline.journal import Journal
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
_PATHS = ("input", "output", "errors", "report", "trace", "progress_file", "model", "job_dir")
_FLAGS_OF_RETRY = ("retry", "max_failures", "grace", "progress", "progress_file", "metrics_port", "verbose")
DEMO_MODEL = "no {flag} MODEL: the answers are a random model's, for trying out (--demo-model: say nothing)"
_DEFAULT_MEMORY_SHARE = 0.5
_TOKEN_BYTES = 4
COLLECT_EVERY = 100_000
"""Containers made between two looks of the garbage collector: those of a row go without it, and there are millions."""


def run(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Run a job, or what is left of it; returns the exit status."""
    _check_other_files(args)
    with StopSignal(args.grace) as stop, _job_folder(args) as folder:
        folder.status = _run_job(args, server_flags, folder, stop)
        return folder.status


def retry(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Run again what failed in a job, and whatever has no result yet; returns the exit status."""
    folder = _JobFolder(Path(args.job_dir))
    with Journal.open(folder.path) as journal:
        command = journal.command
    given = {name: value for name, value in vars(args).items() if name in _FLAGS_OF_RETRY and value is not None}
    again = argparse.Namespace(**command["flags"] | given | {"job_dir": args.job_dir, "restart": False})
    with StopSignal(again.grace) as stop:
        return _run_job(again, command["server_flags"] + server_flags, folder, stop, runs_failed=True)


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
    args: argparse.Namespace,
    server_flags: list[str],
    folder: _JobFolder,
    stop: StopSignal,
    *,
    runs_failed: bool = False,
) -> int:
    started = time.perf_counter()
    input_path = None if args.input == "-" else args.input
    check_outputs(args.output, errors_path=args.errors, input_path=input_path)
    if args.output == "-" and sys.stdout is None:
        raise ConfigError("-o -: standard output is closed; give a path")
    options = _options(args)
    with ExitStack() as stack:
        source = _open_source(args, folder.path, stack)
        rows = _as_hashed(rows_of(args, source), source, source.states())
        if args.restart and Journal.exists(folder.path):
            Journal.remove(folder.path)
        journal = stack.enter_context(_open_journal(args, server_flags, folder, source))
        if runs_failed:
            journal.set_failed_aside()
        num_before = journal.num_rows
        outputs = stack.enter_context(Outputs(args.output, errors_path=args.errors, order=args.order, journal=journal))
        progress = stack.enter_context(
            Progress(
                None,
                show=args.progress,
                num_done_before=num_before,
                file=None if args.progress_file is None else Path(args.progress_file),
            )
        )
        if args.metrics_port is not None:
            stack.enter_context(MetricsServer(progress, args.metrics_port))
        recorder = Recorder(journal, outputs, progress, args.max_failures)
        runner = Runner(
            lambda: _start_engine(args, server_flags, journal),
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
        with _rare_collections():
            is_complete = runner.run(rows)
        run_ended = time.perf_counter()
        journal.event("end" if is_complete else "stop", stop.name or "")
        journal.commit()
        if not is_complete:
            done = f"{journal.num_rows} of {runner.num_rows} rows have their result"
            say(f"stopped by {stop.name}: {done}, in {folder.path}; {folder.go_on}")
            return EXIT_STOPPED
        outputs.finish()
    runner.stats.write_s = time.perf_counter() - run_ended
    return _tell(args, runner, recorder, num_before, time.perf_counter() - started)


@contextmanager
def _rare_collections() -> Iterator[None]:
    """This process has nothing else to do: the garbage collector looks rarely."""
    thresholds = gc.get_threshold()
    gc.set_threshold(COLLECT_EVERY, *thresholds[1:])
    try:
        yield
    finally:
        gc.set_threshold(*thresholds)


def _check_other_files(args: argparse.Namespace) -> None:
    """The files about the run can be written, and none takes the place of another or of the answers.

    Raises:
        ConfigError: One cannot, or does.
    """
    others = {"--report": args.report, "--trace": args.trace, "--progress-file": args.progress_file}
    taken = {"-o": args.output, "--errors": args.errors}
    for flag, path in others.items():
        if path is None:
            continue
        check_writable(path, flag, input_path=args.input)
        for other_flag, other in taken.items():
            if other is not None and is_same_output(path, other):
                raise ConfigError(f"{flag} {path}: is what {other_flag} writes; write to another file")
        taken[flag] = path


@contextmanager
def _job_folder(args: argparse.Namespace) -> Iterator[_JobFolder]:
    """The job's folder; a temporary one, gone when all is done, where the output has no folder of its own."""
    if args.job_dir is not None:
        yield _JobFolder(Path(args.job_dir))
        return
    if args.output != "-" and "://" not in args.output:
        yield _JobFolder(Path(f"{args.output}.job"))
        return
    try:
        args.job_dir = tempfile.mkdtemp(prefix="batchllm-job-")
    except OSError as error:
        raise ConfigError(f"no folder can be made for the job: {error}; give one, --job-dir") from error
    folder = _JobFolder(Path(args.job_dir), is_temporary=True)
    try:
        yield folder
    finally:
        if folder.status not in (None, EXIT_STOPPED) or not Journal.exists(folder.path):  # else what is done stays
            shutil.rmtree(folder.path, ignore_errors=True)


def _open_source(args: argparse.Namespace, folder: Path, stack: ExitStack) -> Input:
    """The input. A URL is read once for a job; standard input comes again with each run, and is compared."""
    is_begun = Journal.exists(folder) and not args.restart
    if args.input == "-" and is_begun:
        # Not in the place of the job's own copy, which `retry` reads, as long as it may be another input.
        try:
            copies = tempfile.TemporaryDirectory(dir=folder, ignore_cleanup_errors=True)
        except OSError as error:
            raise ConfigError(f"-i -: cannot be copied to {folder}: {error.strerror}") from error
        folder = Path(stack.enter_context(copies))
    return open_input(
        args.input,
        spool_folder=folder,
        input_format=args.input_format,
        reuse_spool=args.input != "-" and is_begun,
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
def _open_journal(
    args: argparse.Namespace, server_flags: list[str], folder: _JobFolder, source: Input
) -> Iterator[Journal]:
    """The journal of this very job. One that has nothing in it when an error ends the run is not left behind."""
    fingerprint = _fingerprint(args, server_flags, source)
    is_new = not Journal.exists(folder.path)
    if is_new:
        journal = Journal.create(folder.path, fingerprint=fingerprint, command=_command(args, server_flags, source))
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


def _command(args: argparse.Namespace, server_flags: list[str], source: Input) -> dict[str, Any]:
    """What `retry` needs to run the job again, from wherever it is called."""
    flags = {name: value for name, value in vars(args).items() if name not in ("command", "restart")}
    for name in _PATHS:
        value = flags[name]
        if value is not None and value != "-" and "://" not in value and (name != "model" or os.path.exists(value)):
            flags[name] = os.path.abspath(value)
    if source.spool_path is not None:
        flags["input"] = str(source.spool_path.absolute())
    return {"flags": flags, "server_flags": server_flags}


def _fingerprint(args: argparse.Namespace, server_flags: list[str], source: Input) -> Fingerprint:
    """What the job's answers depend on."""
    # A job that an earlier version began has not every flag.
    columns = {name: getattr(args, name, None) for name in _COLUMN_FLAGS}
    server_flags = with_config(server_flags)
    adapters = adapter_identities(server_flags)
    parts = {
        "input": source.content_hash(),
        "model": model_identity(_model_path(args, server_flags)),
        "sampling": args.sampling or "{}",
        "columns": json.dumps({name: value for name, value in columns.items() if value is not None}),
        "engine": " ".join(flags_of_answers(server_flags)),
        **({"adapters": json.dumps(adapters)} if adapters else {}),
        "format": OUTPUT_FORMAT,
    }
    # What a shell hands over need not be text.
    return Fingerprint({name: part.encode(errors="backslashreplace").decode() for name, part in parts.items()})


def _model_path(args: argparse.Namespace, server_flags: list[str]) -> str:
    given = args.model or flag_value(server_flags, "model-path")
    return given if given is not None else default_model_path()


def _start_engine(args: argparse.Namespace, server_flags: list[str], journal: Journal) -> Runtime:
    """An engine that draws the seeds of the job's first one, so that a resumed job samples what it would have."""
    seed = journal.notes.get("random_seed")
    runtime = HostedRuntime(
        args.model,
        default_model_path=default_model_path(),
        flags=server_flags,
        is_verbose=args.verbose or flag_value(server_flags, "log-level") is not None,
        **({} if seed is None else {"random_seed": int(seed)}),
    )
    if seed is None:
        journal.note("random_seed", str(runtime.info.random_seed))
        if runtime.model_path == default_model_path() and args.model is None and not getattr(args, "demo_model", False):
            say(DEMO_MODEL.format(flag="-m"))
    return runtime


def _options(args: argparse.Namespace) -> RunOptions:
    if args.token_memory is None:
        max_token_bytes = int(psutil.virtual_memory().available * _DEFAULT_MEMORY_SHARE)
    else:
        if not _TOKEN_BYTES <= args.token_memory * 2**30 < math.inf:
            raise ConfigError(f"--token-memory {args.token_memory}: must be an amount of memory, in GiB")
        max_token_bytes = int(args.token_memory * 2**30)
    for name, value in (("--retry", args.retry), ("--max-failures", args.max_failures), ("--grace", args.grace)):
        if value is not None and value < 0:
            raise ConfigError(f"{name} {value}: must be at least 0")
    return RunOptions(
        num_retries=args.retry,
        shares_answers=args.dedupe,
        max_token_bytes=max_token_bytes,
        group_order=args.group_order,
        keep_steps=args.trace is not None,
    )


def _tell(args: argparse.Namespace, runner: Runner, recorder: Recorder, num_before: int, elapsed_s: float) -> int:
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
        if args.trace is not None and runner.info is not None:
            make_trace(f"run {args.input}", runner.steps, runner.info, runner.started_at).write(args.trace)
        if args.report is not None:
            report.write_json(args.report)
    except OSError as error:
        say(f"--trace or --report: {error.filename}: {error.strerror}; the answers are whole, in {args.output}")
        return EXIT_CANNOT_RUN
    return EXIT_ROWS_FAILED if recorder.num_failed else EXIT_OK
