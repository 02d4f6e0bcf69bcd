"""A machine uses its share of the CPU and no more, whatever it does."""

from __future__ import annotations

from random import Random

from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.throttle import BURST_S, Throttle


@given(
    rate=st.floats(0.05, 8),
    looks=st.lists(st.tuples(st.floats(0.001, 0.3), st.floats(0, 1)), min_size=1, max_size=300),
    cpus=st.integers(1, 16),
)
def test_use_never_passes_the_share_by_more_than_a_burst_and_one_look(
    rate: float, looks: list[tuple[float, float]], cpus: int
) -> None:
    throttle, used, now, runs = Throttle(rate, used_s=5.0, now=100.0), 0.0, 0.0, True
    for step, wish in looks:
        now += step
        used += step * cpus * wish if runs else 0.0
        runs = throttle.may_run(5.0 + used, now=100.0 + now)
        longest = max(step for step, _ in looks)
        assert used <= rate * (now + BURST_S) + cpus * longest + 1e-6


@given(rate=st.floats(0.05, 1), rng=st.randoms(use_true_random=True))
def test_machine_that_wants_all_gets_its_whole_share(rate: float, rng: Random) -> None:
    steps = [rng.uniform(0.02, 0.06) for _ in range(400)]
    throttle, used, now, runs = Throttle(rate, used_s=0.0, now=0.0), 0.0, 0.0, True
    for step in steps:
        now += step
        used += step if runs else 0.0
        runs = throttle.may_run(used, now=now)
    assert abs(used - rate * now) <= rate * BURST_S + 0.07


def test_machine_that_rested_may_not_make_up_for_it() -> None:
    throttle = Throttle(0.5, used_s=0.0, now=0.0)
    assert throttle.may_run(0.0, now=1000.0)
    assert not throttle.may_run(0.2, now=1000.1)
