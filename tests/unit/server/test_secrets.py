"""Secrets of jobs: only the trusted get them, nobody else's bytes open, and the server keeps nothing in clear."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from deskgrid.client.grid import Grid, describe_file, join
from deskgrid.client.transport import Credentials, Transport
from deskgrid.core.sealing import for_attempt, for_user, open_secrets, seal_secrets, sealing_key
from deskgrid.errors import Forbidden, InvalidInput
from deskgrid.model import wire
from deskgrid.model.data import DataKind, Disk
from deskgrid.model.ids import UserId
from deskgrid.model.jobs import AttemptState, JobSpec, JobState, Machine
from deskgrid.model.machines import DiskFormat
from deskgrid.model.workers import Assignment, AttemptReport
from deskgrid.server.chores import do_chores
from deskgrid.testing.grids import TestGrid, played_sync, running_grid

SPEC = JobSpec(machine=Machine(disk="played"))
PLAIN = b"correct horse battery staple"
SECRETS = {"token": PLAIN, "rucio.cfg": b"[client]\n" + PLAIN[::-1]}
KEY = X25519PrivateKey.generate()


@pytest.fixture
async def grid(tmp_path: Path):
    async with running_grid(tmp_path / "server") as running:
        async with Grid(await running.admin()) as boss:
            for name in ("ann", "bob"):
                await boss.add_user(name)
            await boss.add_group("hep")
            await boss.set_members("hep", add=["bob"])
            (tmp_path / "disk").write_bytes(b"disk")
            blob = describe_file(tmp_path / "disk")
            disk = Disk(sha256=blob.sha256, size_bytes=4, virtual_bytes=4, format=DiskFormat.ISO)
            await boss.put(tmp_path / "disk", "played", kind=DataKind.DISK, disk=disk, visibility="public")
        yield running


async def pc(grid: TestGrid, owner: str) -> Credentials:
    async with Grid(await grid.user(owner)) as user:
        return await join(await user.join_link(), "pc")


def asking(*reports: AttemptReport, key: str = "") -> wire.Sync:
    sync = played_sync(*reports, room=True)
    return msgspec.structs.replace(sync, profile=msgspec.structs.replace(sync.profile, secrets_key=key or sealing_key(KEY)))


async def leased(worker: Credentials, sync: wire.Sync | None = None) -> tuple[Assignment, ...]:
    async with Transport(worker) as transport:
        return (await transport.call(wire.SYNC, sync or asking())).assignments


def opened(assignment: Assignment) -> dict[str, bytes]:
    return open_secrets(assignment.secrets, KEY, for_attempt(assignment.attempt_id))


def assert_not_in_clear(folder: Path) -> None:
    for file in folder.rglob("*"):
        assert not file.is_file() or not any(secret in file.read_bytes() for secret in SECRETS.values()), file


async def test_secrets_reach_the_trusted_worker_and_nothing_on_the_server(grid: TestGrid):
    home = await pc(grid, "ann")
    async with Grid(await grid.user("ann")) as ann:
        job = await ann.submit(SPEC, secrets=SECRETS)
        assert (job.spec.secrets, job.spec.trust) == (tuple(SECRETS), ("mine",))
        [assignment] = await leased(home)
        assert opened(assignment) == SECRETS
        with pytest.raises(InvalidInput):
            open_secrets(assignment.secrets, X25519PrivateKey.generate(), for_attempt(assignment.attempt_id))
        assert_not_in_clear(grid.home)
        assert PLAIN not in msgspec.json.encode(await ann.job(job.id))


async def test_nobody_but_the_trusted_gets_the_job(grid: TestGrid):
    anns, bobs, nobodys = await pc(grid, "ann"), await pc(grid, "bob"), await grid.worker("lab")
    async with Grid(await grid.user("ann")) as ann:
        for trust, trusted in ((("mine",), [anns]), (("user:bob",), [bobs]), (("group:hep",), [bobs]), (("everyone",), [nobodys])):
            job = await ann.submit(msgspec.structs.replace(SPEC, trust=trust), secrets=SECRETS)
            for worker in [one for one in (anns, bobs, nobodys) if "everyone" not in trust and one not in trusted]:
                assert await leased(worker) == ()
            [assignment] = await leased(trusted[0])
            assert opened(assignment) == SECRETS
            await ann.cancel(job.id)


async def test_an_older_worker_gets_no_job_with_secrets(grid: TestGrid):
    home = await pc(grid, "ann")
    async with Grid(await grid.user("ann")) as ann:
        await ann.submit(SPEC, secrets=SECRETS)
        assert await leased(home, played_sync(room=True)) == ()
        assert len(await leased(home)) == 1


async def test_key_to_which_nothing_can_be_sealed_is_told_to_the_worker(grid: TestGrid):
    home = await pc(grid, "ann")
    async with Grid(await grid.user("ann")) as ann:
        job = await ann.submit(SPEC, secrets=SECRETS)
        with pytest.raises(InvalidInput, match="sealed"):
            await leased(home, asking(key="00" * 32))
        assert len(await leased(home)) == 1
        assert (await ann.job(job.id)).job.state is JobState.ACTIVE


async def test_answer_that_was_lost_is_sealed_once_more(grid: TestGrid):
    home = await pc(grid, "ann")
    async with Grid(await grid.user("ann")) as ann, Transport(home) as worker:
        await ann.submit(SPEC, secrets=SECRETS)
        first = await worker.call(wire.SYNC, asking(), key="k1")
        again = await worker.call(wire.SYNC, asking(), key="k1")
        assert [opened(one) for one in (*first.assignments, *again.assignments)] == [SECRETS, SECRETS]
        assert first.assignments[0].attempt_id == again.assignments[0].attempt_id
        assert first.assignments[0].secrets != again.assignments[0].secrets


async def test_all_jobs_of_an_array_and_members_of_a_set_have_theirs(grid: TestGrid):
    home = await pc(grid, "ann")
    async with Grid(await grid.user("ann")) as ann:
        await ann.submit_array(SPEC, count=3, secrets=SECRETS)
        spec = msgspec.structs.replace(SPEC, secrets=("other",), trust=("mine",))
        other = wire.SetMember(name="a", spec=spec, secrets=await ann.seal({"other": b"x"}))
        await ann.submit_set("both", [other, wire.SetMember(name="b", spec=SPEC)])
        while await do_chores(grid.services):
            pass
        found = {one.job_id: one for _ in range(50) for one in await leased(home)}  # unlisted, they come again
        told = sorted(tuple(opened(one)) if one.secrets else () for one in found.values())
        assert told == [(), ("other",), *[tuple(SECRETS)] * 3]


async def test_what_does_not_open_or_fit_is_refused_when_it_is_submitted(grid: TestGrid):
    async with Grid(await grid.user("ann")) as ann:
        me = await ann.who()
        spec = msgspec.structs.replace(SPEC, secrets=("token",), trust=("mine",))
        good = await ann.seal({"token": b"x"})
        for_another = seal_secrets({"token": b"x"}, me.secrets_key, for_user(UserId((me.user_id or 0) + 1)))
        for wanted, told in (
            (wire.SubmitJob(spec=spec, secrets=good[:-1]), "cannot be opened"),
            (wire.SubmitJob(spec=spec, secrets=for_another), "cannot be opened"),
            (wire.SubmitJob(spec=spec), "cannot be opened"),
            (wire.SubmitJob(spec=SPEC, secrets=good), "not the secrets that the job names"),
            (wire.SubmitJob(spec=spec, secrets=await ann.seal({"other": b"x"})), "not the secrets that the job names"),
            (wire.SubmitJob(spec=spec, secrets=bytes(1 << 17)), "too many bytes"),
            (wire.SubmitJob(spec=msgspec.structs.replace(spec, trust=("user:eve",)), secrets=good), "no user 'eve'"),
            (wire.SubmitJob(spec=msgspec.structs.replace(spec, trust=()), secrets=good), "whose PCs"),
        ):
            with pytest.raises(InvalidInput, match=told):
                await ann.transport.call(wire.SUBMIT_JOB, wanted)
        assert (await ann.jobs()).jobs == ()


async def test_bytes_of_another_user_put_into_the_database_do_not_open(grid: TestGrid):
    """Who can write the database, but has no key, gets no secrets by having them sent to a PC of his own."""
    import sqlalchemy as sa

    from deskgrid.server.store.schema import submission

    bobs = await pc(grid, "bob")
    async with Grid(await grid.user("ann")) as ann, Grid(await grid.user("bob")) as bob:
        stolen = await ann.submit(SPEC, secrets=SECRETS)
        mine = await bob.submit(SPEC, secrets=dict.fromkeys(SECRETS, b""))

        def steal(tx) -> None:
            sealed = tx.value(sa.select(submission.c.secrets).where(submission.c.id == stolen.id))
            tx.run(sa.update(submission).where(submission.c.id == mine.id).values(secrets=sealed))

        await grid.services.store.write(steal)
        [assignment] = await leased(bobs)
        assert (assignment.job_id, assignment.secrets) == (mine.id, b"")


async def test_replaced_key_of_the_server_leaves_the_secrets_out(grid: TestGrid, tmp_path: Path):
    home = await pc(grid, "ann")
    async with Grid(await grid.user("ann")) as ann:
        await ann.submit(SPEC, secrets=SECRETS)
    for name in ("secrets.key", "grants.key"):
        (grid.home / "authority" / name).unlink()
    old = grid.services.authority.secrets_key
    grid.services.authority.__init__(grid.home / "authority")  # what a restart does
    assert grid.services.authority.secrets_key != old
    [assignment] = await leased(home)
    assert (assignment.spec.secrets, assignment.secrets) == (tuple(SECRETS), b"")


async def test_sealed_bytes_go_when_the_job_has_ended(grid: TestGrid):
    home = await pc(grid, "ann")
    async with Grid(await grid.user("ann")) as ann:
        job = await ann.submit(msgspec.structs.replace(SPEC), secrets=SECRETS)
        sealed = await ann.seal(SECRETS)
        assert len(sealed) > sum(map(len, SECRETS.values()))
        for _ in range(job.spec.limits.attempts):
            [assignment] = await leased(home)
            failed = AttemptReport(attempt_id=assignment.attempt_id, state=AttemptState.FAILED, reason="no luck")
            async with Transport(home) as worker:
                await worker.call(wire.SYNC, msgspec.structs.replace(played_sync(failed)))
        assert (await ann.job(job.id)).job.state is JobState.FAILED
    import sqlalchemy as sa

    from deskgrid.server.store.schema import submission

    left = sa.select(sa.func.count()).where(submission.c.secrets.is_not(None))
    assert await grid.services.store.read(lambda tx: tx.value(left)) == 0


async def test_workers_and_strangers_seal_and_submit_nothing(grid: TestGrid):
    async with Transport(await grid.worker()) as worker:
        me = await worker.call(wire.WHO)
        assert me.user_id is None
        with pytest.raises(Forbidden):
            await worker.call(wire.SUBMIT_JOB, wire.SubmitJob(spec=SPEC))
