"""The model that lm-evaluation-harness calls ``batchllm``. Knows the harness and `BatchEngine`, not SGLang."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from batchllm.engine import BatchEngine
from batchllm.errors import ConfigError, EngineError
from batchllm.request import Completion

MAX_GEN_TOKS = 256
"""Tokens to generate where a task says nothing, as the harness's own models have it."""
_CACHED_TEXTS = 1 << 16
_SCORED = {"prompt_logprobs": 1, "max_new_tokens": 0}
_SAMPLING = frozenset(
    {
        *("temperature", "top_p", "top_k", "min_p", "repetition_penalty", "frequency_penalty", "presence_penalty"),
        *("seed", "stop_token_ids", "ignore_eos", "min_new_tokens", "skip_special_tokens"),
    }
)
"""Generation arguments of a task that are passed on, under the names that both use."""

Scored = tuple[tuple[str, str] | None, list[int], list[int]]
"""What the harness calls a request: a key, token ids of the context, and of the continuation."""


@register_model("batchllm")
class BatchLM(TemplateLM):  # type: ignore[misc] # the harness has no types
    """One engine. Arguments beside those below are the engine's (`BatchEngine`), e.g. ``max_total_tokens``.

    Args:
        pretrained: The model, a directory or a hub name.
        max_length: Most tokens of a request; those in front are cut off. None: what the model takes.
        max_gen_toks: Tokens to generate where a task says nothing.
        add_bos_token: Whether texts begin with the tokenizer's special tokens; None: as the tokenizer has it.
        prefix_token_id: What stands in front of a text that has no context; None: the tokenizer's first token.
        think_end_token: Of an answer only what follows this text counts.
        chat_template_args: Further arguments of the chat template.
        batch_size: Passed over, like the next two: the plan decides what runs together.
        engine: An engine that runs already and has loaded ``pretrained``, in the place of one of its own.

    Attributes:
        engine: The engine.
        tokenizer: The model's, of ``transformers``.
    """

    def __init__(
        self,
        pretrained: str,
        *,
        max_length: int | None = None,
        max_gen_toks: int = MAX_GEN_TOKS,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        think_end_token: str | None = None,
        chat_template_args: dict[str, Any] | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        device: str | None = None,
        engine: BatchEngine | None = None,
        **server_args: Any,
    ) -> None:
        super().__init__()
        from transformers import AutoTokenizer  # a second to import

        self.tokenizer = AutoTokenizer.from_pretrained(
            server_args.get("tokenizer_path") or pretrained,
            trust_remote_code=bool(server_args.get("trust_remote_code")),
            revision=server_args.get("revision"),
        )
        self.add_bos_token = add_bos_token
        self.think_end_token = think_end_token
        self.chat_template_args = chat_template_args or {}
        self.batch_size = batch_size
        self._prefix_token_id = prefix_token_id
        self._max_gen_toks = int(max_gen_toks)
        self.engine = BatchEngine(pretrained, **server_args) if engine is None else engine
        context_len = self.engine.runtime.info.context_len
        if max_length is not None and not 1 <= int(max_length) <= context_len:
            if engine is None:
                self.engine.shutdown()
            raise ConfigError(f"max_length {max_length}: the model takes 1 to {context_len} tokens; lower it")
        self._max_length = context_len if max_length is None else int(max_length)
        self._encode = lru_cache(maxsize=_CACHED_TEXTS)(self._encode_text)  # choices of a question repeat its text

    # What the harness asks of a model

    @property
    def eot_token_id(self) -> int:
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        tokenizer = self.tokenizer
        for token_id in (self._prefix_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id):
            if token_id is not None:
                return int(token_id)
        raise ConfigError("the tokenizer has no first or last token; give prefix_token_id=ID in --model_args")

    @property
    def max_length(self) -> int:
        """Most tokens that the model is given at once."""
        return self._max_length

    @property
    def max_gen_toks(self) -> int:
        """Tokens to generate where a task says nothing."""
        return self._max_gen_toks

    @property
    def tokenizer_name(self) -> str:
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        if add_special_tokens is None:
            # A chat template may have written the first token already.
            begins = self.tokenizer.decode(self.prefix_token_id)
            add_special_tokens = False if string.startswith(begins) else self.add_bos_token
        return list(self._encode(string, add_special_tokens))

    def _encode_text(self, text: str, add_special_tokens: bool | None) -> tuple[int, ...]:
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return tuple(self.tokenizer.encode(text, **options))

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        import jinja2

        options = {"tokenize": False, "add_generation_prompt": add_generation_prompt, **self.chat_template_args}
        options["continue_final_message"] = not add_generation_prompt
        try:
            return str(self.tokenizer.apply_chat_template(chat_history, **options))
        except jinja2.exceptions.TemplateError:  # some templates take no system message
            without = [message for message in chat_history if message["role"] != "system"]
            return str(self.tokenizer.apply_chat_template(without, **options))

    def loglikelihood_rolling(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[float]:
        windows: list[Scored] = []
        counts = []
        for (text,) in (request.args for request in requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(text),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            own: list[Scored] = [(None, *make_disjoint_window(pair)) for pair in pairs]
            windows += own
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(self, requests: Sequence[Scored], **kwargs: Any) -> list[tuple[float, bool]]:
        """How likely each continuation is behind its context, and whether each of its tokens is the likeliest."""
        prompts, starts = [], []
        for key, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ConfigError(
                    f"a continuation has {len(continuation)} tokens, and 1 to {self.max_length} can be scored: {key!r}"
                )
            ids = [*context, *continuation][-(self.max_length + 1) :]
            prompts.append(ids)
            starts.append(len(ids) - len(continuation))
        completions = self._run(prompts, [_SCORED] * len(prompts), starts)
        results = []
        for (key, _, _), completion in zip(requests, completions, strict=True):
            score = completion.prompt_score
            assert score is not None
            values = [value for value in score.logprobs if value is not None]
            is_greedy = all(top[0][0] == i for top, i in zip(score.top, score.token_ids, strict=True))
            results.append((float(sum(values)), is_greedy))
            if key is not None:
                self.cache_hook.add_partial("loglikelihood", key, results[-1])
        return results

    def generate_until(self, requests: Sequence[Any], disable_tqdm: bool = False) -> list[str]:
        eos = self.tokenizer.decode(self.eot_token_id)
        prompts, sampling, ends = [], [], []
        for context, given in (request.args for request in requests):
            options: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
            until = handle_stop_sequences(options.pop("until", None), eos=eos)
            limit = options.pop("max_gen_toks")
            room = self.max_length - limit
            if room < 1:
                raise ConfigError(
                    f"max_gen_toks is {limit}, and the model takes {self.max_length} tokens, prompt and answer "
                    "together; lower it"
                )
            prompts.append(self.tok_encode(context)[-room:])
            sampling.append(_sampling(options, limit, [stop for stop in until if stop and stop != eos]))
            ends.append(until)
        completions = self._run(prompts, sampling, None)
        texts = [
            postprocess_generated_text(completion.text, until, self.think_end_token)
            for completion, until in zip(completions, ends, strict=True)
        ]
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    def _run(
        self, prompts: list[list[int]], sampling: list[dict[str, Any]], starts: list[int] | None
    ) -> list[Completion]:
        completions = self.engine.batch_generate(input_ids=prompts, sampling_params=sampling, score_from=starts)
        failed = next((completion for completion in completions if completion.finish_reason == "abort"), None)
        if failed is not None:
            raise EngineError(f"request {failed.index} of {len(prompts)} has no answer: {failed.error}")
        return completions


def _sampling(options: dict[str, Any], limit: int, stop: list[str]) -> dict[str, Any]:
    """SGLang's names for what a task says of generation.

    Raises:
        ConfigError: An argument would change the answer and is not known.
    """
    options = {name: value for name, value in options.items() if name != "do_sample" and value is not None}
    unknown = sorted(options.keys() - _SAMPLING)
    if unknown:
        raise ConfigError(f"generation_kwargs: {', '.join(unknown)}: not supported; known are {', '.join(_SAMPLING)}")
    return {**options, "max_new_tokens": limit, "stop": stop}
