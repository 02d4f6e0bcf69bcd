"""Which waiting jobs a worker gets: by requirement class, in fair order over users.

Waiting jobs are counted per queue: one requirement class of one user. A worker's ask is matched with the queues, so the work
does not depend on how many jobs wait. Rules:

1. A queue fits if every need is within what the worker has free, and a usable driver confines the network asked for.
2. Among the queues that fit, the user with the fewest live attempts comes first; then queues whose disk the worker has in its
   cache; then the queue whose job has waited longest.
3. Nothing is promised twice: each job taken lessens what is free.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from msgspec import Struct

from deskgrid.model.ids import Sha256, UserId
from deskgrid.model.jobs import JobSpec
from deskgrid.model.machines import Fingerprint, MachineKind, Network
from deskgrid.model.workers import Capacity
from deskgrid.units import GIB

__all__ = ["Ask", "Queue", "Requirement", "Share", "match", "need_of", "requirement_of", "without"]

_SCRATCH_PROMISE_BYTES = GIB


class Requirement(Struct, frozen=True, order=True):
    """What a job needs of a worker; jobs with equal requirements form a class."""

    kind: MachineKind
    network: Network
    cpus: int
    memory_bytes: int
    disk_bytes: int
    disk: Sha256


class Queue(Struct, frozen=True):
    """The waiting jobs of one class and one user."""

    class_id: int
    owner_id: UserId
    requirement: Requirement
    waiting: int
    oldest: int
    """Id of the job that has waited longest; a smaller one goes first."""


class Ask(Struct, frozen=True):
    """What a worker offers."""

    free: Capacity
    drivers: tuple[Fingerprint, ...]
    cached: frozenset[Sha256]


class Share(Struct, frozen=True):
    """Take `count` jobs of a queue, the oldest first."""

    class_id: int
    owner_id: UserId
    count: int


def need_of(spec: JobSpec) -> Capacity:
    """Return what a job takes of a worker's bounds while it runs.

    A scratch disk is sparse: of its size only the first GiB is promised. A job that writes more gets it while the owner's
    bound allows it.
    """
    machine = spec.machine
    return Capacity(
        cpus=machine.cpus,
        memory_bytes=machine.memory_bytes,
        disk_bytes=min(machine.scratch_bytes, _SCRATCH_PROMISE_BYTES),
    )


def requirement_of(spec: JobSpec, disk: Sha256) -> Requirement:
    """Return the class key of a job."""
    need = need_of(spec)
    return Requirement(
        kind=spec.machine.kind,
        network=spec.machine.network,
        cpus=need.cpus,
        memory_bytes=need.memory_bytes,
        disk_bytes=need.disk_bytes,
        disk=disk,
    )


def match(ask: Ask, queues: Sequence[Queue], live: Mapping[UserId, int], *, limit: int) -> list[Share]:
    """Return which jobs the worker gets, at most `limit` in all. `live` counts the live attempts of each user."""
    free = ask.free
    waiting = {index: queue.waiting for index, queue in enumerate(queues) if queue.waiting > 0 and _runs(ask.drivers, queue)}
    used = dict(live)
    taken: dict[int, int] = {}
    for _ in range(limit):
        fitting = [index for index in waiting if _fits(queues[index].requirement, free)]
        if not fitting:
            break
        best = min(fitting, key=lambda index: _order(queues[index], ask, used))
        queue = queues[best]
        free = without(free, [_needed(queue.requirement)])
        used[queue.owner_id] = used.get(queue.owner_id, 0) + 1
        taken[best] = taken.get(best, 0) + 1
        waiting[best] -= 1
        waiting = {index: count for index, count in waiting.items() if count > 0}
    return [Share(queues[index].class_id, queues[index].owner_id, count) for index, count in taken.items()]


def _order(queue: Queue, ask: Ask, used: Mapping[UserId, int]) -> tuple[int, bool, int]:
    return used.get(queue.owner_id, 0), queue.requirement.disk not in ask.cached, queue.oldest


def _runs(drivers: Iterable[Fingerprint], queue: Queue) -> bool:
    wanted = queue.requirement
    return any(driver.usable and wanted.kind in driver.kinds and wanted.network in driver.networks for driver in drivers)


def _fits(wanted: Requirement, free: Capacity) -> bool:
    return wanted.cpus <= free.cpus and wanted.memory_bytes <= free.memory_bytes and wanted.disk_bytes <= free.disk_bytes


def _needed(wanted: Requirement) -> Capacity:
    return Capacity(cpus=wanted.cpus, memory_bytes=wanted.memory_bytes, disk_bytes=wanted.disk_bytes)


def without(free: Capacity, needs: Iterable[Capacity]) -> Capacity:
    """Return what is left of `free` once all needs are met."""
    for need in needs:
        free = Capacity(
            cpus=free.cpus - need.cpus,
            memory_bytes=free.memory_bytes - need.memory_bytes,
            disk_bytes=free.disk_bytes - need.disk_bytes,
        )
    return free
