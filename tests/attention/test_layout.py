"""However prefixes nest and whoever reads them: each position is read once, and what two share they read together."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.attention import AttentionLayout, PrefixPaths, check_layout, plan_layout
from batchllm.errors import LayoutError, PlanError
from tests.attention.cases import CASES, make_case
from tests.sizes import sized

untimed = settings(deadline=None, max_examples=sized(40, 80))


@dataclass(frozen=True)
class _Step:
    """Prefixes, and who reads them: ``path[i]`` lists (id, end) of prefix ``i``, outermost first."""

    path: dict[int, list[tuple[int, int]]]
    paths: PrefixPaths
    table_rows: list[int]
    qo_len: list[int]
    kv_len: list[int]
    leaf: list[int]

    def plan(self, **options: int) -> AttentionLayout:
        return plan_layout(
            table_rows=np.array(self.table_rows),
            qo_len=np.array(self.qo_len),
            kv_len=np.array(self.kv_len),
            leaf=np.array(self.leaf, np.int64),
            paths=self.paths,
            **options,
        )

    def cached_path(self, s: int) -> list[tuple[int, int]]:
        """Prefixes of sequence ``s`` whose KV was in the cache before the step."""
        return [level for level in self.path.get(self.leaf[s], []) if level[1] <= self.kv_len[s] - self.qo_len[s]]

    def table(self) -> np.ndarray:
        """Sequences have the slots of their prefixes where these are in the cache, and own ones behind."""
        width, num_rows = max(self.kv_len, default=0) + 2, max(self.table_rows, default=0) + 1
        table = np.arange(num_rows * width, dtype=np.int32).reshape(num_rows, width)
        for s, row in enumerate(self.table_rows):
            start = 0
            for prefix, end in self.cached_path(s):
                table[row, start:end] = (num_rows + prefix) * width + np.arange(start, end)
                start = end
        return table


@st.composite
def _steps(draw: st.DrawFn) -> _Step:
    """Any tree on pages of 1 or 16 tokens, any batch on it: rows without prefix, ahead of their prefix, retracted."""
    page = draw(st.sampled_from([1, 16]))
    paths, path, held = PrefixPaths(), {}, [-1]
    for _ in range(draw(st.integers(0, 12))):
        parent = draw(st.sampled_from(held))
        above = path.get(parent, [])
        end = (above[-1][1] if above else 0) + page * draw(st.integers(1, 9))
        prefix = paths.add(parent, end)
        path[prefix] = [*above, (prefix, end)]
        held.append(prefix)
    step = _Step(path, paths, [], [], [], [])
    num_sequences = draw(st.integers(0, 12))
    step.table_rows.extend(draw(st.permutations(range(num_sequences + 2)))[:num_sequences])
    for _ in range(num_sequences):
        leaf = draw(st.sampled_from(held))
        prefix_len = path[leaf][-1][1] if leaf >= 0 else 0
        # Often right behind the prefix, often some way into or beyond it.
        num_cached = max(0, prefix_len + draw(st.one_of(st.just(0), st.integers(-40, 40))))
        step.leaf.append(leaf)
        step.qo_len.append(draw(st.sampled_from([1, 1, 1, 5, 40])))
        step.kv_len.append(num_cached + step.qo_len[-1])
    return step


def _readers(layout: AttentionLayout, g: int) -> list[int]:
    first, last = layout.segment_readers[g]
    return layout.order[first:last].tolist()


def _num_reads(layout: AttentionLayout, s: int, position: int) -> int:
    """How often the last query token of a sequence reads a position."""
    spans = [layout.segment_span[g] for g in range(len(layout.segment_span)) if s in _readers(layout, g)]
    return sum(start <= position < end for start, end in [*spans, (layout.private_start[s], layout.kv_len[s])])


def _check_reads(layout: AttentionLayout) -> None:
    for s in range(len(layout.kv_len)):
        assert all(_num_reads(layout, s, position) == 1 for position in range(layout.kv_len[s]))
        assert layout.private_start[s] <= layout.kv_len[s] - np.diff(layout.qo_indptr)[s]


@untimed
@given(_steps(), st.sampled_from([1, 2, 7, 16, 17, 50]), st.sampled_from([1, 2, 8]))
def test_every_query_token_reads_each_position_up_to_its_own_once(step: _Step, min_len: int, max_nested: int) -> None:
    """The segments and the private part of a sequence cover it, each position once, and no query token is shared."""
    layout = step.plan(min_segment_len=min_len, max_nested_segments=max_nested)
    _check_reads(layout)
    assert sorted(layout.order.tolist()) == list(range(len(step.leaf)))
    assert layout.qo_indptr.tolist() == [0, *np.cumsum(step.qo_len, dtype=int).tolist()]
    assert layout.kv_len.tolist() == step.kv_len and layout.table_rows.tolist() == step.table_rows


@untimed
@given(_steps(), st.sampled_from([1, 7, 16, 50]), st.sampled_from([1, 2, 8]))
def test_segments_nest_and_are_as_long_and_as_few_as_asked(step: _Step, min_len: int, max_nested: int) -> None:
    """Readers of two segments are disjoint or within each other, outer first; bounds on length and depth hold."""
    layout = step.plan(min_segment_len=min_len, max_nested_segments=max_nested)
    readers = [set(_readers(layout, g)) for g in range(len(layout.segment_span))]
    for inner in range(len(readers)):
        assert len(readers[inner]) >= 2
        assert layout.segment_span[inner, 1] - layout.segment_span[inner, 0] >= min_len
        assert layout.segment_table_row[inner] in layout.table_rows[list(readers[inner])]
        for outer in range(inner):
            is_around = layout.segment_span[outer, 1] <= layout.segment_span[inner, 0]
            assert readers[outer].isdisjoint(readers[inner]) or (readers[inner] < readers[outer] and is_around)
    assert all(sum(s in group for group in readers) <= max_nested for s in range(len(step.leaf)))


@untimed
@given(_steps())
def test_what_two_sequences_share_they_read_together(step: _Step) -> None:
    """With nothing merged, a prefix that two sequences have in the cache lies in segments of both, and no more does."""
    layout = step.plan(max_nested_segments=100)
    segments = [(set(_readers(layout, g)), *layout.segment_span[g]) for g in range(len(layout.segment_span))]
    for s in range(len(step.leaf)):
        for t in range(s):
            common = set(step.cached_path(s)) & set(step.cached_path(t))
            num_shared = sum(end - start for group, start, end in segments if {s, t} <= group)
            assert num_shared == max((end for _, end in common), default=0)


@untimed
@given(_steps(), st.sampled_from([1, 7, 50]))
def test_every_planned_layout_passes_the_check(step: _Step, min_len: int) -> None:
    layout = step.plan(min_segment_len=min_len)
    check_layout(layout, step.table(), is_thorough=True)
    assert all(getattr(layout, field.name).dtype == np.int32 for field in dataclasses.fields(layout))
    assert all(getattr(layout, field.name).flags.c_contiguous for field in dataclasses.fields(layout))


@pytest.mark.parametrize("name", CASES)
def test_every_shared_case_passes_the_check(name: str) -> None:
    """Also once the next step is planned from the same prefixes: a plan leaves nothing behind."""
    for seed in range(3):
        case = make_case(seed, **CASES[name])
        check_layout(case.layout, case.table.numpy(), is_thorough=True)


def _int32(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def _plan_decode(paths: PrefixPaths, leaf: list[int], kv_len: int = 100, **options: int) -> AttentionLayout:
    ones = np.ones(len(leaf), np.int32)
    rows = np.arange(10, 10 + len(leaf))
    return plan_layout(table_rows=rows, qo_len=ones, kv_len=ones * kv_len, leaf=_int32(*leaf), paths=paths, **options)


def test_prefixes_with_the_same_readers_are_one_segment() -> None:
    paths = PrefixPaths()
    outer = paths.add(-1, 10)
    middle = paths.add(outer, 20)
    left, right = paths.add(middle, 30), paths.add(middle, 40)
    layout = _plan_decode(paths, [left, right, left, -1, outer])
    assert layout.segment_span.tolist() == [[0, 10], [10, 20], [20, 30]]
    assert [sorted(_readers(layout, g)) for g in range(3)] == [[0, 1, 2, 4], [0, 1, 2], [0, 2]]
    assert layout.private_start.tolist() == [30, 20, 30, 0, 10]
    layout = _plan_decode(paths, [left, right, left])
    assert layout.segment_span.tolist() == [[0, 20], [20, 30]]


def test_a_short_segment_is_read_by_each_of_those_inside() -> None:
    """Segments inside start where the short one did, and who is in none of them starts its private part there."""
    paths = PrefixPaths()
    outer = paths.add(-1, 50)
    short = paths.add(outer, 55)
    left, right = paths.add(short, 70), paths.add(short, 80)
    layout = _plan_decode(paths, [left, left, right, right, short, outer], min_segment_len=10)
    assert layout.segment_span.tolist() == [[0, 50], [50, 70], [50, 80]]
    assert layout.private_start.tolist() == [70, 70, 80, 80, 50, 50]


def test_a_prefix_that_is_not_in_the_cache_before_the_step_is_not_shared() -> None:
    """Of two rows of one prefix, one computes its last token in this step: only the prefix around it is shared."""
    paths = PrefixPaths()
    outer = paths.add(-1, 10)
    inner = paths.add(outer, 20)
    step = {"table_rows": _int32(0, 1, 2), "leaf": _int32(inner, inner, inner), "paths": paths}
    layout = plan_layout(qo_len=_int32(1, 1, 4), kv_len=_int32(21, 20, 15), **step)
    assert layout.segment_span.tolist() == [[0, 10]]
    assert layout.private_start.tolist() == [10, 10, 10]
    layout = plan_layout(qo_len=_int32(1, 1, 4), kv_len=_int32(21, 21, 13), **step)
    assert layout.segment_span.tolist() == [[0, 20]]
    assert layout.private_start.tolist() == [20, 20, 0]


@pytest.mark.parametrize("level_len", [4, 64])
def test_a_staircase_of_a_thousand_prefixes_is_cut_to_few_long_segments(level_len: int) -> None:
    """Prompts that each extend the one before: no sequence is in more than eight segments, and most KV is shared."""
    paths, leaf = PrefixPaths(), [-1]
    for level in range(1000):
        leaf.append(paths.add(leaf[-1], (level + 1) * level_len))
    leaf = leaf[1::3]
    layout = _plan_decode(paths, leaf, kv_len=1000 * level_len + 1)
    num_nested = np.zeros(len(leaf), int)
    for g in range(len(layout.segment_span)):
        num_nested[_readers(layout, g)] += 1
    assert num_nested.max() <= 8
    num_private = np.maximum(0, np.arange(1, 1001, 3) * level_len - layout.private_start)
    assert num_private.max() <= 1000 * level_len / 4
    table = np.tile(np.arange(1000 * level_len + 1, dtype=np.int32), (10 + len(leaf), 1))
    check_layout(layout, table)


def test_a_step_without_sequences_has_an_empty_layout() -> None:
    layout = _plan_decode(PrefixPaths(), [])
    assert layout.qo_indptr.tolist() == [0]
    check_layout(layout, np.zeros((1, 1), np.int32))


def test_a_layout_keeps_its_numbers_when_the_caller_changes_its_own() -> None:
    step = {"table_rows": _int32(3, 4), "qo_len": _int32(1, 1), "kv_len": _int32(7, 8), "leaf": _int32(-1, -1)}
    layout = plan_layout(**step, paths=PrefixPaths())
    for array in step.values():
        array += 1
    assert (layout.table_rows.tolist(), layout.kv_len.tolist()) == ([3, 4], [7, 8])


def test_a_sequence_that_names_no_held_prefix_is_refused_by_its_table_row() -> None:
    paths = PrefixPaths()
    prefix = paths.add(-1, 10)
    for wrong in (-2, 5, 63, 64, 2**31 - 1):
        with pytest.raises(LayoutError, match=f"table row 11: .* prefix {wrong}:"):
            _plan_decode(paths, [prefix, wrong])
    paths.release(prefix)
    with pytest.raises(LayoutError, match=r"table row 10: .* prefix 0:"):
        _plan_decode(paths, [prefix])


def test_impossible_lengths_are_refused() -> None:
    step = {"table_rows": _int32(8, 9), "leaf": _int32(-1, -1), "paths": PrefixPaths()}
    with pytest.raises(LayoutError, match="table row 9: 6 query tokens, 5 tokens"):
        plan_layout(qo_len=_int32(1, 6), kv_len=_int32(5, 5), **step)
    with pytest.raises(LayoutError, match="table row 8: -1 query tokens"):
        plan_layout(qo_len=_int32(-1, 1), kv_len=_int32(5, 5), **step)
    with pytest.raises(LayoutError, match="2 table rows, 1 and 2 lengths, 2 prefixes"):
        plan_layout(qo_len=_int32(1), kv_len=_int32(5, 5), **step)
    for options in ({"min_segment_len": 0}, {"max_nested_segments": 0}):
        with pytest.raises(LayoutError, match="must be at least 1"):
            plan_layout(qo_len=_int32(1, 1), kv_len=_int32(5, 5), **step, **options)


@untimed
@given(st.data())
def test_prefixes_may_be_released_in_any_order_and_their_ids_come_back(data: st.DataObject) -> None:
    """However they are released, all ids are free again once all are released, and none is held twice before."""
    paths, held = PrefixPaths(), {}
    most = 0
    for _ in range(data.draw(st.integers(1, 30))):
        if held and data.draw(st.booleans()):
            prefix = data.draw(st.sampled_from(sorted(held)))
            del held[prefix]
            paths.release(prefix)
            with pytest.raises(PlanError, match=f"prefix {prefix} was never added, or has been released"):
                paths.release(prefix)
        else:
            parent = data.draw(st.sampled_from([-1, *sorted(held)]))
            end = held.get(parent, 0) + data.draw(st.integers(1, 9))
            prefix = paths.add(parent, end)
            assert prefix not in held
            held[prefix] = end
            most = max(most, prefix + 1)
    for prefix in data.draw(st.permutations(sorted(held))):
        paths.release(prefix)
    assert sorted(paths.add(-1, 1) for _ in range(most)) == list(range(most))


def test_prefixes_keep_their_paths_while_the_table_grows() -> None:
    paths = PrefixPaths()
    outer = paths.add(-1, 5)
    inner = [paths.add(outer, 6 + i) for i in range(500)]
    layout = _plan_decode(paths, [inner[499], inner[499], inner[0]], kv_len=1000)
    assert layout.segment_span.tolist() == [[0, 5], [5, 505]]


def test_a_prefix_below_a_released_one_still_has_its_path() -> None:
    """Released before its child, a prefix keeps its id from others until the child goes too."""
    paths = PrefixPaths()
    outer = paths.add(-1, 10)
    inner = paths.add(outer, 20)
    paths.release(outer)
    other = paths.add(-1, 99)
    assert other not in (outer, inner)
    assert _plan_decode(paths, [inner, inner]).segment_span.tolist() == [[0, 20]]
    with pytest.raises(PlanError, match=f"prefix {outer} "):
        paths.add(outer, 30)
    paths.release(inner)
    assert {paths.add(-1, 1), paths.add(-1, 1)} == {outer, inner}


def test_a_prefix_is_longer_than_its_parent() -> None:
    paths = PrefixPaths()
    parent = paths.add(-1, 10)
    with pytest.raises(PlanError, match="10 tokens cannot extend prefix 0, which has 10"):
        paths.add(parent, 10)
    with pytest.raises(PlanError, match="0 tokens"):
        paths.add(-1, 0)


@untimed
@given(_steps(), st.data())
def test_the_check_finds_any_reader_whose_table_differs(step: _Step, data: st.DataObject) -> None:
    """One slot of one reader of one segment is another's: the thorough check names the row."""
    layout, table = step.plan(), step.table()
    if len(layout.segment_span) == 0:
        return
    g = data.draw(st.integers(0, len(layout.segment_span) - 1))
    rows = [row for row in layout.table_rows[_readers(layout, g)].tolist() if row != layout.segment_table_row[g]]
    row = data.draw(st.sampled_from(rows))
    table[row, data.draw(st.integers(*(layout.segment_span[g] - (0, 1)).tolist()))] = 2**31 - 1
    # It may stand for another segment: then that segment's readers differ from it.
    with pytest.raises(LayoutError, match="slot 2147483647"):
        check_layout(layout, table, is_thorough=True)
