"""`Endpoint`: frontend programs on a server, ours or stock SGLang's; a wave is one request with a list of prompts.

Knows ``/generate``. Must not know how programs are run.

INVARIANT: a prompt that the server refuses does not take the others of its request along.
"""

from __future__ import annotations

import asyncio
import functools
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from typing import Any

from sglang.lang.backend.runtime_endpoint import RuntimeEndpoint
from sglang.utils import http_request

from batchllm.lang.bodies import Body
from batchllm.lang.driver import WaveDriver
from batchllm.lang.programs import RunsInWaves
from batchllm.lang.waves import MAX_WAVE, Waves
from batchllm.offline.event_loop import LoopThread

_PER_PROMPT = ("text", "input_ids", "sampling_params", "logprob_start_len")
"""Fields that a body with a list of prompts may give for each of them."""


class Endpoint(RunsInWaves, RuntimeEndpoint):
    """SGLang's ``RuntimeEndpoint``, whose programs ask in waves. Arguments are upstream's.

    Args:
        max_wave: Most requests that are sent together.

    Raises:
        RuntimeError: The server does not answer as one of SGLang's.
    """

    def __init__(
        self,
        base_url: str,
        api_key: str | None = None,
        verify: str | None = None,
        chat_template_name: str | None = None,
        *,
        max_wave: int = MAX_WAVE,
    ) -> None:
        super().__init__(base_url, api_key, verify, chat_template_name)
        self.waves = Waves(max_wave)
        self._loop_thread = LoopThread("batchllm-waves")
        WaveDriver(self.waves, self._loop_thread.loop, self._answer)

    def shutdown(self) -> None:
        """Close what this endpoint has open. The server is not touched."""
        self._loop_thread.close()

    async def _answer(self, bodies: Sequence[Body]) -> AsyncIterator[tuple[int, Any]]:
        """Answers for `WaveDriver`."""
        groups: dict[str, list[int]] = defaultdict(list)
        for index, body in enumerate(bodies):
            groups[_what_must_agree(body)].append(index)
        posts = [asyncio.ensure_future(self._post_list(bodies, indices)) for indices in groups.values()]
        try:
            for post in asyncio.as_completed(posts):
                for pair in await post:
                    yield pair
        finally:
            for post in posts:
                post.cancel()

    async def _post_list(self, bodies: Sequence[Body], indices: list[int]) -> list[tuple[int, Any]]:
        """Answers of bodies that agree. A list that the server refuses is halved until what it refuses is alone."""
        chosen = [bodies[index] for index in indices]
        try:
            outputs = await self._post(chosen[0] if len(chosen) == 1 else merge(chosen))
        except Exception as error:  # of the connection or the server; the program that asked shall see it
            if len(indices) == 1 or isinstance(error, OSError):
                return [(index, error) for index in indices]
            middle = len(indices) // 2
            halves = [self._post_list(bodies, half) for half in (indices[:middle], indices[middle:])]
            return [pair for half in await asyncio.gather(*halves) for pair in half]
        return list(zip(indices, [outputs] if len(chosen) == 1 else split(chosen, outputs), strict=True))

    async def _post(self, body: Body) -> Any:
        send = functools.partial(
            http_request, self.base_url + "/generate", json=body, api_key=self.api_key, verify=self.verify
        )
        response = await asyncio.get_running_loop().run_in_executor(None, send)
        self._assert_success(response)
        return response.json()


def _what_must_agree(body: Body) -> str:
    """The same for bodies that may go into one list: all but what is given for each prompt."""
    fields = {name: value for name, value in body.items() if name not in _PER_PROMPT}
    if "image_data" in fields:
        return f"alone {id(body)}"
    kind = "input_ids" if "input_ids" in body else "text"
    return f"{kind} {body['sampling_params'].get('n') or 1} {sorted(fields.items())}"


def merge(bodies: Sequence[Body]) -> Body:
    """One body that asks what these ask, in their order."""
    kind = "input_ids" if "input_ids" in bodies[0] else "text"
    sizes = [_num_prompts(body) or 1 for body in bodies]
    prompts: list[Any] = []
    for body in bodies:
        prompts += body[kind] if _num_prompts(body) is not None else [body[kind]]
    each = list(zip(bodies, sizes, strict=True))
    merged = dict(bodies[0])
    merged[kind] = prompts
    merged["sampling_params"] = [body["sampling_params"] for body, size in each for _ in range(size)]
    if any("logprob_start_len" in body for body in bodies):
        merged["logprob_start_len"] = [body.get("logprob_start_len", -1) for body, size in each for _ in range(size)]
    return merged


def split(bodies: Sequence[Body], outputs: list[Any]) -> list[Any]:
    """The answer that each body would have got alone, from the answer to all of them merged."""
    answers: list[Any] = []
    first = 0
    for body in bodies:
        num_samples = body["sampling_params"].get("n") or 1
        num_prompts = _num_prompts(body)
        size = (num_prompts or 1) * num_samples
        of_body = outputs[first : first + size]
        answers.append(of_body[0] if num_prompts is None and num_samples == 1 else of_body)
        first += size
    return answers


def _num_prompts(body: Body) -> int | None:
    """How many prompts a body lists; None where it gives one."""
    if "input_ids" in body:
        return len(body["input_ids"])
    return len(body["text"]) if isinstance(body["text"], list) else None
