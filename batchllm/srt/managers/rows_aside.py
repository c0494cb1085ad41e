"""Planned rows that sit out steps: they decode no token, and keep their KV. Runs in the scheduler's process.

(Upstream: ``ScheduleBatch.filter_batch`` and ``merge_batch`` in ``srt/managers/schedule_batch.py``.)

INVARIANT: a row that decodes is in the running batch or here, never in both; `bring_back` leaves nothing here.
"""

from __future__ import annotations

import copy
from typing import Any

from batchllm.srt.managers.schedule_batch import PlannedReq


def may_sit_out(req: Any) -> bool:
    """Whether a row can leave the running batch and come back.

    A row with penalties cannot: SGLang counts its tokens in tensors of the batch, which would be lost.
    """
    params = req.sampling_params
    has_penalty = params.frequency_penalty or params.presence_penalty or params.repetition_penalty != 1.0
    return isinstance(req, PlannedReq) and not has_penalty and not params.min_new_tokens


class RowsAside:
    """The rows that sit out the coming step."""

    def __init__(self) -> None:
        self._batch: Any = None

    @property
    def reqs(self) -> list[Any]:
        """Requests of the rows that sit out."""
        return [] if self._batch is None else self._batch.reqs

    def bring_back(self, running_batch: Any) -> Any:
        """The running batch with all rows in it."""
        aside, self._batch = self._batch, None
        if aside is None:
            return running_batch
        if running_batch.is_empty():
            aside.batch_is_full = running_batch.batch_is_full
            return aside
        running_batch.merge_batch(aside)
        return running_batch

    def put(self, running_batch: Any, reqs: set[Any]) -> None:
        """Take these requests, each of which `may_sit_out`, out of the running batch."""
        if not reqs:
            return
        out = [i for i, req in enumerate(running_batch.reqs) if req in reqs]
        kept = [i for i, req in enumerate(running_batch.reqs) if req not in reqs]
        aside, info = copy.copy(running_batch), copy.copy(running_batch.sampling_info)
        # SGLang's count of tokens for penalties, which none of these rows has, belongs to one batch.
        penalties = info.penalizer_orchestrator
        aside.reqs = [running_batch.reqs[i] for i in out]
        info.penalizer_orchestrator = type(penalties)(penalties.vocab_size, aside, set(penalties.penalizers))
        aside.reqs, aside.sampling_info = running_batch.reqs, info
        aside.filter_batch(keep_indices=out)
        running_batch.filter_batch(keep_indices=kept)
        self._batch = aside
