"""Which engine a live request goes to: the one that has computed most of its prompt, unless that has too much to do.

Knows beginnings of requests as bytes, and how many requests each engine has in flight; not what a request is, or how it
is sent.

INVARIANT: no engine has more than `MAX_LOAD_RATIO` times its share of what is in flight, rounded up (bounded loads:
Mirrokni, Thorup and Zadimoghaddam, *Consistent Hashing with Bounded Loads*, 2018); memory is that of `max_pieces`.
"""

from __future__ import annotations

import math
import threading
from collections import OrderedDict
from collections.abc import Collection, Iterator, Sequence

import xxhash

MAX_LOAD_RATIO = 1.25
PIECE_LEN = 128
"""Bytes of a request that are remembered as one: about the tokens of a sentence."""
_MAX_PIECES_OF_ONE = 4096


class LiveRouter:
    """Remembers which engine has which beginnings: a prefix tree, whose nodes are known by the hash of their path.
    Called from any thread.

    Args:
        max_pieces: Nodes that are kept; those that were used least recently go.
    """

    def __init__(self, *, max_pieces: int = 1_000_000) -> None:
        self._turn = threading.Lock()
        self._max_pieces = max_pieces
        self._holders: OrderedDict[int, set[int]] = OrderedDict()
        self._in_flight: dict[int, int] = {}
        self._num_given: dict[int, int] = {}

    def begin(self, prompt: bytes, engines: Collection[int]) -> int:
        """The engine for a request; it counts as in flight there until `end`.

        Args:
            prompt: What the request computes, from its beginning.
            engines: Numbers of those that are up; at least one.
        """
        pieces = list(pieces_of(prompt))
        with self._turn:
            num_in_flight = sum(self._in_flight.get(engine, 0) for engine in engines)
            most = math.ceil(MAX_LOAD_RATIO * (num_in_flight + 1) / len(engines))
            best = {engine for engine in engines if self._in_flight.get(engine, 0) < most}
            for piece in pieces:
                if not (best_here := self._holders.get(piece, set()) & best):
                    break
                best = best_here
            engine = min(best, key=lambda e: (self._in_flight.get(e, 0), self._num_given.get(e, 0), e))
            self._remember(pieces, engine, engines)
            self._in_flight[engine] = self._in_flight.get(engine, 0) + 1
            self._num_given[engine] = self._num_given.get(engine, 0) + 1
        return engine

    def end(self, engine: int) -> None:
        """A request has ended, however."""
        with self._turn:
            self._in_flight[engine] -= 1
            if not self._in_flight[engine]:
                del self._in_flight[engine]

    def learn(self, pieces: Sequence[int], engine: int) -> None:
        """An engine computes, for another than a live request, what these `pieces_of` begin."""
        with self._turn:
            self._remember(pieces, engine, None)

    def _remember(self, pieces: Sequence[int], engine: int, engines: Collection[int] | None) -> None:
        for piece in reversed(pieces):  # so that the end of a path goes before its beginning
            holders = self._holders.setdefault(piece, set())
            if engines is not None:
                holders.intersection_update(engines)
            holders.add(engine)
            self._holders.move_to_end(piece)
        while len(self._holders) > self._max_pieces:
            self._holders.popitem(last=False)


def pieces_of(prompt: bytes) -> Iterator[int]:
    """Hash of each whole piece and all before it."""
    path = 0
    for first in range(0, min(len(prompt), PIECE_LEN * _MAX_PIECES_OF_ONE) - PIECE_LEN + 1, PIECE_LEN):
        path = xxhash.xxh3_64_intdigest(prompt[first : first + PIECE_LEN], seed=path)
        yield path
