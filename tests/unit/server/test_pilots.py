"""Pilots: who may join so, what they get, when they end, and who is charged."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import sqlalchemy as sa
from msgspec import Struct
from tests.unit.server.test_overlay import attempt_peer, people

from deskgrid.client.entering import join_as_pilot
from deskgrid.client.grid import Grid, join
from deskgrid.client.pilots import Pilot, pilot_spec
from deskgrid.client.transport import Credentials, Transport
from deskgrid.clock import Clock, SystemClock
from deskgrid.core.rights import Right
from deskgrid.errors import Conflict, Forbidden, InvalidInput, Unauthenticated
from deskgrid.link import hash_secret, make_secret
from deskgrid.model import wire
from deskgrid.model.ids import AttemptId, JobId, Sha256
from deskgrid.model.jobs import AttemptState, Job, JobSpec, Limits, Machine
from deskgrid.model.machines import DriverName, Fingerprint, MachineKind
from deskgrid.model.workers import AttemptReport
from deskgrid.server.chores import do_chores
from deskgrid.server.store import accounts
from deskgrid.server.store.pilots import end_pilots, join_in_attempt
from deskgrid.server.store.schema import account, use
from deskgrid.settings import ServerSettings
from deskgrid.testing.grids import PlayedJob, TestGrid, play_job, played_sync, running_grid
from deskgrid.units import GIB

PROCESS = Fingerprint(driver=DriverName.PROCESS, kinds=(MachineKind.PROCESS,), usable=True)


class Later(SystemClock):
    """A clock that a test moves on."""

    ahead_s = 0.0

    def now(self) -> float:
        return super().now() + self.ahead_s


@pytest.fixture
def database() -> str:
    """SQLite; tests/contract has the same tests on PostgreSQL."""
    return ""


def running(folder: Path, database: str, clock: Clock | None = None) -> AbstractAsyncContextManager[TestGrid]:
    settings = ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, lease_s=1e6, database=database)
    return running_grid(folder / "server", settings, clock)


@pytest.fixture
async def grid(tmp_path: Path, database: str) -> AsyncIterator[TestGrid]:
    async with running(tmp_path, database) as found:
        yield found


async def pilot_job(owner: Credentials, host: Transport, **pilot: object) -> tuple[PlayedJob, Credentials]:
    """Submit a pilot and lease it to `host`; return it with what its own token opens."""
    await play_job(owner, host)  # publishes the disk
    async with Grid(owner) as user:
        job = await user.submit_pilot(Pilot(disk="played", **pilot))  # type: ignore[arg-type]
    sync = played_sync(room=True)
    assignments = (await host.call(wire.SYNC, sync)).assignments
    [assignment] = [one for one in assignments if one.job_id == job.id]
    return await entered(owner, PlayedJob(job, host, assignment))


async def entered(owner: Credentials, played: PlayedJob) -> tuple[PlayedJob, Credentials]:
    token = make_secret()
    await attempt_peer(played, job_token_hash=Sha256(hash_secret(token)))
    return played, msgspec.structs.replace(owner, token=token)


async def add_hep(grid: TestGrid) -> None:
    """Add a group of ann and bob."""
    async with Grid(await grid.admin()) as admin:
        await admin.add_group("hep")
        await admin.set_members("hep", add=["ann", "bob"])


@asynccontextmanager
async def joined(job: Credentials) -> AsyncIterator[Transport]:
    async with Transport(await join_as_pilot(job, "inner")) as transport:
        yield transport


async def submit_process(owner: Credentials, **spec: object) -> Job:
    async with Grid(owner) as user:
        return await user.submit(JobSpec(machine=Machine(kind=MachineKind.PROCESS), command=("true",), **spec))  # type: ignore[arg-type]


async def taken(pilot: Transport, *reports: AttemptReport, **profile: object) -> dict[JobId, int]:
    """Ask for work as a worker that runs processes; return the attempts that came, by job."""
    sync = played_sync(*reports, room=True)
    mine = msgspec.structs.replace(sync.profile, drivers=(PROCESS,), **profile)
    answer = await pilot.call(wire.SYNC, msgspec.structs.replace(sync, profile=mine))
    return {one.job_id: one.attempt_id for one in answer.assignments}


async def test_pilots_token_opens_nothing_but_the_way_in_and_that_once(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as host:
        _, job = await pilot_job(ann, host)
        async with Grid(job) as inside:
            assert (await inside.transport.call(wire.WHO)).rights == (Right.PILOT,)
            for call in (inside.jobs, inside.workers, inside.list_data):
                with pytest.raises(Forbidden):
                    await call()
            with pytest.raises(Forbidden):
                await inside.submit(JobSpec(machine=Machine(kind=MachineKind.PROCESS), command=("true",)))
        await join_as_pilot(job, "inner")
        with pytest.raises(Conflict, match="joined already"):
            await join_as_pilot(job, "again")


async def test_job_that_is_no_pilot_does_not_join(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as host:
        reach = pilot_spec(Pilot(disk="played")).machine.reach
        played = await play_job(ann, host, network="overlay", reach=reach)
        _, job = await entered(ann, played)
        with pytest.raises(Forbidden, match="pilot"):
            await join_as_pilot(job, "inner")
    async with Grid(ann) as user:
        with pytest.raises(Forbidden):
            await join_as_pilot(user.transport.credentials, "inner")
        with pytest.raises(InvalidInput, match="joins the grid"):
            await user.submit(JobSpec(machine=Machine(disk="played"), pilot=True))
        with pytest.raises(InvalidInput):
            await user.transport.call(wire.ADD_TOKEN, wire.AddToken(token_hash=Sha256("0" * 64), rights=("pilot",), lifetime_s=60))


async def test_pilot_gets_what_its_user_may_see_and_nothing_else(grid: TestGrid):
    ann, bob, eve = await people(grid, "ann", "bob", "eve")
    await add_hep(grid)
    async with Transport(await grid.worker()) as host:
        _, job = await pilot_job(ann, host)
        async with joined(job) as pilot:
            await submit_process(eve)
            await submit_process(bob)
            assert await taken(pilot) == {}
            own, shared = await submit_process(ann), await submit_process(bob, group="hep")
            assert set(await taken(pilot, accepts=("mine",))) == {own.id}
            assert set(await taken(pilot)) == {own.id, shared.id}


async def test_secrets_go_to_a_pilot_only_if_the_pcs_owner_and_its_user_are_trusted(grid: TestGrid):
    ann, bob = await people(grid, "ann", "bob")
    key = grid.services.authority.secrets_key
    async with Grid(bob) as user, Grid(ann) as other:
        of_bob, of_ann = await join(await user.join_link(), "bobs"), await join(await other.join_link(), "anns")
    for pc, gets in ((of_bob, False), (of_ann, True)):
        async with Transport(pc) as host:
            _, job = await pilot_job(ann, host)
            async with joined(job) as pilot, Grid(ann) as user:
                spec = JobSpec(machine=Machine(kind=MachineKind.PROCESS), command=("true",), trust=("mine",))
                mine = await user.submit(spec, secrets={"token": b"x"})
                assert (mine.id in await taken(pilot, secrets_key=key)) is gets


async def test_pilot_ends_with_its_attempt_and_what_it_holds_goes_back(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as host, Grid(ann) as user:
        played, job = await pilot_job(ann, host)
        async with joined(job) as pilot:
            own = await submit_process(ann)
            assert set(await taken(pilot)) == {own.id}
            [listed] = [one for one in await user.workers() if one.pilot_of]
            assert (listed.pilot_of, listed.pilot_job_id, listed.owner) == ("ann", played.id, "")
            await user.cancel(played.id)
            assert (await user.job(own.id)).job.state == "waiting"
            with pytest.raises(Unauthenticated):
                await taken(pilot)
        assert not [one for one in await user.workers() if one.pilot_of]


async def test_pilot_elsewhere_joins_by_a_link_for_a_time(tmp_path: Path, database: str):
    clock = Later()
    async with running(tmp_path, database, clock) as grid:
        [ann] = await people(grid, "ann")
        async with Grid(ann) as user:
            link = await user.pilot_link(pilot_s=3600)
            with pytest.raises(InvalidInput):
                await user.pilot_link(pilot_s=-1)
            async with Grid(await grid.admin()) as admin:
                request = wire.SecretRequest(secret_hash=Sha256("0" * 64), lifetime_s=60, uses=1, owner="ann", pilot_s=60)
                with pytest.raises(InvalidInput, match="who makes its link"):
                    await admin.transport.call(wire.ADD_JOIN_SECRET, request)
            async with Transport(await join(link, "batch")) as pilot:
                with pytest.raises(Unauthenticated):
                    await join(link, "thief")
                own = await submit_process(ann)
                assert set(await taken(pilot)) == {own.id}
                [listed] = await user.workers()
                assert (listed.pilot_of, listed.pilot_job_id) == ("ann", None)
                assert listed.ends_at == pytest.approx(clock.now() + 3600, abs=60)
                clock.ahead_s += 3601
                with pytest.raises(Unauthenticated):
                    await taken(pilot)
                await grid.services.store.write(end_pilots)
                assert (await user.job(own.id)).job.state == "waiting"
                assert await user.workers() == ()


class Shared(Struct):
    """A job of bob's, for a group, in a pilot of ann's, as of when it was leased."""

    grid: TestGrid
    clock: Later
    ann: Credentials
    host: Transport
    played: PlayedJob
    """The pilot's own job."""
    pilot: Transport
    attempt_id: AttemptId
    before: dict[tuple[str, str], float]

    def report(self, state: AttemptState) -> AttemptReport:
        return AttemptReport(attempt_id=self.attempt_id, state=state, exit_code=1 if state is AttemptState.FAILED else None)

    async def charged(self) -> tuple[float, float]:
        """Return what bob and ann were charged for since then."""
        after = await used(self.grid)
        return after["bob", "hep"], after["ann", ""] - self.before.get(("ann", ""), 0.0)


@asynccontextmanager
async def shared(folder: Path, database: str, **pilot: object) -> AsyncIterator[Shared]:
    clock = Later()
    async with running(folder, database, clock) as grid:
        ann, bob = await people(grid, "ann", "bob")
        await add_hep(grid)
        async with Transport(await grid.worker()) as host:
            played, job = await pilot_job(ann, host, **pilot)
            before = await used(grid)
            await played.report(AttemptState.RUNNING)
            async with joined(job) as inner:
                await submit_process(bob, group="hep", limits=Limits(attempts=1))
                [attempt_id] = (await taken(inner)).values()
                yield Shared(grid, clock, ann, host, played, inner, AttemptId(attempt_id), before)


async def test_time_of_a_pilots_jobs_is_charged_to_who_submitted_them(tmp_path: Path, database: str):
    async with shared(tmp_path, database, cpus=2) as case:
        case.clock.ahead_s += 100
        await taken(case.pilot, case.report(AttemptState.FAILED))
        case.clock.ahead_s += 50
        async with Grid(case.ann) as user:
            await user.cancel(case.played.id)
        assert await case.charged() == pytest.approx((100, 2 * 150 - 100), rel=0.02)


async def test_pilot_that_was_lost_is_charged_once_and_not_for_its_jobs(tmp_path: Path, database: str):
    async with shared(tmp_path, database) as case:
        case.clock.ahead_s += 100
        await case.host.call(wire.SYNC, played_sync())  # it does not list it: lost
        case.clock.ahead_s += 20
        await case.played.report(AttemptState.RUNNING)  # it is there again
        case.clock.ahead_s += 30
        await taken(case.pilot, case.report(AttemptState.FAILED))
        await case.pilot.call(wire.LEAVE)  # before its attempt ends, which is lost once more and stays so
        await case.host.call(wire.SYNC, played_sync())
        bob, ann = await case.charged()
        assert bob == pytest.approx(150, rel=0.02) and ann == pytest.approx(0, abs=3)


async def test_time_of_a_job_that_was_lost_and_came_back_is_paid_back_once(tmp_path: Path, database: str):
    async with shared(tmp_path, database) as case:
        runs = case.report(AttemptState.RUNNING)
        await taken(case.pilot, runs, accepts=())
        for _ in range(3):
            case.clock.ahead_s += 100
            await taken(case.pilot, accepts=())  # it does not list it: lost
            await taken(case.pilot, runs, accepts=())
        case.clock.ahead_s += 100
        await taken(case.pilot, case.report(AttemptState.FAILED), accepts=())
        case.clock.ahead_s += 600
        async with Grid(case.ann) as user:
            await user.cancel(case.played.id)
        assert await case.charged() == pytest.approx((400, 1000 - 400), rel=0.02)


async def test_pilot_that_ends_soon_gets_no_long_job(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as host:
        _, job = await pilot_job(ann, host)
        async with joined(job) as pilot:
            for _ in range(50):
                await submit_process(ann, limits=Limits(wall_time_s=7200.0))
            short = await submit_process(ann, limits=Limits(wall_time_s=60.0))
            sync = played_sync(room=True)
            mine = msgspec.structs.replace(sync, profile=msgspec.structs.replace(sync.profile, drivers=(PROCESS,)), left_s=100.0)
            answer = await pilot.call(wire.SYNC, mine)
            assert [one.job_id for one in answer.assignments] == [short.id]


async def test_pilot_in_a_pilot_is_none(grid: TestGrid):
    ann, bob = await people(grid, "ann", "bob")
    await add_hep(grid)
    async with Transport(await grid.worker()) as host:
        _, job = await pilot_job(ann, host)
        async with joined(job) as pilot, Grid(bob) as user:
            async with Transport(await grid.worker("other")) as other:
                await play_job(bob, other)
            await user.submit_pilot(Pilot(disk="played", group="hep"))
            assert (await pilot.call(wire.SYNC, played_sync(room=True))).assignments == ()
            link = await user.pilot_link(pilot_s=3600)
        async with Transport(await join(link, "elsewhere")) as elsewhere:
            assert (await elsewhere.call(wire.SYNC, played_sync(room=True))).assignments == ()


async def test_token_of_an_attempt_that_has_ended_makes_no_pilot(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as host, Grid(ann) as user:
        played, job = await pilot_job(ann, host)
        async with Transport(job) as late:
            caller = await grid.services.store.read(lambda tx: accounts.authenticate(tx, job.token))
            await user.cancel(played.id)
            with pytest.raises(Unauthenticated):  # as by a call that began before
                await grid.services.store.write(lambda tx: join_in_attempt(tx, caller, "late"))
            with pytest.raises(Unauthenticated):
                await late.call(wire.WHO)
        assert not [one for one in await user.workers() if one.pilot_of]


async def test_pilot_whose_attempt_was_lost_may_come_back_with_it_until_the_job_is_over(grid: TestGrid):
    [ann] = await people(grid, "ann")
    async with Transport(await grid.worker()) as host, Grid(ann) as user:
        played, job = await pilot_job(ann, host)
        await played.report(AttemptState.RUNNING)
        async with joined(job) as pilot:
            await host.call(wire.SYNC, played_sync())  # it does not list it: lost
            await grid.services.store.write(end_pilots)
            own = await submit_process(ann)
            assert set(await taken(pilot)) == {own.id}
            await played.report(AttemptState.RUNNING)
            await user.cancel(played.id)
            with pytest.raises(Unauthenticated):
                await taken(pilot)


async def test_what_waits_is_told_with_the_workers_that_could_run_it(grid: TestGrid):
    ann, bob = await people(grid, "ann", "bob")
    spec = JobSpec(machine=Machine(kind=MachineKind.PROCESS, need=("root",), memory_bytes=GIB, cpus=2), command=("true",))
    async with Grid(ann) as user, Transport(await grid.worker()) as pc:
        assert await user.waiting() == ()
        await user.submit_array(spec, count=7)
        await do_chores(grid.services)
        await submit_process(bob)
        await user.submit(msgspec.structs.replace(spec, trust=("mine",)))
        [found] = await user.waiting()
        assert (found.jobs, found.packages, found.cpus, found.memory_bytes, found.workers) == (7, ("root",), 2, GIB, 0)
        sync = played_sync()
        able = msgspec.structs.replace(sync.profile, drivers=(PROCESS,), packages=("root",))
        await pc.call(wire.SYNC, msgspec.structs.replace(sync, profile=able))
        assert [one.workers for one in await user.waiting()] == [1]
        async with Grid(await grid.admin()) as admin:
            [listed] = await admin.workers()
            await admin.reserve_worker(listed.id, "user:bob", lifetime_s=60.0)
            assert [one.workers for one in await user.waiting()] == [0]
            await admin.reserve_worker(listed.id, "")
        small = msgspec.structs.replace(able, lent=msgspec.structs.replace(able.lent, cpus=1))
        await pc.call(wire.SYNC, msgspec.structs.replace(sync, profile=small))
        assert [one.workers for one in await user.waiting()] == [0]


async def used(grid: TestGrid) -> dict[tuple[str, str], float]:
    query = sa.select(account.c.name, use.c.team, use.c.cpu_s).join(account, account.c.id == use.c.account_id)
    return {(row.name, row.team): row.cpu_s for row in await grid.services.store.read(lambda tx: tx.rows(query))}


def test_pilot_too_small_for_its_system_is_refused():
    with pytest.raises(InvalidInput, match="too little"):
        pilot_spec(Pilot(disk="root", memory_bytes=GIB // 4))
