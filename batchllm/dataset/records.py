"""What reading one input line gives: a `Row` that can run, or a `BadRow` that says why it cannot.

Knows the shape of both, nothing of how they are parsed or written.

INVARIANT: every non-blank input line, or row of a table, becomes exactly one of the two, with its own ``index``.

Codes of a `BadRow`; they are part of the output format and never change meaning:

    the line      invalid_utf8, invalid_json, nested_too_deep, lone_surrogate, not_an_object, line_too_long
    its columns   missing_column, invalid_column, not_json, wrong_number_of_cells
    its fields    unknown_field, invalid_method, invalid_url, invalid_body, invalid_namespace
    its id        missing_id, invalid_id, duplicate_id
    its prompt    missing_prompt, ambiguous_prompt, empty_prompt, invalid_prompt, multiple_prompts,
                  invalid_input_ids, invalid_messages, unsupported_content
    its sampling  unknown_parameter, unsupported_parameter, invalid_parameter_type,
                  parameter_out_of_range, conflicting_parameters, invalid_json_schema,
                  unsupported_schema, invalid_regex, invalid_response_format
    its text      lone_surrogate
    its scores    empty_continuation, score_past_end, nothing_to_score, missing_labels, no_reranker
    the engine    prompt_too_long, token_id_out_of_range, tokenizer_needed, never_fits_kv_pool, never_fits_kv_limit,
                  invalid_grammar, aborted, engine_embeds, engine_generates, dimensions_not_supported
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import msgspec

from batchllm.errors import RowError
from batchllm.request import Request

RowKind = Literal["plain", "completions", "chat", "score", "rerank", "responses", "embeddings"]


@dataclass(frozen=True, slots=True)
class BrokenRecord:
    """A line, or a row of a table, of which no record could be made.

    Attributes:
        error: Why not.
        looks_openai: It seems to have been an OpenAI batch row; its output line takes that format.
    """

    error: RowError
    looks_openai: bool = False


class RowHead(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What the answer of a row needs of it: all but prompt and sampling. JSON values, so that it can wait on disk.

    Attributes:
        position: Among the rows of the input, from 0.
        line: As in `Row`, like what follows.
        num_samples: Samples that were asked for.
        wants_logprobs: The answer has log probabilities.
        num_alternatives: Most likely alternatives per token in them.
        num_prompts: Prompts that the row gives, each with as many of the samples.
        echo: Its prompts, where the answer repeats them: texts, or token ids.
        chat: What a chat asks for beside its messages, and its history of tool calls; None where that is nothing.
        schema: JSON schema, as text, that its answers are to be checked against; None where they are not.
        echoes_logprobs: The prompts that are repeated have log probabilities.
        answer: What else the form of the answer depends on, where it is one of a score, a ranking, an embedding or a
            response.
    """

    position: int
    line: int
    kind: RowKind
    given_id: str | int
    model: str | None
    carried: dict[str, Any] | None
    num_samples: int
    wants_logprobs: bool
    num_alternatives: int
    num_prompts: int = 1
    echo: list[Any] | None = None
    chat: dict[str, Any] | None = None
    schema: str | None = None
    echoes_logprobs: bool = False
    answer: dict[str, Any] | None = None


class Row(msgspec.Struct, frozen=True, kw_only=True, gc=False):
    """One input row that can run.

    Attributes:
        request: What the inside of batchllm sees of it.
        given_id: The identifier exactly as the row gave it; ``request.row_id`` is its text.
        line: Line number in the input, from 1, blank lines counted; in tables the row's number, over all files.
        model: The model its body names, if it does.
        carried: Columns of the input to be repeated in the output, JSON values; None where none were asked for.
        echoes: The answer repeats the prompt.
        echoes_logprobs: With log probabilities.
        checks_schema: The answer is to be checked against the schema that it is sampled by.
        answer: As in `RowHead`.
    """

    request: Request
    kind: RowKind
    given_id: str | int
    line: int
    model: str | None = None
    carried: dict[str, Any] | None = None
    echoes: bool = False
    echoes_logprobs: bool = False
    checks_schema: bool = False
    answer: dict[str, Any] | None = None

    @property
    def index(self) -> int:
        """Position among the rows of the input, from 0."""
        return self.request.index

    @property
    def head(self) -> RowHead:
        """What its answer needs of it."""
        request = self.request
        sampling = request.sampling
        prompts = request.prompts if request.ranking is None else request.ranking.documents
        num_prompts = 1 if prompts is None else len(prompts)
        return RowHead(
            request.index,
            self.line,
            self.kind,
            self.given_id,
            self.model,
            self.carried,
            sampling.n * num_prompts,
            sampling.logprobs,
            # What only scores has no tokens of its own.
            (sampling.prompt_logprobs or 0) if self.echoes_logprobs else sampling.top_logprobs,
            num_prompts,
            self._echo() if self.echoes else None,
            None if request.chat is None or not request.chat.fields else self._chat(),
            sampling.json_schema if self.checks_schema else None,
            self.echoes_logprobs,
            self.answer,
        )

    def _echo(self) -> list[Any]:
        request = self.request
        prompts = request.prompts or [request.prompt or request.input_ids or ()]
        return [prompt if isinstance(prompt, str) else list(prompt) for prompt in prompts]

    def _chat(self) -> dict[str, Any]:
        """Fields of the body, with those messages that its answer depends on.

        Some models number calls of tools through a whole chat, and an answer that goes on with the last message may be
        in the midst of reasoning.
        """
        request = self.request
        assert request.chat is not None and request.messages
        begun = request.messages[-1:] if request.chat.fields.get("continue_final_message") else []
        before = request.messages[: len(request.messages) - len(begun)]
        calls = [m["tool_calls"] for m in before if m.get("tool_calls")]
        messages = [{"role": "assistant", "tool_calls": tool_calls} for tool_calls in calls]
        return {**request.chat.fields, "messages": [*messages, *begun]}


@dataclass(frozen=True, slots=True, kw_only=True)
class BadRow:
    """One input row that cannot run, as data for the output.

    Attributes:
        kind: Which format the output line takes; a guess where the line could not be parsed.
        given_id: The identifier as given, or None where the row did not get that far.
        index: Position among the non-blank lines, from 0.
        line: As in `Row`.
        param: The field at fault, if one is.
        status_code: HTTP status of an OpenAI output line: 400 the caller's mistake, 500 ours.
        carried: As in `Row`; None too where the row did not get that far.
    """

    kind: RowKind
    given_id: str | int | None
    index: int
    line: int
    code: str
    message: str
    param: str | None = None
    status_code: int = 400
    carried: dict[str, Any] | None = None


def reject(head: RowHead, error: RowError, *, status_code: int = 400) -> BadRow:
    """Turns a row that read well into a bad one, for what only the engine could tell."""
    return BadRow(
        kind=head.kind,
        given_id=head.given_id,
        index=head.position,
        line=head.line,
        code=error.code,
        message=error.message,
        param=error.param,
        status_code=status_code,
        carried=head.carried,
    )
