"""Servers and workers killed again and again while arrays run: no job is lost, none has two results, and counts add up all the time."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest

from deskgrid.client.grid import Grid
from deskgrid.errors import DeskgridError
from deskgrid.model.ids import ArrayId
from deskgrid.model.jobs import Array, ArrayState, JobSpec, JobState, Limits, Machine, Results
from deskgrid.model.machines import MachineKind
from deskgrid.testing.postgresql import emptied, running_postgresql
from deskgrid.units import MIB
from tests.system.harness import Program, until, wait
from tests.system.test_processes import Servers

pytestmark = [pytest.mark.full, pytest.mark.timeout(900)]
_WARM = """
import json, sys
for line in sys.stdin:
    job = json.loads(line)
    print(json.dumps({"job": job["job"], "exit_code": 0, "value": str(job["job"])}), flush=True)
"""
_WARM_JOBS, _PROCESS_JOBS, _PCS = 10_000, 120, 3


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[Servers]:
    with running_postgresql() as url:
        grid = Servers(tmp_path, emptied(url, "storm"))
        grid.environment["DESKGRID_SERVER_LEASE_S"] = "4"
        try:
            grid.begin(2)
            for server in grid.servers:
                _stay_at_its_port(server)
            yield grid
        finally:
            grid.stop()


def _stay_at_its_port(server: Program) -> None:
    """Let it come back where its clients look for it."""
    port = next(line for line in server.said().splitlines() if '"address"' in line).split('"address":')[1].split('"')[1]
    server.arguments[server.arguments.index("127.0.0.1:0")] = port


@pytest.mark.parametrize("seed", range(2))
def test_arrays_survive_a_storm_of_kills(servers: Servers, seed: int):
    for number in range(_PCS):
        servers.add_worker(f"pc{number}", DESKGRID_WORKER_DRIVERS="process", DESKGRID_WORKER_CPUS="2")
    wait(_storm(servers, Random(seed)))
    for name, worker in servers.workers.items():
        journal = servers.folder / name / "journal"
        until(lambda journal=journal: not any(journal.glob("*.json")), what=f"{name} has told of all its attempts")
        worker.kill(signal.SIGTERM)
        servers.nothing_left(name)


async def _storm(servers: Servers, rng: Random) -> None:
    async with servers.grid() as grid:
        arrays = [
            await grid.submit_array(_spec(("python3", "-c", _WARM), warm=True), count=_WARM_JOBS),
            await grid.submit_array(_spec(("sh", "-c", "sleep 0.$(({index} % 9)); echo {index}")), count=_PROCESS_JOBS),
        ]
        killing = asyncio.create_task(_kill(servers, rng))
        try:
            ended = [await _follow(grid, array.id) for array in arrays]
        finally:
            killing.cancel()
            await asyncio.wait([killing])
        for array in ended:
            assert array.jobs[JobState.COMPLETED] == array.count, array
            await _check_attempts(grid, array)


def _spec(command: tuple[str, ...], *, warm: bool = False) -> JobSpec:
    machine = Machine(kind=MachineKind.PROCESS, warm=warm, memory_bytes=128 * MIB, scratch_bytes=64 * MIB)
    return JobSpec(machine=machine, command=command, results=Results(paths=()), limits=Limits(max_lost=1000))


async def _kill(servers: Servers, rng: Random) -> None:
    """Kill a server or a worker and let it come back: soon, or after its leases have run out."""
    programs = [*servers.servers, *servers.workers.values()]
    while True:
        await asyncio.sleep(rng.uniform(0.5, 3.0))
        victim = rng.choice(programs)
        killed = asyncio.ensure_future(asyncio.to_thread(victim.kill))
        try:
            await asyncio.shield(killed)
            await asyncio.sleep(rng.choice((0.0, 0.5, 6.0)))
        finally:  # also if the storm ends while it is being killed
            await killed
            victim.start()


async def _follow(grid: Grid, array_id: ArrayId) -> Array:
    """Look at an array until it has ended; its counts always add up."""
    while True:
        try:
            array = await grid.array(array_id)
        except DeskgridError:  # both servers may be away for a moment
            await asyncio.sleep(0.2)
            continue
        counted = sum(array.jobs.values())
        assert counted == array.count or array.state is ArrayState.FILLING, array
        if array.state is ArrayState.ENDED:
            return array
        await asyncio.sleep(0.2)


async def _check_attempts(grid: Grid, array: Array) -> None:
    listed = [job async for job in grid.jobs_of(array.id)]
    assert len(listed) == array.count
    for job in listed[:: max(1, len(listed) // 50)]:
        states = [attempt.state.value for attempt in (await grid.job(job.id)).attempts]
        assert states.count("succeeded") == 1, (job.id, states)
