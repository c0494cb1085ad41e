"""People who talk to a server, and a batch beside them: requests, rows, and the times that a client sees."""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any

import httpx
import openai


@dataclass
class Outcome:
    """What one case gave: seconds to the first token, seconds between tokens, rows of the batch a second."""

    case: str
    first: list[float] = field(default_factory=list)
    between: list[float] = field(default_factory=list)
    gaps: list[tuple[float, float]] = field(default_factory=list)
    """Seconds since the first live request, and since the token before, of each token."""
    rows_per_s: float | None = None
    num_live_steps: int | None = None
    num_late_steps: int | None = None
    bound_ms: float | None = None

    def record(self) -> dict[str, object]:
        record: dict[str, object] = {"case": self.case, "num_streams": len(self.first)}
        if self.first:
            record |= {"ttft_p50_ms": milliseconds(self.first, 50), "ttft_p99_ms": milliseconds(self.first, 99)}
            record |= {"tbt_p50_ms": milliseconds(self.between, 50), "tbt_p99_ms": milliseconds(self.between, 99)}
            record |= {"tbt_max_ms": round(1e3 * max(self.between), 1)}
            record |= {"gaps": [[round(at, 3), round(1e3 * gap, 2)] for at, gap in self.gaps]}
        record |= {"rows_per_s": self.rows_per_s, "bound_ms": self.bound_ms}
        return record | {"num_live_steps": self.num_live_steps, "num_late_steps": self.num_late_steps}


def add_arguments(parser: argparse.ArgumentParser, *, rows: int) -> None:
    """What `Load` reads of the batch and of each stream, and where results go; ``rows`` is how many by default."""
    parser.add_argument("--rows", type=int, default=rows)
    parser.add_argument("--group-size", type=int, default=50)
    parser.add_argument("--shared-len", type=int, default=400)
    parser.add_argument("--private-len", type=int, default=30)
    parser.add_argument("--output-len", type=int, default=48)
    parser.add_argument("--stream-len", type=int, default=16)
    parser.add_argument("--pool", type=int, default=32768)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--model", default="DEFAULT", help="a folder, or a shape of batchllm.default_model (SHAPE_28M)")
    parser.add_argument("--out")


class Load:
    """Sends what ``args`` describe to a server; every prompt is of token ids drawn at random."""

    def __init__(self, url: str, args: argparse.Namespace, draw: random.Random) -> None:
        self._url, self._args, self._draw = url, args, draw
        limits = httpx.Limits(max_connections=None)
        self._http = httpx.AsyncClient(base_url=url, timeout=None, limits=limits)
        self._began = time.perf_counter()
        self._streams: list[asyncio.Task[None]] = []
        self._openai = openai.OpenAI(base_url=f"{url}/v1", api_key="none")

    def _ids(self, num: int) -> list[int]:
        return [self._draw.randrange(10, 4000) for _ in range(num)]

    def row_bodies(self) -> list[dict[str, object]]:
        """The rows of the batch, shuffled."""
        args, bodies = self._args, []
        for _ in range(args.rows // args.group_size):
            shared = self._ids(args.shared_len)
            for _ in range(args.group_size):
                length = self._draw.randint(args.output_len // 2, args.output_len * 3 // 2)
                prompt = shared + self._ids(args.private_len)
                body = {"model": "m", "prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True}
                bodies.append(body)
        self._draw.shuffle(bodies)
        return bodies

    async def warm_up(self) -> None:
        for _ in range(3):
            await self._stream(Outcome(""), 60)

    async def stream_all(self, outcome: Outcome) -> None:
        """The live requests, each as a stream of its own."""
        args = self._args
        self._began = time.perf_counter()
        for _ in range(args.streams):
            self.start_stream(outcome, self._draw.choice(args.live_prompt_len))
            await asyncio.sleep(self._draw.expovariate(1 / args.every_s) if args.poisson else args.every_s)
        await self.end_streams()

    async def stream_for(
        self, outcome: Outcome, seconds: float, rate: float, prompt_len: int, **fields: object
    ) -> None:
        """Live requests as a Poisson process for so long; those that still run go on.

        Args:
            outcome: Of those that arrive meanwhile.
            seconds: How long.
            rate: Requests a second.
            prompt_len: Tokens.
            fields: More of their bodies.
        """
        end = time.perf_counter() + seconds
        while (left := end - time.perf_counter()) > 0.0:
            await asyncio.sleep(min(self._draw.expovariate(rate), left))
            if time.perf_counter() < end:
                self.start_stream(outcome, prompt_len, **fields)

    def start_stream(self, outcome: Outcome, prompt_len: int, **fields: object) -> None:
        """One live request, as `stream_for` sends them."""
        self._streams.append(asyncio.create_task(self._stream(outcome, prompt_len, **fields)))

    async def end_streams(self) -> None:
        """Wait for the live requests that still run."""
        await asyncio.gather(*self._streams)
        self._streams.clear()

    async def _stream(self, outcome: Outcome, prompt_len: int, **fields: object) -> None:
        body = {"model": "m", "prompt": self._ids(prompt_len), "max_tokens": self._args.stream_len, "stream": True}
        body |= {"temperature": 0, "ignore_eos": True, **fields}
        began = last = time.perf_counter()
        is_first = True
        async with self._http.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                if not line.startswith("data: {"):
                    continue
                choices = json.loads(line[6:])["choices"]
                if not choices or (choices[0].get("finish_reason") and not choices[0]["text"]):
                    continue
                now = time.perf_counter()
                (outcome.first if is_first else outcome.between).append(now - (began if is_first else last))
                outcome.gaps.append((now - self._began, now - last))
                is_first, last = False, now

    async def start_batch(self, bodies: list[dict[str, object]]) -> str:
        """Upload the rows and create a batch; returns its id."""
        rows = [
            {"custom_id": str(i), "method": "POST", "url": "/v1/completions", "body": body}
            for i, body in enumerate(bodies)
        ]
        data = io.BytesIO("".join(json.dumps(row) + "\n" for row in rows).encode())
        file = await asyncio.to_thread(self._openai.files.create, file=("rows.jsonl", data), purpose="batch")
        batch = await asyncio.to_thread(
            self._openai.batches.create,
            input_file_id=file.id,
            endpoint="/v1/completions",
            completion_window="24h",
        )
        return batch.id

    async def finish_batch(self, batch_id: str) -> None:
        """Wait for its end."""
        while (batch := await self._batch(batch_id))["status"] not in ("completed", "failed", "expired", "cancelled"):
            await asyncio.sleep(0.1)
        assert batch["status"] == "completed" and not batch["request_counts"]["failed"], batch

    async def serve_batch(self, outcome: Outcome, *, has_live: bool) -> None:
        """Run the batch with the live requests beside it, or without, and take its rate once it runs evenly."""
        batch_id = await self.start_batch(self.row_bodies())
        while not (await self._batch(batch_id))["request_counts"]["completed"]:
            await asyncio.sleep(0.05)
        await asyncio.sleep(self._args.settle_s)
        num_before = (await self._batch(batch_id))["request_counts"]["completed"]
        began = time.perf_counter()
        if has_live:
            await self.stream_all(outcome)
        else:
            await asyncio.sleep(self._args.streams * self._args.every_s)
        now = await self._batch(batch_id)
        assert now["status"] in ("in_progress", "finalizing"), f"the batch ended before the live requests: {now}"
        seconds = time.perf_counter() - began
        outcome.rows_per_s = round((now["request_counts"]["completed"] - num_before) / seconds, 2)

    async def _batch(self, batch_id: str) -> Any:
        return (await self._http.get(f"/v1/batches/{batch_id}")).json()

    async def send_rows(
        self,
        bodies: list[dict[str, object]],
        limit: asyncio.Semaphore,
        may_send: Callable[[], Awaitable[bool]] | None = None,
    ) -> None:
        """Rows as plain requests.

        Args:
            bodies: The rows.
            limit: So many at a time.
            may_send: A row waits until this says so.
        """

        async def row(body: dict[str, object]) -> None:
            try:
                (await self._http.post("/v1/completions", json=body)).raise_for_status()
            finally:
                limit.release()

        tasks = []
        for body in bodies:
            await limit.acquire()
            while may_send is not None and not await may_send():
                await asyncio.sleep(0.02)
            tasks.append(asyncio.create_task(row(body)))
        await asyncio.gather(*tasks)

    async def has_fewer_requests(self, num: int) -> bool:
        """Whether fewer requests run or wait in the server, by its metrics."""
        text = (await self._http.get("/metrics")).text
        names = ("sglang:num_running_reqs{", "sglang:num_queue_reqs{")
        return sum(float(line.split(" ")[-1]) for line in text.splitlines() if line.startswith(names)) < num

    async def serve_rows_as_requests(self, outcome: Outcome) -> None:
        """The rows of the batch as plain requests, all at once, as a client without a batch route would send them."""
        num_done = 0

        async def row(body: dict[str, object]) -> None:
            nonlocal num_done
            (await self._http.post("/v1/completions", json=body)).raise_for_status()
            num_done += 1

        rows = [asyncio.create_task(row(body)) for body in self.row_bodies()]
        while not num_done:
            await asyncio.sleep(0.05)
        began, num_before = time.perf_counter(), num_done
        await self.stream_all(outcome)
        outcome.rows_per_s = round((num_done - num_before) / (time.perf_counter() - began), 2)
        for task in rows:
            task.cancel()
        await asyncio.gather(*rows, return_exceptions=True)

    def read_metrics(self, outcome: Outcome) -> None:
        values = {}
        for line in httpx.get(f"{self._url}/metrics").text.splitlines():
            if line.startswith("batchllm_scheduler_live_"):
                values[line.split("{")[0].split(" ")[0]] = float(line.split(" ")[-1])
        if "batchllm_scheduler_live_steps_total" in values:
            outcome.num_live_steps = int(values["batchllm_scheduler_live_steps_total"])
            outcome.num_late_steps = int(values["batchllm_scheduler_live_steps_over_bound_total"])
            outcome.bound_ms = round(1e3 * values["batchllm_scheduler_live_bound_seconds"], 2)


def model_folder(model: str) -> str:
    """Of a shape of `batchllm.default_model`, by its name there, or of a model that is a folder already."""
    from batchllm import default_model

    shape = getattr(default_model, model, None)
    return model if shape is None else str(default_model.cached_model_path(shape))


def milliseconds(seconds: list[float], percent: int) -> float:
    """A percentile of times in seconds."""
    ordered = sorted(seconds)
    return round(1e3 * ordered[min(len(ordered) * percent // 100, len(ordered) - 1)], 1)
