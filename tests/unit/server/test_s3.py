"""Blobs at an S3 store, from a real client through a real server to moto: bytes go past the server, and only right ones count."""

from __future__ import annotations

import asyncio
import contextlib
import functools
import hashlib
import random
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import aiohttp
import botocore.session
import pytest
from tests.unit.server.test_hostile import steal

from deskgrid.client.direct import BlobStore
from deskgrid.client.grid import Grid, describe_file, login
from deskgrid.client.transport import Transport
from deskgrid.errors import InvalidInput, NotFound, OperatorError, ProtocolError
from deskgrid.model import tes, wire
from deskgrid.model.data import Blob, DataKind
from deskgrid.model.tes import TesExecutor, TesInput, TesTask
from deskgrid.server import repository_s3, s3
from deskgrid.server.retention import clean, remove_unused
from deskgrid.server.setup import init_server, make_login_link
from deskgrid.settings import ServerSettings
from deskgrid.testing.grids import TestGrid, running_grid
from deskgrid.testing.s3_server import ACCESS_KEY, BUCKET, SECRET_KEY, S3Server, running_moto, running_s3

LARGE, PART = 3_000_000, 1 << 20


@pytest.fixture
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files of a few MB, not of many, come in several parts."""
    monkeypatch.setattr(repository_s3, "_SINGLE_BYTES", PART)
    monkeypatch.setattr(s3, "_PART_BYTES", PART)
    monkeypatch.setattr(repository_s3, "part_bytes", lambda _size: PART)


@pytest.fixture(autouse=True)
def keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", ACCESS_KEY)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET_KEY)


@pytest.fixture(scope="module", autouse=True)
def descriptions_read_once() -> Iterator[None]:
    """A session of botocore reads its descriptions of AWS anew, which takes longer than what most tests do with it."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(botocore.session, "create_loader", functools.cache(botocore.session.create_loader))
        yield


@pytest.fixture(scope="module")
def moto() -> Iterator[str]:
    with running_moto() as address:
        yield address


@pytest.fixture(params=[True, False], ids=["store checks sums", "server reads"])
async def store(request: pytest.FixtureRequest, small_parts: None, moto: str) -> AsyncIterator[S3Server]:
    async with running_s3(moto, checks_sums=request.param) as running:
        yield running


def settings_for(store: S3Server, **others: object) -> ServerSettings:
    address = f"s3://{BUCKET}/grid?endpoint={store.url}"
    return ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, blobs=address, **others)  # type: ignore[arg-type]


@pytest.fixture
async def grid(tmp_path: Path, store: S3Server) -> AsyncIterator[TestGrid]:
    async with running_grid(tmp_path / "server", settings_for(store)) as running:
        yield running


def written(file: Path, size: int, seed: int = 1) -> Path:
    file.write_bytes(random.Random(seed).randbytes(size))
    return file


@pytest.mark.parametrize("size", [0, 1, PART, LARGE])
async def test_bytes_go_past_the_server_and_come_back(grid: TestGrid, store: S3Server, tmp_path: Path, size: int):
    source = written(tmp_path / "source", size)
    async with Grid(await grid.admin()) as user:
        blob = (await user.put(source, "data")).blob
        await user.transport.download(blob, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.read_bytes()
    assert list((grid.home / "uploads").iterdir()) == []
    sent = [path for method, path, _ in store.seen if method == "PUT"]
    assert len(sent) == (0 if size == 0 else 1 if size <= PART else 3)
    assert not any("authorization" in headers for _, _, headers in store.seen)


@pytest.mark.parametrize("have", [1, LARGE // 2, LARGE - 1])
async def test_download_goes_on_after_the_bytes_that_are_there(grid: TestGrid, tmp_path: Path, have: int):
    source = written(tmp_path / "source", LARGE)
    async with Grid(await grid.admin()) as user:
        blob = (await user.put(source, "data")).blob
        (tmp_path / "target").write_bytes(source.read_bytes()[:have])
        await user.transport.download(blob, tmp_path / "target")
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


async def test_parts_that_are_there_are_not_sent_again_by_a_client_and_a_server_begun_anew(store: S3Server, tmp_path: Path):
    source = written(tmp_path / "source", LARGE)
    blob = describe_file(source)
    async with running_grid(tmp_path / "server", settings_for(store)) as grid:
        credentials = await grid.admin()
        async with Transport(credentials) as transport, BlobStore() as outside:
            begun = await transport.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=blob, direct=True))
            await outside.send(source, begun.parts[1:2], lambda size: None)
    store.seen.clear()
    async with running_grid(tmp_path / "server", settings_for(store)) as grid, Grid(await grid.admin()) as user:
        seen: list[int] = []
        await user.transport.upload(source, blob, seen.append)
        assert seen[0] == PART
        assert len([method for method, _, _ in store.seen if method == "PUT"]) == 2
        assert await grid.services.repository.holds(blob)


async def test_upload_through_a_store_that_breaks_now_and_then_ends_whole(grid: TestGrid, store: S3Server, tmp_path: Path):
    store.broken = 2
    source = written(tmp_path / "source", LARGE)
    async with Grid(await grid.admin()) as user:
        blob = (await user.put(source, "data")).blob
    assert await grid.services.repository.holds(blob)


@pytest.mark.parametrize("size", [1000, LARGE])
async def test_wrong_bytes_never_become_a_blob(grid: TestGrid, tmp_path: Path, size: int):
    blob = describe_file(written(tmp_path / "right", size, 1))
    wrong = written(tmp_path / "wrong", size, 2)
    async with Grid(await grid.admin()) as user:
        with pytest.raises(InvalidInput):
            await user.transport.upload(wrong, blob)
        assert not await grid.services.repository.holds(blob)
        await user.transport.upload(tmp_path / "right", blob)
        assert await grid.services.repository.holds(blob)


async def test_bytes_that_were_wrong_once_give_no_right_to_the_blob(grid: TestGrid, tmp_path: Path):
    await steal(grid, tmp_path)


async def test_who_has_a_url_cannot_change_a_blob_later(grid: TestGrid, store: S3Server, tmp_path: Path):
    source = written(tmp_path / "source", 1000)
    blob = describe_file(source)
    async with Transport(await grid.admin()) as transport, BlobStore() as outside:
        begun = await transport.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=blob, direct=True))
        await transport.upload(source, blob)
        wrong = written(tmp_path / "wrong", 1000, 2)
        try:
            await outside.send(wrong, begun.parts, lambda size: None)
        except InvalidInput:
            assert store.checks_sums
        await transport.upload(source, blob)
        path = await grid.services.repository.local_path(blob)
    assert path.read_bytes() == source.read_bytes()


async def test_url_is_bound_to_size_and_key(grid: TestGrid, store: S3Server, tmp_path: Path):
    source = written(tmp_path / "source", 1000)
    async with Transport(await grid.admin()) as transport, aiohttp.ClientSession() as session:
        begun = await transport.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=describe_file(source), direct=True))
        [part] = begun.parts
        other = part.url.replace("/uploads/", "/blobs/")
        for url, body in ((part.url, source.read_bytes() + b"more"), (other, source.read_bytes())):
            from yarl import URL

            async with session.put(URL(url, encoded=True), data=body, headers=part.headers) as answer:
                assert answer.status == 403
    assert store.refused[-2:] == ["SignatureDoesNotMatch"] * 2


async def test_expired_url_is_asked_for_anew(grid: TestGrid, store: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = written(tmp_path / "source", 1000)
    store.refused.clear()  # of the probe at the server's start
    store.late_s = repository_s3._LINK_S + 60
    fetched = Transport._begin_upload

    async def once_late(self: Transport, blob: Blob) -> wire.Upload:
        upload = await fetched(self, blob)
        if store.refused:
            store.late_s = 0.0
        return upload

    monkeypatch.setattr(Transport, "_begin_upload", once_late)
    async with Grid(await grid.admin()) as user:
        blob = (await user.put(source, "data")).blob
        assert store.refused == ["AccessDenied"]
        store.late_s = repository_s3._LINK_S + 60
        downloading = asyncio.create_task(user.transport.download(blob, tmp_path / "target"))
        async with asyncio.timeout(30):
            while len(store.refused) < 2:
                await asyncio.sleep(0.01)
        store.late_s = 0.0
        await downloading
    assert (tmp_path / "target").read_bytes() == source.read_bytes()


async def test_client_that_knows_no_urls_sends_and_fetches_through_the_server(grid: TestGrid, store: S3Server, tmp_path: Path):
    content = random.Random(5).randbytes(LARGE)
    blob = Blob(sha256=hashlib.sha256(content).hexdigest(), size_bytes=LARGE)  # type: ignore[arg-type]
    async with Transport(await grid.admin()) as transport:
        begun = await transport.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=blob))
        assert not begun.parts
        for start, end in ((0, 1000), (1000, LARGE)):
            headers = {wire.UPLOAD_OFFSET_HEADER: str(start)}
            async with transport._request(
                wire.UPLOAD_BYTES, {"upload": begun.id}, headers=headers, data=content[start:end]
            ) as answer:
                last = await answer.json()
        assert last["complete"]
        for first, status, wanted in ((None, 200, content), (LARGE - 5, 206, content[-5:]), (10, 206, content[10:])):
            headers = {} if first is None else {"Range": f"bytes={first}-"}
            async with transport._request(wire.GET_BLOB, {"sha256": blob.sha256}, headers=headers) as answer:
                assert answer.status == status
                assert await answer.read() == wanted
    assert not store.seen
    assert list((grid.home / "uploads").iterdir()) == []


async def test_what_nobody_needs_is_removed_from_the_store(grid: TestGrid, store: S3Server, tmp_path: Path):
    async with Grid(await grid.admin()) as user:
        blob = (await user.put(written(tmp_path / "source", LARGE), "data")).blob
        other = describe_file(written(tmp_path / "other", LARGE, 2))
        begun = await user.transport.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=other, direct=True))
        assert await grid.services.repository.upload_ids() == {begun.id}
        await clean(grid.services)
        assert await grid.services.repository.upload_ids() == {begun.id}
        await user.remove_data("data")
        assert await remove_unused(grid.services, wait_s=0) == 1
        assert not await grid.services.repository.holds(blob)
        with pytest.raises(NotFound):
            await user.transport.download(blob, tmp_path / "target")
        status = await user.status()
        assert status.storage_place == f"S3 bucket {BUCKET}"
    import sqlalchemy as sa

    from deskgrid.server.store.schema import upload

    await grid.services.store.write(lambda tx: tx.run(sa.delete(upload)))
    await clean(grid.services)
    assert await grid.services.repository.upload_ids() == set()


async def test_bucket_that_is_missing_is_told_at_the_start(store: S3Server, tmp_path: Path):
    settings = ServerSettings(listen="127.0.0.1:0", blobs=f"s3://another?endpoint={store.url}")
    with pytest.raises(OperatorError, match="no bucket another"):
        async with running_grid(tmp_path / "server", settings):
            pass


async def test_store_that_cannot_be_reached_is_told_at_the_start(tmp_path: Path):
    settings = ServerSettings(listen="127.0.0.1:0", blobs=f"s3://{BUCKET}?endpoint=http://127.0.0.1:9")
    with pytest.raises(OperatorError, match="cannot be used"):
        async with running_grid(tmp_path / "server", settings):
            pass


async def test_key_file_that_others_can_read_is_refused_and_its_keys_are_in_no_message(tmp_path: Path):
    home = tmp_path / "server"
    home.mkdir()
    (home / "s3.toml").write_text(f'access_key = "{ACCESS_KEY}"\nsecret_key = "{SECRET_KEY}"\n')
    (home / "s3.toml").chmod(0o644)
    with pytest.raises(OperatorError, match="others can read"):
        await s3.open_bucket(home, f"s3://{BUCKET}?endpoint=http://127.0.0.1:9")
    (home / "s3.toml").chmod(0o600)
    (home / "s3.toml").write_text(f'secret_key = "{SECRET_KEY}')
    with pytest.raises(OperatorError, match="not understood") as failed:
        await s3.open_bucket(home, f"s3://{BUCKET}?endpoint=http://127.0.0.1:9")
    assert SECRET_KEY not in str(failed.value)


@pytest.mark.parametrize(
    "text",
    ["http://bucket", "s3://", "s3://b?secret=1", "s3://key:secret@b", "s3://b?endpoint=ftp://x", "s3:///x"],
)
def test_address_that_is_none_is_refused(text: str):
    with pytest.raises(InvalidInput) as failed:
        s3.parse_address(text)
    assert "secret@" not in str(failed.value)


async def test_other_host_is_dialled_with_the_systems_trust_only(grid: TestGrid):
    async with BlobStore() as outside:
        with pytest.raises(ProtocolError, match="not trusted"):
            async with outside.get(f"https://{(await grid.admin()).address}/v1/grid", 0):
                pass


async def test_server_that_is_killed_during_an_upload_sends_no_part_again(store: S3Server, tmp_path: Path):
    """`kill -9` of a real server process between two parts of an upload."""
    home, source = tmp_path / "server", written(tmp_path / "source", 80 << 20)
    chosen = settings_for(store)
    await init_server(home, chosen)
    (home / "server.toml").write_text(f'listen = "127.0.0.1:0"\nreserve_bytes = 0\nhub_listen = "off"\nblobs = "{chosen.blobs}"\n')
    blob = describe_file(source)
    async with (
        server_process(home),
        Grid(await login(await make_login_link(home, chosen, "admin"))) as user,
        BlobStore() as outside,
    ):
        begun = await user.transport.call(wire.BEGIN_UPLOAD, wire.BeginUpload(blob=blob, direct=True))
        await outside.send(source, begun.parts[:3], lambda size: None)
    store.seen.clear()
    async with server_process(home), Grid(await login(await make_login_link(home, chosen, "admin"))) as user:
        await user.transport.upload(source, blob)
        assert len([method for method, _, _ in store.seen if method == "PUT"]) == len(begun.parts) - 3
        await user.transport.call(wire.REGISTER_DATA, wire.RegisterData(name="data", kind=DataKind.FILE, blob=blob))
        await user.transport.download(blob, tmp_path / "target")
    assert describe_file(tmp_path / "target") == blob


@contextlib.asynccontextmanager
async def server_process(home: Path) -> AsyncIterator[None]:
    """A real server process, which ends by SIGKILL."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "deskgrid", "server", "run", "--home", str(home), stdout=asyncio.subprocess.PIPE
    )
    try:
        assert process.stdout is not None
        await asyncio.wait_for(process.stdout.readline(), 30)
        yield
    finally:
        process.kill()
        await process.wait()


async def test_task_of_another_protocol_has_its_context_at_the_store_and_is_told_whole(grid: TestGrid):
    async with Transport(await grid.admin()) as admin:
        contents = tuple(
            TesInput(path=f"/scratch/{number}", content=str(number) * size) for number, size in enumerate((0, 1, 100_000))
        )
        wanted = TesTask(executors=(TesExecutor(image="process", command=("true",)),), inputs=contents)
        task_id = (await admin.call(tes.CREATE_TASK, wanted)).id
        found = await admin.call(tes.GET_TASK, path={"id": task_id}, query={"view": "FULL"})
        assert [one.content for one in found.inputs] == [one.content for one in contents]
