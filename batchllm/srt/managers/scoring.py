"""Tokens of a planned prompt that are scored: what SGLang is asked, and what it has answered. Runs in the scheduler's
process. (Upstream: ``srt/managers/scheduler_components/logprob_result_processor.py``.)
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_ABORT

from batchllm.request import NO_TARGET


@dataclass(frozen=True, slots=True)
class Scoring:
    """What is scored of a prompt.

    Attributes:
        share_len: Tokens at its start that may be shared; all behind them are scored.
        num_alternatives: Most likely alternatives beside each.
        target: A token that would follow the prompt, and is scored last; `NO_TARGET` for none.
    """

    share_len: int
    num_alternatives: int
    target: int

    @property
    def start(self) -> int:
        """The first token whose logits are needed: they score the one behind it."""
        return self.share_len - 1


def label_logprobs(req: Any) -> list[float] | None:
    """Log probabilities of the label tokens of a `PlannedReq`; None where it has none, or was aborted."""
    if not req.label_ids or isinstance(req.finished_reason, FINISH_ABORT):
        return None
    found = req.logprob
    values = dict(zip(found.output_token_ids_logprobs_idx[0], found.output_token_ids_logprobs_val[0], strict=True))
    return [float(values[token_id]) for token_id in req.label_ids]


def prompt_scores(req: Any) -> tuple[int, list[int], list[float | None], tuple[list[Any], list[Any]]] | None:
    """As `PlannedBatchOutput.prompt_scores` has it of a `PlannedReq`; None where nothing was scored."""
    scoring: Scoring | None = req.scoring
    found = req.logprob
    if scoring is None or isinstance(req.finished_reason, FINISH_ABORT):
        return None
    ids, values = list(req.origin_input_ids[scoring.start :]), list(found.input_token_logprobs_val)
    tops: tuple[list[Any], list[Any]] = ([()] * len(ids), [()] * len(ids))
    if scoring.num_alternatives:
        tops = list(found.input_top_logprobs_val), list(found.input_top_logprobs_idx)
    if scoring.target != NO_TARGET:
        ids.append(scoring.target)
        values.append(found.output_token_ids_logprobs_val[0][0])
        tops[0].append(found.output_top_logprobs_val[0] if scoring.num_alternatives else ())
        tops[1].append(found.output_top_logprobs_idx[0] if scoring.num_alternatives else ())
    num = scoring.num_alternatives
    top_values, top_ids = ([tuple(top or ())[:num] for top in column] for column in tops)
    return scoring.start, ids, values, (top_values, top_ids)
