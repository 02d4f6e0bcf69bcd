"""The HTTP proxy, with a real web client and server, and with requests that are none."""

from __future__ import annotations

import asyncio
import random
import socket
import threading
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor

import pytest

from deskgrid.core.internet import near_networks
from deskgrid.errors import DeskgridError, Forbidden, NotFound, Unreachable
from deskgrid.overlay.http_proxy import dial_public, serve_http_proxy
from tests.unit.overlay.test_proxy import beside, connect


class Web:
    """A web server that notes what it gets, and a dial that leads every name there."""

    def __init__(self) -> None:
        self.heads: list[bytes] = []
        self.bodies: list[bytes] = []
        self.dialled: list[tuple[str, int]] = []
        self.error: DeskgridError | None = None
        self.port = 0

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        size = next((int(line[15:]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")), 0)
        self.bodies.append(await reader.readexactly(size))
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nConnection: close\r\n\r\nhello")
        await writer.drain()
        writer.close()

    async def dial(self, host: str, port: int) -> socket.socket:
        self.dialled.append((host, port))
        if self.error is not None:
            raise self.error
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, ("127.0.0.1", self.port))
        return sock


@pytest.fixture
async def web() -> AsyncIterator[Web]:
    web = Web()
    server = await asyncio.start_server(web.serve, "127.0.0.1", 0)
    web.port = server.sockets[0].getsockname()[1]
    yield web
    server.close()


@pytest.fixture
async def listener(web: Web) -> AsyncIterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        async with beside(serve_http_proxy(web.dial, listener)):
            yield listener


async def ask(listener: socket.socket, *pieces: bytes) -> bytes:
    loop = asyncio.get_running_loop()
    found = b""
    with await connect(listener) as program:
        try:
            for piece in pieces:
                await loop.sock_sendall(program, piece)
            async with asyncio.timeout(10):
                while data := await loop.sock_recv(program, 1000):
                    found += data
        except (ConnectionResetError, BrokenPipeError):
            pass
    return found


async def test_a_request_is_sent_on_with_a_path_and_for_one_time(listener: socket.socket, web: Web) -> None:
    answer = await ask(
        listener,
        b"POST http://ann@example.org:8080//a?b#c HTTP/1.1\r\nHost: evil\r\nProxy-Authorization: secret\r\n"
        b"Connection: keep-alive, X-Mine\r\nX-Mine: 1\r\nAccept: */*\r\nContent-Length: 4\r\n\r\nbo",
        b"dy",
    )
    assert answer.endswith(b"hello")
    assert web.dialled == [("example.org", 8080)]
    assert web.bodies == [b"body"]
    head = b"POST //a?b HTTP/1.1\r\nHost: example.org:8080\r\nAccept: */*\r\nContent-Length: 4\r\nConnection: close\r\n\r\n"
    assert web.heads == [head]


@pytest.mark.parametrize(
    ("target", "path"), [("http://h", "/"), ("HTTP://h?q", "/?q"), ("http://h/#f", "/"), ("http://[::1]:81/x", "/x")]
)
async def test_paths(listener: socket.socket, web: Web, target: str, path: str) -> None:
    await ask(listener, f"GET {target} HTTP/1.1\r\n\r\n".encode())
    assert web.heads[0].startswith(f"GET {path} HTTP/1.1\r\n".encode())


async def test_connect_makes_a_tunnel(listener: socket.socket, web: Web) -> None:
    answer = await ask(listener, b"CONNECT example.org:443 HTTP/1.1\r\nHost: x\r\n\r\n" + b"GET / HTTP/1.1\r\n\r\n")
    assert web.dialled == [("example.org", 443)]
    assert answer.startswith(b"HTTP/1.1 200 Connection established\r\n\r\nHTTP/1.1 200 OK")
    assert answer.endswith(b"hello")


@pytest.mark.parametrize(
    ("error", "status"), [(Forbidden("no"), b"403"), (NotFound("none"), b"502"), (Unreachable("away"), b"502")]
)
async def test_what_goes_wrong_has_a_status(listener: socket.socket, web: Web, error: DeskgridError, status: bytes) -> None:
    web.error = error
    assert (await ask(listener, b"GET http://a/ HTTP/1.1\r\n\r\n")).startswith(b"HTTP/1.1 " + status)


@pytest.mark.parametrize(
    "request_",
    [
        b"GET / HTTP/1.1\r\n\r\n",
        b"GET https://a/ HTTP/1.1\r\n\r\n",
        b"GET http:///x HTTP/1.1\r\n\r\n",
        b"GET http://a:99999/ HTTP/1.1\r\n\r\n",
        b"CONNECT a HTTP/1.1\r\n\r\n",
        b"CONNECT a:0 HTTP/1.1\r\n\r\n",
        b"GET http://a/ HTTP/2.0\r\n\r\n",
        b"GET http://a/ b HTTP/1.1\r\n\r\n",
        b"GET http://a/ HTTP/1.1\r\nA : b\r\n\r\n",
        b"GET http://a/ HTTP/1.1\r\nA: b\r\n folded\r\n\r\n",
        b"GET http://a/ HTTP/1.1\r\nA: b\nHost: c\r\n\r\n",
        b"\x00\xff\r\n\r\n",
        b"\r\n\r\n",
    ],
)
async def test_what_is_no_request_is_refused(listener: socket.socket, web: Web, request_: bytes) -> None:
    assert (await ask(listener, request_)).startswith(b"HTTP/1.1 400")
    assert not web.dialled


async def test_junk_and_endless_heads_do_no_harm(listener: socket.socket, web: Web) -> None:
    rng = random.Random(2)
    for _ in range(30):
        with await connect(listener) as program:
            program.send(b"GET http://a/ HTTP/1.1\r\n"[: rng.randrange(25)] + rng.randbytes(rng.randrange(200)))
    await ask(listener, b"GET http://a/ HTTP/1.1\r\n", b"A: b\r\n" * 20_000)
    assert (await ask(listener, b"GET http://a/ HTTP/1.1\r\n\r\n")).endswith(b"hello")


async def test_a_slow_client_is_cut(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deskgrid.overlay.http_proxy._HEAD_S", 0.1)
    assert (await ask(listener, b"GET http")).startswith(b"HTTP/1.1 408")


@pytest.mark.parametrize(
    "host",
    ["127.0.0.1", "localhost", "127.1", "2130706433", "0x7f000001", "0.0.0.0", "::1", "::ffff:127.0.0.1", "10.0.0.1", "192.168.1.1",
     "100.64.0.1", "169.254.169.254", "224.0.0.1", "fe80::1", "fd00::1", "64:ff9b::a00:1", "2002:7f00:1::1", "::"],
)  # fmt: skip
async def test_what_is_not_public_is_not_dialled(host: str) -> None:
    with pytest.raises((Forbidden, NotFound)):
        await dial_public(host, 80)


@pytest.mark.parametrize("host", ["", "a" * 300, "x..y", "no-such-name.invalid", "\x00", "é" * 70])
async def test_what_is_no_name_is_not_found(host: str) -> None:
    with pytest.raises((NotFound, Forbidden)):
        await dial_public(host, 80)


async def test_address_that_a_hub_sees_of_this_pc_is_not_dialled():
    with pytest.raises(Forbidden, match="not on the public internet"):
        await dial_public("192.0.1.7", 80, near=near_networks([("192.0.1.7", None)]))


async def test_slow_names_hold_up_nothing_but_the_resolver_given(monkeypatch: pytest.MonkeyPatch):
    answered, asked = threading.Event(), threading.Semaphore(0)

    def slow(*_: object, **__: object) -> list[object]:
        asked.release()
        answered.wait(20)
        raise OSError("no answer")

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    with ThreadPoolExecutor(2) as resolver:
        dialling = [asyncio.create_task(dial_public(f"n{number}.example", 80, resolver=resolver)) for number in range(64)]
        async with asyncio.timeout(10):
            await asyncio.to_thread(asked.acquire)
        assert not answered.is_set()
        answered.set()
        found = await asyncio.gather(*dialling, return_exceptions=True)
    assert all(isinstance(one, NotFound) for one in found)
