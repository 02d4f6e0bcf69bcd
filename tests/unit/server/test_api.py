"""The server's routes over real TLS, with workers played by hand."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from deskgrid.client.grid import Grid, describe_file
from deskgrid.client.transport import Transport
from deskgrid.errors import Conflict, Forbidden, InvalidInput, NotFound, Unauthenticated
from deskgrid.model import wire
from deskgrid.model.data import Blob, DataKind, Disk, Visibility
from deskgrid.model.ids import Sha256
from deskgrid.model.jobs import AttemptState, JobSpec, JobState, Limits, Machine
from deskgrid.model.machines import DiskFormat, DriverName, Fingerprint, MachineKind
from deskgrid.model.workers import AttemptReport, Capacity, Profile
from deskgrid.server.retention import remove_unused
from deskgrid.testing.grids import TestGrid, running_grid
from deskgrid.units import GIB

SPEC = JobSpec(name="hello", machine=Machine(disk="tiny"), limits=Limits(attempts=2))
PROFILE = Profile(
    os="linux",
    arch="x86_64",
    drivers=(Fingerprint(driver=DriverName.FAKE, kinds=(MachineKind.VM,), usable=True),),
    lent=Capacity(cpus=2, memory_bytes=2 * GIB, disk_bytes=10 * GIB),
    version="test",
)


def ask(*reports: AttemptReport, free: Capacity = PROFILE.lent) -> wire.Sync:
    return wire.Sync(profile=PROFILE, paused=False, attempts=reports, free=free, cached=())


@pytest.fixture
async def grid(tmp_path: Path):
    async with running_grid(tmp_path / "server") as running:
        yield running


async def publish(user: Grid, folder: Path, name: str = "tiny", content: bytes = b"disk") -> Blob:
    file = folder / name
    file.write_bytes(content)
    blob = describe_file(file)
    disk = Disk(sha256=blob.sha256, size_bytes=len(content), virtual_bytes=len(content), format=DiskFormat.ISO)
    await user.put(file, name, kind=DataKind.DISK, disk=disk)
    return blob


async def send(worker: Transport, folder: Path, content: bytes) -> Blob:
    file = folder / "result"
    file.write_bytes(content)
    blob = describe_file(file)
    await worker.upload(file, blob)
    return blob


async def test_job_runs_from_submission_to_result(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as user, Transport(await grid.worker()) as worker:
        disk = await publish(user, tmp_path)
        job = await user.submit(SPEC)
        assert job.state is JobState.WAITING
        answer = await worker.call(wire.SYNC, ask())
        [assignment] = answer.assignments
        assert assignment.disk.blob == disk
        await worker.download(disk, tmp_path / "fetched")
        held = AttemptReport(attempt_id=assignment.attempt_id, state=AttemptState.RUNNING)
        await worker.call(wire.SYNC, ask(held))
        await worker.call(
            wire.APPEND_LOG, wire.AppendLog(attempt_id=assignment.attempt_id, stream="stdout", offset=0, data=b"hello\n")
        )
        result = await send(worker, tmp_path, b"archive")
        done = AttemptReport(attempt_id=assignment.attempt_id, state=AttemptState.SUCCEEDED, exit_code=0, result=result)
        answer = await worker.call(wire.SYNC, ask(done))
        assert answer.acknowledged == (assignment.attempt_id,)
        [detail] = await user.wait([job.id])
        assert detail.job.state is JobState.COMPLETED
        assert detail.job.result == result.sha256
        assert detail.attempts[0].state is AttemptState.SUCCEEDED
        assert (await user.read_log(job.id)).data == b"hello\n"


async def test_final_report_repeated_after_a_lost_answer_keeps_the_result(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as user, Transport(await grid.worker()) as worker:
        await publish(user, tmp_path)
        job = await user.submit(SPEC)
        [assignment] = (await worker.call(wire.SYNC, ask())).assignments
        result = await send(worker, tmp_path, b"archive")
        done = AttemptReport(attempt_id=assignment.attempt_id, state=AttemptState.SUCCEEDED, exit_code=0, result=result)
        await worker.call(wire.SYNC, ask(done))
        answer = await worker.call(wire.SYNC, ask(done))
        assert answer.acknowledged == (assignment.attempt_id,)
        assert (await user.job(job.id)).job.result == result.sha256
        await user.transport.download(result, tmp_path / "again")


async def test_attempts_that_fail_are_tried_again_until_the_bound(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as user, Transport(await grid.worker()) as worker:
        await publish(user, tmp_path)
        job = await user.submit(SPEC)
        for _ in range(2):
            [assignment] = (await worker.call(wire.SYNC, ask())).assignments
            report = AttemptReport(
                attempt_id=assignment.attempt_id, state=AttemptState.FAILED, exit_code=3, reason="context.sh ended with 3"
            )
            await worker.call(wire.SYNC, ask(report, free=Capacity(cpus=0, memory_bytes=0, disk_bytes=0)))
        detail = await user.job(job.id)
        assert detail.job.state is JobState.FAILED
        assert "context.sh ended with 3" in detail.job.message
        assert [attempt.state for attempt in detail.attempts] == [AttemptState.FAILED] * 2
        assert (await worker.call(wire.SYNC, ask())).assignments == ()


async def test_lease_that_the_worker_never_heard_of_goes_back(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as user, Transport(await grid.worker()) as worker:
        await publish(user, tmp_path)
        job = await user.submit(SPEC)
        first = (await worker.call(wire.SYNC, ask())).assignments
        second = (await worker.call(wire.SYNC, ask())).assignments
        assert first[0].number == 1
        assert second[0].number == 2
        states = [attempt.state for attempt in (await user.job(job.id)).attempts]
        assert states == [AttemptState.REFUSED, AttemptState.LEASED]


async def test_repeated_sync_with_the_same_key_gets_the_same_lease(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as user, Transport(await grid.worker()) as worker:
        await publish(user, tmp_path)
        await user.submit(SPEC)
        first = await worker.call(wire.SYNC, ask(), key="one")
        again = await worker.call(wire.SYNC, ask(), key="one")
        assert first.assignments
        assert first.assignments == again.assignments


async def test_refused_attempt_goes_to_another_worker(grid: TestGrid, tmp_path: Path):
    async with (
        Grid(await grid.admin()) as user,
        Transport(await grid.worker("a")) as first,
        Transport(await grid.worker("b")) as second,
    ):
        await publish(user, tmp_path)
        job = await user.submit(SPEC)
        [assignment] = (await first.call(wire.SYNC, ask())).assignments
        refusal = AttemptReport(attempt_id=assignment.attempt_id, state=AttemptState.REFUSED, reason="no space")
        assert (await first.call(wire.SYNC, ask(refusal))).assignments == ()
        assert len((await second.call(wire.SYNC, ask())).assignments) == 1
        assert (await user.job(job.id)).job.state is JobState.ACTIVE


async def test_cancelled_job_is_told_to_its_worker_and_stays_cancelled(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as user, Transport(await grid.worker()) as worker:
        await publish(user, tmp_path)
        job = await user.submit(SPEC)
        [assignment] = (await worker.call(wire.SYNC, ask())).assignments
        assert (await user.cancel(job.id)).state is JobState.CANCELLED
        assert (await worker.call(wire.WAKE, wait_s=10)).changed
        running = AttemptReport(attempt_id=assignment.attempt_id, state=AttemptState.RUNNING)
        assert (await worker.call(wire.SYNC, ask(running))).cancelled == (assignment.attempt_id,)
        late = AttemptReport(
            attempt_id=assignment.attempt_id,
            state=AttemptState.SUCCEEDED,
            exit_code=0,
            result=await send(worker, tmp_path, b"late"),
        )
        assert (await worker.call(wire.SYNC, ask(late))).acknowledged == (assignment.attempt_id,)
        assert (await user.job(job.id)).job.state is JobState.CANCELLED
        await remove_unused(grid.services, wait_s=0)
        assert late.result is not None
        with pytest.raises(NotFound):
            grid.services.repository.file(late.result.sha256)


async def test_success_without_its_result_gives_the_job_back(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as user, Transport(await grid.worker()) as worker:
        await publish(user, tmp_path)
        job = await user.submit(SPEC)
        [assignment] = (await worker.call(wire.SYNC, ask())).assignments
        claimed = Blob(sha256=Sha256("0" * 64), size_bytes=5)
        report = AttemptReport(attempt_id=assignment.attempt_id, state=AttemptState.SUCCEEDED, exit_code=0, result=claimed)
        await worker.call(wire.SYNC, ask(report, free=Capacity(cpus=0, memory_bytes=0, disk_bytes=0)))
        detail = await user.job(job.id)
        assert detail.job.state is JobState.WAITING
        assert detail.attempts[0].state is AttemptState.REFUSED


async def test_failure_whose_result_did_not_arrive_is_still_a_failure(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as user, Transport(await grid.worker()) as worker:
        await publish(user, tmp_path)
        job = await user.submit(SPEC)
        [assignment] = (await worker.call(wire.SYNC, ask())).assignments
        claimed = Blob(sha256=Sha256("0" * 64), size_bytes=5)
        report = AttemptReport(attempt_id=assignment.attempt_id, state=AttemptState.FAILED, exit_code=3, result=claimed)
        await worker.call(wire.SYNC, ask(report, free=Capacity(cpus=0, memory_bytes=0, disk_bytes=0)))
        assert (await user.job(job.id)).attempts[0].state is AttemptState.FAILED


async def test_submission_repeated_with_the_same_key_makes_one_job(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as user:
        await publish(user, tmp_path)
        request = wire.SubmitJob(spec=SPEC)
        first = await user.transport.call(wire.SUBMIT_JOB, request, key="once")
        second = await user.transport.call(wire.SUBMIT_JOB, request, key="once")
        assert first == second
        assert len((await user.jobs()).jobs) == 1


async def test_upload_goes_on_where_it_stopped_and_wrong_bytes_are_refused(grid: TestGrid, tmp_path: Path):
    content = b"x" * 5_000_000
    (tmp_path / "big").write_bytes(content)
    blob = describe_file(tmp_path / "big")
    async with Transport(await grid.admin()) as user:
        upload = await user.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=blob))
        headers = {wire.UPLOAD_OFFSET_HEADER: "0"}
        async with user._request(wire.UPLOAD_BYTES, {"upload": upload.id}, headers=headers, data=content[:3_000_000]) as answer:
            await answer.read()
        again = await user.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=blob))
        assert (again.received_bytes, again.complete) == (3_000_000, False)
        with pytest.raises(Conflict):
            async with user._request(wire.UPLOAD_BYTES, {"upload": upload.id}, headers=headers, data=b"x"):
                pass
        seen: list[int] = []
        await user.upload(tmp_path / "big", blob, seen.append)
        assert seen[0] == 3_000_000
        assert seen[-1] == len(content)
        wrong = Blob(sha256=Sha256(hashlib.sha256(b"other").hexdigest()), size_bytes=3)
        with pytest.raises(InvalidInput, match="sha256"):
            (tmp_path / "wrong").write_bytes(b"bad")
            await user.upload(tmp_path / "wrong", wrong)


async def test_knowing_a_sha256_grants_nothing(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as admin:
        await admin.add_user("ann")
        await admin.add_user("bob")
        async with Grid(await grid.user("ann")) as ann, Grid(await grid.user("bob")) as bob:
            blob = await publish(ann, tmp_path, "secret", b"secret bytes")
            with pytest.raises(NotFound):
                await bob.transport.download(blob, tmp_path / "stolen")
            with pytest.raises(NotFound):
                await bob.data(blob.sha256)
            with pytest.raises(Conflict):
                await bob.transport.call(
                    wire.REGISTER_DATA, wire.RegisterData(name="mine", kind=DataKind.FILE, blob=blob, visibility=Visibility.PUBLIC)
                )
            job = await ann.submit(JobSpec(machine=Machine(disk="secret")))
            with pytest.raises(NotFound):
                await bob.job(job.id)
            async with Transport(await grid.worker()) as worker:
                with pytest.raises(NotFound):
                    await worker.download(blob, tmp_path / "early")
                assert (await worker.call(wire.SYNC, ask())).assignments
                await worker.download(blob, tmp_path / "leased")


async def test_worker_and_user_tokens_are_kept_apart(grid: TestGrid):
    async with Grid(await grid.admin()) as admin:
        await admin.add_user("ann")
        with pytest.raises(Conflict):
            await admin.add_user("ann")
        async with Grid(await grid.user("ann")) as ann, Transport(await grid.worker()) as worker:
            with pytest.raises(Forbidden):
                await ann.add_user("eve")
            with pytest.raises(Forbidden):
                await ann.transport.call(wire.SYNC, ask())
            with pytest.raises(Forbidden):
                await worker.call(wire.LIST_JOBS)
            [token] = await ann.tokens()
            await ann.revoke_token(token.id)
            with pytest.raises(Unauthenticated):
                await ann.status()


async def test_link_works_once(grid: TestGrid):
    from deskgrid.client.grid import join

    link = await grid.join_link()
    await join(link, "first")
    with pytest.raises(Unauthenticated):
        await join(link, "second")


async def test_worker_that_leaves_gives_its_jobs_back_and_its_token_ends(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as user, Transport(await grid.worker()) as worker:
        await publish(user, tmp_path)
        job = await user.submit(SPEC)
        assert (await worker.call(wire.SYNC, ask())).assignments
        await worker.call(wire.LEAVE)
        assert (await user.job(job.id)).job.state is JobState.WAITING
        with pytest.raises(Unauthenticated):
            await worker.call(wire.SYNC, ask())
        assert await user.workers() == ()


async def test_groups_have_members(grid: TestGrid):
    async with Grid(await grid.admin()) as admin:
        await admin.add_user("ann")
        await admin.add_group("hep")
        assert (await admin.set_members("hep", add=["ann", "admin"])).members == ("admin", "ann")
        assert (await admin.set_members("hep", remove=["ann"])).members == ("admin",)
        with pytest.raises(NotFound):
            await admin.set_members("hep", add=["nobody"])


async def test_status_and_openapi_answer(grid: TestGrid):
    async with Grid(await grid.admin()) as admin, Transport(await grid.worker()) as worker:
        await worker.call(wire.SYNC, ask())
        status = await admin.status()
        assert status.workers_online == 1
        assert status.lent.cpus == 2
        session = admin.transport._session
        async with session.get("/openapi.json", server_hostname=wire.SERVER_NAME) as answer:
            document = await answer.json()
        assert set(document["paths"]) == {route.path for route in wire.ROUTES.values()}
        async with session.get("/docs", server_hostname=wire.SERVER_NAME) as answer:
            assert "submit_job" not in await answer.text()
            assert answer.status == 200
