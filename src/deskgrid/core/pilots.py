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
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.wire import WaitingClass

__all__ = ["Plan", "Sent", "System", "SystemState", "after_failure", "plan", "suits"]

_BURST = 10
_FIRST_S, _LONGEST_S = 60.0, 3600.0
_BEGINNING_S = 60.0
"""Of a pilot's life, before it has its first job."""


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
    lifetime_s: float = 14400.0
    """Of a pilot, from when it begins."""


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
    """Seconds since 1970."""
    joined: bool = False
    reference: str = ""
    """By what the system knows it; empty: perhaps it never got there."""


class Plan(Struct, frozen=True):
    """What is to be done now."""

    send: Mapping[str, int]
    """How many, by system."""
    call_back: tuple[str, ...]
    """Pilots, by name."""
    overdue: tuple[str, ...]
    """Those among them that never came."""


def suits(system: System, wanted: WaitingClass) -> bool:
    """Tell whether a system's pilots could run jobs of a class. They run processes without a network."""
    return (
        wanted.kind is MachineKind.PROCESS
        and wanted.network is Network.NONE
        and system.packages.issuperset(wanted.packages)
        and wanted.cpus <= system.cpus
        and wanted.memory_bytes <= system.memory_bytes
        and (not wanted.platforms or system.platform in wanted.platforms)
        and wanted.wall_time_s + _BEGINNING_S <= system.lifetime_s
    )


def plan(
    waiting: Iterable[WaitingClass],
    systems: Sequence[System],
    states: Mapping[str, SystemState],
    sent: Sequence[Sent],
    *,
    now: float,
) -> Plan:
    """Decide what is sent and called back."""
    jobs = dict.fromkeys((system.name for system in systems), 0)
    for wanted in waiting:
        first = next((system for system in systems if suits(system, wanted)), None)
        if first is not None and wanted.workers == 0:
            jobs[first.name] += wanted.jobs
    send: dict[str, int] = {}
    call_back: list[str] = []
    overdue: list[str] = []
    for system in systems:
        mine = [one for one in sent if one.system == system.name]
        late = [one for one in mine if not one.joined and now - one.sent_at >= system.patience_s]
        coming = [one for one in mine if not one.joined and one not in late]
        joined = sum(one.joined for one in mine)
        needed = min(math.ceil(jobs[system.name] / system.jobs_per_pilot), system.most)
        overdue += [one.name for one in late]
        call_back += [one.name for one in late]
        too_many = min(joined + len(coming) - needed, len(coming))
        if too_many > 0:
            call_back += [one.name for one in sorted(coming, key=lambda one: one.sent_at)[-too_many:]]
        elif (
            (missing := min(needed - joined - len(coming), _BURST)) > 0
            and states.get(system.name, SystemState()).until <= now
            and not late
        ):
            send[system.name] = missing
    return Plan(send, tuple(call_back), tuple(overdue))


def after_failure(state: SystemState, *, now: float, rng: Chance) -> SystemState:
    """Return what is known of a system after it refused a pilot, or one never came."""
    failures = state.failures + 1
    return SystemState(failures, now + delay_s(failures, first_s=_FIRST_S, max_s=_LONGEST_S, rng=rng))
