from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import time
from collections.abc import AsyncIterator

import pytest

from deskgrid.overlay.pump import Pumps
from deskgrid.overlay.relay import Relay

from .loopback import nothing_left, raise_fd_limit, receive, reset, tcp_pair, write_until_full


@pytest.fixture(params=["splice", "copy", "portable"])
async def carried(request: pytest.FixtureRequest) -> AsyncIterator[tuple[Pumps, bool]]:
    """Pumps, and whether relays splice."""
    async with nothing_left(portable=request.param == "portable") as pumps:
        yield pumps, request.param == "splice"


class Relayed:
    """Two programs and the relay between them."""

    def __init__(self, carried: tuple[Pumps, bool], buffer_bytes: int = 0, *, rate: int = 0, idle_s: float = 0.0) -> None:
        pumps, splice = carried
        self.a, near = tcp_pair(buffer_bytes)
        self.b, far = tcp_pair(buffer_bytes)
        self.relay = Relay(pumps, near, far, max_bytes_per_s=rate, idle_s=idle_s, splice=splice)

    async def reason(self) -> str:
        async with asyncio.timeout(10):
            return await self.relay.wait_closed()


@contextlib.asynccontextmanager
async def relayed(
    carried: tuple[Pumps, bool], buffer_bytes: int = 0, *, rate: int = 0, idle_s: float = 0.0
) -> AsyncIterator[Relayed]:
    made = Relayed(carried, buffer_bytes, rate=rate, idle_s=idle_s)
    try:
        yield made
    finally:
        made.a.close()
        made.b.close()
        made.relay.abort()


async def send_all(sock: socket.socket, data: bytes, rng: random.Random) -> None:
    at = 0
    while at < len(data):
        size = rng.choice([1, 100, 16384, 262144, 900_000])
        await asyncio.get_running_loop().sock_sendall(sock, data[at : at + size])
        at += size
    sock.shutdown(socket.SHUT_WR)


async def test_bytes_pass_unchanged_both_ways_at_once(carried: tuple[Pumps, bool]) -> None:
    for seed in range(3):
        rng = random.Random(seed)
        there, back = rng.randbytes(5_000_000 + seed), rng.randbytes(2_000_000)
        async with relayed(carried) as link:
            got_b, got_a, *_ = await asyncio.gather(
                receive(link.b), receive(link.a), send_all(link.a, there, rng), send_all(link.b, back, rng)
            )
            assert got_b == there
            assert got_a == back
            assert await link.reason() == "finished"
            assert link.relay.carried_bytes == len(there) + len(back)


async def test_half_close_passes_and_the_other_direction_lives_on(carried: tuple[Pumps, bool]) -> None:
    async with relayed(carried) as link:
        for near, far in ((link.a, link.b), (link.b, link.a)):
            near.sendall(b"question")
            near.shutdown(socket.SHUT_WR)
            assert (await receive(far)) == b"question"
        assert await link.reason() == "finished"


async def test_answer_passes_long_after_the_end_of_the_question(carried: tuple[Pumps, bool]) -> None:
    async with relayed(carried) as link:
        link.a.shutdown(socket.SHUT_WR)
        assert await receive(link.b) == b""
        for number in range(100):
            link.b.sendall(bytes([number]))
            assert await receive(link.a, 1) == bytes([number])


async def test_reset_passes(carried: tuple[Pumps, bool]) -> None:
    for first in ("a", "b"):
        async with relayed(carried) as link:
            near, far = (link.a, link.b) if first == "a" else (link.b, link.a)
            near.sendall(b"x")
            assert await receive(far, 1) == b"x"
            reset(near)
            with pytest.raises(ConnectionResetError):
                await receive(far)
            assert "reset" in await link.reason()


async def test_reset_passes_while_the_other_side_does_not_read() -> None:
    async with nothing_left() as pumps, relayed((pumps, True), 8192) as link:
        await write_until_full(link.a)
        reset(link.a)
        assert "reset" in await link.reason()


async def test_slow_reader_stops_the_sender_and_gets_everything(carried: tuple[Pumps, bool]) -> None:
    async with relayed(carried, 32 << 10) as link:
        taken = await write_until_full(link.a)
        assert taken < 2_500_000
        link.a.shutdown(socket.SHUT_WR)
        assert len(await receive(link.b)) == taken


async def test_abort_resets_both(carried: tuple[Pumps, bool]) -> None:
    async with relayed(carried) as link:
        link.relay.abort("over a limit")
        link.relay.abort("twice")
        for side in (link.a, link.b):
            with pytest.raises(ConnectionResetError):
                await receive(side)
        assert await link.reason() == "over a limit"


async def test_close_of_the_pumps_resets_what_is_carried(carried: tuple[Pumps, bool]) -> None:
    async with relayed(carried) as link:
        carried[0].close()
        assert await link.reason() == "closed"
        with pytest.raises(ConnectionResetError):
            await receive(link.a)


async def test_rate_is_kept(carried: tuple[Pumps, bool]) -> None:
    rate, size = 4_000_000, 3_000_000
    async with relayed(carried, rate=rate) as link:
        began = time.monotonic()
        got, _ = await asyncio.gather(receive(link.b), send_all(link.a, bytes(size), random.Random(1)))
        took_s = time.monotonic() - began
        assert len(got) == size
        assert took_s > 0.9 * (size - rate / 4) / rate  # a quarter of a second's worth may pass at once
        assert took_s < 5


async def test_idle_relay_is_ended_and_a_busy_one_is_not(carried: tuple[Pumps, bool]) -> None:
    async with relayed(carried, idle_s=0.3) as link:
        began = time.monotonic()
        while time.monotonic() - began < 0.9:
            link.a.sendall(b"x")
            assert await receive(link.b, 1) == b"x"
            await asyncio.sleep(0.02)
        assert "idle" in await link.reason()
        with pytest.raises(ConnectionResetError):
            await receive(link.a)


async def test_thousand_idle_relays_hold_no_pipes(carried: tuple[Pumps, bool]) -> None:
    count = min(1000, (raise_fd_limit(8192) - 200) // 4)
    import os

    before = len(os.listdir("/proc/self/fd"))
    links = [Relayed(carried) for _ in range(count)]
    for link in links:
        link.a.send(b"x")
    for link in links:
        assert await receive(link.b, 1) == b"x"
    assert len(os.listdir("/proc/self/fd")) - before <= 4 * count + 2 * 5 + 2 * 2  # per thread: epoll, a wake-up pair, a pipe
    for link in links:
        link.a.close()
        link.b.close()
    assert {await link.reason() for link in links} == {"finished"}
