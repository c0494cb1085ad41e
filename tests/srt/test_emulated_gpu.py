"""What runs on a GPU, run without one: overlap, mixed steps, prompts in pieces, decode graphs, shared attention.

The processes are real; what stands for the GPU is told in `emulated_gpu.py`. All is computed in float32, so that the
outputs must be those of ``transformers``, token for token.
"""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from batchllm import BatchEngine, default_model
from batchllm.host import runtime, template
from batchllm.trace import StepTrace
from tests.srt import emulated_gpu
from tests.srt.live import answers_of, job_of, live_answer, run

pytestmark = pytest.mark.engine

_MODEL = default_model.RandomModelShape(name="two-layers", num_hidden_layers=2)
_POOL, _CHUNK = 1200, 128


@pytest.fixture(scope="module")
def model() -> str:
    return default_model.cached_model_path(_MODEL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("gpu")


@pytest.fixture(scope="module")
def interpreter(folder: Path) -> Iterator[None]:
    """SGLang is imported once, with kernels that Triton interprets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runtime, "SCHEDULER_PROCESS", "tests.srt.emulated_gpu:run_scheduler_process")
        for name in (
            "TRITON_INTERPRET",
            "BATCHLLM_CPU_OVERLAP",
            "BATCHLLM_CHECK_LAYOUT",
            "SGLANG_ENABLE_STRICT_MEM_CHECK_DURING_BUSY",
        ):
            patch.setenv(name, "1")
        patch.setenv(emulated_gpu.COUNTS, str(folder / "counts.json"))
        with template.held(is_verbose=False):
            yield


@pytest.fixture(scope="module")
def gpu(request: pytest.FixtureRequest, model: str, folder: Path, interpreter: None) -> Iterator[BatchEngine]:
    """By the size of its pages."""
    with BatchEngine(
        model,
        page_size=request.param,
        max_total_tokens=_POOL,
        chunked_prefill_size=_CHUNK,
        enable_mixed_chunk=True,
        attention_backend="torch_native",
        trace_path=folder / "trace.json",
    ) as engine:
        yield engine


@pytest.fixture(scope="module")
def expected(model: str) -> Callable[[list[list[int]], list[int]], list[list[int]]]:
    """Greedy answers of so many tokens by ``transformers``."""
    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    network.generation_config.eos_token_id = None

    def answer(prompt: list[int], output_len: int) -> list[int]:
        ids = torch.tensor([prompt])
        done = network.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=output_len, do_sample=False)
        answer: list[int] = done[0, len(prompt) :].tolist()
        return answer

    return lambda prompts, output_lens: [answer(*pair) for pair in zip(prompts, output_lens, strict=True)]


def _workload(seed: int) -> tuple[list[list[int]], list[int]]:
    """Prompts and output lengths, shuffled: two levels of prefixes, and three that share nothing and run longest."""
    rng = random.Random(seed)

    def ids(num_tokens: int) -> list[int]:
        return [rng.randint(10, 1500) for _ in range(num_tokens)]

    rows = []
    for _ in range(2):
        system = ids(70)
        for _ in range(2):
            document = system + ids(rng.randint(64, 90))
            rows += [(document + ids(rng.randint(1, 12)), rng.choice([1, 3, 6, 9])) for _ in range(4)]
    rows += [(ids(30), 14) for _ in range(3)]
    rng.shuffle(rows)
    return [prompt for prompt, _ in rows], [output_len for _, output_len in rows]


def _sampling(output_lens: list[int]) -> list[dict[str, Any]]:
    return [{"temperature": 0, "max_new_tokens": n, "ignore_eos": True} for n in output_lens]


def _counts(folder: Path) -> dict[str, int]:
    """Steps by the way they took, once the engine is idle."""
    deadline, counts = time.monotonic() + 30, {}
    while not counts and time.monotonic() < deadline:
        counts = json.loads((folder / "counts.json").read_text())
        time.sleep(0.05)
    return counts


@pytest.mark.parametrize("gpu", [pytest.param(1, marks=pytest.mark.thorough), 16], indirect=True)
def test_live_requests_beside_a_job_are_answered_right(gpu: BatchEngine, expected: Any, folder: Path) -> None:
    """Their steps are the job's: shared segments for some rows, none for others."""
    prompts = _workload(1)[0][:11]
    live, planned = prompts[:3], prompts[3:]
    job = job_of(gpu, planned, max_new_tokens=5)

    async def both() -> tuple[dict[int, list[int]], list[list[int]]]:
        answers, *others = await asyncio.gather(
            answers_of(job), *(live_answer(gpu, ids, **_sampling([5])[0]) for ids in live)
        )
        return answers, [other["output_ids"] for other in others]

    answers, others = run(gpu, both())
    right = expected(prompts, [5] * len(prompts))
    assert others == right[:3]
    assert answers == dict(enumerate(right[3:]))
    assert _counts(folder).keys() & {"shared", "graph, shared"}


@pytest.mark.parametrize(
    ("gpu", "page_size"), [pytest.param(1, 1, marks=pytest.mark.thorough), (16, 16)], indirect=["gpu"]
)
def test_a_job_is_answered_right_and_at_the_optimum(
    gpu: BatchEngine, page_size: int, expected: Any, folder: Path
) -> None:
    """In steps of every kind: eager and in graphs, each sharing and not, mixed, and of prompts in pieces."""
    prompts, output_lens = _workload(0)
    answers = gpu.batch_generate(input_ids=prompts, sampling_params=_sampling(output_lens))
    report = gpu.last_report
    assert report is not None
    assert [list(answer.output_ids) for answer in answers] == expected(prompts, output_lens)
    assert report.num_computed_prompt_tokens == report.num_optimal_prompt_tokens
    assert report.num_retractions == 0
    assert _counts(folder).keys() >= {"plain", "shared", "graph", "graph, shared"}
    steps = StepTrace.read(folder / "trace.json").steps
    assert ((steps["num_prefill_tokens"] > 0) & (steps["num_decode_tokens"] > 0)).any()
    assert steps["num_prefill_tokens"].max() <= _CHUNK < max(map(len, prompts))
    # A prompt is cut at the end of a page.
    assert (steps["num_prefill_tokens"] > _CHUNK - page_size).any()
    # Nothing runs past its end: the first token of an answer comes of its prefill.
    assert steps["num_decode_tokens"].sum() == report.num_output_tokens - len(prompts)
    # By the layouts that ran; alone, each row that decodes reads as many tokens as it attends to.
    decodes = steps["num_prefill_tokens"] == 0
    most = {1: 0.7, 16: 0.8}[page_size]  # of pages only whole ones are shared
    assert steps["kv_read_tokens"][decodes].sum() < most * steps["decode_kv_tokens"][decodes].sum()
