"""Prompts of a reranker that answers yes or no, as SGLang's ``/v1/rerank`` makes them. Runs in the engine's or the
server's process. (Upstream: ``srt/entrypoints/openai/serving_rerank.py``.)
"""

from __future__ import annotations

from typing import Any

from sglang.srt.entrypoints.openai import serving_rerank
from sglang.srt.entrypoints.openai.protocol import V1RerankReqInput

from batchllm.errors import RowError
from batchllm.request import Ranking

_BACKEND = "text_decoder"
"""What SGLang calls such a reranker."""


class Reranker:
    """The reranker that a model is by its chat template, if it is one.

    Args:
        tokenizer: The model's, of transformers.
        model_path: Where the model is.

    Attributes:
        labels: The tokens for yes and no.
    """

    def __init__(self, tokenizer: Any, model_path: str) -> None:
        self._source = tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else ""
        self._model_path = model_path
        self.labels: tuple[int, int] = serving_rerank._get_yes_no_token_ids(tokenizer)
        # SGLang compiles the template anew for each document, which takes longer than to score it.
        self._template = serving_rerank._get_jinja_env().from_string(self._source)

    def prompts(self, ranking: Ranking) -> list[str] | RowError:
        """A prompt for each document, or why there is none: ``no_reranker`` or ``chat_template``."""
        request = V1RerankReqInput(query=ranking.query, documents=ranking.documents, instruct=ranking.instruct)
        backend = serving_rerank._detect_rerank_backend(
            request=request, chat_template=self._source, model_path=self._model_path
        )
        if backend != _BACKEND:
            return RowError(
                'the model does not rank: its chat template does not ask for "yes" or "no"; run one such as '
                "Qwen3-Reranker, with its --chat-template",
                code="no_reranker",
                param="model",
            )
        options = {"instruct": ranking.instruct} if ranking.instruct else {}
        try:
            return [
                self._template.render(messages=[{"role": "user", "content": text} for text in pair], **options)
                for pair in ((ranking.query, document) for document in ranking.documents)
            ]
        except Exception as error:  # templates raise many kinds; whatever it is, it is about this query
            message = str(error) or type(error).__name__
            return RowError(
                f"the chat template of the model refuses this query: {message}", code="chat_template", param="query"
            )
