"""SGLang's tokenizer manager, with a way past its per-request machinery. Runs in the engine's or the server's process.
(Upstream: ``srt/managers/tokenizer_manager.py``.)

A planned request has no ``ReqState``, no event and no task here: runs go out in bulk, outputs come back in
bulk and are handed to the job that asked.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from http import HTTPStatus
from typing import Any

from sglang.srt.entrypoints.engine import init_tokenizer_manager as init_upstream
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import AbortReq, UnloadLoRAAdapterReqInput
from sglang.srt.managers.tokenizer_manager import SignalHandler, TokenizerManager
from sglang.utils import TypeBasedDispatcher

from batchllm.errors import EngineDiedError
from batchllm.srt.entrypoints.serving_chat import ServingChat
from batchllm.srt.managers.io_struct import PlannedBatchOutput
from batchllm.srt.managers.live_latency import observe
from batchllm.trace.latency import LiveLatency

logger = logging.getLogger(__name__)

_GIVEN_AS_TENSORS = "__tensor__"
"""What SGLang calls the folder of such an adapter (``TokenizerControlMixin.load_lora_adapter_from_tensors``)."""


class BatchTokenizerManager(TokenizerManager):
    """Carries planned batches beside SGLang's own requests."""

    @property
    def serving_chat_class(self) -> type[ServingChat]:
        """What the server answers live chats with."""
        return ServingChat

    def init_running_status(self) -> None:
        super().init_running_status()
        self._death: EngineDiedError | None = None
        self.live_latency = LiveLatency()
        self.num_planned_answers = 0
        """Of all jobs so far."""
        self.has_given_weights = False
        """Whether weights were given at run time that no file has."""
        self._planned_outputs: dict[int, asyncio.Queue[PlannedBatchOutput | EngineDiedError]] = {}
        self._job_adapters: dict[int, set[str]] = {}
        self._leaving_adapters: set[str] = set()
        self.on_death: Callable[[], None] | None = None
        """Called when a runtime process has ended, after the jobs have been told."""

    def init_request_dispatcher(self) -> None:
        super().init_request_dispatcher()
        self._result_dispatcher += TypeBasedDispatcher([(PlannedBatchOutput, self._handle_planned_output)])
        self.signal_handler_class = _FailJobs

    def open_job(self, job_id: int) -> None:
        """Outputs of this job may arrive from now on.

        Raises:
            EngineDiedError: A runtime process has ended; none will come.
        """
        self.auto_create_handle_loop()
        if self._death is not None:
            raise self._death
        self._planned_outputs[job_id] = asyncio.Queue()
        self._job_adapters[job_id] = set()

    def close_job(self, job_id: int) -> None:
        """Drop whatever still arrives for this job."""
        del self._planned_outputs[job_id], self._job_adapters[job_id]

    @property
    def adapter_ids(self) -> dict[str, str]:
        """SGLang's identifier of each loaded adapter, by its name."""
        loaded = self.lora_registry.get_all_adapters().items()
        return {name: ref.lora_id for name, ref in loaded if name not in self._leaving_adapters}

    def adapters_of_job(self, job_id: int, names: Sequence[str | None]) -> list[str | None]:
        """Identifiers of adapters that requests of a job run with; they stay loaded until the job is closed.

        Returns:
            Of each name its identifier; None for the base model, and for an adapter that is not loaded.
        """
        ids = self.adapter_ids if any(name is not None for name in names) else {}
        self._job_adapters[job_id].update(name for name in names if name in ids)
        return [None if name is None else ids.get(name) for name in names]

    async def _unload_lora_adapter_locked(self, obj: UnloadLoRAAdapterReqInput) -> Any:
        """Unload an adapter. The scheduler would end if one of its requests ran with it.

        Raises:
            ValueError: Requests of a job run with it; SGLang makes an answer of that.
        """
        if any(obj.lora_name in names for names in self._job_adapters.values()):
            raise ValueError(f"a batch runs with the adapter {obj.lora_name!r}; unload it when that has ended")
        self._leaving_adapters.add(obj.lora_name)
        try:
            return await super()._unload_lora_adapter_locked(obj)
        finally:
            self._leaving_adapters.remove(obj.lora_name)

    def send(self, message: Any) -> None:
        """To the scheduler."""
        self._dispatch_to_scheduler(message)

    async def receive_outputs(self, job_id: int) -> PlannedBatchOutput:
        """Wait for the next finished requests of a job.

        Raises:
            EngineDiedError: A runtime process has ended; none will come.
        """
        output = await self._planned_outputs[job_id].get()
        if isinstance(output, EngineDiedError):
            raise output
        return output

    async def send_and_wait(self, message: Any) -> None:
        """To the scheduler; returns when the message has left."""
        await self._async_dispatch_to_scheduler(message)

    @property
    def death(self) -> EngineDiedError | None:
        """What has been said when a process of the engine ended; None while all are up."""
        return self._death

    def auto_create_handle_loop(self) -> None:
        """Start to receive, once. SIGTERM stays whose it was: upstream would kill this whole process."""
        is_main = threading.current_thread() is threading.main_thread()
        before = signal.getsignal(signal.SIGTERM)
        is_first = self.event_loop is None
        super().auto_create_handle_loop()
        if is_first and is_main:
            self.event_loop.remove_signal_handler(signal.SIGTERM)
            signal.signal(signal.SIGTERM, before)

    def fail_jobs(self, error: EngineDiedError) -> None:
        """Wake every job, those to come too, with ``error``."""
        self._death = error
        for queue in self._planned_outputs.values():
            queue.put_nowait(error)
        if self.on_death is not None:
            self.on_death()

    def fail_live(self, reason: str) -> None:
        """End every request outside jobs: 503, or the end of its stream."""
        for rid in list(self.rid_to_state):
            told = {"type": "abort", "status_code": HTTPStatus.SERVICE_UNAVAILABLE, "message": reason}
            self._handle_abort_req(AbortReq(rid=rid, finished_reason=told))

    async def forget_lost_adapters(self) -> list[LoRARef]:
        """Forget adapters that were given as tensors, which end with the engine; returns the others.

        Requests for an adapter that the next engine does not have would end it.
        """
        kept = []
        for ref in self.lora_registry.get_all_adapters().values():
            if ref.lora_path == _GIVEN_AS_TENSORS:
                logger.warning("the adapter %r was given as tensors; load it again", ref.lora_name)
                await self.lora_registry.unregister(ref.lora_name)
            else:
                kept.append(ref)
        return kept

    async def update_weights_from_disk(self, obj: Any, request: Any = None) -> Any:
        return (*why, 0) if (why := self._why_no_weights()) else await super().update_weights_from_disk(obj, request)

    async def update_weights_from_tensor(self, obj: Any, request: Any = None) -> Any:
        return self._why_no_weights() or self._note_weights(await super().update_weights_from_tensor(obj, request))

    async def update_weights_from_distributed(self, obj: Any, request: Any = None) -> Any:
        return self._why_no_weights() or self._note_weights(await super().update_weights_from_distributed(obj, request))

    async def update_weights_from_ipc(self, obj: Any, request: Any = None) -> Any:
        return self._why_no_weights() or self._note_weights(await super().update_weights_from_ipc(obj, request))

    def _why_no_weights(self) -> tuple[bool, str] | None:
        """What is said to whoever gives other weights while a batch runs: one model answers all of it."""
        if not self._planned_outputs:
            return None
        return False, "a batch runs with the weights that are loaded; load others when it has ended, or cancel it"

    def _note_weights(self, result: Any) -> Any:
        """Remember that an engine has weights which no file has."""
        self.has_given_weights = self.has_given_weights or bool(result[0])
        return result

    def revive(self) -> None:
        """Processes of the engine have been started again."""
        self._death = None

    async def _handle_batch_output(self, recv_obj: Any) -> None:
        observe(self.live_latency, recv_obj, self.rid_to_state)
        await super()._handle_batch_output(recv_obj)

    def _handle_planned_output(self, output: PlannedBatchOutput) -> None:
        self.num_planned_answers += sum(reason["type"] != "abort" for reason in output.finish_reasons)
        queue = self._planned_outputs.get(output.job_id)
        if queue is not None:
            queue.put_nowait(output)


class _FailJobs(SignalHandler):
    """A child that fails sends SIGQUIT; upstream then kills this whole process, which loses what was not yet
    written.
    """

    def running_phase_sigquit_handler(self, signum: Any = None, frame: Any = None) -> None:
        self.tokenizer_manager.fail_jobs(EngineDiedError("a runtime process ended unexpectedly; its log is above"))


def init_tokenizer_manager(server_args: Any, port_args: Any) -> Any:
    """What SGLang's engine and server call to make the tokenizer manager."""
    return init_upstream(server_args, port_args, BatchTokenizerManager)
