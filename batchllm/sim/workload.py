"""Workloads to simulate: prompts, and what a real model would have answered, as lengths.

Knows: rows of tokens, lengths of outputs, and what the scheduler knows of them. Must not know: schedules, KV, time.
Invariant: the same arguments give the same workload, and prompts share exactly what is said, not a token more.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from batchllm.errors import WorkloadError
from batchllm.tokens import Int32Array, Int64Array, TokenTable, check_integers, gather_runs, starts_of


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class SimWorkload:
    """Prompts in order of arrival, and their outputs in counts.

    Attributes:
        name: What it is, one line.
        table: The prompts, none empty.
        output_len: Tokens each row will generate, 1 to ``max_new_len``, int64[num_requests].
        max_new_len: Tokens each row may generate, int64[num_requests].
        known_len: What the scheduler knows of ``output_len``, 0 for nothing, int64[num_requests].
        task: Number of the task that each row names, -1 for none, int32[num_requests].
        share_lens: Tokens at the start of each prompt that may be shared, int32[num_requests]; None: all of them.

    Raises:
        WorkloadError: Arrays that do not fit each other; names the first row at fault.
    """

    name: str
    table: TokenTable
    output_len: Int64Array
    max_new_len: Int64Array
    known_len: Int64Array
    task: Int32Array
    share_lens: Int32Array | None = None

    def __post_init__(self) -> None:
        n = len(self.table)
        for name in ("output_len", "max_new_len", "known_len", "task"):
            check_integers(name, getattr(self, name), n)
        wrong = (self.output_len < 1) | (self.output_len > self.max_new_len) | (self.known_len < 0)
        if wrong.any():
            row = int(wrong.argmax())
            raise WorkloadError(
                f"row {row}: output_len {self.output_len[row]} must be from 1 to max_new_len {self.max_new_len[row]}, "
                f"and known_len {self.known_len[row]} at least 0"
            )
        if n and int(self.table.lengths.min()) < 1:
            raise WorkloadError(f"row {int(self.table.lengths.argmin())} is an empty prompt")

    @property
    def num_requests(self) -> int:
        """Rows."""
        return len(self.table)

    @property
    def expected_len(self) -> Int64Array:
        """Tokens that each row is expected to generate: its limit where its length is not known. By row."""
        return np.where(self.known_len > 0, self.known_len, self.max_new_len)

    def of_rows(self, rows: Int64Array) -> SimWorkload:
        """Some of the rows, in the order given; prompts are copied."""
        lens = self.table.lengths[rows]
        tokens = gather_runs(self.table.tokens, self.table.offsets[rows], lens)
        return SimWorkload(
            name=self.name,
            table=TokenTable(tokens=tokens, offsets=starts_of(lens)),
            output_len=self.output_len[rows],
            max_new_len=self.max_new_len[rows],
            known_len=self.known_len[rows],
            task=self.task[rows],
            share_lens=None if self.share_lens is None else self.share_lens[rows],
        )

    @classmethod
    def from_lengths(
        cls,
        name: str,
        table: TokenTable,
        output_len: Int64Array,
        *,
        max_new_len: Int64Array | None = None,
        known_len: Int64Array | None = None,
        task: Int32Array | None = None,
        share_lens: Int32Array | None = None,
    ) -> SimWorkload:
        """Prompts of a real file with the outputs they had, or are supposed to have.

        Arguments are the attributes; without one a row reaches its limit, nothing is known, and no task is named.

        Raises:
            WorkloadError: The arrays do not fit each other.
        """
        return cls(
            name=name,
            table=table,
            output_len=output_len,
            max_new_len=output_len if max_new_len is None else max_new_len,
            known_len=np.zeros(len(table), np.int64) if known_len is None else known_len,
            task=np.full(len(table), -1, np.int32) if task is None else task,
            share_lens=share_lens,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputDraw:
    """How output lengths are drawn.

    Attributes:
        median_len: Median tokens of an output; all of them where ``sigma`` is 0.
        sigma: Standard deviation of the logarithm of the length: log-normal.
        max_new_len: Where an output is cut. 0: at ``median_len`` without ``sigma``, else at 4096.
        is_known: Whether the scheduler knows each length.
    """

    median_len: int
    sigma: float = 0.0
    max_new_len: int = 0
    is_known: bool = True

    @property
    def limit(self) -> int:
        """Tokens at which an output is cut."""
        if self.max_new_len:
            return self.max_new_len
        return self.median_len if self.sigma == 0 else 4096

    def draw(self, num_requests: int, rng: np.random.Generator) -> Int64Array:
        """Lengths from 1 to the limit, int64[num_requests]."""
        lens = self.median_len * np.exp(self.sigma * rng.standard_normal(num_requests))
        drawn: Int64Array = np.clip(np.rint(lens), 1, self.limit).astype(np.int64)
        return drawn


def shared(
    *, prefix_len: int, private_len: int, sharing: int, num_requests: int, output: OutputDraw, seed: int = 0
) -> SimWorkload:
    """Groups of ``sharing`` requests, a prefix each, in random order (BatchLLM, arXiv 2412.03594, section 6.1).

    The last group is smaller where ``sharing`` does not divide ``num_requests``.
    """
    rng = np.random.default_rng(seed)
    rows = rng.permutation(num_requests)
    tokens = np.zeros((num_requests, prefix_len + private_len), np.int32)
    tokens[:, 0] = rows // sharing
    # Ids count up, so that no token too much is shared. What comes after the first token of a run does not matter.
    tokens[:, prefix_len] = 1 + rows % sharing
    name = f"shared: {prefix_len} + {private_len} tokens, sharing {sharing}"
    offsets = np.arange(num_requests + 1, dtype=np.int64) * (prefix_len + private_len)
    return _with_outputs(name, TokenTable(tokens=tokens.reshape(-1), offsets=offsets), output, rng)


def unshared(*, prompt_len: int, num_requests: int, output: OutputDraw, seed: int = 0) -> SimWorkload:
    """Prompts that have nothing in common."""
    rng = np.random.default_rng(seed)
    tokens = np.zeros((num_requests, prompt_len), np.int32)
    tokens[:, 0] = np.arange(num_requests)
    offsets = np.arange(num_requests + 1, dtype=np.int64) * prompt_len
    return _with_outputs(
        f"unshared: {prompt_len} tokens", TokenTable(tokens=tokens.reshape(-1), offsets=offsets), output, rng
    )


_INSTRUCTION_LEN = 64
_PREFIX_LEN = 1570
_PRIVATE_LEN = 30
_SAVING = 0.581
_REPEATED_SHARING = 3.0


def snippet(*, num_requests: int, delay: float, output: OutputDraw, seed: int = 0) -> SimWorkload:
    """Queries about documents: one short instruction, a document, a query (BatchLLM, section 6.1, snippet generation).

    The paper states averages: 8000 queries, a prefix of about 1570 tokens, about 30 tokens of their own, a sharing
    degree of about 3, and an optimum of 58.1 %. All prefixes shared by 3 would save 65 %; so the degree is taken as an
    average over documents that are shared at all, and the others, with one query each, are as many as make the optimum
    58.1 %: a document has 1 query with probability s, else 2 + geometric (mean 1). Lengths are uniform within half of
    their mean. An instruction of 64 tokens stands before every document.

    The order of arrival is not stated either. Here each query comes at its document's time, which is random, plus an
    exponential delay.

    Args:
        num_requests: Queries.
        delay: Mean delay of a query, measured in queries; 0 brings a document's queries together.
        output: How long outputs are.
        seed: Seed of everything random.
    """
    rng = np.random.default_rng(seed)
    document_len = _PREFIX_LEN - _INSTRUCTION_LEN
    # Saved tokens of a query: its prefix, less its share of a document computed once.
    queries_per_document = document_len / (_PREFIX_LEN - _SAVING * (_PREFIX_LEN + _PRIVATE_LEN))
    is_single = (_REPEATED_SHARING - queries_per_document) / (_REPEATED_SHARING - 1)
    degrees = 1 + rng.geometric(0.5, num_requests)  # 2, 3, ... with mean 3
    degrees[rng.random(num_requests) < is_single] = 1
    num_documents = int(np.searchsorted(degrees.cumsum(), num_requests)) + 1
    document = np.repeat(np.arange(num_documents), degrees[:num_documents])[:num_requests]
    arrival = rng.random(num_documents)[document] * num_requests + rng.exponential(1.0, num_requests) * delay
    document = document[np.argsort(arrival, kind="stable")]
    lens = rng.integers(document_len // 2, document_len + document_len // 2 + 1, num_documents)[document]
    private_len = rng.integers(_PRIVATE_LEN // 2, _PRIVATE_LEN + _PRIVATE_LEN // 2 + 1, num_requests)
    offsets = starts_of(_INSTRUCTION_LEN + lens + private_len)
    tokens = np.zeros(int(offsets[-1]), np.int32)
    tokens[offsets[:-1] + _INSTRUCTION_LEN] = 1 + document
    tokens[offsets[:-1] + _INSTRUCTION_LEN + lens] = 1 + np.arange(num_requests)
    name = f"snippet: {num_requests} queries, delay {delay:g}"
    return _with_outputs(name, TokenTable(tokens=tokens, offsets=offsets), output, rng)


def _with_outputs(name: str, table: TokenTable, output: OutputDraw, rng: np.random.Generator) -> SimWorkload:
    output_len = output.draw(len(table), rng)
    return SimWorkload.from_lengths(
        name,
        table,
        output_len,
        max_new_len=np.full(len(table), output.limit, np.int64),
        known_len=output_len if output.is_known else None,
    )
