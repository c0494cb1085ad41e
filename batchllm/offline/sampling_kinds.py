"""The ways in which the rows of a job are sampled, each of them once.

Knows sampling parameters and the engine's numbers; not rows, prompts or files. Most jobs sample all rows in the same
few ways, and the reader gives rows of one way the same object: each object is checked once.
"""

from __future__ import annotations

from dataclasses import fields, replace
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np

from batchllm.dataset.embedding import check_engine
from batchllm.dataset.limits import check_adapter, check_sampling_ids, check_sampling_texts
from batchllm.errors import RowError
from batchllm.offline.column import Column
from batchllm.offline.identical import is_determined, is_greedy
from batchllm.offline.runtime import RuntimeInfo
from batchllm.request import GRAMMARS, SamplingParams

NO_SEED = -(1 << 63)

_MAX_REMEMBERED = 1024
_OF_THE_ROW = ("max_new_tokens", "n", "seed")
_kind_of = attrgetter(*(field.name for field in fields(SamplingParams) if field.name not in _OF_THE_ROW))


class CheckedSampling(NamedTuple):
    """Sampling parameters that the engine can keep.

    Attributes:
        kind: Number of the way to sample, without what each row says for itself.
        seed: `NO_SEED` where none is given.
        has_known_len: As `SamplingParams` has it.
        same_seed: Rows of one prompt whose numbers here are the same have the same answer; None where that is not so.
    """

    sampling: SamplingParams
    kind: int
    seed: int
    has_known_len: bool
    same_seed: int | None


class SamplingKinds:
    """The distinct ways to sample.

    Args:
        info: Numbers of the engine.

    Attributes:
        all: The ways, by number, without what each row says for itself: output limit, samples, seed.
        draws: 1 for each of them that needs a seed, else 0.
    """

    def __init__(self, info: RuntimeInfo) -> None:
        self._info = info
        self._numbers: dict[Any, int] = {}
        self._checked: dict[int, CheckedSampling] = {}  # by identity; an entry keeps its object alive
        self.all: list[SamplingParams] = []
        self.draws = Column(np.int8)

    def check(self, sampling: SamplingParams) -> CheckedSampling:
        """What is known of these parameters.

        Raises:
            RowError: The engine cannot keep one of them.
        """
        found = self._checked.get(id(sampling))
        if found is None:
            if len(self._checked) >= _MAX_REMEMBERED:
                self._checked.clear()
            found = self._checked[id(sampling)] = self._check(sampling)
        return found

    def _check(self, sampling: SamplingParams) -> CheckedSampling:
        info = self._info
        check_engine(sampling, info.embeds, info.max_dimensions, info.dimensions)
        _check_supported(sampling, info)
        if not info.has_tokenizer:
            check_sampling_texts(sampling)
        check_sampling_ids(sampling, info.vocab_size)
        check_adapter(sampling.lora_path, info.adapters)
        seed = NO_SEED if sampling.seed is None else sampling.seed
        same_seed = None
        if is_determined(sampling):
            same_seed = NO_SEED if is_greedy(sampling) else seed
        return CheckedSampling(sampling, self._number(sampling), seed, sampling.has_known_len, same_seed)

    def _number(self, sampling: SamplingParams) -> int:
        key = _kind_of(sampling)
        found = self._numbers.get(key)
        if found is None:
            found = self._numbers[key] = len(self.all)
            self.all.append(replace(sampling, n=1, seed=None))
            self.draws.append(not is_greedy(sampling))
        return found


def _check_supported(sampling: SamplingParams, info: RuntimeInfo) -> None:
    if not info.has_seeded_sampling and sampling.seed is not None:
        raise RowError(
            "a seed needs --sampling-backend pytorch; this engine runs another one",
            code="seed_not_supported",
            param="seed",
        )
    if not info.has_grammar and sampling.has_grammar:
        raise RowError(
            "structured output is switched off; start the engine without --grammar-backend none",
            code="grammar_not_supported",
            param=next(name for name in GRAMMARS if getattr(sampling, name) is not None),
        )
