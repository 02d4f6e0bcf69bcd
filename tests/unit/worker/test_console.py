"""The screen of a machine without a network: shown while it is wanted or looked at, whatever happens to its worker. Real TLS, a real hub."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from types import SimpleNamespace

import pytest

from deskgrid.core.console import password_in
from deskgrid.errors import NotFound, Unreachable
from deskgrid.machines.driver import Booted, ExitCause, Exited
from deskgrid.model.ids import AttemptId
from deskgrid.model.jobs import AttemptState
from deskgrid.overlay.peer import Peer
from deskgrid.worker.console import console_dialler
from tests.unit.overlay.small_grid import CallsOf, SmallGrid, pair
from tests.unit.worker.play import ConsoleDriver, PlayDriver, Rig


@pytest.fixture
async def grid() -> AsyncIterator[SmallGrid]:
    async with SmallGrid() as grid:
        await grid.start_hub()
        yield grid


@pytest.fixture
async def driver(rig: Rig, grid: SmallGrid) -> ConsoleDriver:
    """The rig's driver, whose machines show a screen, on a worker in the overlay."""
    rig.driver = driver = ConsoleDriver(rig.pc)
    rig.overlay = SimpleNamespace(endpoint=await grid.endpoint(), calls=CallsOf(grid, "b"), credentials=None)
    return driver


@pytest.fixture
async def user(grid: SmallGrid) -> Peer:
    return await grid.peer("a", await grid.endpoint())


async def started(rig: Rig) -> AttemptId:
    """Submit a job and return once its machine runs, which has not booted."""
    attempt_id = rig.server.submit()
    await rig.until(lambda: rig.pc.made and rig.pc.machine.started)
    return attempt_id


def want(rig: Rig, *attempts: AttemptId) -> None:
    """Have the server say whose screen is wanted."""
    rig.server.consoles = set(attempts)
    rig.server.hint()


class Screen:
    """A stream of the user's that has come to a machine."""

    def __init__(self, program: socket.socket, password: str) -> None:
        self.program, self.password = program, password

    async def receive(self) -> bytes:
        return await asyncio.get_running_loop().sock_recv(self.program, 1000)

    async def says(self, text: bytes) -> bool:
        """Tell whether what is typed comes back."""
        await asyncio.get_running_loop().sock_sendall(self.program, text)
        return await self.receive() == text


@contextlib.asynccontextmanager
async def looking(rig: Rig, user: Peer) -> AsyncIterator[Screen]:
    """Open the console and read what comes before the screen."""
    local, program = await pair()
    connecting = asyncio.create_task(user.connect("console.b", local, wait_s=20.0))
    await rig.through(connecting)
    screen = Screen(program, "")
    with program:
        said = b""
        while not said.endswith(b"RFB 003.008\n"):
            said += await screen.receive()
        line, _, rest = said.partition(b"\n")
        assert rest == b"RFB 003.008\n"
        screen.password = password_in(line + b"\n")
        yield screen


async def test_screen_is_shown_when_it_is_wanted_though_the_machine_never_boots(
    rig: Rig, grid: SmallGrid, driver: ConsoleDriver, user: Peer
) -> None:
    async with rig.working():
        attempt = await started(rig)
        assert grid.find("b") is None
        want(rig, attempt)
        async with looking(rig, user) as screen:
            assert driver.passwords == [screen.password]
            assert await screen.says(b"typed")
            want(rig)
            await rig.until(lambda: rig.server.syncs)
            assert await screen.says(b"as long as somebody looks")
            assert grid.find("b") is not None
        await rig.until(lambda: grid.find("b") is None)
        want(rig, attempt)
        async with looking(rig, user) as screen:
            assert driver.passwords[1:] == [screen.password] != driver.passwords[:1]


async def test_screen_that_nobody_came_to_see_is_shown_no_longer(rig: Rig, grid: SmallGrid, driver: ConsoleDriver) -> None:
    async with rig.working():
        want(rig, await started(rig))
        await rig.until(lambda: grid.find("b") is not None)
        want(rig)
        await rig.until(lambda: grid.find("b") is None)
    assert driver.passwords == []


async def test_job_that_ends_takes_its_screen_with_it(rig: Rig, grid: SmallGrid, driver: ConsoleDriver, user: Peer) -> None:
    async with rig.working():
        attempt = await started(rig)
        want(rig, attempt)
        async with looking(rig, user) as screen:
            await rig.pc.machine.tell(Booted(), Exited(ExitCause.POWERED_OFF))
            receiving = asyncio.create_task(screen.receive())
            await rig.until(receiving.done)
            with contextlib.suppress(ConnectionResetError):
                assert receiving.result() == b""
            await rig.ended(attempt)
        assert grid.find("b") is None
    assert rig.nothing_left()


async def test_next_worker_shows_the_screen_of_a_machine_that_it_finds_again(
    rig: Rig, grid: SmallGrid, driver: ConsoleDriver, user: Peer
) -> None:
    async with contextlib.AsyncExitStack() as stack:
        async with rig.working(keep=True):
            attempt = await started(rig)
            await rig.until(lambda: rig.server.state(attempt) is AttemptState.RUNNING)
            want(rig, attempt)
            cut = await stack.enter_async_context(looking(rig, user))
        with contextlib.suppress(ConnectionResetError):
            assert await cut.receive() == b""
    async with rig.working():
        grid.is_away = True
        want(rig, await started(rig))
        await rig.until(lambda: not rig.server.consoles or len(rig.server.syncs) > 2)
        grid.is_away = False
        async with looking(rig, user) as screen:
            assert await screen.says(b"typed")


async def test_driver_without_a_screen_says_so_at_once(rig: Rig, grid: SmallGrid, driver: ConsoleDriver, user: Peer) -> None:
    rig.driver = PlayDriver(rig.pc)
    async with rig.working():
        want(rig, await started(rig))
        local, program = await pair()
        with local, program, pytest.raises(NotFound, match="do not show their screen"):
            await rig.through(asyncio.create_task(user.connect("console.b", local, wait_s=20.0)))


async def test_owner_without_the_overlay_shows_nothing(rig: Rig, grid: SmallGrid) -> None:
    rig.driver = ConsoleDriver(rig.pc)
    async with rig.working():
        attempt = await started(rig)
        want(rig, attempt)
        await rig.until(lambda: rig.server.state(attempt) is AttemptState.RUNNING)
    assert grid.registered == 0


async def test_machine_that_does_not_open_its_screen_leaves_no_socket(rig: Rig) -> None:
    driver = ConsoleDriver(rig.pc)
    driver.errors["attach_console"] = Unreachable("off")
    dial = console_dialler(SimpleNamespace(unthrottle=print), driver, SimpleNamespace(driver="play"))  # type: ignore[arg-type]
    with pytest.raises(Unreachable):
        await dial()
