"""A job is told from another by what its results depend on, and a model by what is in it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from batchllm.errors import ConfigError
from batchllm.offline.fingerprint import Fingerprint, check_same, model_identity

PARTS = st.dictionaries(st.sampled_from(["input", "model", "sampling"]), st.text(max_size=8))


@given(PARTS, PARTS)
def test_digests_are_equal_exactly_where_parts_and_their_order_are(left: dict[str, str], right: dict[str, str]) -> None:
    same = list(left.items()) == list(right.items())
    assert (Fingerprint(left).digest == Fingerprint(right).digest) == same


@given(PARTS, PARTS)
def test_one_difference_is_named_for_each_part_that_differs(left: dict[str, str], right: dict[str, str]) -> None:
    differing = [name for name in {**left, **right} if left.get(name) != right.get(name)]
    sentences = Fingerprint(left).difference(Fingerprint(right))
    assert [sentence.split(" was ")[0] for sentence in sentences] == differing


def test_another_job_is_refused_with_both_digests_and_both_values(tmp_path: Path) -> None:
    recorded, own = Fingerprint({"model": "a/b", "input": "1"}), Fingerprint({"model": "c/d", "input": "1"})
    check_same(tmp_path, recorded, Fingerprint(dict(recorded.parts)))
    with pytest.raises(ConfigError) as caught:
        check_same(tmp_path, recorded, own)
    for named in (str(tmp_path), recorded.digest, own.digest, "model was 'a/b', is now 'c/d'", "--restart"):
        assert named in str(caught.value)
    assert "input" not in str(caught.value)


def make_model(folder: Path) -> Path:
    folder.mkdir()
    for name in ("config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "model.safetensors"):
        (folder / name).write_text(name)
    (folder / "README.md").write_text("read me")
    return folder


def test_a_local_model_is_the_same_wherever_it_lies(tmp_path: Path) -> None:
    model = make_model(tmp_path / "a")
    identity = model_identity(str(model))
    assert model_identity(str(shutil.copytree(model, tmp_path / "b"))) == identity
    (model / "README.md").write_text("read it again")
    assert model_identity(str(model)) == identity


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "tokenizer.json", "tokenizer.model", "model.safetensors"]
)
def test_a_local_model_is_another_when_a_file_has_changed_or_gone(tmp_path: Path, name: str) -> None:
    model = make_model(tmp_path / "a")
    identities = {model_identity(str(model))}
    (model / name).write_text(name + "x")
    identities.add(model_identity(str(model)))
    (model / name).unlink()
    identities.add(model_identity(str(model)))
    assert len(identities) == 3


def test_a_hub_model_is_its_name_and_revision() -> None:
    assert model_identity("org/name") == "org/name"
    assert model_identity("org/name", "abc") == "org/name@abc"


def test_a_model_of_one_file_is_told_by_name_and_size(tmp_path: Path) -> None:
    model = tmp_path / "model.gguf"
    model.write_bytes(b"12")
    before = model_identity(str(model))
    model.write_bytes(b"123")
    assert model_identity(str(model)) != before
