"""One plan over rows of several jobs, or of one: what they have in common is computed once, and each gets its share.

Knows how the columns of several jobs become those of one plan, and back; not who runs the plan, or when.

INVARIANT: a sample is what its job says, whoever else is in the plan: its tokens, its namespace, its limits, how it is
sampled, its seed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from batchllm.offline.job_rows import JobRows
from batchllm.offline.namespaces import Namespace, adapter_numbers
from batchllm.offline.runtime import RunRequests, RuntimeInfo
from batchllm.offline.samples import Samples
from batchllm.planner import (
    GroupOrder,
    Partition,
    PrefixSummary,
    expected_work,
    largest_prefixes,
    partition,
    plan_batch,
)
from batchllm.planner.fair_order import fair_order
from batchllm.planner.planner import PlannedRun, RunCutter
from batchllm.request import NO_TARGET, SamplingParams
from batchllm.tokens import Int32Array, Int64Array, TokenTable, copy_runs, starts_of

_QUANTUM_POOLS = 2
"""KV pools' worth of tokens that one job may be served ahead of another."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Part:
    """What one job has in a plan.

    Attributes:
        rows: Rows of the job.
        samples: Samples of the job.
        table: Prompts of the samples.
        left: Which of them are to be planned, ascending; None for all.
        service: Tokens computed and decoded for it so far.
        wants_prefixes: Whether the job does not know yet which prefixes save it most.
    """

    rows: JobRows
    samples: Samples
    table: TokenTable
    left: Int64Array | None
    service: int
    wants_prefixes: bool = False

    def __len__(self) -> int:
        return len(self.table) if self.left is None else len(self.left)

    @property
    def row_numbers(self) -> Int64Array:
        """Row number of each sample that is to be planned. Shape ``[len(self)]``."""
        return self.samples.all_rows() if self.left is None else self.samples.rows(self.left)

    def of_rows(self, column: Int32Array) -> Int32Array:
        """What a column of the job's rows says of each sample to be planned; not a copy where it is one of each row."""
        return column if self.left is None and self.samples.row_of is None else column[self.row_numbers]


class JointPlan:
    """What is left of several jobs, planned together, in fair order.

    Args:
        parts: Of each job; one at least.
        info: Numbers of the engine.
        group_order: Order of sibling groups, as far as fairness leaves it.

    Attributes:
        plan: The plan.
        cutter: Cuts runs of the plan.
        part_at: Position -> number of the part. int32[num_requests].
        sample_at: Position -> number of the sample among its job's. int64[num_requests].
        optimal_at: Position -> prompt tokens that an optimal plan computes there. int32[num_requests].
        units: The plan in units, where several engines take them; else None.
        num_cut_tokens: Prompt tokens that the plan computes more than once for the sake of several engines.
        largest_prefixes: Of each part that wants them the prefixes that save it most; ``example_row`` is a row's place
            in its input.
    """

    def __init__(self, parts: Sequence[Part], info: RuntimeInfo, group_order: GroupOrder) -> None:
        give_memory_back()
        self._parts = parts
        max_new_len = _joined([part.of_rows(part.rows.max_new_len) for part in parts])
        known_len = _joined([part.of_rows(part.rows.known_len) for part in parts])
        decode_lens = np.where(known_len > 0, known_len, max_new_len)
        table = _joined_table(parts)
        all_namespaces, namespaces = _joined_namespaces(parts)
        best = plan_batch(
            table,
            page_size=info.page_size,
            namespaces=namespaces,
            partitions=adapter_numbers(all_namespaces, namespaces),
            decode_lens=decode_lens,
            group_order=group_order,
            share_lens=joined_share_lens(parts),
        )
        give_memory_back()
        self.plan = best
        self.optimal_at = best.computed_lens()
        self.units: Partition | None = None
        self.part_at: Int32Array
        self.sample_at: Int64Array
        if len(parts) > 1:
            self._make_fair(decode_lens, _QUANTUM_POOLS * info.kv_limit_tokens)
        num_lost = self.plan.num_lost_tokens
        if info.engines is not None:
            self._cut_in_units(decode_lens, info.num_engines)
        self.num_cut_tokens = self.plan.num_lost_tokens - num_lost
        if len(parts) == 1:
            self.part_at = np.broadcast_to(np.int32(0), len(table))
            self.sample_at = self.plan.order if parts[0].left is None else parts[0].left[self.plan.order]
        self.largest_prefixes = [self._largest_prefixes(number) for number in range(len(parts))]
        self.cutter = RunCutter(self.plan, table, max_new_len, known_len, _joined_tasks(parts))
        del decode_lens, namespaces
        give_memory_back()

    def _make_fair(self, decode_lens: Int32Array, quantum: int) -> None:
        best, parts = self.plan, self._parts
        part_of = np.repeat(np.arange(len(parts), dtype=np.int32), [len(part) for part in parts])
        sample_of = np.concatenate([np.arange(len(part.table))[_chosen(part)] for part in parts])
        optimal_len = np.empty(best.num_requests, np.int32)
        optimal_len[best.order] = self.optimal_at
        costs = optimal_len.astype(np.int64) + decode_lens
        service = np.array([part.service for part in parts], np.int64)
        self.plan = plan = fair_order(best, part_of, costs, quantum=quantum, service=service).plan
        self.part_at, self.sample_at = part_of[plan.order], sample_of[plan.order]
        self.optimal_at = optimal_len[plan.order]

    def _cut_in_units(self, decode_lens: Int32Array, num_engines: int) -> None:
        """Units of one job go in the order of their work; those of several in the order that is fair."""
        optimal_len = np.empty(self.plan.num_requests, np.int32)
        optimal_len[self.plan.order] = self.optimal_at
        work = expected_work(self.plan, decode_lens)
        self.units = partition(self.plan, work, num_engines, keeps_order=len(self._parts) > 1)
        self.plan = self.units.plan
        self.optimal_at = optimal_len[self.plan.order]

    def _largest_prefixes(self, number: int) -> Sequence[PrefixSummary]:
        part = self._parts[number]
        if not part.wants_prefixes:
            return ()
        is_alone = len(self._parts) == 1
        prefixes = largest_prefixes(self.plan, None if is_alone else self.part_at == number)
        first = sum(len(other) for other in self._parts[:number])
        planned = np.array([prefix.example_row for prefix in prefixes], np.int64) - first
        places = part.rows.places(part.row_numbers[planned])
        return [replace(prefix, example_row=place) for prefix, place in zip(prefixes, places.tolist(), strict=True)]

    def requests(self, run: PlannedRun, engine: int = 0) -> RunRequests:
        """The run with how its jobs say that it be sampled: the sampling parameters that occur in it, no others.

        Args:
            run: The run.
            engine: Number of the engine that it is for.
        """
        positions = slice(run.first_position, run.first_position + len(run))
        sample_at = self.sample_at[positions]
        kinds, seeds = np.empty(len(run), np.int64), np.empty(len(run), np.int64)
        namespaces: npt.NDArray[np.object_] | None = None
        targets: npt.NDArray[np.int32] | None = None
        first_kind = np.cumsum([0, *(len(part.rows.kinds) for part in self._parts)])
        for number, chosen in by_part(self.part_at[positions]):
            own_kinds, seeds[chosen], names = _sampling_of(self._parts[number], sample_at[chosen])
            kinds[chosen] = own_kinds + first_kind[number]
            if self._parts[number].rows.scores.has_any:
                targets = np.full(len(run), NO_TARGET, np.int32) if targets is None else targets
                targets[chosen] = _targets_of(self._parts[number], sample_at[chosen])
            if names is not None:
                namespaces = np.full(len(run), "", object) if namespaces is None else namespaces
                namespaces[chosen] = names
        used, place = np.unique(kinds, return_inverse=True)
        return RunRequests(
            run=run,
            sampling=tuple(self._kind(kind, first_kind) for kind in used.tolist()),
            sampling_index=place.tolist(),
            seeds=seeds.tolist(),
            namespaces=None if namespaces is None else namespaces.tolist(),
            targets=None if targets is None else targets.tolist(),
            engine=engine,
        )

    def _kind(self, number: int, first_kind: Int64Array) -> SamplingParams:
        """A way to sample, by its number among those of all parts."""
        part = int(np.searchsorted(first_kind, number, "right")) - 1
        kinds: list[SamplingParams] = self._parts[part].rows.kinds
        return kinds[number - int(first_kind[part])]


def by_part(part_at: Int32Array) -> Iterator[tuple[int, Int64Array | slice]]:
    """Each part that occurs: its number, and the places where it does."""
    if not len(part_at):
        return
    first = int(part_at[0])
    if (part_at == first).all():
        yield first, slice(None)
        return
    for number in np.unique(part_at).tolist():
        yield number, np.flatnonzero(part_at == number)


def _sampling_of(part: Part, samples: Int64Array) -> tuple[Int32Array, Int64Array, list[str] | None]:
    """How to sample some samples of a part: of each its row's kind, its seed, and what its namespace is called (None:
    all are in the default one).
    """
    rows, row_numbers = part.rows, part.samples.rows(samples)
    kinds = rows.kind(row_numbers)
    seeds = np.zeros(len(samples), np.int64)
    drawn = np.flatnonzero(rows.draws[kinds])  # a greedy row needs no seed
    of_drawn = row_numbers[drawn].tolist(), part.samples.samples(samples)[drawn].tolist()
    seeds[drawn] = [rows.sample_seed(row, sample) for row, sample in zip(*of_drawn, strict=True)]
    numbers = rows.namespace(row_numbers)
    return kinds, seeds, [rows.all_namespaces[n].name for n in numbers.tolist()] if numbers.any() else None


def _targets_of(part: Part, samples: Int64Array) -> Int32Array:
    """Target of some samples of a part (`RowScores`)."""
    rows = part.rows
    return rows.scores.targets(rows.prompt_of(part.samples.rows(samples), part.samples.samples(samples)))


def joined_share_lens(parts: Sequence[Part]) -> Int32Array | None:
    """Tokens at the start of each prompt that may be shared; None where no prompt is scored."""
    if not any(part.rows.scores.has_any for part in parts):
        return None
    return np.concatenate(
        [part.rows.scores.share_lens(part.row_numbers, part.table.lengths[_chosen(part)]) for part in parts]
    )


def _joined(columns: Sequence[Int32Array]) -> Int32Array:
    return columns[0] if len(columns) == 1 else np.concatenate(columns)


def _joined_table(parts: Sequence[Part]) -> TokenTable:
    """The prompts that are left, one job's after another's; not a copy where they are all of one job's."""
    if len(parts) == 1 and parts[0].left is None:
        return parts[0].table
    lengths = np.concatenate([part.table.lengths[_chosen(part)] for part in parts])
    offsets = starts_of(lengths)
    tokens = np.empty(offsets[-1], np.int32)
    first = 0
    for part in parts:
        last = first + len(part)
        starts, ends = part.table.offsets[:-1][_chosen(part)], part.table.offsets[1:][_chosen(part)]
        copy_runs(part.table.tokens, starts, ends, tokens, offsets[first:last])
        first = last
    return TokenTable(tokens=tokens, offsets=offsets)


def _chosen(part: Part) -> Int64Array | slice:
    return slice(None) if part.left is None else part.left


def _joined_namespaces(parts: Sequence[Part]) -> tuple[list[Namespace], Int64Array | None]:
    """The namespaces of all jobs, each once, and which of them each sample is in; None where there is one."""
    numbers: dict[Namespace, int] = {}
    number_of = [[numbers.setdefault(n, len(numbers)) for n in part.rows.all_namespaces] for part in parts]
    if len(numbers) == 1:
        return list(numbers), None
    columns = [
        np.array(own, np.int64)[part.rows.namespace(part.row_numbers)]
        for own, part in zip(number_of, parts, strict=True)
    ]
    return list(numbers), np.concatenate(columns)


def _joined_tasks(parts: Sequence[Part]) -> Int32Array | None:
    """Tasks are each job's own: the same name in another job is another task. None where no row names one."""
    if not any(part.rows.has_tasks for part in parts):
        return None
    columns: list[Int32Array] = []
    num_tasks = 0
    for part in parts:
        tasks = part.rows.task(part.row_numbers)
        if num_tasks:
            tasks = np.where(tasks >= 0, tasks + np.int32(num_tasks), tasks).astype(np.int32)
        columns.append(tasks)
        num_tasks = max(num_tasks, int(tasks.max(initial=-1)) + 1)
    return _joined(columns)


_LIBC = ctypes.CDLL(None)
"""Loaded once: each has a class of its own, in a cycle, and a server makes a plan for every batch."""


def give_memory_back() -> None:
    """What millions of rows needed for a moment; the C library would keep it for this process."""
    if hasattr(_LIBC, "malloc_trim"):  # glibc
        _LIBC.malloc_trim(0)
