"""How likely the continuations of ``bench_scoring.py`` are, by one side of it, in a process of its own.

Ours is asked from the first token of the continuation on. Stock and vLLM are asked as lm-evaluation-harness's backends
for them ask: every log probability from token 0 on, one token generated, and all in one call. The reference is Hugging
Face's model in float64, norms too; it computes the blocks once. The angles of its rotary embedding are float32, as in
Hugging Face's code whatever the model's type, and in all engines: with angles in float64 it is another model, from
which all of them differ by up to 6e-4 at 1,500 tokens.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from typing import Any

Request = tuple[list[int], list[int]]
"""Token ids of a context, and of its continuation."""
Scores = list[list[float]]
NUM_CONTINUATIONS = 4


def make_requests(num_blocks: int, num_questions: int, block_len: int) -> list[Request]:
    """Four continuations of each context, in the order of a task: question by question, block by block."""
    rng = random.Random(1)

    def tokens(length: int) -> list[int]:
        return [rng.randint(10, 1500) for _ in range(length)]

    requests = []
    for _ in range(num_blocks):
        block = tokens(block_len)
        for _ in range(num_questions):
            context = block + tokens(rng.randint(20, 60))
            requests += [(context, tokens(rng.randint(1, 12))) for _ in range(NUM_CONTINUATIONS)]
    return requests


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("side", choices=_SIDES)
    parser.add_argument("--model", required=True, help="a folder")
    parser.add_argument("--pool", type=int, required=True, help="KV tokens")
    parser.add_argument(
        "--shape", type=int, nargs=3, required=True, help="blocks, questions behind each, tokens of each"
    )
    args = parser.parse_args()
    if args.side == "vllm":
        import measure_vllm

        measure_vllm.ensure_environment()
    chosen: list[int] = json.load(sys.stdin)  # numbers of the requests to ask
    every = make_requests(*args.shape)
    server_args = {
        "max_total_tokens": args.pool,
        "chunked_prefill_size": 2048,
        "dtype": "float32",
        "random_seed": 0,
        "log_level": "error",
    }
    requests = [every[i] for i in chosen]
    result = _SIDES[args.side](args.model, server_args, make_requests(1, 2, 64), requests)
    scores = dict(zip(chosen, result.pop("scores"), strict=True))
    print(
        "RESULT " + json.dumps({"side": args.side, "num_requests": len(chosen), **result, "scores": scores}), flush=True
    )


def _timed(run: Callable[[list[Request]], Any], warm_up: list[Request], requests: list[Request]) -> tuple[Any, float]:
    run(warm_up)
    began = time.perf_counter()
    return run(requests), time.perf_counter() - began


def _ours(model: str, server_args: dict[str, Any], warm_up: list[Request], requests: list[Request]) -> dict[str, Any]:
    from batchllm import BatchEngine

    with BatchEngine(model, skip_tokenizer_init=True, **server_args) as engine:

        def run(some: list[Request]) -> Scores:
            completions = engine.batch_generate(
                input_ids=[context + following for context, following in some],
                score_from=[len(context) for context, _ in some],
                sampling_params={"prompt_logprobs": 1, "max_new_tokens": 0},
            )
            return [list(completion.prompt_score.logprobs) for completion in completions]  # None would end the run

        scores, seconds = _timed(run, warm_up, requests)
        report = engine.last_report
        assert report is not None
        computed = {
            "num_computed": report.num_computed_prompt_tokens,
            "num_optimal": report.num_optimal_prompt_tokens,
        }
        return {"seconds": seconds, **computed, "scores": scores}


def _stock(model: str, server_args: dict[str, Any], warm_up: list[Request], requests: list[Request]) -> dict[str, Any]:
    import stock

    engine, stop = stock.start(model_path=model, device="cpu", skip_tokenizer_init=True, **server_args)

    def run(some: list[Request]) -> tuple[Scores, int]:
        prompts = [context + following for context, following in some]
        order = sorted(range(len(some)), key=lambda i: (-len(prompts[i]), prompts[i]))  # as the harness sorts them
        outputs = engine.generate(
            input_ids=[prompts[i] for i in order],
            sampling_params={"temperature": 0, "max_new_tokens": 1},
            return_logprob=True,
            top_logprobs_num=2,
            logprob_start_len=0,
        )
        scores: Scores = [[] for _ in some]
        num_computed = 0
        for i, output in zip(order, outputs, strict=True):
            meta = output["meta_info"]
            scores[i] = [entry[0] for entry in meta["input_token_logprobs"][len(some[i][0]) :]]
            num_computed += meta["prompt_tokens"] - meta["cached_tokens"]
        return scores, num_computed

    try:
        (scores, num_computed), seconds = _timed(run, warm_up, requests)
    finally:
        stop()
    return {"seconds": seconds, "num_computed": num_computed, "scores": scores}


def _vllm(model: str, server_args: dict[str, Any], warm_up: list[Request], requests: list[Request]) -> dict[str, Any]:
    import measure_vllm
    from vllm import SamplingParams

    llm = measure_vllm.load(model, server_args | {"skip_tokenizer_init": True})
    sampling = SamplingParams(temperature=0, prompt_logprobs=1, max_tokens=1, detokenize=False)

    def run(some: list[Request]) -> tuple[Scores, int]:
        prompts = [context + following for context, following in some]
        order = sorted(range(len(some)), key=lambda i: (-len(prompts[i]), prompts[i]))
        outputs = llm.generate([{"prompt_token_ids": prompts[i]} for i in order], sampling, use_tqdm=False)
        scores: Scores = [[] for _ in some]
        for i, output in zip(order, outputs, strict=True):
            begin = len(some[i][0])
            found = zip(prompts[i][begin:], output.prompt_logprobs[begin:], strict=True)
            scores[i] = [tops[token].logprob for token, tops in found]
        return scores, sum(map(len, prompts)) - sum(output.num_cached_tokens or 0 for output in outputs)

    (scores, num_computed), seconds = _timed(run, warm_up, requests)
    llm.llm_engine.engine_core.shutdown()
    return {"seconds": seconds, "num_computed": num_computed, "scores": scores}


def _reference(model: str, _: dict[str, Any], __: list[Request], requests: list[Request]) -> dict[str, Any]:
    import torch
    from transformers import AutoModelForCausalLM, DynamicCache

    network = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64, attn_implementation="eager")
    _make_exact(network)
    began = time.perf_counter()
    scores: Scores = []
    known: list[int] = []
    cache = DynamicCache(config=network.config)
    with torch.no_grad():
        for context, following in requests:
            ids = context + following
            num_known = next((i for i, (a, b) in enumerate(zip(known, ids, strict=False)) if a != b), len(known))
            num_known = min(num_known, len(context) - 1)  # the logits of the context's last token are needed
            cache.crop(num_known)
            num_logits = len(following) + 1
            new = torch.tensor([ids[num_known:]])
            logits = network(new, past_key_values=cache, logits_to_keep=num_logits).logits[0, :-1]
            logprobs = torch.log_softmax(logits, dim=-1)
            assert logprobs.dtype == torch.float64
            scores.append([float(row[token]) for row, token in zip(logprobs, following, strict=True)])
            known = ids
    return {"seconds": time.perf_counter() - began, "num_computed": 0, "scores": scores}


def _make_exact(network: Any) -> None:
    """Compute norms in float64 too: Hugging Face computes them in float32, whatever the model's type."""
    import torch

    def norm(module: Any, x: torch.Tensor) -> torch.Tensor:
        return module.weight * x * torch.rsqrt(x.square().mean(-1, keepdim=True) + module.variance_epsilon)

    for module in network.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = lambda x, module=module: norm(module, x)


_SIDES = {"ours": _ours, "stock": _stock, "vllm": _vllm, "reference": _reference}


if __name__ == "__main__":
    main()
