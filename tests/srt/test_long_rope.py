"""LongRoPE: an engine has one list of factors, whatever is in a step."""

from __future__ import annotations

import pytest
import torch
from sglang.srt.layers.rotary_embedding.rope_variant import Phi3LongRoPEScaledRotaryEmbedding
from transformers import Phi3Config
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding, apply_rotary_pos_emb

from batchllm.srt.layers import long_rope

_FIRST_LEN, _MAX_LEN, _HEAD_LEN = 64, 256, 32
_SHORT, _LONG = [1.0 + i / 16 for i in range(_HEAD_LEN // 2)], [2.0 + i / 4 for i in range(_HEAD_LEN // 2)]


def _hugging_face(positions: list[int], query: torch.Tensor) -> torch.Tensor:
    config = Phi3Config(
        hidden_size=2 * _HEAD_LEN,
        num_attention_heads=2,
        max_position_embeddings=_MAX_LEN,
        original_max_position_embeddings=_FIRST_LEN,
        rope_scaling={"type": "longrope", "short_factor": _SHORT, "long_factor": _LONG},
    )
    cos, sin = Phi3RotaryEmbedding(config)(query, torch.tensor([positions]))
    heads = query.view(1, len(positions), 2, _HEAD_LEN).transpose(1, 2)
    turned, _ = apply_rotary_pos_emb(heads, heads, cos, sin)
    return turned.transpose(1, 2).reshape(len(positions), -1)


@pytest.mark.parametrize(
    ("context_len", "last"), [(None, _FIRST_LEN - 1), (_FIRST_LEN, _FIRST_LEN - 1), (_MAX_LEN, _MAX_LEN - 1)]
)
def test_a_token_is_turned_as_in_the_longest_prompt_whoever_is_beside_it(
    context_len: int | None, last: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As Hugging Face turns all tokens of a prompt that is as long as the context."""
    monkeypatch.setattr(Phi3LongRoPEScaledRotaryEmbedding, "__init__", Phi3LongRoPEScaledRotaryEmbedding.__init__)
    long_rope.install(context_len)
    module = Phi3LongRoPEScaledRotaryEmbedding(
        *(_HEAD_LEN, _HEAD_LEN, _MAX_LEN, _FIRST_LEN, 10000, True, torch.float32, _SHORT, _LONG)
    )
    positions = [0, 5, _FIRST_LEN - 1, last]
    query = torch.randn(len(positions), 2 * _HEAD_LEN)
    expected = _hugging_face(positions, query)
    together, _ = module(torch.tensor(positions), query, query)
    assert torch.allclose(together, expected, atol=1e-5)
    for i, position in enumerate(positions):
        alone, _ = module(torch.tensor([position]), query[i : i + 1], query[i : i + 1])
        assert torch.equal(alone[0], together[i])
