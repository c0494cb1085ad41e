"""``batchllm simulate``, ``calibrate`` and ``report``: what a run looks like, or would."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from batchllm.cli.inputs import InputFlags, Prompts
from batchllm.cli.outcome import EXIT_OK, EXIT_ROWS_FAILED, refuse, say_failed
from batchllm.dataset import BadRow, check_writable
from batchllm.errors import ConfigError
from batchllm.tokens import Int64Array, TokenTable

DEFAULT_DEVICE, DEFAULT_SHAPE = "A100-80GB", "Llama-3.1-8B"


def simulate_workload(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Run a workload on a simulated device, print what it took; returns the exit status."""
    refuse(server_flags, "simulate")
    from batchllm.perf_model import CostModel, Fit
    from batchllm.sim import parse_workload, simulate

    if args.trace is not None:
        check_writable(args.trace, "--trace", input_path=args.input or os.devnull)
    if args.calibration is not None:
        _refuse_beside("--calibration", {"--device": args.device, "--shape": args.shape})
        cost_model = Fit.load(args.calibration).cost_model
    else:
        cost_model = CostModel.with_defaults(*_device_and_shape(args))
    bad: list[BadRow] = []
    if args.workload is None:
        workload, bad = _workload_of(args)
    else:
        given = asdict(InputFlags.of(args))
        _refuse_beside("--workload", {f"--{name.replace('_', '-')}": value for name, value in given.items()})
        workload = parse_workload(args.workload)
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
    return EXIT_ROWS_FAILED if bad else EXIT_OK


def calibrate(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Fit the cost model to a trace, write it; returns the exit status."""
    refuse(server_flags, "calibrate")
    from batchllm.perf_model import fit, samples_of
    from batchllm.trace import StepTrace

    check_writable(args.output, "-o", input_path=args.trace)
    samples = samples_of(StepTrace.read(args.trace).steps)
    fitted = fit(*_device_and_shape(args), samples)
    fitted.save(args.output)
    print(json.dumps(fitted.to_dict(), indent=2))
    return EXIT_OK


def report(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Print what a run looked like; returns the exit status."""
    refuse(server_flags, "report")
    from batchllm.trace import StepTrace, write_html

    trace = StepTrace.read(args.trace)
    if args.html is not None:
        check_writable(args.html, "--html", input_path=args.trace)
        write_html(trace, args.html)
    print(json.dumps(trace.summary(), indent=2) if args.json else trace.render())
    return EXIT_OK


def _device_and_shape(args: argparse.Namespace) -> tuple[Any, Any]:
    from batchllm.perf_model import find_model, parse_device

    device = DEFAULT_DEVICE if args.device is None else args.device
    return parse_device(device), find_model(DEFAULT_SHAPE if args.shape is None else args.shape)


def _refuse_beside(flag: str, others: Mapping[str, object]) -> None:
    """Another flag says what ``flag`` says already, or is of something that it does not have."""
    for other, value in others.items():
        if value not in (None, False):
            raise ConfigError(f"{other}: says nothing beside {flag}; leave one of them out")


def _apart(table: TokenTable, namespaces: Int64Array) -> TokenTable:
    """The same prompts, but that those of different namespaces share nothing: their first tokens differ."""
    import numpy as np

    tokens, firsts = table.tokens.copy(), table.offsets[:-1]
    _, tokens[firsts] = np.unique((namespaces << 32) | tokens[firsts], return_inverse=True)
    return TokenTable(tokens=tokens, offsets=table.offsets)


def _workload_of(args: argparse.Namespace) -> tuple[Any, list[BadRow]]:
    """The rows of a file as a `SimWorkload`; bad rows are said and left out."""
    import numpy as np

    from batchllm.sim import SimWorkload

    prompts = Prompts(args)
    say_failed(prompts.bad, len(prompts.bad))
    if not len(prompts.table):
        raise ConfigError(f"-i {args.input}: no row can run")
    limits = prompts.rows.max_new_len[prompts.samples.all_rows()].astype(np.int64)
    hints = prompts.rows.known_len[prompts.samples.all_rows()].astype(np.int64)
    known = np.minimum(np.where(hints > 0, hints, limits), limits)
    namespaces = prompts.rows.namespaces(prompts.samples)
    table = prompts.table if namespaces is None else _apart(prompts.table, namespaces)
    workload = SimWorkload.from_lengths(
        args.input, table, known, max_new_len=limits, known_len=known, share_lens=prompts.share_lens
    )
    return workload, prompts.bad
