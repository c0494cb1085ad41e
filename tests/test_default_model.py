"""The default model: same bytes every time, a healing cache, answers that need the whole prompt."""

from __future__ import annotations

import json
import multiprocessing
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchllm import default_model
from batchllm.default_model import (
    DEFAULT,
    SHAPE_28M,
    WIDTH_64,
    build_model,
    cached_model_path,
    default_model_path,
)
from batchllm.errors import ConfigError

_TEXTS = (
    "",
    "Plain ASCII,  with  spaces\n\tand 'quotes' (12,345.67)!",
    "naïve café — “straße” Ωμέγα русский العربية हिन्दी",
    "👩‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 e\u0301 \u200b\ufeff \x00\x1f\r\n",
    "你好,世界。日本語のテキスト 한국어",
    " , . ' s n't <|im_start|>user<|im_end|>",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model")
    build_model(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path


def _files(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    return {file.name: (file.stat().st_ino, file.stat().st_mtime_ns) for file in folder.iterdir()}


def test_two_builds_have_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    build_model(tmp_path / "again")
    assert _files(tmp_path / "again") == _files(folder)


def test_another_seed_gives_other_weights_and_the_same_tokenizer(tmp_path: Path) -> None:
    build_model(tmp_path / "0", WIDTH_64, seed=0)
    build_model(tmp_path / "1", WIDTH_64, seed=1)
    zero, one = _files(tmp_path / "0"), _files(tmp_path / "1")
    assert {name for name in zero if zero[name] != one[name]} == {
        "model.safetensors",
        "complete.json",
    }


def test_shapes_have_the_sizes_they_claim(folder: Path) -> None:
    from safetensors.numpy import load_file

    weights = load_file(folder / "model.safetensors")
    assert sum(weight.size for weight in weights.values()) == DEFAULT.num_parameters <= 6_000_000
    assert {weight.dtype for weight in weights.values()} == {np.dtype(np.float32)}
    assert round(SHAPE_28M.num_parameters / 1e6, 1) == 27.8
    assert (WIDTH_64.num_hidden_layers, WIDTH_64.hidden_size) == (1, 64)


def test_a_vocabulary_the_text_cannot_fill_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="vocab_size 1000000"):
        build_model(tmp_path, replace(WIDTH_64, vocab_size=1_000_000))


@pytest.mark.parametrize("text", _TEXTS)
def test_text_comes_back_as_it_went_in(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def test_random_bytes_that_are_text_come_back(tokenizer: Any) -> None:
    source = random.Random(0)
    for _ in range(300):
        text = source.randbytes(source.randrange(80)).decode("utf-8", "replace")
        assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    every = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x110000, 7)]))
    assert tokenizer.decode(tokenizer(every, verbose=False)["input_ids"]) == every


def test_every_id_of_the_model_is_a_token(tokenizer: Any, folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["vocab_size"] == len(tokenizer)
    assert all(tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))))
    assert tokenizer.eos_token_id == config["eos_token_id"]
    assert tokenizer.bos_token_id == config["bos_token_id"]


def test_common_words_are_one_token(tokenizer: Any) -> None:
    assert len(tokenizer("Answer the question about this document")["input_ids"]) == 6


def test_the_chat_template_renders_roles_and_opens_the_answer(tokenizer: Any) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [{"type": "text", "text": "Hi"}, {"type": "text", "text": "!"}],
        },
        {"role": "assistant", "content": None},
    ]
    asked = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n<|im_end|>\n"
    )
    assert tokenizer.apply_chat_template(messages, tokenize=False) == asked
    opened = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert opened == asked + "<|im_start|>assistant\n"
    assert tokenizer(opened)["input_ids"][0] == tokenizer.convert_tokens_to_ids("<|im_start|>")


def test_the_second_call_writes_nothing(cache: Path) -> None:
    path = Path(default_model_path())
    before = _stamps(path)
    assert Path(default_model_path()) == path
    assert _stamps(path) == before
    assert path.parent == cache / "batchllm" / "models"
    assert path.name.startswith("default-")
    assert [entry for entry in path.parent.iterdir() if entry.is_dir()] == [path]


def test_a_relative_cache_folder_is_ignored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert Path(cached_model_path(WIDTH_64)).is_relative_to(tmp_path / ".cache")


def test_shapes_and_seeds_have_folders_of_their_own(cache: Path) -> None:
    paths = {cached_model_path(WIDTH_64), cached_model_path(WIDTH_64, seed=1)}
    assert len(paths) == 2


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "no marker", "cut marker", "other marker", "a file"])
def test_a_damaged_model_is_built_again(cache: Path, damage: str) -> None:
    path = Path(cached_model_path(WIDTH_64))
    good = _files(path)
    weights, marker = path / "model.safetensors", path / "complete.json"
    if damage == "flip":
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)
    elif damage == "truncate":
        weights.write_bytes(weights.read_bytes()[:-1])
    elif damage == "delete":
        (path / "tokenizer.json").unlink()
    elif damage == "no marker":
        marker.unlink()
    elif damage == "a file":
        for file in path.iterdir():
            file.unlink()
        path.rmdir()
        path.write_text("")
    else:
        marker.write_text('{"model.saf' if damage == "cut marker" else "[1]")
    assert Path(cached_model_path(WIDTH_64)) == path
    assert _files(path) == good


def test_a_build_that_was_killed_is_cleared_away(cache: Path) -> None:
    path = Path(cached_model_path(WIDTH_64))
    building = path.with_name(f".{path.name}.building")
    path.rename(building)
    (building / "complete.json").unlink()
    (building / "stray").write_text("left behind")
    assert Path(cached_model_path(WIDTH_64)) == path
    assert not building.exists()
    assert not (path / "stray").exists()


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ConfigError, match="XDG_CACHE_HOME"):
        cached_model_path(WIDTH_64)


def _race(barrier: Any, answers: Any) -> None:
    barrier.wait()
    path = cached_model_path(WIDTH_64)
    answers.put((path, default_model._is_complete(Path(path))))


def test_processes_that_race_all_get_a_good_model(cache: Path) -> None:
    spawn = multiprocessing.get_context("spawn")
    barrier, answers = spawn.Barrier(3), spawn.Queue()
    racers = [spawn.Process(target=_race, args=(barrier, answers)) for _ in range(3)]
    for racer in racers:
        racer.start()
    got = [answers.get(timeout=120) for _ in racers]
    for racer in racers:
        racer.join(timeout=120)
    assert got == [(cached_model_path(WIDTH_64), True)] * 3


def test_answers_depend_on_every_token_and_do_not_end_early(folder: Path) -> None:
    """Of 60 prompts of 128 tokens, 57 answer otherwise after one token is replaced."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    source = np.random.Generator(np.random.PCG64(7))
    prompts = torch.from_numpy(source.integers(3, DEFAULT.vocab_size, (20, 128)))
    changed = 0
    with torch.inference_mode():
        answers = model.generate(prompts, attention_mask=torch.ones_like(prompts), max_new_tokens=16)
        assert answers.shape == (20, 144)  # none ended, so none needed padding
        assert not (answers[:, 128:] == model.config.eos_token_id).any()
        assert all(len(set(answer[128:].tolist())) > 4 for answer in answers)
        for place in (0, 64, 127):
            replaced = answers[:, :-1].clone()
            replaced[:, place] = 3 + (replaced[:, place] - 3 + 1234) % (DEFAULT.vocab_size - 3)
            again = model(replaced, logits_to_keep=16).logits.argmax(-1)
            changed += int((again != answers[:, 128:]).any(-1).sum())
    assert changed >= 57
