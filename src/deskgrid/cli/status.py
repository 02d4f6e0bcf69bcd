"""deskgrid status: the grid at a glance."""

from __future__ import annotations

from deskgrid.cli.connection import connected
from deskgrid.cli.output import Json, age, print_json, print_lines, print_table
from deskgrid.model.jobs import JobState
from deskgrid.model.wire import GridStatus
from deskgrid.model.workers import Worker
from deskgrid.units import format_size

__all__ = ["status"]


async def status(*, json: Json = False) -> None:
    """Show the grid at a glance: workers, jobs by state, throughput, storage.

    For example:

        deskgrid status
        deskgrid status --json | jq .jobs.waiting
    """
    async with connected() as grid:
        found, workers = await grid.status(), await grid.workers()
    if json:
        print_json({**{name: getattr(found, name) for name in found.__struct_fields__}, "workers": workers})
        return
    print_lines(*_overview(found), "")
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
        f"storage  {format_size(found.storage_bytes)} used, {format_size(found.storage_free_bytes)} free",
    ]


def _worker_row(worker: Worker) -> tuple[object, ...]:
    profile = worker.profile
    lends = "-" if profile is None else f"{profile.lent.cpus} CPUs, {format_size(profile.lent.memory_bytes)}"
    return worker.id, worker.name, worker.state.value, age(worker.seen_at or None), worker.running, lends, _drivers(worker)


def _drivers(worker: Worker) -> str:
    """Return the drivers that work, or why none does."""
    prints = worker.profile.drivers if worker.profile else ()
    usable = [f"{p.driver.value} ({p.accelerator})" if p.accelerator else p.driver.value for p in prints if p.usable]
    return ", ".join(usable) or "; ".join(f"{p.driver.value}: {p.reason}" for p in prints) or "-"
