"""A model's folder that is not whole is refused before anything is started, by the name of what is wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from batchllm.default_model import default_model_path
from batchllm.errors import ConfigError
from batchllm.srt.model_loader import model_files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files of the embedded model, small ones in place of its weights."""
    shutil.copytree(default_model_path(), tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    for number in (1, 2):
        save_file({f"w{number}": np.ones((4, 4), np.float32)}, tmp_path / "model" / f"model-{number}.safetensors")
    return tmp_path / "model"


def _refusal(folder: Path | str, **server_args: Any) -> str:
    with pytest.raises(ConfigError) as refused:
        model_files.check(str(folder), server_args)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_a_whole_folder_is_fine(folder: Path) -> None:
    model_files.check(str(folder), {})
    _index(folder, {"w1": "model-1.safetensors", "w2": "model-2.safetensors"})
    model_files.check(str(folder), {})


@pytest.mark.parametrize("name", ["/no/such/folder", "./no-such", "~/no-such", "no/such/folder"])
def test_a_folder_that_does_not_exist(name: str) -> None:
    assert f"-m {name}: there is no such folder" in _refusal(name)


@pytest.mark.parametrize("name", ["gpt2", "owner/name", "s3://bucket/some/model"])
def test_names_are_left_to_sglang(name: str) -> None:
    model_files.check(name, {})


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (None, "has no config.json"),
        ("{", "not JSON"),
        ("[]", "must be an object"),
        ("{}", "names no architectures"),
        ('{"architectures": null}', "names no architectures"),
        ('{"architectures": []}', "names no architectures"),
    ],
)
def test_config_json(folder: Path, text: str | None, said: str) -> None:
    path = folder / "config.json"
    path.unlink()
    if text is not None:
        path.write_text(text)
    assert said in _refusal(folder)


def test_a_folder_without_a_tokenizer(folder: Path) -> None:
    """Unless none is wanted, or it is elsewhere."""
    for path in folder.glob("tokenizer*"):
        path.unlink()
    assert f"-m {folder}: the folder has no tokenizer" in _refusal(folder)
    model_files.check(str(folder), {"skip_tokenizer_init": True})
    model_files.check(str(folder), {"tokenizer_path": "elsewhere"})


def test_a_folder_without_weights(folder: Path) -> None:
    """Unless none are read."""
    for path in folder.glob("*.safetensors"):
        path.unlink()
    assert "has no weights" in _refusal(folder)
    model_files.check(str(folder), {"load_format": "dummy"})


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: data[:-1],
        lambda data: data[:40],
        lambda data: data[:3],
        lambda data: b"",
        lambda data: data + b"\0" * 8,
        lambda data: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
        lambda data: b"\xff" * 8 + data[8:],
    ],
)
def test_a_damaged_file_is_named(folder: Path, damage: Any) -> None:
    """Cut, grown, empty, or the pointer that Git LFS left in its place."""
    path = folder / "model-2.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    assert _refusal(folder).startswith(f"{path}: ")
    model_files.check(str(folder), {"load_format": "dummy"})


def _index(folder: Path, places: Any) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}))


def test_a_file_of_the_index_that_is_not_there(folder: Path) -> None:
    _index(folder, {"w1": "model-1.safetensors", "w3": "model-3.safetensors"})
    assert "model-3.safetensors, which the folder does not have" in _refusal(folder)


def test_a_tensor_of_the_index_that_is_not_there(folder: Path) -> None:
    _index(folder, {"w1": "model-1.safetensors", "w3": "model-2.safetensors"})
    assert "w3 of model-2.safetensors, which is not in the file" in _refusal(folder)


@pytest.mark.parametrize("places", [None, [], "x", 3])
def test_an_index_that_is_none(folder: Path, places: Any) -> None:
    _index(folder, places)
    assert "not an index" in _refusal(folder)
