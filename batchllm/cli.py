"""The ``batchllm`` command.

    batchllm run     answer every row of a file
    batchllm plan    say what would be shared and saved, without running
    batchllm report  say what a run looked like, from its trace
    batchllm simulate   run a workload on a simulated device
    batchllm calibrate  fit the simulator's cost model to the steps of a trace

Exit status: 0 every row was answered, 1 some rows failed, 2 the job could not run.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from batchllm.dataset import (
    BadRow,
    JsonlSink,
    Row,
    check_writable,
    read_rows,
    reject,
    render_error,
)
from batchllm.errors import BatchLLMError, ConfigError, RowError
from batchllm.offline.progress import Progress
from batchllm.offline.runner import Runner
from batchllm.planner.group_order import DEFAULT_GROUP_ORDER, GROUP_ORDERS
from batchllm.request import SamplingParams

EXIT_OK, EXIT_ROWS_FAILED, EXIT_CANNOT_RUN = 0, 1, 2


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status."""
    parser = _make_parser()
    args, server_flags = parser.parse_known_args(argv)
    signal.signal(signal.SIGTERM, _interrupt)
    command: Callable[[argparse.Namespace, list[str]], int] = args.command
    try:
        return command(args, server_flags)
    except BatchLLMError as error:
        print("\n".join([f"batchllm: {error}", *getattr(error, "__notes__", ())]), file=sys.stderr)
        return EXIT_CANNOT_RUN
    except BrokenPipeError:  # e.g. `batchllm plan ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_CANNOT_RUN
    except KeyboardInterrupt as interrupt:
        print("\n".join(["batchllm: interrupted", *getattr(interrupt, "__notes__", ())]), file=sys.stderr)
        return EXIT_CANNOT_RUN


def _interrupt(signum: int, frame: object) -> None:
    """SIGTERM ends the job as Ctrl-C does: what has been answered is kept, and the engine is ended."""
    raise KeyboardInterrupt


def _make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="batchllm",
        description="Very large batches of LLM prompts on SGLang, globally planned.",
        epilog="Exit status: 0 every row was answered, 1 some rows failed, 2 the job could not run.",
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    run = commands.add_parser(
        "run",
        help="answer every row of a file",
        epilog="Any flag of `python -m sglang.launch_server` may follow, e.g. --max-total-tokens 8192, and ours: "
        "--kv-limit TOKENS (KV tokens that may be in use at once; default: the whole pool), --output-lengths "
        "learned|bounded (what a row of unknown length is expected to generate; default: learned from the rows that "
        "have finished).",
        allow_abbrev=False,
    )
    _add_input_flags(run)
    run.add_argument("-o", "--output", required=True, metavar="OUT.jsonl", help="answers, in input order")
    run.add_argument("--errors", metavar="ERR.jsonl", help="failed rows go here instead of the output")
    run.add_argument("--report", metavar="R.json", help="write the report as JSON too")
    run.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="force the progress bar on or off (default: on a terminal only)",
    )
    run.add_argument("--trace", metavar="T.json", help="what each forward step was like (see `batchllm report`)")
    _add_group_order(run)
    run.set_defaults(command=_run)
    plan = commands.add_parser("plan", help="say what would be shared and saved, without running", allow_abbrev=False)
    _add_input_flags(plan)
    plan.add_argument("--page-size", type=int, default=1, help="tokens of a KV page (default: %(default)s)")
    plan.add_argument("--json", action="store_true", help="for machines")
    plan.set_defaults(command=_plan)
    report = commands.add_parser("report", help="say what a run looked like, from its trace", allow_abbrev=False)
    report.add_argument("trace", metavar="T.json", help="from `batchllm run --trace`")
    report.add_argument("--html", metavar="PAGE.html", help="draw the timelines in one self-contained page")
    report.add_argument("--json", action="store_true", help="for machines")
    report.set_defaults(command=_report)
    _add_simulate(commands)
    calibrate = commands.add_parser(
        "calibrate", help="fit the simulator's cost model to the steps of a trace", allow_abbrev=False
    )
    calibrate.add_argument("trace", metavar="T.json", help="from `batchllm run --trace`")
    _add_device_flags(calibrate)
    calibrate.add_argument("-o", "--output", required=True, metavar="COST.json", help="for `simulate --calibration`")
    calibrate.set_defaults(command=_calibrate)
    return parser


def _add_simulate(commands: Any) -> None:
    simulate = commands.add_parser("simulate", help="run a workload on a simulated device", allow_abbrev=False)
    source = simulate.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "-i", "--input", metavar="IN.jsonl", help="a file; outputs as long as expected_new_tokens says, else as allowed"
    )
    source.add_argument("--workload", metavar="KIND:KEY=N,...", help="e.g. shared:prefix=2000,private=200,sharing=16")
    simulate.add_argument("-m", "--model", help="tokenizes the file (default: embedded)")
    _add_device_flags(simulate)
    simulate.add_argument("--calibration", metavar="COST.json", help="cost model from `batchllm calibrate`")
    simulate.add_argument("--scheduler", action="append", metavar="NAME", help="default: batchllm; may be repeated")
    simulate.add_argument("--kv-capacity", type=int, metavar="TOKENS", help="KV pool (default: what fits the device)")
    simulate.add_argument("--kv-limit", type=int, metavar="TOKENS", help="KV tokens in use at once (default: all)")
    simulate.add_argument("--chunk", type=int, default=2048, metavar="TOKENS", help="of a step (default: %(default)s)")
    simulate.add_argument("--mixed", action=argparse.BooleanOptionalAction, default=True, help="mixed token batches")
    simulate.add_argument("--trace", metavar="T.json", help="steps of the last scheduler, a Chrome trace")
    simulate.add_argument("--json", action="store_true", help="for machines")
    _add_group_order(simulate)
    simulate.set_defaults(command=_simulate)


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        default="A100-80GB",
        metavar="NAME",
        help="A100-80GB, MI200, H100, H200, or NAME:flops=F,bandwidth=B,memory=M (default: %(default)s)",
    )
    parser.add_argument(
        "--shape",
        default="Llama-3.1-8B",
        metavar="MODEL",
        help="Llama-3.1-8B, Llama-3.1-70B, Qwen2.5-7B, Qwen2.5-14B, or a model's folder (default: %(default)s)",
    )


def _add_group_order(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group-order",
        choices=GROUP_ORDERS,
        default=DEFAULT_GROUP_ORDER,
        help="which of the groups that share a prefix runs first (default: %(default)s)",
    )


def _add_input_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-i",
        "--input",
        required=True,
        metavar="IN.jsonl",
        help="OpenAI batch rows, or rows with id and prompt, input_ids or messages",
    )
    parser.add_argument("-m", "--model", help="Hugging Face model, a directory or a hub name (default: embedded)")


def _run(args: argparse.Namespace, server_flags: list[str]) -> int:
    started = time.perf_counter()
    for flag, path in (("--report", args.report), ("--trace", args.trace)):
        if path is not None:
            check_writable(path, flag, input_path=args.input)
    rows = list(read_rows(args.input, defaults=SamplingParams()))
    good = [row for row in rows if isinstance(row, Row)]
    bad = [row for row in rows if isinstance(row, BadRow)]
    with JsonlSink(args.output, errors_path=args.errors, input_path=args.input) as sink:
        if not good:
            for row in bad:
                sink.write_error(row.index, render_error(row))
            _say(bad)
            print("batchllm: no row can run", file=sys.stderr)
            return EXIT_ROWS_FAILED
        runner = _answer(args, server_flags, good, bad, sink)
    report = runner.job.report(
        num_requests=len(rows),
        num_failed=len(runner.failed),
        elapsed_s=time.perf_counter() - started,
    )
    if args.report is not None:
        report.write_json(args.report)
    if args.trace is not None:
        runner.job.trace(f"run {args.input}").write(args.trace)
    _say(runner.failed)
    print(report.render(), file=sys.stderr)
    return EXIT_ROWS_FAILED if runner.failed else EXIT_OK


def _answer(
    args: argparse.Namespace,
    server_flags: list[str],
    good: list[Row],
    bad: list[BadRow],
    sink: JsonlSink,
) -> Runner:
    from batchllm.engine import BatchEngine
    from batchllm.srt.server_args import parse_server_flags  # SGLang takes seconds to import

    server_args = parse_server_flags(server_flags)
    model = args.model or server_args.pop("model_path", None)
    with (
        BatchEngine(model, **server_args) as engine,
        Progress(len(good) + len(bad), show=args.progress) as progress,
    ):
        runner = Runner(engine.runtime, sink, progress, group_order=args.group_order, keep_steps=args.trace is not None)
        for row in bad:
            runner.fail(row)
        runner.run(good)
    return runner


def _report(args: argparse.Namespace, server_flags: list[str]) -> int:
    _refuse(server_flags, "report")
    from batchllm.trace import StepTrace, write_html

    trace = StepTrace.read(args.trace)
    if args.html is not None:
        check_writable(args.html, "--html", input_path=args.trace)
        write_html(trace, args.html)
    print(json.dumps(trace.summary(), indent=2) if args.json else trace.render())
    return EXIT_OK


def _simulate(args: argparse.Namespace, server_flags: list[str]) -> int:
    _refuse(server_flags, "simulate")
    from batchllm.perf_model import CostModel, Fit, find_model, parse_device
    from batchllm.sim import parse_workload, simulate

    if args.trace is not None:
        check_writable(args.trace, "--trace", input_path=args.input or os.devnull)
    if args.calibration is not None:
        cost_model = Fit.load(args.calibration).cost_model
    else:
        cost_model = CostModel.with_defaults(parse_device(args.device), find_model(args.shape))
    workload = parse_workload(args.workload) if args.workload else _workload_of(args)
    results = [
        simulate(
            workload,
            scheduler=scheduler,
            cost_model=cost_model,
            kv_capacity_tokens=args.kv_capacity,
            kv_limit_tokens=args.kv_limit,
            chunk_tokens=args.chunk,
            group_order=args.group_order,
            is_mixed=args.mixed,
        )
        for scheduler in args.scheduler or ["batchllm"]
    ]
    if args.trace is not None:
        results[-1].trace.write(args.trace)
    if args.json:
        print(json.dumps([result.to_dict() for result in results], indent=2))
    else:
        print("\n\n".join(result.render() for result in results))
    return EXIT_OK


def _workload_of(args: argparse.Namespace) -> Any:
    """The rows of a file as a `SimWorkload`; bad rows are said and left out."""
    import numpy as np

    from batchllm.sim import SimWorkload

    good, bad, table, _ = _tokenize(args)
    _say(bad)
    if not good:
        raise ConfigError(f"{args.input}: no row can run")
    samples = [row.request for row in good for _ in range(row.request.sampling.n)]
    limits = np.array([request.sampling.max_new_tokens for request in samples], np.int64)
    hints = np.array([request.expected_new_tokens or 0 for request in samples], np.int64)
    known = np.minimum(np.where(hints > 0, hints, limits), limits)
    return SimWorkload.from_lengths(args.input, table, known, max_new_len=limits, known_len=known)


def _calibrate(args: argparse.Namespace, server_flags: list[str]) -> int:
    _refuse(server_flags, "calibrate")
    from batchllm.perf_model import StepWork, find_model, fit, parse_device
    from batchllm.trace import StepTrace

    steps = StepTrace.read(args.trace).steps
    samples = []
    for step in steps[len(steps) // 50 :]:  # the first ones of a process compile and warm up
        prefill, decode = int(step["num_prefill_tokens"]), int(step["num_decode_tokens"])
        work = StepWork(
            num_prefill_tokens=prefill,
            num_decode_tokens=decode,
            num_sampled=int(step["num_sampled"]),
            prefill_pairs=int(step["prefill_pairs"]),
            decode_kv_tokens=int(step["decode_kv_tokens"]),
            kv_read_tokens=int(step["kv_read_tokens"]),
        )
        samples.append((work, float(step["duration_s"])))
    fitted = fit(parse_device(args.device), find_model(args.shape), samples)
    fitted.save(args.output)
    print(json.dumps(fitted.to_dict(), indent=2))
    return EXIT_OK


def _refuse(server_flags: list[str], command: str) -> None:
    if server_flags:
        raise ConfigError(f"{server_flags[0]}: `batchllm {command}` has no such flag")


def _say(bad: list[BadRow], most: int = 5) -> None:
    """The first few failed rows, in words."""
    for row in sorted(bad, key=lambda row: row.index)[:most]:
        print(f"batchllm: line {row.line}: {row.message}", file=sys.stderr)
    if len(bad) > most:
        print(f"batchllm: {len(bad) - most} more rows failed; see their error records", file=sys.stderr)


def _plan(args: argparse.Namespace, server_flags: list[str]) -> int:
    _refuse(server_flags, "plan")
    if args.page_size < 1:
        raise ConfigError(f"--page-size {args.page_size}: must be at least 1")
    from batchllm.planner import explain, plan_batch

    _, bad, table, namespaces = _tokenize(args)
    plan = plan_batch(table, page_size=args.page_size, namespaces=namespaces)
    summary = explain(plan, table)
    print(json.dumps(summary.to_dict(), indent=2) if args.json else summary.render())
    _say(bad)
    return EXIT_ROWS_FAILED if bad else EXIT_OK


def _tokenize(args: argparse.Namespace) -> tuple[list[Row], list[BadRow], Any, Any]:
    """The good rows of a file, the bad ones, and of the good ones the table of all samples and their namespaces."""
    from batchllm.default_model import default_model_path
    from batchllm.offline.encode import encode_requests, namespace_numbers
    from batchllm.tokenizer import Tokenizer
    from batchllm.tokens import TokenTable

    rows = list(read_rows(args.input, defaults=SamplingParams()))
    good = [row for row in rows if isinstance(row, Row)]
    bad = [row for row in rows if isinstance(row, BadRow)]
    tokenizer = Tokenizer.from_model(args.model or default_model_path())
    kept, token_ids, namespaces = [], [], []
    for row, ids in zip(good, encode_requests([row.request for row in good], tokenizer), strict=True):
        if isinstance(ids, RowError):
            bad.append(reject(row, ids))
            continue
        kept.append(row)
        token_ids += [ids] * row.request.sampling.n
        namespaces += [row.request.namespace] * row.request.sampling.n
    return kept, bad, TokenTable.from_lists(token_ids), namespace_numbers(namespaces)
