"""SGLang's tokenizer manager, with a way past its per-request machinery. Runs in the engine's or the server's process.
(Upstream: ``srt/managers/tokenizer_manager.py``.)

A planned request has no ``ReqState``, no event and no task here: runs go out in bulk, outputs come back in
bulk and are handed to the job that asked. `ManagedRuntime` is what drivers see of it.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from http import HTTPStatus
from itertools import count
from typing import Any

import numpy as np
from sglang.srt.entrypoints.engine import init_tokenizer_manager as init_upstream
from sglang.srt.lora.lora_registry import LoRARef
from sglang.srt.managers.io_struct import AbortReq, GenerateReqInput, UnloadLoRAAdapterReqInput
from sglang.srt.managers.tokenizer_manager import SignalHandler, TokenizerManager
from sglang.utils import TypeBasedDispatcher

from batchllm.errors import EngineDiedError
from batchllm.offline.runtime import FinishedRequests, RunRequests, RuntimeInfo
from batchllm.srt.entrypoints.serving_chat import ServingChat
from batchllm.srt.managers.chat_tokenizer import ChatTokenizer
from batchllm.srt.managers.control_faults import HearingCommunicator
from batchllm.srt.managers.io_struct import (
    PlannedAbortReqInput,
    PlannedBatchOutput,
    PlannedCloseReqInput,
    PlannedRunReqInput,
    completions_of,
    sampling_kwargs,
)
from batchllm.srt.managers.known_scores import KnownScores
from batchllm.srt.managers.live_checks import check_generate
from batchllm.srt.managers.live_faults import fail_requests
from batchllm.srt.managers.live_latency import observe
from batchllm.srt.server_args import kv_limit_tokens
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
        self.death: EngineDiedError | None = None
        """What has been said when a process of the engine ended; None while all are up."""
        self.live_latency = LiveLatency()
        self.known_scores = KnownScores()
        self.num_planned_answers = 0
        """Requests of all jobs answered so far."""
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

    def init_communicators(self, server_args: Any) -> None:
        super().init_communicators(server_args)
        self._communicators = HearingCommunicator.take_places(self)

    def open_job(self, job_id: int) -> None:
        """Outputs of this job may arrive from now on.

        Raises:
            EngineDiedError: A runtime process has ended; none will come.
        """
        self.auto_create_handle_loop()
        if self.death is not None:
            raise self.death
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

    def generate_request(self, obj: Any, request: Any = None) -> Any:
        """SGLang's answers to a live request.

        Raises:
            ValueError: It cannot be carried out (`live_checks`), or the model does not generate, and would end the
                engine.
        """
        if isinstance(obj, GenerateReqInput):
            if not self.is_generation:
                raise ValueError(
                    "this server embeds (--is-embedding); ask /v1/embeddings, or a server without --is-embedding"
                )
            try:
                check_generate(obj, self.metrics_collector.labels if self.enable_metrics else None)
            except ValueError:
                obj.is_single, obj.rid = False, []  # what SGLang aborts behind a stream, refused or not
                raise
        return super().generate_request(obj, request)

    def _dispatch_to_scheduler(self, obj: Any) -> None:
        self.known_scores.ask(obj, self.rid_to_state)
        super()._dispatch_to_scheduler(obj)

    async def flush_cache(self, timeout_s: float | None = None) -> Any:
        self.known_scores.clear()
        return await super().flush_cache(timeout_s)

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
        self.death = error
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
        if why := self._why_no_weights():
            return (*why, 0)
        result = await super().update_weights_from_disk(obj, request)
        self.known_scores.clear()
        return result

    async def update_weights_from_tensor(self, obj: Any, request: Any = None) -> Any:
        return self._why_no_weights() or self._note_weights(await super().update_weights_from_tensor(obj, request))

    async def update_weights_from_distributed(self, obj: Any, request: Any = None) -> Any:
        return self._why_no_weights() or self._note_weights(await super().update_weights_from_distributed(obj, request))

    async def update_weights_from_ipc(self, obj: Any, request: Any = None) -> Any:
        return self._why_no_weights() or self._note_weights(await super().update_weights_from_ipc(obj, request))

    async def check_weights(self, obj: Any, request: Any = None) -> Any:
        """SGLang's; one of the actions overwrites the weights."""
        if obj.action != "reset_tensors":
            return await super().check_weights(obj, request)
        if why := self._why_no_weights():
            return (*why, None, None)
        return self._note_weights(await super().check_weights(obj, request))

    async def init_weights_update_group(self, obj: Any, request: Any = None) -> Any:
        """SGLang's; the scheduler does nothing else until the others have come."""
        return self._why_no_weights() or await super().init_weights_update_group(obj, request)

    async def init_weights_send_group_for_remote_instance(self, obj: Any, request: Any = None) -> Any:
        return self._why_no_weights() or await super().init_weights_send_group_for_remote_instance(obj, request)

    def _why_no_weights(self) -> tuple[bool, str] | None:
        """The answer to what concerns weights while a batch runs, which one model must answer; None if none runs."""
        if not self._planned_outputs:
            return None
        return False, "a batch runs with the weights that are loaded; ask again when it has ended, or cancel it"

    def _note_weights(self, result: Any) -> Any:
        """Remember that an engine has weights which no file has."""
        self.has_given_weights = self.has_given_weights or bool(result[0])
        self.known_scores.clear()
        return result

    def revive(self) -> None:
        """Processes of the engine have been started again."""
        self.death = None
        for communicator in self._communicators:
            communicator.forget()

    async def _handle_batch_output(self, recv_obj: Any) -> None:
        states = self._states(recv_obj.rids)
        try:
            observe(self.live_latency, recv_obj, self.rid_to_state)
            self.known_scores.answer(recv_obj, self.rid_to_state)
            await super()._handle_batch_output(recv_obj)
        except Exception as error:  # whatever it is: it would end the process, and with it everybody's work
            fail_requests(self, states, error)

    def _handle_abort_req(self, recv_obj: AbortReq) -> None:
        states = self._states([recv_obj.rid])
        try:
            super()._handle_abort_req(recv_obj)
        except Exception as error:  # whatever it is, as in `_handle_batch_output`
            fail_requests(self, states, error)

    def _states(self, rids: Sequence[str]) -> dict[str, Any]:
        return {rid: self.rid_to_state[rid] for rid in rids if rid in self.rid_to_state}

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


class ManagedRuntime:
    """A running SGLang with our parts, as a `batchllm.offline.runtime.Runtime`, whoever started it.

    The manager's event loop is the only one on which jobs may be opened, fed and received.

    Args:
        manager: The tokenizer manager.
        template_manager: SGLang's, with the chat template.
        server_args: SGLang's arguments that it was started with.
        init_info: What the scheduler said when it had started.

    Attributes:
        manager: As given.
        tokenizer: Texts and chats to tokens, and back; None where the engine runs on token ids only.
    """

    def __init__(
        self, manager: BatchTokenizerManager, template_manager: Any, server_args: Any, init_info: dict[str, Any]
    ) -> None:
        self.manager = manager
        self.tokenizer = None if manager.tokenizer is None else ChatTokenizer(manager, template_manager)
        self._job_ids = count()
        self._info = RuntimeInfo(
            model_name=server_args.served_model_name,
            context_len=manager.context_len,
            vocab_size=manager.model_config.vocab_size,
            kv_capacity_tokens=init_info["max_total_num_tokens"],
            kv_limit_tokens=kv_limit_tokens(server_args, init_info["max_total_num_tokens"]),
            # The last token of an answer is never stored.
            num_unstored_tokens=1 if server_args.disable_overlap_schedule else 0,
            page_size=server_args.page_size,
            random_seed=server_args.random_seed,
            has_seeded_sampling=server_args.sampling_backend != "flashinfer",
            has_grammar=server_args.grammar_backend != "none" and not server_args.skip_tokenizer_init,
            has_tokenizer=not server_args.skip_tokenizer_init,
            max_step_tokens=server_args.chunked_prefill_size if (server_args.chunked_prefill_size or 0) > 0 else None,
            max_running=init_info["batchllm"]["max_running"],
            chat_sampling={} if self.tokenizer is None else self.tokenizer.chat_sampling,
            parses_answers=bool(server_args.reasoning_parser or server_args.tool_call_parser),
            embeds=not manager.model_config.is_generation,
            max_dimensions=manager.model_config.hidden_size if manager.model_config.is_matryoshka else None,
            dimensions=tuple(manager.model_config.matryoshka_dimensions or ()),
        )

    @property
    def info(self) -> RuntimeInfo:
        """The engine's numbers, with the adapters that are loaded by now."""
        return replace(self._info, adapters=tuple(self.manager.adapter_ids))

    def open_job(self) -> int:
        job_id = next(self._job_ids)
        self.manager.open_job(job_id)
        return job_id

    def submit(self, job_id: int, requests: RunRequests) -> None:
        num_logprobs = [p.top_logprobs if p.logprobs else -1 for p in requests.sampling]
        index = np.asarray(requests.sampling_index, np.int32)
        adapters = [params.lora_path for params in requests.sampling]
        self.manager.send(
            PlannedRunReqInput(
                job_id=job_id,
                run=requests.run,
                sampling=[sampling_kwargs(params) for params in requests.sampling],
                sampling_index=index,
                seeds=np.asarray(requests.seeds, np.int64),
                num_logprobs=np.asarray(num_logprobs, np.int32)[index],
                require_reasoning=[params.require_reasoning for params in requests.sampling],
                lora_paths=adapters,
                lora_ids=self.manager.adapters_of_job(job_id, adapters),
                extra_keys=requests.namespaces and [name or None for name in requests.namespaces],
                num_prompt_logprobs=[-1 if p.prompt_logprobs is None else p.prompt_logprobs for p in requests.sampling],
                targets=requests.targets,
                label_ids=[list(params.label_token_ids) for params in requests.sampling],
                dimensions=[params.dimensions for params in requests.sampling] if self._info.embeds else None,
            )
        )

    async def receive(self, job_id: int) -> FinishedRequests:
        output = await self.manager.receive_outputs(job_id)
        return FinishedRequests(
            positions=output.positions,
            completions=completions_of(output),
            counters=output.counters,
            steps=output.steps,
        )

    def withdraw(self, job_id: int) -> None:
        self.manager.send(PlannedAbortReqInput(job_id=job_id, spares_running=True))

    def close_job(self, job_id: int, *, is_complete: bool) -> None:
        self.manager.close_job(job_id)
        if not is_complete:
            self.manager.send(PlannedAbortReqInput(job_id=job_id))
        self.manager.send(PlannedCloseReqInput(job_id=job_id))
