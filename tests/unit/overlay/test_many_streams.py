"""Thousands of streams at a time between two peers, with real sockets and real TLS."""

from __future__ import annotations

import asyncio
import os
import resource
import socket
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from deskgrid.overlay.files import raise_file_limit
from deskgrid.overlay.peer import Peer
from deskgrid.overlay.stream import Stream
from deskgrid.settings import HubSettings, PeerSettings
from tests.unit.overlay.small_grid import SmallGrid, echo_service, pair

LIMIT_S = 120.0
FILES_EACH = 8
"""Descriptors of one relayed stream, both programs and the hub counted; they are all in this process."""


def files() -> set[str]:
    """Return what this process has open."""
    found = set()
    for number in os.listdir("/proc/self/fd"):
        try:
            found.add(f"{number} {os.readlink(f'/proc/self/fd/{number}')}")
        except FileNotFoundError:  # of the listing itself
            continue
    return found


@asynccontextmanager
async def two_peers(path: str) -> AsyncIterator[tuple[Peer, Peer]]:
    """Yield a caller and a peer that offers an echo; all that was made is gone afterwards."""
    settings = PeerSettings(listen="127.0.0.1:0", paths=(path,))
    service, dial = await echo_service()
    async with service, SmallGrid(hub_settings=HubSettings(ping_s=5.0, max_connects_per_s=1e6)) as grid:
        await grid.start_hub()
        called = await grid.peer("b", await grid.endpoint(settings, loopback=True), {"echo": dial})
        caller = await grid.peer("a", await grid.endpoint(settings, loopback=True))
        await called.ready(10)
        await caller.ready(10)
        yield caller, called


async def begin(caller: Peer, number: int) -> tuple[socket.socket, Stream]:
    """Open a stream and have its first words back; it stays open. Every other program speaks before it is connected."""
    local, program = await pair()
    words = b"%d begins\n" % number
    if number % 2:
        program.send(words)
    stream = await caller.connect("echo.b", local, wait_s=60)
    if not number % 2:
        program.send(words)
    await hear(program, words)
    return program, stream


async def hear(program: socket.socket, words: bytes) -> None:
    found = b""
    while len(found) < len(words) and (piece := await asyncio.get_running_loop().sock_recv(program, len(words) - len(found))):
        found += piece
    assert found == words


async def end(program: socket.socket, stream: Stream, number: int) -> None:
    """Say something more, end that direction, and have the other one ended in turn."""
    with program:
        program.send(b"%d ends\n" % number)
        program.shutdown(socket.SHUT_WR)
        await hear(program, b"%d ends\n" % number)
        assert await asyncio.get_running_loop().sock_recv(program, 1) == b""
        assert await stream.wait_closed() == "finished"


@pytest.mark.parametrize("path", ["direct", "relayed"])
@pytest.mark.parametrize("count", [300, pytest.param(2000, marks=pytest.mark.full)])
async def test_many_streams_at_a_time_all_answer_and_leave_nothing(path: str, count: int) -> None:
    raise_file_limit()
    most, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert most > FILES_EACH * count, f"this needs more than {most} open files: ulimit -Hn"
    files_before, threads_before = files(), set(threading.enumerate())
    async with asyncio.timeout(LIMIT_S), two_peers(path) as (caller, called):
        running = await asyncio.gather(*(begin(caller, number) for number in range(count)))
        for peer in (caller, called):
            connections = peer.connections()
            assert len(connections) == count
            assert {one.path for one in connections} == {path}
        assert len(files()) >= 5 * count, "all of them are open"
        await asyncio.gather(*(end(program, stream, number) for number, (program, stream) in enumerate(running)))
        while caller.connections() or called.connections():
            await asyncio.sleep(0.01)
    await asyncio.get_running_loop().shutdown_default_executor()
    assert files() - files_before == set()
    assert set(threading.enumerate()) - threads_before == set()
