"""LoRA adapters, looked at before anything is started: what is missing in their folders. Runs in the engine's or the
server's process.

Knows: names of files. Must not know: what an adapter computes. What is a name and no folder is
left to SGLang.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

from batchllm.errors import ConfigError
from batchllm.tokenizer import is_meant_as_path

CPU_BACKEND = "torch_native"
_CONFIG = "adapter_config.json"
_WEIGHTS = ("*.safetensors", "*.bin")


def check(server_args: Any) -> None:
    """Refuse an adapter that cannot be one.

    Args:
        server_args: SGLang's, complete; they are not changed.

    Raises:
        ConfigError: One line that names the adapter or the flag, and says what to do.
    """
    server_args = copy.copy(server_args)
    try:
        server_args.check_lora_server_args()  # it makes one form of the many that a path may have, and not twice
    except (AssertionError, ValueError, TypeError) as error:
        raise ConfigError(f"--lora-paths: {error}") from error
    if not server_args.enable_lora:
        return
    if server_args.device == "cpu" and server_args.lora_backend != CPU_BACKEND:
        raise ConfigError(
            f"--lora-backend {server_args.lora_backend}: it needs a GPU; give --lora-backend {CPU_BACKEND}, or leave "
            "the flag out"
        )
    for adapter in server_args.lora_paths:
        _check_folder(f"--lora-paths {adapter.lora_name}={adapter.lora_path}", Path(adapter.lora_path))


def _check_folder(flag: str, folder: Path) -> None:
    if not folder.is_dir():
        if folder.exists() or is_meant_as_path(str(folder)):
            raise ConfigError(f"{flag}: there is no such folder; give an adapter's folder, or its name on the Hub")
        return
    try:
        config = json.loads((folder / _CONFIG).read_bytes())
    except OSError as error:
        raise ConfigError(f"{flag}: {_CONFIG} cannot be read ({error.strerror}); give an adapter's folder") from error
    except ValueError as error:
        raise ConfigError(f"{flag}: {_CONFIG} is not JSON ({error}); copy the file again") from error
    if not isinstance(config, dict) or not isinstance(config.get("r"), int):
        raise ConfigError(f"{flag}: {_CONFIG} names no rank r; only LoRA adapters are supported")
    if not any(True for pattern in _WEIGHTS for _ in folder.glob(pattern)):
        raise ConfigError(f"{flag}: the folder has no weights ({', '.join(_WEIGHTS)}); copy the adapter's files there")
