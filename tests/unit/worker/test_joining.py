"""The way to others' engines through the overlay: real TLS, a real hub, and a service that answers in the place of an engine."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator

import pytest

from deskgrid.clock import SystemClock
from deskgrid.settings import PeerSettings
from deskgrid.worker.joining import Joining
from tests.unit.overlay.small_grid import CallsOf, SmallGrid, dial_loopback, echo_service, exchange

HERE = PeerSettings(listen="127.0.0.1:0")


@pytest.fixture
async def grid() -> AsyncIterator[SmallGrid]:
    async with SmallGrid() as grid:
        await grid.start_hub()
        yield grid


def joining(grid: SmallGrid, name: str, settings: PeerSettings = HERE) -> Joining:
    pem, rng = grid.authority.pem, random.Random(1)
    return Joining(settings, CallsOf(grid, name), authority_pem=pem, clock=SystemClock(), rng=rng, may_dial=dial_loopback)


async def until_joined(*members: Joining) -> None:
    async with asyncio.timeout(10):
        while not all(one.joined for one in members):
            await asyncio.sleep(0.01)


async def ask(port: int, data: bytes) -> bytes:
    """Send through a door and return what comes back."""
    program = socket.create_connection(("127.0.0.1", port))
    program.setblocking(False)
    with program:
        async with asyncio.timeout(20):
            return await exchange(program, data)


async def test_engine_behind_a_router_is_reached_by_a_port_of_its_own(grid: SmallGrid) -> None:
    server, _ = await echo_service()
    engine = server.sockets[0].getsockname()[1]
    first, second = joining(grid, "worker-1"), joining(grid, "worker-2")
    try:
        await first.start(lambda: 0)
        await second.start(lambda: engine)
        await until_joined(first, second)
        port = first.door("worker-2")
        assert first.door("worker-2") == port
        assert await ask(port, b"piece" * 10_000) == b"piece" * 10_000
        await second.close()
        await second.start(lambda: engine)  # the engine came again, with another key
        await until_joined(second)
        assert await ask(port, b"again") == b"again"
    finally:
        await first.close()
        await second.close()
        server.close()
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port)).close()
    assert not grid.known


async def test_what_cannot_be_reached_directly_is_not_reached_through_a_hub(grid: SmallGrid) -> None:
    server, _ = await echo_service()
    deaf = PeerSettings(listen="off", paths=("direct", "relayed"))
    first, second = joining(grid, "worker-1", deaf), joining(grid, "worker-2", deaf)
    try:
        await first.start(lambda: 0)
        await second.start(lambda: server.sockets[0].getsockname()[1])
        await until_joined(first, second)
        with pytest.raises(ConnectionResetError):
            await ask(first.door("worker-2"), b"piece")
    finally:
        await first.close()
        await second.close()
        server.close()


async def test_owner_who_hides_his_address_takes_no_part(grid: SmallGrid) -> None:
    hidden = joining(grid, "worker-1", PeerSettings(relay_only=True))
    await hidden.start(lambda: 1)
    assert not hidden.joined and hidden.door("worker-2") == 0 and not grid.known
    await hidden.close()


async def test_without_the_server_nothing_is_joined_and_nothing_left(grid: SmallGrid) -> None:
    grid.is_away = True
    alone = joining(grid, "worker-1")
    await alone.start(lambda: 1)
    assert not alone.joined and alone.door("worker-2") == 0
    grid.is_away = False
    await alone.start(lambda: 1)
    await until_joined(alone)
    await alone.close()
