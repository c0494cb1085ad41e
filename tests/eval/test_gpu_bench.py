"""The GPU bench, as far as it goes without a GPU: what it reads from a trace, says in its report, and runs dry."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoConfig

from batchllm.errors import ConfigError
from batchllm.perf_model import ModelShape
from eval.gpu_bench import kernel_trace, report, setting
from eval.gpu_bench.engines import Deadline, EngineFailedError, EngineProcess, OutOfTimeError
from eval.gpu_bench.parts import Bench, _turns
from tests.shared_memory import left_behind, ownerless

_ROOT = Path(__file__).parents[2]


# A profile


def _kernel(start_us: float, duration_us: float, name: str, cat: str = "kernel") -> dict[str, Any]:
    return {"ph": "X", "cat": cat, "ts": start_us, "dur": duration_us, "name": name}


def test_a_profile_says_how_long_no_kernel_ran() -> None:
    """Kernels beside each other are busy once; what ran on the host does not count."""
    found = kernel_trace.device_time(
        [
            _kernel(100, 50, "nvjet_tst_128x64"),
            _kernel(120, 60, "attend_tiles"),
            _kernel(200, 20, "Memcpy HtoD", "gpu_memcpy"),
            _kernel(0, 1000, "aten::mm", "cpu_op"),
            {"ph": "M", "name": "process_name"},
        ]
    )
    assert found.span_s == pytest.approx(120e-6) and found.busy_s == pytest.approx(100e-6)
    assert found.idle_share == pytest.approx(1 / 6)
    assert found.by_kind == pytest.approx({"linear": 50e-6, "attention": 60e-6, "memory": 20e-6})
    assert kernel_trace.device_time([]).idle_share == 0.0


@pytest.mark.parametrize(
    ("kernel", "kind"),
    [
        ("attend_tiles", "attention"),
        ("merge_slots", "attention"),
        ("_fwd_grouped_kernel_stage1", "attention"),
        ("void cutlass::device_kernel<flash::enable_sm90<flash::FlashAttnFwdSm90<...>>>", "attention"),
        ("void flashinfer::BatchPrefillWithPagedKVCacheKernel<...>", "attention"),
        ("nvjet_tst_192x192_64x4_2x1_v_bz_coopB_TNT", "linear"),
        ("sm90_xmma_gemm_bf16bf16_bf16f32_f32_tn_n", "linear"),
        ("void at::native::vectorized_elementwise_kernel<4, ...>", "other"),
        ("act_and_mul_kernel", "other"),
    ],
)
def test_kernels_are_known_by_their_names(kernel: str, kind: str) -> None:
    assert kernel_trace.kind_of(kernel) == kind


def test_a_profile_is_read_from_what_torch_writes(tmp_path: Path) -> None:
    trace = json.dumps({"traceEvents": [_kernel(10, 5, "attend_tiles")]}).encode()
    (tmp_path / "1-TP-0.trace.json.gz").write_bytes(gzip.compress(trace))
    assert kernel_trace.read(tmp_path).busy_s == pytest.approx(5e-6)
    with pytest.raises(FileNotFoundError, match="no trace"):
        kernel_trace.read(tmp_path / "elsewhere")


# Models and reports


@pytest.mark.parametrize("model", ["8b", "1b"])
def test_a_model_s_folder_is_the_shape_that_is_reckoned_with(model: str, tmp_path: Path) -> None:
    chosen = setting.gpu(model, 1000)
    path = chosen.model_path(tmp_path)
    assert AutoConfig.from_pretrained(path).model_type == "llama"
    config = json.loads(Path(path, "config.json").read_text())
    assert ModelShape.from_hf_config(config, chosen.shape.name) == chosen.shape


_CARD = {"name": "a card", "matmul_flops": 8e14, "copy_bytes_per_s": 3e12, "memory_bytes": 80 << 30}


def test_a_report_shows_ratios_and_what_was_not_run() -> None:
    """Medians over rounds; a limit only where it is known."""
    chosen = setting.gpu("8b", 350_000)
    best = {"backend": "fa3", "policy": "lpm", "is_sorted": True, "is_mixed": False}
    counts = {"num_computed_prompt_tokens": 25, "num_prompt_tokens": 100, "best_stock": best}
    results: list[dict[str, Any]] = [
        {"part": "short", "engine": "stock", "round": 0, "seconds": 30.0, **counts},
        {"part": "short", "engine": "stock", "round": 1, "seconds": 34.0, **counts},
        {"part": "short", "engine": "ours", "round": 0, "seconds": 16.0, **counts},
        {"part": "short", "limit_s": 8.0, "predicted_s": {"stock": 33.0, "ours": 15.0}},
        {"part": "long", "out_of_time": "needs about 90 s, 10 s are left"},
        {
            "part": "profile",
            "engine": "ours",
            "span_s": 2.0,
            "idle_share": 0.03,
            "by_kind": {"linear": 1.5, "other": 0.5},
        },
        {"part": "profile", "engine": "theirs", "span_s": 0.0, "idle_share": 0.0, "by_kind": {}},
        {"part": "correctness", "engine": "ours", "page_size": 16, "num_requests": 9, "num_different": 1}
        | {"num_unexplained": 1, "is_right": False},
    ]
    text = report.render(chosen, _CARD, results)
    assert "| stock fa3 lpm, sorted | 30.0 34.0 | 1.00 |  | 0.750 | 0.25 | 33.0 |" in text
    assert "| ours | 16.0 | 2.00 | 1.50 | 0.750 | 0.50 | 15.0 |" in text
    assert "* long: needs about 90 s" in text
    assert "| ours | 2.00 | 3.0% | linear 75%, other 25% |" in text
    assert "| theirs | no kernel was seen |" in text
    assert "1 of 9 differ, 1 without a near tie | WRONG |" in text
    assert report.is_wrong(results) and not report.is_wrong(results[:-1])


class ScriptedEngine(EngineProcess):
    """Says at once how long each run has taken: by ``seconds_of`` the backend and the run."""

    def __init__(self, backend: str, seconds_of: Callable[[str, dict[str, Any]], float], runs: list[Any]) -> None:
        super().__init__("stock", {}, Path(os.devnull), Deadline(1))
        self.backend, self.seconds_of, self.runs = backend, seconds_of, runs

    def __enter__(self) -> ScriptedEngine:
        self.runs.append((self.backend, "started"))
        return self

    def __exit__(self, *_: object) -> None:
        self.runs.append((self.backend, "ended"))

    def run(self, **command: Any) -> dict[str, Any]:
        self.runs.append((self.backend, command["policy"], command["is_sorted"], command["is_mixed"]))
        return {"seconds": self.seconds_of(self.backend, command)}


class ScriptedBench(Bench):
    """With scripted engines, of which one is there at a time."""

    def script(self, seconds_of: Callable[[str, dict[str, Any]], float]) -> list[Any]:
        """Returns where what engines do will be."""
        self.runs: list[Any] = []
        self.seconds_of = seconds_of
        return self.runs

    def _engine(self, kind: str, args: dict[str, Any], *_: object) -> EngineProcess:
        return ScriptedEngine(args["attention_backend"], self.seconds_of, self.runs)


def test_stock_s_best_is_sought_on_its_fastest_backend_and_no_run_is_made_twice(tmp_path: Path) -> None:
    bench = ScriptedBench(setting.gpu("8b", 1000), tmp_path, 1)
    assert bench.best_stock("short")["backend"] == "triton"

    def seconds_of(backend: str, command: dict[str, Any]) -> float:
        if backend == "triton":
            raise EngineFailedError("it is not there")
        if command["is_mixed"] and command["is_sorted"]:
            raise OutOfTimeError("the deadline")
        return {"flashinfer": 5.0, "fa3": 9.0}[backend] - command["is_sorted"] - (command["policy"] == "lpm")

    runs = bench.script(seconds_of)
    with pytest.raises(OutOfTimeError):
        bench.choose_stock("short", Deadline(60))
    first = ("dfs-weight", False, False)
    assert [run for run in runs if run[1:] == first] == [(b, *first) for b in ("triton", "flashinfer", "fa3")]
    assert {run[0] for run in runs if len(run) == 4 and run[1:] != first} == {"flashinfer"}
    there = 0
    for run in runs:
        there += {"started": 1, "ended": -1}.get(run[1], 0)
        assert there in (0, 1)
    assert there == 0
    assert bench.best_stock("short") == {"backend": "flashinfer", "policy": "lpm", "is_sorted": True, "is_mixed": False}

    later = bench.script(lambda *_: 1.0)
    bench.choose_stock("short", Deadline(60))
    assert not set(later) & {run for run in runs[:-2] if len(run) == 4}
    assert bench.best_stock("short")["is_mixed"]
    assert bench.script(seconds_of) == []
    bench.choose_stock("short", Deadline(60))
    assert bench.runs == []


def test_ours_and_stock_run_in_turn_and_rounds_that_are_there_are_left_out() -> None:
    turns = _turns(["stock", "ours", "ours, too"], 2, [])
    assert turns == [
        *(("stock", 0), ("ours", 0), ("ours", 1), ("stock", 1)),
        *(("ours, too", 0), ("ours, too", 1)),
    ]
    assert _turns(["stock", "ours"], 2, turns[:3]) == turns[3:4]


def test_results_of_two_settings_are_not_mixed(tmp_path: Path) -> None:
    Bench(setting.gpu("8b", 1000), tmp_path, 1)
    Bench(setting.gpu("8b", 1000), tmp_path, 2)
    with pytest.raises(ConfigError, match="another setting"):
        Bench(setting.gpu("1b", 1000), tmp_path, 1)


# Processes


def test_nothing_is_started_that_cannot_end_in_time() -> None:
    with pytest.raises(OutOfTimeError, match="starting ours: needs about 60 s"):
        Deadline(5).check(60, "starting ours")


def test_an_engine_that_does_not_start_says_why(tmp_path: Path) -> None:
    (tmp_path / "sglang.py").write_text("raise ImportError('this SGLang does not fit the driver')")
    environment = {"PYTHONPATH": f"{tmp_path}:{_ROOT}"}
    engine = EngineProcess("ours", {}, tmp_path / "log", Deadline(120), environment)
    with pytest.raises(EngineFailedError, match=r"(?s)ours ended, see .*log.*does not fit the driver"), engine:
        pass


@pytest.mark.engine
@pytest.mark.thorough
def test_a_dry_run_measures_ours_against_stock_and_leaves_nothing(tmp_path: Path) -> None:
    """Real engines on a CPU, in the processes and through the report of the real run."""
    before = ownerless()
    with tempfile.TemporaryDirectory() as temporary:  # paths of sockets must be short
        done = subprocess.run(
            [
                sys.executable,
                "-m",
                "eval.gpu_bench",
                "--dry-run",
                "--parts",
                "unshared",
                "--rounds",
                "1",
                "--out",
                tmp_path,
            ],
            cwd=_ROOT,
            capture_output=True,
            text=True,
            timeout=400,
            env=os.environ | {"TMPDIR": temporary},
        )
        left = os.listdir(temporary)
    assert done.returncode == 0, done.stdout + done.stderr
    text = (tmp_path / "report.md").read_text()
    assert "DRY RUN" in text and "unshared:" in text
    runs = {
        r["engine"]: r for r in map(json.loads, (tmp_path / "results.jsonl").read_text().splitlines()) if "engine" in r
    }
    assert runs.keys() == {"stock", "ours"}
    assert {r["num_output_tokens"] for r in runs.values()} == {320}
    assert runs["ours"]["num_computed_prompt_tokens"] == runs["ours"]["num_optimal_prompt_tokens"] == 3200
    assert left == []
    assert not left_behind(before)
