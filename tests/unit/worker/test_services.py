"""What an attempt's services leave, and what they survive. Real cages, a real hub, a server that only takes connections."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from deskgrid.clock import SystemClock
from deskgrid.core.console import password_in
from deskgrid.errors import MachineFailed, Unreachable
from deskgrid.machines import cage, processes
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.overlay import parse_reach
from deskgrid.worker import services as module
from deskgrid.worker.services import Services
from tests.unit.overlay.small_grid import CallsOf, SmallGrid, pair
from tests.unit.overlay.test_peer import eventually

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="cages are of Linux")
CLOCK = SystemClock()
IDLE = [sys.executable, "-I", "-S", "-c", "import time; time.sleep(600)"]


class Cage:
    """An idle process in a cage, which stands for a machine and for its driver."""

    def __init__(self, workdir: Path) -> None:
        workdir.mkdir()
        self.workdir = workdir
        self.identity = processes.spawn(cage.enter(IDLE, workdir), cwd=workdir, log=workdir / "log")
        self.failures: list[Exception] = []
        """What is raised, first, by those who want a socket."""

    async def open_socket(self, _handle: object) -> socket.socket:
        if self.failures:
            raise self.failures.pop(0)
        return await cage.open_socket(self.workdir, lambda: processes.is_alive(self.identity))

    async def connect(self, host: str, port: int) -> socket.socket:
        """Connect as a program in the machine does, once something listens."""
        while True:
            sock = await self.open_socket(None)
            sock.setblocking(False)
            try:
                await asyncio.get_running_loop().sock_connect(sock, (host, port))
                return sock
            except ConnectionRefusedError:
                sock.close()
                await asyncio.sleep(0.02)

    async def attach_console(self, _handle: object, connection: socket.socket, password: str) -> None:
        connection.sendall(f"screen of who says {password}\n".encode())

    async def end(self) -> None:
        await processes.kill(self.identity, CLOCK)
        await cage.wait_keeper_gone(self.workdir, CLOCK)


@pytest.fixture
async def caged(tmp_path: Path) -> AsyncIterator[Cage]:
    made = Cage(tmp_path / "machine")
    yield made
    await made.end()


@pytest.fixture
async def grid() -> AsyncIterator[SmallGrid]:
    async with SmallGrid() as grid:
        await grid.start_hub()
        yield grid


@pytest.fixture
async def server() -> AsyncIterator[str]:
    """A server that keeps every connection, whatever its other end does."""
    with socket.create_server(("127.0.0.1", 0), backlog=1024) as listener:
        yield f"127.0.0.1:{listener.getsockname()[1]}"


async def services_of(grid: SmallGrid, server: str, folder: Path, kind: MachineKind = MachineKind.PROCESS) -> tuple[Services, Any]:
    """Return the services of an attempt that reaches the server, and its endpoint."""
    endpoint = await grid.endpoint()
    reach = (parse_reach("grid", "api.server"), parse_reach("cache", "cache.worker"))
    machine = SimpleNamespace(reach=reach, offer=(), network=Network.OVERLAY, reach_wait_s=5.0, kind=kind)
    assignment = SimpleNamespace(spec=SimpleNamespace(machine=machine), attempt_id=1)
    kit = SimpleNamespace(
        clock=CLOCK, rng=random.Random(1), settings=SimpleNamespace(backoff_s=0.05, max_backoff_s=0.2), unthrottle=print
    )
    overlay = SimpleNamespace(endpoint=endpoint, calls=CallsOf(grid, "b"), credentials=SimpleNamespace(address=server))
    return Services(kit, overlay, assignment, folder / "none"), endpoint  # type: ignore[arg-type]


@contextlib.asynccontextmanager
async def running(services: Services, caged: Cage) -> AsyncIterator[asyncio.Task[None]]:
    task = asyncio.create_task(services.run(caged, None))  # type: ignore[arg-type]
    try:
        async with asyncio.timeout(30):
            yield task
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


async def test_connections_to_the_server_end_with_the_services(grid: SmallGrid, server: str, caged: Cage, tmp_path: Path):
    services, endpoint = await services_of(grid, server, tmp_path)
    async with running(services, caged):
        with await caged.connect("10.64.1.1", 8470) as program:
            await eventually(lambda: len(endpoint.pumps) == 1)
            program.shutdown(socket.SHUT_WR)
    await eventually(lambda: len(endpoint.pumps) == 0)


async def test_machine_has_so_many_connections_to_the_server_and_no_more(
    grid: SmallGrid, server: str, caged: Cage, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(module, "_MOST_RELAYS", 3)
    services, endpoint = await services_of(grid, server, tmp_path)
    async with running(services, caged):
        with contextlib.ExitStack() as held:
            for count in range(1, 4):
                held.enter_context(await caged.connect("10.64.1.1", 8470))
                await eventually(lambda count=count: len(endpoint.pumps) == count)
            one_more = held.enter_context(await caged.connect("10.64.1.1", 8470))
            with pytest.raises(ConnectionResetError):
                await asyncio.get_running_loop().sock_recv(one_more, 1)
    await eventually(lambda: len(endpoint.pumps) == 0)


async def test_machine_reaches_its_pcs_cache_while_that_is_shared(grid: SmallGrid, server: str, caged: Cage, tmp_path: Path):
    services, _ = await services_of(grid, server, tmp_path)
    ends: list[socket.socket] = []

    async def dial() -> socket.socket:
        if ends:
            raise Unreachable("nothing is shared here")
        near, far = await pair()
        ends.append(far)
        return near

    services._kit.sharing = SimpleNamespace(dial=dial)  # type: ignore[misc, assignment]
    loop = asyncio.get_running_loop()
    async with running(services, caged):
        with await caged.connect("10.64.1.2", 8475) as program:
            await loop.sock_sendall(program, b"hello")
            await eventually(lambda: bool(ends))
            assert await loop.sock_recv(ends[0], 100) == b"hello"
        with ends[0], await caged.connect("10.64.1.2", 8475) as program, pytest.raises(ConnectionResetError):
            await loop.sock_recv(program, 1)


@pytest.mark.parametrize("failure", [MachineFailed("the machine's cage does not answer"), OSError(24, "too many"), ValueError("?")])
async def test_what_fails_in_services_neither_ends_the_attempt_nor_them(
    failure: Exception, grid: SmallGrid, server: str, caged: Cage, tmp_path: Path
):
    services, _ = await services_of(grid, server, tmp_path)
    caged.failures = [failure]
    async with running(services, caged) as task:
        await eventually(lambda: not caged.failures)
        (await caged.connect("10.64.1.1", 8470)).close()
        assert not task.done()


async def test_virtual_machine_in_the_overlay_shows_its_screen_besides_and_a_process_does_not(
    grid: SmallGrid, server: str, caged: Cage, tmp_path: Path
):
    user = await grid.peer("a", await grid.endpoint())
    loop = asyncio.get_running_loop()
    for kind in (MachineKind.VM, MachineKind.PROCESS):
        services, _ = await services_of(grid, server, tmp_path, kind)
        async with running(services, caged):
            local, program = await pair()
            with program:
                if kind is MachineKind.PROCESS:
                    await eventually(lambda: (found := grid.find("b")) is not None and found.request.hub)
                    with local, pytest.raises(Unreachable, match="no service 'console'"):
                        await user.connect("console.b", local)
                    continue
                await user.connect("console.b", local, wait_s=20.0)
                said = b""
                while data := await loop.sock_recv(program, 1000):
                    said += data
        line, rest = said.split(b"\n", 1)
        password = password_in(line + b"\n")
        assert rest == f"screen of who says {password}\n".encode()
