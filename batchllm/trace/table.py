"""Names, values and notes in aligned columns, for a terminal."""

from __future__ import annotations

from collections.abc import Sequence


def aligned(rows: Sequence[tuple[str, str, str]]) -> str:
    """A line a row, without a final newline: the name, the value, and a note on it (which may be empty)."""
    name_width, value_width = (max(len(row[column]) for row in rows) for column in (0, 1))
    return "\n".join(f"{name:<{name_width}}  {value:>{value_width}}  {note}".rstrip() for name, value, note in rows)
