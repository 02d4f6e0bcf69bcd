from __future__ import annotations

import asyncio
import contextlib
import functools
import socket
import threading
import time
from collections.abc import AsyncIterator

import pytest

from deskgrid.errors import ProtocolError, Unreachable
from deskgrid.overlay.pump import Pumps
from deskgrid.overlay.stream_start import receive_record, secure, send_record

from .certificates import Authority, Leaf
from .loopback import eventually, nothing_left, tcp_pair, unread

NAME = "attempt-1.job-1.deskgrid"


@functools.cache
def authority() -> Authority:
    return Authority()


@functools.cache
def leaf() -> Leaf:
    return authority().issue(NAME)


@pytest.fixture(params=[False, True], ids=["epoll", "portable"])
async def pumps(request: pytest.FixtureRequest) -> AsyncIterator[Pumps]:
    async with nothing_left(portable=request.param) as made:
        yield made


async def both(pumps: Pumps, client: Leaf, server: Leaf, name: str = NAME) -> list[object]:
    """Handshake; return what each end got: a socket or an error. A client also reads, to learn what the server thinks of it."""
    near, far = tcp_pair()

    async def call() -> object:
        tls = await secure(pumps, near, client.client_context, server_hostname=name)
        assert await receive_record(pumps, tls, limit_s=5) == b"welcome"
        return tls

    async def answer() -> object:
        tls = await secure(pumps, far, server.server_context, server_side=True)
        await send_record(pumps, tls, b"welcome", limit_s=5)
        return tls

    found = await asyncio.gather(call(), answer(), return_exceptions=True)
    for one in found:
        if isinstance(one, socket.socket):
            one.close()
    return list(found)


async def test_both_ends_know_each_other(pumps: Pumps) -> None:
    near, far = tcp_pair()
    client, server = await asyncio.gather(
        secure(pumps, near, leaf().client_context, server_hostname=NAME),
        secure(pumps, far, leaf().server_context, server_side=True),
    )
    assert client.version() == "TLSv1.3"
    for tls in (client, server):
        assert (tls.getpeercert() or {})["subjectAltName"] == (("DNS", NAME),)
        tls.close()


async def test_other_name_is_refused(pumps: Pumps) -> None:
    caller, called = await both(pumps, leaf(), leaf(), name="attempt-1.job-2.deskgrid")
    assert isinstance(caller, ProtocolError) and "certificate" in str(caller)
    assert isinstance(called, ProtocolError | Unreachable)


async def test_server_of_another_authority_is_refused(pumps: Pumps) -> None:
    caller, _ = await both(pumps, leaf(), Authority().issue(NAME))
    assert isinstance(caller, ProtocolError) and "certificate" in str(caller)


async def test_client_of_another_authority_is_refused_and_learns_it(pumps: Pumps) -> None:
    stranger = Authority("another authority").issue(NAME)
    stranger.client_context.load_verify_locations(cadata=authority().pem.decode())
    caller, called = await both(pumps, stranger, leaf())
    assert isinstance(called, ProtocolError) and "certificate" in str(called)
    assert isinstance(caller, ProtocolError | Unreachable)


async def test_peers_whose_clock_is_wrong_still_accept_certificates(pumps: Pumps) -> None:
    expired = authority().issue(NAME, days=-5)
    assert all(isinstance(one, socket.socket) for one in await both(pumps, expired, expired))


async def test_peer_that_says_nothing_is_given_up_in_time(pumps: Pumps) -> None:
    for server_side in (False, True):
        near, far = tcp_pair()
        began = time.monotonic()
        with pytest.raises(Unreachable, match="no answer"):
            await _secured(pumps, near, server_side, limit_s=0.2)
        assert time.monotonic() - began < 5
        assert near.fileno() == -1
        far.close()


async def test_peer_that_drips_is_given_up_in_time(pumps: Pumps) -> None:
    near, far = tcp_pair()
    hello = b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(500)

    async def drip() -> None:
        with contextlib.suppress(OSError):
            for index in range(len(hello)):
                far.send(hello[index : index + 1])
                await asyncio.sleep(0.02)

    dripping = asyncio.create_task(drip())
    with pytest.raises(Unreachable, match="no answer"):
        await _secured(pumps, near, True, limit_s=0.3)
    dripping.cancel()
    far.close()


@pytest.mark.parametrize("garbage", [b"GET / HTTP/1.1\r\n\r\n", bytes(100), b"\x16\x03\x01\xff\xff" + bytes(70_000)])
async def test_garbage_is_refused(pumps: Pumps, garbage: bytes) -> None:
    for server_side in (False, True):
        near, far = tcp_pair()
        far.send(garbage)
        with pytest.raises(ProtocolError):
            await _secured(pumps, near, server_side)
        far.close()


async def test_connection_that_ends_is_unreachable(pumps: Pumps) -> None:
    for server_side in (False, True):
        near, far = tcp_pair()
        far.close()
        with pytest.raises(Unreachable):
            await _secured(pumps, near, server_side)


async def test_cancelled_handshake_leaves_no_socket(pumps: Pumps) -> None:
    near, far = tcp_pair()
    handshake = asyncio.create_task(_secured(pumps, near, False))
    await eventually(lambda: unread(far))
    handshake.cancel()
    with pytest.raises(asyncio.CancelledError):
        await handshake
    assert await asyncio.get_running_loop().sock_recv(far, 65536)  # the client's hello
    assert await asyncio.get_running_loop().sock_recv(far, 65536) == b""
    far.close()


async def test_cancelling_at_any_moment_leaves_nothing(pumps: Pumps) -> None:
    for turns in range(30):
        near, far = tcp_pair()
        ends = [
            asyncio.create_task(_secured(pumps, near, False)),
            asyncio.create_task(secure(pumps, far, leaf().server_context, server_side=True)),
        ]
        for _ in range(turns):
            await asyncio.sleep(0)
        for end in ends:
            end.cancel()
        for found in await asyncio.gather(*ends, return_exceptions=True):
            if isinstance(found, socket.socket):
                found.close()


async def test_record_above_the_bound_is_refused(pumps: Pumps) -> None:
    near, far = tcp_pair()
    caller, called = await asyncio.gather(
        secure(pumps, near, leaf().client_context, server_hostname=NAME),
        secure(pumps, far, leaf().server_context, server_side=True),
    )
    await send_record(pumps, caller, bytes(101), limit_s=5)
    with pytest.raises(ProtocolError, match="101 bytes"):
        await receive_record(pumps, called, limit_s=5, max_bytes=100)
    assert called.fileno() == -1
    caller.close()


async def test_record_that_does_not_come_is_given_up_in_time(pumps: Pumps) -> None:
    near, far = tcp_pair()
    caller, called = await asyncio.gather(
        secure(pumps, near, leaf().client_context, server_hostname=NAME),
        secure(pumps, far, leaf().server_context, server_side=True),
    )
    with pytest.raises(Unreachable, match="no answer"):
        await receive_record(pumps, called, limit_s=0.1)
    with pytest.raises(Unreachable):
        await receive_record(pumps, caller, limit_s=5)


async def test_wrong_use_leaves_no_socket(pumps: Pumps) -> None:
    near, far = tcp_pair()
    with pytest.raises(ValueError, match="server_hostname"):
        await secure(pumps, near, leaf().client_context)
    assert near.fileno() == -1
    far.close()


async def test_closed_pumps_refuse() -> None:
    async with nothing_left() as pumps:
        pumps.close()
        near, far = tcp_pair()
        with pytest.raises(Unreachable, match="closed"):
            await _secured(pumps, near, False)
        far.close()


async def test_pumps_that_close_end_a_handshake() -> None:
    async with nothing_left() as pumps:
        near, far = tcp_pair()
        handshake = asyncio.create_task(_secured(pumps, near, False))
        await eventually(lambda: unread(far))
        pumps.close()
        with pytest.raises(Unreachable, match="closed"):
            await handshake
        far.close()


async def test_event_loop_is_not_held_up_by_handshakes(pumps: Pumps) -> None:
    near, far = tcp_pair()
    handshake = asyncio.create_task(_secured(pumps, near, True, limit_s=0.3))
    turns = 0
    while not handshake.done():
        await asyncio.sleep(0.001)
        turns += 1
    assert turns > 20
    assert isinstance(handshake.exception(), Unreachable)
    far.close()


async def _secured(pumps: Pumps, sock: socket.socket, server_side: bool, limit_s: float = 5.0) -> socket.socket:
    if server_side:
        return await secure(pumps, sock, leaf().server_context, server_side=True, limit_s=limit_s)
    return await secure(pumps, sock, leaf().client_context, server_hostname=NAME, limit_s=limit_s)


async def test_cancelled_twice_it_still_ends_only_when_its_thread_has_let_go() -> None:
    """Whoever cancels closes the socket next: its file number must not be watched any more then."""
    async with nothing_left(threads=1) as pumps:
        near, far = tcp_pair()
        handshake = asyncio.create_task(secure(pumps, near, leaf().client_context, server_hostname=NAME))
        await eventually(lambda: unread(far) > 0)
        (pump,) = pumps._pumps
        busy, free = threading.Event(), threading.Event()
        pump.post(lambda: (busy.set(), free.wait(10), None)[2])
        await eventually(busy.is_set)
        for _ in range(3):
            handshake.cancel()
            await asyncio.sleep(0)
        await asyncio.wait([handshake], timeout=0.1)
        ended_before = handshake.done()
        free.set()
        await asyncio.wait([handshake])
        assert handshake.cancelled()
        assert not ended_before
        assert not len(pumps)
        far.close()
