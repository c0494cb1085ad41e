"""The commands and their flags."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from batchllm.cli.inputs import add_input_flags
from batchllm.cli.outcome import EXIT_STATUSES
from batchllm.cli.plan import plan
from batchllm.cli.replica_flags import add_replica_flags
from batchllm.cli.run import retry, run
from batchllm.cli.serve import serve
from batchllm.cli.simulate import calibrate, report, simulate_workload
from batchllm.cli.status import status
from batchllm.planner.group_order import DEFAULT_GROUP_ORDER, GROUP_ORDERS

_ENGINE_FLAGS = (
    "Any flag of `python -m sglang.launch_server` may follow, e.g. --max-total-tokens 8192, and ours: "
    "--kv-limit TOKENS (KV tokens that may be in use at once; default: the whole pool), --output-lengths "
    "learned|bounded (what a row of unknown length is expected to generate; default: learned from the rows that "
    "have finished)."
)


def make_parser() -> argparse.ArgumentParser:
    """The parser of the command; each command's function is ``args.command``."""
    parser = argparse.ArgumentParser(
        prog="batchllm",
        description="Very large batches of LLM prompts on SGLang, globally planned.",
        epilog=EXIT_STATUSES,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_run(commands)
    _add_retry(commands)
    commands.add_parser(
        "serve", help="SGLang's server, with plans and the batch API (`serve --help` has its flags)", add_help=False
    ).set_defaults(command=serve)
    show = commands.add_parser("status", help="say how far a job is, how fast, and what failed", allow_abbrev=False)
    show.add_argument("job_dir", metavar="JOBDIR", help="folder of the job")
    show.add_argument("--json", action="store_true", help="for machines")
    show.set_defaults(command=status)
    preview = commands.add_parser(
        "plan", help="say what would be shared and saved, without running", allow_abbrev=False
    )
    add_input_flags(preview)
    preview.add_argument("--page-size", type=int, default=1, help="tokens of a KV page (default: %(default)s)")
    preview.add_argument("--json", action="store_true", help="for machines")
    preview.set_defaults(command=plan)
    trace = commands.add_parser("report", help="say what a run looked like, from its trace", allow_abbrev=False)
    trace.add_argument("trace", metavar="T.json", help="from `batchllm run --trace`")
    trace.add_argument("--html", metavar="PAGE.html", help="draw the timelines in one self-contained page")
    trace.add_argument("--json", action="store_true", help="for machines")
    trace.set_defaults(command=report)
    _add_simulate(commands)
    fit = commands.add_parser(
        "calibrate", help="fit the simulator's cost model to the steps of a trace", allow_abbrev=False
    )
    fit.add_argument("trace", metavar="T.json", help="from `batchllm run --trace`")
    _add_device_flags(fit)
    fit.add_argument("-o", "--output", required=True, metavar="COST.json", help="for `simulate --calibration`")
    fit.set_defaults(command=calibrate)
    return parser


def _add_run(commands: Any) -> None:
    parser = commands.add_parser(
        "run",
        help="answer every row of an input; an interrupted job goes on where it ended",
        epilog=f"{_ENGINE_FLAGS} {EXIT_STATUSES}",
        allow_abbrev=False,
    )
    add_input_flags(parser)
    parser.add_argument("--carry", metavar="COLUMN,...", help="columns that go along into the output")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="answers: JSON lines (.gz, .zst), .parquet, a URL, or - for standard output",
    )
    parser.add_argument("--errors", metavar="ERR", help="failed rows go here instead of the output")
    parser.add_argument(
        "--order",
        choices=("input", "finished"),
        default="input",
        help="of the output: as in the input, written at the end (default), or as rows finish",
    )
    parser.add_argument(
        "--job-dir",
        metavar="JOBDIR",
        help="what the job needs to go on after a stop (default: OUT.job; for URLs and - a temporary folder)",
    )
    parser.add_argument("--restart", action="store_true", help="forget what an earlier run of the job has done")
    parser.add_argument(
        "--schema",
        choices=("refuse", "check"),
        help="a JSON schema that the grammar does not keep fails its row (default), or answers are checked against "
        "their schema afterwards, and one that breaks it has a schema_error",
    )
    parser.add_argument("--dedupe", action="store_true", help="run rows that must have the same answer once")
    parser.add_argument(
        "--token-memory",
        type=float,
        metavar="GIB",
        help="most memory for token ids; a larger job is planned in shards (default: half of what is free)",
    )
    parser.add_argument("--report", metavar="R.json", help="write the report as JSON too")
    parser.add_argument("--trace", metavar="T.json", help="what each forward step was like (see `batchllm report`)")
    _add_group_order(parser)
    _add_run_flags(parser, default=lambda value: value)
    parser.set_defaults(command=run)


def _add_retry(commands: Any) -> None:
    parser = commands.add_parser(
        "retry",
        help="run again what failed in a job",
        epilog=f"Everything else is as in the run. {_ENGINE_FLAGS} {EXIT_STATUSES}",
        allow_abbrev=False,
    )
    parser.add_argument("job_dir", metavar="JOBDIR", help="folder of the job")
    _add_run_flags(parser, default=lambda value: None)
    parser.set_defaults(command=retry)


def _add_run_flags(parser: argparse.ArgumentParser, default: Callable[[Any], Any]) -> None:
    """How a job is run, which may differ from one run of it to the next."""
    parser.add_argument(
        "--retry",
        type=int,
        default=default(0),
        metavar="N",
        help="run a row that fails again, so many times, unless the row itself is at fault",
    )
    parser.add_argument("--max-failures", type=int, metavar="N", help="stop when more rows than this have failed")
    parser.add_argument(
        "--grace",
        type=float,
        default=default(30.0),
        metavar="SECONDS",
        help="what runs may take so long to finish after Ctrl-C or SIGTERM (default: 30); a second one stops at once",
    )
    parser.add_argument(
        "--progress",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="force the progress bar on or off (default: on a terminal only)",
    )
    parser.add_argument("-v", "--verbose", action="store_true", help="show what the engine's processes say")
    parser.add_argument("--progress-file", metavar="P.jsonl", help="progress for machines, a line a second at most")
    add_replica_flags(parser, default(1))
    parser.add_argument("--metrics-port", type=int, metavar="PORT", help="serve Prometheus metrics while it runs")


def _add_simulate(commands: Any) -> None:
    simulate = commands.add_parser("simulate", help="run a workload on a simulated device", allow_abbrev=False)
    source = simulate.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "-i", "--input", metavar="IN.jsonl", help="a file; outputs as long as expected_new_tokens says, else as allowed"
    )
    source.add_argument("--workload", metavar="KIND:KEY=N,...", help="e.g. shared:prefix=2000,private=200,sharing=16")
    add_input_flags(simulate, is_required=False)
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
    simulate.set_defaults(command=simulate_workload)


def _add_device_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device",
        metavar="NAME",
        help="A100-80GB (default), MI200, H100, H200, or NAME:flops=F,bandwidth=B,memory=M",
    )
    parser.add_argument(
        "--shape",
        metavar="MODEL",
        help="Llama-3.1-8B (default), Llama-3.1-70B, Qwen2.5-7B, Qwen2.5-14B, or a model's folder",
    )


def _add_group_order(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--group-order",
        choices=GROUP_ORDERS,
        default=DEFAULT_GROUP_ORDER,
        help="which of the groups that share a prefix runs first (default: %(default)s)",
    )
