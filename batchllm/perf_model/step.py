"""What one forward step has to do, in counts.

Knows: tokens, rows and pairs. Must not know: models, devices, time.
Invariant: counts add up, so the sum of two works is a work.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class StepWork:
    """Counts of one step, or of many steps together.

    Attributes:
        num_prefill_tokens: Prompt tokens computed.
        num_decode_tokens: Rows that decode, each one token.
        num_sampled: Rows whose next token is sampled: those that decode, and prompts that end in this step.
        prefill_pairs: For each prompt token computed, the tokens that it attends to (itself is one), summed.
        decode_kv_tokens: For each row that decodes, the tokens that it attends to (itself is one), summed.
        kv_read_tokens: Tokens whose KV attention has to read from memory. Without shared-prefix attention the sum over
            the rows; with it, KV that rows share counts once.

    Raises:
        ValueError: Counts that no step can have.
    """

    num_prefill_tokens: int = 0
    num_decode_tokens: int = 0
    num_sampled: int = 0
    prefill_pairs: int = 0
    decode_kv_tokens: int = 0
    kv_read_tokens: int = 0

    def __post_init__(self) -> None:
        for name, count, least in (
            ("num_prefill_tokens", self.num_prefill_tokens, 0),
            ("num_decode_tokens", self.num_decode_tokens, 0),
            ("num_sampled", self.num_sampled, self.num_decode_tokens),
            ("prefill_pairs", self.prefill_pairs, self.num_prefill_tokens),
            ("decode_kv_tokens", self.decode_kv_tokens, self.num_decode_tokens),
            ("kv_read_tokens", self.kv_read_tokens, 0),
        ):
            if count < least:
                raise ValueError(f"{name} is {count}, but these counts need at least {least}: {self}")
        if self.num_sampled > self.num_tokens:
            raise ValueError(f"num_sampled is {self.num_sampled}, more than the {self.num_tokens} tokens computed")
        if (
            (self.prefill_pairs and not self.num_prefill_tokens)
            or (self.decode_kv_tokens and not self.num_decode_tokens)
            or (self.kv_read_tokens and not self.num_tokens)
        ):
            raise ValueError(f"only tokens that are computed attend to anything: {self}")

    @property
    def num_tokens(self) -> int:
        """Tokens computed."""
        return self.num_prefill_tokens + self.num_decode_tokens

    @property
    def num_pairs(self) -> int:
        """Pairs of a computed token and one it attends to."""
        return self.prefill_pairs + self.decode_kv_tokens

    def __add__(self, other: StepWork) -> StepWork:
        """The work of both."""
        return StepWork(
            num_prefill_tokens=self.num_prefill_tokens + other.num_prefill_tokens,
            num_decode_tokens=self.num_decode_tokens + other.num_decode_tokens,
            num_sampled=self.num_sampled + other.num_sampled,
            prefill_pairs=self.prefill_pairs + other.prefill_pairs,
            decode_kv_tokens=self.decode_kv_tokens + other.decode_kv_tokens,
            kv_read_tokens=self.kv_read_tokens + other.kv_read_tokens,
        )


def prefill_pairs(cached_len: int, num_tokens: int) -> int:
    """What ``num_tokens`` prompt tokens attend to after ``cached_len`` others: the sum of cached_len + 1, + 2, ...

    Raises:
        ValueError: A length is negative.
    """
    if cached_len < 0 or num_tokens < 0:
        raise ValueError(f"cached_len {cached_len} and num_tokens {num_tokens} must not be negative")
    return num_tokens * cached_len + num_tokens * (num_tokens + 1) // 2
