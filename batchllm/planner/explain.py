"""What a plan will share and what that saves, in words and numbers, before anything runs.

Knows: a plan, its prompts, the one-level cuts. Must not know: models, devices, prices, time.
Invariant: nothing here is an estimate; every number is counted from the plan.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from batchllm.compiled import njit
from batchllm.planner.group_cut import exact_cut, greedy_cut
from batchllm.planner.plan import BatchPlan
from batchllm.tokens import Int32Array, Int64Array, TokenTable, common_len, page_ceil

BoolArray = npt.NDArray[np.bool_]

_NUM_LARGEST = 10
_NUM_LEVELS_SHOWN = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class PrefixSummary:
    """One planned prefix.

    Attributes:
        level: 1 for a prefix at the start of the prompt, 2 for one that continues it, and so on.
        own_len: Tokens it adds to the prefix above it.
        end_len: Tokens from the start of the prompt to its end.
        num_consumers: Requests that read it, with the one that computes it.
        saved_tokens: Prompt tokens not computed because its own tokens are shared.
        example_row: Row of the input that computes it.
    """

    level: int
    own_len: int
    end_len: int
    num_consumers: int
    saved_tokens: int
    example_row: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanSummary:
    """A plan in numbers. All lengths and amounts are prompt tokens.

    Attributes:
        num_requests: Prompts planned.
        page_size: Tokens of a KV page; only whole pages are shared.
        num_prompt_tokens: Tokens of all prompts.
        optimal_prefill_tokens: What the plan computes, the fewest any schedule can.
        optimal_reuse: Share of the prompt tokens not computed, 0 to 1.
        saved_tokens: Prompt tokens not computed.
        exact_one_level_saved_tokens: The same if each prompt could read one prefix only, best
            choice.
        greedy_one_level_saved_tokens: The same with the choice of the BatchLLM paper.
        num_prefixes: Planned prefixes.
        prefixes_per_level: Planned prefixes at level 1, 2, ...
        num_unshared_requests: Requests that read no planned prefix.
        num_duplicates: Prompts identical to the one before them in the plan.
        largest: The prefixes that save most, best first.
        longest_path_len: Tokens of the longest chain of prefixes, kept while its consumers run.
        longest_prompt_len: Tokens of the longest prompt.
        kv_needed_tokens: KV that holds both at once, in whole pages: a pool should not be smaller.
    """

    num_requests: int
    page_size: int
    num_prompt_tokens: int
    optimal_prefill_tokens: int
    optimal_reuse: float
    saved_tokens: int
    exact_one_level_saved_tokens: int
    greedy_one_level_saved_tokens: int
    num_prefixes: int
    prefixes_per_level: tuple[int, ...]
    num_unshared_requests: int
    num_duplicates: int
    largest: tuple[PrefixSummary, ...]
    longest_path_len: int
    longest_prompt_len: int
    kv_needed_tokens: int

    def to_dict(self) -> dict[str, Any]:
        """The same as plain dicts, lists and numbers, ready for JSON."""
        fields = asdict(self)
        fields["prefixes_per_level"] = list(self.prefixes_per_level)
        fields["largest"] = list(fields["largest"])
        return fields

    def render(self) -> str:
        """A page of text for a person to read."""
        if self.num_requests == 0:
            return "Nothing to run: the batch has no requests."
        lines = [
            f"{self.num_requests:,} requests, {self.num_prompt_tokens:,} prompt tokens.",
            f"{self.optimal_prefill_tokens:,} of them must be computed; the other "
            f"{self.saved_tokens:,} ({self.optimal_reuse:.1%}) are read from shared prefixes"
            f"{'' if self.page_size == 1 else f', in pages of {self.page_size} tokens'}.",
        ]
        if self.num_prefixes:
            lines += self._sharing_lines()
        lines.append(
            f"Requests that share nothing: {self.num_unshared_requests:,}; "
            f"that repeat another prompt exactly: {self.num_duplicates:,}."
        )
        lines.append(
            f"KV for the longest prefix path ({self.longest_path_len:,} tokens) and the longest "
            f"prompt ({self.longest_prompt_len:,}): {self.kv_needed_tokens:,} tokens, before any "
            f"output."
        )
        return "\n".join(lines)

    def _sharing_lines(self) -> list[str]:
        shown = self.prefixes_per_level[:_NUM_LEVELS_SHOWN]
        levels = ", ".join(f"{count:,} at level {i}" for i, count in enumerate(shown, start=1))
        hidden = len(self.prefixes_per_level) - len(shown)
        lines = [
            f"{self.num_prefixes:,} shared prefixes: {levels}"
            + (f", and {hidden:,} deeper levels." if hidden else "."),
            "Tokens saved:",
            f"  as planned, every level shared   {self._saved(self.saved_tokens)}",
            f"  one level, best choice           {self._saved(self.exact_one_level_saved_tokens)}",
            f"  one level, the paper's choice    {self._saved(self.greedy_one_level_saved_tokens)}",
            "Prefixes that save most:",
            "         saved   requests   own tokens   ends at   level   first in row",
        ]
        lines += [
            f"  {p.saved_tokens:>12,} {p.num_consumers:>10,} {p.own_len:>12,} {p.end_len:>9,} "
            f"{p.level:>7} {p.example_row:>14}"
            for p in self.largest
        ]
        return lines

    def _saved(self, tokens: int) -> str:
        return f"{tokens:>15,}  {tokens / self.num_prompt_tokens:6.1%}"

    def __str__(self) -> str:
        return self.render()


def explain(plan: BatchPlan, table: TokenTable) -> PlanSummary:
    """Summarize a plan: what will be shared and what it saves.

    Args:
        plan: A plan of ``table``.
        table: The prompts planned.
    """
    path_len = int(plan.end_len.max(initial=0))
    prompt_len = int(plan.prompt_lens.max(initial=0))
    return PlanSummary(
        num_requests=plan.num_requests,
        page_size=plan.page_size,
        num_prompt_tokens=plan.num_prompt_tokens,
        optimal_prefill_tokens=plan.optimal_prefill_tokens,
        optimal_reuse=plan.optimal_reuse,
        saved_tokens=plan.num_prompt_tokens - plan.optimal_prefill_tokens,
        exact_one_level_saved_tokens=exact_cut(plan).saved_tokens,
        greedy_one_level_saved_tokens=greedy_cut(plan).saved_tokens,
        num_prefixes=plan.num_prefixes,
        prefixes_per_level=tuple(np.bincount(_levels(plan.parent))[1:].tolist()),
        num_unshared_requests=int(np.count_nonzero(plan.request_prefix < 0)),
        num_duplicates=int(_count_repeats(table.tokens, table.offsets, plan.order)),
        largest=largest_prefixes(plan),
        longest_path_len=path_len,
        longest_prompt_len=prompt_len,
        kv_needed_tokens=page_ceil(path_len + prompt_len, plan.page_size),
    )


def largest_prefixes(plan: BatchPlan, chosen: BoolArray | None = None) -> tuple[PrefixSummary, ...]:
    """The prefixes that save most, best first, at most ten.

    Args:
        plan: A plan.
        chosen: Positions whose requests count, bool[num_requests]; None for all. Consumers, the row, and what is saved
            are then theirs, as if the first of them computed the prefix, and the last page of each that is no longer.
    """
    counted = np.ones(plan.num_requests, bool) if chosen is None else chosen
    num_before = np.zeros(plan.num_requests + 1, np.int32)
    np.cumsum(counted, out=num_before[1:])
    num_consumers = num_before[plan.first + plan.num_consumers] - num_before[plan.first]
    saved_tokens = _saved_per_prefix(plan, counted, num_consumers)
    best = _greatest(saved_tokens)
    levels = _levels(plan.parent)
    # Of each the first consumer that counts.
    leaders = np.searchsorted(num_before, num_before[plan.first[best]], side="right") - 1
    return tuple(
        PrefixSummary(
            level=int(levels[p]),
            own_len=int(plan.end_len[p] - plan.start_len[p]),
            end_len=int(plan.end_len[p]),
            num_consumers=int(num_consumers[p]),
            saved_tokens=int(saved_tokens[p]),
            example_row=int(plan.order[leader]),
        )
        for p, leader in zip(best.tolist(), leaders.tolist(), strict=True)
        if chosen is None or saved_tokens[p] > 0
    )


def _greatest(values: Int64Array) -> Int64Array:
    """Where the greatest are, at most `_NUM_LARGEST`; of equals the first in the plan leads."""
    if len(values) > _NUM_LARGEST:
        least = np.partition(values, -_NUM_LARGEST)[-_NUM_LARGEST]
        candidates = np.flatnonzero(values >= least)
    else:
        candidates = np.arange(len(values))
    return candidates[np.argsort(-values[candidates], kind="stable")[:_NUM_LARGEST]]


def _saved_per_prefix(plan: BatchPlan, counted: BoolArray, num_consumers: Int32Array) -> Int64Array:
    """Tokens each prefix saves those that count; of all they add up to what the plan saves.

    All consumers but the first save its own tokens, except that one which is nothing but the
    prefix still computes the last page.
    """
    own_len = (plan.end_len - plan.start_len).astype(np.int64)
    saved = np.maximum(num_consumers - 1, 0) * own_len
    read = plan.read_prefix()
    whole = read[counted & (read >= 0) & (plan.shareable_lens == plan.end_len_of(read))]
    return saved - plan.page_size * np.bincount(whole, minlength=plan.num_prefixes)


@njit()
def _levels(parent: Int32Array) -> Int64Array:
    levels = np.ones(len(parent), np.int64)
    for p in range(len(parent)):
        if parent[p] >= 0:
            levels[p] = levels[parent[p]] + 1
    return levels


@njit()
def _count_repeats(tokens: Int32Array, offsets: Int64Array, order: Int64Array) -> int:
    """Positions whose prompt equals the one before."""
    count = 0
    for i in range(1, len(order)):
        this, before = offsets[order[i]], offsets[order[i - 1]]
        length = offsets[order[i] + 1] - this
        if length == offsets[order[i - 1] + 1] - before:
            count += common_len(tokens, before, tokens, this, length) == length
    return count
