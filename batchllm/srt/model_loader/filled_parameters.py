"""Whether a checkpoint has every weight of its model: SGLang computes with whatever memory held where one is missing.
Runs in the scheduler's process.

(Upstream: ``srt/model_loader/loader.py``.)

Before the checkpoint is read, parameters are filled with a number that no checkpoint has, a NaN of a certain bit
pattern. What still holds it afterwards was never written, in whatever way parts of parameters are loaded.

Invariant: nothing is refused that cannot be told: of quantised models, whose parameters are made otherwise, and where a
model is loaded in another way than by reading its checkpoint, nothing is checked.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Iterable
from typing import Any

import torch
from sglang.srt.model_loader.loader import DefaultModelLoader

from batchllm.errors import ConfigError

_MARKS: dict[torch.dtype, tuple[torch.dtype, int]] = {
    torch.float32: (torch.int32, 0x7FA5A5A5),
    torch.bfloat16: (torch.int16, 0x7FA5),
    torch.float16: (torch.int16, 0x7DA5),
}
"""Integers of the same size, and the one that is a NaN which arithmetic does not make."""
_CHUNK = 1 << 24
"""Elements that are compared at once."""
_NUM_NAMED = 5
_ANY = ".*"
"""Stands for the number of a layer."""
_UNUSED = ("lm_head.bias",)
"""Parameters that SGLang makes for some models, and computes nothing with."""
_stock_load_model = DefaultModelLoader.load_model


def install() -> None:
    """Have SGLang check what it loads in this process."""
    DefaultModelLoader.load_model = _load_model


def _load_model(self: Any, *, model_config: Any, device_config: Any) -> Any:
    if type(self) is DefaultModelLoader and model_config.quantization is None:
        self.load_weights_and_postprocess = functools.partial(
            _load_checked, self.load_weights_and_postprocess, model_config.model_path
        )
    try:
        return _stock_load_model(self, model_config=model_config, device_config=device_config)
    finally:
        vars(self).pop("load_weights_and_postprocess", None)  # later updates may be of some weights only


def _load_checked(
    load: Callable[..., None], model_path: str, model: Any, weights: Iterable[tuple[str, Any]], target_device: Any
) -> None:
    stock_load_weights = model.load_weights

    def load_weights(weights: Iterable[tuple[str, Any]]) -> Any:
        mark(model)
        result = stock_load_weights(weights)
        check_filled(model, model_path)
        return result

    model.load_weights = load_weights
    try:
        load(model, weights, target_device)
    finally:
        del model.load_weights


def mark(model: torch.nn.Module) -> None:
    """Overwrite the floating-point parameters of a model, for `check_filled` to find what was not filled since."""
    for _, parameter in model.named_parameters():
        elements, value = _marked(parameter)
        elements.fill_(value)


def check_filled(model: torch.nn.Module, model_path: str) -> None:
    """Refuse a model of which not everything was filled since `mark`.

    A bias that the checkpoint has in none of the layers is zero.

    Args:
        model: SGLang's.
        model_path: The path as the user gave it.

    Raises:
        ConfigError: It names the parameters.
    """
    parameters = dict(model.named_parameters())
    num_left = {name: _count(*_marked(parameter)) for name, parameter in parameters.items()}
    some = {_kind(name) for name, parameter in parameters.items() if num_left[name] < parameter.numel()}
    missing = []
    for name, parameter in parameters.items():
        if num_left[name] == 0:
            continue
        if name in _UNUSED or (name.endswith("bias") and _ANY in _kind(name) and _kind(name) not in some):
            parameter.data.zero_()
            continue
        share = num_left[name] / parameter.numel()
        missing.append(name if share == 1 else f"{name} ({max(1, round(100 * share))} % of it)")
    if missing:
        rest = f" and {len(missing) - _NUM_NAMED} more" if len(missing) > _NUM_NAMED else ""
        raise ConfigError(
            f"-m {model_path}: no tensor of its checkpoint fills {', '.join(missing[:_NUM_NAMED])}{rest}; "
            "the files are not all of the model's, or are another model's: copy them again"
        )


def _kind(name: str) -> str:
    """The name of a parameter, the same for all layers."""
    return re.sub(r"\.\d+(?=\.)", _ANY, name)


def _marked(parameter: torch.nn.Parameter) -> tuple[torch.Tensor, int]:
    """A parameter's elements as integers, and the mark; no elements where it cannot be marked."""
    integer, value = _MARKS.get(parameter.dtype, (None, 0))
    if integer is None or parameter.is_meta or not parameter.is_contiguous():
        return torch.empty(0, dtype=torch.int32), 0
    return parameter.data.view(-1).view(integer), value


def _count(elements: torch.Tensor, value: int) -> int:
    return sum(int((part == value).sum()) for part in elements.split(_CHUNK))
