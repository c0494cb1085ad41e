"""Scores that are kept are those of the same tokens, and nothing is asked for twice while they are kept."""

from __future__ import annotations

import random
from array import array
from types import SimpleNamespace
from typing import Any

import pytest

from batchllm.srt.managers.known_scores import BLOCK, KnownScores


def _score(ids: list[int], position: int) -> float:
    """A number of its own for each token and what is in front of it."""
    return -float(hash(tuple(ids[: position + 1])) % 1000) - 1


class Scheduler:
    """Scores as SGLang does: nothing is known of the first token that is asked for."""

    def __init__(self, known: KnownScores) -> None:
        self.known = known

    def score(self, ids: list[int], start: int = 0, num_top: int = 1, **fields: Any) -> tuple[list[Any], int]:
        """What a client is told, and the tokens that were scored for it."""
        request = SimpleNamespace(
            rid="r",
            input_ids=array("q", ids),
            return_logprob=True,
            logprob_start_len=start,
            top_logprobs_num=num_top,
            **dict.fromkeys(
                ("token_ids_logprob", "mm_inputs", "input_embeds", "positional_embed_overrides", "lora_id")
            ),
            **dict.fromkeys(
                ("session_params", "multi_item_delimiter_indices", "extra_key", "return_flat_raw_top_logprobs")
            ),
        )
        vars(request).update(fields)
        states = {"r": SimpleNamespace()}
        self.known.ask(request, states)
        asked = range(request.logprob_start_len, len(ids))
        values = [None, *(_score(ids, i) for i in asked[1:])]
        output = SimpleNamespace(
            rids=["r"],
            input_token_logprobs_val=[values],
            input_token_logprobs_idx=[ids[asked[0] :]],
            input_top_logprobs_val=[[None, *([v] * num_top for v in values[1:])]] if num_top else [],
            input_top_logprobs_idx=[[None, *([ids[i]] * num_top for i in asked[1:])]] if num_top else [],
        )
        self.known.answer(output, states)
        columns = [output.input_token_logprobs_val[0], output.input_token_logprobs_idx[0]]
        if num_top:
            columns += [output.input_top_logprobs_val[0], output.input_top_logprobs_idx[0]]
        return columns, len(asked)

    def check(self, ids: list[int], start: int = 0, num_top: int = 1, **fields: Any) -> int:
        """The tokens that were scored for a client, which is told what it would be told without any kept scores."""
        told, num_scored = self.score(ids, start, num_top, **fields)
        plain, _ = Scheduler(KnownScores()).score(ids, start, num_top, **fields)
        assert told == plain
        return num_scored


def _ids(seed: int, num: int) -> list[int]:
    rng = random.Random(seed)
    return [rng.randrange(1000) for _ in range(num)]


@pytest.mark.parametrize("num_top", [0, 1, 3])
def test_what_two_prompts_share_is_scored_once(num_top: int) -> None:
    scheduler = Scheduler(KnownScores())
    block = _ids(1, 5 * BLOCK)
    assert scheduler.check(block + _ids(2, 7), num_top=num_top) == 5 * BLOCK + 7
    # Of the last token that is known the logits are needed.
    assert scheduler.check(block + _ids(3, 9), num_top=num_top) == 9 + 1
    assert scheduler.check(block, num_top=num_top) == 1
    assert scheduler.check(block[: 2 * BLOCK + 3], num_top=num_top) == 3 + 1
    assert scheduler.check([1, *block], num_top=num_top) == 5 * BLOCK + 1


@pytest.mark.parametrize("first", [0, 1, BLOCK - 1, BLOCK, 2 * BLOCK + 3])
@pytest.mark.parametrize("second", [0, 1, BLOCK, BLOCK + 1, 3 * BLOCK - 1, 4 * BLOCK + 5])
def test_prompts_are_scored_from_any_token(first: int, second: int) -> None:
    scheduler = Scheduler(KnownScores())
    ids = _ids(1, 4 * BLOCK + 9)
    assert scheduler.check(ids, first) == len(ids) - first
    num_scored = scheduler.check(ids, second)
    is_known = second // BLOCK * BLOCK > first or first == 0
    assert num_scored == (min(9 + 1, len(ids) - second) if is_known else len(ids) - second)


def test_other_adapters_namespaces_and_alternatives_have_scores_of_their_own() -> None:
    scheduler = Scheduler(KnownScores())
    ids = _ids(1, 3 * BLOCK)
    for fields in ({}, {"lora_id": "a"}, {"extra_key": "b"}, {"num_top": 2}):
        assert scheduler.check(ids, **fields) == len(ids)
        assert scheduler.check(ids, **fields) == 1
    assert scheduler.check(ids, token_ids_logprob=[1]) == len(ids)


def test_what_was_scored_long_ago_is_forgotten_and_all_when_asked_to() -> None:
    known = KnownScores(max_values=8 * BLOCK)
    scheduler = Scheduler(known)
    old, new = _ids(1, 2 * BLOCK), _ids(2, 3 * BLOCK)
    for ids in (old, new):
        scheduler.check(ids)
    assert (scheduler.check(new), scheduler.check(old)) == (1, len(old))
    known.clear()
    assert scheduler.check(new) == len(new)
