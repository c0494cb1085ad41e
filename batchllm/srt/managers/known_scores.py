"""Log probabilities of prompts that live requests have had scored, so that they need not be computed again. Runs in the
server's process. (Upstream: ``TokenizerManager.convert_logprob_style``.)

A request that has its prompt scored from token s reads no KV behind s: the logits are needed. Clients such as
lm-evaluation-harness ask from token 0, whatever their prompts share. Here the scheduler is asked only for what is
behind the part that was scored before; the rest of the answer is what was computed then.

INVARIANT: a value stands for the tokens up to its own, the adapter, the namespace and the weights that it was computed
with.
"""

from __future__ import annotations

from array import array
from collections import OrderedDict
from collections.abc import Iterator, Mapping
from hashlib import blake2b
from itertools import chain
from typing import Any, NamedTuple

BLOCK = 16
"""Tokens that are kept, and forgotten, together."""
MAX_VALUES = 1 << 19
"""Log probabilities that are kept, alternatives included: about 64 MB."""


class _Scores(NamedTuple):
    """Of consecutive tokens the log probabilities, and those of alternatives, as SGLang's output has them.

    ``values`` has an item for each token; ``tops`` and ``top_ids`` too, or nothing where no alternatives are wanted.
    """

    values: list[Any]
    tops: list[Any]
    top_ids: list[Any]

    def between(self, start: int, end: int) -> _Scores:
        return _Scores(*(column[start:end] for column in self))

    def joined(self, others: list[_Scores]) -> _Scores:
        return _Scores(*(list(chain(*columns)) for columns in zip(self, *others, strict=True)))


class _Asked(NamedTuple):
    """A request on its way: its prompt, the keys of its blocks, its first token to score, what is known of that."""

    ids: array[int]
    keys: list[bytes]
    start: int
    known: _Scores


_NOTHING = _Scores([], [], [])


class KnownScores:
    """Scores of the prompts that were scored last.

    Args:
        max_values: Log probabilities to keep.
    """

    def __init__(self, max_values: int = MAX_VALUES) -> None:
        self._max_values = max_values
        self._num_values = 0
        self._blocks: OrderedDict[bytes, _Scores] = OrderedDict()

    def clear(self) -> None:
        """Forget all: the model is another one from now on."""
        self._blocks.clear()
        self._num_values = 0

    def ask(self, message: Any, states: Mapping[str, Any]) -> None:
        """Ask the scheduler for no more than is unknown.

        Args:
            message: A request, or several, on the way to the scheduler; where it begins to score is changed.
            states: SGLang's states of the requests that run, by id.
        """
        for request in getattr(message, "batch", (message,)):
            state = states.get(request.rid) if _is_scored(request) else None
            if state is None:
                continue
            keys = list(_keys(request))
            start = request.logprob_start_len
            blocks = []
            for key in keys[start // BLOCK :]:
                block = self._blocks.get(key)
                if block is None:
                    break
                self._blocks.move_to_end(key)
                blocks.append(block)
            known_len = (start // BLOCK + len(blocks)) * BLOCK
            known = _NOTHING
            if known_len - 1 > start:
                known = _NOTHING.joined(blocks).between(start % BLOCK, len(blocks) * BLOCK)
                request.logprob_start_len = known_len - 1  # there is no value for the first token that is asked for
            # Not a field of SGLang's: it goes when the state goes, however the request ends.
            state.batchllm_scores = _Asked(request.input_ids, keys, start, known)

    def answer(self, output: Any, states: Mapping[str, Any]) -> None:
        """Complete the scores that have come, before SGLang handles them, and keep them.

        Args:
            output: One of SGLang's batch outputs; its scores of prompts are changed.
            states: SGLang's states of the requests that run, by id.
        """
        if not getattr(output, "input_token_logprobs_val", None):
            return
        for i, rid in enumerate(output.rids):
            state = states.get(rid)
            asked: _Asked | None = getattr(state, "batchllm_scores", None)
            if asked is None or not output.input_token_logprobs_val[i]:
                continue
            columns: tuple[Any, ...]
            columns = (output.input_token_logprobs_val, output.input_top_logprobs_val, output.input_top_logprobs_idx)
            found = _Scores(*(list(column[i] or ()) if column else [] for column in columns))
            if asked.known.values:
                found = asked.known.joined([found.between(1, len(found.values))])
                output.input_token_logprobs_idx[i] = list(asked.ids[asked.start :])
                for column, own in zip(columns, found, strict=True):
                    if own:
                        own[0] = None
                        column[i] = own
            self._keep(asked, found)

    def _keep(self, asked: _Asked, found: _Scores) -> None:
        first = asked.start + 1 if asked.start else 0
        for number in range(-(-first // BLOCK), len(asked.keys)):
            key, start = asked.keys[number], number * BLOCK - asked.start
            if key not in self._blocks:
                self._blocks[key] = block = found.between(start, start + BLOCK)
                self._num_values += _num_values(block)
        while self._num_values > self._max_values:
            self._num_values -= _num_values(self._blocks.popitem(last=False)[1])


def _num_values(block: _Scores) -> int:
    return len(block.values) + sum(len(top or ()) for top in block.tops)


def _is_scored(request: Any) -> bool:
    """Its prompt is scored, and nothing but the prompt's tokens says how."""
    return (
        getattr(request, "return_logprob", False)
        and 0 <= request.logprob_start_len < len(request.input_ids or ()) - 1
        and request.token_ids_logprob is None
        and not request.return_flat_raw_top_logprobs
        and request.mm_inputs is None
        and request.input_embeds is None
        and request.positional_embed_overrides is None
        and request.session_params is None
        and request.multi_item_delimiter_indices is None
    )


def _keys(request: Any) -> Iterator[bytes]:
    """Of each whole block of a prompt what stands for it and all in front of it."""
    key = repr((request.lora_id, request.extra_key, request.top_logprobs_num)).encode()
    ids = request.input_ids
    for start in range(0, len(ids) - BLOCK + 1, BLOCK):
        key = blake2b(key + ids[start : start + BLOCK].tobytes(), digest_size=16).digest()
        yield key
