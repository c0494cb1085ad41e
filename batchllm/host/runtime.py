"""An engine in processes of its own, as a runtime. It may be used from any thread, and needs nothing of its caller's.

Messages arrive in a thread; jobs are fed and received on an event loop in another one. Both are this object's own.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import threading
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from multiprocessing.connection import Connection
from typing import Any, TypeVar

import psutil

from batchllm.errors import EngineDiedError, EngineError
from batchllm.host import messages, own_folder, template
from batchllm.host.tokenizer import RemoteTokenizer
from batchllm.offline.compile_ahead import compile_ahead
from batchllm.offline.event_loop import LoopThread, iterate_on
from batchllm.offline.runtime import FinishedRequests, RunRequests, RuntimeInfo

SCHEDULER_PROCESS = "batchllm.srt.managers.scheduler_process:run_scheduler_process"
"""Target of the scheduler's process."""
_STOP_TIMEOUT_S = 30
T = TypeVar("T")


class HostedRuntime:
    """A running SGLang with our parts, in processes of its own.

    Args:
        model_path: A Hugging Face model, a directory or a hub name; None where ``flags`` name one, or the default.
        default_model_path: The model where nothing names one.
        flags: SGLang's command line flags.
        is_verbose: Whether its processes print to standard error; if not, only errors are shown.
        live_grace_s: Have it answer live requests by HTTP too, where ``server_args`` say (``host``, ``port``), and give
            them so many seconds to finish at the end; None: it answers none.
        **server_args: SGLang's server arguments, and ours.

    Attributes:
        model_path: The model that is loaded.
        host_pid: The process that hosts the engine, and the parent of its other processes.

    Raises:
        ConfigError: An argument is wrong or not supported.
        EngineError: The processes did not come up.
    """

    def __init__(
        self,
        model_path: str | None,
        *,
        default_model_path: str = "",
        flags: Sequence[str] = (),
        is_verbose: bool = False,
        live_grace_s: float | None = None,
        **server_args: Any,
    ) -> None:
        self._is_up = True
        self._owner_pid = os.getpid()
        self._template = template.acquire(is_verbose=is_verbose or "log_level" in server_args)
        self._compiler = threading.Thread(target=compile_ahead, name="batchllm-compile", daemon=True)
        self._loop_thread: LoopThread | None = None
        self._connection: Connection | None = None
        self._death: EngineDiedError | None = None
        try:
            self._connection = self._template.fork()
            start = messages.Start(
                model_path=model_path,
                default_model_path=default_model_path,
                flags=list(flags),
                server_args=server_args,
                scheduler_process=SCHEDULER_PROCESS,
                is_verbose=is_verbose,
                variables=template.own_variables(),
                live_grace_s=live_grace_s,
            )
            # There is nothing else to do meanwhile, and the first plan takes seconds where nothing has been compiled.
            self._compiler.start()
            ready = self._wait_until_ready(start)
        except BaseException:
            self._is_up = False
            self._release()
            raise
        self.model_path = ready.model_path
        self.info: RuntimeInfo = ready.info
        self.host_pid = ready.pid
        self._host = psutil.Process(ready.pid)
        self.tokenizer = RemoteTokenizer(partial(self.call, "tokenizer")) if ready.has_tokenizer else None
        self._numbers = itertools.count()
        self._send_lock = threading.Lock()
        self._outputs: dict[int, asyncio.Queue[FinishedRequests | EngineDiedError]] = {}
        self._pieces: dict[int, asyncio.Queue[messages.Piece | EngineDiedError]] = {}
        self._calls: dict[int, Future[Any]] = {}
        self._loop_thread = LoopThread("batchllm-jobs")
        self._receiver = threading.Thread(target=self._receive, name="batchllm-receive", daemon=True)
        self._receiver.start()

    @property
    def loop(self) -> asyncio.AbstractEventLoop:
        """The event loop on which jobs are fed and received.

        Raises:
            EngineError: This process is a fork of the one that has it.
        """
        self._check_owner()
        assert self._loop_thread is not None
        return self._loop_thread.loop

    def _check_owner(self) -> None:
        """A fork has the connection and none of the threads: it would wait for ever, and disturb the owner."""
        if os.getpid() != self._owner_pid:
            raise EngineError(
                f"the engine is process {self._owner_pid}'s, and this one, {os.getpid()}, is a fork of that; make an "
                "engine here, or ask there"
            )

    # Jobs, on the loop

    def open_job(self) -> int:
        if self._death is not None:
            raise self._death
        job_id = next(self._numbers)
        self._outputs[job_id] = asyncio.Queue()
        self._send(messages.OpenJob(job_id))
        return job_id

    def submit(self, job_id: int, requests: RunRequests) -> None:
        self._send(messages.Submit(job_id, requests))

    async def receive(self, job_id: int) -> FinishedRequests:
        output = await self._outputs[job_id].get()
        if isinstance(output, EngineDiedError):
            raise output
        return output

    def withdraw(self, job_id: int) -> None:
        self._send(messages.Withdraw(job_id))

    def close_job(self, job_id: int, *, is_complete: bool) -> None:
        del self._outputs[job_id]
        self._send(messages.CloseJob(job_id, is_complete))

    def iterate(self, stream: AsyncGenerator[T, None]) -> Iterator[T]:
        return iterate_on(self.loop, stream)

    def give_planned(self, share: float) -> None:
        self._send(messages.GivePlanned(share))

    # Requests outside jobs

    async def generate(self, **fields: Any) -> AsyncIterator[dict[str, Any]]:
        """Run a request outside any plan, by SGLang's own path. On the loop.

        Args:
            **fields: Fields of SGLang's ``GenerateReqInput``.

        Yields:
            What SGLang yields: its pieces with ``stream=True``, else one answer.

        Raises:
            EngineDiedError: A process of the engine has ended.
            Exception: What SGLang raises for a request that it refuses.
        """
        if self._death is not None:
            raise self._death
        request = messages.Generate(next(self._numbers), messages.packed(fields))
        number = request.number
        pieces: asyncio.Queue[messages.Piece | EngineDiedError] = asyncio.Queue()
        self._pieces[number] = pieces
        self._send(request)
        is_over = False
        try:
            while True:
                piece = await pieces.get()
                if isinstance(piece, EngineDiedError) or piece.error is not None or piece.output is None:
                    is_over = True
                    if isinstance(piece, EngineDiedError):
                        raise piece
                    if piece.error is not None:
                        raise piece.error
                    return
                yield piece.output
        finally:
            del self._pieces[number]
            if not is_over:
                self._send(messages.Cancel(number))

    def call(self, target: str, method: str, *args: Any, **kwargs: Any) -> Any:
        """Call a method in the engine's process, and wait for its result. From any thread but the loop's.

        Args:
            target: ``engine``: SGLang's engine; ``manager``: its tokenizer manager; ``tokenizer``: ours.
            method: Name of the method.
            *args: Positional arguments.
            **kwargs: Keyword arguments.

        Raises:
            EngineDiedError: A process of the engine has ended.
            Exception: What the method raises.
        """
        return self.call_soon(target, method, *args, **kwargs).result()

    def call_soon(self, target: str, method: str, *args: Any, **kwargs: Any) -> Future[Any]:
        """Like `call`, from any thread; returns at once with a future of the result."""
        self._check_owner()
        call = messages.Call(next(self._numbers), target, method, messages.packed((args, kwargs)))
        future: Future[Any] = Future()
        future.set_running_or_notify_cancel()  # who waits may be cancelled; what was asked is not
        self._calls[call.number] = future
        if self._death is not None:
            self._fail_calls(self._death)
        else:
            self._send(call)
        return future

    # The end

    def shutdown(self) -> None:
        """End all processes of this runtime. Doing it twice does nothing, and neither does a fork of this process."""
        if not self._is_up or os.getpid() != self._owner_pid:
            return
        self._is_up = False
        self._send(messages.Shutdown())
        processes = [self._host]
        try:
            with contextlib.suppress(psutil.NoSuchProcess):
                processes += self._host.children(recursive=True)  # they end with their parent, if not before
            psutil.wait_procs([self._host], timeout=_STOP_TIMEOUT_S)
        finally:  # interrupted, too: nobody would end them before this process ends
            for process in processes:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            psutil.wait_procs(processes, timeout=_STOP_TIMEOUT_S)
            self._release()

    def _release(self) -> None:
        if self._connection is not None and self._loop_thread is None:
            self._connection.close()  # else the receiver does
        if self._loop_thread is not None:
            self._receiver.join(_STOP_TIMEOUT_S)
            self._loop_thread.close()
        if self._compiler.ident is not None:  # Python must not end while it compiles
            self._compiler.join()
        template.release(self._template)
        # Whoever has ended the engine's process, it may not have come to remove its own.
        own_folder.remove_dead()

    # The wire

    def _wait_until_ready(self, start: messages.Start) -> messages.Ready:
        assert self._connection is not None
        try:
            self._connection.send(start)
            message = self._connection.recv()
        except (EOFError, OSError) as error:
            raise EngineError(f"the engine did not start: its process has ended{self._show_logs()}") from error
        if isinstance(message, messages.Failed):
            if isinstance(message.error, EngineError):
                raise EngineError(f"{message.error}{self._show_logs()}") from message.error
            raise message.error
        assert isinstance(message, messages.Ready)
        return message

    def _show_logs(self) -> str:
        """Show what the engine's processes have printed; returns their last exception, to go behind a message."""
        if self._template.logs is None:
            return "; its log is above"
        cause = self._template.logs.cause()
        self._template.logs.show()
        return "" if cause is None else f": {cause}"

    def _send(self, message: Any) -> None:
        """Send, unless nobody is there any more: then `_receive` says so."""
        assert self._connection is not None
        with self._send_lock, contextlib.suppress(OSError):
            self._connection.send(message)

    def _receive(self) -> None:
        """Hand every message to the caller that waits for it. Runs in a thread."""
        assert self._connection is not None
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                self._die("the engine's process has ended")
                self._connection.close()
                return
            match message:
                case messages.Finished(job_id, requests):
                    self.loop.call_soon_threadsafe(self._deliver, self._outputs, job_id, requests)
                case messages.Piece(number):
                    self.loop.call_soon_threadsafe(self._deliver, self._pieces, number, message)
                case messages.Reply(number, result, error):
                    future = self._calls.pop(number, None)  # None: the engine has died since it was asked
                    if future is None:
                        continue
                    if error is None:
                        future.set_result(result)
                    else:
                        future.set_exception(error)
                case messages.Died(reason):
                    self._die(reason)

    def _die(self, reason: str) -> None:
        if self._death is not None:
            return
        if self._is_up:
            reason += self._show_logs()
        self._death = EngineDiedError(reason)
        self.loop.call_soon_threadsafe(self._fail_jobs, self._death)
        self._fail_calls(self._death)

    def _fail_jobs(self, death: EngineDiedError) -> None:
        queues: list[asyncio.Queue[Any]] = [*self._outputs.values(), *self._pieces.values()]
        for queue in queues:
            queue.put_nowait(death)

    def _fail_calls(self, death: EngineDiedError) -> None:
        while self._calls:
            with contextlib.suppress(KeyError):
                self._calls.popitem()[1].set_exception(death)

    @staticmethod
    def _deliver(queues: dict[int, asyncio.Queue[Any]], number: int, item: Any) -> None:
        if number in queues:  # else nobody waits for it any more
            queues[number].put_nowait(item)
