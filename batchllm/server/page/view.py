"""What the page says, from records: words and numbers, nothing that is looked up.

Knows how to say things; not HTML, files or the clock.

INVARIANT: every list and every text has a bound; text of users is shown as one line of characters that can be seen.
"""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson

from batchllm.dataset import BadRow
from batchllm.offline.stats import JobStats
from batchllm.planner import PrefixSummary
from batchllm.server.batch_activity import BatchCosts
from batchllm.server.batch_store import BatchRecord
from batchllm.server.file_store import FileRecord
from batchllm.server.objects import ACTIVE_STATUSES
from batchllm.trace.latency import LatencySummary
from batchllm.trace.steps import StepArray
from batchllm.trace.svg_path import duration_text

MAX_FAILURES = 20
MAX_REASONS = 20
_MAX_TEXT_LEN = 300
_CANCELLABLE = ("validating", "in_progress")


@dataclass(frozen=True, slots=True, kw_only=True)
class ReuseView:
    """Prompt tokens, and how many of them were not computed; ``best`` is of the optimum, "" where it is not known."""

    prompt: str
    computed: str
    optimal: str
    reuse: str
    best: str
    note: str


class FailureView(NamedTuple):
    """A row that failed, or a fault of the file; a line of a table."""

    where: str
    code: str
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchView:
    """A batch in a few words; ``done`` and ``total`` are for a bar, ``total`` is 0 while the rows are not counted."""

    id: str
    status: str
    is_active: bool
    can_cancel: bool
    endpoint: str
    model: str
    window: str
    created: str
    ended: str
    done: int
    total: int
    progress: str
    failed: str
    num_failed: int
    input_file_id: str
    output_file_id: str | None
    error_file_id: str | None
    metadata: tuple[tuple[str, str], ...]


class PrefixView(NamedTuple):
    """A planned prefix; a line of a table."""

    saved: str
    requests: str
    own_len: str
    end_len: str
    level: str
    row: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FileView:
    """A file that a batch can be made of."""

    id: str
    label: str


def shown(text: object, max_len: int = _MAX_TEXT_LEN) -> str:
    """A text as one line: what cannot be seen, or turns what follows around, is escaped; the rest is cut off."""
    whole = str(text)
    cut = whole[:max_len]
    seen = "".join(c if c.isprintable() else c.encode("unicode_escape", "surrogatepass").decode() for c in cut)
    return seen + ("…" if len(whole) > max_len else "")


def time_text(seconds: int | None) -> str:
    """Unix seconds as UTC; "" for None."""
    if seconds is None:
        return ""
    return datetime.datetime.fromtimestamp(seconds, datetime.UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def view_batch(record: BatchRecord) -> BatchView:
    """The record in words."""
    ended_at = record.completed_at or record.failed_at or record.expired_at or record.cancelled_at
    if record.num_rows:
        progress = f"{record.num_done:,} of {record.num_rows:,} rows"
    else:
        progress = "not counted yet" if record.status in ACTIVE_STATUSES else "no rows"
    return BatchView(
        id=record.id,
        status=record.status.replace("_", " "),
        is_active=record.status in ACTIVE_STATUSES,
        can_cancel=record.status in _CANCELLABLE,
        endpoint=record.endpoint,
        model=shown(record.model or ""),
        window=record.completion_window,
        created=time_text(record.created_at),
        ended=time_text(ended_at),
        done=record.num_done,
        total=record.num_rows,
        progress=progress,
        failed=f"{record.num_failed:,} failed" if record.num_failed else "",
        num_failed=record.num_failed,
        input_file_id=record.input_file_id,
        output_file_id=record.output_file_id,
        error_file_id=record.error_file_id,
        metadata=tuple((shown(name), shown(value)) for name, value in (record.metadata or {}).items()),
    )


def view_file(record: FileRecord) -> FileView:
    """The file as a choice."""
    return FileView(id=record.id, label=f"{shown(record.filename, 60)} · {size_text(record.num_bytes)} · {record.id}")


def size_text(num_bytes: int) -> str:
    """A size with its unit."""
    size = float(num_bytes)
    for unit in ("bytes", "KiB", "MiB"):
        if size < 1024:
            return f"{size:,.0f} {unit}"
        size /= 1024
    return f"{size:,.1f} GiB"


def view_reuse(num_prompt: int, num_computed: int, num_optimal: int | None, note: str = "") -> ReuseView | None:
    """Reuse against the optimum; None of nothing."""
    if num_prompt <= 0:
        return None
    return ReuseView(
        prompt=f"{num_prompt:,}",
        computed=f"{num_computed:,}",
        optimal="" if num_optimal is None else f"{num_optimal:,}",
        reuse=f"{max(0.0, 1 - num_computed / num_prompt):.1%}",
        best="" if num_optimal is None else f"{1 - num_optimal / num_prompt:.1%}",
        note=note,
    )


def reuse_of_batch(record: BatchRecord, costs: BatchCosts | None) -> ReuseView | None:
    """What the record says of a batch that has ended, and what was counted so far of one that runs."""
    usage = record.usage
    if usage is not None:
        if "optimal" in usage:
            return view_reuse(usage["prompt"], usage["computed"], usage["optimal"])
        return view_reuse(usage["input"], usage["input"] - usage["cached"], None)
    if costs is None:
        return None
    return reuse_of(costs.stats, "so far; tokens of rows that still run are counted as computed, not as prompts")


def reuse_of(stats: JobStats, note: str) -> ReuseView | None:
    """What was counted; ``note`` says of what."""
    counts = stats.num_prompt_tokens, stats.num_computed_prompt_tokens, stats.num_optimal_prompt_tokens
    return view_reuse(*counts, note)


def reasons_of(record: BatchRecord, costs: BatchCosts | None) -> list[tuple[str, str]]:
    """Why rows failed, and how many, the most frequent first, at most `MAX_REASONS`."""
    found: Mapping[str, int] = (record.usage or {}).get("failed_by_code") or (costs.failed_by_code if costs else {})
    ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
    return [(shown(code, 80), f"{num:,}") for code, num in ordered[:MAX_REASONS]]


def faults_of_file(record: BatchRecord) -> list[FailureView]:
    """Why a batch has failed as a whole, at most `MAX_FAILURES`."""
    faults = [
        FailureView(
            where="" if error.get("line") is None else f"line {error['line']}",
            code=shown(error.get("code"), 80),
            message=shown(error.get("message")),
        )
        for error in record.errors or []
    ]
    return faults[:MAX_FAILURES]


def failures_so_far(failed: Iterable[BadRow]) -> list[FailureView]:
    """Rows that have failed while the batch runs."""
    return [
        FailureView(where=_row_id(bad.given_id), code=shown(bad.code, 80), message=shown(bad.message)) for bad in failed
    ][:MAX_FAILURES]


def failures_of_file(head: bytes) -> list[FailureView]:
    """Rows in the beginning of a file of errors; a line that was cut off is left out."""
    lines = head.split(b"\n")[:-1][:MAX_FAILURES]
    return [_failure(orjson.loads(line)) for line in lines]


def _failure(line: Mapping[str, Any]) -> FailureView:
    error = line["error"] or line["response"]["body"]["error"]
    return FailureView(where=_row_id(line["custom_id"]), code=shown(error["code"], 80), message=shown(error["message"]))


def _row_id(given_id: object) -> str:
    return "row without an id" if given_id is None else shown(given_id, 100)


def view_prefixes(prefixes: Sequence[PrefixSummary]) -> list[PrefixView]:
    """The prefixes as lines of a table; rows are counted from 1."""
    return [
        PrefixView(
            saved=f"{prefix.saved_tokens:,}",
            requests=f"{prefix.num_consumers:,}",
            own_len=f"{prefix.own_len:,}",
            end_len=f"{prefix.end_len:,}",
            level=str(prefix.level),
            row=f"{prefix.example_row + 1:,}",
        )
        for prefix in prefixes
    ]


def view_step_mix(steps: StepArray) -> list[tuple[str, str, str]]:
    """What the steps carried: of each kind its name, its tokens, its part; nothing of no tokens."""
    sums = {
        name: int(steps[name].sum(dtype="int64"))
        for name in ("num_prefill_tokens", "num_live_prefill_tokens", "num_decode_tokens", "num_live_decode_tokens")
    }
    live_prefill, live_decode = sums["num_live_prefill_tokens"], sums["num_live_decode_tokens"]
    kinds = {
        "planned prefill": sums["num_prefill_tokens"] - live_prefill,
        "planned decode": sums["num_decode_tokens"] - live_decode,
        "live prefill": live_prefill,
        "live decode": live_decode,
    }
    total = sum(kinds.values())
    return [(name, f"{num:,}", f"{num / total:.1%}") for name, num in kinds.items()] if total else []


def view_latency(name: str, found: LatencySummary) -> tuple[str, str, str, str]:
    """A time that live requests wait: its name, the median, the 99th percentile, how many."""
    if not found.count:
        return name, "none", "none", "0"
    return name, _short(found.p50_s), _short(found.p99_s), f"{found.count:,}"


def _short(seconds: float) -> str:
    return duration_text(float(f"{seconds:.3g}")).replace(" ", "\N{NO-BREAK SPACE}")
