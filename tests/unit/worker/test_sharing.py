"""Disks that workers fetch together: real engines, a real server, on loopback."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from deskgrid.client.grid import Grid, describe_file
from deskgrid.client.transport import Transport
from deskgrid.clock import SystemClock
from deskgrid.errors import InvalidInput, NotFound, Unreachable
from deskgrid.model import wire
from deskgrid.model.data import Blob, DataKind, Disk
from deskgrid.model.jobs import JobSpec, Machine
from deskgrid.model.machines import DiskFormat
from deskgrid.model.swarm import Turn, TurnAnswer
from deskgrid.server.torrents import make_torrents
from deskgrid.settings import WorkerSettings
from deskgrid.swarm.cache import Cache
from deskgrid.testing.grids import TestGrid, played_sync, running_grid
from deskgrid.units import GIB, MIB
from deskgrid.worker.sharing import Sharing, engine_bounds, own_bound
from tests.liar import Liar

SIZE = 24 * MIB + 12345


class Pc:
    """A worker, as far as sharing goes, that holds a job of the disk."""

    def __init__(self, transport: Transport, folder: Path, **settings: Any) -> None:
        self.transport = transport
        self.folder = folder
        self.turns: list[Turn] = []
        self.server_bytes = 0
        self.deaf = False
        """Nobody can connect to it, and it to nobody."""
        self.most_bytes = 1 << 60
        """That the server sends to it, until this is more."""
        self.withheld = 1 << 60
        """From this byte of the blob on the server sends it nothing, until this is more."""
        self.paused = False
        self.seen: list[int] = []
        self.settings = WorkerSettings(share=True, **settings)
        self.restart()

    def restart(self) -> None:
        """Be a new process with the old cache."""
        self.cache = Cache(self.folder, bound_bytes=GIB)
        self.cache.open()
        self.called_server = 0
        self.sharing = Sharing(
            self.settings,
            self.cache,
            self,  # type: ignore[arg-type]
            SystemClock(),
            paused=lambda: self.paused,
            changed=self._call_server,
        )

    def _call_server(self) -> None:
        """Be told what others fetch of what is here."""
        self.called_server += 1
        self.sharing.want(self.cache.shared())

    async def fetch(self, blob: Blob) -> Path | None:
        return await self.sharing.fetch(blob, self.seen.append)

    def engine(self) -> psutil.Process:
        """Return the process in which BitTorrent runs."""
        engine = self.sharing._engine
        assert engine is not None and engine._process is not None
        return psutil.Process(engine._process.pid)

    # A connection, watched.

    async def call(self, route: Any, body: Any = None, **more: Any) -> Any:
        self.turns.append(body)
        if self.deaf:
            body = msgspec.structs.replace(body, port=0)
        answer: TurnAnswer = await self.transport.call(route, body, **more)
        return msgspec.structs.replace(answer, neighbours=()) if self.deaf else answer

    async def read(self, blob: Blob, first: int, size_bytes: int) -> AsyncIterator[bytes]:
        at = first
        async for chunk in self.transport.read(blob, first, size_bytes):
            at += len(chunk)
            while self.server_bytes >= self.most_bytes or at > self.withheld:
                await asyncio.sleep(0.02)
            self.server_bytes += len(chunk)
            yield chunk


@asynccontextmanager
async def several(grid: TestGrid, folder: Path, number: int, size_bytes: int = SIZE) -> AsyncIterator[tuple[Blob, list[Pc]]]:
    """Run workers that all hold a job with the same disk."""
    async with contextlib.AsyncExitStack() as stack:
        user = await stack.enter_async_context(Grid(await grid.user("admin")))
        file = folder / "disk"
        file.write_bytes(random.Random(number).randbytes(size_bytes))
        blob = describe_file(file)
        disk = Disk(sha256=blob.sha256, size_bytes=4, virtual_bytes=4, format=DiskFormat.ISO)
        await user.put(file, "disk", kind=DataKind.DISK, disk=disk)
        assert await make_torrents(grid.services) == 1
        pcs = []
        for at in range(number):
            transport = await stack.enter_async_context(Transport(await grid.worker(f"pc{at}")))
            await user.submit(JobSpec(machine=Machine(disk="disk")))
            assert len((await transport.call(wire.SYNC, played_sync(room=True))).assignments) == 1
            pcs.append(Pc(transport, folder / f"pc{at}"))
        try:
            yield blob, pcs
        finally:
            await asyncio.gather(*(pc.sharing.close() for pc in pcs))


@pytest.fixture
async def grid(tmp_path: Path) -> AsyncIterator[TestGrid]:
    async with running_grid(tmp_path / "server") as found:
        yield found


def is_whole(file: Path | None, blob: Blob) -> bool:
    return file is not None and hashlib.sha256(file.read_bytes()).hexdigest() == blob.sha256


async def test_workers_fetch_a_disk_together_and_the_server_sends_it_about_once(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 4) as (blob, pcs):
        files = await asyncio.gather(*(pc.fetch(blob) for pc in pcs))
        for file, pc in zip(files, pcs, strict=True):
            assert is_whole(file, blob) and file == pc.cache.shared_file(blob.sha256)
            assert pc.seen[-1] == blob.size_bytes
        assert sum(pc.server_bytes for pc in pcs) < 1.5 * blob.size_bytes


async def test_who_can_reach_nobody_gets_all_from_the_server(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 2) as (blob, pcs):
        assert is_whole(await pcs[0].fetch(blob), blob)
        pcs[1].deaf = True
        assert is_whole(await pcs[1].fetch(blob), blob)
        assert pcs[1].server_bytes == blob.size_bytes


async def test_a_worker_that_has_it_gives_it_to_one_that_comes_later(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 2) as (blob, pcs):
        assert is_whole(await pcs[0].fetch(blob), blob)
        assert is_whole(await pcs[1].fetch(blob), blob)
        assert pcs[1].server_bytes < blob.size_bytes // 2


async def test_all_is_fetched_though_the_one_that_has_it_vanishes(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 2) as (blob, pcs):
        pcs[0].settings = WorkerSettings(share=True, share_bytes_per_s=4 * MIB)
        pcs[0].restart()
        assert is_whole(await pcs[0].fetch(blob), blob)
        pcs[1].most_bytes = 0
        task = asyncio.create_task(pcs[1].fetch(blob))
        await until(lambda: bool(pcs[1].seen) and pcs[1].seen[-1] > 4 * MIB)
        pcs[0].engine().kill()
        pcs[1].most_bytes = 1 << 60
        assert is_whole(await task, blob)
        assert 0 < pcs[1].server_bytes < blob.size_bytes


async def test_seeds_that_vanish_at_99_percent_are_not_waited_for(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 3) as (blob, pcs):
        *seeds, last = pcs
        for pc in seeds:
            pc.withheld = int(blob.size_bytes * 0.99)
        last.most_bytes = 0
        tasks = [asyncio.create_task(pc.fetch(blob)) for pc in pcs]
        await until(lambda: bool(last.seen) and last.seen[-1] > blob.size_bytes * 0.95)
        for pc, task in zip(seeds, tasks, strict=False):
            pc.engine().kill()
            task.cancel()
        await asyncio.wait(tasks[:2])
        last.most_bytes = 1 << 60
        assert is_whole(await tasks[2], blob)
        assert 0 < last.server_bytes < blob.size_bytes * 0.15


async def test_a_peer_that_sends_garbage_costs_some_blocks_and_is_dropped(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 2) as (blob, pcs):
        liar = Liar(pcs[0].transport, tmp_path / "liar")
        try:
            await liar.begin(blob)
            assert is_whole(await pcs[1].fetch(blob), blob)
            assert liar.given_bytes() > 0
            assert liar.given_bytes() < blob.size_bytes // 2
        finally:
            liar.end()


@asynccontextmanager
async def way_to(pc: Pc) -> AsyncIterator[str]:
    """Serve what a worker in a machine on a PC finds as its cache; yield where."""

    async def carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                writer.write(data)
                await writer.drain()
        writer.close()

    async def join(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            engine = await asyncio.open_connection(sock=await pc.sharing.dial())
        except Unreachable:
            writer.transport.abort()
            return
        await asyncio.gather(carry(reader, engine[1]), carry(engine[0], writer))

    async with await asyncio.start_server(join, "127.0.0.1", 0) as server:
        yield f"127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def test_worker_in_a_machine_fetches_from_the_cache_of_its_pc(grid: TestGrid, tmp_path: Path) -> None:
    """The PC has no engine then: it is told of what is fetched, and begins to give it."""
    async with several(grid, tmp_path, 2) as (blob, [host, inner]), way_to(host) as near:
        assert is_whole(await host.fetch(blob), blob)
        await host.sharing.close()
        host.restart()
        giving = asyncio.create_task(host.sharing.run())
        try:
            inner.settings = WorkerSettings(share=True, share_near=near)
            inner.restart()
            inner.turns.clear()
            inner.most_bytes = 0
            async with asyncio.timeout(60):
                assert is_whole(await inner.fetch(blob), blob)
            assert host.called_server >= 1
            assert inner.server_bytes == 0
            assert not any(turn.addresses for turn in inner.turns)
        finally:
            giving.cancel()
            await asyncio.wait([giving])


async def test_worker_in_a_machine_of_an_owner_who_does_not_share_fetches_from_the_server(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 2) as (blob, [host, inner]), way_to(host) as near:
        host.settings = WorkerSettings()
        host.restart()
        inner.settings = WorkerSettings(share=True, share_near=near)
        inner.restart()
        assert is_whole(await inner.fetch(blob), blob)
        assert inner.server_bytes == blob.size_bytes and not host.called_server


@pytest.mark.parametrize("near", ["cache", ":1", "cache:0", "cache:x", "cache:99999"])
def test_bad_place_of_the_pcs_cache_is_refused(near: str, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="HOST:PORT"):
        Pc(None, tmp_path, share_near=near)  # type: ignore[arg-type]


async def test_a_killed_worker_goes_on_with_what_it_has(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 1) as (blob, [pc]):
        pc.most_bytes = blob.size_bytes * 2 // 3
        task = asyncio.create_task(pc.fetch(blob))
        await until(lambda: allocated(pc.cache.part_file(blob.sha256)) > blob.size_bytes // 4)
        pc.engine().kill()
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        await pc.sharing.close()
        pc.server_bytes, pc.most_bytes = 0, 1 << 60
        pc.restart()
        pc.turns.clear()
        assert is_whole(await pc.fetch(blob), blob)
        assert pc.server_bytes < blob.size_bytes * 4 // 5


def allocated(file: Path) -> int:
    return file.stat().st_blocks * 512 if file.exists() else 0


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(60):
        while not condition():
            await asyncio.sleep(0.02)


async def test_when_the_engine_dies_another_goes_on(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 1) as (blob, [pc]):
        pc.most_bytes = blob.size_bytes // 2
        task = asyncio.create_task(pc.fetch(blob))
        await until(lambda: pc.server_bytes > blob.size_bytes // 4)
        first = pc.engine()
        first.kill()
        pc.most_bytes = 1 << 60
        assert is_whole(await task, blob)
        assert pc.engine().pid != first.pid


async def test_nothing_is_shared_without_the_owners_consent(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 1) as (blob, [pc]):
        pc.settings = WorkerSettings()
        pc.restart()
        assert await pc.fetch(blob) is None
        assert not pc.turns and pc.sharing._engine is None


async def test_the_engine_has_the_network_and_its_folder_and_nothing_else(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 1) as (blob, [pc]):
        assert await pc.fetch(blob)
        status = Path(f"/proc/{pc.engine().pid}/status").read_text()
        assert "NoNewPrivs:\t1" in status and "Seccomp:\t2" in status
        assert pc.transport.credentials.token.encode() not in Path(f"/proc/{pc.engine().pid}/environ").read_bytes()


async def test_whom_the_blob_is_not_for_gets_neither_torrent_nor_certificate(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 1) as (blob, _), Transport(await grid.worker("stranger")) as stranger:
        with pytest.raises(NotFound):
            await stranger.call(wire.TAKE_TURN, Turn(torrent=True), path={"sha256": blob.sha256})


async def test_what_is_shared_is_gone_when_its_room_is_needed(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 1) as (blob, [pc]):
        assert await pc.fetch(blob)
        assert pc.cache.shared() == (blob.sha256,)
        assert pc.cache.shrink(1) >= blob.size_bytes
        assert pc.cache.shared() == () and pc.cache.size_bytes() == 0


async def test_no_more_is_given_in_a_second_than_the_owner_says(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 2, 8 * MIB) as (blob, pcs):
        pcs[0].settings = WorkerSettings(share=True, share_bytes_per_s=2 * MIB)
        pcs[0].restart()
        assert await pcs[0].fetch(blob)
        started = asyncio.get_running_loop().time()
        task = asyncio.create_task(pcs[1].fetch(blob))
        await asyncio.sleep(0)
        assert is_whole(await task, blob)
        seconds = asyncio.get_running_loop().time() - started
        given = blob.size_bytes - pcs[1].server_bytes
        assert given <= 2 * MIB * (seconds + 1)


async def test_a_user_fetches_data_from_workers_that_have_it(grid: TestGrid, tmp_path: Path) -> None:
    async with several(grid, tmp_path, 1) as (blob, [pc]):
        assert is_whole(await pc.fetch(blob), blob)
        async with Grid(await grid.user("admin")) as user:
            read_bytes = 0
            read = user.transport.read

            async def counted(*asked: Any) -> AsyncIterator[bytes]:
                nonlocal read_bytes
                async for chunk in read(*asked):
                    read_bytes += len(chunk)
                    yield chunk

            user.transport.read = counted  # type: ignore[method-assign]
            await user.get("disk", tmp_path / "got")
        assert is_whole(tmp_path / "got", blob)
        assert read_bytes < blob.size_bytes // 2
        assert [path.name for path in tmp_path.glob("got*")] == ["got"]


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("share_bytes_per_s", [0, 10, 10_000])
def test_the_owners_bound_on_the_network_holds_for_all_together(share: bool, share_bytes_per_s: int) -> None:
    settings = WorkerSettings(share=share, network_bytes_per_s=1000, share_bytes_per_s=share_bytes_per_s)
    up, down = engine_bounds(settings) if share else (0, 0)
    assert own_bound(settings) + up + down <= 1000
    assert not share or (0 < up <= (share_bytes_per_s or 1000) and down > 0)
    assert engine_bounds(WorkerSettings(share=True)) == (0, 0) and own_bound(WorkerSettings(share=True)) == 0
