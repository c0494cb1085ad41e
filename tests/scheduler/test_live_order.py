"""Live requests that share a prefix start one after the other, and nobody waits for ever."""

from __future__ import annotations

from array import array
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from batchllm.scheduler.live_order import MIN_SHARED_LEN, LiveOrder

_ALL = {"max_requests": 1 << 30, "max_tokens": 1 << 30, "max_ahead_tokens": 1 << 30}


def _tokens(*parts: tuple[int, int]) -> array[int]:
    """Runs of one token each: (token, how many)."""
    return array("q", [token for token, num in parts for _ in range(num)])


class _Cache:
    """Prompts that have started, and how much of another they hold."""

    def __init__(self) -> None:
        self.held: list[tuple[object, array[int]]] = []

    def cached_len(self, namespace: object, tokens: array[int]) -> int:
        longest = 0
        for other, held in self.held:
            if other == namespace:
                same = next((i for i, (a, b) in enumerate(zip(held, tokens, strict=False)) if a != b), None)
                longest = max(longest, min(len(held), len(tokens)) if same is None else same)
        return min(longest, max(len(tokens) - 1, 0))


class _Queue:
    """A `LiveOrder` with prompts by name."""

    def __init__(self, page_size: int = 1) -> None:
        self.order: LiveOrder[str] = LiveOrder(page_size)
        self.cache = _Cache()
        self.prompts: dict[str, tuple[object, array[int]]] = {}

    def add(self, name: str, tokens: array[int], namespace: object = None) -> None:
        self.prompts[name] = (namespace, tokens)
        self.order.add(name, tokens, namespace, self.cache.cached_len(namespace, tokens))

    def choose(self, **limits: int) -> list[str]:
        return self.order.choose(lambda name: self.cache.cached_len(*self.prompts[name]), **(_ALL | limits))

    def start(self, names: list[str]) -> None:
        for name in names:
            self.order.remove(name, has_started=True)
            self.cache.held.append(self.prompts.pop(name))

    def step(self, **limits: int) -> list[str]:
        names = self.choose(**limits)
        self.start(names)
        return names


def test_what_shares_nothing_starts_in_order_of_arrival() -> None:
    queue = _Queue()
    for i in range(200):
        queue.add(str(i), _tokens((i + 10, 50)))
    assert queue.choose() == [str(i) for i in range(200)]


def test_one_computes_a_shared_prefix_and_the_others_follow_in_the_next_step() -> None:
    queue = _Queue()
    for i in range(4):
        queue.add(str(i), _tokens((1, 100), (i + 10, 40)))
    assert queue.step() == ["0"]
    assert queue.step() == ["1", "2", "3"]


def test_groups_start_one_after_the_other_whatever_order_they_came_in() -> None:
    """With room for one group's prefix at a time."""
    queue = _Queue()
    for i in range(30):
        queue.add(str(i), _tokens((i % 3 + 1, 100), (i + 10, 40)))
    order: list[str] = []
    while len(queue.order):
        order += queue.step(max_ahead_tokens=1)
    groups = [int(name) % 3 for name in order]
    assert sum(a != b for a, b in pairwise(groups)) == 2


def test_little_in_common_is_nothing_to_wait_for() -> None:
    queue = _Queue()
    for i in range(4):
        queue.add(str(i), _tokens((1, MIN_SHARED_LEN - 1), (i + 10, 40)))
    assert queue.choose() == ["0", "1", "2", "3"]


def test_less_than_a_page_in_common_is_nothing_to_wait_for() -> None:
    queue = _Queue(page_size=64)
    for i in range(2):
        queue.add(str(i), _tokens((1, 63), (i + 10, 40)))
    assert queue.choose() == ["0", "1"]


def test_namespaces_share_nothing() -> None:
    queue = _Queue()
    queue.add("a", _tokens((1, 100)), "one")
    queue.add("b", _tokens((1, 100)), "other")
    queue.add("c", _tokens((1, 100)), "one")
    assert queue.choose() == ["a", "b"]


def test_the_nearest_relatives_of_the_last_one_come_first() -> None:
    """Then their neighbours under the same prefix, then everyone else."""
    queue = _Queue()
    far, near = _tokens((1, 100), (2, 100)), _tokens((1, 100), (3, 100))
    queue.add("first", near + _tokens((4, 40)))
    queue.add("stranger", _tokens((9, 100)))
    queue.add("far", far + _tokens((5, 40)))
    queue.add("near", near + _tokens((6, 40)))
    assert queue.step(max_requests=1) == ["first"]
    assert queue.choose() == ["near", "far", "stranger"]


def test_a_cached_group_comes_before_a_larger_one() -> None:
    queue = _Queue()
    queue.add("old", _tokens((1, 100), (5, 40)))
    queue.start(["old"])
    for i in range(3):
        queue.add(f"many {i}", _tokens((2, 100), (i + 10, 40)))
    queue.add("cached", _tokens((1, 100), (6, 40)))
    assert queue.choose()[0] == "cached"


def test_a_request_that_shares_with_a_prompt_in_pieces_waits_for_it() -> None:
    """As long as that one computes what it could read."""
    queue = _Queue()
    long = _tokens((1, 500))
    queue.add("follower", _tokens((1, 300), (2, 40)))
    queue.add("stranger", _tokens((3, 40)))
    limits = {"cached_len": lambda name: 100, **_ALL}
    assert queue.order.choose(beside=(long, None, 100), **limits) == ["stranger"]
    assert queue.order.choose(beside=(long, None, 299), **limits) == ["stranger"]
    late = queue.order.choose(beside=(long, None, 300), **limits)
    assert sorted(late) == ["follower", "stranger"]


def test_empty_prompts_share_nothing() -> None:
    """Where a request cannot be told apart by its tokens."""
    queue = _Queue()
    for i in range(3):
        queue.add(str(i), array("q"))
    assert queue.choose() == ["0", "1", "2"]


def test_nobody_is_passed_over_for_ever() -> None:
    """A stream of arrivals in one group does not keep out the one request of another."""
    queue = _Queue()
    queue.add("popular 0", _tokens((1, 100), (10, 40)))
    queue.step()
    queue.add("lonely", _tokens((2, 100)))
    num_passed = 0
    for i in range(1, 500):
        queue.add(f"popular {i}", _tokens((1, 100), (i + 10, 40)))
        if queue.step(max_requests=1) == ["lonely"]:
            break
        num_passed += 1
    assert num_passed == 64 + 2 * 2


def _common(a: tuple[object, array[int]], b: tuple[object, array[int]]) -> int:
    cache = _Cache()
    cache.held = [a]
    return cache.cached_len(*b)


@given(
    st.lists(
        st.tuples(
            st.integers(0, 1),
            st.lists(st.tuples(st.integers(1, 2), st.integers(20, 60)), min_size=0, max_size=4),
            st.integers(0, 3),
        ),
        max_size=40,
    ),
    st.integers(1, 5),
    st.randoms(use_true_random=False),
)
def test_everyone_starts_once_and_no_step_computes_a_prefix_twice(
    arrivals: list[tuple[int, list[tuple[int, int]], int]], max_requests: int, rng: object
) -> None:
    """Whatever comes, goes and starts in between; what waits is counted right."""
    queue, started, gone = _Queue(), [], []
    for number, (namespace, parts, num_steps) in enumerate(arrivals):
        queue.add(str(number), _tokens(*parts), namespace)
        for _ in range(num_steps):
            names = queue.choose(max_requests=max_requests)
            assert len(names) <= max_requests and (names or not len(queue.order))
            prompts = [queue.prompts[name] for name in names]
            for i, prompt in enumerate(prompts):
                num_cached = queue.cache.cached_len(*prompt)
                for other in prompts[:i]:
                    assert _common(other, prompt) < num_cached + MIN_SHARED_LEN
            queue.start(names)
            started += names
        if number % 7 == 6 and len(queue.order):
            name = next(iter(queue.order))
            queue.order.remove(name, has_started=False)
            del queue.prompts[name]
            gone.append(name)
        assert set(queue.order) == set(queue.prompts)
        assert queue.order.num_tokens == sum(len(tokens) for _, tokens in queue.prompts.values())
    while len(queue.order):
        names = queue.step()
        assert names
        started += names
    assert sorted(started + gone, key=int) == [str(i) for i in range(len(arrivals))]
