"""A live request goes to the engine that has its beginning, and no engine gets much more than its share."""

from __future__ import annotations

import math
from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from batchllm.distributed.live_router import MAX_LOAD_RATIO, PIECE_LEN, LiveRouter

_SYSTEMS = [bytes([65 + i]) * (3 * PIECE_LEN) for i in range(6)]
keys = st.tuples(st.sampled_from(_SYSTEMS), st.binary(max_size=2 * PIECE_LEN)).map(b"".join)


@given(st.lists(st.tuples(keys, st.booleans(), st.sets(st.integers(0, 5), min_size=1)), max_size=60))
def test_no_engine_has_more_than_its_bounded_share(requests: list[tuple[bytes, bool, set[int]]]) -> None:
    """Whoever comes and goes, and whatever is asked for: of those that are up, when a request is given."""
    router, in_flight = LiveRouter(), Counter[int]()
    for key, ends, engines in requests:
        engine = router.begin(key, engines)
        assert engine in engines
        in_flight[engine] += 1
        share = sum(in_flight[e] for e in engines) / len(engines)
        assert in_flight[engine] <= math.ceil(MAX_LOAD_RATIO * share)
        if ends:
            router.end(engine)
            in_flight[engine] -= 1


@given(st.permutations(_SYSTEMS * 4), st.integers(1, 6))
def test_one_after_another_each_beginning_has_one_engine_and_engines_have_as_many(
    systems: list[bytes], num_engines: int
) -> None:
    router = LiveRouter()
    engines_of: dict[bytes, set[int]] = {}
    for number, system in enumerate(systems):
        engine = router.begin(system + b"question %d" % number, range(num_engines))
        router.end(engine)
        engines_of.setdefault(system, set()).add(engine)
    assert all(len(engines) == 1 for engines in engines_of.values())
    if num_engines == 1:
        return
    assert len(set.union(*engines_of.values())) >= 2


def test_the_longest_beginning_counts() -> None:
    """Two engines have the system prompt, one the document behind it too."""
    router, system = LiveRouter(), b"s" * (2 * PIECE_LEN)
    document = system + b"d" * PIECE_LEN
    first = [router.begin(system, [0, 1]) for _ in range(2)]
    second = router.begin(document, [0, 1])
    assert first == [1 - second] * 2  # which has its share
    for engine in (*first, second):
        router.end(engine)
    assert router.begin(document + b"?", [0, 1]) == second


def test_an_engine_that_is_gone_is_asked_for_nothing() -> None:
    router, key = LiveRouter(), b"k" * (4 * PIECE_LEN)
    first = router.begin(key, [0, 1])
    router.end(first)
    assert router.begin(key, [1 - first]) == 1 - first


@given(st.lists(st.binary(min_size=PIECE_LEN, max_size=20 * PIECE_LEN), max_size=40))
def test_memory_is_bounded_and_the_last_are_known(given_keys: list[bytes]) -> None:
    router = LiveRouter(max_pieces=24)
    for key in given_keys:
        engine = router.begin(key, [0, 1, 2])
        router.end(engine)
        assert len(router._holders) <= 24
        again = router.begin(key, [0, 1, 2])
        router.end(again)
        assert again == engine
