"""What the inside of batchllm sees of a row: a `Request` goes in, a `Completion` comes out.

This room knows nothing of files, tokenizers or engines. There is a `Request` and a `Completion` for each of millions of
rows: structs of msgspec, which are made ten times as fast as frozen dataclasses, and which the garbage collector need
not look at, since nothing in them refers back. `msgspec.structs` has ``replace`` and ``asdict`` for them.
"""

from __future__ import annotations

from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import msgspec

NO_TARGET = -1
"""In the place of a token behind a prompt that is scored with it, where there is none."""

FinishReason = Literal["stop", "length", "tool_calls", "abort"]

GRAMMARS = ("json_schema", "regex", "ebnf", "structural_tag")
"""Fields of `SamplingParams` that constrain the output; a request has one of them at most."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to sample one request. Field names and meaning are SGLang's, plus ``n`` and ``logprobs``."""

    max_new_tokens: int = 128
    """Most tokens to generate; 0 only where the prompt is scored."""
    min_new_tokens: int = 0
    """Fewest tokens before a stop may match: a token that ends, or a stop string that is not complete before. A grammar
    that has come to its end wins; `Completion.note` says so."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = -1
    """-1 keeps the whole vocabulary."""
    min_p: float = 0.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    """Same seed, prompt and parameters: same tokens, whatever else runs beside them."""
    stop: tuple[str, ...] = ()
    """Strings that end generation; not part of the text."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    n: int = 1
    """Number of independent samples; they share the whole prompt."""
    logprobs: bool = False
    """Return the log probability of every generated token."""
    top_logprobs: int = 0
    """Also return this many most likely alternatives per token."""
    prompt_logprobs: int | None = None
    """Return the log probability of tokens of the prompt (`Request.score_from`), with this many alternatives."""
    label_token_ids: tuple[int, ...] = ()
    """Return how likely each of these tokens is right behind the prompt; then nothing is generated."""
    embed: bool = False
    """Return a vector of the prompt; then nothing is generated. For engines that embed."""
    dimensions: int | None = None
    """Numbers of the vector, where the model's vectors can be shortened; None for all."""
    json_schema: str | None = None
    """JSON schema, as JSON text, that the output must satisfy."""
    regex: str | None = None
    """Regular expression that the output must match."""
    ebnf: str | None = None
    """Grammar in EBNF that the output must satisfy."""
    structural_tag: str | None = None
    """Tags in the output whose contents must satisfy a grammar, as JSON text."""
    logit_bias: tuple[tuple[int, float], ...] = ()
    """Pairs ``(token_id, bias)``, added to the logits before sampling; token ids ascend."""
    stop_regex: tuple[str, ...] = ()
    """Regular expressions that end generation where they match; not part of the text."""
    no_stop_trim: bool = False
    """What ended the answer stays in the text."""
    skip_special_tokens: bool = True
    spaces_between_special_tokens: bool = True
    require_reasoning: bool = False
    """The answer begins with reasoning, which a grammar leaves alone."""
    lora_path: str | None = None
    """Name of the loaded LoRA adapter that answers; None for the base model."""

    @property
    def has_grammar(self) -> bool:
        """The output must satisfy something."""
        return any(getattr(self, name) is not None for name in GRAMMARS)

    @property
    def has_known_len(self) -> bool:
        """True where nothing can end the answer before ``max_new_tokens``."""
        may_stop = self.stop or self.stop_token_ids or self.stop_regex or self.has_grammar
        return self.ignore_eos and not may_stop


class ChatOptions(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """What a chat asks for beside its messages.

    Attributes:
        fields: Further fields of an OpenAI chat body that decide how it becomes a prompt, or its answer a message.
        unset: Fields of `SamplingParams` that nobody has set: what the model recommends holds.
    """

    fields: dict[str, Any] = {}
    unset: tuple[str, ...] = ()


class ChatPrompt(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """A chat as a prompt.

    Attributes:
        ids: Its token ids.
        settings: Pairs of a field of `SamplingParams` and the value that this chat needs there (`with_chat_settings`).
    """

    ids: array[int]
    settings: tuple[tuple[str, Any], ...] = ()


class Ranking(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """Documents that a reranker compares with a query, by a prompt for each of them.

    Attributes:
        instruct: What makes a document a good one, in words; None for what the reranker takes itself.
    """

    query: str
    documents: list[str]
    instruct: str | None = None


class RankingPrompts(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """The prompts of a `Ranking`.

    Attributes:
        ids: Token ids, one prompt behind the other.
        lengths: Tokens of each prompt.
        labels: The tokens for yes and no.
    """

    ids: array[int]
    lengths: tuple[int, ...]
    labels: tuple[int, int]


class Request(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One prompt to answer, or several. Exactly one of ``prompt``, ``input_ids``, ``prompts``, ``messages`` and
    ``ranking`` is set.

    Attributes:
        row_id: The caller's identifier, unique in the job.
        index: Position in the input, from 0.
        prompts: At least two prompts, texts or token ids, each answered ``sampling.n`` times.
        prompts_name: What the row calls them.
        ranking: What a reranker's prompts are made of; their label tokens are the reranker's.
        chat: What a chat asks for beside ``messages``; None where that is nothing.
        model: What the row calls the model; the name of a loaded adapter asks for that adapter.
        namespace: Prompts of different namespaces never share KV ("" is the default one).
        expected_new_tokens: How many tokens the answer will have, where the caller knows; None where not. Only
            scheduling depends on it.
        task: Requests of one task are expected to have answers of like length ("": as those that share its prefix).
        may_lower_max_new_tokens: The output limit is a default, not the caller's wish: lower it to what the
            context leaves instead of refusing the prompt.
        score_from: The prompt's first token to score, from 0, where ``sampling.prompt_logprobs`` asks for scores; with
            a continuation, found when that is tokenized.
        continuation: What follows the prompt, text or token ids, and is scored; None for nothing.
    """

    row_id: str
    index: int
    sampling: SamplingParams
    prompt: str | None = None
    input_ids: Sequence[int] | None = None
    prompts: Sequence[str | Sequence[int]] | None = None
    prompts_name: str = "prompt"
    ranking: Ranking | None = None
    messages: Sequence[dict[str, Any]] | None = None
    chat: ChatOptions | None = None
    model: str | None = None
    namespace: str = ""
    expected_new_tokens: int | None = None
    task: str = ""
    may_lower_max_new_tokens: bool = False
    score_from: int = 0
    continuation: str | Sequence[int] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenLogprob:
    """Log probability of one generated token, with the most likely alternatives."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """Pairs ``(token_id, logprob)``, most likely first."""


class PromptScore(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """How likely tokens of a prompt are, given what is in front of each; item i of each list is of the same token.

    Attributes:
        start: Which token of the prompt is the first, from 0.
        token_ids: The tokens, to the end of the prompt.
        logprobs: Their log probabilities; None for the first token of the prompt, which has nothing in front of it.
        top: Of each the most likely alternatives, pairs ``(token_id, logprob)``, most likely first.
    """

    start: int
    token_ids: list[int]
    logprobs: list[float | None]
    top: list[tuple[tuple[int, float], ...]]


class Completion(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One finished sample of one request.

    Attributes:
        index: `Request.index` of the request answered.
        sample: Which of its ``n`` samples, from 0; those of a request's second prompt follow those of its first.
        output_ids: Generated token ids, a matched stop token included.
        cached_tokens: Prompt tokens whose KV was read from the cache instead of computed.
        matched_stop: The stop string or stop token id that ended it, if one did.
        error: Why it was aborted, if it was; text and ids then hold what had been generated.
        message: The text as a chat's message, where it was looked through for reasoning and tool calls.
        error_code: Code of that, where the request is at fault and would fail again, e.g. ``invalid_grammar``.
        note: What was asked for and could not be kept, in words: a grammar that ended before ``min_new_tokens``.
        prompt_score: Scores of the prompt, where they were asked for.
        label_logprobs: Log probability of each of ``SamplingParams.label_token_ids``; None where there are none.
        embedding: The vector of the prompt, where one was asked for.
    """

    index: int
    sample: int = 0
    text: str
    output_ids: Sequence[int]
    finish_reason: FinishReason
    prompt_tokens: int
    cached_tokens: int
    matched_stop: str | int | None = None
    logprobs: tuple[TokenLogprob, ...] | None = None
    error: str | None = None
    message: dict[str, Any] | None = None
    error_code: str | None = None
    note: str | None = None
    prompt_score: PromptScore | None = None
    label_logprobs: Sequence[float] | None = None
    embedding: Sequence[float] | None = None

    @property
    def completion_tokens(self) -> int:
        return len(self.output_ids)
