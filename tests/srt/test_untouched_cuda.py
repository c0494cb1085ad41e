"""What SGLang asks of a GPU at import is answered without initialising CUDA."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from batchllm.srt.platforms import untouched_cuda


class Touched(Exception):
    """CUDA would have been initialised."""


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with a GPU, as far as is asked here: its management library, and torch without a CUDA that works."""

    def touch(*_: Any) -> None:
        raise Touched

    memory = SimpleNamespace(total=80 << 30)
    library = SimpleNamespace(
        nvmlInit=lambda: None,
        nvmlShutdown=lambda: None,
        nvmlDeviceGetHandleByIndex=lambda index: index,
        nvmlDeviceGetCudaComputeCapability=lambda handle: (9, handle),
        nvmlDeviceGetName=lambda handle: b"a card",
        nvmlDeviceGetMemoryInfo=lambda handle: memory,
    )
    monkeypatch.setitem(sys.modules, "pynvml", library)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "_lazy_init", touch)
    monkeypatch.setattr(torch.cuda, "_get_nvml_device_index", lambda device: device)
    untouched_cuda._properties.cache_clear()


def test_questions_are_answered_by_the_management_library(gpu: None) -> None:
    """Those of upstream's imports: capability, properties and name, of the current device and of a numbered one."""
    with untouched_cuda.untouched_cuda():
        assert torch.cuda.get_device_capability() == (9, 0)
        assert torch.cuda.get_device_capability(torch.device("cuda:1")) == (9, 1)
        found = torch.cuda.get_device_properties(torch.cuda.current_device())
        assert (found.major, found.minor, found.total_memory) == (9, 0, 80 << 30)
        assert torch.cuda.get_device_name() == "a card"


def test_what_the_library_does_not_know_is_asked_of_cuda(gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Which then has been used: no wrong answer, and no fork."""
    real = SimpleNamespace(multi_processor_count=132)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: real)
    with untouched_cuda.untouched_cuda():
        found = torch.cuda.get_device_properties(0)
    assert found.multi_processor_count == 132


def test_afterwards_torch_answers_itself_also_through_functions_that_were_kept(gpu: None) -> None:
    before = torch.cuda.get_device_capability
    with untouched_cuda.untouched_cuda():
        kept = torch.cuda.get_device_capability
        assert kept() == (9, 0)
    assert torch.cuda.get_device_capability is before
    with pytest.raises(Touched):
        kept()
    with pytest.raises(Touched):
        torch.cuda.current_device()


def test_without_a_gpu_nothing_is_replaced() -> None:
    before = torch.cuda.get_device_capability
    with untouched_cuda.untouched_cuda():
        assert torch.cuda.get_device_capability is before
