"""Values of server arguments, whoever gives them: of SGLang's types, among the choices of its flags, and not too small.
Runs in the engine's or the server's process.

SGLang's command line sees to types and choices; its Python interface believes what it is given, and fails somewhere.

Knows how SGLang declares its arguments. Must not know what they mean.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from types import NoneType
from typing import Any, get_args

import msgspec
from sglang.srt.arg_groups.arg_utils import Arg

from batchllm.dataset.field_checks import show, unboxed
from batchllm.errors import ConfigError

_WORDS = {int: "an integer", float: "a number", bool: "True or False", str: "a string"}
_LEAST = {
    "context_length": 2,  # a token of a prompt, and one of an answer
    "max_prefill_tokens": 1,
    "max_running_requests": 1,
    "max_total_tokens": 2,
    "random_seed": 0,
}
_MAX_SEED = 2**32 - 1
_JSON = ("preferred_sampling_params",)
"""What SGLang's own flags make something else of than they declare."""


def checked(server_args: Mapping[str, Any], hints: Mapping[str, Any]) -> dict[str, Any]:
    """Server arguments with values that SGLang can work with.

    Args:
        server_args: As given: by flags, or by a program.
        hints: The type of each argument, with what SGLang says of it.

    Raises:
        ConfigError: A value is of another type, or none of those that there are.
    """
    values = {name: _of_type(name, value, hints[name]) for name, value in server_args.items()}
    for name, least in _LEAST.items():
        if values.get(name) is not None and values[name] < least:
            raise _wrong(name, f"at least {least}", values[name])
    if (values.get("random_seed") or 0) > _MAX_SEED:
        raise _wrong("random_seed", f"at most {_MAX_SEED}", values["random_seed"])
    if values.get("chunked_prefill_size") == 0:
        raise _wrong("chunked_prefill_size", "at least 1 token, or -1 for prompts in one piece", 0)
    levels = [level.lower() for level in logging.getLevelNamesMapping()]
    if values.get("log_level", "error").lower() not in levels:
        raise _wrong("log_level", f"one of {', '.join(levels)}", values["log_level"])
    return values


def _of_type(name: str, value: Any, hint: Any) -> Any:
    kind, *metadata = get_args(hint) if hasattr(hint, "__metadata__") else (hint,)
    kinds = [part for part in get_args(kind) or (kind,) if part is not NoneType]
    if len(kinds) == 1 and kinds[0] in _WORDS and name not in _JSON:
        try:
            value = msgspec.convert(unboxed(value), kind, strict=False)
        except msgspec.ValidationError:
            raise _wrong(name, _WORDS[kinds[0]], value) from None
    for said in metadata:
        if isinstance(said, Arg) and said.choices and value is not None and value not in said.choices:
            raise _wrong(name, f"one of {', '.join(map(str, said.choices))}", value)
    return value


def _wrong(name: str, wanted: str, value: Any) -> ConfigError:
    shown = value if isinstance(value, str) else show(value)
    return ConfigError(f"--{name.replace('_', '-')} {shown}: must be {wanted}")
