"""One engine in a process of its own: a line of JSON in, a line of JSON out for each run.

    python -m eval.gpu_bench.engine_process ours  '{"model_path": ..., "max_total_tokens": ...}'
    python -m eval.gpu_bench.engine_process stock '{"model_path": ..., "attention_backend": "triton"}'

Ours is `BatchEngine`. Stock is ``sglang.Engine``, every prompt in one call; a subclass of its scheduler adds a method
by which the schedule policy and mixed chunks are changed between runs, and changes nothing else. Prompt tokens computed
are counted by each engine: ours in the scheduler, stock's as prompt tokens less ``cached_tokens``.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import sglang.srt.managers.scheduler as upstream

from eval import stock, workloads

Prompts = list[list[int]]
Command = dict[str, Any]
Answers = tuple[list[dict[str, Any]], dict[str, Any]]


def main() -> None:
    kind, server_args = sys.argv[1], json.loads(sys.argv[2])
    # What SGLang prints goes to the log; answers alone to whoever reads them.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    run, profile, stop = {"ours": _ours, "stock": _stock}[kind](server_args)
    try:
        run(*_warm_up(), {})
        print("{}", file=answers, flush=True)
        for line in sys.stdin:
            command = json.loads(line)
            prompts, output_lens = _read(command)
            if command.get("profile"):
                profile(**command["profile"])
            started = time.perf_counter()
            rows, result = run(prompts, output_lens, command)
            result["seconds"] = time.perf_counter() - started
            result["num_requests"] = len(prompts)
            result["num_prompt_tokens"] = sum(map(len, prompts))
            result["num_output_tokens"] = sum(len(row["ids"]) for row in rows)
            if command.get("answers"):
                Path(command["answers"]).write_text(json.dumps(rows))
            print(json.dumps(result), file=answers, flush=True)
    finally:
        stop()


def _warm_up() -> tuple[Prompts, list[int]]:
    workload = workloads.one_level(99, 4, 8, 64, 16)
    return workload.prompts, [8] * len(workload.prompts)


def _read(command: Command) -> tuple[Prompts, list[int]]:
    """Of ``spec``, a line of `batchllm.sim.parse_workload`, or ``expression`` over `eval.workloads`."""
    if "spec" in command:
        from batchllm.sim import parse_workload

        workload = parse_workload(command["spec"])
        offsets = workload.table.offsets.tolist()
        prompts = [workload.table.tokens[a:b].tolist() for a, b in itertools.pairwise(offsets)]
        output_lens = workload.output_len.tolist()
    else:
        named: workloads.Workload = eval(command["expression"], vars(workloads))
        prompts, output_lens = named.prompts, named.output_lens
    if command.get("is_sorted"):
        pairs = sorted(zip(prompts, output_lens, strict=True))
        prompts, output_lens = [p for p, _ in pairs], [n for _, n in pairs]
    return prompts, output_lens


def _sampling(output_lens: list[int], **further: Any) -> list[dict[str, Any]]:
    return [{"temperature": 0, "max_new_tokens": n, "ignore_eos": True} | further for n in output_lens]


def _ours(server_args: dict[str, Any]) -> tuple[Callable[..., Answers], Callable[..., None], Callable[[], None]]:
    from batchllm import BatchEngine

    engine = BatchEngine(server_args.pop("model_path"), **server_args)

    def run(prompts: Prompts, output_lens: list[int], command: Command) -> Answers:
        sampling = _sampling(output_lens, logprobs=bool(command.get("logprobs")))
        completions = engine.batch_generate(input_ids=prompts, sampling_params=sampling)
        report = engine.last_report
        assert report is not None and report.num_failed == 0, report
        rows = [
            {"ids": list(c.output_ids), "logprobs": [t.logprob for t in c.logprobs] if c.logprobs else None}
            for c in completions
        ]
        return rows, {
            "num_computed_prompt_tokens": report.num_computed_prompt_tokens,
            "num_optimal_prompt_tokens": report.num_optimal_prompt_tokens,
            "num_retractions": report.num_retractions,
            "peak_kv_tokens": report.peak_kv_tokens,
        }

    return run, functools.partial(engine.runtime.call, "engine", "start_profile"), engine.shutdown


class SwitchableScheduler(upstream.Scheduler):
    """Stock's, whose policy can be changed while it is idle."""

    def use(self, policy: str, is_mixed: bool) -> None:
        """Called by name, through SGLang's ``collective_rpc``."""
        self.schedule_policy, self.is_mixed_chunk = policy, is_mixed
        self.init_schedule_policy()


def run_stock_scheduler(*args: Any, **kwargs: Any) -> None:
    """Target of stock's scheduler process."""
    upstream.Scheduler = SwitchableScheduler
    stock.run_scheduler_process(*args, **kwargs)


def _stock(server_args: dict[str, Any]) -> tuple[Callable[..., Answers], Callable[..., None], Callable[[], None]]:
    class SwitchableEngine(stock.StockEngine):
        run_scheduler_process_func = staticmethod(run_stock_scheduler)

    engine, stop = stock.start(SwitchableEngine, **server_args)

    def run(prompts: Prompts, output_lens: list[int], command: Command) -> Answers:
        engine.flush_cache()
        engine.collective_rpc("use", policy=command.get("policy", "fcfs"), is_mixed=bool(command.get("is_mixed")))
        with_logprobs = {"return_logprob": True, "top_logprobs_num": 2} if command.get("logprobs") else {}
        outputs = engine.generate(input_ids=prompts, sampling_params=_sampling(output_lens), **with_logprobs)
        info = [output["meta_info"] for output in outputs]
        rows = []
        for output, meta in zip(outputs, info, strict=True):
            row: dict[str, Any] = {"ids": output["output_ids"], "logprobs": None}
            if with_logprobs:
                row["logprobs"] = [value for value, *_ in meta["output_token_logprobs"]]
                row["gaps"] = [best[0] - second[0] for best, second in meta["output_top_logprobs"]]
            rows.append(row)
        return rows, {
            "num_computed_prompt_tokens": sum(map(len, prompts)) - sum(meta["cached_tokens"] for meta in info),
            "num_retractions": sum(meta.get("num_retractions") or 0 for meta in info),
        }

    return run, engine.start_profile, stop


if __name__ == "__main__":
    main()
