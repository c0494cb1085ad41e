"""Scheduler time of a step, outside the forward pass, with 100,000 requests waiting and with 1,000, in one run.

Equal requests of 16 prompt and 4 new tokens on a one-layer model, a pool that holds 64 of them: every step is of the
same size, only what waits gets less. Ours is run twice: as it is (the backlog stays in the driver, the scheduler's
window is bounded), and with a window that takes everything, to show that the scheduler does not mind either. Stock
takes long for all of them: with 100,000 waiting it is stopped after some minutes, and run again on few.

    python eval/bench_step_cost.py --out eval/results/step_cost.md
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import compare
import numpy as np
import process_group
import step_timer
import workloads

_MAX_S = 150
_POOL, _PROMPT_LEN, _OUTPUT_LEN = 64 * 20, 16, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=104_000)
    parser.add_argument("--many", type=int, default=100_000)
    parser.add_argument("--few", type=int, default=1_000)
    parser.add_argument("--engines", default="ours,ours-wide,stock")
    parser.add_argument("--out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        _child(args.child, args.num_requests)
        return
    rows, results = [], []
    for engine in args.engines.split(","):
        steps = _measure(engine, args.num_requests)
        if engine == "stock":
            steps = np.concatenate([steps, _measure(engine, 2 * args.few)])
        cells = []
        for waiting in (args.many, args.few):
            near = np.abs(steps[:, 1] - waiting) <= 0.04 * waiting + 50
            for is_prefill in (True, False):
                chosen = steps[near & (steps[:, 3] == is_prefill), 0]
                cells.append(float(np.median(chosen)) * 1e6)
                results.append(
                    {
                        "engine": engine,
                        "waiting": waiting,
                        "is_prefill": is_prefill,
                        "num_steps": len(chosen),
                        "median_host_us": cells[-1],
                        "p90_host_us": float(np.quantile(chosen, 0.9)) * 1e6,
                    }
                )
        many_prefill, many_decode, few_prefill, few_decode = cells
        rows.append(
            [
                engine,
                *(f"{us:,.0f}" for us in (many_prefill, few_prefill)),
                f"{many_prefill / few_prefill:.2f}",
                *(f"{us:,.0f}" for us in (many_decode, few_decode)),
                f"{many_decode / few_decode:.2f}",
            ]
        )
    header = ["engine", f"prefill step, {args.many:,} waiting, us", f"{args.few:,}", "ratio"]
    header += [f"decode step, {args.many:,} waiting, us", f"{args.few:,}", "ratio"]
    compare.write(args.out, "Scheduler time per step", compare.table(header, rows), results)


def _measure(engine: str, num_requests: int) -> Any:
    """Steps of one run: host seconds, requests waiting, rows, is prefill."""
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, "steps.npy"))
        environment = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}
        # SGLang leaves sockets and folders of its own among temporary files.
        environment |= {step_timer.ENVIRONMENT: path, "PYTHONPATH": str(Path(__file__).parent), "TMPDIR": folder}
        command = [sys.executable, "-W", "ignore", __file__, "--child", engine, "--num-requests", str(num_requests)]
        child = subprocess.Popen(command, env=environment, start_new_session=True)
        try:
            child.wait(timeout=_MAX_S)
        except subprocess.TimeoutExpired:
            print(f"{engine}: stopped after {_MAX_S} s", file=sys.stderr)
        finally:
            process_group.end(child)  # its engine's processes too
        return np.load(path)


def _child(engine: str, num_requests: int) -> None:
    from batchllm.default_model import WIDTH_64, cached_model_path

    model = cached_model_path(WIDTH_64)
    workload = workloads.unshared(1, num_requests, _PROMPT_LEN, _OUTPUT_LEN)
    sampling = {"temperature": 0, "max_new_tokens": _OUTPUT_LEN, "ignore_eos": True}
    server_args = {
        "max_total_tokens": _POOL,
        "chunked_prefill_size": 2048,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "log_level": "error",
    }
    out = os.environ[step_timer.ENVIRONMENT]
    if engine == "stock":
        import stock

        class TimedEngine(stock.StockEngine):
            run_scheduler_process_func = staticmethod(step_timer.run_scheduler_process)

        timed, stop = stock.start(TimedEngine, model_path=model, device="cpu", **server_args)
        timed.generate(input_ids=workload.prompts, sampling_params=sampling)
        for _ in range(2):  # answered one after the other; idle in between, the scheduler has written its steps
            timed.flush_cache()
        stop()
        return
    from batchllm import BatchEngine
    from batchllm.offline import jobs
    from batchllm.scheduler import feed_window
    from batchllm.trace import StepTrace

    if engine == "ours-wide":
        jobs.MAX_IN_FLIGHT = 10**9
        feed_window.WINDOW_POOLS = 10**6
    with BatchEngine(model, trace_path=out + ".json", **server_args) as ours:
        if engine == "ours-wide":
            ours.job_options["max_run_requests"] = 10**9
        ours.batch_generate(input_ids=workload.prompts, sampling_params=sampling)
    steps = StepTrace.read(out + ".json").steps
    started = (steps["num_sampled"] - steps["num_decode_tokens"]).cumsum()
    columns = [
        steps["host_s"],
        num_requests - started,
        steps["num_running"],
        steps["num_prefill_tokens"] > 0,
    ]
    np.save(out, np.stack(columns, axis=1))


if __name__ == "__main__":
    main()
