"""Claims about the rows that go on behind the last layer's attention."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from batchllm.attention.layout import AttentionLayout, PrefixPaths, plan_layout
from batchllm.srt.layers.wanted_rows import WantedRows, last_rows, narrowed


def _layout(*qo_len: int) -> AttentionLayout:
    lens = np.array(qo_len, np.int32)
    rows = np.arange(len(lens), dtype=np.int32)
    return plan_layout(table_rows=rows, qo_len=lens, kv_len=lens + 5, leaf=np.full_like(rows, -1), paths=PrefixPaths())


def _batch(**changes: Any) -> SimpleNamespace:
    fields = {
        "forward_mode": SimpleNamespace(is_extend=lambda: True),
        "return_logprob": False,
        "is_prefill_only": False,
        "capture_hidden_mode": SimpleNamespace(need_capture=lambda: False),
    }
    return SimpleNamespace(**(fields | changes))


def test_each_sequence_keeps_its_last_row() -> None:
    layout = _layout(4, 1, 6)
    rows = last_rows(_batch(), layout, ["LlamaForCausalLM"])
    assert rows is not None and rows.tolist() == [3, 4, 10]
    one_each = narrowed(layout)
    assert one_each.qo_indptr.tolist() == [0, 1, 2, 3]
    assert one_each.kv_len.tolist() == layout.kv_len.tolist()


@pytest.mark.parametrize(
    "changes",
    [
        {"forward_mode": SimpleNamespace(is_extend=lambda: False)},
        {"return_logprob": True},
        {"is_prefill_only": True},
        {"capture_hidden_mode": SimpleNamespace(need_capture=lambda: True)},
    ],
)
def test_all_rows_go_on_where_more_than_the_last_is_wanted(changes: dict[str, Any]) -> None:
    assert last_rows(_batch(**changes), _layout(8, 8), ["LlamaForCausalLM"]) is None


def test_all_rows_go_on_in_a_model_that_was_not_read_and_where_few_would_be_left_out() -> None:
    assert last_rows(_batch(), _layout(8, 8), ["SomeForCausalLM"]) is None
    assert last_rows(_batch(), _layout(1, 1, 1, 2), ["LlamaForCausalLM"]) is None


def test_rows_are_taken_and_put_back_where_they_were() -> None:
    """Only from tensors that have a row per token: logits have one per sequence."""
    wanted, x = WantedRows(), torch.arange(12.0).view(6, 2)
    assert wanted.take(x) is None
    wanted.narrow(torch.tensor([1, 5]), num_tokens=6)
    part = wanted.take(x)
    assert part is not None and part.tolist() == [[2, 3], [10, 11]]
    assert wanted.take(x[:2]) is None
    assert wanted.put_back(part).tolist() == [[0, 0], [2, 3], [0, 0], [0, 0], [0, 0], [10, 11]]
    wanted.widen()
    assert wanted.take(x) is None
