"""The rows of a job that can run, as columns: their tokens, how to sample each, what is expected of its answer.

Knows requests, the tokenizer, and the numbers of the engine that will run them; nothing of files, plans or processes.

INVARIANT: a row that has been taken in can run alone on the engine; it costs its tokens and a few dozen bytes, no
Python object.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import msgspec
import numpy as np
import numpy.typing as npt
import xxhash

from batchllm.dataset.field_checks import MAX_INT32
from batchllm.dataset.limits import (
    check_expected_len,
    check_prompt_len,
    check_token_ids,
    fit_max_new_tokens,
)
from batchllm.dataset.sampling import with_adapter
from batchllm.errors import RowError
from batchllm.offline.column import Column
from batchllm.offline.encode import Encoded, encode_requests, of_prompt
from batchllm.offline.identical import IdenticalRows
from batchllm.offline.namespaces import Namespace
from batchllm.offline.row_scores import RowScores, cut_targets
from batchllm.offline.runtime import PromptTokenizer, RuntimeInfo
from batchllm.offline.samples import Samples
from batchllm.offline.sampling_kinds import NO_SEED, CheckedSampling, SamplingKinds
from batchllm.offline.token_store import TokenStore
from batchllm.request import Request, SamplingParams
from batchllm.tokens import Int64Array, TokenTable

ENCODE_SLICE = 1024
"""Requests that are tokenized at once: enough for the tokenizer to work in bulk, few enough to hold."""

UNLIMITED = RuntimeInfo(
    model_name="",
    context_len=MAX_INT32,
    vocab_size=MAX_INT32,
    kv_capacity_tokens=MAX_INT32,
    kv_limit_tokens=MAX_INT32,
    num_unstored_tokens=0,
    page_size=1,
    random_seed=0,
    has_seeded_sampling=True,
    has_grammar=True,
    adapters=None,
    embeds=None,
)
"""Numbers of an engine on which everything runs: where rows are planned or simulated, not run."""


class _Taken(msgspec.Struct, frozen=True, gc=False):
    """A row that can run.

    Attributes:
        request: The prompt's, answered by the adapter that its model names.
        group: Number of what it has in common with other rows.
        limit: Most tokens that it may generate.
        targets: As `cut_targets` gives them.
    """

    prompt: Encoded
    request: Request
    sampling: CheckedSampling
    group: int
    limit: int
    targets: Sequence[int]


class JobRows:
    """Rows in the order they were added, numbered from 0.

    Args:
        info: Numbers of the engine.
        tokenizer: None where the engine runs on token ids only.
        store: Takes the token ids.
        identical: Told of every row, to find those that need not run; None where all shall run.

    Attributes:
        all_namespaces: The namespaces, by number.
        scores: Which of them are scored, and from where.
    """

    def __init__(
        self,
        info: RuntimeInfo,
        tokenizer: PromptTokenizer | None,
        store: TokenStore,
        identical: IdenticalRows | None = None,
    ) -> None:
        self._info = info
        self._limit_room = info.max_request_len(info.kv_limit_tokens)
        self._surely_fits = min(self._limit_room, info.context_len)
        self._tokenizer = tokenizer
        self.store = store
        self._identical = identical
        self._kinds = SamplingKinds(info)
        self._task_ids: dict[str, int] = {"": -1}
        self.all_namespaces = [Namespace("", "")]
        self._namespace_ids = {self.all_namespaces[0]: 0}
        # What many rows have in common stands once: (kind, samples, task, namespace), and of each row which of these.
        self._group_ids: dict[tuple[int, int, str, str, str], int] = {}
        self._group_columns = [Column(np.int32) for _ in range(4)]
        self._group = Column(np.int32)
        self._max_new_len = Column(np.int32)
        self._known_len = Column(np.int32)
        self._seed = Column(np.int64)
        self._shift = Column(np.int32)  # a row's place in the input, less its number
        self._num_prompts = Column(np.int32)
        self.scores = RowScores()

    def __len__(self) -> int:
        return len(self._group)

    def places(self, rows: Int64Array) -> Int64Array:
        """Where in the input these rows are, from 0. Shape of ``rows``."""
        places: Int64Array = rows + self._shift.values[rows]
        return places

    @property
    def max_new_len(self) -> npt.NDArray[np.int32]:
        """Most tokens that each row may generate. Shape ``[num_rows]``."""
        return self._max_new_len.values

    @property
    def known_len(self) -> npt.NDArray[np.int32]:
        """Tokens that each row will generate, 0 where that is not known. Shape ``[num_rows]``."""
        return self._known_len.values

    @property
    def num_prompts(self) -> npt.NDArray[np.int32]:
        """Prompts that each row gives. Shape ``[num_rows]``."""
        return self._num_prompts.values

    @property
    def first_prompt(self) -> Int64Array:
        """Which row of the store is each row's first prompt; the others follow it. Shape ``[num_rows]``."""
        num_prompts = self.num_prompts
        return np.cumsum(num_prompts, dtype=np.int64) - num_prompts

    def prompt_of(self, rows: Int64Array, samples: Int64Array) -> Int64Array:
        """Which row of the store each of these samples of these rows answers."""
        per_prompt = self.num_samples(rows) // self.num_prompts[rows]
        same = self._num_prompts.same
        return (self.first_prompt[rows] if same is None else rows * same) + samples // per_prompt

    def per_prompt(self, values: npt.NDArray[Any]) -> Int64Array:
        """A value of every row, for each row of the store. Shape ``[num_prompts]``."""
        return np.repeat(values, self.num_prompts).astype(np.int64)

    @property
    def kinds(self) -> list[SamplingParams]:
        """Distinct ways to sample, without what each row says for itself: output limit, samples, seed."""
        return self._kinds.all

    @property
    def draws(self) -> npt.NDArray[np.int8]:
        """1 for each of `kinds` that needs a seed, else 0."""
        return self._kinds.draws.values

    def kind(self, rows: Int64Array) -> npt.NDArray[np.int32]:
        """Which of `kinds` these rows are sampled by."""
        return self._of_group(0, rows)

    def num_samples(self, rows: Int64Array) -> npt.NDArray[np.int32]:
        """Samples of these rows, over all of a row's prompts."""
        return self._of_group(1, rows)

    def task(self, rows: Int64Array) -> npt.NDArray[np.int32]:
        """Number of the task that these rows name, -1 for none."""
        return self._of_group(2, rows)

    @property
    def has_tasks(self) -> bool:
        """Some row names a task."""
        return len(self._task_ids) > 1

    def namespace(self, rows: Int64Array) -> npt.NDArray[np.int32]:
        """Number of the namespace of these rows, 0 for the default one."""
        return self._of_group(3, rows)

    def has_one_sample(self) -> bool:
        """Every row is one sample."""
        return bool((self._group_columns[1].values == 1).all())

    def _of_group(self, column: int, rows: Int64Array) -> npt.NDArray[np.int32]:
        values: npt.NDArray[np.int32] = self._group_columns[column].values[self._group.values[rows]]
        return values

    def add(self, requests: Sequence[Request]) -> list[RowError | None]:
        """Tokenize in bulk, check each request against the engine, and keep those that can run.

        Returns:
            Of each request why it cannot run, or None where it was taken in.

        Raises:
            ConfigError: A request gives text and there is no tokenizer.
        """
        slices = (requests[first : first + ENCODE_SLICE] for first in range(0, len(requests), ENCODE_SLICE))
        return [error for part in slices for error in self.take_in(self.encode(part))]

    def encode(self, requests: Sequence[Request]) -> list[Encoded | RowError]:
        """The first half of `add`, which changes nothing here: it may run in another thread."""
        return encode_requests(requests, self._tokenizer, self._info.chat_sampling)

    def take_in(self, encoded: Sequence[Encoded | RowError]) -> list[RowError | None]:
        """The second half of `add`."""
        errors: list[RowError | None] = []
        taken: list[_Taken] = []
        for prompt, is_known in zip(encoded, self._are_in_vocabulary(encoded), strict=True):
            if isinstance(prompt, RowError):
                errors.append(prompt)
                continue
            try:
                taken.append(self._check(prompt, is_known))
                errors.append(None)
            except RowError as error:
                errors.append(error)
        self._append(taken)
        return errors

    def _check(self, prompt: Encoded, is_known: bool) -> _Taken:
        """What there is to know of a row that can run.

        Args:
            is_known: All its token ids are the model's.

        Raises:
            RowError: It cannot.
        """
        if not is_known and prompt.request.prompt is None:
            self._refuse_ids(prompt)
        prompt, targets = cut_targets(prompt)
        request = self._with_adapter(prompt.request)
        lengths = prompt.lengths
        longest = lengths[0] if len(lengths) == 1 else max(lengths)
        sampling = self._kinds.check(request.sampling)
        if request.expected_new_tokens is not None:
            check_expected_len(request.expected_new_tokens, longest, self._info.context_len)
        try:
            limit = self._output_limit(request, longest)
        except RowError as error:
            raise of_prompt(error, prompt, lengths.index(longest)) from error
        return _Taken(prompt, request, sampling, self._group_number(request, sampling, len(lengths)), limit, targets)

    def _refuse_ids(self, prompt: Encoded) -> None:
        start = 0
        for number, length in enumerate(prompt.lengths):
            try:
                check_token_ids(prompt.ids[start : start + length], self._info.vocab_size)
            except RowError as error:
                raise of_prompt(error, prompt, number) from error
            start += length

    def _are_in_vocabulary(self, encoded: Sequence[Encoded | RowError]) -> list[bool]:
        """Whether all token ids of each row are the model's; found for all rows together."""
        rows = [b"" if isinstance(prompt, RowError) else prompt.ids for prompt in encoded]
        tokens = np.frombuffer(b"".join(rows), np.int32)
        if not len(tokens) or (tokens.min() >= 0 and tokens.max() < self._info.vocab_size):
            return [True] * len(rows)
        lens = np.fromiter(map(len, rows), np.int64, len(rows))
        are_in = np.ones(len(rows), bool)
        starts = (np.cumsum(lens) - lens)[lens > 0]
        highest, lowest = np.maximum.reduceat(tokens, starts), np.minimum.reduceat(tokens, starts)
        are_in[lens > 0] = (highest < self._info.vocab_size) & (lowest >= 0)
        return are_in.tolist()

    def sample_table(self, subset: Int64Array | None = None) -> tuple[Samples, TokenTable]:
        """Every sample of these rows as a row of a token table.

        Args:
            subset: Row numbers; None for all.

        Returns:
            Which sample each row of the table is, and the table; not a copy where it holds every row of the job once.
        """
        if self.has_one_sample():
            return Samples(subset, None, len(self) if subset is None else len(subset)), self.store.table(subset)
        chosen = np.arange(len(self), dtype=np.int64) if subset is None else subset
        num_samples = self.num_samples(chosen)
        row_of = np.repeat(chosen, num_samples)
        first = np.cumsum(num_samples, dtype=np.int64) - num_samples
        sample_of = np.arange(len(row_of)) - np.repeat(first, num_samples)
        return Samples(row_of, sample_of, len(row_of)), self.store.table(self.prompt_of(row_of, sample_of))

    def namespaces(self, samples: Samples) -> Int64Array | None:
        """Number of the namespace of each of these samples; None where all rows are in the default one."""
        return self.namespace(samples.all_rows()).astype(np.int64) if len(self._namespace_ids) > 1 else None

    def sample_seed(self, row: int, sample: int) -> int:
        """Seed of one sample: what the row says, and something of its own for every further sample.

        It depends on the row's position in the input, not on what else runs, so that a job that is run in parts draws
        what it would have drawn in one.
        """
        seed = self._seed[row]
        if seed != NO_SEED and self._num_prompts[row] > 1:  # each of them draws with the seed
            sample %= self._num_samples_per_prompt(row)
        if seed != NO_SEED and sample == 0:
            return seed
        text = f"{seed},{sample}" if seed != NO_SEED else f"{self._info.random_seed},{row + self._shift[row]},{sample}"
        return xxhash.xxh64_intdigest(text.encode()) >> 1

    def _num_samples_per_prompt(self, row: int) -> int:
        return int(self._group_columns[1][self._group[row]]) // self._num_prompts[row]

    def _with_adapter(self, request: Request) -> Request:
        """The adapter that ``model`` names answers."""
        if not self._info.adapters or request.model not in self._info.adapters:
            return request
        if request.sampling.label_token_ids:
            raise RowError(
                f"model: {request.model} is an adapter, and SGLang scores with the base model; name that",
                code="unsupported_parameter",
                param="model",
            )
        return msgspec.structs.replace(request, sampling=with_adapter(request.sampling, request.model))

    def _output_limit(self, request: Request, prompt_len: int) -> int:
        """``max_new_tokens``, lowered where it may be."""
        info, sampling, context_len = self._info, request.sampling, self._info.context_len
        if sampling.max_new_tokens == 0:  # a step all the same, whose token nobody needs, nor its place in the context
            sampling = replace(sampling, max_new_tokens=1)
            context_len += 1
        if prompt_len + sampling.max_new_tokens <= self._surely_fits:
            return sampling.max_new_tokens
        limit_room = self._limit_room
        if request.may_lower_max_new_tokens:
            sampling = fit_max_new_tokens(sampling, prompt_len, context_len=context_len, kv_capacity=limit_room)
        pool_room = info.max_request_len(info.kv_capacity_tokens)
        check_prompt_len(prompt_len, sampling, context_len=context_len, kv_capacity=pool_room)
        needed = prompt_len + sampling.max_new_tokens
        if needed > limit_room:
            raise RowError(
                f"the row needs up to {needed} tokens of KV ({prompt_len} prompt + {sampling.max_new_tokens} new), and "
                f"--kv-limit is {info.kv_limit_tokens}; raise it to at least "
                f"{info.kv_limit_tokens + needed - limit_room}, lower max_new_tokens or shorten the prompt",
                code="never_fits_kv_limit",
                param="max_new_tokens",
            )
        return sampling.max_new_tokens

    def _append(self, taken: Sequence[_Taken]) -> None:
        first = len(self)
        self._group.extend([row.group for row in taken])
        self._seed.extend([row.sampling.seed for row in taken])
        self._shift.extend([row.request.index - number for number, row in enumerate(taken, first)])
        self._max_new_len.extend([row.limit for row in taken])
        self._num_prompts.extend([len(row.prompt.lengths) for row in taken])
        self._known_len.extend(
            [row.limit if row.sampling.has_known_len else row.request.expected_new_tokens or 0 for row in taken]
        )
        self.scores.extend([(row.prompt, row.targets) for row in taken])
        if self._identical is not None:
            for row in taken:
                _compare(self._identical, row)
        lengths = [length for row in taken for length in row.prompt.lengths]
        tokens = np.frombuffer(b"".join([row.prompt.ids for row in taken]), np.int32)
        self.store.extend(tokens, np.array(lengths, np.int64))

    def _group_number(self, request: Request, sampling: CheckedSampling, num_prompts: int) -> int:
        names = (sampling.sampling.lora_path or "", request.namespace, request.task)
        key = (sampling.kind, sampling.sampling.n * num_prompts, *names)
        number = self._group_ids.get(key)
        if number is None:
            number = self._group_ids[key] = len(self._group_ids)
            adapter, namespace, task = names
            of_rows = (self._task_ids.setdefault(task, len(self._task_ids) - 1), self._namespace_id(adapter, namespace))
            for column, value in zip(self._group_columns, (*key[:2], *of_rows), strict=True):
                column.append(value)
        return number

    def _namespace_id(self, adapter: str, name: str) -> int:
        namespace = Namespace(adapter, name)
        found = self._namespace_ids.get(namespace)
        if found is None:
            found = self._namespace_ids[namespace] = len(self.all_namespaces)
            self.all_namespaces.append(namespace)
        return found


def _compare(identical: IdenticalRows, row: _Taken) -> None:
    same_seed = row.sampling.same_seed
    if same_seed is None or len(row.targets) != 1:
        identical.append_single()
        return
    # The group holds the task too, which says nothing of the answer: rows of two tasks are not found alike.
    is_scored = row.request.sampling.prompt_logprobs is not None
    scores = (row.request.score_from, row.targets[0]) if is_scored else ()
    identical.append(row.prompt.ids.tobytes(), row.group, row.limit, same_seed, *scores)
