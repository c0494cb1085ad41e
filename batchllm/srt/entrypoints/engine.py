"""SGLang's offline engine with our processes, where it is hosted. Runs in the engine's process. (Upstream:
``srt/entrypoints/engine.py``.)
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import threading
from collections.abc import Callable, Iterator
from typing import Any

from sglang.srt.entrypoints.engine import Engine
from sglang.srt.server_args import ServerArgs

from batchllm.errors import ConfigError, EngineError
from batchllm.srt import compat
from batchllm.srt.entrypoints.processes import EngineProcesses
from batchllm.srt.managers.detokenizer_manager import run_detokenizer_process
from batchllm.srt.managers.scheduler_process import run_scheduler_process
from batchllm.srt.managers.tokenizer_manager import ManagedRuntime, init_tokenizer_manager
from batchllm.srt.server_args import make_server_args


class _PlannedEngine(Engine):
    """SGLang's engine, started with our three processes and leaving nothing behind."""

    init_tokenizer_manager_func = staticmethod(init_tokenizer_manager)
    run_detokenizer_process_func = staticmethod(run_detokenizer_process)

    def __init__(self, server_args: ServerArgs, scheduler_process: Callable[..., None]) -> None:
        self.run_scheduler_process_func = scheduler_process
        self.tokenizer_manager: Any = None
        self._processes = EngineProcesses()
        try:
            super().__init__(server_args=server_args)
        except BaseException:
            self.shutdown()
            raise

    def _launch_subprocesses(self, server_args: ServerArgs, **kwargs: Any) -> Any:
        with self._processes.starting(server_args):
            return super()._launch_subprocesses(server_args=server_args, **kwargs)

    def shutdown(self) -> None:
        """End the processes that this engine started and remove its sockets. Upstream ends *all* children."""
        manager = self.tokenizer_manager
        if not self._processes.are_up:
            return
        if manager is not None:
            self.loop.run_until_complete(self._processes.ask_to_end(manager))
            self.send_to_rpc.close(linger=0)
        self._processes.end(manager)


class SrtRuntime(ManagedRuntime):
    """A running SGLang with our scheduler, cache, tokenizer and detokenizer managers.

    Args:
        model_path: A Hugging Face model: a directory or a hub name.
        scheduler_process: Target of the scheduler's process.
        **server_args: Any of SGLang's server arguments.

    Raises:
        ConfigError: An argument is wrong or not supported; nothing was started.
        EngineError: The processes did not come up.
    """

    def __init__(
        self, model_path: str, *, scheduler_process: Callable[..., None] = run_scheduler_process, **server_args: Any
    ) -> None:
        compat.check_once()
        args = make_server_args(model_path, **server_args)
        _check_offline(args)
        with launch_errors(args):
            self.sglang_engine = _PlannedEngine(args, scheduler_process)
        self.loop: asyncio.AbstractEventLoop = self.sglang_engine.loop
        init_info = self.sglang_engine._scheduler_init_result.scheduler_infos[0]
        engine = self.sglang_engine
        super().__init__(engine.tokenizer_manager, engine.template_manager, args, init_info)

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


def _check_offline(args: ServerArgs) -> None:
    """Refuse what SGLang does to requests that come one by one."""
    if args.preferred_sampling_params is not None:
        raise ConfigError("--preferred-sampling-params: batches do not read it; give --sampling, or sampling_params")
    if args.allow_auto_truncate:
        raise ConfigError("--allow-auto-truncate: a batch refuses a prompt that is too long, by its row; drop the flag")


def _child_failed(signum: int, frame: Any) -> None:
    """A child that fails while the engine starts sends SIGQUIT; upstream's handler would kill this process."""
    raise EngineError("a process of the engine failed to start; its log has the reason")


@contextlib.contextmanager
def launch_errors(args: ServerArgs) -> Iterator[None]:
    """Say what failed while processes were started with these arguments, and put the signal handler back.

    Raises:
        EngineError: Something did.
    """
    args.override("batchllm", custom_sigquit_handler=_child_failed)
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
