"""How many pilots are sent where, and which are called back. Pure.

Rules:

1. Demand are the waiting jobs of a class that no worker online could run, pilots aside. Each class belongs to the first system whose pilots could
   run it.
2. A system has as many pilots as its demand needs, `jobs_per_pilot` a pilot, at most `most`; those on their way count. At most `_BURST` are sent in
   one round.
3. A pilot that has not joined within `patience_s` never comes: it is called back, and that is a failure. So is a system that refuses. After a failure
   nothing is sent there for a time that doubles with each, up to `_LONGEST_S`; a pilot that joins ends that.
4. Pilots on their way for which there is no demand any more are called back, the last first. Those at work end by themselves.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from deskgrid.core.backoff import Chance, delay_s

__all__ = ["Demand", "Plan", "Sent", "System", "SystemState", "plan", "suits"]

_BURST = 10
_FIRST_S, _LONGEST_S = 60.0, 3600.0


class Demand(Struct, frozen=True, kw_only=True):
    """Waiting jobs of one class."""

    jobs: int
    packages: frozenset[str] = frozenset()
    cpus: int = 1
    memory_bytes: int = 0
    is_process: bool = True
    platforms: frozenset[str] = frozenset()
    """Where they may run; none: anywhere."""
    needs_network: bool = False
    workers: int = 0
    """Online, that could run them; pilots aside."""


class System(Struct, frozen=True, kw_only=True):
    """What one system's pilots are."""

    name: str
    packages: frozenset[str] = frozenset()
    cpus: int = 1
    memory_bytes: int = 0
    """For jobs."""
    platform: str = "linux-x86_64"
    most: int = 10
    jobs_per_pilot: int = 10
    patience_s: float = 3600.0


class SystemState(Struct, frozen=True):
    """What is known of how a system takes pilots."""

    failures: int = 0
    until: float = 0.0
    """Nothing is sent before."""


class Sent(Struct, frozen=True, kw_only=True):
    """A pilot that was sent and has not ended."""

    name: str
    system: str
    sent_at: float
    joined: bool = False


class Plan(Struct, frozen=True):
    """What is to be done now."""

    send: Mapping[str, int]
    """How many, by system."""
    call_back: tuple[str, ...]
    """Pilots, by name."""
    overdue: tuple[str, ...]
    """Those among them that never came."""


def suits(system: System, demand: Demand) -> bool:
    """Tell whether a system's pilots could run jobs of a class."""
    return (
        demand.is_process
        and not demand.needs_network
        and demand.packages <= system.packages
        and demand.cpus <= system.cpus
        and demand.memory_bytes <= system.memory_bytes
        and (not demand.platforms or system.platform in demand.platforms)
    )


def plan(
    demands: Iterable[Demand],
    systems: Sequence[System],
    states: Mapping[str, SystemState],
    sent: Sequence[Sent],
    *,
    now: float,
) -> Plan:
    """Decide what is sent and called back."""
    jobs = dict.fromkeys((system.name for system in systems), 0)
    for demand in demands:
        first = next((system for system in systems if suits(system, demand)), None)
        if first is not None and demand.workers == 0:
            jobs[first.name] += demand.jobs
    send: dict[str, int] = {}
    call_back: list[str] = []
    overdue: list[str] = []
    for system in systems:
        mine = [one for one in sent if one.system == system.name]
        late = [one for one in mine if not one.joined and now - one.sent_at >= system.patience_s]
        coming = [one for one in mine if not one.joined and one not in late]
        joined = sum(one.joined for one in mine)
        wanted = min(math.ceil(jobs[system.name] / system.jobs_per_pilot), system.most)
        overdue += [one.name for one in late]
        call_back += [one.name for one in late]
        too_many = min(joined + len(coming) - wanted, len(coming))
        if too_many > 0:
            call_back += [one.name for one in sorted(coming, key=lambda one: one.sent_at)[-too_many:]]
        elif (
            (missing := min(wanted - joined - len(coming), _BURST)) > 0
            and states.get(system.name, SystemState()).until <= now
            and not late
        ):
            send[system.name] = missing
    return Plan(send, tuple(call_back), tuple(overdue))


def after_failure(state: SystemState, *, now: float, rng: Chance) -> SystemState:
    """Return what is known of a system after it refused a pilot, or one never came."""
    failures = state.failures + 1
    return SystemState(failures, now + delay_s(failures, first_s=_FIRST_S, max_s=_LONGEST_S, rng=rng))


def after_joining(_state: SystemState) -> SystemState:
    """Return what is known of a system after one of its pilots joined."""
    return SystemState()
