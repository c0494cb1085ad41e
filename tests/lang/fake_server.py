"""Stands in for an engine below the seam of `WaveDriver`: answers bodies of ``/generate``, deterministically."""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sglang.lang.backend.base_backend import BaseBackend

from batchllm.lang.driver import WaveDriver
from batchllm.lang.programs import RunsInWaves
from batchllm.lang.waves import Waves
from batchllm.offline.event_loop import LoopThread

REFUSED = "REFUSED"
"""A prompt with this in it is answered with an exception."""


class FakeBackend(RunsInWaves, BaseBackend):
    """A backend whose engine takes no time.

    Args:
        num_turns: In so many turns of the event loop a wave is answered, an equal share in each.
        waves_kwargs: Of `Waves`.

    Attributes:
        sent: Bodies of each wave, in the order in which the waves were sent.
    """

    def __init__(self, num_turns: int = 1, **waves_kwargs: Any) -> None:
        super().__init__()
        self.sent: list[list[dict[str, Any]]] = []
        self._num_turns = num_turns
        self._loop_thread = LoopThread("fake-server")
        self.waves = Waves(**waves_kwargs)
        WaveDriver(self.waves, self._loop_thread.loop, self._answer)

    def close(self) -> None:
        self._loop_thread.close()

    async def _answer(self, bodies: Sequence[Any]) -> AsyncIterator[tuple[int, Any]]:
        self.sent.append(list(bodies))
        share = -(-len(bodies) // self._num_turns)
        for index, body in enumerate(bodies):
            if index % share == 0:
                await asyncio.sleep(0)
            yield index, answer(body)


def answer(body: dict[str, Any]) -> Any:
    """What a server would say: a text that depends on the prompt; log probabilities that prefer the longer prompt."""
    texts = body.get("text", "")
    if REFUSED in texts:
        return RuntimeError("refused")
    if isinstance(texts, list):
        return [{"meta_info": _logprobs(text)} for text in texts]
    if "input_ids" in body:
        return [{"meta_info": _logprobs(ids)} for ids in body["input_ids"]]
    answers = [
        {"text": f"<{zlib.crc32(texts.encode()) + sample:08x}>", "meta_info": {"prompt_tokens": len(texts)}}
        for sample in range(body["sampling_params"].get("n") or 1)
    ]
    return answers[0] if len(answers) == 1 else answers


def _logprobs(tokens: Sequence[Any]) -> dict[str, Any]:
    last = [(-1.0 / (1 + len(tokens)), place, "") for place in range(3)]
    return {"input_token_logprobs": last, "output_token_logprobs": []}
