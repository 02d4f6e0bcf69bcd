"""What one user, one worker or one broken wire must not do to everybody else."""

from __future__ import annotations

import asyncio
import ssl
from pathlib import Path

import msgspec
import pytest

from deskgrid.client.grid import Grid, describe_file
from deskgrid.client.transport import Credentials, Transport
from deskgrid.errors import InvalidInput
from deskgrid.model import wire
from deskgrid.model.data import DataKind, Disk, Visibility
from deskgrid.model.jobs import AttemptState, JobSpec, JobState, Machine
from deskgrid.model.machines import DiskFormat, DriverName, Fingerprint, MachineKind
from deskgrid.model.workers import AttemptReport, Capacity, Profile
from deskgrid.server import app
from deskgrid.server.routes import data as data_routes
from deskgrid.server.store import attempts
from deskgrid.server.store.schema import attempt
from deskgrid.testing.grids import TestGrid, running_grid
from deskgrid.units import GIB

SPEC = JobSpec(name="hello", machine=Machine(disk="tiny"))
PROFILE = Profile(
    os="linux",
    arch="x86_64",
    drivers=(Fingerprint(driver=DriverName.FAKE, kinds=(MachineKind.VM,), usable=True),),
    lent=Capacity(cpus=2, memory_bytes=2 * GIB, disk_bytes=10 * GIB),
    version="test",
)
ONE = Capacity(cpus=1, memory_bytes=GIB, disk_bytes=10 * GIB)


@pytest.fixture
async def grid(tmp_path: Path):
    async with running_grid(tmp_path / "server") as running:
        yield running


def ask(*reports: AttemptReport, free: Capacity = PROFILE.lent) -> wire.Sync:
    return wire.Sync(profile=PROFILE, paused=False, attempts=reports, free=free, cached=())


async def publish(user: Grid, folder: Path) -> None:
    file = await disk_file(folder, "tiny")
    blob = describe_file(file)
    disk = Disk(sha256=blob.sha256, size_bytes=4, virtual_bytes=4, format=DiskFormat.ISO)
    await user.put(file, "tiny", kind=DataKind.DISK, disk=disk)


async def raw_call(credentials: Credentials, head: str, body: bytes) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    trust = ssl.create_default_context(cadata=credentials.authority_pem)
    host, _, port = credentials.address.rpartition(":")
    reader, writer = await asyncio.open_connection(host, int(port), ssl=trust, server_hostname=wire.SERVER_NAME)
    writer.write(f"{head}\r\nHost: grid\r\nAuthorization: Bearer {credentials.token}\r\n\r\n".encode() + body)
    await writer.drain()
    return reader, writer


async def test_upload_whose_sender_fell_silent_is_continued_on_another_connection(
    grid: TestGrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(data_routes, "_SILENCE_S", 0.2)
    credentials, file = await grid.admin(), tmp_path / "file"
    file.write_bytes(b"x" * 1000)
    async with Grid(credentials) as user:
        blob = describe_file(file)
        upload = await user.transport.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=blob))
        head = f"PATCH /v1/uploads/{upload.id} HTTP/1.1\r\n{wire.UPLOAD_OFFSET_HEADER}: 0\r\nContent-Length: 1000"
        _reader, writer = await raw_call(credentials, head, b"x" * 10)
        await asyncio.sleep(0.05)
        async with asyncio.timeout(10):
            await user.put(file, "file")
        writer.close()


async def test_empty_file_goes_up_and_down(grid: TestGrid, tmp_path: Path):
    (tmp_path / "empty").write_bytes(b"")
    async with Grid(await grid.admin()) as user:
        await user.put(tmp_path / "empty", "empty")
        await user.get("empty", tmp_path / "back")
    assert (tmp_path / "back").read_bytes() == b""


async def test_upload_of_a_file_that_is_gone_or_shorter_says_so(grid: TestGrid, tmp_path: Path):
    file = tmp_path / "file"
    file.write_bytes(b"x" * 100)
    blob = describe_file(file)
    async with Transport(await grid.admin()) as user:
        file.write_bytes(b"x" * 99)
        with pytest.raises(InvalidInput, match="bytes announced"):
            await user.upload(file, blob)
        file.unlink()
        with pytest.raises(FileNotFoundError):
            await user.upload(file, blob)


async def test_waiting_for_not_a_number_of_seconds_is_refused(grid: TestGrid):
    async with Transport(await grid.worker()) as worker:
        for text in ("nan", "inf", "-inf"):
            with pytest.raises(InvalidInput, match="wait_s"):
                await worker.call(wire.WAKE, query={"wait_s": text})


async def test_nobody_can_put_his_disk_in_the_place_of_one_that_others_use(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as admin:
        for name in ("mallory", "bob", "ann"):
            await admin.add_user(name)
        await admin.put(await disk_file(tmp_path, "tiny"), "tiny", visibility=Visibility.PUBLIC)
    async with (
        Grid(await grid.user("bob")) as bob,
        Grid(await grid.user("mallory")) as mallory,
        Grid(await grid.user("ann")) as ann,
    ):
        await bob.put(await disk_file(tmp_path, "root"), "root", visibility=Visibility.PUBLIC)
        for content in ("evil 1", "evil 2"):
            for name in ("tiny", "root"):
                await mallory.put(await disk_file(tmp_path, content), name, visibility=Visibility.PUBLIC)
        assert (await ann.data("tiny")).owner == "admin"
        assert (await ann.data("root")).owner == "bob"
        assert (await mallory.data("tiny")).owner == "mallory"
        assert (await mallory.data("tiny")).version == 2


async def disk_file(folder: Path, content: str) -> Path:
    file = folder / content
    file.write_text(content)
    return file


async def test_job_that_a_worker_refuses_does_not_keep_it_from_other_jobs(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as user, Transport(await grid.worker()) as worker:
        await publish(user, tmp_path)
        await user.submit(SPEC)
        [first] = (await worker.call(wire.SYNC, ask(free=ONE))).assignments
        other = await user.submit(msgspec.structs.replace(SPEC, machine=Machine(disk="tiny", memory_bytes=GIB // 2)))
        no = AttemptReport(attempt_id=first.attempt_id, state=AttemptState.REFUSED, reason="this PC cannot do it")
        answer = await worker.call(wire.SYNC, ask(no, free=ONE))
        assert [one.job_id for one in answer.assignments] == [other.id]


async def test_attempt_suspended_for_too_long_stays_lost_while_it_is_suspended(grid: TestGrid, tmp_path: Path):
    limits = msgspec.structs.replace(SPEC.limits, max_suspend_s=1.0)
    async with Grid(await grid.admin()) as user, Transport(await grid.worker()) as worker:
        await publish(user, tmp_path)
        job = await user.submit(msgspec.structs.replace(SPEC, limits=limits))
        [one] = (await worker.call(wire.SYNC, ask(free=ONE))).assignments

        async def report(state: AttemptState) -> wire.SyncAnswer:
            return await worker.call(wire.SYNC, ask(AttemptReport(attempt_id=one.attempt_id, state=state), free=zero))

        zero = Capacity(cpus=0, memory_bytes=0, disk_bytes=0)
        await report(AttemptState.RUNNING)
        await report(AttemptState.SUSPENDED)
        await age_suspension(grid, one.attempt_id)
        await grid.services.store.write(attempts.expire_leases)
        assert not (await report(AttemptState.SUSPENDED)).cancelled
        assert (await user.job(job.id)).job.state is JobState.WAITING
        await report(AttemptState.RUNNING)
        assert (await user.job(job.id)).job.state is JobState.ACTIVE


async def age_suspension(grid: TestGrid, attempt_id: int) -> None:
    def age(tx):
        mine = attempt.update().where(attempt.c.id == attempt_id)
        tx.run(mine.values(suspended_at=tx.now - 10, lease_expires_at=tx.now - 9))

    await grid.services.store.write(age)


async def test_worker_that_says_too_much_is_refused(grid: TestGrid):
    async with Transport(await grid.worker()) as worker:
        reports = [AttemptReport(attempt_id=number, state=AttemptState.RUNNING) for number in range(4001)]
        with pytest.raises(InvalidInput, match="more than a worker"):
            await worker.call(wire.SYNC, ask(*reports))
        long = msgspec.structs.replace(ask(), profile=msgspec.structs.replace(PROFILE, os="x" * (1 << 17)))
        with pytest.raises(InvalidInput, match="more than a worker"):
            await worker.call(wire.SYNC, long)


def test_sweep_survives_what_it_did_not_expect():
    with app._failures_logged("the sweep failed"):
        raise PermissionError("unlink")
