"""The report: ratios come from the counts, nothing divides by zero, the table lines up."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

from batchllm.offline.report import RunReport

REPORT = RunReport(
    num_requests=1000,
    num_succeeded=990,
    num_failed=10,
    num_done_before=100,
    num_engine_restarts=2,
    num_prompt_tokens=1_000_000,
    num_computed_prompt_tokens=250_000,
    num_optimal_prompt_tokens=200_000,
    num_output_tokens=64_000,
    elapsed_s=20.0,
    num_retractions=3,
    num_recomputed_for_live=0,
    peak_kv_tokens=90_000,
    kv_capacity_tokens=100_000,
    num_predicted=400,
    num_predicted_tokens=26_000,
    num_predicted_actual_tokens=25_000,
    sum_prediction_error_tokens=5_000,
    start_s=0.125,
    read_s=0.5,
    tokenize_s=1.5,
    plan_s=0.25,
    run_s=18.0,
    write_s=0.75,
)
NOTHING = RunReport(**{field.name: 0 for field in dataclasses.fields(RunReport)})


def test_ratios_follow_from_the_counts() -> None:
    assert REPORT.mean_prediction_error == 0.2
    assert REPORT.reuse == 0.75
    assert REPORT.optimal_reuse == 0.8
    assert REPORT.prompt_tokens_per_s == 50_000.0
    assert REPORT.output_tokens_per_s == 3_200.0


def test_nothing_done_is_zero_everywhere() -> None:
    assert set(NOTHING.to_dict().values()) == {0}
    assert "0.0%" in NOTHING.render()


def test_the_dict_has_exactly_the_documented_names() -> None:
    assert set(REPORT.to_dict()) == {
        "num_requests",
        "num_succeeded",
        "num_failed",
        "num_done_before",
        "num_engine_restarts",
        "num_prompt_tokens",
        "num_computed_prompt_tokens",
        "num_optimal_prompt_tokens",
        "reuse",
        "optimal_reuse",
        "num_output_tokens",
        "num_cut_tokens",
        "elapsed_s",
        "prompt_tokens_per_s",
        "output_tokens_per_s",
        "num_retractions",
        "num_recomputed_for_live",
        "peak_kv_tokens",
        "kv_capacity_tokens",
        "num_predicted",
        "num_predicted_tokens",
        "num_predicted_actual_tokens",
        "sum_prediction_error_tokens",
        "mean_prediction_error",
        "start_s",
        "read_s",
        "tokenize_s",
        "plan_s",
        "run_s",
        "write_s",
    }


def test_the_dict_leaves_no_field_out() -> None:
    named = REPORT.to_dict()
    for field in dataclasses.fields(RunReport):
        assert named[field.name] == getattr(REPORT, field.name)


def test_json_reads_back_and_replaces_an_older_file(tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    REPORT.write_json(path)
    assert json.loads(path.read_text()) == REPORT.to_dict()
    assert [p.name for p in tmp_path.iterdir()] == ["report.json"]


def test_the_table_is_aligned_and_readable() -> None:
    assert REPORT.render().splitlines() == [
        "elapsed            20.00 s  start 0.12, read 0.50, tokenize 1.50, plan 0.25, run 18.00, write 0.75",
        "requests             1,000  990 succeeded, 10 failed, 100 of them in earlier runs, 2 engine restarts",
        "prompt tokens    1,000,000",
        "  computed         250,000  reuse 75.0%",
        "  optimum          200,000  reuse 80.0%",
        "output tokens       64,000",
        "peak KV tokens      90,000  of 100,000",
        "retractions              3",
        "lengths learned        400  expected 26,000 tokens, generated 25,000, mean error 20%",
        "prompt tokens/s   50,000.0",
        "output tokens/s    3,200.0",
    ]
