"""Arrays, dependencies, sets and apps over real TLS, with workers played by hand. Chores are done by the test."""

from __future__ import annotations

import json
from pathlib import Path
from random import Random
from typing import Any

import msgspec
import pytest

from deskgrid.client.grid import describe_file
from deskgrid.client.transport import Transport
from deskgrid.errors import Conflict, DeskgridError, InvalidInput, NotFound
from deskgrid.model import wire
from deskgrid.model.ids import ArrayId, AttemptId
from deskgrid.model.jobs import Array, ArrayState, AttemptState, Job, JobSpec, JobState, Limits, Machine, Results
from deskgrid.model.machines import DriverName, Fingerprint, MachineKind, Network
from deskgrid.model.overlay import Offer, Reach, parse_service
from deskgrid.model.workers import Assignment, AttemptReport, Capacity, Profile
from deskgrid.server.chores import do_chores
from deskgrid.server.store import sets
from deskgrid.testing.grids import TestGrid, running_grid
from deskgrid.units import GIB

SPEC = JobSpec(
    machine=Machine(kind=MachineKind.PROCESS, memory_bytes=GIB),
    command=("true", "{index}"),
    results=Results(paths=()),
    limits=Limits(attempts=1),
)
DRIVER = Fingerprint(driver=DriverName.FAKE, kinds=tuple(MachineKind), usable=True, networks=tuple(Network))
ROOM = Capacity(cpus=4, memory_bytes=64 * GIB, disk_bytes=640 * GIB)
NONE = Capacity(cpus=0, memory_bytes=0, disk_bytes=0)


@pytest.fixture
async def grid(tmp_path: Path):
    async with running_grid(tmp_path / "server") as running:
        yield running


class Player:
    """A worker played by hand."""

    def __init__(self, transport: Transport) -> None:
        self.transport = transport
        self.held: dict[AttemptId, AttemptReport] = {}

    async def sync(self, free: Capacity = ROOM, **more: Any) -> wire.SyncAnswer:
        profile = Profile(os="linux", arch="x86_64", drivers=(DRIVER,), lent=ROOM, version="test")
        request = wire.Sync(profile=profile, paused=False, attempts=tuple(self.held.values()), free=free, cached=(), **more)
        answer = await self.transport.call(wire.SYNC, request)
        for one in answer.acknowledged + answer.cancelled:
            self.held.pop(one, None)
        for assignment in answer.assignments:
            self.held[assignment.attempt_id] = AttemptReport(attempt_id=assignment.attempt_id, state=AttemptState.LEASED)
        return answer

    async def take(self, free: Capacity = ROOM, **more: Any) -> tuple[Assignment, ...]:
        return (await self.sync(free, **more)).assignments

    async def end(self, *attempts: AttemptId, state: AttemptState = AttemptState.SUCCEEDED) -> None:
        for one in attempts or tuple(self.held):
            self.held[one] = AttemptReport(attempt_id=one, state=state, exit_code=0 if state is AttemptState.SUCCEEDED else 1)
        await self.sync(NONE)


@pytest.fixture
async def user(grid: TestGrid):
    async with Transport(await grid.admin()) as transport:
        yield transport


@pytest.fixture
async def worker(grid: TestGrid):
    async with Transport(await grid.worker()) as transport:
        yield Player(transport)


async def chores(grid: TestGrid) -> None:
    while await do_chores(grid.services):
        pass


async def turn(grid: TestGrid, turn_s: float = 60.0) -> float | None:
    return await grid.services.store.write(lambda tx: sets.take_turns(tx, turn_s=turn_s, rng=Random(1)))


async def array_of(user: Transport, array_id: ArrayId) -> Array:
    return await user.call(wire.GET_ARRAY, path={"array": array_id})


def counts(found: Array) -> dict[str, int]:
    return {state.value: number for state, number in found.jobs.items() if number}


async def submit(user: Transport, spec: JobSpec = SPEC) -> Job:
    return await user.call(wire.SUBMIT_JOB, wire.SubmitJob(spec=spec))


async def state_of(user: Transport, job: Job) -> JobState:
    return (await user.call(wire.GET_JOB, path={"job": job.id})).job.state


# Arrays


async def test_array_is_filled_runs_and_ends(grid: TestGrid, user: Transport, worker: Player):
    array = await user.call(wire.SUBMIT_ARRAY, wire.SubmitArray(spec=SPEC, count=7))
    assert (array.state, array.count) == (ArrayState.FILLING, 7)
    assert await worker.take() == ()
    await chores(grid)
    assert counts(await array_of(user, array.id)) == {"waiting": 7}
    taken = await worker.take()
    assert [one.index for one in taken] == [0, 1, 2, 3]
    assert counts(await array_of(user, array.id)) == {"waiting": 3, "active": 4}
    await worker.end()
    await worker.take()
    await worker.end()
    ended = await array_of(user, array.id)
    assert (ended.state, counts(ended)) == (ArrayState.ENDED, {"completed": 7})
    listed = await user.call(wire.LIST_JOBS, query={"array": array.id})
    assert sorted(job.index for job in listed.jobs) == list(range(7))
    assert (await user.call(wire.LIST_JOBS)).jobs == ()


async def test_table_gives_each_job_its_parameters(grid: TestGrid, user: Transport, worker: Player, tmp_path: Path):
    rows = [["0.1", "a b"], ["0.2", "ü"], ["0.3", ""]]
    table = tmp_path / "table"
    table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    await user.upload(table, describe_file(table))
    request = wire.SubmitArray(spec=SPEC, count=3, table=describe_file(table), names=("alpha", "name"))
    array = await user.call(wire.SUBMIT_ARRAY, request)
    await chores(grid)
    assert [one.parameters for one in await worker.take()] == [{"alpha": alpha, "name": name} for alpha, name in rows]
    job = (await user.call(wire.LIST_JOBS, query={"array": array.id})).jobs[-1]
    assert (job.array_id, job.index, job.parameters) == (array.id, 0, {"alpha": "0.1", "name": "a b"})


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ('["a"]\n', "ends after 1 lines"),
        ('["a"]\n["b"]\n["c"]\n', "more than the 2 lines"),
        ('["a"]\nnonsense\n', "line 2 is not a JSON list"),
        ('["a"]\n["a", "b"]\n', "line 2 has 2 values"),
        ('["a"]\n[1]\n', "line 2 is not"),
    ],
)
async def test_table_that_is_not_what_was_said_cancels_its_array(
    grid: TestGrid, user: Transport, worker: Player, tmp_path: Path, text: str, reason: str
):
    table = tmp_path / "table"
    table.write_text(text)
    await user.upload(table, describe_file(table))
    array = await user.call(wire.SUBMIT_ARRAY, wire.SubmitArray(spec=SPEC, count=2, table=describe_file(table), names=("x",)))
    await chores(grid)
    failed = await array_of(user, array.id)
    assert failed.state is ArrayState.CANCELLED
    assert reason in failed.message
    assert await worker.take() == ()


async def test_cancelled_array_starts_nothing_more_and_its_counts_add_up(grid: TestGrid, user: Transport, worker: Player):
    array = await user.call(wire.SUBMIT_ARRAY, wire.SubmitArray(spec=SPEC, count=10))
    await chores(grid)
    taken = await worker.take()
    await worker.end(taken[0].attempt_id)
    cancelled = await user.call(wire.CANCEL_ARRAY, path={"array": array.id})
    assert cancelled.state is ArrayState.CANCELLED
    assert await worker.take() == ()
    job = (await user.call(wire.LIST_JOBS, query={"array": array.id})).jobs[0]
    assert job.state is JobState.CANCELLED
    await chores(grid)
    assert counts(await array_of(user, array.id)) == {"completed": 1, "cancelled": 9}
    answer = await worker.sync()
    assert not answer.assignments
    assert worker.held == {}


async def test_array_of_others_is_not_found(grid: TestGrid, user: Transport):
    await user.call(wire.ADD_USER, wire.AddUser(name="bob"))
    array = await user.call(wire.SUBMIT_ARRAY, wire.SubmitArray(spec=SPEC, count=1))
    async with Transport(await grid.user("bob")) as bob:
        for call in (wire.GET_ARRAY, wire.CANCEL_ARRAY):
            with pytest.raises(NotFound):
                await bob.call(call, path={"array": array.id})
        assert (await bob.call(wire.LIST_ARRAYS)).arrays == ()


async def test_repeated_call_gets_the_same_assignments(grid: TestGrid, user: Transport, worker: Player):
    for _ in range(2):
        await submit(user)
    profile = Profile(os="linux", arch="x86_64", drivers=(DRIVER,), lent=ROOM, version="test")
    request = wire.Sync(profile=profile, paused=False, attempts=(), free=ROOM, cached=())
    first = await worker.transport.call(wire.SYNC, request, key="same")
    again = await worker.transport.call(wire.SYNC, request, key="same")
    assert [one.attempt_id for one in first.assignments] == [one.attempt_id for one in again.assignments]
    assert first.assignments == again.assignments
    other = await worker.transport.call(wire.SYNC, request)
    assert not {one.attempt_id for one in other.assignments} & {one.attempt_id for one in first.assignments}


async def test_worker_that_is_quick_gets_more_than_fits(grid: TestGrid, user: Transport, worker: Player):
    await user.call(wire.SUBMIT_ARRAY, wire.SubmitArray(spec=SPEC, count=30))
    await chores(grid)
    taken = await worker.take()
    more = await worker.take(NONE, ahead={taken[0].class_id: 10})
    assert (len(taken), len(more)) == (4, 10)


async def test_quota_of_waiting_jobs_is_kept(grid: TestGrid, user: Transport):
    await grid.services.store.write(lambda tx: tx.run(_quota(5)))
    await user.call(wire.SUBMIT_ARRAY, wire.SubmitArray(spec=SPEC, count=3))
    await chores(grid)
    with pytest.raises(Conflict, match="5 jobs waiting, and have 3"):
        await user.call(wire.SUBMIT_ARRAY, wire.SubmitArray(spec=SPEC, count=3))
    await submit(user)


def _quota(most: int) -> Any:
    import sqlalchemy as sa

    from deskgrid.server.store.schema import account

    return sa.update(account).values(max_waiting=most)


# What comes after what


async def test_job_waits_for_those_it_comes_after(grid: TestGrid, user: Transport, worker: Player):
    array = await user.call(wire.SUBMIT_ARRAY, wire.SubmitArray(spec=SPEC, count=2))
    await chores(grid)
    first = await submit(user)
    merge = await submit(user, msgspec.structs.replace(SPEC, after=(f"array-{array.id}", f"job-{first.id}")))
    assert merge.state is JobState.BLOCKED
    taken = await worker.take()
    assert len(taken) == 3
    await worker.end(*(one.attempt_id for one in taken[:2]))
    assert await state_of(user, merge) is JobState.BLOCKED
    await worker.end()
    assert [one.job_id for one in await worker.take()] == [merge.id]


async def test_what_comes_after_a_failure_is_cancelled_and_so_on(grid: TestGrid, user: Transport, worker: Player):
    first = await submit(user)
    second = await user.call(
        wire.SUBMIT_ARRAY, wire.SubmitArray(spec=msgspec.structs.replace(SPEC, after=(f"job-{first.id}",)), count=2)
    )
    third = await submit(user, msgspec.structs.replace(SPEC, after=(f"array-{second.id}",)))
    cleanup = await submit(user, msgspec.structs.replace(SPEC, after_end=(f"job-{third.id}",)))
    await chores(grid)
    assert (await array_of(user, second.id)).state is ArrayState.BLOCKED
    await worker.take()
    await worker.end(state=AttemptState.FAILED)
    await chores(grid)
    assert (await array_of(user, second.id)).state is ArrayState.CANCELLED
    assert await state_of(user, third) is JobState.CANCELLED
    assert [one.job_id for one in await worker.take()] == [cleanup.id]
    late = await submit(user, msgspec.structs.replace(SPEC, after=(f"job-{first.id}",)))
    assert late.state is JobState.CANCELLED
    assert "did not complete" in late.message


@pytest.mark.parametrize("name", ["41", "job-", "job-999999", "array-999999", "job-x", "set-1"])
async def test_what_is_not_there_cannot_be_waited_for(grid: TestGrid, user: Transport, name: str):
    with pytest.raises(InvalidInput, match="after"):
        await submit(user, msgspec.structs.replace(SPEC, after=(name,)))


# Sets


def _member(name: str, **machine: Any) -> wire.SetMember:
    return wire.SetMember(name=name, spec=msgspec.structs.replace(SPEC, machine=msgspec.structs.replace(SPEC.machine, **machine)))


async def test_members_of_a_set_reach_each_other_by_name(grid: TestGrid, user: Transport, worker: Player):
    database = _member("db", network=Network.OVERLAY, offer=(Offer("sql", 5432),))
    front = _member("front", network=Network.OVERLAY, reach=(Reach("sql", parse_service("sql.db.set"), 5432),))
    report = wire.SetMember(name="report", spec=msgspec.structs.replace(SPEC, after=("front",)))
    found = await user.call(wire.SUBMIT_SET, wire.SubmitSet(name="app", members=(report, front, database)))
    jobs = {member.name: member.job for member in found.members}
    assert jobs["front"] is not None and jobs["db"] is not None and jobs["report"] is not None
    assert str(jobs["front"].spec.machine.reach[0].service) == f"sql.job-{jobs['db'].id}"
    assert jobs["report"].state is JobState.BLOCKED
    assert len(await worker.take()) == 2
    cancelled = await user.call(wire.CANCEL_SET, path={"set": found.id})
    assert {member.job.state for member in cancelled.members if member.job} == {JobState.CANCELLED}


@pytest.mark.parametrize(
    "members",
    [
        (_member("a", network=Network.OVERLAY, reach=(Reach("x", parse_service("x.nobody.set"), 1),)),),
        (_member("a"), _member("a")),
        (_member("A"),),
        (),
        (
            wire.SetMember(name="a", spec=msgspec.structs.replace(SPEC, after=("b",))),
            wire.SetMember(name="b", spec=msgspec.structs.replace(SPEC, after=("a",))),
        ),
    ],
)
async def test_set_whose_members_do_not_fit_is_refused_whole(grid: TestGrid, user: Transport, members: tuple[wire.SetMember, ...]):
    with pytest.raises(DeskgridError):
        await user.call(wire.SUBMIT_SET, wire.SubmitSet(name="bad", members=members))
    assert (await user.call(wire.LIST_JOBS)).jobs == ()
    assert (await user.call(wire.LIST_SETS)).sets == ()


async def test_set_starts_together_once_there_is_room_for_all(grid: TestGrid, user: Transport, worker: Player):
    wanted = wire.SubmitSet(name="pair", together=True, members=(_member("a", cpus=3), _member("b", cpus=3)))
    found = await user.call(wire.SUBMIT_SET, wanted)
    assert await worker.take() == ()
    await turn(grid)
    [first] = await worker.take()
    assert first.hold
    assert (await worker.sync(NONE)).started == ()
    async with Transport(await grid.worker("other")) as transport:
        other = Player(transport)
        [second] = await other.take()
        assert (await other.sync(NONE)).started == (second.attempt_id,)
    assert (await worker.sync(NONE)).started == (first.attempt_id,)
    assert (await user.call(wire.GET_SET, path={"set": found.id})).waits_for == ""


async def test_set_that_finds_too_few_workers_lets_others_have_their_turn(grid: TestGrid, user: Transport, worker: Player):
    big = wire.SubmitSet(name="big", together=True, members=(_member("a", cpus=3), _member("b", cpus=3)))
    small = wire.SubmitSet(name="small", together=True, members=(_member("a", cpus=3),))
    first = await user.call(wire.SUBMIT_SET, big)
    second = await user.call(wire.SUBMIT_SET, small)
    await turn(grid)
    [held] = await worker.take()
    await turn(grid, turn_s=0.0)
    assert held.attempt_id in (await worker.sync(NONE)).cancelled
    [mine] = await worker.take()
    assert (await worker.sync(NONE)).started == (mine.attempt_id,)
    assert (await user.call(wire.GET_SET, path={"set": second.id})).waits_for == ""
    waits = await user.call(wire.GET_SET, path={"set": first.id})
    assert waits.waits_for == "its turn, after 1 tries without enough workers"
    detail = await user.call(wire.GET_JOB, path={"job": waits.members[0].job.id if waits.members[0].job else 0})
    assert detail.job.state is JobState.WAITING


# Apps


async def test_app_brings_its_files_for_the_workers_platform(grid: TestGrid, user: Transport, worker: Player, tmp_path: Path):
    blobs = {}
    for platform in ("linux-x86_64", "windows-x86_64"):
        file = tmp_path / platform
        file.write_text(platform)
        blobs[platform] = describe_file(file)
        await user.upload(file, blobs[platform])
    app = await user.call(wire.REGISTER_APP, wire.RegisterApp(name="blast", files=blobs, defaults={"machine.cpus": 2}))
    assert app.version == 1
    again = await user.call(wire.REGISTER_APP, wire.RegisterApp(name="blast", files=blobs, defaults={"machine.cpus": 2}))
    assert again.id == app.id
    await submit(user, msgspec.structs.replace(SPEC, app="blast"))
    [taken] = await worker.take()
    assert taken.program == blobs["linux-x86_64"]
    await worker.transport.download(blobs["linux-x86_64"], tmp_path / "fetched")
    with pytest.raises(Conflict, match="have not ended"):
        await user.call(wire.REMOVE_APP, path={"reference": "blast"})
    await worker.end()
    await user.call(wire.REMOVE_APP, path={"reference": "blast"})
    assert (await user.call(wire.LIST_APPS)).apps == ()


async def test_app_without_files_for_a_platform_does_not_go_there(grid: TestGrid, user: Transport, worker: Player, tmp_path: Path):
    file = tmp_path / "files"
    file.write_text("x")
    await user.upload(file, describe_file(file))
    await user.call(wire.REGISTER_APP, wire.RegisterApp(name="win", files={"windows-x86_64": describe_file(file)}))
    await submit(user, msgspec.structs.replace(SPEC, app="win"))
    assert await worker.take() == ()
