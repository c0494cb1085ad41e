"""`batchllm` in lm-evaluation-harness gives what the harness's own model of ``transformers`` gives, on local tasks."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from batchllm import BatchEngine
from batchllm.default_model import default_model_path
from batchllm.errors import ConfigError

pytestmark = pytest.mark.engine

TOLERANCE = 1e-4
_WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "red", "blue", "seven"]


def _text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=num_words))


def _tasks(folder: Path) -> list[dict[str, Any]]:
    """A task of each kind, over files of JSON lines."""
    rng = random.Random(1)
    questions = [
        {"question": _text(rng, 9), "choices": [_text(rng, n) for n in (1, 2, 3)], "answer": rng.randrange(3)}
        for _ in range(12)
    ]
    documents = [{"text": _text(rng, n)} for n in (3, 40, 700)]
    rows = {"questions": questions, "documents": documents}
    for name, records in rows.items():
        (folder / f"{name}.json").write_text("\n".join(map(json.dumps, records)))

    def task(name: str, source: str, **fields: Any) -> dict[str, Any]:
        files = {"test": str(folder / f"{source}.json"), "train": str(folder / f"{source}.json")}
        return {
            "task": name,
            "dataset_path": "json",
            "dataset_kwargs": {"data_files": files},
            "test_split": "test",
            "fewshot_split": "train",
            **fields,
        }

    accuracy = [{"metric": "acc"}, {"metric": "acc_norm"}]
    return [
        task(
            "local_choices",
            "questions",
            output_type="multiple_choice",
            doc_to_text="Question: {{question}}\nAnswer:",
            doc_to_choice="{{choices}}",
            doc_to_target="{{answer}}",
            num_fewshot=4,
            fewshot_config={"sampler": "first_n"},
            metric_list=accuracy,
        ),
        task(
            "local_rolling",
            "documents",
            output_type="loglikelihood_rolling",
            doc_to_text="",
            doc_to_target="{{text}}",
            metric_list=[{"metric": "word_perplexity"}, {"metric": "byte_perplexity"}],
        ),
        task(
            "local_generate",
            "questions",
            output_type="generate_until",
            doc_to_text="Question: {{question}}\nAnswer:",
            doc_to_target="{{choices[0]}}",
            generation_kwargs={"until": ["\n", "cat"], "max_gen_toks": 12, "do_sample": False},
            metric_list=[{"metric": "exact_match"}],
        ),
    ]


def _evaluate(model: Any, folder: Path, **options: Any) -> dict[str, Any]:
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    results: dict[str, Any] = simple_evaluate(
        model=model,
        tasks=_tasks(folder),
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


def _responses(results: dict[str, Any], task: str) -> list[Any]:
    samples = sorted(results["samples"][task], key=lambda sample: int(sample["doc_id"]))
    return [sample["resps"] for sample in samples]


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
    assert _responses(ours, "local_generate") == _responses(theirs, "local_generate")
    for own, other in zip(_responses(ours, "local_choices"), _responses(theirs, "local_choices"), strict=True):
        for ((value, is_greedy),), ((expected, expected_greedy),) in zip(own, other, strict=True):
            assert float(value) == pytest.approx(float(expected), abs=TOLERANCE)
            assert str(is_greedy) == str(expected_greedy)


def test_a_set_of_requests_is_one_batch_at_the_optimum(model: Any, engine: BatchEngine, tmp_path: Path) -> None:
    """The examples in front of the questions are computed once."""
    from lm_eval.api.instance import Instance

    block = _text(random.Random(2), 60)
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
