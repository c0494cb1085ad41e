"""The parts: each takes what it finds, writes every single result down as it comes, and ends by its deadline."""

from __future__ import annotations

import json
import math
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from batchllm.errors import ConfigError
from batchllm.perf_model import CostModel, StepWork, fit, samples_of
from batchllm.planner import plan_batch
from batchllm.sim import parse_workload
from batchllm.sim.simulate import least_work
from batchllm.trace import StepTrace
from eval.gpu_bench import card, kernel_trace
from eval.gpu_bench.engines import Deadline, EngineFailedError, EngineProcess, Engines, OutOfTimeError
from eval.gpu_bench.predict import simulated
from eval.gpu_bench.setting import Setting, device_spec

Result = dict[str, Any]

_START_S = 60.0
"""What a start of an engine is expected to take, until one was seen."""

_RUN = ("policy", "is_sorted", "is_mixed")
"""What a run of stock is named by, besides its backend."""

_MAX_DRIFT = 2.0
"""Ours may differ from stock in a log probability by so many times what two backends of stock differ, on average."""
_NEAR_TIE = 1e-3
"""Log probabilities of the two best tokens this close: float32 sums in another order may choose the other one."""


class Bench:
    """One call of the command: a folder of results, and what is run for it.

    Args:
        setting: Sizes.
        out: The folder; what earlier calls found there is kept.
        num_rounds: Of ours and stock in turn.

    Raises:
        ConfigError: The folder holds results of another setting.
    """

    def __init__(self, setting: Setting, out: Path, num_rounds: int) -> None:
        self.setting, self.out, self.num_rounds = setting, out, num_rounds
        self._path = out / "results.jsonl"
        self._start_s = _START_S
        out.mkdir(parents=True, exist_ok=True)
        described = json.dumps(asdict(setting), indent=1) + "\n"
        path = out / "setting.json"
        if path.exists() and path.read_text() != described:
            raise ConfigError(f"{out} holds results of another setting (see setting.json there); give another --out")
        path.write_text(described)

    # Results

    def results(self, part: str | None = None) -> list[Result]:
        """All so far, or those of a part."""
        if not self._path.exists():
            return []
        found = [json.loads(line) for line in self._path.read_text().splitlines()]
        return [result for result in found if part in (None, result["part"])]

    def note(self, part: str, **result: Any) -> Result:
        result = {"part": part} | result
        with self._path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        print(json.dumps(result)[:400], flush=True)
        return result

    def card(self) -> dict[str, Any]:
        """What `card.describe` found, once for a folder."""
        path = self.out / "card.json"
        if not path.exists():
            path.write_text(json.dumps(card.describe(), indent=1) + "\n")
        described: dict[str, Any] = json.loads(path.read_text())
        return described

    def _engine(
        self, kind: str, args: dict[str, Any], deadline: Deadline, environment: dict[str, str] | None = None
    ) -> EngineProcess:
        deadline.check(self._start_s, f"starting {kind} {args.get('attention_backend', '')}")
        return EngineProcess(kind, args, self.out / "engines.log", deadline, environment)

    # Correctness

    def correctness(self, deadline: Deadline) -> None:
        """Answers in float32 token for token, on pages of 1 and 16; log probabilities in bfloat16 within the drift."""
        setting = self.setting
        model = setting.checked_model_path()
        common = setting.checked_args | {"model_path": model}
        self.card()
        exact = "torch_native"  # in SGLang the only backend that multiplies float32 as float32
        args = common | {"dtype": "float32", "attention_backend": exact}
        reference = self._answers("stock", args, deadline, logprobs=True)
        checks = {
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY": "1",
            "BATCHLLM_CHECK_LAYOUT": "1",
            "TRITON_F32_DEFAULT": "ieee",  # SGLang's kernels would round float32 to 10 bits
        }
        for name, page_size in [(name, p) for name in setting.ours for p in ((1,) if setting.is_dry else (1, 16))]:
            args = common | {"dtype": "float32", "page_size": page_size} | setting.ours[name]
            if not setting.is_dry and "attention_backend" not in args:
                args["attention_backend"] = "triton"  # FA3, the default, has no float32
            ours = self._answers("ours", args, deadline, environment=checks)
            self.note("correctness", engine=name, page_size=page_size, **_compare_tokens(ours, reference))
        if setting.is_dry:
            return  # no bfloat16 that is worth its time, and one backend of stock
        half = common | {"dtype": "bfloat16"}
        stock = self._answers("stock", half | {"attention_backend": "triton"}, deadline, logprobs=True)
        other = self._answers("stock", half | {"attention_backend": "flashinfer"}, deadline, logprobs=True)
        drift = _mean_logprob_difference(other, stock)
        for name, args in setting.ours.items():
            ours = self._answers("ours", half | args, deadline, logprobs=True)
            difference = _mean_logprob_difference(ours, stock)
            is_right = difference <= _MAX_DRIFT * drift
            self.note("correctness", engine=name, logprob_difference=difference, drift=drift, is_right=is_right)

    def _answers(
        self,
        kind: str,
        args: dict[str, Any],
        deadline: Deadline,
        *,
        logprobs: bool = False,
        environment: dict[str, str] | None = None,
    ) -> list[dict[str, Any]]:
        path = self.out / "answers.json"
        with self._engine(kind, args, deadline, environment) as engine:
            self._start_s = engine.start_s
            result = engine.run(expression=self.setting.checked, logprobs=logprobs, answers=str(path))
            if kind == "ours" and result["num_computed_prompt_tokens"] != result["num_optimal_prompt_tokens"]:
                self.note("correctness", engine=kind, is_right=False, not_at_the_optimum=result)
        answers: list[dict[str, Any]] = json.loads(path.read_text())
        path.unlink()
        return answers

    # Kernels

    def attention(self, deadline: Deadline) -> None:
        """`eval/bench_attention.py`: tile sizes, then every kernel on every step, then what is fastest where."""
        if self.setting.is_dry:
            self.note("attention", left_out="kernels are timed on a GPU only; tests run them in Triton's interpreter")
            return
        shape = self.setting.shape
        heads = f"{shape.num_heads}/{shape.num_kv_heads}/{shape.head_dim}"
        report, table = self.out / "attention.md", self.out / "dispatch_table.json"
        for flags in (["--tune", "--out", str(report)], ["--layers", str(shape.num_layers), "--table", str(table)]):
            script = Path(__file__).parents[1] / "bench_attention.py"
            try:
                done = subprocess.run(
                    [sys.executable, str(script), "--heads", heads, *flags],
                    capture_output=True,
                    text=True,
                    timeout=max(deadline.seconds_left, 1.0),
                )
            except subprocess.TimeoutExpired as error:
                raise OutOfTimeError(f"bench_attention.py {flags[0]} had not ended by the deadline") from error
            (self.out / f"attention{flags[-2]}.log").write_text(done.stdout + done.stderr)
            self.note("attention", flags=flags, is_right=done.returncode == 0, last_words=done.stderr[-1000:])

    # Stock's best policy

    def choose_stock(self, part: str, deadline: Deadline) -> None:
        """On a smaller workload of the kind and a pool as much smaller: every backend, then all else on the fastest.

        What an earlier call has tried is not tried again.
        """
        first, *others = self.setting.stock_runs
        with Engines(at_once=False) as engines:
            for backend in self.setting.stock_backends:
                self._try_out(part, backend, [first], engines, deadline)
            self._try_out(part, self.best_stock(part)["backend"], others, engines, deadline)

    def _try_out(
        self, part: str, backend: str, runs: Sequence[tuple[str, bool, bool]], engines: Engines, deadline: Deadline
    ) -> None:
        name = f"{part}-policies"
        args = self._speed_args() | {"attention_backend": backend, "max_total_tokens": self.setting.policy_pool}
        for each in runs:
            run = dict(zip(_RUN, each, strict=True))
            if any({"backend": backend, **run}.items() <= result.items() for result in self.results(name)):
                continue
            try:
                engine = engines.get(backend, lambda: self._engine("stock", args, deadline))
                self._start_s = engine.start_s
                found = engine.run(spec=self.setting.policy_specs[part], **run)
            except EngineFailedError as error:  # a backend may not be there, or not do this
                engines.end_all()
                found = {"failed": str(error)}
            self.note(name, backend=backend, **run, **found)

    def best_stock(self, part: str) -> Result:
        """Backend, policy, order and mixing that were fastest; the first of each if none was tried."""
        tried = [r for r in self.results(f"{part}-policies") if "seconds" in r]
        if not tried:
            return {
                "backend": self.setting.stock_backends[0],
                **dict(zip(_RUN, self.setting.stock_runs[0], strict=True)),
            }
        best = min(tried, key=lambda r: float(r["seconds"]))
        return {key: best[key] for key in ("backend", *_RUN)}

    # Measurements

    def measure(self, part: str, deadline: Deadline) -> None:
        """Stock's best and ours in turn, then ours with SGLang's attention; nothing that an earlier call ran."""
        best = self.best_stock(part)
        stock_args = self._speed_args() | {"attention_backend": best["backend"]}
        stock_args |= {"enable_mixed_chunk": True} if best["is_mixed"] else {}
        run = {key: best[key] for key in _RUN}
        sides: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {"stock": ("stock", stock_args, run)}
        for name, args in self.setting.ours.items():
            trace = {"trace_path": str(self.out / f"{part}.trace.json")} if name == "ours" else {}
            sides[name] = ("ours", self._speed_args() | args | trace, {})
        if not any("limit_s" in r and r["best_stock"] == best for r in self.results(part)):
            self.note(part, best_stock=best, **self._limit(part))
        done = [(r["engine"], r["round"]) for r in self.results(part) if "engine" in r and r["best_stock"] == best]
        names = list(sides)
        for name, round_number, result in self._in_turn(sides, _turns(names, self.num_rounds, done), part, deadline):
            self.note(part, engine=name, round=round_number, best_stock=best, **result)

    def _in_turn(
        self,
        sides: dict[str, tuple[str, dict[str, Any], dict[str, Any]]],
        turns: list[tuple[str, int]],
        part: str,
        deadline: Deadline,
    ) -> Iterator[tuple[str, int, Result]]:
        """Name, round and result of each run. Where not all engines fit at once, one is there at a time."""
        seconds = dict.fromkeys(sides, 0.0)
        with Engines(at_once=self._fit_at_once(len(sides))) as engines:
            for name, round_number in turns:
                kind, args, run = sides[name]
                needed_s = seconds[name] + (0.0 if name in engines else self._start_s)
                deadline.check(needed_s, f"{part} by {name}, round {round_number}")
                engine = engines.get(name, lambda kind=kind, args=args: self._engine(kind, args, deadline))
                self._start_s = engine.start_s
                result = engine.run(spec=self.setting.workloads[part], **run)
                seconds[name] = 1.1 * result["seconds"]
                yield name, round_number, result

    def _fit_at_once(self, num_engines: int) -> bool:
        shape, pool = self.setting.shape, self.setting.server_args["max_total_tokens"]
        # Besides weights and KV: graphs, workspaces, activations of a step.
        each = shape.weight_bytes + pool * shape.kv_bytes_per_token + (8 << 30)
        return bool(self.setting.is_dry or num_engines * each < 0.95 * self.card()["memory_bytes"])

    def _limit(self, part: str) -> Result:
        """Seconds that nothing beats at the rates measured on this card, and what the simulator had predicted."""
        workload = parse_workload(self.setting.workloads[part])
        measured = CostModel.with_defaults(device_spec(self.card(), is_measured=True), self.setting.shape)
        plan = plan_batch(workload.table)
        limit_s = measured.lower_bound_s(least_work(workload, plan), num_steps=int(workload.output_len.max()))
        by_data_sheet = CostModel.with_defaults(device_spec(self.card(), is_measured=False), self.setting.shape)
        names = {"stock": "stock, sorted" if self.best_stock(part)["is_sorted"] else "stock"}
        names |= {name: name for name in self.setting.ours}
        predicted_s = {
            name: simulated(self.setting, by_data_sheet, part, as_simulated).elapsed_s
            for name, as_simulated in names.items()
        }
        return {"limit_s": limit_s, "predicted_s": predicted_s}

    def _speed_args(self) -> dict[str, Any]:
        return self.setting.server_args | {"model_path": self.setting.model_path(self.out)}

    # Where the time goes

    def profile(self, deadline: Deadline) -> None:
        """Some steps in the middle of the first workload, under torch's profiler."""
        part = next(iter(self.setting.workloads))
        first, num_steps = self.setting.profiled_steps
        for name, args in self.setting.ours.items():
            folder = self.out / f"profile {name}"
            with self._engine("ours", self._speed_args() | args, deadline) as engine:
                self._start_s = engine.start_s
                profile = {
                    "output_dir": str(folder),
                    "start_step": first,
                    "num_steps": num_steps,
                    "activities": ["GPU"] if not self.setting.is_dry else ["CPU"],
                    "with_stack": False,
                    "record_shapes": False,
                }
                engine.run(spec=self.setting.workloads[part], profile=profile)
            found = kernel_trace.read(folder)
            self.note("profile", engine=name, idle_share=found.idle_share, **asdict(found))

    # Calibration

    def calibration(self, deadline: Deadline) -> None:
        """Fit the cost model to every other step of the measured runs; its error is that of the steps between."""
        samples: list[tuple[StepWork, float]] = []
        for part in self.setting.workloads:
            path = self.out / f"{part}.trace.json"
            if path.exists():
                samples += samples_of(StepTrace.read(path).steps)
        if not samples:
            raise ConfigError(f"{self.out} has no trace to calibrate by; run the parts that measure first")
        device = device_spec(self.card(), is_measured=False)
        fitted = fit(device, self.setting.shape, samples[::2])
        fitted.save(self.out / "calibration.json")
        errors = sorted(abs(fitted.cost_model.step_s(work) / seconds - 1) for work, seconds in samples[1::2])
        self.note(
            "calibration",
            num_steps=len(samples),
            assumed=fitted.assumed,
            median_error=statistics.median(errors),
            p90_error=errors[math.ceil(0.9 * len(errors)) - 1],
            total_error=sum(fitted.cost_model.step_s(w) for w, _ in samples[1::2]) / sum(s for _, s in samples[1::2])
            - 1,
        )


def _turns(names: list[str], num_rounds: int, done: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """The first two in turn, A B B A, then what is beside the comparison; a name and a round each."""
    rounds = range(num_rounds)
    turns = [(name, i) for i in rounds for name in (names[:2] if i % 2 == 0 else names[1::-1])]
    turns += [(name, i) for name in names[2:] for i in rounds]
    return [turn for turn in turns if turn not in done]


def _compare_tokens(ours: list[dict[str, Any]], reference: list[dict[str, Any]]) -> Result:
    """Requests whose answers differ, and of them those that no near tie explains."""
    different = unexplained = 0
    for a, b in zip(ours, reference, strict=True):
        if a["ids"] != b["ids"]:
            different += 1
            at = next(i for i, (x, y) in enumerate(zip(a["ids"], b["ids"], strict=True)) if x != y)
            unexplained += b["gaps"][at] > _NEAR_TIE
    return {
        "num_requests": len(ours),
        "num_different": different,
        "num_unexplained": unexplained,
        "is_right": unexplained == 0,
    }


def _mean_logprob_difference(a: list[dict[str, Any]], b: list[dict[str, Any]]) -> float:
    """Over the tokens up to which two answers are the same."""
    differences = []
    for x, y in zip(a, b, strict=True):
        for i, j, p, q in zip(x["ids"], y["ids"], x["logprobs"], y["logprobs"], strict=True):
            if i != j:
                break
            differences.append(abs(p - q))
    return statistics.mean(differences)


def run(bench: Bench, part: str, seconds: float) -> None:
    """One part, within so many seconds; what does not fit into them is said and left out."""
    deadline = Deadline(seconds)
    parts: dict[str, Callable[[Deadline], None]] = {
        "correctness": bench.correctness,
        "attention": bench.attention,
        "profile": bench.profile,
        "calibration": bench.calibration,
    }
    try:
        if part in parts:
            parts[part](deadline)
        elif part.endswith("-policies"):
            bench.choose_stock(part.removesuffix("-policies"), deadline)
        else:
            bench.measure(part, deadline)
    except OutOfTimeError as error:
        bench.note(part, out_of_time=str(error))
