"""Models whose layers see a window, whose scores are capped, or whose keys and values are kept compressed answer as in
Hugging Face's own code: small random ones of each architecture, with prefixes and answers longer than the window.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from batchllm import BatchEngine, Completion
from batchllm.srt.configs import model_traits, model_windows
from batchllm.trace import StepTrace

_WINDOW, _PREFIX_LEN, _ANSWER_LEN = 12, 40, 20
_VOCAB = 300
_TINY = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": _VOCAB,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,  # at less, what a token sees changes too little
    "bos_token_id": 2,
    "eos_token_id": 1,
    "pad_token_id": 0,
    "dtype": "float32",
}
_MIXED_LAYERS = {"layer_types": [f"{kind}_attention" for kind in ("full", "sliding", "sliding", "full")]}
_WINDOWED = {"sliding_window": _WINDOW}
_USED = _WINDOWED | {"use_sliding_window": True, "max_window_layers": 2}
_EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
_GEMMA = {"hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh", "head_dim": 32}
_CAPS = {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 20.0, "query_pre_attn_scalar": 20}
_LATENT = {
    "num_key_value_heads": 2,
    "kv_lora_rank": 32,
    "q_lora_rank": 24,
    "qk_nope_head_dim": 24,
    "qk_rope_head_dim": 16,
    "v_head_dim": 20,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
}
_GREEDY_EXPERTS = {"topk_method": "greedy", "n_group": 1, "topk_group": 1, "scoring_func": "softmax"}
_YARN = {
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 4.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 0.7,
        "mscale_all_dim": 0.7,
    }
}
_MODELS: dict[str, dict[str, Any]] = {
    "cohere2": _WINDOWED | _MIXED_LAYERS,
    "deepseek_v2": _LATENT | _GREEDY_EXPERTS,
    "gemma2": _WINDOWED | _MIXED_LAYERS | _GEMMA | _CAPS,
    "mistral": _WINDOWED,
    "phi3": _WINDOWED,
}
_THOROUGH_MODELS: dict[str, dict[str, Any]] = {
    "deepseek_v3": _LATENT
    | _YARN
    | {"n_group": 2, "topk_group": 1, "topk_method": "noaux_tc", "scoring_func": "sigmoid"},
    "deepseek_v2+yarn": _LATENT | _GREEDY_EXPERTS | _YARN,
    "gemma3_text": _WINDOWED | _MIXED_LAYERS | _GEMMA,
    "mellum": _WINDOWED | _MIXED_LAYERS | _EXPERTS | {"head_dim": 32},
    "ministral3": _WINDOWED,
    "mixtral": _WINDOWED | {"num_local_experts": 4},
    "qwen2": _USED,
    "qwen2_moe": _USED | _EXPERTS | {"shared_expert_intermediate_size": 32},
    "qwen3": _USED | {"head_dim": 32},
    "qwen3_moe": _USED | _EXPERTS | {"head_dim": 32},
    "smollm3": _USED | _MIXED_LAYERS,
    "starcoder2": _WINDOWED,
}
_THOROUGH = [pytest.param(name, marks=pytest.mark.thorough) for name in _THOROUGH_MODELS]

Case = tuple[BatchEngine, Any]


@pytest.fixture(scope="module", params=[*_MODELS, *_THOROUGH])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, engines: None) -> Iterator[Case]:
    """An engine that cuts prompts, and mixes them with rows that decode; and the model in transformers."""
    folder = tmp_path_factory.mktemp("windowed")
    model_type = request.param.removesuffix("+yarn")
    config = AutoConfig.for_model(model_type, **_TINY | (_MODELS | _THOROUGH_MODELS)[request.param])
    torch.manual_seed(1)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    if request.param.startswith("gemma"):  # else what attention adds is nothing beside the token itself
        for layer in model.model.layers:
            layer.post_attention_layernorm.weight.data.fill_(20.0)
    if request.param == "deepseek_v2+yarn":  # what transformers leaves out, and the publisher's code does not
        for layer in model.model.layers:
            layer.self_attn.scaling *= (0.1 * 0.7 * math.log(4) + 1) ** 2
    model.save_pretrained(folder)
    with BatchEngine(
        str(folder),
        skip_tokenizer_init=True,
        max_total_tokens=1200,
        chunked_prefill_size=16,
        enable_mixed_chunk=True,
        trace_path=folder / "trace.json",
    ) as engine:
        yield engine, model


def _prompts() -> list[list[int]]:
    """Two prefixes longer than the window, one of them with two longer ones below it; three rows of each."""
    rng = random.Random(1)
    first, second = ([rng.randrange(3, _VOCAB) for _ in range(_PREFIX_LEN)] for _ in range(2))
    longer = [first + [rng.randrange(3, _VOCAB) for _ in range(20)] for _ in range(2)]
    prompts = [
        prefix + [rng.randrange(3, _VOCAB) for _ in range(rng.randint(1, 9))]
        for prefix in (*longer, second)
        for _ in range(3)
    ]
    return [*prompts, [5], [rng.randrange(3, _VOCAB) for _ in range(70)]]


def _scores(model: Any, ids: list[int]) -> torch.Tensor:
    """Log probabilities of every token behind each of these, by transformers."""
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0].double().log_softmax(-1)


def _check(model: Any, prompt: list[int], completion: Completion) -> None:
    """Every token is the likeliest one behind those before it."""
    output = list(completion.output_ids)
    scores = _scores(model, prompt + output)[len(prompt) - 1 : -1]
    assert scores.argmax(-1).tolist() == output
    if completion.logprobs is not None:
        values = [token.logprob for token in completion.logprobs]
        assert values == pytest.approx(scores.max(-1).values.tolist(), abs=1e-3)


@pytest.mark.engine
def test_answers_are_those_of_hugging_face(case: Case) -> None:
    """Greedy ones of rows that share what is longer than the window, in pieces and beside rows that decode, computed at
    the optimum; and they are others than those of the same model without its window and cap, where it has one.
    """
    engine, model = case
    prompts = _prompts()
    # Answers of different lengths, so that prompts begin while others decode.
    sampling = [{"temperature": 0, "max_new_tokens": _ANSWER_LEN + i, "ignore_eos": True} for i in range(len(prompts))]
    completions = engine.batch_generate(input_ids=prompts, sampling_params=sampling)
    report = engine.last_report
    assert report is not None
    assert report.num_computed_prompt_tokens == report.num_optimal_prompt_tokens < sum(map(len, prompts))
    steps = StepTrace.read(Path(str(engine._trace_path))).steps
    assert ((steps["num_prefill_tokens"] > 0) & (steps["num_decode_tokens"] > 0)).any()
    assert (steps["num_prefill_tokens"] <= 16).all()
    for prompt, completion in zip(prompts, completions, strict=True):
        _check(model, prompt, completion)
    if getattr(model.config, "sliding_window", None) is None:
        return
    with pytest.raises(AssertionError):
        for prompt, completion in zip(prompts, completions, strict=True):
            _check(_unbounded(model), prompt, completion)


@pytest.mark.engine
def test_log_probabilities_are_those_of_hugging_face(case: Case) -> None:
    """To 0.001, of generated tokens and of prompts."""
    engine, model = case
    prompts = _prompts()
    sampling = {"temperature": 0, "max_new_tokens": _ANSWER_LEN, "ignore_eos": True, "logprobs": True}
    for prompt, completion in zip(
        prompts, engine.batch_generate(input_ids=prompts, sampling_params=sampling), strict=True
    ):
        assert completion.logprobs is not None
        _check(model, prompt, completion)
    starts = [max(1, len(prompt) - 20) for prompt in prompts]
    scored = engine.batch_generate(input_ids=prompts[:-2], score_from=starts[:-2])
    for prompt, start, completion in zip(prompts[:-2], starts, scored, strict=False):
        assert completion.prompt_score is not None
        scores = _scores(model, prompt)[start - 1 : -1].gather(1, torch.tensor(prompt[start:])[:, None])[:, 0]
        assert completion.prompt_score.logprobs == pytest.approx(scores.tolist(), abs=1e-3)


def _unbounded(model: Any) -> Any:
    """The same weights, with a window that is longer than all prompts, and scores that are not capped."""
    config = model.config.to_dict() | {"sliding_window": 256}
    if config.get("attn_logit_softcapping"):
        config["attn_logit_softcapping"] = None
    other = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(config.pop("model_type"), **config), attn_implementation="eager"
    ).eval()
    other.load_state_dict(model.state_dict())
    return other


def test_what_is_compared_is_all_that_is_obeyed() -> None:
    """Embedding models compute with the code of their generating namesakes."""
    compared = {
        AutoModelForCausalLM._model_mapping[type(AutoConfig.for_model(name.removesuffix("+yarn")))].__name__
        for name in _MODELS | _THOROUGH_MODELS
    }
    assert compared | {"MistralModel", "Qwen3Model"} >= model_windows.OBEYED | model_traits.LATENT_ON_CPU
