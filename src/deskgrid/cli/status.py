"""deskgrid status: the grid at a glance."""

from __future__ import annotations

from deskgrid.cli.connection import connected
from deskgrid.cli.output import Json, age, print_json, print_lines, print_table
from deskgrid.model.jobs import JobState
from deskgrid.model.wire import GridStatus
from deskgrid.model.workers import Worker
from deskgrid.units import format_duration, format_size

__all__ = ["status"]

_MOST_USERS = 20
_MOST_WORKERS = 1000
"""More are not listed: it is to be a glance."""


async def status(*, json: Json = False) -> None:
    """Show the grid at a glance: workers, jobs by state, throughput, storage.

    For example:

        deskgrid status
        deskgrid status --json | jq .jobs.waiting
    """
    async with connected() as grid:
        found = await grid.status()
        number = found.workers_online + found.workers_paused + found.workers_offline
        workers = await grid.workers() if number <= _MOST_WORKERS else ()
    if json:
        print_json({**{name: getattr(found, name) for name in found.__struct_fields__}, "workers": workers})
        return
    print_lines(*_overview(found), "")
    if number > _MOST_WORKERS:
        return
    rows = [_worker_row(worker) for worker in workers]
    print_table(("worker", "name", "state", "seen", "running", "lends", "driver"), rows, empty="no workers")


def _overview(found: GridStatus) -> list[str]:
    jobs = ", ".join(f"{found.jobs.get(state, 0)} {state.value}" for state in JobState)
    lent = found.lent
    return [
        f"workers  {found.workers_online} online, {found.workers_paused} paused, {found.workers_offline} offline",
        f"lent     {lent.cpus} CPUs, {format_size(lent.memory_bytes)} memory, {format_size(lent.disk_bytes)} disk",
        f"jobs     {jobs}",
        f"done     {found.completed_last_hour} in the last hour",
        *_storage(found),
    ]


def _storage(found: GridStatus) -> list[str]:
    place = found.storage_place or f"{format_size(found.storage_free_bytes)} free"
    lines = [f"storage  {format_size(found.storage_bytes)} used, {place}"]
    if any(found.storage.values()):
        lines.append("         " + ", ".join(f"{kind} {format_size(size)}" for kind, size in found.storage.items() if size))
    soon = [f"{format_size(each.size_bytes)} within {format_duration(each.within_s)}" for each in found.leaving if each.size_bytes]
    if soon:
        lines.append("         goes: " + ", then ".join(soon))
    most = sorted(found.storage_users.items(), key=lambda user: -user[1])[:_MOST_USERS]
    return lines + [f"         {name} keeps {format_size(size)}" for name, size in most if size]


def _worker_row(worker: Worker) -> tuple[object, ...]:
    profile = worker.profile
    lends = "-" if profile is None else f"{profile.lent.cpus} CPUs, {format_size(profile.lent.memory_bytes)}"
    return worker.id, worker.name, worker.state.value, age(worker.seen_at or None), worker.running, lends, _drivers(worker)


def _drivers(worker: Worker) -> str:
    """Return the drivers that work, or why none does."""
    prints = worker.profile.drivers if worker.profile else ()
    usable = [f"{p.driver.value} ({p.accelerator})" if p.accelerator else p.driver.value for p in prints if p.usable]
    return ", ".join(usable) or "; ".join(f"{p.driver.value}: {p.reason}" for p in prints) or "-"
