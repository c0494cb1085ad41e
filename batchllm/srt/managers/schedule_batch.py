"""A request as SGLang's scheduler sees it, with what planning needs to know of it. Runs in the scheduler's process."""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from typing import Any

from sglang.srt.managers.schedule_batch import FINISH_MATCHED_STR, Req

from batchllm.request import NO_TARGET
from batchllm.scheduler.output_length import OutputEstimate
from batchllm.srt.managers.io_struct import PLANNED_ID
from batchllm.srt.managers.scoring import Scoring


class PlannedReq(Req):
    """SGLang's ``Req``, plus its place in the plan. It is a `batchllm.scheduler.view.WaitingRequest`.

    Attributes:
        job_id: The job.
        position: Position in the job's plan.
        plan_order: Sort key: earlier jobs first, then plan order.
        prefix_id: Deepest planned prefix that it consumes (a ledger number), or ``NO_PREFIX``.
        total_len: Most KV slots that it will ever occupy.
        output: What is known of its output length.
        led_prefix_ids: Prefixes that it computes and that are not complete yet, outermost first.
        is_ready: False while its grammar is being compiled.
        min_new_len: Fewest tokens before a stop may match; a grammar may end earlier.
        is_counted_off: True once the ledger knows that it needs its prefix no more.
        seed: Sampling seed.
        piece_tokens: Most tokens that the coming step may compute of it while it is in pieces; None without a limit.
        num_lost_for_live: Tokens whose KV it has lost to live requests, and that were not computed again yet.
        scoring: Which tokens of the prompt are scored; None for none.
        num_logprobs: Alternatives beside each generated token, -1 where these have no log probabilities.
        label_ids: Tokens whose log probabilities behind the prompt are wanted.
    """

    piece_tokens: int | None = None
    num_lost_for_live = 0

    def __init__(
        self,
        *,
        job_id: int,
        position: int,
        prefix_id: int,
        total_len: int,
        output: OutputEstimate,
        seed: int,
        min_new_len: int,
        input_ids: array[int],
        sampling_params: Any,
        num_logprobs: int,
        require_reasoning: bool,
        eos_token_ids: set[int] | None,
        vocab_size: int,
        extra_key: str | None,
        lora_id: str | None,
        scoring: Scoring | None = None,
        label_ids: Sequence[int] = (),
        dimensions: int | None = None,
    ) -> None:
        wanted = list(label_ids) or (None if scoring is None or scoring.target == NO_TARGET else [scoring.target])
        num_alternatives = num_logprobs if scoring is None else max(num_logprobs, scoring.num_alternatives)
        super().__init__(
            # SGLang aborts by the beginning of an id: one such as "b" must not be that of a planned request.
            rid=f"{PLANNED_ID}{job_id}:{position}",
            origin_input_text="",
            origin_input_ids=input_ids,
            sampling_params=sampling_params,
            return_logprob=num_alternatives >= 0 or bool(label_ids),
            top_logprobs_num=max(num_alternatives, 0),
            token_ids_logprob=wanted,
            require_reasoning=require_reasoning,
            eos_token_ids=eos_token_ids,
            vocab_size=vocab_size,
            extra_key=extra_key,
            lora_id=lora_id,
            dimensions=dimensions,
        )
        # Log probabilities of the output only, unless tokens of the prompt are scored: those are not shared.
        self.logprob_start_len = len(input_ids) if self.return_logprob else -1
        if scoring is not None:
            self.logprob_start_len = scoring.start
        self.scoring = scoring
        self.num_logprobs = num_logprobs
        self.label_ids = label_ids
        self.job_id = job_id
        self.position = position
        self.plan_order = (job_id, position)
        self.prefix_id = prefix_id
        self.total_len = total_len
        self.output = output
        self.seed = seed
        self.min_new_len = min_new_len
        self.led_prefix_ids: list[int] = []
        self.is_ready = True
        self.is_counted_off = False
        self.num_prompt_tokens = len(input_ids)

    def _check_str_based_finish(self, new_accepted_len: int = 1) -> bool:
        """Stop strings that were complete within the first ``min_new_len`` tokens do not count."""
        if not self.min_new_len or not self.sampling_params.stop_strs:
            return super()._check_str_based_finish(new_accepted_len)
        if len(self.output_ids) <= self.min_new_len:
            return False
        tail = self.output_ids[-self._stop_match_tail_len(new_accepted_len) :]
        num_early = self.min_new_len - (len(self.output_ids) - len(tail))
        text, early = (self.tokenizer.decode(ids) for ids in (tail, tail[: max(num_early, 0)]))
        for stop in self.sampling_params.stop_strs:
            if find_stop(text, early, stop) >= 0:
                self.finished_reason = LateStop(stop, self.min_new_len)
                self.finished_len = len(self.output_ids)
                return True
        return False

    @property
    def num_generated(self) -> int:
        """Tokens generated so far."""
        return len(self.output_ids)

    @property
    def prefill_len(self) -> int:
        """Tokens it must have KV for before it decodes."""
        return len(self.origin_input_ids) + len(self.output_ids)

    @property
    def share_len(self) -> int:
        """Tokens at its start that it may share: all, or those before its scores."""
        return self.prefill_len if self.scoring is None else self.scoring.share_len


class LateStop(FINISH_MATCHED_STR):
    """A stop string that came behind the first ``num_early`` tokens; the same may stand among those."""

    def __init__(self, matched: str, num_early: int) -> None:
        super().__init__(matched=matched)
        self.num_early = num_early

    def to_json(self) -> dict[str, Any]:
        return {**super().to_json(), "num_early": self.num_early}


def find_stop(text: str, early: str, stop: str) -> int:
    """Where a stop string begins that ends behind the early part of a text; -1 where there is none.

    Args:
        early: What the text begins with; half a character at its end may stand for what it became.
    """
    return text.find(stop, max(0, len(early.rstrip("\ufffd")) - len(stop) + 1))


def prepare_live(req: Any) -> None:
    """Let a request outside any plan run beside planned ones: it may run to its limit, and has read nothing yet."""
    req.matched_node = None
    max_new_len = req.sampling_params.max_new_tokens
    req.output = OutputEstimate(max_new_len=max_new_len, known_len=max_new_len, kind=0, position=0)


class DecodingReqs(list[Any]):
    """The decoding rows of a mixed step. SGLang asks for each row of the step whether it is in here."""

    def __init__(self, reqs: list[Any]) -> None:
        super().__init__(reqs)
        self._ids = {id(req) for req in reqs}

    def __contains__(self, req: object) -> bool:
        return id(req) in self._ids
