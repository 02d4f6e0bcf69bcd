"""What one user, one worker or one broken wire must not do to everybody else."""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from pathlib import Path

import msgspec
import pytest

from deskgrid.client.grid import Grid, describe_file
from deskgrid.client.transport import Credentials, Transport
from deskgrid.errors import Conflict, DeskgridError, Forbidden, InvalidInput
from deskgrid.model import wire
from deskgrid.model.data import Blob, DataKind, Disk, Visibility
from deskgrid.model.ids import Sha256
from deskgrid.model.jobs import AttemptState, JobSpec, JobState, Machine
from deskgrid.model.machines import DiskFormat, DriverName, Fingerprint, MachineKind
from deskgrid.model.workers import AttemptReport, Capacity, Profile
from deskgrid.server import app
from deskgrid.server.routes import data as data_routes
from deskgrid.server.store import attempts
from deskgrid.server.store.schema import attempt
from deskgrid.settings import ServerSettings
from deskgrid.testing.grids import TestGrid, running_grid
from deskgrid.units import GIB
from deskgrid.worker.slots import NOTHING

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


async def test_attempt_suspended_for_too_long_is_cancelled_when_its_job_is_over(grid: TestGrid, tmp_path: Path):
    limits = msgspec.structs.replace(SPEC.limits, max_suspend_s=1.0)
    async with Grid(await grid.admin()) as user, Transport(await grid.worker()) as worker:
        await publish(user, tmp_path)
        job = await user.submit(msgspec.structs.replace(SPEC, limits=limits))
        [one] = (await worker.call(wire.SYNC, ask(free=ONE))).assignments
        suspended = AttemptReport(attempt_id=one.attempt_id, state=AttemptState.SUSPENDED)
        await worker.call(wire.SYNC, ask(suspended, free=NOTHING))
        await age_suspension(grid, one.attempt_id)
        await grid.services.store.write(attempts.expire_leases)
        await user.cancel(job.id)
        assert (await worker.call(wire.SYNC, ask(suspended, free=NOTHING))).cancelled == (one.attempt_id,)


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


# ---- bytes that are not one's own


async def test_bytes_that_were_wrong_once_give_no_right_to_the_blob(grid: TestGrid, tmp_path: Path):
    await steal(grid, tmp_path)


async def steal(grid: TestGrid, folder: Path) -> None:
    """Try to get a blob of which sha256 and size are known: send others, and finish while they are refused on another connection."""
    async with Grid(await grid.admin()) as boss:
        await boss.add_user("ann")
        await boss.add_user("eve")
    secret = folder / "secret"
    secret.write_bytes(b"the secret of ann" + bytes((1 << 20) - 17))  # so much is written before the sender's end is known
    blob = describe_file(secret)
    async with Grid(await grid.user("ann")) as ann:
        await ann.put(secret, "secret")
    credentials = await grid.user("eve")
    async with Transport(credentials, tries=1) as eve:
        begun = await eve.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=blob))
        head = f"PATCH /v1/uploads/{begun.id} HTTP/1.1\r\nTransfer-Encoding: chunked\r\n{wire.UPLOAD_OFFSET_HEADER}: "
        size = blob.size_bytes
        _, first = await raw_call(credentials, f"{head}0", f"{size:x}\r\n".encode() + b"x" * size + b"\r\n")
        part = grid.home / "uploads" / str(begun.id)
        async with asyncio.timeout(10):
            while not part.exists() or part.stat().st_size < size:
                await asyncio.sleep(0.01)
        first.close()
        reader, second = await raw_call(credentials, f"{head}{size}", b"")
        asking = asyncio.create_task(eve.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=blob)))
        await asyncio.wait({asking}, timeout=0.3)
        second.write(b"0\r\n\r\n")
        await asyncio.wait({asking})
        answer = (await asyncio.wait_for(reader.read(2000), 10)).decode()
        assert '"complete":true' not in answer
        with contextlib.suppress(DeskgridError):
            assert not (await asking).complete
        with pytest.raises(Conflict, match="not here"):
            await eve.call(wire.REGISTER_DATA, wire.RegisterData(name="mine", kind=DataKind.FILE, blob=blob))
        second.close()


async def test_names_of_cached_disks_are_told_to_the_pcs_owner_and_to_admins_only(grid: TestGrid):
    disk = Sha256("d" * 64)
    async with Transport(await grid.worker()) as worker:
        await worker.call(wire.SYNC, msgspec.structs.replace(ask(), cached=(disk, Sha256("y" * 7000))))
    async with Grid(await grid.admin()) as boss:
        await boss.add_user("eve")
        assert [one.cached for one in await boss.workers()] == [(disk,)]
    async with Grid(await grid.user("eve")) as eve:
        assert [one.cached for one in await eve.workers()] == [()]


# ---- numbers and texts that no database takes

HUGE = "9" * 5000


@pytest.mark.parametrize(
    "path",
    [
        f"/v1/jobs?before={2**63}",
        f"/v1/arrays?before={HUGE}",
        f"/v1/jobs?array={10**30}",
        f"/v1/audit?before={2**63}",
        f"/v1/data/x@{HUGE}",
        "/v1/data/x@%C2%B2",
        f"/v1/apps/x@{HUGE}",
        "/v1/data/a%00b",
        "/v1/data?kind=a%00b",
    ],
)
async def test_number_or_text_that_no_database_takes_is_refused(grid: TestGrid, path: str):
    credentials = await grid.admin()
    reader, writer = await raw_call(credentials, f"GET {path} HTTP/1.1", b"")
    assert (await reader.readline()).split()[1] == b"422"
    writer.close()


async def test_wire_version_of_many_digits_is_refused_before_the_token_is_looked_at(grid: TestGrid):
    credentials = msgspec.structs.replace(await grid.admin(), token="nobody's")
    reader, writer = await raw_call(credentials, f"GET /v1/who HTTP/1.1\r\n{wire.WIRE_VERSION_HEADER}: 1.{HUGE}", b"")
    assert (await reader.readline()).split()[1] == b"422"
    writer.close()


async def test_character_0_in_a_job_is_refused(grid: TestGrid):
    async with Transport(await grid.admin()) as user:
        with pytest.raises(InvalidInput, match="character 0"):
            await user.call(wire.SUBMIT_JOB, wire.SubmitJob(spec=msgspec.structs.replace(SPEC, fill=("a\0b",))))


@pytest.mark.parametrize(
    ("text", "is_refused"), [("\\u0000", False), ("\\\\u0000", False), ("\0", True), ("\\\0", True), ("\\\\\0", True)]
)
async def test_text_that_only_writes_about_character_0_is_taken(grid: TestGrid, text: str, is_refused: bool):
    async with Transport(await grid.admin()) as user:
        secret = wire.AddToken(token_hash=Sha256("0" * 64), rights=("jobs",), label=f"printf '{text}'", lifetime_s=60.0)
        with pytest.raises(InvalidInput, match="character 0") if is_refused else contextlib.nullcontext():
            await user.call(wire.ADD_TOKEN, secret)


@pytest.mark.parametrize("size", [-(10**12), 1 << 63])
async def test_upload_of_no_possible_size_is_refused(grid: TestGrid, size: int):
    async with Transport(await grid.admin()) as user:
        with pytest.raises(InvalidInput):
            await user.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=Blob(sha256=Sha256("0" * 64), size_bytes=size)))


async def test_uploads_count_before_anything_refers_to_them(tmp_path: Path):
    async with running_grid(tmp_path / "server", ServerSettings(max_bytes=1000)) as grid, Transport(await grid.admin()) as user:
        for number in range(2):
            blob = Blob(sha256=Sha256(f"{number}" * 64), size_bytes=600)
            if number:
                await grid.services.store.write(lambda tx: tx.memo.pop("kept_bytes"))  # as some seconds later
                with pytest.raises(Forbidden, match="you may keep"):
                    await user.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=blob))
            else:
                await user.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=blob))


@pytest.mark.parametrize("cpus", [1 << 51, 10**30])
async def test_worker_that_lends_more_than_there_is_is_refused_and_the_status_still_told(grid: TestGrid, cpus: int):
    async with Transport(await grid.worker()) as worker:
        lent = msgspec.structs.replace(PROFILE.lent, cpus=cpus)
        with pytest.raises(InvalidInput):
            await worker.call(wire.SYNC, msgspec.structs.replace(ask(), profile=msgspec.structs.replace(PROFILE, lent=lent)))
        lent = msgspec.structs.replace(PROFILE.lent, memory_bytes=1 << 50)
        await worker.call(wire.SYNC, msgspec.structs.replace(ask(), profile=msgspec.structs.replace(PROFILE, lent=lent)))
    async with Grid(await grid.admin()) as boss:
        assert (await boss.status()).lent.memory_bytes == 1 << 50


async def test_exit_code_of_any_size_ends_a_job(grid: TestGrid, tmp_path: Path):
    async with Grid(await grid.admin()) as user, Transport(await grid.worker()) as worker:
        await publish(user, tmp_path)
        job = await user.submit(SPEC)
        [given] = (await worker.call(wire.SYNC, ask(free=ONE))).assignments
        report = AttemptReport(attempt_id=given.attempt_id, state=AttemptState.FAILED, exit_code=1 << 62, reason="so it said")
        assert (await worker.call(wire.SYNC, ask(report, free=NOTHING))).acknowledged == (given.attempt_id,)
        assert (await user.job(job.id)).attempts[0].exit_code == (1 << 31) - 1


async def test_same_token_twice_is_a_conflict(grid: TestGrid):
    async with Transport(await grid.admin()) as user:
        request = wire.AddToken(token_hash=Sha256("a" * 64), label="one", rights=("jobs",), lifetime_s=60.0)
        await user.call(wire.ADD_TOKEN, request)
        with pytest.raises(Conflict):
            await user.call(wire.ADD_TOKEN, request)
