"""Rows that ask how likely single tokens are behind each of several prompts: ``/v1/score`` and ``/v1/rerank``.

Knows the fields of both bodies, and of the bodies of their answers, which are SGLang's; not tokens, or how a reranker
asks (`batchllm.srt.managers.chat_tokenizer.ChatTokenizer.encode_rankings`).
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Mapping, Sequence
from typing import Any

from batchllm.dataset import field_checks as checks
from batchllm.dataset.openai_body import check_names
from batchllm.dataset.prompts import prompt_fields
from batchllm.dataset.records import Row, RowHead, RowKind
from batchllm.dataset.scoring import only_labels
from batchllm.errors import RowError
from batchllm.request import Completion, Ranking, Request

DEFAULT_MODEL = "default"
"""What SGLang's answers call the model of a body that names none."""
_FIELDS: Mapping[RowKind, frozenset[str]] = {
    "score": frozenset({"query", "items", "label_token_ids", "apply_softmax", "item_first", "model"}),
    "rerank": frozenset({"query", "documents", "instruct", "top_n", "return_documents", "model"}),
}
_REFUSED = {
    **dict.fromkeys(
        ("embed_override_token_id", "query_embed_overrides", "item_embed_overrides"),
        "embeddings cannot be planned; ask the live route",
    ),
    **dict.fromkeys(
        ("max_tokens", "max_completion_tokens", "messages", "prompt"),
        "such rows generate nothing; ask /v1/chat/completions or /v1/completions",
    ),
    "return_pooled_hidden_states": "models that generate have none",
    "lora_path": "SGLang scores with the base model; leave it out",
}
_TOP_N = checks.integer(1)


def parse_ranking(body: dict[str, Any], kind: RowKind, *, given_id: str | int, index: int, line: int) -> Row:
    """Reads the body of a row of one of these kinds.

    Raises:
        RowError: Anything in it is wrong; of an item or a document it says which.
    """
    check_names(body, _FIELDS[kind], _REFUSED)
    model = None if body.get("model") is None else checks.text("model", body["model"])
    if model is not None and ":" in model:
        raise RowError(
            "model: an adapter cannot score, SGLang's route takes the base model; leave out what is behind the colon",
            code="unsupported_parameter",
            param="model",
        )
    common: dict[str, Any] = {"row_id": str(given_id), "index": index, "model": model}
    request, answer = _score(body, common) if kind == "score" else _rerank(body, common)
    return Row(request=request, kind=kind, given_id=given_id, line=line, model=model, answer=answer)


def _score(body: Mapping[str, Any], common: dict[str, Any]) -> tuple[Request, dict[str, Any]]:
    labels = body.get("label_token_ids")
    if not labels:
        raise RowError(
            "label_token_ids: give the ids of the tokens whose probabilities are wanted",
            code="missing_labels",
            param="label_token_ids",
        )
    prompts = _prompts(body.get("query"), body.get("items"), item_first=_flag(body, "item_first", default=False))
    sampling = only_labels(tuple(checks.token_ids("label_token_ids", labels)))
    answer = {"apply_softmax": _flag(body, "apply_softmax", default=False)}
    return Request(**common, **prompt_fields(prompts), sampling=sampling, prompts_name="items"), answer


def _prompts(query: Any, items: Any, *, item_first: bool) -> list[Any]:
    """Each item behind the query, or in front of it: all texts, or all token ids."""
    query, items = checks.as_list(query), checks.as_list(items)
    items = [items] if isinstance(items, str) else items
    if not isinstance(items, list) or not items:
        raise RowError("items must be a text, or a list of texts or token ids", code="missing_prompt", param="items")
    if not isinstance(query, (str, list)):
        raise RowError("query must be a text or token ids", code="missing_prompt", param="query")
    is_text = isinstance(query, str)
    begin = _tokens("query", query)
    prompts = []
    for i, item in enumerate(map(checks.as_list, items)):
        name = f"items[{i}]"
        if isinstance(item, str) != is_text or not isinstance(item, (str, list)):
            wanted = "a text, as the query is" if is_text else "token ids, as the query is"
            raise checks.wrong_type(name, wanted, item)
        own = _tokens(name, item)
        prompt = own + begin if item_first else begin + own
        if not prompt:
            raise RowError(f"{name} is empty, and so is the query", code="empty_prompt", param=name)
        prompts.append(prompt)
    return prompts


def _tokens(name: str, value: str | list[Any]) -> Any:
    if isinstance(value, str):
        return checks.whole_characters(name, value)
    return checks.token_ids(name, value) if value else array("i")


def _rerank(body: Mapping[str, Any], common: dict[str, Any]) -> tuple[Request, dict[str, Any]]:
    documents = checks.as_list(body.get("documents"))
    if not isinstance(documents, list) or not documents:
        raise RowError("documents must be a list of texts", code="missing_prompt", param="documents")
    texts = [_text(f"documents[{i}]", document) for i, document in enumerate(documents)]
    top_n = None if body.get("top_n") is None else _TOP_N("top_n", body["top_n"])
    instruct = None if body.get("instruct") is None else checks.text("instruct", body["instruct"])
    ranking = Ranking(query=_text("query", body.get("query")), documents=texts, instruct=instruct)
    answer = {"top_n": top_n, "documents": texts if _flag(body, "return_documents", default=True) else None}
    return Request(**common, ranking=ranking, sampling=only_labels(()), prompts_name="documents"), answer


def _text(name: str, value: Any) -> str:
    if isinstance(value, list):
        raise RowError(
            f"{name}: only texts can be ranked in batches, not parts", code="unsupported_content", param=name
        )
    if not isinstance(value, str) or not value.strip():
        raise RowError(f"{name} must be a text that is not empty", code="empty_prompt", param=name)
    return checks.whole_characters(name, value)


def _flag(body: Mapping[str, Any], name: str, *, default: bool) -> bool:
    return default if body.get(name) is None else checks.boolean(name, body[name])


def usage_of_prompts(samples: Sequence[Completion]) -> dict[str, int | None]:
    """What SGLang's routes say of the tokens of prompts behind which nothing is generated."""
    num_tokens = sum(sample.prompt_tokens for sample in samples)
    usage = {"prompt_tokens": num_tokens, "total_tokens": num_tokens, "completion_tokens": 0}
    return usage | {"prompt_tokens_details": None, "reasoning_tokens": 0}


def ranking_body(head: RowHead, samples: Sequence[Completion]) -> dict[str, Any] | list[dict[str, Any]]:
    """The body of the answer to such a row, as SGLang's route of the kind has it.

    Args:
        samples: One of each item or document, in their order.
    """
    options = head.answer or {}
    logprobs = [sample.label_logprobs or () for sample in samples]
    if head.kind == "score":
        return {
            "scores": [_softmax(values) if options["apply_softmax"] else _probabilities(values) for values in logprobs],
            "pooled_hidden_states": None,
            "model": head.model or DEFAULT_MODEL,
            "usage": usage_of_prompts(samples),
            "object": "scoring",
        }
    ranked = []
    for i, values in enumerate(logprobs):
        yes, no = _probabilities(values)
        found: dict[str, Any] = {"score": yes / (yes + no) if yes + no > 0 else 0.0}
        if options["documents"] is not None:
            found["document"] = options["documents"][i]
        ranked.append(found | {"index": i, "meta_info": None})
    ranked.sort(key=lambda found: -found["score"])  # those of one score stay in their order
    return ranked[: options["top_n"]]


def _probabilities(logprobs: Sequence[float]) -> list[float]:
    return [math.exp(value) for value in logprobs]


def _softmax(values: Sequence[float]) -> list[float]:
    highest = max(values)
    weights = [math.exp(value - highest) for value in values]
    total = sum(weights)
    return [weight / total for weight in weights]
