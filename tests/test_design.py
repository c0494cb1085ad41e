"""What docs/design.md says of the code is in the code."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[1]
_DESIGN = (_ROOT / "docs" / "design.md").read_text()
_WAY = _DESIGN.split("## A row's way")[1].split("\n## ")[0]
# A file and a function, and further functions of the same file: `a/b.py:C.d`, `e`
_STEP = re.compile(r"^\| \d+ \| `([\w/]+\.py):([\w.]+)`((?:, `[\w.]+`)*)", re.MULTILINE)
_STEPS = [(file, [name, *re.findall(r"`([\w.]+)`", others)]) for file, name, others in _STEP.findall(_WAY)]
_NAMED = re.findall(r"`((?:srt|offline|scheduler|server|attention|cli|host|trace)/\w[\w/.]*)", _DESIGN)


@pytest.mark.parametrize(("file", "names"), _STEPS)
def test_a_step_of_a_rows_way_is_a_function_of_its_file(file: str, names: list[str]) -> None:
    """A method stands with its class, or behind another of the same file by its name alone."""
    functions = set()
    for node in ast.walk(ast.parse((_ROOT / "batchllm" / file).read_text())):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            functions.add(node.name)
        if isinstance(node, ast.ClassDef):
            functions |= {f"{node.name}.{getattr(member, 'name', '')}" for member in node.body}
    assert set(names) <= functions


def test_a_rows_way_has_as_many_files_as_it_says_each_once() -> None:
    files = [file for file, _ in _STEPS]
    assert f"There are {len(files)} files;" in _WAY
    assert len(set(files)) == len(files)


@pytest.mark.parametrize("path", sorted(set(_NAMED)))
def test_a_file_that_it_names_is_there(path: str) -> None:
    found = _ROOT / "batchllm" / path
    assert found.exists() or found.with_suffix(".py").exists()
