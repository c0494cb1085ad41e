"""Executes a program's expressions without a thread of its own. (Upstream: ``lang/interpreter.py``.)

Knows `sglang.lang`, and that what an expression asks is answered later. Must not know who answers.

Upstream gives every executor, forks too, a thread that blocks in each request. Here, whoever brings news (a new
expression, an answer) executes as far as it goes; only the thread that runs the program's own code ever waits.

INVARIANT: the expressions of an executor run one after the other, in the order of the program; after one that failed
none does, and every variable that was to come is released, as upstream does.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable
from typing import Any

from sglang.lang.interpreter import StreamExecutor
from sglang.lang.ir import SglConcateAndAppend, SglExprList

from batchllm.lang.bodies import Answers, Asked
from batchllm.lang.waves import Ask, Parked, Waves

logger = logging.getLogger(__name__)


class WaveExecutor(StreamExecutor):
    """A `StreamExecutor` whose requests go into waves.

    Args:
        waves: Where they go.
        backend: A backend of `sglang.lang`; gives the chat template and the like.
        arguments: Arguments of the program.
        default_sampling_para: ``SglSamplingParams``.
        num_api_spec_tokens: Tokens that the program speculates with.
    """

    def __init__(
        self,
        waves: Waves,
        backend: Any,
        arguments: dict[str, Any],
        default_sampling_para: Any,
        num_api_spec_tokens: int | None = None,
    ) -> None:
        self._waves = waves
        self._exprs: deque[Any] = deque()
        self._is_busy = False
        self._waiters: list[Parked] = []
        self._when_idle: list[Callable[[], None]] = []
        super().__init__(
            Answers(backend),
            arguments,
            default_sampling_para,
            chat_template=None,
            stream=False,
            num_api_spec_tokens=num_api_spec_tokens,
            use_thread=False,
        )

    def submit(self, expr: Any) -> None:
        self._init_var_event(expr)
        if isinstance(expr, SglConcateAndAppend):  # it reads other executors, which can be waited for only here
            for state in expr.states:
                state.stream_executor.sync()
        with self._waves.lock:
            if self.error_ is not None:
                self._release_variables()
                return
            self._exprs.append(expr)
            if self._is_busy:
                return
            self._is_busy = True
        self._go_on()

    def sync(self) -> None:
        self._waves.wait_for(self._waiters, lambda: not self._is_busy)

    def get_var(self, name: str) -> Any:
        self._wait_for_var(name)
        if self.error_ is not None and name not in self.variables:
            raise KeyError(name) from self.error_
        return self.variables[name]

    def get_meta_info(self, name: str, timeout: float | None = None) -> Any:
        if timeout is None:
            self._wait_for_var(name)
        return super().get_meta_info(name, timeout)

    def fork(self, size: int = 1, position_ids_offset: list[int] | None = None) -> list[WaveExecutor]:
        self.sync()
        return [self._make_child() for _ in range(int(size))]

    def call_when_idle(self, callback: Callable[[], None]) -> None:
        """Call back, once and on any thread, when everything submitted so far is done or has failed."""
        with self._waves.lock:
            if self._is_busy:
                self._when_idle.append(callback)
                return
        callback()

    def _make_child(self) -> WaveExecutor:
        child = WaveExecutor(self._waves, self.backend.endpoint, self.arguments, self.default_sampling_para)
        child.variables = dict(self.variables)
        child.text_ = self.text_
        child.messages_ = list(self.messages_)
        child.cur_role = self.cur_role
        child.cur_role_begin_pos = self.cur_role_begin_pos
        child.fork_start_text_pos = len(self.text_)
        child.images_ = list(self.images_)
        return child

    def _wait_for_var(self, name: str) -> None:
        event = self.variable_event.get(name)
        if event is not None:
            self._waves.wait_for(self._waiters, event.is_set)

    def _go_on(self) -> None:
        """Execute until an answer is needed or nothing is left. Called by one thread at a time: who made it busy."""
        while (expr := self._next_expr()) is not None:
            try:
                self._execute(expr)
            except Asked as asked:
                self._waves.add(Ask(asked.body, self._on_answer))
                return
            except Exception as error:  # as upstream: the program finds out when it reads a variable
                logger.warning("a program's request failed: %s", error)
                with self._waves.lock:
                    self.error_ = error
                    self._exprs.clear()
                    self._release_variables()
            else:
                with self._waves.lock:
                    self._exprs.popleft()
                    self._waves.wake(self._waiters)
            self.backend.clear()

    def _next_expr(self) -> Any:
        with self._waves.lock:
            while self._exprs and isinstance(self._exprs[0], SglExprList):
                self._exprs.extendleft(reversed(self._exprs.popleft().expr_list))
            if self._exprs:
                return self._exprs[0]
            self._is_busy = False
            self._waves.wake(self._waiters)
            callbacks, self._when_idle = self._when_idle, []
        for callback in callbacks:
            callback()
        return None

    def _on_answer(self, answer: Any) -> None:
        self.backend.add(answer)
        self._go_on()

    def _release_variables(self) -> None:
        """Nobody waits for a variable that will not come. Called with the lock held."""
        for event in self.variable_event.values():
            event.set()
        self._waves.wake(self._waiters)
