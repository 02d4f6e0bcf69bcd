"""Fetching a file from the web: resumed, checked, bounded; against a real web server on loopback."""

from __future__ import annotations

import hashlib
import random
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web

from deskgrid.client import download as module
from deskgrid.client.download import download, forget_download, name_in
from deskgrid.errors import BadImage, InvalidInput, NoSpace, NotFound, ProtocolError, Unreachable

CONTENT = random.Random(1).randbytes(3 << 20)
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Site:
    """A web server with one file, and faults."""

    def __init__(self) -> None:
        self.content = CONTENT
        self.etag = '"one"'
        self.cut_at: list[int] = []
        """How many bytes each of the next answers has before the connection is cut."""
        self.asked: list[str] = []
        self.ranges = True
        self.address = ""

    async def start(self) -> web.AppRunner:
        app = web.Application()
        app.router.add_get("/disk.qcow2", self._serve)
        app.router.add_get("/moved", self._move)
        app.router.add_get("/loop", self._move)
        runner = web.AppRunner(app)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", 0)
        await site.start()
        self.address = f"http://127.0.0.1:{runner.addresses[0][1]}"
        return runner

    async def _move(self, request: web.Request) -> web.Response:
        raise web.HTTPFound("/disk.qcow2" if request.path == "/moved" else "/loop")

    async def _serve(self, request: web.Request) -> web.StreamResponse:
        self.asked.append(request.headers.get("Range", ""))
        first, data = 0, self.content
        if "Range" in request.headers and self.ranges and request.headers.get("If-Range", self.etag) == self.etag:
            first = int(request.headers["Range"].removeprefix("bytes=").rstrip("-"))
            if first >= len(data):
                return web.Response(status=416, headers={"Content-Range": f"bytes */{len(data)}"})
        answer = web.StreamResponse(status=206 if first else 200)
        if first:
            answer.headers["Content-Range"] = f"bytes {first}-{len(data) - 1}/{len(data)}"
        answer.headers["ETag"] = self.etag
        answer.content_length = len(data) - first
        await answer.prepare(request)
        if self.cut_at:
            await answer.write(data[first : first + self.cut_at.pop(0)])
            assert request.transport is not None
            request.transport.close()
            return answer
        await answer.write(data[first:])
        return answer


@pytest.fixture
async def site() -> AsyncIterator[Site]:
    site = Site()
    runner = await site.start()
    yield site
    await runner.cleanup()


async def test_file_is_fetched_and_told_of(site: Site, tmp_path: Path) -> None:
    told: list[tuple[int, int | None]] = []
    file = await download(f"{site.address}/moved", tmp_path, sha256=SHA256, progress=lambda done, whole: told.append((done, whole)))
    assert file.read_bytes() == CONTENT
    assert told[-1] == (len(CONTENT), len(CONTENT))
    forget_download(file)
    assert list(tmp_path.iterdir()) == []


async def test_download_that_is_cut_goes_on_where_it_stopped(site: Site, tmp_path: Path) -> None:
    site.cut_at = [1 << 20, 1 << 19]
    file = await download(f"{site.address}/disk.qcow2", tmp_path, sha256=SHA256, first_s=0.01)
    assert file.read_bytes() == CONTENT
    assert site.asked[0] == ""
    assert all(asked.startswith("bytes=") for asked in site.asked[1:])


async def test_later_call_uses_what_an_earlier_one_left(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TRIES", 1)
    site.cut_at = [1 << 20]
    with pytest.raises(Unreachable, match="goes on where it stopped"):
        await download(f"{site.address}/disk.qcow2", tmp_path, sha256=SHA256)
    for _ in range(2):  # the second finds it whole
        assert (await download(f"{site.address}/disk.qcow2", tmp_path, sha256=SHA256)).read_bytes() == CONTENT
    assert site.asked[1:] == [f"bytes={1 << 20}-", f"bytes={len(CONTENT)}-"]


async def test_file_that_has_changed_meanwhile_is_fetched_anew(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_TRIES", 1)
    site.cut_at = [1 << 20]
    with pytest.raises(Unreachable):
        await download(f"{site.address}/disk.qcow2", tmp_path, sha256=SHA256)
    site.content, site.etag = CONTENT[::-1], '"two"'
    wanted = hashlib.sha256(site.content).hexdigest()
    assert (await download(f"{site.address}/disk.qcow2", tmp_path, sha256=wanted)).read_bytes() == site.content


async def test_server_without_ranges_sends_it_all_again(site: Site, tmp_path: Path) -> None:
    site.cut_at, site.ranges = [1 << 20], False
    file = await download(f"{site.address}/disk.qcow2", tmp_path, sha256=SHA256, first_s=0.01)
    assert file.read_bytes() == CONTENT


async def test_other_bytes_than_wanted_are_refused_and_forgotten(site: Site, tmp_path: Path) -> None:
    with pytest.raises(BadImage, match="sha256 is another"):
        await download(f"{site.address}/disk.qcow2", tmp_path, sha256="0" * 64)
    assert list(tmp_path.iterdir()) == []


async def test_what_comes_without_tls_must_be_checked(site: Site, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="without TLS"):
        await download(f"{site.address}/disk.qcow2", tmp_path)
    with pytest.raises(InvalidInput, match="not a sha256"):
        await download(f"{site.address}/disk.qcow2", tmp_path, sha256="abc")
    assert site.asked == []


async def test_what_is_not_there_is_not_tried_again(site: Site, tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="404"):
        await download(f"{site.address}/nothing", tmp_path, sha256=SHA256)
    with pytest.raises(ProtocolError, match="leads nowhere"):
        await download(f"{site.address}/loop", tmp_path, sha256=SHA256)


async def test_full_disk_is_no_space(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_SPARE_BYTES", 1 << 60)
    with pytest.raises(NoSpace):
        await download(f"{site.address}/disk.qcow2", tmp_path, sha256=SHA256)


@pytest.mark.parametrize(
    ("url", "name"),
    [("https://a/b/disk.qcow2?x=1", "disk.qcow2"), ("https://a/", "disk"), ("https://a/x%2Fy", "y"), ("https://a/%00", "disk")],
)
def test_name_is_the_last_part_of_an_address(url: str, name: str) -> None:
    assert name_in(url) == name
