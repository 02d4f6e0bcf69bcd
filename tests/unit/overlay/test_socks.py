"""SOCKS5 as programs speak it, and as they should not."""

from __future__ import annotations

import asyncio
import random
import socket
from collections.abc import AsyncIterator, Callable

import pytest

from deskgrid.errors import Conflict, DeskgridError, Forbidden, InvalidInput, NotFound, Unreachable
from deskgrid.overlay.socks import serve_socks
from tests.unit.overlay.test_peer import eventually
from tests.unit.overlay.test_proxy import beside, connect

HELLO = b"\x05\x01\x00"


class Joins:
    """Notes what is asked for, and answers with it."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []
        self.error: DeskgridError | None = None

    async def __call__(self, host: str, port: int, local: socket.socket, connected: Callable[[], None]) -> None:
        self.asked.append((host, port))
        if self.error is not None:
            raise self.error
        connected()
        await asyncio.get_running_loop().sock_sendall(local, b"banner")
        local.close()


@pytest.fixture
async def joins() -> Joins:
    return Joins()


@pytest.fixture
async def listener(joins: Joins) -> AsyncIterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with beside(serve_socks(joins, listener)):
            yield listener


async def say(listener: socket.socket, *pieces: bytes) -> bytes:
    """Send pieces and return all that comes until the end; a reset is b"reset"."""
    loop = asyncio.get_running_loop()
    found = b""
    with await connect(listener) as program:
        try:
            for piece in pieces:
                await loop.sock_sendall(program, piece)
                await asyncio.sleep(0)
            async with asyncio.timeout(10):
                while data := await loop.sock_recv(program, 1000):
                    found += data
        except (ConnectionResetError, BrokenPipeError):
            return found + b"reset"
    return found


@pytest.mark.parametrize(
    ("address", "host"),
    [
        (b"\x03\x0fweb.job-42.grid", "web.job-42.grid"),
        (b"\x01\x0a\x40\x01\x02", "10.64.1.2"),
        (b"\x04" + bytes(15) + b"\x01", "::1"),
    ],
)
async def test_names_and_addresses_are_joined(listener: socket.socket, joins: Joins, address: bytes, host: str) -> None:
    assert await say(listener, HELLO, b"\x05\x01\x00" + address + b"\x1f\x90") == b"\x05\x00\x05\x00\x00\x01" + bytes(6) + b"banner"
    assert joins.asked == [(host, 8080)]


async def test_a_client_may_speak_byte_by_byte(listener: socket.socket) -> None:
    whole = HELLO + b"\x05\x01\x00\x03\x03web\x00\x50"
    assert (await say(listener, *(whole[i : i + 1] for i in range(len(whole))))).endswith(b"banner")


@pytest.mark.parametrize(
    ("error", "code"),
    [(Forbidden("no"), 2), (NotFound("none"), 4), (Unreachable("away"), 4), (InvalidInput("what"), 4), (Conflict("full"), 1)],
)
async def test_what_goes_wrong_has_a_code(listener: socket.socket, joins: Joins, error: DeskgridError, code: int) -> None:
    joins.error = error
    assert await say(listener, HELLO, b"\x05\x01\x00\x03\x03web\x00\x50") == b"\x05\x00\x05" + bytes([code, 0, 1]) + bytes(6)


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"\x04\x01", b""),
        (b"\x05\x01\x02", b"\x05\xff"),
        (b"\x05\x00", b"\x05\xff"),
        (HELLO + b"\x05\x02\x00\x03\x03web\x00\x50", b"\x05\x00\x05\x07"),
        (HELLO + b"\x05\x01\x00\x09\x03web\x00\x50", b"\x05\x00\x05\x08"),
        (HELLO + b"\x05\x01\x00\x03\x00\x00\x50", b"\x05\x00\x05\x01"),
        (HELLO + b"\x05\x01\x00\x03\x03a\xffb\x00\x50", b"\x05\x00\x05\x01"),
        (HELLO + b"\x07\x01\x00\x03\x03web\x00\x50", b"\x05\x00"),
    ],
)
async def test_what_is_not_served_is_refused(listener: socket.socket, joins: Joins, request_: bytes, answer: bytes) -> None:
    found = await say(listener, request_)
    assert found.removesuffix(b"reset")[: len(answer)] in (answer, b"")  # a reset may overtake it
    assert not joins.asked


async def test_a_client_that_is_slow_is_cut(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deskgrid.overlay.socks._REQUEST_S", 0.1)
    assert (await say(listener, HELLO)).startswith(b"\x05\x00")


async def test_junk_does_no_harm(listener: socket.socket, joins: Joins) -> None:
    rng = random.Random(3)
    for _ in range(100):
        with await connect(listener) as program:
            program.send(rng.choice([b"", HELLO, b"\x05\xff"]) + rng.randbytes(rng.randrange(40)))
    await eventually(lambda: True)
    assert (await say(listener, HELLO, b"\x05\x01\x00\x03\x03web\x00\x50")).endswith(b"banner")
