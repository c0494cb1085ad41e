"""SGLang's offline engine with our processes, as a `batchllm.offline.runtime.Runtime`.

(Upstream: ``srt/entrypoints/engine.py``.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shutil
import signal
import tempfile
import threading
from collections.abc import AsyncGenerator, Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import psutil
from sglang.srt.entrypoints.engine import Engine
from sglang.srt.managers.io_struct import ShutdownReq
from sglang.srt.server_args import PortArgs, ServerArgs

from batchllm.errors import EngineError
from batchllm.offline.runtime import FinishedRequests, RunRequests, RuntimeInfo
from batchllm.request import Completion, SamplingParams, TokenLogprob
from batchllm.srt import compat
from batchllm.srt.detokenizer_manager import run_detokenizer_process
from batchllm.srt.io_struct import (
    PlannedAbortReqInput,
    PlannedBatchOutput,
    PlannedCloseReqInput,
    PlannedRunReqInput,
)
from batchllm.srt.scheduler import run_scheduler_process
from batchllm.srt.server_args import kv_limit_tokens, make_server_args
from batchllm.srt.tokenizer_manager import init_tokenizer_manager
from batchllm.tokenizer import Tokenizer

_SOCKET_DIR_PREFIX = "batchllm-"
_GRACE_S = 5
_STOP_TIMEOUT_S = 30
T = TypeVar("T")


class _PlannedEngine(Engine):
    """SGLang's engine, started with our three processes and leaving nothing behind."""

    init_tokenizer_manager_func = staticmethod(init_tokenizer_manager)
    run_scheduler_process_func = staticmethod(run_scheduler_process)
    run_detokenizer_process_func = staticmethod(run_detokenizer_process)

    def __init__(self, server_args: ServerArgs) -> None:
        self.socket_dir: str | None = None
        self.tokenizer_manager: Any = None
        self._children: list[psutil.Process] = []
        try:
            super().__init__(server_args=server_args)
        except BaseException:
            self.shutdown()
            raise

    def _launch_subprocesses(self, server_args: ServerArgs, **kwargs: Any) -> Any:
        # Upstream makes socket files in the temporary directory and never removes them.
        _remove_dead_socket_dirs()
        self.socket_dir = tempfile.mkdtemp(prefix=f"{_SOCKET_DIR_PREFIX}{os.getpid()}-")
        before, tempfile.tempdir = tempfile.tempdir, self.socket_dir
        try:
            port_args = PortArgs.init_new(server_args)
        finally:
            tempfile.tempdir = before
        self.port_args = port_args
        before_us = {child.pid for child in psutil.Process().children()}
        try:
            # A kernel library makes a temporary directory in every process at import and leaves it there.
            quiet = os.environ.get("PYTHONWARNINGS", "ignore::UserWarning")
            with _environment(CUDA_TILE_TEMP_DIR=self.socket_dir, PYTHONWARNINGS=quiet):
                return super()._launch_subprocesses(server_args=server_args, port_args=port_args, **kwargs)
        finally:
            # Not the resource tracker of multiprocessing, which serves this whole process.
            self._children = [
                child
                for child in psutil.Process().children()
                if child.pid not in before_us and "resource_tracker" not in _command(child)
            ]

    def shutdown(self) -> None:
        """End the processes that this engine started and remove its sockets. Upstream ends *all* children.

        The scheduler is asked first: a process that ends by itself takes its semaphores along.
        """
        if self.socket_dir is None:
            return
        manager = self.tokenizer_manager
        if manager is not None:
            if manager._subprocess_watchdog is not None:
                manager._subprocess_watchdog.stop()
            schedulers = [child for child in self._children if "scheduler" in _command(child)]
            if not manager.is_dead and all(map(_is_alive, schedulers)):
                with contextlib.suppress(TimeoutError):  # one that is just dying takes no message any more
                    asking = asyncio.wait_for(manager.send_and_wait(ShutdownReq()), _GRACE_S)
                    self.loop.run_until_complete(asking)
                psutil.wait_procs(schedulers, timeout=_GRACE_S)
        for child in self._children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(self._children, timeout=_STOP_TIMEOUT_S)
        if manager is not None:
            for socket in (manager.send_to_scheduler, manager.recv_from_detokenizer, self.send_to_rpc):
                socket.close(linger=0)
        shutil.rmtree(self.socket_dir, ignore_errors=True)
        self.socket_dir = None


def _remove_dead_socket_dirs() -> None:
    """Directories of engines whose process was killed before it could remove its own."""
    for path in Path(tempfile.gettempdir()).glob(f"{_SOCKET_DIR_PREFIX}*-*"):
        pid = path.name.removeprefix(_SOCKET_DIR_PREFIX).partition("-")[0]
        if not pid.isdecimal() or psutil.pid_exists(int(pid)):
            continue
        with contextlib.suppress(FileNotFoundError):  # another engine that starts does the same
            if path.stat().st_uid == os.getuid():
                shutil.rmtree(path)


def _command(process: psutil.Process) -> str:
    """Command line; empty for a process that is gone."""
    try:
        return " ".join(process.cmdline())
    except psutil.NoSuchProcess:
        return ""


def _is_alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


class SrtRuntime:
    """A running SGLang with our scheduler, cache, tokenizer and detokenizer managers.

    Args:
        model_path: A Hugging Face model: a directory or a hub name.
        **server_args: Any of SGLang's server arguments.

    Raises:
        ConfigError: An argument is wrong or not supported; nothing was started.
        EngineError: The processes did not come up.
    """

    def __init__(self, model_path: str, **server_args: Any) -> None:
        compat.check()
        args = make_server_args(model_path, **server_args)
        args.override("batchllm", custom_sigquit_handler=_child_failed)
        with _launch_errors():
            self.sglang_engine = _PlannedEngine(args)
        manager = self.sglang_engine.tokenizer_manager
        init_info = self.sglang_engine._scheduler_init_result.scheduler_infos[0]
        self.loop: asyncio.AbstractEventLoop = self.sglang_engine.loop
        self._manager = manager
        self._tokenizer = None if manager.tokenizer is None else Tokenizer(manager.tokenizer)
        self._job_ids = count()
        self._info = RuntimeInfo(
            model_name=args.served_model_name,
            context_len=manager.context_len,
            vocab_size=manager.model_config.vocab_size,
            kv_capacity_tokens=init_info["max_total_num_tokens"],
            kv_limit_tokens=kv_limit_tokens(args, init_info["max_total_num_tokens"]),
            # The last token of an answer is never stored.
            num_unstored_tokens=1 if args.disable_overlap_schedule else 0,
            page_size=args.page_size,
            random_seed=args.random_seed,
            has_seeded_sampling=args.sampling_backend != "flashinfer",
            has_grammar=args.grammar_backend != "none" and not args.skip_tokenizer_init,
        )

    @property
    def info(self) -> RuntimeInfo:
        return self._info

    @property
    def tokenizer(self) -> Tokenizer | None:
        return self._tokenizer

    def open_job(self) -> int:
        job_id = next(self._job_ids)
        self._manager.open_job(job_id)
        return job_id

    def submit(self, job_id: int, requests: RunRequests) -> None:
        num_logprobs = [p.top_logprobs if p.logprobs else -1 for p in requests.sampling]
        index = np.asarray(requests.sampling_index, np.int32)
        self._manager.send(
            PlannedRunReqInput(
                job_id=job_id,
                run=requests.run,
                sampling=[_sampling_kwargs(params) for params in requests.sampling],
                sampling_index=index,
                seeds=np.asarray(requests.seeds, np.int64),
                num_logprobs=np.asarray(num_logprobs, np.int32)[index],
                extra_keys=requests.namespaces and [name or None for name in requests.namespaces],
            )
        )

    async def receive(self, job_id: int) -> FinishedRequests:
        output = await self._manager.receive_outputs(job_id)
        return FinishedRequests(
            positions=output.positions,
            completions=_completions(output),
            num_computed_prompt_tokens=output.counters.num_computed_prompt_tokens,
            num_retractions=output.counters.num_retractions,
            peak_kv_tokens=output.counters.peak_kv_tokens,
            prediction=output.counters.prediction,
            steps=output.steps,
        )

    def withdraw(self, job_id: int) -> None:
        self._manager.send(PlannedAbortReqInput(job_id=job_id, spares_running=True))

    def close_job(self, job_id: int, *, is_complete: bool) -> None:
        self._manager.close_job(job_id)
        if not is_complete:
            self._manager.send(PlannedAbortReqInput(job_id=job_id))
        self._manager.send(PlannedCloseReqInput(job_id=job_id))

    def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
        try:
            while True:
                try:
                    yield self.loop.run_until_complete(anext(stream))
                except StopAsyncIteration:
                    return
        finally:
            if not self.loop.is_closed():
                self.loop.run_until_complete(stream.aclose())

    def shutdown(self) -> None:
        """End all processes of this runtime. Doing it twice does nothing."""
        if self.loop.is_closed():
            return
        self.sglang_engine.shutdown()
        tasks = asyncio.all_tasks(self.loop)
        for task in tasks:
            task.cancel()
        self.loop.run_until_complete(asyncio.gather(*tasks, return_exceptions=True))
        self.loop.close()


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Set environment variables for the processes started meanwhile."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _child_failed(signum: int, frame: Any) -> None:
    """A child that fails while the engine starts sends SIGQUIT; upstream's handler would kill this process."""
    raise EngineError("a runtime process failed to start; its log is above")


@contextlib.contextmanager
def _launch_errors() -> Iterator[None]:
    """Say what failed, and put the signal handler back."""
    is_main = threading.current_thread() is threading.main_thread()
    before = signal.getsignal(signal.SIGQUIT)
    upstream_log = logging.getLogger("sglang.srt.entrypoints.engine")
    upstream_log.addFilter(_is_not_about_our_handler)
    try:
        yield
    except (RuntimeError, EOFError) as error:
        raise EngineError(f"the runtime did not start: {error}") from error
    finally:
        upstream_log.removeFilter(_is_not_about_our_handler)
        if is_main:
            signal.signal(signal.SIGQUIT, before)


def _is_not_about_our_handler(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Using custom SIGQUIT handler")


def _sampling_kwargs(params: SamplingParams) -> dict[str, Any]:
    """As keyword arguments of SGLang's ``SamplingParams``."""
    return {
        "max_new_tokens": params.max_new_tokens,
        "min_new_tokens": params.min_new_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k,
        "min_p": params.min_p,
        "frequency_penalty": params.frequency_penalty,
        "presence_penalty": params.presence_penalty,
        "repetition_penalty": params.repetition_penalty,
        "stop": list(params.stop) or None,
        "stop_token_ids": set(params.stop_token_ids) or None,
        "ignore_eos": params.ignore_eos,
        "json_schema": params.json_schema,
        "regex": params.regex,
        "skip_special_tokens": params.skip_special_tokens,
    }


def _completions(output: PlannedBatchOutput) -> list[Completion]:
    texts = output.texts if output.texts is not None else [""] * len(output.positions)
    completions = []
    for i, reason in enumerate(output.finish_reasons):
        completions.append(
            Completion(
                index=0,
                text=texts[i],
                output_ids=output.output_ids[i],
                finish_reason=reason["type"],
                prompt_tokens=output.prompt_tokens[i],
                cached_tokens=output.cached_tokens[i],
                matched_stop=reason.get("matched"),
                logprobs=_token_logprobs(output.logprobs[i], output.output_ids[i]),
                error=reason.get("message"),
            )
        )
    return completions


def _token_logprobs(logprobs: Any, output_ids: Sequence[int]) -> tuple[TokenLogprob, ...] | None:
    if logprobs is None:
        return None
    return tuple(
        TokenLogprob(
            token_id=token_id,
            logprob=logprob,
            top=tuple(zip(top_ids, top_logprobs, strict=True)),
        )
        for token_id, (logprob, top_logprobs, top_ids) in zip(output_ids, logprobs, strict=True)
    )
