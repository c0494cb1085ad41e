"""``batchllm simulate``, ``calibrate`` and ``report``: what a run looks like, or would."""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from batchllm.cli.inputs import Prompts
from batchllm.cli.outcome import EXIT_OK, refuse, say_failed
from batchllm.dataset import check_writable
from batchllm.errors import ConfigError


def simulate_workload(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Run a workload on a simulated device, print what it took; returns the exit status."""
    refuse(server_flags, "simulate")
    from batchllm.perf_model import CostModel, Fit, find_model, parse_device
    from batchllm.sim import parse_workload, simulate

    if args.trace is not None:
        check_writable(args.trace, "--trace", input_path=args.input or os.devnull)
    if args.calibration is not None:
        cost_model = Fit.load(args.calibration).cost_model
    else:
        cost_model = CostModel.with_defaults(parse_device(args.device), find_model(args.shape))
    workload = _workload_of(args) if args.workload is None else parse_workload(args.workload)
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


def calibrate(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Fit the cost model to a trace, write it; returns the exit status."""
    refuse(server_flags, "calibrate")
    from batchllm.perf_model import find_model, fit, parse_device, samples_of
    from batchllm.trace import StepTrace

    check_writable(args.output, "-o", input_path=args.trace)
    samples = samples_of(StepTrace.read(args.trace).steps)
    fitted = fit(parse_device(args.device), find_model(args.shape), samples)
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


def _workload_of(args: argparse.Namespace) -> Any:
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
    return SimWorkload.from_lengths(
        args.input, prompts.table, known, max_new_len=limits, known_len=known, share_lens=prompts.share_lens
    )
