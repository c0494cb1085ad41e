"""Files and functions of the package are as short as CONTRIBUTING says."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

_PACKAGE = Path(__file__).parents[1] / "batchllm"
_MAX_FILE_LINES, _MAX_FUNCTION_LINES = 400, 60


@pytest.mark.parametrize("path", sorted(_PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(_PACKAGE)))
def test_a_file_and_its_functions_are_short(path: Path) -> None:
    """Of a function the body counts, without its docstring. Kernels of Triton, a name a line, may be longer."""
    source = path.read_text()
    assert len(source.splitlines()) <= _MAX_FILE_LINES
    functions = [
        node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    ]
    lengths = {node.name: _num_body_lines(node) for node in functions if not _is_kernel(node)}
    assert {name: length for name, length in lengths.items() if length > _MAX_FUNCTION_LINES} == {}


def _is_kernel(function: ast.FunctionDef | ast.AsyncFunctionDef) -> bool:
    return "triton.jit" in map(ast.unparse, function.decorator_list)


def _num_body_lines(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    first = function.body[1:2] if ast.get_docstring(function) else function.body[:1]
    return function.end_lineno - first[0].lineno + 1 if first and function.end_lineno else 0
