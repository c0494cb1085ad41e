"""Which fault, of which process, in which phase, is held by which test: docs/faults.md says it as a table.

    python -m tests.faults.matrix > docs/faults.md

INVARIANT: every cell is held by a test, or is said to make no sense.
"""

from __future__ import annotations

from itertools import product
from typing import NamedTuple

PROCESSES = ("driver", "scheduler", "detokenizer", "server")
FAULTS = ("SIGKILL", "SIGTERM", "no memory", "full disk", "removed folder", "clock set")
PHASES = ("idle", "prefill", "decode", "finalising")


class Cell(NamedTuple):
    """A fault of a process in a phase."""

    process: str
    fault: str
    phase: str


CELLS = [Cell(*cell) for cell in product(PROCESSES, FAULTS, PHASES)]

JOB = "tests/faults/test_job_faults.py::"
SERVER = "tests/faults/test_server_faults.py::"
REAL = "tests/faults/test_real_engine_faults.py::"
_RUN = "tests/cli/test_run_faults.py::"
_STORAGE = "tests/server/test_storage_faults.py::"
_RESTART = "tests/server/test_restart.py::"

HOLDERS: dict[str, list[Cell]] = {
    JOB + "test_a_job_whose_driver_ends_goes_on_with_what_it_had": [
        Cell("driver", fault, phase) for fault in ("SIGKILL", "SIGTERM", "no memory") for phase in PHASES
    ],
    JOB + "test_an_engine_that_dies_is_replaced_and_no_row_is_lost": [
        Cell(process, fault, phase)
        for process in ("scheduler", "detokenizer")
        for fault in ("SIGKILL", "no memory")
        for phase in ("idle", "prefill", "decode")
    ],
    JOB + "test_a_disk_that_is_full_before_anything_is_asked_stops_the_job": [Cell("driver", "full disk", "idle")],
    JOB + "test_a_job_folder_that_goes_before_anything_is_asked_is_missed": [Cell("driver", "removed folder", "idle")],
    JOB + "test_a_clock_that_is_set_changes_nothing_of_a_job": [Cell("driver", "clock set", phase) for phase in PHASES],
    _RUN + "test_a_disk_full_before_the_first_result_leaves_nothing_half_begun": [
        Cell("driver", "full disk", "prefill")
    ],
    _RUN + "test_a_disk_that_runs_full_under_output_and_job_stops_it_and_room_lets_it_go_on": [
        Cell("driver", "full disk", "decode")
    ],
    _RUN + "test_a_disk_full_under_the_output_alone_keeps_all_results": [Cell("driver", "full disk", "finalising")],
    _RUN + "test_a_job_folder_that_is_removed_before_any_result_is_missed_too": [
        Cell("driver", "removed folder", "prefill")
    ],
    _RUN + "test_a_job_folder_that_is_removed_is_missed_and_the_job_begins_anew": [
        Cell("driver", "removed folder", "decode")
    ],
    _RUN + "test_an_output_folder_that_goes_at_the_end_is_named_and_made_again_it_gets_the_answers": [
        Cell("driver", "removed folder", "finalising")
    ],
    SERVER + "test_a_server_that_ends_goes_on_with_what_it_had": [
        Cell("server", fault, phase) for fault in ("SIGKILL", "SIGTERM") for phase in ("idle", "prefill", "finalising")
    ],
    _RESTART + "test_a_server_that_is_killed_again_and_again_asks_for_no_recorded_row_twice": [
        Cell("server", "SIGKILL", "decode")
    ],
    _RESTART + "test_rows_that_were_done_when_the_server_stopped_are_not_asked_again": [
        Cell("server", "SIGTERM", "decode")
    ],
    SERVER + "test_an_upload_for_which_there_is_no_memory_leaves_nothing": [Cell("server", "no memory", "idle")],
    SERVER + "test_a_batch_for_which_there_is_no_memory_is_tried_again": [
        Cell("server", "no memory", phase) for phase in ("prefill", "decode", "finalising")
    ],
    _STORAGE + "test_an_upload_that_does_not_fit_is_refused_and_leaves_its_room": [Cell("server", "full disk", "idle")],
    _STORAGE + "test_a_batch_whose_disk_runs_full_says_so_or_goes_on_later_and_others_run": [
        Cell("server", "full disk", "decode")
    ],
    SERVER + "test_a_disk_that_is_full_at_either_end_of_a_batch_makes_it_wait": [
        Cell("server", "full disk", phase) for phase in ("prefill", "finalising")
    ],
    SERVER + "test_a_storage_that_goes_takes_nothing_more": [Cell("server", "removed folder", "idle")],
    SERVER + "test_a_batch_whose_folder_goes_says_so_and_others_run": [
        Cell("server", "removed folder", phase) for phase in ("prefill", "decode", "finalising")
    ],
    SERVER + "test_a_clock_that_is_set_ends_no_batch_and_no_file": [
        Cell("server", "clock set", phase) for phase in PHASES
    ],
    REAL + "test_an_engine_survives_faults_around_it": [
        Cell(process, fault, "decode")
        for process in ("scheduler", "detokenizer")
        for fault in ("SIGTERM", "full disk", "removed folder", "clock set")
    ],
    REAL + "test_a_process_of_the_engine_that_ends_is_replaced": [
        Cell(process, fault, phase)
        for process in ("scheduler", "detokenizer")
        for fault in ("SIGKILL", "no memory")
        for phase in ("prefill", "decode")
    ],
    "tests/host/test_engine_processes.py::test_a_process_that_is_killed_fails_what_runs_and_what_comes": [
        Cell(process, "SIGKILL", "idle") for process in ("scheduler", "detokenizer")
    ],
}
"""Tests, and the cells that they hold."""

_NOTHING_ASKED = "every answer is in the journal, and nothing is asked of the engine any more"
_NOT_HEARD = "does not hear it, whatever it does: it reaches all processes of a job, and the driver decides"
_NO_WRITES = "writes nothing but its log, and waits or computes"
ABSENT: dict[Cell, str] = {
    **{
        Cell(process, fault, "finalising"): _NOTHING_ASKED
        for process in ("scheduler", "detokenizer")
        for fault in FAULTS
    },
    **{
        Cell(process, "SIGTERM", phase): _NOT_HEARD
        for process in ("scheduler", "detokenizer")
        for phase in ("idle", "prefill", "finalising")
    },
    **{
        Cell(process, fault, phase): _NO_WRITES
        for process in ("scheduler", "detokenizer")
        for fault in ("full disk", "removed folder", "clock set")
        for phase in ("idle", "prefill")
    },
}
"""Cells that make no sense, and why."""

_HEAD = """# Faults and the tests that hold them

Written by `python -m tests.faults.matrix > docs/faults.md`. In each cell: rows exactly once, nothing lost that was
acknowledged, nothing left behind. Below the seam of `offline/runtime` an engine is one thing that lives or is dead, so
there a dead scheduler and a dead detokenizer are one test; real ones are ended with `scripts/test --thorough`. On a
server the engine is started again behind it (`tests/test_launch_server.py`), and so is the server itself.
"""


def holders_of(cell: Cell) -> list[str]:
    """Tests that hold a cell."""
    return [test for test, cells in HOLDERS.items() if cell in cells]


def phases_of(test: str, **chosen: str) -> list[str]:
    """Phases in which a test holds a fault, in order."""
    cells = [cell for cell in HOLDERS[test] if all(getattr(cell, name) == value for name, value in chosen.items())]
    return [phase for phase in PHASES if phase in {cell.phase for cell in cells}]


def table() -> str:
    """The whole as Markdown."""
    notes = [*HOLDERS, *dict.fromkeys(ABSENT.values())]
    lines = [_HEAD, f"| | | {' | '.join(PHASES)} |", "|---|---|" + "---|" * len(PHASES)]
    for process, fault in product(PROCESSES, FAULTS):
        entries = []
        for phase in PHASES:
            cell = Cell(process, fault, phase)
            numbers = [str(notes.index(note) + 1) for note in holders_of(cell) or [ABSENT[cell]]]
            entries.append(", ".join(numbers) if holders_of(cell) else f"- ({numbers[0]})")
        lines.append(f"| {process} | {fault} | {' | '.join(entries)} |")
    lines.append("")
    for number, note in enumerate(notes, start=1):
        where = note.replace("::", "`: `") if note in HOLDERS else note
        lines.append(f"{number}. `{where}`" if note in HOLDERS else f"{number}. not tested: {where}")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    print(table(), end="")
