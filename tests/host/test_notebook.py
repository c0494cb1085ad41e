"""The notebook among the examples, run in a Jupyter kernel with a real engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import nbformat
import psutil
import pytest
from nbclient import NotebookClient

pytestmark = pytest.mark.engine

NOTEBOOK = Path(__file__).parents[2] / "examples" / "batch_in_a_notebook.ipynb"


def _printed(notebook: Any) -> list[str]:
    """What each cell of code has printed."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return ["".join(output.get("text", "") for output in cell.outputs) for cell in cells]


@pytest.mark.filterwarnings("ignore:.*:DeprecationWarning:(nbclient|jupyter_client|jupyter_core|zmq|tornado)")
def test_the_notebook_answers_the_same_batch_waited_for_awaited_and_iterated_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where an event loop runs, which goes on while a batch is awaited; no process stays."""
    monkeypatch.delenv("PYTHONDONTWRITEBYTECODE", raising=False)
    for name in ("JUPYTER_RUNTIME_DIR", "JUPYTER_CONFIG_DIR", "IPYTHONDIR"):
        monkeypatch.setenv(name, str(tmp_path / name))
    before = set(psutil.Process().children(recursive=True))
    notebook = nbformat.read(NOTEBOOK, as_version=4)  # type: ignore[no-untyped-call] # nbformat has no types
    assert not any(cell.get("outputs") for cell in notebook.cells), "the example is kept without answers"
    NotebookClient(notebook, timeout=240, resources={"metadata": {"path": str(tmp_path)}}).execute()
    start, waited_for, report, awaited, iterated, end = _printed(notebook)
    assert (start, end) == ("", "")
    lines = waited_for.splitlines()
    assert len(lines) == 4 and all(line.endswith(("'", '"')) for line in lines)
    assert "reuse" in report
    is_same, ticks = awaited.splitlines()
    assert (is_same, iterated) == ("True", "True\n")
    assert int(ticks.split()[0]) > 1
    left = [process for process in psutil.Process().children(recursive=True) if process not in before]
    assert not [process for process in left if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
