"""A store gives back the rows it took, from memory or from its file, and takes the memory it may."""

from __future__ import annotations

import os
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.errors import WorkloadError
from batchllm.offline.token_store import TokenMemory, TokenStore
from batchllm.tokens import Int32Array, TokenTable
from tests.disk_limits import files_may_have
from tests.sizes import sized

# A first call compiles, or loads what was compiled.
untimed = settings(deadline=None)

AMPLE = 1 << 30
MIB = 1 << 20

slices = st.lists(st.lists(st.lists(st.integers(0, 2**31 - 1), max_size=6), max_size=5), max_size=5)
limits = st.sampled_from([0, 8, 40, AMPLE])


def _array(ids: list[int]) -> Int32Array:
    return np.array(ids, np.int32)


def _put(store: TokenStore, rows: list[list[int]], in_bulk: bool) -> None:
    if in_bulk:
        store.extend(_array([token for row in rows for token in row]), np.array([len(row) for row in rows], np.int64))
    else:
        for row in rows:
            store.append(_array(row))


def _rows_of(table: TokenTable) -> list[list[int]]:
    return [table.row(i).tolist() for i in range(len(table))]


def _rows_of_blocks(store: TokenStore) -> list[list[int]]:
    rows: list[list[int]] = []
    for block in store.blocks():
        assert block.first_row == len(rows)
        rows += _rows_of(TokenTable(tokens=block.tokens, offsets=block.offsets))
    return rows


@untimed
@given(slices, limits, st.booleans(), st.data())
def test_rows_come_back_as_they_were_taken(
    given_slices: list[list[list[int]]], limit: int, in_bulk: bool, data: st.DataObject
) -> None:
    """However they were appended, whether spilled, and whatever was read in between."""
    rows: list[list[int]] = []
    with closing(TokenStore(None, limit)) as store:
        for part in given_slices:
            _put(store, part, in_bulk)
            rows += part
            num_tokens = sum(map(len, rows))
            assert (store.num_rows, store.num_tokens) == (len(rows), num_tokens)
            assert store.is_spilled == (num_tokens * 4 > limit)
            assert store.lengths.tolist() == [len(row) for row in rows]
            assert _rows_of(store.table()) == rows
            assert _rows_of_blocks(store) == rows
            chosen = data.draw(st.lists(st.integers(0, len(rows) - 1), max_size=9)) if rows else []
            assert _rows_of(store.table(np.array(chosen, np.int64))) == [rows[i] for i in chosen]


@pytest.mark.parametrize("limit", [AMPLE, 8 * MIB, 0])
def test_rows_of_many_blocks_and_rows_longer_than_one_come_back(tmp_path: Path, limit: int) -> None:
    random = np.random.default_rng(0)
    lens = random.integers(0, 4000, 2000)
    lens[1000] = 5_000_000
    tokens = random.integers(0, 2**31 - 1, int(lens.sum()), dtype=np.int32)
    offsets = np.append(0, np.cumsum(lens))
    store = TokenStore(tmp_path, limit)
    for first in range(0, 2000, 100):
        store.extend(tokens[offsets[first] : offsets[first + 100]], lens[first : first + 100])
    assert store.is_spilled == (limit != AMPLE)
    assert np.array_equal(store.table().tokens, tokens)
    blocks = list(store.blocks())
    assert len(blocks) > (4 if store.is_spilled else 0)
    assert np.array_equal(np.concatenate([block.tokens for block in blocks]), tokens)
    chosen = random.integers(0, 2000, 3000)
    table = store.table(chosen)
    assert all(np.array_equal(table.row(i), tokens[offsets[r] : offsets[r + 1]]) for i, r in enumerate(chosen))
    store.close()


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 400) | st.none()), max_size=60), st.integers(0, 6000))
def test_stores_that_share_memory_never_have_more_than_there_is(
    steps: list[tuple[int, int | None]], limit: int
) -> None:
    """Rows come back wherever they are; a store that spills or is closed leaves its memory to the others."""
    shared = TokenMemory(2 * limit, max_jobs=4)
    stores: dict[int, TokenStore] = {}
    for number, length in steps:
        if length is None:
            if number in stores:
                stores.pop(number).close()
        else:
            stores.setdefault(number, TokenStore(None, AMPLE, shared)).append(np.full(length, number, np.int32))
        in_memory = [store for store in stores.values() if not store.is_spilled]
        assert 4 * sum(store.num_tokens for store in in_memory) <= shared.num_bytes <= shared.peak_bytes <= limit
    for number, store in stores.items():
        assert store.table().tokens.tolist() == [number] * store.num_tokens
        store.close()
        store.close()
    assert shared.num_bytes == 0


def test_a_table_of_all_rows_in_memory_is_not_a_copy(tmp_path: Path) -> None:
    store = TokenStore(tmp_path, AMPLE)
    store.append(_array([1, 2, 3]))
    assert np.shares_memory(store.table().tokens, store.table().tokens)
    with pytest.raises(ValueError, match="read-only"):
        store.table().tokens[0] = 9


def test_memory_that_a_table_looks_at_does_not_move(tmp_path: Path) -> None:
    """Rather than move it away under the table the store refuses, and goes on when the table is gone."""
    store = TokenStore(tmp_path, AMPLE)
    store.append(_array([1, 2, 3]))
    table = store.table()
    many = np.zeros(8 * MIB, np.int32)
    with pytest.raises(BufferError):
        store.append(many)
    assert table.tokens.tolist() == [1, 2, 3]
    del table
    store.append(many)
    assert store.lengths.tolist() == [3, len(many)]
    assert store.table(np.array([0])).tokens.tolist() == [1, 2, 3]


@pytest.mark.parametrize(("spills", "most_mib"), [(False, 1.1 * 256 + 20), (True, 64 + 20)])
def test_memory_is_bounded_by_the_table_or_by_the_limit(tmp_path: Path, spills: bool, most_mib: float) -> None:
    """Millions of rows, 256 MiB of tokens: a tenth more at most, and once spilled their memory is given back."""
    script = """
import sys
import numpy as np
from pathlib import Path
from batchllm.offline.token_store import TokenStore

def kib(name):
    return int(next(line for line in open("/proc/self/status") if line.startswith(name)).split()[1])

before = kib("VmHWM")
store = TokenStore(Path(sys.argv[1]), int(sys.argv[2]))
num_rows = int(sys.argv[3])
row = np.zeros((1 << 26) // num_rows, np.int32)
for _ in range(num_rows):
    store.append(row)
print(store.num_tokens, store.is_spilled, kib("VmHWM") - before, kib("VmRSS") - before)
"""
    limit = 64 * MIB if spills else AMPLE
    num_rows = sized(1 << 20, 1 << 22)
    command = [sys.executable, "-c", script, str(tmp_path), str(limit), str(num_rows)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    assert output[:2] == [str(1 << 26), str(spills)]
    lengths_mib = 4 * num_rows / MIB  # beside the tokens
    assert int(output[2]) / 1024 <= most_mib + lengths_mib
    if spills:
        assert int(output[3]) / 1024 <= 20 + lengths_mib


def test_the_file_has_no_name_and_goes_when_the_store_is_closed(tmp_path: Path) -> None:
    num_open = len(os.listdir("/proc/self/fd"))
    store = TokenStore(tmp_path, 0)
    store.append(_array([1, 2, 3]))
    assert store.is_spilled
    assert list(tmp_path.iterdir()) == []
    assert len(os.listdir("/proc/self/fd")) == num_open + 1
    store.close()
    store.close()
    assert len(os.listdir("/proc/self/fd")) == num_open


def test_a_full_disk_is_said_with_the_folder(tmp_path: Path) -> None:
    store = TokenStore(tmp_path, 0)
    with files_may_have(64 * 1024), pytest.raises(WorkloadError, match="make room") as caught:
        store.extend(np.zeros(8 * MIB, np.int32), np.array([8 * MIB]))
    assert str(tmp_path) in str(caught.value)
    store.close()


def test_a_disk_that_fills_while_rows_wait_in_the_buffer_is_said_when_they_are_read(tmp_path: Path) -> None:
    store = TokenStore(tmp_path, 0)
    store.append(_array([1]))
    store.append(np.zeros(100_000, np.int32))
    with files_may_have(1024), pytest.raises(WorkloadError, match="make room"):
        store.table()
    store.close()


def test_a_folder_that_is_not_there_is_said(tmp_path: Path) -> None:
    store = TokenStore(tmp_path / "gone", 4)
    store.append(_array([1]))
    with pytest.raises(WorkloadError, match="gone: No such file"):
        store.append(_array([2]))


def test_lengths_must_add_up_to_the_tokens() -> None:
    store = TokenStore(None, AMPLE)
    with pytest.raises(WorkloadError, match="rows of 3 tokens were announced and 2 given"):
        store.extend(_array([1, 2]), np.array([3]))
    assert (store.num_rows, store.num_tokens) == (0, 0)
