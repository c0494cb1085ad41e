"""One plan over rows of several jobs: what they have in common is computed once, and each gets its share.

Knows how the columns of several jobs become those of one plan, and back; not who runs the plan, or when.

INVARIANT: a sample is what its job says, whoever else is in the plan: its tokens, its namespace, its limits, how it is
sampled, its seed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from batchllm.offline.feeder import Feeder
from batchllm.offline.job import give_memory_back, in_input, sampling_of
from batchllm.offline.job_rows import Int64Array, JobRows, Samples
from batchllm.offline.namespaces import Namespace, adapter_numbers
from batchllm.offline.runtime import RunRequests, RuntimeInfo
from batchllm.planner import GroupOrder, largest_prefixes, plan_batch
from batchllm.planner.fair_order import fair_order
from batchllm.planner.run import PlannedRun, RunCutter, copy_runs
from batchllm.request import SamplingParams
from batchllm.tokens import TokenTable

Int32Array = npt.NDArray[np.int32]

_QUANTUM_POOLS = 2
"""KV pools' worth of tokens that one job may be served ahead of another."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """What one job has in a plan.

    Attributes:
        rows: Its rows.
        samples: Its samples.
        table: Their prompts.
        left: Which of them are to be planned, ascending.
        service: Tokens computed and decoded for it so far.
        wants_prefixes: Nobody has told it yet which prefixes save it most.
    """

    rows: JobRows
    samples: Samples
    table: TokenTable
    left: Int64Array
    service: int
    wants_prefixes: bool = False

    @property
    def row_numbers(self) -> Int64Array:
        """Of which row each of ``left`` is."""
        return self.samples.rows(self.left)


class JointPlan:
    """What is left of several jobs, planned together, in fair order.

    Args:
        parts: Of each job; one at least.
        info: Numbers of the engine.
        group_order: Order of sibling groups, as far as fairness leaves it.

    Attributes:
        feeder: Walks the plan.
        part_at: Position -> number of the part. int32[num_requests].
        sample_at: Position -> number of the sample among its job's. int64[num_requests].
        optimal_at: Position -> prompt tokens that an optimal plan computes there. int32[num_requests].
        num_lost_tokens: Prompt tokens that fairness costs.
        largest_prefixes: Of each part that wants them the prefixes that save it most; ``example_row`` is a row's place
            in its input.
    """

    def __init__(self, parts: Sequence[Part], info: RuntimeInfo, group_order: GroupOrder) -> None:
        self._parts = parts
        part_of = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part.left) for part in parts])
        max_new_len = _joined(parts, lambda part: part.rows.max_new_len[part.row_numbers])
        known_len = _joined(parts, lambda part: part.rows.known_len[part.row_numbers])
        decode_lens = np.where(known_len > 0, known_len, max_new_len)
        table = _joined_table(parts)
        namespace_of, namespaces = _joined_namespaces(parts)
        best = plan_batch(
            table,
            page_size=info.page_size,
            namespaces=namespaces,
            partitions=adapter_numbers(namespace_of, namespaces),
            decode_lens=decode_lens,
            group_order=group_order,
        )
        optimal_len = np.empty(len(table), np.int32)
        optimal_len[best.order] = best.computed_lens()
        plan = fair_order(
            best,
            part_of,
            optimal_len.astype(np.int64) + decode_lens,
            quantum=_QUANTUM_POOLS * info.kv_limit_tokens,
            service=np.array([part.service for part in parts], np.int64),
        ).plan
        self.part_at = part_of[plan.order]
        sample_of = np.concatenate([part.left for part in parts])
        self.sample_at: Int64Array = sample_of[plan.order]
        self.optimal_at = optimal_len[plan.order]
        self.num_lost_tokens = plan.num_lost_tokens
        self.largest_prefixes = [
            in_input(largest_prefixes(plan, self.part_at == number), part.rows, part.samples, sample_of)
            if part.wants_prefixes
            else ()
            for number, part in enumerate(parts)
        ]
        cutter = RunCutter(plan, table, max_new_len, known_len, _joined_tasks(parts))
        self.feeder = Feeder(cutter, info.kv_limit_tokens)
        give_memory_back()

    def requests(self, run: PlannedRun) -> RunRequests:
        """The run with how its jobs say that it be sampled."""
        positions = slice(run.first_position, run.first_position + len(run))
        part_at, sample_at = self.part_at[positions], self.sample_at[positions]
        kinds = np.empty(len(run), np.int64)
        seeds, namespaces = np.empty(len(run), np.int64), np.full(len(run), "", object)
        first_kind = np.cumsum([0, *(len(part.rows.kinds) for part in self._parts)])
        for number in np.unique(part_at).tolist():
            part, of_part = self._parts[number], np.flatnonzero(part_at == number)
            samples = sample_at[of_part]
            own_kinds, seeds[of_part], names = sampling_of(
                part.rows, part.samples.rows(samples), part.samples.samples(samples)
            )
            kinds[of_part] = own_kinds + first_kind[number]
            if names is not None:
                namespaces[of_part] = names
        used, place = np.unique(kinds, return_inverse=True)
        return RunRequests(
            run=run,
            sampling=tuple(self._kind(kind, first_kind) for kind in used.tolist()),
            sampling_index=place.tolist(),
            seeds=seeds.tolist(),
            namespaces=namespaces.tolist() if namespaces.any() else None,
        )

    def _kind(self, number: int, first_kind: Int64Array) -> SamplingParams:
        """A way to sample, by its number among those of all parts."""
        part = int(np.searchsorted(first_kind, number, "right")) - 1
        kinds: list[SamplingParams] = self._parts[part].rows.kinds
        return kinds[number - int(first_kind[part])]


def _joined(parts: Sequence[Part], column: Callable[[Part], npt.NDArray[np.int32]]) -> Int32Array:
    return np.concatenate([column(part) for part in parts])


def _joined_table(parts: Sequence[Part]) -> TokenTable:
    """The prompts that are left, one job's after another's; not a copy where they are all of one job's."""
    if len(parts) == 1 and len(parts[0].left) == len(parts[0].table):
        return parts[0].table
    lengths = np.concatenate([part.table.lengths[part.left] for part in parts])
    offsets = np.zeros(len(lengths) + 1, np.int64)
    np.cumsum(lengths, out=offsets[1:])
    tokens = np.empty(offsets[-1], np.int32)
    first = 0
    for part in parts:
        last = first + len(part.left)
        copy_runs(part.table.tokens, part.table.offsets[part.left], tokens, offsets[first : last + 1])
        first = last
    return TokenTable(tokens=tokens, offsets=offsets)


def _joined_namespaces(parts: Sequence[Part]) -> tuple[list[Namespace], Int64Array | None]:
    """The namespaces of all jobs, each once, and which of them each sample is in; None where there is one."""
    numbers: dict[Namespace, int] = {}
    columns = []
    for part in parts:
        number_of = np.array([numbers.setdefault(n, len(numbers)) for n in part.rows.all_namespaces], np.int64)
        columns.append(number_of[part.rows.namespace(part.row_numbers)])
    return list(numbers), np.concatenate(columns) if len(numbers) > 1 else None


def _joined_tasks(parts: Sequence[Part]) -> Int32Array:
    """Tasks are each job's own: the same name in another job is another task."""
    columns: list[Int32Array] = []
    num_tasks = 0
    for part in parts:
        tasks = part.rows.task(part.row_numbers)
        columns.append(np.where(tasks >= 0, tasks + np.int32(num_tasks), tasks).astype(np.int32))
        num_tasks += int(tasks.max(initial=-1)) + 1
    return np.concatenate(columns)
