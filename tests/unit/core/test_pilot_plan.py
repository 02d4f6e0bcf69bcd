"""How many pilots are sent: enough, never too many, none to a system that refuses; those that never come are called back."""

from __future__ import annotations

import random
from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.pilots import Sent, System, SystemState, after_failure, plan, suits
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.wire import WaitingClass
from deskgrid.units import GIB

ROOT = System(name="vm", packages=frozenset({"root"}), cpus=2, memory_bytes=2 * GIB, most=5, jobs_per_pilot=10, patience_s=600.0)
LARGE = System(name="slurm", packages=frozenset({"root", "geant4"}), cpus=16, memory_bytes=64 * GIB, most=3, jobs_per_pilot=100)


def waiting(**of: Any) -> WaitingClass:
    return WaitingClass(**{"jobs": 9, "kind": MachineKind.PROCESS, "network": Network.NONE, "cpus": 1, "memory_bytes": GIB, **of})


JOBS = waiting(jobs=25, packages=("root",))


def sent(name: str, *, joined: bool = False, at: float = 0.0, system: str = "vm") -> Sent:
    return Sent(name=name, system=system, sent_at=at, joined=joined)


def test_so_many_are_sent_as_the_waiting_jobs_need() -> None:
    assert plan([JOBS], [ROOT, LARGE], {}, [], now=1.0).send == {"vm": 3}
    assert plan([JOBS], [ROOT], {}, [sent("a"), sent("b", joined=True)], now=1.0).send == {"vm": 1}
    assert plan([JOBS] * 40, [ROOT], {}, [], now=1.0).send == {"vm": 5}


def test_class_goes_to_the_first_system_that_could_run_it() -> None:
    big = waiting(jobs=1, packages=("geant4",))
    assert plan([JOBS, big], [ROOT, LARGE], {}, [], now=1.0).send == {"vm": 3, "slurm": 1}
    for other in (
        waiting(packages=("cuda",)),
        waiting(cpus=64),
        waiting(memory_bytes=128 * GIB),
        waiting(kind=MachineKind.VM),
        waiting(network=Network.OVERLAY),
        waiting(platforms=("windows-x86_64",)),
        waiting(wall_time_s=14400.0),
        waiting(workers=1),
    ):
        assert plan([other], [ROOT, LARGE], {}, [], now=1.0).send == {}, other


def test_pilot_that_never_comes_is_called_back_and_nothing_is_sent_for_a_while() -> None:
    late, fresh = sent("late"), sent("fresh", at=500.0)
    found = plan([JOBS], [ROOT], {}, [late, fresh], now=700.0)
    assert (found.send, found.call_back, found.overdue) == ({}, ("late",), ("late",))
    refused = after_failure(SystemState(), now=700.0, rng=random.Random(1))
    assert refused.until > 700.0
    assert plan([JOBS], [ROOT], {"vm": refused}, [], now=701.0).send == {}
    assert plan([JOBS], [ROOT], {"vm": refused}, [], now=refused.until).send == {"vm": 3}
    again = after_failure(refused, now=refused.until, rng=random.Random(1))
    assert again.failures == 2 and again.until - refused.until > 0


def test_pilots_on_their_way_that_nobody_needs_are_called_back_and_those_at_work_are_not() -> None:
    there = [sent("a", at=1.0), sent("b", at=2.0), sent("c", joined=True)]
    assert plan([], [ROOT], {}, there, now=3.0).call_back == ("a", "b")
    few = waiting(jobs=15, packages=("root",))
    assert plan([few], [ROOT], {}, there, now=3.0).call_back == ("b",)


DEMANDS = st.lists(
    st.builds(
        waiting,
        jobs=st.integers(1, 10**7),
        packages=st.sets(st.sampled_from(["root", "geant4"])).map(tuple),
        cpus=st.integers(1, 32),
        memory_bytes=st.integers(0, 100 * GIB),
        workers=st.integers(0, 2),
    ),
    max_size=6,
)
SENT = st.lists(
    st.builds(
        Sent, name=st.uuids().map(str), system=st.sampled_from(["vm", "slurm"]), sent_at=st.floats(0, 1e4), joined=st.booleans()
    ),
    max_size=30,
)


@given(demands=DEMANDS, pilots=SENT, until=st.floats(0, 2e4), now=st.floats(0, 1e4))
def test_never_more_than_allowed_and_no_pilot_is_sent_and_called_back_at_once(
    demands: list[WaitingClass], pilots: list[Sent], until: float, now: float
) -> None:
    states = {"vm": SystemState(1, until)}
    found = plan(demands, [ROOT, LARGE], states, pilots, now=now)
    by_name = {one.name: one for one in pilots}
    for system in (ROOT, LARGE):
        mine = [one for one in pilots if one.system == system.name]
        back = [name for name in found.call_back if by_name[name].system == system.name]
        count = found.send.get(system.name, 0)
        assert count <= max(system.most - len(mine) + len(back), 0) and count <= 10
        assert not (count and back)
        assert not any(by_name[name].joined for name in back)
    assert until <= now or "vm" not in found.send
    assert set(found.overdue) <= set(found.call_back)
    needed = [one for one in demands if not one.workers and (suits(ROOT, one) or suits(LARGE, one))]
    if not needed:
        assert not found.send
