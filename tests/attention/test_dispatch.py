"""A step takes the path that was measured to be fastest for what it shares, and every choice says why."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from batchllm.attention import AttentionLayout, PrefixPaths, plan_layout
from batchllm.attention.dispatch import TABLE_PATH, Dispatcher, fastest, load_table, sharing, table_key
from batchllm.errors import ConfigError

_TABLE: dict[str, Any] = {
    "card": {
        "decode": {
            "group_sizes": [2, 8],
            "shared_lens": [100, 1000],
            "paths": [["plain", "shared"], ["shared", "cascade"]],
        },
        "extend": {"group_sizes": [2], "shared_lens": [1], "paths": [["plain"]]},
    }
}


def _step(num_groups: int, group_size: int, prefix_len: int, private_len: int, qo_len: int = 1) -> AttentionLayout:
    paths = PrefixPaths()
    ids = [paths.add(-1, prefix_len) for _ in range(num_groups)] if prefix_len else [-1] * num_groups
    num_sequences = num_groups * group_size
    return plan_layout(
        table_rows=np.arange(num_sequences, dtype=np.int32),
        qo_len=np.full(num_sequences, qo_len, np.int32),
        kv_len=np.full(num_sequences, prefix_len + private_len, np.int32),
        leaf=np.resize(np.array(ids, np.int32), num_sequences),
        paths=paths,
    )


def _path(layout: AttentionLayout, **options: Any) -> tuple[str, str]:
    choice = Dispatcher("card", **{"table": _TABLE, **options}).choose(layout)
    return choice.path, choice.reason


def test_equal_groups_are_what_the_table_names() -> None:
    """3 groups of 4 readers, 600 tokens of 800: three quarters of what is shared need not be read."""
    share, group_size, shared_len = sharing(_step(3, 4, 600, 200))
    assert (share, group_size, shared_len) == (pytest.approx(0.75 * 600 / 800), 4, 600)


def test_nested_segments_count_up_to_their_end() -> None:
    """4 readers of 100 tokens, 2 of them of 100 more: 300 reads saved at (4, 100), 100 at (2, 200)."""
    paths = PrefixPaths()
    outer = paths.add(-1, 100)
    inner = paths.add(outer, 200)
    layout = plan_layout(
        table_rows=np.arange(4, dtype=np.int32),
        qo_len=np.ones(4, np.int32),
        kv_len=np.full(4, 250, np.int32),
        leaf=np.array([outer, inner, outer, inner], np.int32),
        paths=paths,
    )
    share, group_size, shared_len = sharing(layout)
    assert (share, group_size, shared_len) == (pytest.approx(400 / 1000), 3.5, 125)


@pytest.mark.parametrize(
    ("group_size", "prefix_len", "path"),
    [
        (2, 99, "plain"),
        (2, 100, "plain"),
        (2, 1000, "shared"),
        (7, 999, "plain"),
        (8, 100, "shared"),
        (8, 999, "shared"),
        (64, 20_000, "cascade"),
    ],
)
def test_measured_cells_hold_up_to_the_next(group_size: int, prefix_len: int, path: str) -> None:
    assert _path(_step(3, group_size, prefix_len, 50)) == (path, "measured")


def test_nothing_shared_is_plain() -> None:
    assert _path(_step(4, 3, 0, 50)) == ("plain", "nothing is shared")
    assert _path(_step(4, 1, 900, 50)) == ("plain", "nothing is shared")


def test_little_shared_is_plain_on_any_device() -> None:
    """Half of 100 of 1100 tokens: 4.5 %, below the default threshold, above one of the device's own."""
    layout = _step(4, 2, 100, 1000)
    assert _path(layout) == ("plain", "sharing saves too little")
    assert _path(layout, table={}) == ("plain", "sharing saves too little")
    assert _path(layout, table={"card": {"min_saved_share": 0.04}})[0] == "shared"


def test_a_device_never_measured_takes_what_saves_reads() -> None:
    assert _path(_step(2, 4, 600, 200), table={}) == ("shared", "sharing saves enough, not measured")


def test_steps_that_compute_prompts_have_a_table_of_their_own() -> None:
    assert _path(_step(3, 8, 2000, 50)) == ("cascade", "measured")
    assert _path(_step(3, 8, 2000, 50, qo_len=2)) == ("plain", "measured")


def test_without_flashinfer_its_steps_are_ours() -> None:
    assert _path(_step(3, 8, 2000, 50), has_cascade=False) == ("shared", "measured, but FlashInfer is missing")


def test_choices_are_counted_by_reason() -> None:
    dispatcher = Dispatcher("card", table=_TABLE)
    for layout in (_step(3, 8, 2000, 50), _step(3, 9, 2000, 50), _step(3, 3, 0, 50)):
        dispatcher.choose(layout)
    assert dispatcher.counts == {("cascade", "measured"): 2, ("plain", "nothing is shared"): 1}
    assert dispatcher.report() == "cascade 2 (measured); plain 1 (nothing is shared)"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ([], "must be an object"),
        ({"decode": {}}, "card, decode: must have group_sizes"),
        ({"decode": {"group_sizes": [4, 2], "shared_lens": [1], "paths": [["plain"]] * 2}}, "larger than the one"),
        ({"decode": {"group_sizes": [2, 4], "shared_lens": [1], "paths": [["plain"]]}}, "a row for each"),
        ({"extend": {"group_sizes": [2], "shared_lens": [1], "paths": [["fast"]]}}, "not \\['fast'\\]"),
    ],
)
def test_a_malformed_table_says_where(entry: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Dispatcher("card", table={"card": entry})


def test_the_table_that_is_shipped_is_well_formed(tmp_path: Path) -> None:
    for name in load_table():
        Dispatcher(name)
    assert TABLE_PATH.exists()
    assert load_table(tmp_path / "none.json") == {}
    broken = tmp_path / "broken.json"
    broken.write_text("[")
    with pytest.raises(ConfigError, match=r"broken\.json: not JSON"):
        load_table(broken)


def test_what_was_measured_with_other_heads_says_nothing() -> None:
    """Of the same card: 8 query heads for each KV head make a prefix dearer to read, and its partial results too."""
    keys = [table_key("NVIDIA H200", *heads, np.dtype("float16")) for heads in ((32, 8, 128), (64, 8, 128))]
    assert keys[0] == "NVIDIA H200 32/8/128 float16"
    table = {keys[0]: {"extend": {"group_sizes": [2], "shared_lens": [1], "paths": [["cascade"]]}}}
    reasons = [Dispatcher(key, table=table).choose(_step(1, 4, 600, 200, qo_len=8)).reason for key in keys]
    assert reasons == ["measured", "sharing saves enough, not measured"]


@pytest.mark.parametrize(("num_layers", "path"), [(4, "shared"), (40, "cascade")])
def test_the_fastest_path_is_so_with_its_plan(num_layers: int, path: str) -> None:
    """Planning a step takes its time once: a kernel that is faster must win that back over the layers."""
    assert fastest({"plain": (0.0, 0.5), "shared": (0.2, 0.2), "cascade": (2.0, 0.1)}, num_layers) == path
