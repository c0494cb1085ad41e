"""``batchllm status``: how far a job is, how fast, and what failed."""

from __future__ import annotations

import argparse
import dataclasses
import json
import time
from pathlib import Path

from batchllm.cli.outcome import EXIT_OK, refuse
from batchllm.offline.journal import JobStatus, read_status
from batchllm.offline.journal.database import damaged, database_path

_NUM_EVENTS = 10


def status(args: argparse.Namespace, server_flags: list[str]) -> int:
    """Print the state of a job, running or not; returns the exit status."""
    refuse(server_flags, "status")
    found = read_status(Path(args.job_dir))
    try:
        text = json.dumps(dataclasses.asdict(found), indent=2) if args.json else _render(found)
    except (OverflowError, OSError, TypeError, ValueError) as error:  # a value of another kind than was written
        raise damaged(database_path(Path(args.job_dir)), str(error)) from error
    print(text)
    return EXIT_OK


def _render(found: JobStatus) -> str:
    num_rows = found.notes.get("num_rows")
    is_done = num_rows == found.num_finished
    state = "done" if is_done else "not running; the command that began it goes on with it"
    if found.writer_pid is not None:
        state = f"running, process {found.writer_pid or 'unknown'}"
    total = "a number not known yet of" if num_rows is None else f"{num_rows:,}"
    lines = [
        f"state    {state}",
        f"rows     {found.num_finished:,} of {total} rows have their result, {found.num_failed:,} of them failed",
        f"tokens   {found.num_prompt_tokens:,} prompt, {found.num_output_tokens:,} output",
        f"speed    {found.recent_speed.rows_per_s:,.1f} rows/s, {found.recent_speed.tokens_per_s:,.0f} tokens/s "
        f"over the last {found.recent_speed.elapsed_s:,.0f} s of running",
        f"         {found.whole_speed.rows_per_s:,.1f} rows/s, {found.whole_speed.tokens_per_s:,.0f} tokens/s "
        f"over all {found.whole_speed.elapsed_s:,.0f} s",
    ]
    for kind in found.failures:
        lines.append(f"failed   {kind.num_rows:,} rows: {kind.code}")
        lines += [f"         row {row + 1}: {message}" for row, message in kind.examples]
    for at, kind_of_event, detail in found.events[-_NUM_EVENTS:]:
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(at))
        lines.append(f"event    {when} {kind_of_event} {detail}".rstrip())
    return "\n".join(lines)
