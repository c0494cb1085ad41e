"""Heads of rows on disk."""

from __future__ import annotations

import contextlib
import tempfile
from pathlib import Path
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from batchllm.dataset import RowHead
from batchllm.offline.row_spool import RowSpool

_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
_INTEGERS = st.integers(-(1 << 63), (1 << 64) - 1)
_SCALARS = st.one_of(st.none(), st.booleans(), _INTEGERS, st.floats(allow_nan=False, allow_infinity=False), _TEXT)
_VALUES = st.recursive(_SCALARS, lambda inner: st.lists(inner) | st.dictionaries(_TEXT, inner))
_CARRIED = st.none() | st.dictionaries(_TEXT, _VALUES)


@st.composite
def _heads(draw: st.DrawFn) -> RowHead:
    kind: Any = draw(st.sampled_from(["plain", "chat", "score"]))
    given_id = draw(_TEXT | st.integers(-(1 << 63), (1 << 63) - 1))
    counts = [draw(st.integers(0, 1 << 40)) for _ in range(4)]
    return RowHead(
        counts[0],
        counts[1],
        kind,
        given_id,
        draw(st.none() | _TEXT),
        draw(_CARRIED),
        counts[2],
        draw(st.booleans()),
        counts[3],
        echo=draw(st.none() | st.lists(_TEXT | st.lists(st.integers(0, 1 << 31)))),
        chat=draw(_CARRIED),
    )


@given(heads=st.lists(_heads(), min_size=1, max_size=5), data=st.data())
def test_a_head_is_read_as_it_was_written(heads: list[RowHead], data: st.DataObject) -> None:
    """In any order, with values of every kind that JSON has."""
    with tempfile.TemporaryDirectory() as name, contextlib.closing(RowSpool(Path(name))) as spool:
        for head in heads:
            spool.append(head)
        spool.flush()
        for row in data.draw(st.permutations(range(len(heads)))):
            assert spool.read(row) == heads[row]
