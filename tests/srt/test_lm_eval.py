"""`batchllm` in lm-evaluation-harness gives what the harness's own model of ``transformers`` gives, on local tasks."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest

from batchllm import BatchEngine
from batchllm.default_model import default_model_path
from batchllm.errors import ConfigError
from tests.srt.harness_tasks import responses, tasks, text

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4


def _evaluate(model: Any, folder: Path, **options: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=tasks(folder),
        task_manager=TaskManager(include_defaults=False),  # reading the harness's thousands takes ten seconds
        log_samples=True,
        bootstrap_iters=0,
        verbosity="ERROR",
        **options,
    )
    return results


@pytest.fixture(scope="module")
def reference() -> Any:
    """The harness's model of ``transformers``."""
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=default_model_path(), dtype="float32", device="cpu", batch_size=4, max_length=256)


@pytest.fixture
def model(engine: BatchEngine) -> Any:
    from batchllm.lm_eval import BatchLM

    return BatchLM(default_model_path(), engine=engine, max_length=256)


def test_metrics_and_likelihoods_are_those_of_transformers(model: Any, reference: Any, tmp_path: Path) -> None:
    """Multiple choice behind four examples, documents longer than the model takes, and generation."""
    ours, theirs = (_evaluate(each, tmp_path) for each in (model, reference))
    for task in ("local_choices", "local_rolling", "local_generate"):
        numbers = {
            name: value
            for name, value in ours["results"][task].items()
            if isinstance(value, float) and "stderr" not in name
        }
        assert numbers
        for name, value in numbers.items():
            assert value == pytest.approx(theirs["results"][task][name], rel=1e-4), (task, name)
    assert responses(ours, "local_generate") == responses(theirs, "local_generate")
    for own, other in zip(responses(ours, "local_choices"), responses(theirs, "local_choices"), strict=True):
        for ((value, is_greedy),), ((expected, expected_greedy),) in zip(own, other, strict=True):
            assert float(value) == pytest.approx(float(expected), abs=TOLERANCE)
            assert str(is_greedy) == str(expected_greedy)


def test_a_set_of_requests_is_one_batch_at_the_optimum(model: Any, engine: BatchEngine, tmp_path: Path) -> None:
    """The examples in front of the questions are computed once."""
    from lm_eval.api.instance import Instance

    block = text(random.Random(2), 60)
    arguments = [(f"{block} {i}:", choice) for i in range(5) for choice in (" red", " blue sat", " nine")]
    requests = [Instance("loglikelihood", {}, pair, i) for i, pair in enumerate(arguments)]
    assert len(model.loglikelihood(requests)) == len(requests)
    report = engine.last_report
    assert report is not None
    assert report.num_requests == len(requests)
    assert report.num_computed_prompt_tokens == report.num_optimal_prompt_tokens < report.num_prompt_tokens / 3


def test_arguments_that_cannot_hold_are_refused(engine: BatchEngine, model: Any) -> None:
    from lm_eval.api.instance import Instance

    from batchllm.lm_eval import BatchLM

    with pytest.raises(ConfigError, match="max_length 99999"):
        BatchLM(default_model_path(), engine=engine, max_length=99999)
    for options, words in (
        ({"num_beams": 4, "max_gen_toks": 8}, "num_beams: not supported"),
        ({"max_gen_toks": 999}, "max_gen_toks is"),
    ):
        request = Instance("generate_until", {}, ("a", {"until": ["\n"], **options}), 0)
        with pytest.raises(ConfigError, match=words):
            model.generate_until([request])
