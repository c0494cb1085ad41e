"""The folder of a model, looked at before anything is started: what is missing in it, and which file is damaged. Runs
in the engine's or the server's process.

Knows: names and headers of files. Must not know: what a model computes. Models that are named, not folders, are left to
SGLang.
Invariant: no tensor is read; a checkpoint of many files takes a millisecond for each.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from batchllm.errors import ConfigError
from batchllm.tokenizer import check_is_there

_TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model*",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
    "*.tiktoken",
    "tiktoken.model",
    "tekken.json",
    "spiece.model",
    "*.spm",
    "sentencepiece*.model",
    "tokenization_*.py",
    "tok*.py",
)
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.gguf")
_FORMATS_OF_FOLDERS = ("auto", "safetensors", "pt", "flash_rl", "layered")
"""Values of ``--load-format`` that read weights from the folder as they are."""
_INDEX = "model.safetensors.index.json"
_NUM_NAMED = 3


def is_folder(model_path: str) -> bool:
    """Whether the model is a folder of this machine."""
    return os.path.isdir(model_path)


def architecture(model_path: str) -> str:
    """The first that the configuration in a folder names; empty if none."""
    try:
        names = json.loads(Path(model_path, "config.json").read_bytes())["architectures"]
        return str(names[0])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def check(model_path: str, server_args: dict[str, Any]) -> None:
    """Refuse a folder that cannot be a model.

    Args:
        model_path: A folder, or a name, of which nothing is checked but that it is not meant to be a folder.
        server_args: SGLang's, those that were given.

    Raises:
        ConfigError: One line that names the folder or the file, and says what to do.
    """
    folder = Path(model_path)
    if not folder.is_dir():
        check_is_there(model_path)
        return
    _check_config(folder)
    if not server_args.get("skip_tokenizer_init") and server_args.get("tokenizer_path") is None:
        _check_tokenizer(folder)
    if server_args.get("load_format", "auto") in _FORMATS_OF_FOLDERS:
        _check_weights(folder)


def _check_config(folder: Path) -> None:
    path = folder / "config.json"
    if not path.is_file():
        if (folder / "params.json").is_file():  # Mistral's own format, which SGLang reads too
            return
        raise ConfigError(f"-m {folder}: the folder has no config.json; give the folder that has the model's files")
    try:
        config = json.loads(path.read_bytes())
    except ValueError as error:
        raise ConfigError(f"{path}: not JSON ({error}); copy the file again") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path}: must be an object; copy the file again")
    if not config.get("architectures"):
        raise ConfigError(
            f"{path}: it names no architectures, so nobody can tell which model it is; "
            'add what the model\'s publisher has there, e.g. "architectures": ["LlamaForCausalLM"]'
        )


def _check_tokenizer(folder: Path) -> None:
    if not any(True for pattern in _TOKENIZER_FILES for _ in folder.glob(pattern)):
        raise ConfigError(
            f"-m {folder}: the folder has no tokenizer (tokenizer.json, tokenizer.model, vocab.json, ...); copy the "
            "model's tokenizer files there, or name their folder with --tokenizer-path"
        )


def _check_weights(folder: Path) -> None:
    if not any(True for pattern in _WEIGHT_FILES for _ in folder.glob(pattern)):
        raise ConfigError(
            f"-m {folder}: the folder has no weights ({', '.join(_WEIGHT_FILES)}); copy the model's files there"
        )
    names = {path.name: _tensor_names(path) for path in sorted(folder.glob("*.safetensors"))}
    if (folder / _INDEX).is_file():
        _check_index(folder / _INDEX, names)


def _tensor_names(path: Path) -> frozenset[str]:
    """Names of the tensors in a file of weights.

    Raises:
        ConfigError: Its header is not whole, or says another number of bytes than there are.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            return frozenset(file.keys())
    except (SafetensorError, OSError) as error:
        remedy = "the file is not whole, or another format's; copy it again"
        raise ConfigError(f"{path}: {path.stat().st_size} bytes are no safetensors file ({error}); {remedy}") from error


def _check_index(path: Path, names: dict[str, frozenset[str]]) -> None:
    """Whether every file of an index is there and has the tensors that the index says."""
    try:
        places: dict[str, str] = json.loads(path.read_bytes())["weight_map"]
        missing = [(name, file) for name, file in places.items() if name not in names.get(file, ())]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{path}: not an index of safetensors files ({error!r}); copy the file again") from error
    lost = sorted({file for _, file in missing if file not in names})
    if lost:
        raise ConfigError(
            f"{path}: it names {_some(lost)}, which the folder does not have; copy the model's files again"
        )
    if missing:
        tensors = [f"{name} of {file}" for name, file in missing]
        raise ConfigError(f"{path}: it names {_some(tensors)}, which is not in the file; copy the model's files again")


def _some(names: list[str]) -> str:
    rest = len(names) - _NUM_NAMED
    return ", ".join(names[:_NUM_NAMED]) + (f" and {rest} more" if rest > 0 else "")
