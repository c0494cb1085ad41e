"""Tasks of lm-evaluation-harness over local files."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

_WORDS = ["the", "a", "cat", "dog", "sat", "ran", "on", "under", "mat", "tree", "and", "then", "red", "blue", "seven"]


def text(rng: random.Random, num_words: int) -> str:
    return " ".join(rng.choices(_WORDS, k=num_words))


def tasks(folder: Path) -> list[dict[str, Any]]:
    """A task of each kind, over files of JSON lines."""
    rng = random.Random(1)
    questions = [
        {"question": text(rng, 9), "choices": [text(rng, n) for n in (1, 2, 3)], "answer": rng.randrange(3)}
        for _ in range(12)
    ]
    documents = [{"text": text(rng, n)} for n in (3, 40, 700)]
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


def responses(results: dict[str, Any], task: str) -> list[Any]:
    """What the model said of each document of a task, in their order."""
    samples = sorted(results["samples"][task], key=lambda sample: int(sample["doc_id"]))
    return [sample["resps"] for sample in samples]
