"""The process that hosts an engine: SGLang's tokenizer manager, and the parent of scheduler and detokenizer.

It does what the process that uses the engine asks for (`batchllm.host.messages`), and ends with it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import pickle
import pkgutil
import threading
import traceback
from multiprocessing.connection import Connection
from typing import Any

import setproctitle

from batchllm.errors import BatchLLMError, ConfigError, EngineDiedError, EngineError
from batchllm.host import logs, messages
from batchllm.offline.runtime import RuntimeInfo


def main(fd: int, parent_pid: int) -> None:
    """Host the engine that the first message asks for, until it or the driver ends.

    Args:
        fd: The connection to the driver.
        parent_pid: The process that this one was forked from.
    """
    from batchllm.srt.entrypoints import child_process
    from batchllm.srt.entrypoints.engine import SrtRuntime

    setproctitle.setproctitle("batchllm::engine")
    child_process.reset_signals()
    child_process.redirect(logs.ENGINE)
    # The template ends with the driver. Nobody else would end an engine that is only starting.
    child_process.end_with_parent(parent_pid)
    connection = Connection(fd)
    try:
        start = connection.recv()
    except EOFError:
        return
    try:
        if start.live_grace_s is not None:
            from batchllm.srt.entrypoints import live_host

            live_host.serve(start, connection)
            return
        runtime = _start(SrtRuntime, start)
    except Exception as error:  # whatever it is, the driver raises it
        traceback.print_exc()  # to the log
        if not isinstance(error, BatchLLMError):
            error = EngineError(f"the engine did not start: {type(error).__name__}: {error}")
        connection.send(messages.Failed(error))
        return
    child_process.outlive_parent()  # from now on the connection says when it ends, and there is time to clean up
    host = EngineHost(runtime, connection, info=runtime.info, engine=runtime.sglang_engine)
    try:
        runtime.loop.run_until_complete(host.serve())
    finally:
        runtime.shutdown()


def _start(make: Any, start: messages.Start) -> Any:
    scheduler_process = pkgutil.resolve_name(start.scheduler_process)
    model_path, server_args = arguments_of(start)
    return make(model_path, scheduler_process=scheduler_process, **server_args)


def arguments_of(start: messages.Start) -> tuple[str, dict[str, Any]]:
    """The model, and SGLang's server arguments and ours, that a message asks for; its environment variables are set.

    Raises:
        ConfigError: It names two models, or a flag is wrong.
    """
    os.environ.update(start.variables)
    server_args = dict(start.server_args)
    model_path = start.model_path
    if start.flags:
        from batchllm.srt.server_args import parse_server_flags

        given = parse_server_flags(start.flags)
        flagged = given.pop("model_path", None)
        if None not in (model_path, flagged) and model_path != flagged:
            raise ConfigError(f"-m {model_path} and --model-path {flagged} are two models; give one of them")
        model_path = flagged if model_path is None else model_path
        server_args = given | server_args
    if start.is_verbose:
        server_args.setdefault("log_level", "info")
    return start.default_model_path if model_path is None else model_path, server_args


class EngineHost:
    """Does what the messages of a connection ask of an engine.

    Args:
        runtime: The engine, a `batchllm.srt.managers.tokenizer_manager.ManagedRuntime`.
        connection: To whoever uses it.
        info: What to say of it.
        engine: SGLang's, for calls; None where there is no such object.
    """

    def __init__(self, runtime: Any, connection: Connection, *, info: RuntimeInfo, engine: Any = None) -> None:
        self._runtime = runtime
        self._info = info
        self._connection = connection
        self._jobs: dict[int, tuple[int, asyncio.Task[None]]] = {}
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._targets = {
            "tokenizer": runtime.tokenizer,
            "engine": engine,
            "manager": runtime.manager,
        }
        self._is_over = asyncio.Event()

    async def serve(self) -> None:
        """Serve until the user of the engine ends it, or goes."""
        self._connection.send(
            messages.Ready(
                info=self._info,
                has_tokenizer=self._runtime.tokenizer is not None,
                pid=os.getpid(),
                model_path=self._targets["manager"].server_args.model_path,
            )
        )
        manager = self._targets["manager"]
        manager.auto_create_handle_loop()
        manager.on_death = self._tell_death
        loop = asyncio.get_running_loop()
        threading.Thread(target=self._receive, args=(loop,), daemon=True).start()
        await self._is_over.wait()
        for task in [task for _, task in self._jobs.values()] + list(self._tasks.values()):
            task.cancel()

    def _receive(self, loop: asyncio.AbstractEventLoop) -> None:
        """In a thread: hand every message to the loop."""
        while True:
            try:
                message = self._connection.recv()
            except (EOFError, OSError):
                message = messages.Shutdown()
            loop.call_soon_threadsafe(self._handle, message)
            if isinstance(message, messages.Shutdown):
                return

    def _handle(self, message: Any) -> None:
        match message:
            case messages.OpenJob(job_id):
                self._open_job(job_id)
            case messages.Submit(job_id, requests):
                self._runtime.submit(self._jobs[job_id][0], requests)
            case messages.Withdraw(job_id):
                self._runtime.withdraw(self._jobs[job_id][0])
            case messages.CloseJob(job_id, is_complete):
                own_id, task = self._jobs.pop(job_id)
                task.cancel()
                self._runtime.close_job(own_id, is_complete=is_complete)
            case messages.GivePlanned(share):
                self._runtime.give_planned(share)
            case messages.Call():
                self._tasks[message.number] = asyncio.create_task(self._call(message))
            case messages.Generate():
                self._tasks[message.number] = asyncio.create_task(self._generate(message))
            case messages.Cancel(number):
                if number in self._tasks:
                    self._tasks[number].cancel()
            case messages.Shutdown():
                self._is_over.set()

    def _open_job(self, job_id: int) -> None:
        try:
            own_id = self._runtime.open_job()
        except EngineDiedError:
            return  # `_tell_death` has told
        self._jobs[job_id] = own_id, asyncio.create_task(self._forward(job_id, own_id))

    async def _forward(self, job_id: int, own_id: int) -> None:
        try:
            while True:
                self._send(messages.Finished(job_id, await self._runtime.receive(own_id)))
        except EngineDiedError:
            return

    async def _call(self, call: messages.Call) -> None:
        try:
            args, kwargs = messages.unpacked(call.arguments)
            result = getattr(self._targets[call.target], call.method)(*args, **kwargs)
            if asyncio.iscoroutine(result):
                result = await result
            self._send(messages.Reply(call.number, result))
        except Exception as error:  # whatever it is, it belongs to the caller
            self._send(messages.Reply(call.number, error=_portable(error)))
        finally:
            del self._tasks[call.number]

    async def _generate(self, request: messages.Generate) -> None:
        from sglang.srt.managers.io_struct import GenerateReqInput

        try:
            fields = messages.unpacked(request.fields)
            outputs = self._targets["manager"].generate_request(GenerateReqInput(**fields), None)
            async for output in outputs:
                self._send(messages.Piece(request.number, output))
            self._send(messages.Piece(request.number))
        except Exception as error:  # SGLang refuses with many kinds; whoever asked shall see it
            self._send(messages.Piece(request.number, error=_portable(error)))
        finally:
            del self._tasks[request.number]

    def _tell_death(self) -> None:
        self._send(messages.Died(str(self._targets["manager"].death)))

    def _send(self, message: Any) -> None:
        try:
            self._connection.send(message)
        except OSError:
            self._is_over.set()  # nobody is there any more


def _portable(error: Exception) -> Exception:
    """An exception that the other side can read: one of Python's own or ours, else its words."""
    if isinstance(error, BatchLLMError) or type(error).__module__ == "builtins":
        with contextlib.suppress(Exception):  # what it holds cannot travel
            pickle.loads(pickle.dumps(error))
            return error
    return EngineError(f"{type(error).__name__}: {error}")
