"""Arrays and sets by the SDK, on a real server, with a worker played by hand."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from pathlib import Path
from random import Random

import pytest
from msgspec.structs import replace

from deskgrid import archive
from deskgrid.client.arrays import VALUES
from deskgrid.client.grid import Grid, describe_file
from deskgrid.client.transport import Transport
from deskgrid.errors import Conflict, InvalidInput, NotFound, ProtocolError
from deskgrid.model import wire
from deskgrid.model.data import Blob
from deskgrid.model.jobs import Array, ArrayState, AttemptState, JobSpec, JobState, Limits, Machine, Results
from deskgrid.model.machines import MachineKind
from deskgrid.model.workers import AttemptReport
from deskgrid.server.chores import do_chores_forever
from deskgrid.testing.grids import TestGrid, played_sync, running_grid

SPEC = JobSpec(
    machine=Machine(kind=MachineKind.PROCESS), command=("true",), limits=Limits(attempts=1), results=Results(paths=("**",))
)
WARM = JobSpec(machine=Machine(kind=MachineKind.PROCESS, warm=True), command=("serve",), results=Results(paths=()))


@pytest.fixture
async def running(tmp_path: Path) -> AsyncIterator[TestGrid]:
    async with running_grid(tmp_path / "server") as found:
        chores = asyncio.create_task(do_chores_forever(found.services, Random(1)))
        yield found
        chores.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await chores


@pytest.fixture
async def grid(running: TestGrid) -> AsyncIterator[Grid]:
    async with Grid(await running.admin()) as found:
        yield found


@pytest.fixture
async def worker(running: TestGrid) -> AsyncIterator[Transport]:
    async with Transport(await running.worker()) as found:
        yield found


async def filled(grid: Grid, array: Array) -> Array:
    async for found in grid.array_changes(array.id):
        if found.state is not ArrayState.FILLING:
            return found
    raise AssertionError


async def do_all(worker: Transport, folder: Path, *, failing: frozenset[int] = frozenset(), value: bytes | None = None) -> None:
    """Do all jobs that wait; each result has the job's index and parameters."""
    request = played_sync(room=True)
    driver = request.profile.drivers[0]
    request = replace(request, profile=replace(request.profile, drivers=(replace(driver, kinds=tuple(MachineKind)),)))
    work = (await worker.call(wire.SYNC, request)).assignments
    reports = []
    for one in work:
        blob = None
        if one.spec.results.paths:
            (folder / f"s{one.attempt_id}").mkdir()
            (folder / f"s{one.attempt_id}" / "out").write_text(f"{one.index} {one.parameters}")
            archive.pack_folder(folder / f"s{one.attempt_id}", folder / f"r{one.attempt_id}")
            blob = describe_file(folder / f"r{one.attempt_id}")
            await worker.upload(folder / f"r{one.attempt_id}", blob)
        state = AttemptState.FAILED if one.index in failing else AttemptState.SUCCEEDED
        code = 1 if one.index in failing else 0
        reports.append(AttemptReport(attempt_id=one.attempt_id, state=state, exit_code=code, result=blob, value=value))
    await worker.call(wire.SYNC, replace(request, attempts=tuple(reports), free=played_sync().free))


async def test_rows_of_a_program_become_jobs_with_parameters(grid: Grid, worker: Transport, tmp_path: Path):
    array = await filled(grid, await grid.submit_array(SPEC, table=({"alpha": n / 10, "n": n} for n in range(5))))
    assert array.count == 5
    await do_all(worker, tmp_path)
    assert (await grid.wait_array(array.id)).jobs[JobState.COMPLETED] == 5
    told: list[tuple[int, int]] = []
    found = await grid.array_results(
        array.id, tmp_path / "out", by="alpha", progress=lambda done, total: told.append((done, total))
    )
    assert (found.fetched, told[-1]) == (5, (5, 5))
    assert (tmp_path / "out" / "0.2" / "out").read_text() == "2 {'alpha': '0.2', 'n': '2'}"
    assert [job.index async for job in grid.jobs_of(array.id)] == [4, 3, 2, 1, 0]


async def test_count_and_table_must_agree(grid: Grid, tmp_path: Path):
    (tmp_path / "t.csv").write_text("a\n1\n2\n")
    assert (await grid.submit_array(SPEC, count=2, table=tmp_path / "t.csv")).count == 2
    with pytest.raises(InvalidInput, match="the table has 2 lines, not 3"):
        await grid.submit_array(SPEC, count=3, table=tmp_path / "t.csv")


async def test_what_failed_jobs_left_is_fetched_only_if_asked_for(grid: Grid, worker: Transport, tmp_path: Path):
    array = await filled(grid, await grid.submit_array(SPEC, count=3))
    await do_all(worker, tmp_path, failing=frozenset({1}))
    assert (await grid.array_results(array.id, tmp_path / "out")).fetched == 2
    both = await grid.array_results(array.id, tmp_path / "out", failed_too=True)
    assert (both.fetched, both.there) == (1, 2)


async def test_results_that_cannot_be_fetched_are_told_and_the_rest_is_fetched_next_time(
    running: TestGrid, grid: Grid, worker: Transport, tmp_path: Path
):
    array = await filled(grid, await grid.submit_array(SPEC, count=6))
    await do_all(worker, tmp_path)
    [job] = [job async for job in grid.jobs_of(array.id) if job.index == 3]
    assert job.result is not None
    blob = await running.services.repository.local_path(Blob(sha256=job.result, size_bytes=job.result_bytes or 0))
    content = blob.read_bytes()
    blob.chmod(0o600)
    blob.write_bytes(b"x" * len(content))
    with pytest.raises(ProtocolError):
        await grid.array_results(array.id, tmp_path / "out")
    assert not (tmp_path / "out" / "3").exists()
    assert not list((tmp_path / "out").glob("values*"))
    blob.write_bytes(content)
    found = await grid.array_results(array.id, tmp_path / "out")
    assert found.fetched + found.there == 6
    assert found.fetched >= 1
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [str(index) for index in range(6)]


async def test_values_come_in_one_file_anew_each_time(grid: Grid, worker: Transport, tmp_path: Path):
    array = await filled(grid, await grid.submit_array(WARM, count=3))
    await do_all(worker, tmp_path, value=b'{"x": 1}')
    for _ in range(2):
        assert (await grid.array_results(array.id, tmp_path / "out")).values == 3
        assert len((tmp_path / "out" / VALUES).read_bytes().splitlines()) == 3
    assert [path.name for path in (tmp_path / "out").iterdir()] == [VALUES]


async def test_an_array_without_a_table_has_no_columns(grid: Grid, tmp_path: Path):
    array = await filled(grid, await grid.submit_array(SPEC, count=2))
    with pytest.raises(InvalidInput, match="it has no table"):
        await grid.array_results(array.id, tmp_path / "out", by="alpha")


async def test_an_array_is_removed_once_it_has_ended(grid: Grid):
    array = await filled(grid, await grid.submit_array(SPEC, count=2))
    with pytest.raises(Conflict):
        await grid.remove_array(array.id)
    await grid.cancel_array(array.id)
    assert (await grid.wait_array(array.id)).state is ArrayState.CANCELLED
    async with asyncio.timeout(30):
        while True:
            with contextlib.suppress(Conflict):  # its jobs are moved little by little
                await grid.remove_array(array.id)
                break
    with pytest.raises(NotFound):
        await grid.array(array.id)


async def test_a_set_is_waited_for_until_all_of_it_has_ended(grid: Grid, worker: Transport, tmp_path: Path):
    members = [wire.SetMember(name="a", spec=SPEC), wire.SetMember(name="b", spec=SPEC, count=2)]
    found = await grid.submit_set("both", members)
    waiting = asyncio.create_task(grid.wait_set(found.id))
    [array] = [member.array for member in found.members if member.array]
    await filled(grid, array)
    await do_all(worker, tmp_path)
    ended = await waiting
    assert wire.set_ended(ended)
    assert [one.id for one in (await grid.sets()).sets] == [found.id]
