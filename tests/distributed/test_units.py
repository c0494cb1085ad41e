"""`plan`: which rows of a dataset come together. Twice on a real Ray, whose sorts take many seconds."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from batchllm.dataset import ColumnMap
from batchllm.errors import ConfigError
from batchllm.ray import BatchStage, plan
from tests.distributed.conftest import HeldCluster
from tests.distributed.ray_engines import Deeds, NotedRuntime, num_of

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of Ray's own code
_SAMPLING = {"max_new_tokens": 8, "temperature": 0}


class _Blocks:
    """What `plan` asks of a dataset of Ray Data, on tables in memory, a block each. Blocks come in any order."""

    def __init__(self, tables: list[pa.Table]) -> None:
        self._tables = tables

    def schema(self) -> pa.Schema:
        return self._tables[0].schema

    def map_batches(
        self, function: Any, *, fn_args: tuple[Any, ...] = (), batch_size: None, batch_format: str
    ) -> _Blocks:
        return _Blocks([function(table, *fn_args) for table in self._tables])

    def sort(self, key: str, boundaries: list[int] | None = None) -> _Blocks:
        table = pa.concat_tables(self._tables).sort_by(key)
        num_rows = table.num_rows
        if boundaries is None:
            ends = [num_rows // 3, num_rows // 2, num_rows]
        else:
            ends = [*np.searchsorted(table[key].to_numpy(), boundaries).tolist(), num_rows]
        return _Blocks([table.slice(start, end - start) for start, end in pairwise([0, *ends])])

    def repartition(self, num_blocks: int) -> _Blocks:
        assert num_blocks == 1
        return _Blocks([pa.concat_tables(self._tables)])

    def size_bytes(self) -> int:
        return sum(table.nbytes for table in self._tables)

    def materialize(self) -> _Blocks:
        return self

    def iter_batches(self, *, batch_size: None, batch_format: str) -> Iterator[pa.Table]:
        yield from reversed(self._tables)

    def take_all(self) -> list[dict[str, Any]]:
        return [row for table in reversed(self._tables) for row in table.to_pylist()]


def _table(rows: list[dict[str, Any]]) -> pa.Table:
    """The rows, shuffled."""
    order = np.random.default_rng(0).permutation(len(rows))
    names = dict.fromkeys(name for row in rows for name in row)
    return pa.table({name: [rows[i].get(name) for i in order] for name in names})


def _dataset(rows: list[dict[str, Any]]) -> Any:
    table = _table(rows)
    return _Blocks([table.slice(0, 2), table.slice(2, 0), table.slice(2)])


def _data() -> Any:
    """Ray Data, which is not to be imported before the Ray of the tests is there."""
    import ray.data

    ray.data.DataContext.get_current().enable_progress_bars = False
    return ray.data


def _grouped(sizes: list[int]) -> list[dict[str, Any]]:
    return [
        {"id": f"{group}-{i}", "prompt": f"The tale of group {group}. " * 20 + f"Question {i}?", "more": i}
        for group, size in enumerate(sizes)
        for i in range(size)
    ]


def _units_of(units: Any) -> list[list[dict[str, Any]]]:
    """The rows of each unit, in the order of the units."""
    rows = sorted(units.take_all(), key=lambda unit: unit["unit"])
    assert [unit["unit"] for unit in rows] == list(range(len(rows)))
    assert [unit["num_rows"] for unit in rows] == [len(unit["rows"]) for unit in rows]
    return [unit["rows"] for unit in rows]


def _num_cut_tokens(units: Any) -> int:
    return sum(unit["num_cut_tokens"] for unit in units.take_all())


def test_each_row_is_in_one_unit_with_all_its_columns() -> None:
    rows = _grouped([30, 1, 12, 7, 1, 1, 8])
    units = _units_of(plan(_dataset(rows), num_engines=2, sampling=_SAMPLING))
    assert len(units) > 1
    assert sorted([row for unit in units for row in unit], key=lambda row: row["id"]) == sorted(
        rows, key=lambda row: row["id"]
    )


def test_groups_stay_whole_unless_one_is_too_much_for_an_engine() -> None:
    """Forty groups of ten, for two engines: none is parted. A group of all rows is, and that is stated."""
    planned = plan(_dataset(_grouped([10] * 40)), num_engines=2, sampling=_SAMPLING)
    units = _units_of(planned)
    units_of_group = Counter(group for unit in units for group in {row["id"].split("-")[0] for row in unit})
    assert set(units_of_group.values()) == {1}
    assert _num_cut_tokens(planned) < 40 * len(units)  # "The tale of group " is what all share
    planned = plan(_dataset(_grouped([400])), num_engines=2, sampling=_SAMPLING)
    units = _units_of(planned)
    assert len(units) > 2
    assert _num_cut_tokens(planned) > 100 * (len(units) - 1)


def test_units_shrink_so_that_engines_end_together() -> None:
    sizes = [len(unit) for unit in _units_of(plan(_dataset(_grouped([1] * 1000)), num_engines=2, sampling=_SAMPLING))]
    assert sizes[0] > 200 and sizes[-1] < 20
    # Each cut is where it costs least in the last quarter.
    assert all(one * 4 / 3 + 1 >= other for one, other in pairwise(sizes))


def test_equal_prompts_are_parted_too() -> None:
    rows = [{"id": str(i), "prompt": "the same", "sampling_params": {"temperature": 1.0}} for i in range(200)]
    units = _units_of(plan(_dataset(rows), num_engines=2))
    assert len(units) > 2 and sum(map(len, units)) == 200


def test_bad_rows_and_rows_of_all_kinds_are_planned() -> None:
    """Token ids, chats, scores, a row without a prompt: each is in a unit."""
    rows = [
        {"id": "ids", "input_ids": [1, 2, 0xD900]},
        {"id": "huge", "input_ids": [1, 2, 2**31 - 1]},
        {"id": "chat", "messages": [{"role": "user", "content": "hello"}]},
        {"id": "score", "prompt": "a", "continuation": "b"},
        {"id": "bad"},
        {"id": None, "prompt": "no id"},
    ]
    units = _units_of(plan(_dataset(rows), num_engines=1))
    ids = sorted([str(row["id"]) for unit in units for row in unit])
    assert ids == ["None", "bad", "chat", "huge", "ids", "score"]


def test_openai_rows_and_columns_of_the_user_s_are_planned() -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4}
    rows = [{"custom_id": f"c{i}", "method": "POST", "url": "/v1/chat/completions", "body": body} for i in range(5)]
    assert sum(map(len, _units_of(plan(_dataset(rows), num_engines=1)))) == 5
    rows = [{"key": i, "question": f"where is {i}?"} for i in range(5)]
    columns = ColumnMap(id_column="key", template="Say {question}")
    assert sum(map(len, _units_of(plan(_dataset(rows), num_engines=1, columns=columns)))) == 5


@pytest.mark.parametrize(
    ("rows", "options", "words"),
    [
        ([{"id": "a", "x": 1}], {}, "has no column prompt"),
        ([{"prompt": "a"}], {}, "no column id: answers are matched to rows by their ids"),
        ([{"id": "a", "prompt": "a"}], {"num_engines": 0}, "num_engines 0: must be at least 1"),
        ([{"id": "a", "prompt": "a"}], {"sampling": {"top_p": 2}}, "sampling: "),
    ],
)
def test_what_cannot_be_planned_is_refused_with_a_remedy(rows: Any, options: Any, words: str) -> None:
    with pytest.raises(ConfigError, match=words):
        plan(_dataset(rows), **options)


class _KilledStage(BatchStage):
    """On engines that answer at once, of which the first takes its actor's process along."""

    def __init__(self, deeds: Deeds) -> None:
        self._deeds = deeds
        super().__init__(columns=ColumnMap(carry=("more",)), sampling=_SAMPLING)

    def start_engine(self, model_path: str, **_: Any) -> NotedRuntime:  # type: ignore[override]  # of the instance: its deeds
        return NotedRuntime(self._deeds)


@pytest.mark.slow
def test_units_of_an_actor_that_is_killed_are_answered_by_another(cluster: HeldCluster, tmp_path: Any) -> None:
    """On a real Ray, from arrays of numpy: each row comes out once, with its carried column."""
    rows = [{"id": str(i), "input_ids": np.array([7, i // 10, i]), "more": f"m{i}"} for i in range(200)]
    dataset = _data().from_items(rows, override_num_blocks=4)
    answers = plan(dataset, num_engines=2, sampling=_SAMPLING).map_batches(
        _KilledStage,
        fn_constructor_args=(Deeds(folder=str(tmp_path), dies_after=20, num_deaths=1),),
        batch_size=1,
        batch_format="pyarrow",
        compute=_data().ActorPoolStrategy(size=2, max_tasks_in_flight_per_actor=1),
        num_cpus=0.25,
    )
    found = {row["id"]: (row["text"], row["more"]) for row in answers.take_all()}
    assert num_of(tmp_path, "killed") == 1
    assert found == {str(i): (f"after {i}", f"m{i}") for i in range(200)}
