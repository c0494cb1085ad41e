"""A scheduler process as on a GPU, without one: `SharedGpuAttnBackend` on SGLang's Triton backend in Triton's
interpreter, overlap scheduling, and decode steps in graphs.

A graph here is what a CUDA graph is to whoever replays it: the operations that were captured, on the tensors of the
capture, and nothing of the Python around them. `_Tape` records each torch operator and each launch of a kernel, and
runs them again. What reads a tensor on the host while it is captured is refused, as CUDA refuses it.

Real: SGLang's scheduler, its `DecodeCudaGraphRunner` and Triton backend, our scheduler and backend. Not there: streams
that run beside each other, CUDA's memory, bfloat16.

Whenever it is idle the process writes how many steps took which way to the file that `COUNTS` names.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import sglang.srt.layers.attention.triton_backend as stock_backend
import sglang.srt.managers.scheduler as upstream
import sglang.srt.model_executor.runner.decode_cuda_graph_runner as graph_runner
import torch
from sglang.srt.layers.attention.attention_registry import ATTENTION_BACKENDS
from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator
from sglang.srt.model_executor.graph_shared_output import GraphSharedOutput
from sglang.srt.model_executor.runner_backend.base_cuda_graph_backend import BaseCudaGraphBackend
from torch.utils._python_dispatch import TorchDispatchMode
from triton.runtime import interpreter
from triton.runtime.interpreter import GridExecutor

from batchllm.srt import server_args
from batchllm.srt.entrypoints import child_process
from batchllm.srt.layers import gpu_attention_backend
from batchllm.srt.managers.scheduler_process import OfflineBatchScheduler, install
from batchllm.srt.platforms.platform_cpu import CpuPlatform
from batchllm.trace.whole_file import write_whole
from tests.attention.interpreter import patched_once

COUNTS = "EMULATED_GPU_COUNTS"
"""Environment variable: a file for a JSON object, steps by path, graphs as ``graph`` (nothing shared) and ``graph,
shared``."""

server_args._check_page_size = lambda _: None  # pages are for devices

_NUM_PROCESSORS = 4
_GRAPH_ROWS = [2, 4, 8]
"""Decode steps of other sizes are padded to the next; of more rows they run without a graph."""


class _Tape(TorchDispatchMode):
    """What ran between ``with tape:`` and its end, to be run again on the same tensors."""

    def __init__(self) -> None:
        super().__init__()
        self._steps: list[Callable[[], None]] = []
        self._is_in_kernel = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        outputs = func(*args, **kwargs)
        if self._is_in_kernel:
            return outputs
        if func is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("a graph cannot read a tensor on the host")
        self._steps.append(lambda: _run_again(func, args, kwargs, outputs))
        return outputs

    @contextlib.contextmanager
    def recording(self) -> Iterator[None]:
        launch = GridExecutor.__call__

        def recorded(executor: Any, *args: Any, **kwargs: Any) -> None:
            self._is_in_kernel = True
            launch(executor, *args, **kwargs)
            self._is_in_kernel = False
            self._steps.append(lambda: launch(executor, *args, **kwargs))

        GridExecutor.__call__ = recorded
        try:
            with self:
                yield
        finally:
            GridExecutor.__call__ = launch

    def replay(self) -> None:
        for step in self._steps:
            step()


def _run_again(func: Any, args: Any, kwargs: Any, outputs: Any) -> None:
    again = func(*args, **kwargs)
    pairs = zip(outputs, again, strict=True) if isinstance(outputs, tuple | list) else [(outputs, again)]
    for before, now in pairs:
        # A view, or what was written in place, is where it was.
        if isinstance(before, torch.Tensor) and before.data_ptr() != now.data_ptr():
            before.copy_(now)


class _TapeBackend(BaseCudaGraphBackend):
    """As ``FullCudaGraphBackend``: two warm-ups, then the capture."""

    def __init__(self, runner: Any) -> None:
        self._tapes: dict[Any, tuple[_Tape, Any]] = {}
        self._attention = runner.attn_backend
        self.counts: Counter[str] = Counter()

    def capture_session(self, stream: Any) -> Any:
        return contextlib.nullcontext()

    def replay_session(self) -> Any:
        return contextlib.nullcontext()

    def capture_one(
        self, shape_key: Any, forward_fn: Any, capture_inputs: Any = None, post_warmup_hook: Any = None
    ) -> None:
        for _ in range(2):
            forward_fn()
        tape = _Tape()
        with tape.recording():
            output = forward_fn()
        self._tapes[shape_key] = tape, output

    def can_run(self, forward_batch: Any, shape_key: Any) -> bool:
        return shape_key in self._tapes

    def replay(self, shape_key: Any, static_forward_batch: Any, **kwargs: Any) -> Any:
        layout = self._attention._step.layout
        self.counts["graph, shared" if len(layout.segment_span) else "graph"] += 1
        tape, output = self._tapes[shape_key]
        tape.replay()
        return output

    def cleanup(self) -> None:
        self._tapes.clear()


class EmulatedScheduler(OfflineBatchScheduler):
    """Ours, with graphs for decode steps."""

    def init_running_status(self) -> None:
        runner = self.tp_worker.model_runner
        runner.graph_shared_output = GraphSharedOutput(device="cpu", max_rows=max(_GRAPH_ROWS))
        runner.decode_cuda_graph_runner = graph_runner.DecodeCudaGraphRunner(runner)
        self.written_counts: Counter[str] | None = None
        super().init_running_status()

    def on_idle(self) -> None:
        counts = Counter(self.tp_worker.model_runner.decode_cuda_graph_runner.backend.counts)
        for (path, _), num_steps in self.attention.dispatcher.counts.items():
            counts[path] += num_steps
        if counts != self.written_counts:
            write_whole(os.environ[COUNTS], [json.dumps(counts).encode()])
            self.written_counts = counts
        super().on_idle()


@contextlib.contextmanager
def _no_capture_stream(*_: Any, **__: Any) -> Iterator[Any]:
    yield SimpleNamespace(stream=None)


def run_scheduler_process(server_args: Any, *args: Any, **kwargs: Any) -> None:
    """Target of the scheduler process; TRITON_INTERPRET must be set in its environment."""
    child_process.begin("scheduler")
    install(server_args, EmulatedScheduler)
    # By this name SGLang does not launch kernels of its own beside the backend's.
    ATTENTION_BACKENDS["torch_native"] = gpu_attention_backend.create
    CpuPlatform.get_paged_allocator_cls = lambda _: PagedTokenToKVPoolAllocator
    stock_backend.get_device_core_count = lambda *_: _NUM_PROCESSORS
    interpreter._patch_lang = patched_once()
    graph_runner.resolve_decode_backend = _TapeBackend
    graph_runner.graph_capture = _no_capture_stream
    graph_runner.get_batch_sizes_to_capture = lambda *_: (_GRAPH_ROWS, [])
    upstream.run_scheduler_process(server_args, *args, **kwargs)
