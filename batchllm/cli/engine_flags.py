"""Flags of SGLang's server as they stand on a command line, before SGLang reads them: what a job's answers depend on.

Knows: names and values of flags, the file of ``--config``. Must not know: what they mean to the engine, which says what
is wrong with them.
"""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import xxhash

from batchllm.offline.fingerprint import model_identity

_ENGINE_FLAGS_OF_ANSWERS = (
    *("dtype", "quantization", "kv-cache-dtype", "revision", "load-format", "model-impl", "enable-fp32-lm-head"),
    *("json-model-override-args", "context-length", "tokenizer-path", "skip-tokenizer-init", "is-embedding"),
    *("chat-template", "hf-chat-template-name", "default-chat-template-kwargs", "tool-call-parser", "reasoning-parser"),
    *("sampling-defaults", "sampling-backend", "random-seed", "grammar-backend", "enable-strict-thinking"),
    *("constrained-json-whitespace-pattern", "constrained-json-disable-any-whitespace"),
)
"""Engine flags that change answers. The others change how fast they come, and may change from run to run."""
_PATHS = ("tokenizer-path", "chat-template")
"""Those that name a file or a folder, or a name that SGLang knows."""


def with_config(server_flags: list[str]) -> list[str]:
    """The flags, those of the file of ``--config`` before the others. What is wrong with it, the engine says."""
    path = flag_value(server_flags, "config")
    if not path:
        return server_flags
    import yaml

    try:
        found = yaml.safe_load(Path(path).read_bytes())
    except (OSError, yaml.YAMLError):
        return server_flags
    flags: list[str] = []
    for name, value in found.items() if isinstance(found, dict) else ():
        flag = f"--{str(name).replace('_', '-')}"
        flags += [flag, *map(str, value)] if isinstance(value, list) else [f"{flag}={value}"]
    return flags + server_flags


def flags_of_answers(server_flags: list[str]) -> list[str]:
    """The flags that answers depend on; a file or a folder is identified by what is in it."""
    found = {name: flag_value(server_flags, name) for name in _ENGINE_FLAGS_OF_ANSWERS}
    return [
        f"--{name} {_identity(value) if name in _PATHS else value}"
        for name, value in found.items()
        if value is not None
    ]


def adapter_identities(server_flags: list[str]) -> dict[str, str]:
    """What tells each LoRA adapter from others, by the name that rows give it."""
    folders: dict[str, str] = {}
    for value in _values(server_flags, "lora-paths") or ():
        name, _, folder = value.partition("=")
        if value.startswith("{"):
            with suppress(ValueError, LookupError, TypeError):  # the engine says what is wrong with it
                named = json.loads(value)
                name, folder = named["lora_name"], named["lora_path"]
        folders[name] = _identity(folder or name)
    return folders


def flag_value(flags: list[str], name: str) -> str | None:
    """Value of the last such flag, "" where it has none; None where it is not given."""
    values = _values(flags, name)
    return None if values is None else (values or [""])[0]


def _values(flags: list[str], name: str) -> list[str] | None:
    """Values of the last such flag; None where it is not given."""
    values: list[str] | None = None
    takes = False
    for flag in flags:
        if flag.startswith("--"):
            takes = flag.partition("=")[0] == f"--{name}"
            if takes:
                values = flag.split("=", 1)[1:]
        elif takes and values is not None:
            values.append(flag)
    return values


def _identity(value: str) -> str:
    path = Path(value)
    if path.is_file():
        return f"local {xxhash.xxh3_128_hexdigest(path.read_bytes())}"
    return model_identity(value) if path.is_dir() else value
