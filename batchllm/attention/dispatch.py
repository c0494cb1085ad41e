"""Which attention a step takes: ours over shared segments, FlashInfer's cascade, or the engine's own.

Knows: layouts, and a table of what was fastest on a device. Must not know: tensors, how any of the three works.
Invariant: the same layout, heads and device take the same path; every choice is counted with its reason.

The table is a JSON file, `dispatch_table.json` beside this one, written by ``eval/bench_attention.py --table`` on a
device. It maps a device and the heads of a layer (`table_key`) to the fastest path of steps that consist of groups of
equal size. No device has been measured yet: the file is empty, and no step takes ``cascade``::

    {"NVIDIA H200 32/8/128 bfloat16": {
        "min_saved_share": 0.1,
        "decode": {
            "group_sizes": [2, 4, 16],
            "shared_lens": [256, 2000],
            "paths": [["plain", "shared"], ["shared", "shared"], ["shared", "cascade"]]},
        "extend": {...}}}

``paths[i][j]`` holds from ``group_sizes[i]`` readers and ``shared_lens[j]`` tokens on, up to the next; below the first
of either it is ``plain``. ``min_saved_share`` and both kinds of step may be left out.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np

from batchllm.attention.layout import AttentionLayout
from batchllm.errors import ConfigError

AttentionPath = Literal["shared", "cascade", "plain"]
Kind = Literal["decode", "extend"]

TABLE_PATH = Path(__file__).with_name("dispatch_table.json")

# On a device that was never measured: partial results cost about as much as this share of the KV reads of a step.
_MIN_SAVED_SHARE = 0.1


@dataclass(frozen=True, slots=True)
class Choice:
    """What a step takes, and why.

    Attributes:
        path: ``shared``, ``cascade`` or ``plain``.
        reason: One of a few phrases, so that steps can be counted by it.
        saved_share: Share of the KV reads of a step that sharing saves; 0 to 1.
        group_size: Readers of a shared token, on average over the reads that sharing saves.
        shared_len: Tokens that a reader has in segments, on average over the same.
    """

    path: AttentionPath
    reason: str
    saved_share: float = 0.0
    group_size: float = 0.0
    shared_len: float = 0.0


@dataclass(frozen=True, slots=True)
class _Measured:
    """One kind of step on one device: ``paths[i][j]`` from ``group_sizes[i]`` and ``shared_lens[j]`` on."""

    group_sizes: list[int]
    shared_lens: list[int]
    paths: list[list[AttentionPath]]

    def path(self, group_size: float, shared_len: float) -> AttentionPath:
        # Means of whole numbers: half a unit of slack, so that rounding does not move them to the cell below.
        row = int(np.searchsorted(self.group_sizes, group_size + 0.5, side="right")) - 1
        column = int(np.searchsorted(self.shared_lens, shared_len + 0.5, side="right")) - 1
        return self.paths[row][column] if row >= 0 and column >= 0 else "plain"


class Dispatcher:
    """Chooses, and counts what it chose.

    Attributes:
        counts: Steps so far by path and reason.
    """

    def __init__(self, key: str, *, table: Mapping[str, Any] | None = None, has_cascade: bool = True) -> None:
        """Read what was measured on a device.

        Args:
            key: The device and the heads, as of `table_key`.
            table: In place of the file's content.
            has_cascade: Whether FlashInfer is there; if not, ``shared`` takes its steps.

        Raises:
            ConfigError: The table is malformed.
        """
        table = load_table() if table is None else table
        entry = table.get(key, {})
        if not isinstance(entry, Mapping):
            raise ConfigError(f"dispatch table, {key}: must be an object")
        self._min_saved_share = float(entry.get("min_saved_share", _MIN_SAVED_SHARE))
        self._measured = {kind: _checked(key, kind, entry[kind]) for kind in get_args(Kind) if kind in entry}
        self._has_cascade = has_cascade
        self.counts: Counter[tuple[AttentionPath, str]] = Counter()

    def choose(self, layout: AttentionLayout) -> Choice:
        """The path of a step; counted."""
        choice = self._choose(layout)
        self.counts[choice.path, choice.reason] += 1
        return choice

    def report(self) -> str:
        """One line: how many steps took which path, most frequent first."""
        return "; ".join(f"{path} {count} ({reason})" for (path, reason), count in self.counts.most_common())

    def _choose(self, layout: AttentionLayout) -> Choice:
        if len(layout.segment_readers) == 0:
            return Choice("plain", "nothing is shared")
        saved_share, group_size, shared_len = sharing(layout)
        if saved_share < self._min_saved_share:
            return Choice("plain", "sharing saves too little", saved_share, group_size, shared_len)
        kind: Kind = "decode" if layout.qo_indptr[-1] <= len(layout.order) else "extend"
        measured = self._measured.get(kind)
        if measured is None:
            return Choice("shared", "sharing saves enough, not measured", saved_share, group_size, shared_len)
        path, reason = measured.path(group_size, shared_len), "measured"
        if path == "cascade" and not self._has_cascade:
            path, reason = "shared", "measured, but FlashInfer is missing"
        return Choice(path, reason, saved_share, group_size, shared_len)


def sharing(layout: AttentionLayout) -> tuple[float, float, float]:
    """Share of the KV reads that sharing saves, and, averaged over these, group size and shared length of a reader.

    Of a layout with segments. A step of equal groups of one level has exactly its group size and prefix length.
    """
    readers = np.diff(layout.segment_readers, axis=1)[:, 0].astype(np.int64)
    length = np.diff(layout.segment_span, axis=1)[:, 0].astype(np.int64)
    end = layout.segment_span[:, 1].astype(np.int64)
    saved = (readers - 1) * length
    total = int(saved.sum())
    share = total / max(1, int(layout.kv_len.sum(dtype=np.int64)))
    # Positions before an inner segment are shared as well: to its readers all up to its end is.
    return share, float((saved * readers).sum() / max(1, total)), float((saved * end).sum() / max(1, total))


def table_key(device_name: str, num_heads: int, num_kv_heads: int, head_dim: int, dtype: object) -> str:
    """What a measurement holds for, e.g. ``NVIDIA H200 32/8/128 bfloat16``; the device's name is torch's."""
    return f"{device_name} {num_heads}/{num_kv_heads}/{head_dim} {str(dtype).removeprefix('torch.')}"


def fastest(times_ms: Mapping[AttentionPath, tuple[float, float]], num_layers: int) -> AttentionPath:
    """The path whose step takes least.

    Args:
        times_ms: What each path takes to plan a step, which is done once, and to run one layer.
        num_layers: Layers that run what was planned.
    """
    return min(times_ms, key=lambda path: times_ms[path][0] + num_layers * times_ms[path][1])


def load_table(path: Path = TABLE_PATH) -> dict[str, Any]:
    """The table's entries; none if there is no file.

    Raises:
        ConfigError: The file is not a JSON object.
    """
    try:
        table = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}: not JSON ({error})") from None
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: must be an object of devices")
    return table


def _checked(key: str, kind: str, entry: Any) -> _Measured:
    where = f"dispatch table, {key}, {kind}"
    if not isinstance(entry, Mapping) or set(entry) != {"group_sizes", "shared_lens", "paths"}:
        raise ConfigError(f"{where}: must have group_sizes, shared_lens and paths")
    measured = _Measured(**entry)
    for name, axis in (("group_sizes", measured.group_sizes), ("shared_lens", measured.shared_lens)):
        if not axis or any(not isinstance(value, int) for value in axis) or sorted(set(axis)) != axis:
            raise ConfigError(f"{where}: {name} must be whole numbers, each larger than the one before, not {axis}")
    if [len(row) for row in measured.paths] != [len(measured.shared_lens)] * len(measured.group_sizes):
        raise ConfigError(f"{where}: paths must have a row for each of group_sizes, a column for each of shared_lens")
    unknown = {path for row in measured.paths for path in row} - set(get_args(AttentionPath))
    if unknown:
        raise ConfigError(f"{where}: paths must be of {', '.join(get_args(AttentionPath))}, not {sorted(unknown)}")
    return measured
