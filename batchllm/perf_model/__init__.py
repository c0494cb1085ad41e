"""Seconds of a forward step, from counts: the clock of the simulator, and bounds that no schedule beats.

Knows: what a device can do at most, the shape of a model, counts of a step. Must not know: prompts, plans, schedules,
torch, sglang, clocks.
Invariant: more work never takes less time, and no step is faster than the device's data sheet allows.
"""

from batchllm.perf_model.calibration import Fit, fit, samples_of
from batchllm.perf_model.cost_model import Coefficients, CostModel, StepSeconds, default_coefficients
from batchllm.perf_model.device import DEVICES, DeviceSpec, get_device, parse_device
from batchllm.perf_model.model import MODELS, ModelShape, find_model, get_model
from batchllm.perf_model.step import StepWork, prefill_pairs

__all__ = [
    "DEVICES",
    "MODELS",
    "Coefficients",
    "CostModel",
    "DeviceSpec",
    "Fit",
    "ModelShape",
    "StepSeconds",
    "StepWork",
    "default_coefficients",
    "find_model",
    "fit",
    "get_device",
    "get_model",
    "parse_device",
    "prefill_pairs",
    "samples_of",
]
