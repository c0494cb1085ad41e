"""``batchllm run`` and ``batchllm retry``: a job, its folder, and how they come together."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

from batchllm.cli.inputs import rows_of
from batchllm.cli.outcome import EXIT_OK, EXIT_ROWS_FAILED, EXIT_STOPPED, say, say_failed
from batchllm.dataset import Input, check_writable, open_input
from batchllm.default_model import default_model_path
from batchllm.errors import BatchLLMError, ConfigError
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

_ENGINE_FLAGS_OF_ANSWERS = (
    *("dtype", "quantization", "kv-cache-dtype", "revision", "tokenizer-path", "chat-template", "lora-paths"),
    *("json-model-override-args", "context-length", "sampling-backend", "skip-tokenizer-init", "random-seed"),
)
"""Engine flags that change answers. The others change how fast they come, and may change from run to run."""
_COLUMN_FLAGS = ("prompt_column", "messages_column", "template", "id_column", "carry", "input_format")
_PATHS = ("input", "output", "errors", "report", "trace", "progress_file", "model", "job_dir")
_FLAGS_OF_RETRY = ("retry", "max_failures", "grace", "progress", "progress_file", "metrics_port")
_DEFAULT_MEMORY_SHARE = 0.5


def run(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Run a job, or what is left of it; returns the exit status."""
    for flag, path in (("--report", args.report), ("--trace", args.trace), ("--progress-file", args.progress_file)):
        if path is not None:
            check_writable(path, flag, input_path=args.input)
    with StopSignal(args.grace) as stop, _job_folder(args) as folder:
        if args.restart and Journal.exists(folder):
            Journal.remove(folder)
        return _run_job(args, server_flags, folder, stop)


def retry(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Run again what failed in a job, and whatever has no result yet; returns the exit status."""
    folder = Path(args.job_dir)
    with Journal.open(folder) as journal:
        command = journal.command
        journal.forget_failed()
    given = {name: value for name, value in vars(args).items() if name in _FLAGS_OF_RETRY and value is not None}
    again = argparse.Namespace(**command["flags"] | given | {"job_dir": str(folder), "restart": False})
    with StopSignal(again.grace) as stop:
        return _run_job(again, command["server_flags"] + server_flags, folder, stop)


def _run_job(args: argparse.Namespace, server_flags: list[str], folder: Path, stop: StopSignal) -> int:
    started = time.perf_counter()
    input_path = None if args.input == "-" else args.input
    check_outputs(args.output, errors_path=args.errors, input_path=input_path)
    source = open_input(
        args.input,
        spool_folder=folder,
        input_format=args.input_format,
        # A URL is read once for a job; standard input comes again with each run, and is compared.
        reuse_spool=args.input != "-" and Journal.exists(folder),
    )
    with ExitStack() as stack:
        journal = stack.enter_context(_open_journal(args, server_flags, folder, source))
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
            folder=folder,
            options=_options(args),
        )
        stack.callback(runner.close)
        journal.event("start", f"{num_before} rows had a result")
        outputs.begin()
        is_complete = runner.run(rows_of(args, source))
        journal.event("end" if is_complete else "stop", stop.name or "")
        journal.commit()
        if not is_complete:
            say(f"stopped by {stop.name}: {journal.num_rows} of {runner.num_rows} rows have their result, in {folder}")
            say("run the same command again to go on")
            return EXIT_STOPPED
        outputs.finish()
    _tell(args, runner, recorder, num_before, time.perf_counter() - started)
    return EXIT_ROWS_FAILED if recorder.num_failed else EXIT_OK


@contextmanager
def _job_folder(args: argparse.Namespace) -> Iterator[Path]:
    """The job's folder; a temporary one, gone when all is done, where the output has no folder of its own."""
    if args.job_dir is not None:
        yield Path(args.job_dir)
    elif args.output != "-" and "://" not in args.output:
        yield Path(f"{args.output}.job")
    else:
        folder = tempfile.mkdtemp(prefix="batchllm-job-")
        args.job_dir = folder
        yield Path(folder)
        shutil.rmtree(folder)  # an exception has passed by: what is done stays there


@contextmanager
def _open_journal(args: argparse.Namespace, server_flags: list[str], folder: Path, source: Input) -> Iterator[Journal]:
    """The journal of this very job. One that has nothing in it when an error ends the run is not left behind."""
    fingerprint = _fingerprint(args, server_flags, source)
    is_new = not Journal.exists(folder)
    if is_new:
        journal = Journal.create(folder, fingerprint=fingerprint, command=_command(args, server_flags, source))
    else:
        journal = Journal.open(folder)
    try:
        with journal:
            if journal.recovery:
                say(journal.recovery)
            check_same(folder, journal.fingerprint, fingerprint)
            yield journal
            return
    except (BatchLLMError, KeyboardInterrupt) as error:
        if is_new and journal.num_rows == 0:
            _remove_job(folder, source)
        elif not isinstance(error, ConfigError):
            error.add_note(f"what is done is safe in {folder}; run the same command again to go on")
        raise


def _remove_job(folder: Path, source: Input) -> None:
    """Nothing has come of it."""
    if source.spool_path is not None:
        source.spool_path.unlink()
    Journal.remove(folder)
    with suppress(OSError):  # there may be other things in it
        folder.rmdir()


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
    columns = {name: getattr(args, name) for name in _COLUMN_FLAGS}
    return Fingerprint(
        {
            "input": source.content_hash(),
            "model": model_identity(_model_path(args, server_flags)),
            "sampling": args.sampling or "{}",
            "columns": json.dumps({name: value for name, value in columns.items() if value is not None}),
            "engine": " ".join(_flags_of_answers(server_flags)),
            "format": OUTPUT_FORMAT,
        }
    )


def _model_path(args: argparse.Namespace, server_flags: list[str]) -> str:
    given = args.model or _flag_value(server_flags, "model-path")
    return given if given is not None else default_model_path()


def _flags_of_answers(server_flags: list[str]) -> list[str]:
    found = {name: _flag_value(server_flags, name) for name in _ENGINE_FLAGS_OF_ANSWERS}
    return [f"--{name} {value}" for name, value in found.items() if value is not None]


def _flag_value(flags: list[str], name: str) -> str | None:
    """Value of the last such flag, "" where it has none; None where it is not given."""
    value = None
    for i, flag in enumerate(flags):
        if flag.startswith(f"--{name}="):
            value = flag.partition("=")[2]
        elif flag == f"--{name}":
            following = flags[i + 1] if i + 1 < len(flags) else "--"
            value = "" if following.startswith("--") else following
    return value


def _start_engine(args: argparse.Namespace, server_flags: list[str], journal: Journal) -> Runtime:
    """An engine that draws the seeds of the job's first one, so that a resumed job samples what it would have."""
    from batchllm.srt.engine import SrtRuntime  # SGLang takes seconds to import
    from batchllm.srt.server_args import parse_server_flags

    server_args = parse_server_flags(server_flags)
    server_args.pop("model_path", None)
    seed = journal.notes.get("random_seed")
    if seed is not None:
        server_args["random_seed"] = int(seed)
    runtime = SrtRuntime(_model_path(args, server_flags), **server_args)
    if seed is None:
        journal.note("random_seed", str(runtime.info.random_seed))
    return runtime


def _options(args: argparse.Namespace) -> RunOptions:
    if args.token_memory is None:
        max_token_bytes = int(psutil.virtual_memory().available * _DEFAULT_MEMORY_SHARE)
    else:
        max_token_bytes = int(args.token_memory * 2**30)
    for name, value in (("--retry", args.retry), ("--max-failures", args.max_failures), ("--grace", args.grace)):
        if value is not None and value < 0:
            raise ConfigError(f"{name} {value}: must be at least 0")
    if max_token_bytes <= 0:
        raise ConfigError(f"--token-memory {args.token_memory}: must be more than 0")
    return RunOptions(
        num_retries=args.retry,
        shares_answers=args.dedupe,
        max_token_bytes=max_token_bytes,
        group_order=args.group_order,
        keep_steps=args.trace is not None,
    )


def _tell(args: argparse.Namespace, runner: Runner, recorder: Recorder, num_before: int, elapsed_s: float) -> None:
    """Failed rows in words, the report, and the files about the run that were asked for."""
    if args.trace is not None and runner.info is not None:
        make_trace(f"run {args.input}", runner.steps, runner.info, runner.started_at).write(args.trace)
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
    if args.report is not None:
        report.write_json(args.report)
    print(report.render(), file=sys.stderr)
