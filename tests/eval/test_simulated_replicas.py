"""Several simulated engines: every row once, all together, and beside routers."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from batchllm.errors import ConfigError
from batchllm.perf_model import CostModel, get_device, get_model
from batchllm.sim.workload import OutputDraw, SimWorkload
from eval.simulated_replicas import DISTRIBUTIONS, Distribution, ReplicasResult, start_replicas, zipf

_COST_MODEL = CostModel.with_defaults(get_device("H100"), get_model("Llama-3.1-8B"))
_KNOWN = OutputDraw(median_len=30, sigma=0.7, max_new_len=200, is_known=True)


def _workload(num_requests: int = 3000, *, prefix_len: int = 300, largest_share: float = 0.3) -> SimWorkload:
    return zipf(
        prefix_len=prefix_len,
        private_len=20,
        exponent=1.6,
        largest_share=largest_share,
        num_requests=num_requests,
        output=_KNOWN,
    )


def _simulated(workload: SimWorkload, num_replicas: int, **options: Any) -> ReplicasResult:
    run = start_replicas(workload, num_replicas, **options)
    while run.advance():
        pass
    return run.result()


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_one_engine_computes_the_optimum_however_rows_come(distribution: Distribution) -> None:
    result = _simulated(_workload(600), 1, distribution=distribution, cost_model=_COST_MODEL)
    assert result.num_computed_prompt_tokens == result.num_optimal_prompt_tokens
    assert result.num_requests == (600,) and result.num_cut_tokens == 0


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_every_row_runs_once(distribution: Distribution) -> None:
    result = _simulated(_workload(600), 3, distribution=distribution, cost_model=_COST_MODEL)
    assert sum(result.num_requests) == 600


def test_units_compute_the_optimum_and_what_the_cuts_cost() -> None:
    """To the token: nothing is computed twice but what the plan says."""
    result = _simulated(_workload(), 4, cost_model=_COST_MODEL)
    assert result.num_cut_tokens > 0
    assert result.num_computed_prompt_tokens == result.num_optimal_prompt_tokens + result.num_cut_tokens
    assert result.num_computed_prompt_tokens <= 1.05 * result.num_optimal_prompt_tokens


def test_engines_end_together_on_skewed_groups() -> None:
    """The last is alone for less than a tenth of the time; by groups it is alone for longer, and the end is later."""
    workload = _workload()
    ours = _simulated(workload, 4, cost_model=_COST_MODEL)
    by_group = _simulated(workload, 4, distribution="groups", cost_model=_COST_MODEL)
    assert ours.alone_share < 0.1
    assert ours.elapsed_s < by_group.elapsed_s


def test_rows_in_turn_compute_prefixes_again_and_again() -> None:
    workload = _workload()
    ours = _simulated(workload, 4, cost_model=_COST_MODEL)
    by_row = _simulated(workload, 4, distribution="rows", cost_model=_COST_MODEL)
    assert by_row.num_computed_prompt_tokens > 1.3 * ours.num_computed_prompt_tokens


def test_a_slow_engine_gets_less() -> None:
    """At 0.4 of the others' speed fewer than half as many rows; what it still runs is the last to end."""
    result = _simulated(_workload(6000), 3, cost_model=_COST_MODEL, speeds=(1.0, 1.0, 0.4), kv_capacity_tokens=12_000)
    assert result.num_requests[2] < 0.5 * min(result.num_requests[:2])
    assert result.alone_share < 0.2


def test_a_run_goes_on_from_where_it_was_put_away() -> None:
    """Pickled after every step, it comes to the same as in one go."""
    run = start_replicas(_workload(1500), 3, cost_model=_COST_MODEL)
    while run.advance():
        run = pickle.loads(pickle.dumps(run))
    assert run.result() == _simulated(_workload(1500), 3, cost_model=_COST_MODEL)


def test_what_is_wrong_is_named() -> None:
    with pytest.raises(ConfigError, match="num_replicas must be at least 1, not 0"):
        _simulated(_workload(10), 0, cost_model=_COST_MODEL)
    with pytest.raises(ConfigError, match="distribution 'luck' is not known"):
        _simulated(_workload(10), 2, distribution="luck", cost_model=_COST_MODEL)
