"""A dataset in units: rows that share prefixes together, the most work first.

Ray Data sorts the keys of the rows, which says what neighbours share; the planner cuts the order in ranges; Ray Data
brings the rows of each range together. A row of the result is a unit, which no block border can part.

Knows Ray Data's methods, and that a dataset gives the same rows each time. Must not know tokens or engines.

INVARIANT: each row of the dataset is in exactly one unit, whole.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa

from batchllm.dataset import ColumnMap
from batchllm.errors import ConfigError, WorkloadError
from batchllm.planner import cut_in_ranges, request_work
from batchllm.ray.keys import TableReader, row_key, shared_len
from batchllm.tokens import Int64Array

MAX_UNIT_BYTES = 64 << 20
"""Of a unit's rows: half of what Ray Data makes its blocks of."""
_MIN_UNIT_WORK = 2048.0
"""Prompt tokens, or as much: Ray Data and the engine take a tenth of a second for each unit."""
_SORTED_BYTES = 16 << 20
"""Of keys, in a task of the sort: Ray Data would have 200 tasks, whatever there is to sort."""
_UNIT = "batchllm_unit"
_KEY_TYPES = {"key": pa.string(), "scale": pa.float64(), "prompt_len": pa.float64(), "decode_len": pa.float64()}
_NUMBERS = ("scale", "prompt_len", "decode_len", "num_bytes")
_BY_TABLE: dict[str, Any] = {"batch_format": "pyarrow", "batch_size": None}


def plan(
    dataset: Any,
    *,
    num_engines: int | None = None,
    columns: ColumnMap | None = None,
    sampling: Mapping[str, Any] | None = None,
) -> Any:
    """Put the rows of a dataset in units, for `BatchStage`.

    The dataset is read twice, here and when the units are, and must give the same rows both times; ``materialize`` one
    that does not. A group of rows that share a prefix is in one unit unless it is more work than half of what an
    engine's share of the work left is.

    Args:
        dataset: A ``ray.data.Dataset``: a row of ``batchllm run`` each, with an id.
        num_engines: Engines that will answer it; None for as many as the cluster has GPUs, or one.
        columns: Where the id and the prompt are; None: the fields of a row, under their own names.
        sampling: Sampling of rows that say nothing, in SGLang's names.

    Returns:
        A ``ray.data.Dataset`` with a row for each unit, the most work first: ``unit``, its number; ``num_rows``;
        ``num_cut_tokens``, about how many prompt tokens it computes that another unit computes too; ``rows``, a list
        of structs with the columns of the dataset.

    Raises:
        ConfigError: An argument is wrong, or the dataset has no column that could be a prompt, or no ids.
        WorkloadError: The dataset has no rows.
    """
    if num_engines is not None and num_engines < 1:
        raise ConfigError(f"num_engines {num_engines}: must be at least 1")
    reader = TableReader(columns, sampling)
    _check_columns(dataset, reader.columns)
    keys = dataset.map_batches(_keys, fn_args=(reader,), **_BY_TABLE).materialize()
    keys = keys.repartition(-(-keys.size_bytes() // _SORTED_BYTES) or 1).sort("key").materialize()
    firsts, num_cut_tokens, starts = _ranges(keys, _num_gpus() if num_engines is None else num_engines)
    borders = _borders(keys, firsts, starts)
    numbered = dataset.map_batches(_with_unit, fn_args=(reader, borders), **_BY_TABLE)
    others = list(range(1, len(firsts)))
    together = numbered.sort(_UNIT, boundaries=others) if others else numbered.repartition(1)
    return together.map_batches(_packed, fn_args=(num_cut_tokens,), **_BY_TABLE)


def unpacked(table: pa.Table) -> pa.Table:
    """The rows of some units as the dataset had them; a table that `plan` has not made is given back.

    Args:
        table: Units, or rows.
    """
    if table.column_names[-1] != "rows" or table.column_names[0] != "unit":
        return table
    structs = table.column("rows").combine_chunks().flatten()
    return pa.table(structs.flatten(), names=[field.name for field in structs.type])


def _num_gpus() -> int:
    import ray

    return max(1, int(ray.cluster_resources().get("GPU", 0)))


def _check_columns(dataset: Any, columns: ColumnMap) -> None:
    schema = dataset.schema()
    if schema is None:
        raise WorkloadError("the dataset has no rows; there is nothing to answer")
    columns.check_columns(schema.names, "the dataset")
    named = columns.id_column or ("custom_id" if columns.is_openai(schema.names) else "id")
    if named not in schema.names:
        raise ConfigError(
            f"the dataset has no column {named}: answers are matched to rows by their ids; name it with "
            f"columns=ColumnMap(id_column=...)"
        )


# In Ray Data's tasks


def _keys(table: pa.Table, reader: TableReader) -> pa.Table:
    """The key of each row, and how much of it there is."""
    keys = [row_key(row) for row in reader.read(plain(table))] if table.num_rows else []
    columns = zip(*keys, strict=True) if keys else [()] * len(_KEY_TYPES)
    made = {name: pa.array(values, _KEY_TYPES[name]) for name, values in zip(_KEY_TYPES, columns, strict=True)}
    num_bytes = np.full(len(keys), table.nbytes / max(1, table.num_rows))
    return pa.table(made | {"num_bytes": pa.array(num_bytes)})


def _measured(table: pa.Table) -> pa.Table:
    """Of sorted keys: the first and the last, and of each row what it shares with the one before it. One row."""
    keys = table.column("key").to_pylist()
    shared = [0, *(shared_len(one, other) for one, other in pairwise(keys))]
    columns = {name: [table.column(name).to_pylist()] for name in _NUMBERS}
    if not keys:
        return pa.table({})
    return pa.table({"first": keys[:1], "last": keys[-1:], "shared": [shared], **columns})


def _picked(table: pa.Table, wanted: Mapping[str, Sequence[tuple[int, int]]]) -> pa.Table:
    """The least text that sorts behind the row before, of each row that begins a unit: number of the unit and text."""
    keys = table.column("key").to_pylist()
    found = [(unit, keys[place]) for unit, place in wanted.get(keys[0] if keys else "", ())]
    return pa.table(
        {
            "unit": pa.array([unit for unit, _ in found], pa.int64()),
            "key": pa.array([key for _, key in found], pa.string()),
        }
    )


def _with_unit(table: pa.Table, reader: TableReader, borders: Sequence[str]) -> pa.Table:
    """The rows, each with the number of its unit."""
    table = plain(table)
    numbers = [bisect_right(borders, row_key(row).key) for row in reader.read(table)] if table.num_rows else []
    return table.append_column(_UNIT, pa.array(numbers, pa.int64()))


def _packed(table: pa.Table, num_cut_tokens: Sequence[int]) -> pa.Table:
    """A row for each unit of sorted rows."""
    numbers = table.column(_UNIT).to_numpy()
    table = table.drop_columns([_UNIT])
    starts = np.flatnonzero(np.diff(numbers, prepend=-1))
    ends = np.append(starts[1:], len(numbers))[: len(starts)]
    structs = table.to_struct_array().combine_chunks()
    units = numbers[starts].tolist()
    return pa.table(
        {
            "unit": pa.array(units, pa.int64()),
            "num_rows": pa.array((ends - starts).tolist(), pa.int64()),
            "num_cut_tokens": pa.array([num_cut_tokens[unit] for unit in units], pa.int64()),
            "rows": pa.ListArray.from_arrays(pa.array([0, *ends], pa.int32()), structs),
        }
    )


def plain(table: pa.Table) -> pa.Table:
    """The table without types of Ray's own, which hold arrays of numpy: lists in their place."""
    for number, field in enumerate(table.schema):
        if isinstance(field.type, pa.BaseExtensionType):
            values = [None if value is None else value.tolist() for value in table.column(number).to_pylist()]
            table = table.set_column(number, field.name, pa.array(values))
    return table


# In the driver


def _ranges(keys: Any, num_engines: int) -> tuple[Int64Array, list[int], dict[str, int]]:
    """Where units begin, by place in the order of the keys; what each computes again; the place of each block's key."""
    blocks = sorted(_measured_blocks(keys), key=lambda block: str(block["first"]))
    if not blocks:
        raise WorkloadError("the dataset has no rows; there is nothing to answer")
    for before, block in pairwise(blocks):
        block["shared"][0] = shared_len(before["last"], block["first"])
    scale, prompt_len, decode_len, num_bytes, shared = (
        np.concatenate([block[name] for block in blocks]) for name in (*_NUMBERS, "shared")
    )
    loss = np.minimum(shared * scale, prompt_len)
    work = request_work(prompt_len - loss, prompt_len, decode_len) + 1.0
    firsts = cut_in_ranges(work, loss, num_engines, min_work=_MIN_UNIT_WORK, sizes=num_bytes, max_size=MAX_UNIT_BYTES)
    starts, place = {}, 0
    for block in blocks:
        starts[block["first"]] = place
        place += len(block["shared"])
    return firsts, [round(loss[first]) for first in firsts], starts


def _measured_blocks(keys: Any) -> Iterator[dict[str, Any]]:
    """What `_measured` says of each block: texts, and arrays of float64."""
    tables = keys.map_batches(_measured, **_BY_TABLE).iter_batches(batch_size=None, batch_format="pyarrow")
    for table in tables:
        for row in range(table.num_rows):
            block = {name: table.column(name)[row].as_py() for name in ("first", "last")}
            lists = {name: table.column(name)[row].values for name in (*_NUMBERS, "shared")}
            yield block | {name: np.array(values, np.float64) for name, values in lists.items()}


def _borders(keys: Any, firsts: Int64Array, starts: Mapping[str, int]) -> list[str]:
    """The key at which each unit but the first begins, ascending."""
    block_of = np.searchsorted(np.array(list(starts.values())), firsts, "right") - 1
    names = list(starts)
    wanted: dict[str, list[tuple[int, int]]] = {}
    for unit, (first, block) in enumerate(zip(firsts.tolist(), block_of.tolist(), strict=True)):
        if unit:
            wanted.setdefault(names[block], []).append((unit, first - starts[names[block]]))
    picked = keys.map_batches(_picked, fn_args=(wanted,), **_BY_TABLE).take_all()
    return [row["key"] for row in sorted(picked, key=lambda row: int(row["unit"]))]
