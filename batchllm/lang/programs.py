"""Runs programs, one or thousands, so that what they ask is gathered in waves. (Upstream: ``lang/interpreter.py``.)

Knows how `sglang.lang` runs a function and what a wave is. Must not know who answers.

A program has a thread while its own code runs or waits for a variable; where a program reads none, a few threads serve
thousands. Requests, forks and what follows them need none.

INVARIANT: a program that raises takes no other along, and every program that was started ends before its batch does.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import tqdm
from sglang.lang import interpreter
from sglang.lang.interpreter import ProgramState, run_internal

from batchllm.errors import ConfigError
from batchllm.lang.executor import WaveExecutor
from batchllm.lang.waves import Parked, Waves

MAX_PROGRAMS = 2048
"""Programs of a batch that are under way at once, unless told otherwise; also the most threads it takes."""


class RunsInWaves:
    """What a backend of `sglang.lang` is that runs programs itself: `install` makes `SglFunction` ask it.

    Attributes:
        waves: Where requests of its programs go. Whoever inherits sets it.
    """

    waves: Waves

    def run_program(
        self,
        program: Any,
        func_args: Sequence[Any],
        func_kwargs: dict[str, Any],
        default_sampling_para: Any,
        *,
        sync: bool,
    ) -> ProgramState:
        """Run a program's code on this thread; its requests go on when it is waited for."""
        is_nested = self.waves.is_in_program
        if not is_nested:
            self.waves.reserve()
            self.waves.begin(is_pooled=False)
        try:
            state = self._run_code(program, func_args, func_kwargs, default_sampling_para)
        finally:
            if not is_nested:
                self.waves.end()
        if sync:
            state.sync()
        return state

    def run_program_batch(
        self,
        program: Any,
        batch_arguments: Sequence[dict[str, Any]],
        default_sampling_para: Any,
        *,
        num_threads: int | str,
        progress_bar: bool,
    ) -> Iterator[ProgramState]:
        """Run a program on each of many arguments, and yield the states in their order.

        Args:
            program: An ``SglFunction``.
            batch_arguments: Keyword arguments of each run.
            default_sampling_para: ``SglSamplingParams``.
            num_threads: Most programs under way at once; ``"auto"`` for `MAX_PROGRAMS`.
            progress_bar: Show one on stderr.

        Raises:
            ConfigError: ``num_threads`` is neither.
            Exception: What a program raised, in its turn; the others run to their end.
        """
        max_programs = MAX_PROGRAMS if num_threads == "auto" else num_threads
        if not isinstance(max_programs, int) or max_programs < 1:
            raise ConfigError(f'num_threads {num_threads!r}: give an integer from 1, or "auto"')

        def run(index: int) -> ProgramState:
            return self._run_code(program, (), dict(batch_arguments[index]), default_sampling_para)

        batch = _Batch(self.waves, run, len(batch_arguments))
        pool = ThreadPoolExecutor(min(max_programs, len(batch_arguments)), thread_name_prefix="program")
        bar = tqdm.tqdm(total=len(batch_arguments), disable=not progress_bar)
        with bar, pool, batch.ending():
            batch.start(pool, max_programs, bar)
            for index in range(len(batch_arguments)):
                yield batch.result(index)

    def _run_code(
        self, program: Any, func_args: Sequence[Any], func_kwargs: dict[str, Any], default_sampling_para: Any
    ) -> ProgramState:
        arguments = func_kwargs | program.bind_arguments
        executor = WaveExecutor(self.waves, self, arguments, default_sampling_para, program.num_api_spec_tokens)
        state = ProgramState(executor)
        run_internal(state, program, func_args, arguments, sync=False)
        return state


class _Batch:
    """Programs of one ``run_batch``: at most so many under way, the next one begun when one has ended.

    Args:
        waves: Where their requests go.
        run: Runs the code of the program of that index.
        num_programs: How many there are.
    """

    def __init__(self, waves: Waves, run: Any, num_programs: int) -> None:
        self._waves = waves
        self._run = run
        self._num_programs = num_programs
        self._num_begun = 0
        self._num_under_way = 0
        self._results: dict[int, Future[ProgramState]] = {}
        self._waiters: list[Parked] = []

    def start(self, pool: ThreadPoolExecutor, max_programs: int, bar: Any) -> None:
        """Begin as many programs as may be under way."""
        self._pool = pool
        self._bar = bar
        for _ in range(max_programs):
            self._begin_next()

    def result(self, index: int) -> ProgramState:
        """Wait for a program's end and forget it; raises what it raised."""
        self._waves.wait_for(self._waiters, lambda: index in self._results)
        return self._results.pop(index).result()

    @contextlib.contextmanager
    def ending(self) -> Iterator[None]:
        """Wait at the end for what is under way: all of the batch after a program's exception, as upstream does, and
        otherwise (interrupted, or the rest is not wanted) only for what has begun.
        """
        try:
            yield
        except Exception:
            self._wait_for_all()
            raise
        finally:
            with self._waves.lock:
                self._num_programs = self._num_begun
            self._wait_for_all()

    def _wait_for_all(self) -> None:
        self._waves.wait_for(self._waiters, lambda: self._num_under_way == 0 and self._num_begun == self._num_programs)

    def _begin_next(self) -> None:
        with self._waves.lock:
            if self._num_begun == self._num_programs:
                return
            index = self._num_begun
            self._num_begun += 1
            self._num_under_way += 1
        self._waves.reserve()
        try:
            self._pool.submit(self._run_one, index)
        except RuntimeError:  # no thread could be started, and one of those that were takes the program up
            if index == 0:
                self._num_begun = self._num_programs = self._num_under_way = 0
                raise

    def _run_one(self, index: int) -> None:
        result: Future[ProgramState] = Future()
        self._waves.begin(is_pooled=True)
        try:
            state = self._run(index)
        except BaseException as error:  # SystemExit too reaches who waits, as from any future
            result.set_exception(error)
            self._finish(index, result)
        else:
            result.set_result(state)
            state.stream_executor.call_when_idle(functools.partial(self._finish, index, result))
        finally:
            self._waves.end()

    def _finish(self, index: int, result: Future[ProgramState]) -> None:
        self._begin_next()
        self._bar.update()
        with self._waves.lock:
            self._results[index] = result
            self._num_under_way -= 1
            self._waves.wake(self._waiters)


def install() -> None:
    """Make `SglFunction.run` and ``run_batch`` ask a backend that runs in waves; other backends are served as ever.

    Doing it twice does nothing.
    """
    if not hasattr(interpreter.run_program_batch, "__wrapped__"):
        interpreter.run_program = _make_run_program(interpreter.run_program)
        interpreter.run_program_batch = _make_run_program_batch(interpreter.run_program_batch)


def _make_run_program(upstream: Any) -> Any:
    @functools.wraps(upstream)
    def run_program(
        program: Any,
        backend: Any,
        func_args: Any,
        func_kwargs: Any,
        default_sampling_para: Any,
        stream: bool,
        sync: bool = False,
        use_thread: bool = True,
    ) -> Any:
        ours = getattr(backend, "endpoint", backend)
        if stream or not isinstance(ours, RunsInWaves):
            return upstream(program, backend, func_args, func_kwargs, default_sampling_para, stream, sync, use_thread)
        return ours.run_program(program, func_args, func_kwargs, default_sampling_para, sync=sync)

    return run_program


def _make_run_program_batch(upstream: Any) -> Any:
    @functools.wraps(upstream)
    def run_program_batch(
        program: Any,
        backend: Any,
        batch_arguments: Any,
        default_sampling_para: Any,
        num_threads: Any,
        progress_bar: bool,
        generator_style: bool = False,
    ) -> Any:
        ours = getattr(backend, "endpoint", backend)
        if not isinstance(ours, RunsInWaves):
            return upstream(
                program,
                backend,
                batch_arguments,
                default_sampling_para,
                num_threads,
                progress_bar,
                generator_style,
            )
        states = ours.run_program_batch(
            program, batch_arguments, default_sampling_para, num_threads=num_threads, progress_bar=progress_bar
        )
        return states if generator_style else list(states)

    return run_program_batch
