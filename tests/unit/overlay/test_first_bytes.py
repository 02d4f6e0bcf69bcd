"""A program's first bytes, which travel with the opening: at the service they come once and in order, or it sees a reset."""

from __future__ import annotations

import asyncio
import os
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from deskgrid.core.opening import MOST_DATA_BYTES, Answer
from deskgrid.errors import ProtocolError, Unreachable
from deskgrid.overlay import called
from deskgrid.overlay.called import Callee
from deskgrid.overlay.peer import Dial
from deskgrid.overlay.proxy import reset
from tests.unit.overlay.small_grid import SmallGrid, pair
from tests.unit.overlay.test_peer import eventually, two

END, RESET = b"<end>", b"<reset>"


class Service:
    """Notes what each of its connections got, and how it ended."""

    def __init__(self) -> None:
        self.got: list[bytearray] = []
        self.dial: Dial

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        found = bytearray()
        self.got.append(found)
        try:
            while data := await reader.read(1 << 16):
                found += data
            found += END
        except ConnectionError:
            found += RESET
        writer.close()


@pytest.fixture
async def grid() -> AsyncIterator[SmallGrid]:
    async with SmallGrid() as grid:
        yield grid


@pytest.fixture
async def service() -> AsyncIterator[Service]:
    service = Service()
    server = await asyncio.start_server(service.take, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()

    async def dial() -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        return sock

    service.dial = dial
    yield service
    server.close()


def break_answers(monkeypatch: pytest.MonkeyPatch, junk: bytes) -> None:
    """Have the called peer's answers come as `junk` under TLS, as a hub could do, and then nothing more."""

    async def answer(_callee: Callee, tls: ssl.SSLSocket, _answer: Answer) -> None:
        if junk:
            os.write(tls.fileno(), junk)
        tls.close()
        raise Unreachable("lost")

    monkeypatch.setattr(Callee, "_answer", answer)


async def test_first_bytes_are_not_sent_again_if_the_answer_was_tampered_with(
    grid: SmallGrid, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, _ = await two(grid, service.dial)
    assert await caller.look_up("echo.b") == ""  # a grant is kept, so that a failure would be tried again with a new one
    asked = grid.asked
    break_answers(monkeypatch, b"\x17\x03\x03\x00\x20" + bytes(32))
    local, program = await pair()
    with local, program:
        program.send(b"pay")
        with pytest.raises(ProtocolError, match="may have got"):
            await caller.connect("echo.b", local, wait_s=30)
    assert grid.asked == asked


async def test_a_service_never_takes_a_part_for_the_whole_when_its_caller_is_lost(
    grid: SmallGrid, service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, _ = await two(grid, service.dial)
    break_answers(monkeypatch, b"")
    local, program = await pair()
    with local, program:
        program.send(b"half of a")
        with pytest.raises(ProtocolError, match="may have got"):
            await caller.connect("echo.b", local, wait_s=30)
    await eventually(lambda: bool(service.got) and service.got[0].endswith((END, RESET)))
    assert service.got[0] in (END, RESET, b"half of a" + RESET)


async def test_a_service_that_reads_late_is_given_its_first_bytes_then(grid: SmallGrid, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(called, "_ANSWER_S", 1.0)
    said = os.urandom(MOST_DATA_BYTES)
    async with _narrow() as (dial, ends):
        caller, _ = await two(grid, dial)
        local, program = await pair()
        with program:
            program.send(said)
            stream = await caller.connect("echo.b", local)
            program.shutdown(socket.SHUT_WR)
            loop, found = asyncio.get_running_loop(), b""
            with ends[0] as far:
                while data := await loop.sock_recv(far, 1 << 16):
                    found += data
            assert found == said
            assert len(ends) == 1
            assert await stream.wait_closed() == "finished"


@asynccontextmanager
async def _narrow() -> AsyncIterator[tuple[Dial, list[socket.socket]]]:
    """Yield a way to dial a service whose connections hold little, and its ends of them."""
    ends: list[socket.socket] = []
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        async def dial() -> socket.socket:
            sock = socket.socket()
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
            sock.setblocking(False)
            await asyncio.get_running_loop().sock_connect(sock, listener.getsockname())
            ends.append(listener.accept()[0])
            ends[-1].setblocking(False)
            return sock

        yield dial, ends
        for end in ends:
            end.close()


async def test_a_service_that_resets_at_once_is_a_reset_for_the_program(grid: SmallGrid) -> None:
    dials = 0

    async def dial() -> socket.socket:
        nonlocal dials
        dials += 1
        far, near = await pair()
        reset(far)
        return near

    caller, _ = await two(grid, dial)
    local, program = await pair()
    with program:
        program.send(b"pay")
        stream = await caller.connect("echo.b", local, wait_s=30)
        assert "reset" in await stream.wait_closed()
        with pytest.raises(ConnectionError):
            await asyncio.get_running_loop().sock_recv(program, 1)
    assert dials == 1


@pytest.mark.parametrize("said", [b"", b"half of a"])
async def test_a_program_that_reset_its_connection_before_it_was_joined_ends_in_a_reset(
    grid: SmallGrid, service: Service, said: bytes
) -> None:
    caller, _ = await two(grid, service.dial)
    local, program = await pair()
    program.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    if said:
        program.send(said)
    program.close()
    with local:
        try:
            stream = await caller.connect("echo.b", local, wait_s=30)
        except ProtocolError as error:
            assert "reset" in str(error)
        else:
            assert "reset" in await stream.wait_closed()
            await eventually(lambda: bool(service.got) and service.got[0].endswith((END, RESET)))
    assert all(one.endswith(RESET) for one in service.got)
