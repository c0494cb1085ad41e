"""After the last layer's attention only the rows whose logits are wanted matter: each sequence's last one. Runs in the
scheduler's process.

What a prompt's other tokens leave behind is their KV, and all of it is written by then. Leaving the rest of the last
layer out saves, of a model with n layers, about three quarters of an n-th of a prefill's arithmetic.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from batchllm.attention.layout import AttentionLayout

_ARCHITECTURES = frozenset({"LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM"})
"""Models that were read: behind the last attention every operation works row by row, up to the logits."""

_MIN_SAVED_SHARE = 0.5
"""Of the rows. Fewer, and gathering and scattering cost what is saved."""


class WantedRows:
    """Between the last layer's attention and the end of a step, which rows of the step go on.

    Attributes:
        rows: int64 row numbers, ascending; None while all rows go on.
    """

    def __init__(self) -> None:
        self.rows: torch.Tensor | None = None
        self._num_tokens = 0

    def narrow(self, rows: torch.Tensor, num_tokens: int) -> None:
        """From here on these rows, of so many in the step."""
        self.rows, self._num_tokens = rows, num_tokens

    def widen(self) -> None:
        """A step begins: all rows."""
        self.rows = None

    def take(self, x: torch.Tensor) -> torch.Tensor | None:
        """The wanted rows of ``x``; None where all of its rows are, or where it does not have a row per token."""
        if self.rows is None or x.dim() != 2 or len(x) != self._num_tokens:
            return None
        return x.index_select(0, self.rows)

    def put_back(self, part: torch.Tensor) -> torch.Tensor:
        """A row per token again: ``part`` at the wanted rows, zeros elsewhere."""
        assert self.rows is not None
        return part.new_zeros(self._num_tokens, *part.shape[1:]).index_copy_(0, self.rows, part)


WANTED = WantedRows()
"""One per scheduler process: its attention backend narrows, its linear layers obey."""


def last_rows(forward_batch: Any, layout: AttentionLayout, architectures: list[str]) -> torch.Tensor | None:
    """The rows of a step whose logits are wanted; None if all are, or if leaving rows out would not pay.

    Args:
        forward_batch: SGLang's, of the step.
        layout: The step.
        architectures: Names of the model's architectures.
    """
    if (
        not forward_batch.forward_mode.is_extend()
        or not _ARCHITECTURES.issuperset(architectures)
        or forward_batch.return_logprob
        or forward_batch.is_prefill_only
        or forward_batch.capture_hidden_mode.need_capture()
    ):
        return None
    rows = layout.qo_indptr[1:].astype(np.int64) - 1
    num_tokens = int(layout.qo_indptr[-1])
    if (np.diff(layout.qo_indptr) == 0).any() or len(rows) > (1 - _MIN_SAVED_SHARE) * num_tokens:
        return None
    return torch.from_numpy(rows)


def narrowed(layout: AttentionLayout) -> AttentionLayout:
    """The same step with each sequence's last query token only."""
    return replace(layout, qo_indptr=np.arange(len(layout.qo_indptr), dtype=np.int32))
