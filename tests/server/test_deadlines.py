"""Claims about the share that batches are given so that they end in their windows."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from batchllm.server.deadlines import LEAST, MOST, Advance, Deadlines
from tests.sizes import sized

_EXAMPLES = sized(30, 300)


def _run(rows_per_s_alone: float, num_rows: int, window_s: float) -> tuple[float, list[float]]:
    """A batch beside a flood that takes all that the share leaves it; when it is done, and the shares meanwhile.

    Args:
        rows_per_s_alone: Of the batch, if it had everything.
        num_rows: Of the batch.
        window_s: Its completion window.
    """
    deadlines, num_done, now_s, shares = Deadlines(), 0.0, 0.0, []
    while num_done < num_rows and now_s < 20 * window_s:
        advance = Advance("a", int(num_done), num_rows - int(num_done), window_s, window_s - now_s)
        shares.append(deadlines.update(now_s, [advance]))
        num_done += 0.5 * rows_per_s_alone * shares[-1]
        now_s += 0.5
    return now_s, shares


@settings(deadline=None, max_examples=_EXAMPLES)
@given(st.floats(0.2, 0.6), st.floats(300, 10_000))
def test_a_batch_ends_in_its_window_beside_a_flood(needed: float, window_s: float) -> None:
    """Of five minutes or more, where it needs more than the least share, and less than the most."""
    done_s, shares = _run(10.0, int(10.0 * needed * window_s), window_s)
    assert done_s <= window_s
    assert max(shares) > LEAST


@settings(deadline=None, max_examples=_EXAMPLES)
@given(st.floats(0.01, 0.09), st.floats(100, 10_000))
def test_a_batch_that_is_on_time_takes_no_more_than_it_has_anyhow(needed: float, window_s: float) -> None:
    _, shares = _run(10.0, int(10.0 * needed * window_s) + 1, window_s)
    assert set(shares) == {LEAST}


def test_a_batch_of_a_day_that_stands_still_for_a_minute_takes_no_more() -> None:
    deadlines = Deadlines()
    for second in range(0, 3000, 5):
        num_done = min(second, 1500) if second < 1560 else second - 60
        assert (
            deadlines.update(second, [Advance("a", num_done, 50_000 - num_done, 86_400.0, 86_400.0 - second)]) == LEAST
        )


def test_the_share_falls_again_when_the_late_batch_has_ended() -> None:
    deadlines, shares = Deadlines(), []
    for second in range(200):
        late = [Advance("late", second, 1000, 100.0, 100.0 - second)] if second < 100 else []
        shares.append(deadlines.update(second, late))
    assert max(shares) == MOST
    assert shares[-1] == LEAST


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 1000), st.floats(-100, 1e6)), max_size=50))
def test_the_share_stays_in_its_limits(history: list[tuple[int, int, float]]) -> None:
    """Whatever happens; a window may be over already, rows may be retried."""
    deadlines = Deadlines()
    for i, (num_done, num_left, seconds_left) in enumerate(history):
        share = deadlines.update(10.0 * i, [Advance("a", num_done, num_left, 1e6, seconds_left)])
        assert LEAST <= share <= MOST
