"""What is looked up for a view of the page, and the templates.

Knows the stores and what runs; not requests.

INVARIANT: what is read for one view is bounded: a page of records, the beginning of a file, the last steps.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from typing import Any

import jinja2

from batchllm.dataset.openai_rows import KIND_OF_URL
from batchllm.offline.stats import JobStats
from batchllm.server.api_errors import ApiError, unknown_cursor
from batchllm.server.batch_activity import BatchActivity
from batchllm.server.batch_store import BatchRecord, BatchStore
from batchllm.server.file_store import FileStore, UnknownCursorError
from batchllm.server.objects import INPUT_PURPOSE
from batchllm.server.page import view
from batchllm.server.page.charts import draw_charts, recent_steps
from batchllm.trace.latency import LiveLatency
from batchllm.trace.steps import StepArray
from batchllm.trace.svg_path import BOX_HEIGHT, BOX_WIDTH

_NUM_BATCHES = 20
_NUM_FILES = 50
_HEAD_LEN = 1 << 18
_ENDPOINTS = tuple(map(str, KIND_OF_URL))


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveNumbers:
    """Numbers of the engine and of all that runs on it.

    Attributes:
        job_stats: What all rows of all batches have cost since the server was started.
        steps: The last steps, ``start_s`` on the monotonic clock. `STEP_DTYPE` ``[num_steps]``.
        latency: What live requests wait.
        kv_limit_tokens: Slots of the KV pool that may be used.
    """

    job_stats: Callable[[], JobStats]
    steps: Callable[[], StepArray]
    latency: LiveLatency
    kv_limit_tokens: int


class PageContent:
    """Values for the templates, and the templates.

    Args:
        batches: The batches.
        files: The files.

    Attributes:
        activity: What this process knows of batches; None before it runs any.
        numbers: How the engine is doing; None where nobody says.
    """

    def __init__(self, batches: BatchStore, files: FileStore) -> None:
        self._batches = batches
        self._files = files
        self.activity: BatchActivity | None = None
        self.numbers: LiveNumbers | None = None
        folder = resources.files("batchllm.server.page")
        self._style, self._script = ((folder / name).read_text(encoding="utf-8") for name in ("page.css", "page.js"))
        names = ("base", "macros", "overview", "batch", "sign_in", "message")
        sources = {f"{name}.html": (folder / f"{name}.html.jinja").read_text(encoding="utf-8") for name in names}
        self._templates = jinja2.Environment(
            loader=jinja2.DictLoader(sources),
            autoescape=True,
            undefined=jinja2.StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )

    def render(self, name: str, **values: Any) -> str:
        """A template with its values, which it escapes."""
        ours = {"style": self._style, "script": self._script}
        return self._templates.get_template(f"{name}.html").render(values | ours)

    @property
    def policy(self) -> str:
        """What a browser may do with the page (Content-Security-Policy): nothing but its own style and script."""
        return (
            f"default-src 'none'; style-src {_hash(self._style)}; script-src {_hash(self._script)}; "
            "connect-src 'self'; img-src data:; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"
        )

    def overview(self, after: str | None, chosen_file: str | None) -> dict[str, Any]:
        """Values of the overview.

        Args:
            after: The batch after which the list begins; None for the newest.
            chosen_file: The file that is chosen already.

        Raises:
            ApiError: There is no such batch.
        """
        try:
            records, has_more = self._batches.page(after=after, limit=_NUM_BATCHES)
        except UnknownCursorError:
            raise unknown_cursor(after) from None
        files, has_more_files = self._files.page(purpose=INPUT_PURPOSE, after=None, limit=_NUM_FILES, order="desc")
        chosen = None if chosen_file is None else self._files.get(chosen_file)
        if chosen is not None and chosen not in files:
            files.insert(0, chosen)
        return {
            "batches": [view.view_batch(record) for record in records],
            "older": records[-1].id if has_more else None,
            "is_first": after is None,
            "files": [view.view_file(file) for file in files],
            "has_more_files": has_more_files,
            "chosen": None if chosen is None else view.view_file(chosen),
            "endpoints": _ENDPOINTS,
            **self._engine(),
        }

    def _engine(self) -> dict[str, Any]:
        numbers = self.numbers
        if numbers is None:
            return {"reuse": None, "charts": [], "step_mix": [], "latency": [], "box": (BOX_WIDTH, BOX_HEIGHT)}
        now_s = time.monotonic()
        steps = recent_steps(numbers.steps(), now_s)
        latency = numbers.latency
        return {
            "reuse": view.reuse_of(numbers.job_stats(), "since the start"),
            "charts": draw_charts(steps, numbers.kv_limit_tokens),
            "step_mix": view.view_step_mix(steps),
            "latency": [
                view.view_latency("time to first token", latency.first_token.summary(now_s)),
                view.view_latency("time between tokens", latency.between_tokens.summary(now_s)),
            ],
            "box": (BOX_WIDTH, BOX_HEIGHT),
        }

    def batch(self, batch_id: str) -> dict[str, Any]:
        """Values of a batch's own page.

        Raises:
            ApiError: There is no such batch.
        """
        record = self._batches.get(batch_id)
        if record is None:
            raise ApiError(404, f"No such Batch object: {view.shown(batch_id, 64)}", code="batch_not_found")
        costs = None if self.activity is None else self.activity.get(batch_id)
        head = self._head_of_errors(record)
        if head is not None:
            failures = view.failures_of_file(head)
        else:
            failures = [] if costs is None else view.failures_so_far(costs.first_failed)
        input_file = self._files.get(record.input_file_id)
        return {
            "batch": view.view_batch(record),
            "input_name": None if input_file is None else view.shown(input_file.filename, 100),
            "can_download": {
                file_id: self._files.get(file_id) is not None
                for file_id in (record.output_file_id, record.error_file_id)
                if file_id is not None
            },
            "faults": view.faults_of_file(record),
            "num_faults": len(record.errors or []),
            "reasons": view.reasons_of(record, costs),
            "failures": failures,
            "reuse": view.reuse_of_batch(record, costs),
            "prefixes": [] if costs is None else view.view_prefixes(costs.largest_prefixes),
        }

    def _head_of_errors(self, record: BatchRecord) -> bytes | None:
        """The beginning of the batch's file of errors; None where there is none."""
        if record.error_file_id is None or self._files.get(record.error_file_id) is None:
            return None
        try:
            with self._files.path(record.error_file_id).open("rb") as stream:
                return stream.read(_HEAD_LEN)
        except FileNotFoundError:  # deleted in this moment
            return None


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
