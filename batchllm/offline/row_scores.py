"""Which rows of a job are scored, and from where; what their answers say of it.

Knows rows and prompts by number, and their tokens; not plans or engines.

INVARIANT: a prompt that is scored and not continued is stored without its last token, its target: how likely that one
is, the logits of the token in front of it say, and nothing else needs it.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from batchllm.dataset.scoring import NOTHING_IN_FRONT, past_the_end
from batchllm.offline.column import Column
from batchllm.offline.encode import Encoded
from batchllm.request import NO_TARGET, Completion, PromptScore
from batchllm.tokens import Int32Array, Int64Array

_UNSCORED = -1


def cut_targets(prompt: Encoded) -> tuple[Encoded, Sequence[int]]:
    """What of a request's prompts is computed, and the target of each; `NO_TARGET` where there is none.

    Raises:
        RowError: It is to be scored, and there is nothing to score.
    """
    request, ids, lengths = prompt.request, prompt.ids, prompt.lengths
    if request.sampling.prompt_logprobs is None:
        return prompt, [NO_TARGET] * len(lengths)
    shortest = min(lengths)
    if request.score_from >= shortest:
        raise past_the_end(request.score_from, shortest, has_continuation=request.continuation is not None)
    if request.sampling.max_new_tokens:
        return prompt, [NO_TARGET] * len(lengths)
    if shortest == 1:
        raise NOTHING_IN_FRONT
    kept, targets, start = array("i"), [], 0
    for length in lengths:
        kept += ids[start : start + length - 1]
        targets.append(ids[start + length - 1])
        start += length
    shorter = msgspec.structs.replace(prompt, ids=kept, lengths=tuple(length - 1 for length in lengths))
    return shorter, targets


class RowScores:
    """Of each row of a job whether, and from where, its prompts are scored. Rows are appended in order."""

    def __init__(self) -> None:
        self._first = Column(np.int32)
        self._target = Column(np.int32)  # a row of the token store each
        self._merged_lens: dict[int, int] = {}
        self.has_any = False

    def extend(self, rows: Sequence[tuple[Encoded, Sequence[int]]]) -> None:
        """The next rows, each as `cut_targets` gave it."""
        first: list[int] = []
        for number, (prompt, _) in enumerate(rows, len(self._first)):
            is_scored = prompt.request.sampling.prompt_logprobs is not None
            first.append(prompt.request.score_from if is_scored else _UNSCORED)
            if prompt.merged_len:
                self._merged_lens[number] = prompt.merged_len
            self.has_any = self.has_any or is_scored
        self._first.extend(first)
        self._target.extend([target for _, targets in rows for target in targets])

    def share_lens(self, rows: Int64Array, lengths: npt.NDArray[np.integer]) -> Int32Array:
        """Tokens at the start of a prompt of each of these rows that may be shared (`planner.plan_batch`).

        Args:
            rows: Row numbers.
            lengths: Tokens of the prompt that is meant of each.
        """
        first = self._first.values[rows]
        return np.where(first == _UNSCORED, lengths, np.maximum(first, 1)).astype(np.int32)

    def targets(self, prompts: Int64Array) -> Int32Array:
        """Target of each of these rows of the token store."""
        return self._target.values[prompts]

    def finish(self, row: int, completion: Completion) -> Completion:
        """An answer as it is for this row: scores from where it asked for them, all tokens of its prompt counted."""
        score = completion.prompt_score
        if score is None:
            return completion
        first = self._first[row]
        num_tokens = score.start + len(score.token_ids)
        if first:  # an engine begins with the token in front
            score = PromptScore(
                start=first, token_ids=score.token_ids[1:], logprobs=score.logprobs[1:], top=score.top[1:]
            )
        merged_len = self._merged_lens.get(row)
        note = completion.note
        if merged_len is not None:
            note = (
                f"the continuation is scored from token {first} on, and the prompt alone has {merged_len}: the "
                "tokenizer joins the end of the one to the beginning of the other"
            )
        return msgspec.structs.replace(completion, prompt_score=score, prompt_tokens=num_tokens, note=note)
