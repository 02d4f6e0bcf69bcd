"""How often workers call."""

from __future__ import annotations

from itertools import pairwise

import msgspec
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.pacing import Terms, pace

TERMS = Terms(interval_s=20.0, max_interval_s=300.0, lease_s=60.0, calls_per_s=500.0, max_held=2000)


@given(st.integers(0, 200_000), st.floats(0, 1), st.booleans(), st.integers(1, 200_000), st.floats(0, 2e9))
def test_a_lease_outlives_two_lost_calls(online: int, part: float, is_busy: bool, number: int, now: float):
    told = pace(TERMS, online=online, busy=int(online * part), is_busy=is_busy, number=number, now=now)
    assert told.lease_s >= TERMS.lease_s
    assert 0.8 * TERMS.interval_s <= told.interval_s <= TERMS.max_interval_s
    if is_busy:
        assert told.interval_s * 3 <= told.lease_s * 1.0001


def test_small_grid_calls_as_often_as_the_operator_says():
    told = [pace(TERMS, online=50, busy=5, is_busy=False, number=number, now=0.0) for number in range(1, 51)]
    assert all(16 <= one.interval_s <= 20 and one.hold_s == 60 for one in told)


def test_hundred_thousand_workers_stay_below_the_calls_aimed_at():
    numbers = range(1, 100_001)
    told = [pace(TERMS, online=100_000, busy=10_000, is_busy=number <= 10_000, number=number, now=0.0) for number in numbers]
    assert sum(1 / one.interval_s for one in told) < TERMS.calls_per_s * 1.1
    assert 0 < sum(one.hold_s > 0 for one in told) <= TERMS.max_held


def test_nobody_calls_in_step():
    told = sorted(pace(TERMS, online=1000, busy=0, is_busy=False, number=number, now=77.0).interval_s for number in range(1, 1001))
    gaps = [after - before for before, after in pairwise(told)]
    assert max(gaps) < 0.02


def test_without_room_for_wake_calls_there_are_none():
    terms = msgspec.structs.replace(TERMS, max_held=0)
    assert pace(terms, online=1, busy=0, is_busy=False, number=1, now=0.0).hold_s == 0
