"""What of the owner's bounds is free: plain arithmetic.

A scratch disk is sparse, so its size is not set aside: an attempt counts with what matching promises it (core/matching.py,
need_of) or what its files take, whichever is more. A job that writes more than its promise gets it while the bound
holds; when it does not, the largest attempt is ended (agent.py), so the bound holds whatever guests do.
"""

from __future__ import annotations

from collections.abc import Iterable

from msgspec import Struct

from deskgrid.core.matching import need_of
from deskgrid.model.data import Blob
from deskgrid.model.jobs import JobSpec
from deskgrid.model.workers import Capacity

__all__ = ["NOTHING", "Usage", "excess_bytes", "fits", "free_capacity", "usage_of"]

NOTHING = Capacity(cpus=0, memory_bytes=0, disk_bytes=0)


class Usage(Struct, frozen=True):
    """What one attempt counts for: what it was promised, and what its files take."""

    promised: Capacity
    disk_bytes: int


def fits(need: Capacity, free: Capacity) -> bool:
    """Tell whether something fits in what is free."""
    return need.cpus <= free.cpus and need.memory_bytes <= free.memory_bytes and need.disk_bytes <= free.disk_bytes


def usage_of(spec: JobSpec, data: Iterable[Blob] = (), *, disk_bytes: int, needs_machine: bool) -> Usage:
    """Return what an attempt counts for. One whose machine is gone for good needs only the disk that it has."""
    return Usage(need_of(spec, data), disk_bytes) if needs_machine else Usage(NOTHING, disk_bytes)


def free_capacity(lent: Capacity, usages: Iterable[Usage], *, disk_free_bytes: int, reserve_bytes: int) -> Capacity:
    """Return what new attempts may use; all zero if not even one CPU or any disk is left.

    `disk_free_bytes` is what the owner's disk really has; promises that are not used yet come out of it, too.
    """
    usages = list(usages)
    cpus = lent.cpus - sum(usage.promised.cpus for usage in usages)
    memory = lent.memory_bytes - sum(usage.promised.memory_bytes for usage in usages)
    bound = lent.disk_bytes - sum(max(usage.promised.disk_bytes, usage.disk_bytes) for usage in usages)
    unused = sum(max(0, usage.promised.disk_bytes - usage.disk_bytes) for usage in usages)
    disk = min(bound, disk_free_bytes - reserve_bytes - unused)
    if cpus <= 0 or memory <= 0 or disk <= 0:
        return NOTHING
    return Capacity(cpus=cpus, memory_bytes=memory, disk_bytes=disk)


def excess_bytes(lent: Capacity, used_bytes: int, *, disk_free_bytes: int, reserve_bytes: int) -> tuple[int, int]:
    """Return by how much the attempts pass the owner's bound, and by how much the disk is short of the reserve; 0 if not."""
    return max(0, used_bytes - lent.disk_bytes), max(0, reserve_bytes - disk_free_bytes)
