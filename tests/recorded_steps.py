"""Small jobs as the real engine ran them, step by step: what the simulator is held to.

    .venv/bin/python -m tests.recorded_steps    # records them again, into recorded_steps.json

Each job runs on an engine whose steps are mixed, one that has overlap too, and one whose prompts and decoding rows take
turns. Output lengths are hinted at, never learned: what an engine has learned depends on what it ran before.
"""

from __future__ import annotations

import os
import random
from contextlib import closing
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from batchllm import BatchEngine
from batchllm.offline.job_rows import JobRows
from batchllm.offline.jobs import single_job
from batchllm.offline.token_store import TokenStore
from batchllm.request import Request, SamplingParams
from batchllm.trace.steps import FIELD_NAMES, TIME_FIELDS, StepArray

PATH = Path(__file__).with_suffix(".json")
_MIXED = {"max_total_tokens": 700, "chunked_prefill_size": 16, "enable_mixed_chunk": True}
ENGINES: dict[str, dict[str, Any]] = {
    "mixed": _MIXED,
    "mixed, overlap": _MIXED,
    "not mixed": {"max_total_tokens": 1500, "chunked_prefill_size": 256},
}
"""Those that `tests/srt` has."""
# Attention reads no segment of a few tokens, which the simulator does not know, and nobody live is there.
_LEFT_OUT = (*TIME_FIELDS, "kv_read_tokens", "num_live_prefill_tokens", "num_live_decode_tokens")
COLUMNS = [name for name in FIELD_NAMES if name not in _LEFT_OUT]


class Row(msgspec.Struct, frozen=True):
    """A prompt, what it may generate, the token that ends it, and what the scheduler expects (0: nothing is said)."""

    prompt: list[int]
    max_new_len: int
    stop_token: int | None
    expected_len: int


class Job(msgspec.Struct, frozen=True):
    """A job: its rows, how many tokens each generated, and `COLUMNS` of each step by engine."""

    rows: list[Row]
    output_len: list[int]
    steps: dict[str, list[list[int]]]


def read_jobs() -> dict[str, Job]:
    return msgspec.json.decode(PATH.read_bytes(), type=dict[str, Job])


def run_rows(engine: BatchEngine, rows: list[Row]) -> tuple[list[list[int]], list[list[int]]]:
    """Output ids of each row, and `COLUMNS` of each step."""
    with closing(TokenStore(None, 1 << 30)) as store:
        job_rows = JobRows(engine.runtime.info, engine.runtime.tokenizer, store)
        errors = job_rows.add([_request(index, row) for index, row in enumerate(rows)])
        assert not any(errors)
        job = single_job(engine.runtime, job_rows, keep_steps=True)
        outputs: list[list[int]] = [[] for _ in rows]
        for finished in engine.runtime.iterate(job.run()):
            for row, completion in zip(finished.rows, finished.completions, strict=True):
                outputs[row] = list(completion.output_ids)
    steps: StepArray = np.concatenate(job.steps or [])
    return outputs, columns_of(steps)


def columns_of(steps: StepArray) -> list[list[int]]:
    return np.stack([steps[name].astype(np.int64) for name in COLUMNS], axis=1).tolist()


def _request(index: int, row: Row) -> Request:
    sampling = SamplingParams(
        temperature=0,
        max_new_tokens=row.max_new_len,
        ignore_eos=row.stop_token is None,
        stop_token_ids=() if row.stop_token is None else (row.stop_token,),
    )
    expected = row.expected_len or None
    return Request(
        row_id=str(index), index=index, sampling=sampling, input_ids=row.prompt, expected_new_tokens=expected
    )


def _prompts(rng: random.Random) -> list[list[int]]:
    """Of a random tree of three levels; some end inside others, some are duplicates."""
    prompts: list[list[int]] = []
    for _ in range(3):
        stem = _ids(rng, rng.randint(20, 60))
        for _ in range(rng.randint(2, 3)):
            branch = stem + _ids(rng, rng.randint(5, 25))
            prompts += [branch + _ids(rng, rng.randint(0, 20)) for _ in range(rng.randint(2, 3))]
        prompts.append(stem)
    prompts += [_ids(rng, rng.randint(3, 30)) for _ in range(5)]
    rng.shuffle(prompts)
    return prompts


def _ids(rng: random.Random, num_tokens: int) -> list[int]:
    return [rng.randint(10, 1500) for _ in range(num_tokens)]


def _jobs(engine: BatchEngine) -> dict[str, list[Row]]:
    """Rows whose ends are known; that end earlier than expected; of which many go on for longer than was said."""
    rng = random.Random(5)
    prompts = _prompts(rng)
    limits = [rng.randint(1, 45) for _ in prompts]
    known = [Row(prompt, limit, None, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    outputs, _ = run_rows(engine, known)
    early = [
        Row(row.prompt, row.max_new_len, rng.choice(ids), row.max_new_len) if rng.random() < 0.7 else row
        for row, ids in zip(known, outputs, strict=True)
    ]
    never = 1999  # no row generates it
    short = [Row(_ids(rng, rng.randint(2, 6)), 40, never, rng.randint(2, 8)) for _ in range(70)]
    return {"known": known, "early": early, "longer": short}


def main() -> None:
    jobs: dict[str, Job] = {}
    for name, flags in ENGINES.items():
        os.environ["BATCHLLM_CPU_OVERLAP"] = "1" if "overlap" in name else ""
        with BatchEngine(**flags) as engine:
            jobs = jobs or {job: Job(rows, [], {}) for job, rows in _jobs(engine).items()}
            for job in jobs.values():
                outputs, steps = run_rows(engine, job.rows)
                assert not job.output_len or job.output_len == [len(ids) for ids in outputs]
                job.output_len[:] = [len(ids) for ids in outputs]
                job.steps[name] = steps
    PATH.write_bytes(msgspec.json.encode(jobs).replace(b"]],", b"]],\n") + b"\n")


if __name__ == "__main__":
    main()
