"""Fair share: what was used fades, what runs counts at once, weights are kept."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.shares import Standings, Use, faded
from deskgrid.model.ids import UserId

ANN, BOB = UserId(1), UserId(2)
amounts = st.floats(0, 1e9)
times = st.floats(0, 1e9)


@given(amounts, times, times, st.floats(1, 1e7))
def test_use_only_ever_fades(cpu_s: float, at: float, now: float, half_life_s: float):
    assert 0 <= faded(cpu_s, at, now=now, half_life_s=half_life_s) <= cpu_s
    assert faded(cpu_s, now + 5, now=now, half_life_s=half_life_s) == cpu_s


def test_use_counts_half_after_the_half_life():
    assert faded(100.0, 0.0, now=50.0, half_life_s=50.0) == pytest.approx(50.0)


@given(amounts, times, times, times)
def test_fading_in_two_steps_is_fading_in_one(cpu_s: float, at: float, first_s: float, second_s: float):
    once = faded(cpu_s, at, now=at + first_s + second_s, half_life_s=1e6)
    twice = faded(faded(cpu_s, at, now=at + first_s, half_life_s=1e6), at + first_s, now=at + first_s + second_s, half_life_s=1e6)
    assert once == pytest.approx(twice, rel=1e-6, abs=1e-6)


def test_who_used_less_goes_first():
    standings = Standings([Use(ANN, "", 100.0, 0.0), Use(BOB, "", 99.0, 0.0)], {}, now=0.0, half_life_s=1.0)
    assert standings.order("", BOB) < standings.order("", ANN)


def test_group_is_judged_as_a_whole_and_then_its_users():
    uses = [Use(ANN, "hep", 80.0, 0.0), Use(BOB, "hep", 40.0, 0.0), Use(BOB, "", 100.0, 0.0)]
    standings = Standings(uses, {}, now=0.0, half_life_s=1.0)
    assert standings.order("", BOB) < standings.order("hep", BOB) < standings.order("hep", ANN)


@given(st.lists(st.tuples(st.sampled_from(["", "hep"]), st.sampled_from([ANN, BOB]), st.integers(1, 8))))
def test_what_is_given_out_counts_as_what_runs(taken: list[tuple[str, UserId, int]]):
    one_by_one = Standings((), {}, now=0.0, half_life_s=1.0)
    running: dict[tuple[str, UserId], int] = {}
    for team, user, cpus in taken:
        one_by_one.take(team, user, cpus)
        running[team, user] = running.get((team, user), 0) + cpus
    at_once = Standings((), running, now=0.0, half_life_s=1.0)
    for team, user in running:
        assert one_by_one.order(team, user) == pytest.approx(at_once.order(team, user))
