"""LongRoPE: which of its two lists of factors turn the heads of a model. Runs in the scheduler's process.

(Upstream: ``Phi3LongRoPEScaledRotaryEmbedding`` of ``srt/layers/rotary_embedding/rope_variant.py``.)

SGLang chooses anew in each step, by the furthest token in it: a row's answer would depend on the rows beside it, and a
shared prefix be turned otherwise than what follows it. Here an engine has one list, as in vLLM: the short one in a
context as long as the one that the model was first trained with, the long one in a longer context.
"""

from __future__ import annotations

from typing import Any

from sglang.srt.layers.rotary_embedding.rope_variant import Phi3LongRoPEScaledRotaryEmbedding

_stock_init = Phi3LongRoPEScaledRotaryEmbedding.__init__


def install(context_len: int | None) -> None:
    """Have models that are made in this process take the list for a context of so many tokens; None: the short one.

    `batchllm.srt.server_args.make_server_args` gives each model that has such lists a number, where it matters.
    """

    def init(self: Any, *args: Any, **kwargs: Any) -> None:
        _stock_init(self, *args, **kwargs)
        if (context_len or 0) > self.original_max_position_embeddings:
            # What SGLang looks positions up in, and where it would change to the other list.
            self.long_short_cos_sin_cache = self.long_cos_sin_cache
            self.original_max_position_embeddings = self.max_position_embeddings

    Phi3LongRoPEScaledRotaryEmbedding.__init__ = init
