"""Claims about attention that reads shared prefixes once, and the small operators around it, inside SGLang."""

from __future__ import annotations

import random
from array import array
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from sglang.srt.mem_cache.base_prefix_cache import InsertParams, MatchPrefixParams
from sglang.srt.mem_cache.radix_cache import RadixCache, RadixKey

from batchllm import BatchEngine
from batchllm.kernels.cpu import CpuKernels, load
from batchllm.prefix_cache.pin_ledger import NO_PREFIX, PinLedger
from batchllm.srt.layers import cpu_ops
from batchllm.srt.layers.step_layout import why_unsupported
from batchllm.srt.managers.schedule_batch import PlannedReq
from batchllm.srt.mem_cache.shared_prefixes import SharedPrefixes
from batchllm.srt.server_args import make_server_args, parse_server_flags
from batchllm.trace import StepTrace

_PREFIX_LEN, _PRIVATE_LEN, _GROUP_SIZE = 120, 6, 8
_GREEDY = {"temperature": 0, "max_new_tokens": 10, "ignore_eos": True}


def _prompts(num_groups: int) -> list[list[int]]:
    rng = random.Random(num_groups)
    prompts = []
    for _ in range(num_groups):
        prefix = [rng.randint(10, 1500) for _ in range(_PREFIX_LEN)]
        prompts += [prefix + [rng.randint(10, 1500) for _ in range(_PRIVATE_LEN)] for _ in range(_GROUP_SIZE)]
    return prompts


@pytest.fixture(scope="module")
def bfloat16(tmp_path_factory: pytest.TempPathFactory, engines: None) -> Iterator[BatchEngine]:
    path = tmp_path_factory.mktemp("bfloat16") / "trace.json"
    with BatchEngine(max_total_tokens=2000, dtype="bfloat16", trace_path=path) as engine:
        yield engine


@pytest.mark.engine
def test_a_decode_step_reads_each_shared_prefix_once(bfloat16: BatchEngine) -> None:
    """Counted from the layout that the attention of each step ran by."""
    bfloat16.batch_generate(input_ids=_prompts(2), sampling_params=_GREEDY)
    assert bfloat16._trace_path is not None
    steps = StepTrace.read(Path(bfloat16._trace_path)).steps
    full = steps[(steps["num_decode_tokens"] == 2 * _GROUP_SIZE) & (steps["num_prefill_tokens"] == 0)]
    # The prefix but for its last token, which a prompt that ends there would have in a slot of its own; and what each
    # row has behind it.
    private = full["decode_kv_tokens"] - 2 * _GROUP_SIZE * (_PREFIX_LEN - 1)
    assert len(full) >= 5
    assert (full["kv_read_tokens"] == 2 * (_PREFIX_LEN - 1) + private).all()


@pytest.mark.engine
def test_bfloat16_is_as_exact_as_in_hugging_face(bfloat16: BatchEngine) -> None:
    """Log probabilities of our tokens, against those of a float32 model: no further off than ``transformers`` in
    bfloat16 (root mean square; a tenth of slack, the errors are random).
    """
    from transformers import AutoModelForCausalLM

    from batchllm.default_model import default_model_path

    prompts = _prompts(3)[::3]
    completions = bfloat16.batch_generate(input_ids=prompts, sampling_params={**_GREEDY, "logprobs": True})
    models = [
        AutoModelForCausalLM.from_pretrained(default_model_path(), dtype=d) for d in (torch.float32, torch.bfloat16)
    ]
    errors = []
    for prompt, completion in zip(prompts, completions, strict=True):
        ids = torch.tensor([[*prompt, *completion.output_ids]])
        with torch.no_grad():
            rows = [model(ids).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1) for model in models]
        exact, theirs = (row.gather(1, ids[0, len(prompt) :, None])[:, 0] for row in rows)
        assert completion.logprobs is not None
        ours = torch.tensor([token.logprob for token in completion.logprobs])
        errors.append(torch.stack([ours - exact, theirs - exact], 1))
    ours_off, theirs_off = torch.cat(errors).square().mean(0).sqrt().tolist()
    assert 0 < ours_off <= 1.1 * theirs_off, (ours_off, theirs_off)


def test_our_attention_is_the_default_and_can_be_declined() -> None:
    """On CPU, under the one name that SGLang launches no Triton kernels for."""
    from batchllm.default_model import default_model_path

    chosen = make_server_args(default_model_path(), skip_tokenizer_init=True)
    declined = make_server_args(default_model_path(), skip_tokenizer_init=True, attention_backend="torch_native")
    assert (chosen.attention_backend, chosen.shares_attention) == ("torch_native", True)
    assert (declined.attention_backend, declined.shares_attention) == ("torch_native", False)
    assert parse_server_flags(["--attention-backend", "batchllm"]) == {"attention_backend": "batchllm"}


def _ledger() -> PinLedger:
    """Prefix 10 of 8 tokens, and 11 of 20 under it."""
    ledger = PinLedger()
    for prefix_id, parent, start, end in ((10, NO_PREFIX, 0, 8), (11, 10, 8, 20)):
        ledger.add(
            prefix_id,
            parent_id=parent,
            start_len=start,
            end_len=end,
            num_consumers=2,
            longest_consumer_len=30,
            end_order=(0, prefix_id),
        )
    return ledger


def _req(row: int, prefix_id: int) -> PlannedReq:
    req = PlannedReq.__new__(PlannedReq)
    req.req_pool_idx, req.prefix_id = row, prefix_id
    return req


def test_rows_know_the_path_of_their_prefix() -> None:
    """A row that a live request takes over which found nothing in the cache reads nothing together with others."""
    prefixes = SharedPrefixes(_ledger(), num_table_rows=4, page_size=1)
    prefixes.start([_req(0, 11), _req(1, 10), _req(2, NO_PREFIX)])
    deep, shallow, none, unused = prefixes.leaf_of(np.arange(4, dtype=np.int32)).tolist()
    assert (none, unused) == (-1, -1)
    assert prefixes.paths._parent[deep] == shallow
    # One token less than the prefix: a prompt that ends there computes that one for itself.
    assert (prefixes.paths._end[shallow], prefixes.paths._end[deep]) == (7, 19)
    prefixes.start([SimpleNamespace(req_pool_idx=0, matched_node=None)])
    assert prefixes.leaf[0] == -1


def _tree(*prompts: list[int]) -> RadixCache:
    tree = RadixCache.create_simulated()
    for prompt in prompts:
        tree.insert(InsertParams(key=RadixKey(array("q", prompt))))
    return tree


def _node(tree: RadixCache, prompt: list[int]) -> Any:
    return tree.match_prefix(MatchPrefixParams(key=RadixKey(array("q", prompt)))).last_device_node


def test_live_rows_know_the_path_of_the_node_that_they_were_matched_to() -> None:
    """Rows under one node share its path, whatever else was in the tree; the root is nothing to share."""
    shared, other = [1] * 20 + [2] * 30, [1] * 20 + [3] * 10
    tree = _tree(shared, other)
    prefixes = SharedPrefixes(PinLedger(), num_table_rows=4, page_size=1)
    nodes = [_node(tree, shared), _node(tree, [*shared, 9]), _node(tree, other), tree.root_node]
    prefixes.start([SimpleNamespace(req_pool_idx=i, matched_node=node) for i, node in enumerate(nodes)])
    first, second, third, none = prefixes.leaf_of(np.arange(4, dtype=np.int32)).tolist()
    assert first == second and none == -1
    parent = prefixes.paths._parent[first]
    assert parent == prefixes.paths._parent[third] and prefixes.paths._parent[parent] == -1
    assert [int(prefixes.paths._end[i]) for i in (parent, first, third)] == [20, 50, 30]


def test_a_node_that_splits_keeps_its_path_for_those_that_read_it() -> None:
    """Those that come later share the shorter one."""
    tree = _tree([1] * 50)
    prefixes = SharedPrefixes(PinLedger(), num_table_rows=4, page_size=1)
    prefixes.start([SimpleNamespace(req_pool_idx=0, matched_node=_node(tree, [1] * 50))])
    half = _node(tree, [1] * 25 + [2])
    prefixes.start([SimpleNamespace(req_pool_idx=i, matched_node=half) for i in (1, 2)])
    long, short, same = prefixes.leaf_of(np.arange(3, dtype=np.int32)).tolist()
    assert short == same != long
    assert (int(prefixes.paths._end[long]), int(prefixes.paths._end[short])) == (50, 25)


def test_nodes_that_are_evicted_give_their_ids_back() -> None:
    """Or a server would grow with every request."""
    prefixes = SharedPrefixes(PinLedger(), num_table_rows=4, page_size=1)
    for token in range(1, 200):
        tree = _tree([token] * 50, [token] * 20 + [0])
        node = _node(tree, [token] * 50)
        prefixes.start([SimpleNamespace(req_pool_idx=0, matched_node=node)])
        parent = node.parent
        if token % 2:
            prefixes.remove_node(node)
            prefixes.remove_node(parent)
        else:
            prefixes.remove_all_nodes()
    assert len(prefixes.paths) == 2


def test_released_prefixes_are_dropped_and_their_ids_given_out_again() -> None:
    """Or a server would grow with every job."""
    ledger = _ledger()
    prefixes = SharedPrefixes(ledger, num_table_rows=4, page_size=1)
    prefixes.start([_req(0, 11)])
    num_ids = len(prefixes.paths)
    ledger.clear()
    prefixes.drop_released()
    assert prefixes._ids == {}
    ledger.add(
        20,
        parent_id=NO_PREFIX,
        start_len=0,
        end_len=5,
        num_consumers=2,
        longest_consumer_len=9,
        end_order=(1, 0),
    )
    prefixes.start([_req(0, 20)])
    assert len(prefixes.paths) == num_ids


def test_a_layer_that_is_not_ours_says_why() -> None:
    from sglang.srt.layers.radix_attention import AttentionType

    layer = SimpleNamespace(is_cross_attention=False, attn_type=AttentionType.DECODER)
    q, keys = torch.zeros(1, 64), torch.zeros(1, 64)
    assert why_unsupported(layer, q, keys) is None
    assert "bfloat16 KV" in str(why_unsupported(layer, q, keys.bfloat16()))
    layer.is_cross_attention = True
    assert "not causal" in str(why_unsupported(layer, q, keys))


def test_a_norm_that_is_not_ours_is_left_to_sglang() -> None:
    """Options of SGLang's norm that the kernel does not know must not be ignored."""
    kernels = load()
    assert isinstance(kernels, CpuKernels)
    forward = cpu_ops._rms_norm(kernels)
    norm = SimpleNamespace(
        weight=torch.ones(64),
        hidden_size=64,
        variance_epsilon=1e-6,
        variance_size_override=None,
        override_orig_dtype=None,
        cast_x_before_out_mul=False,
        fp32_residual=False,
        forward_native=lambda *args: "stock",
    )
    x = torch.randn(3, 64)
    assert isinstance(forward(norm, x), torch.Tensor)
    assert forward(norm, x, None, x) == "stock"
    assert forward(norm, torch.randn(3, 128)[:, ::2]) == "stock"
    for name, value in (("variance_size_override", 32), ("cast_x_before_out_mul", True)):
        other = SimpleNamespace(**{**vars(norm), name: value})
        assert forward(other, x) == "stock"


def test_a_position_beyond_the_rotary_table_raises() -> None:
    """The kernel takes addresses: it would read whatever lies behind the table."""
    kernels = load()
    assert isinstance(kernels, CpuKernels)
    rotary = SimpleNamespace(cos_sin_cache=torch.zeros(16, 64), head_size=64, rotary_dim=64, is_neox_style=True)
    q = torch.zeros(1, 64)
    with pytest.raises(IndexError, match="positions 16 to 16: the model has 16"):
        cpu_ops._rotary_embedding(kernels)(rotary, torch.tensor([16]), q, q.clone())
