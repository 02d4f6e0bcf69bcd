"""A local port is a service of another peer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Coroutine
from typing import Any

import pytest

from deskgrid.errors import Forbidden
from deskgrid.overlay.peer import Dial, Peer
from deskgrid.overlay.proxy import serve, serve_port
from tests.unit.overlay.small_grid import SmallGrid, echo_service, exchange
from tests.unit.overlay.test_peer import eventually


@contextlib.asynccontextmanager
async def beside(work: Coroutine[Any, Any, None]) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()


async def connect(listener: socket.socket) -> socket.socket:
    sock = socket.socket()
    sock.setblocking(False)
    await asyncio.get_running_loop().sock_connect(sock, listener.getsockname())
    return sock


@pytest.fixture
async def echo() -> AsyncIterator[Dial]:
    service, dial = await echo_service()
    yield dial
    service.close()


@pytest.fixture
async def caller(echo: Dial) -> AsyncIterator[Peer]:
    async with SmallGrid() as grid:
        await grid.start_hub()
        called = await grid.peer("b", await grid.endpoint(), {"echo": echo})
        caller = await grid.peer("a", await grid.endpoint())
        await called.ready(5)
        yield caller


@pytest.fixture
async def listener() -> AsyncIterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        yield listener


async def test_a_port_is_a_service_for_many_at_once(caller: Peer, listener: socket.socket) -> None:
    async def use(number: int) -> None:
        with await connect(listener) as program:
            data = bytes([number]) * 100_000
            assert await exchange(program, data) == data

    async with beside(serve_port(caller, "echo.b", listener, wait_s=0)):
        await asyncio.gather(*(use(number) for number in range(20)))


async def test_a_service_that_cannot_be_reached_resets_the_connection(caller: Peer, listener: socket.socket) -> None:
    async with beside(serve_port(caller, "echo.nobody", listener, wait_s=0)):
        with await connect(listener) as program, pytest.raises(ConnectionResetError):
            await asyncio.get_running_loop().sock_recv(program, 1)


async def test_streams_go_on_when_the_port_is_closed(caller: Peer, listener: socket.socket) -> None:
    async with beside(serve_port(caller, "echo.b", listener, wait_s=0)):
        program = await connect(listener)
        await asyncio.get_running_loop().sock_sendall(program, b"one")
        assert await asyncio.get_running_loop().sock_recv(program, 10) == b"one"
    with program:
        assert await exchange(program, b"two") == b"two"


async def test_connections_that_wait_are_reset_when_the_port_is_closed(caller: Peer, listener: socket.socket) -> None:
    async with beside(serve_port(caller, "echo.later", listener, wait_s=60)):
        program = await connect(listener)
        await eventually(lambda: bool(caller._grants._asking))
    with program, pytest.raises(ConnectionResetError):
        await asyncio.get_running_loop().sock_recv(program, 1)


async def test_more_than_allowed_wait_in_the_systems_queue(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deskgrid.overlay.proxy._MOST_AT_ONCE", 2)
    taken: list[socket.socket] = []
    go_on = asyncio.Event()

    async def take(local: socket.socket) -> None:
        taken.append(local)
        await go_on.wait()
        local.close()
        if len(taken) == 1:
            raise Forbidden("a bug in one must not end the others")

    async with beside(serve(listener, take)):
        programs = [await connect(listener) for _ in range(5)]
        await eventually(lambda: len(taken) == 2)
        go_on.set()
        await eventually(lambda: len(taken) == 5)
    for program in programs:
        program.close()
