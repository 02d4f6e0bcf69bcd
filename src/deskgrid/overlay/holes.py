"""Holes in NATs: connections between two peers whose routers let nobody in.

A hole is a local port whose outside a hub told us: the NAT keeps that mapping while the connection to the hub stands. Both peers then
connect from their holes to each other's, again and again for two seconds: a SYN that comes too early is dropped or refused, but
opens our own side. The port listens, too, for a SYN that arrives between two of our tries (Ford, Srisuresh, Kegel: Peer-to-peer
communication across network address translators, 2005).
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

from deskgrid.clock import Clock
from deskgrid.core import frames
from deskgrid.core.backoff import delay_s
from deskgrid.core.paths import plain_host
from deskgrid.errors import DeskgridError, Unreachable
from deskgrid.model.overlay import Address
from deskgrid.overlay.background import Background
from deskgrid.overlay.dial import connect_to, new_socket, read_exactly, send_all

__all__ = ["PUNCH_S", "Hole", "Holes", "make_hole", "punch"]

PUNCH_S = 2.0
"""Seconds for which a hole is tried."""
_SHORT_TRY_S, _LONG_TRY_S = 0.15, 0.45
"""Of different length, so that both ends do not stay out of step."""
_SECURE_S = 0.5
_EAGER_TRIES = 100
_PAUSE_S = 0.02
_MOST_TRIES = 500
_MAKE_S = 3.0
_WARM_S = 120.0
_MOST_AT_ONCE = 32
_LONGEST_ANSWER = 80


Secure = Callable[[socket.socket], Awaitable[ssl.SSLSocket]]


class Hole:
    """A prepared hole. `outside` is where others may connect to."""

    def __init__(self, probe: socket.socket, outside: Address) -> None:
        self.outside = outside
        self.port: int = probe.getsockname()[1]
        self._probe = probe

    @property
    def is_open(self) -> bool:
        """Tell whether the connection to the hub, which keeps the NAT's mapping, still stands."""
        try:
            return bool(self._probe.recv(1, socket.MSG_PEEK))
        except BlockingIOError:
            return True
        except OSError:
            return False

    def close(self) -> None:
        """Give the port back. Idempotent."""
        self._probe.close()


async def make_hole(hub: Address) -> Hole:
    """Ask a hub what a fresh local port looks like from outside. Raise Unreachable."""
    try:
        async with asyncio.timeout(_MAKE_S), new_socket(hub, port=0) as sock:
            await connect_to(sock, hub)
            await send_all(sock, frames.PROBE)
            return Hole(sock, _outside(await _read_line(sock)))
    except TimeoutError as error:
        raise Unreachable("the hub does not answer a probe") from error


async def punch(hole: Hole, remote: Address, secure: Secure, *, rng: random.Random) -> ssl.SSLSocket:
    """Connect through both NATs and establish TLS; the other peer does the same now. Raise Unreachable after PUNCH_S.

    `secure` takes over a socket, and closes it when it fails. A connection may stand at one end only, when a refusal of an earlier try
    was on its way: so TLS, too, is part of a try.
    """
    reason: DeskgridError = Unreachable("no SYN came through")
    try:
        async with asyncio.timeout(PUNCH_S):
            while True:
                sock = await _first(_connect_again(hole, remote, rng), _accept(hole, remote))
                try:
                    async with asyncio.timeout(_SECURE_S):
                        return await secure(sock)
                except (DeskgridError, TimeoutError) as error:
                    reason = error if isinstance(error, DeskgridError) else Unreachable("TLS was not answered")
    except TimeoutError as error:
        raise Unreachable(f"no hole could be punched to {remote.host}: {reason}") from error


class Holes:
    """Keeps one hole prepared while there was activity within the last two minutes."""

    def __init__(self, clock: Clock, rng: random.Random, background: Background) -> None:
        self._clock, self._rng, self._background = clock, rng, background
        self._warm: Hole | None = None
        self._hub = Address("", 0)
        self._until = 0.0
        self._keeping: asyncio.Task[None] | None = None
        self._taken = asyncio.Event()
        self._making = asyncio.Semaphore(_MOST_AT_ONCE)

    def want(self, hub: Address) -> None:
        """Note activity of a peer that is registered at a hub."""
        self._hub, self._until = hub, self._clock.monotonic() + _WARM_S
        if self._keeping is None or self._keeping.done():
            self._keeping = self._background.start(self._keep())

    async def take(self, hub: Address, *, wait: bool) -> Hole | None:
        """Return the prepared hole, which is the caller's then; without one, None, or with `wait` a new one if it can be made."""
        hole, self._warm = self._warm, None
        self._taken.set()
        if hole is not None and hole.is_open:
            return hole
        if hole is not None:
            hole.close()
        if not wait:
            return None
        async with self._making:
            with contextlib.suppress(Unreachable):
                return await make_hole(hub)
        return None

    async def _keep(self) -> None:
        failures = 0
        try:
            while (left_s := self._until - self._clock.monotonic()) > 0:
                if self._warm is None:
                    failures = 0 if await self._prepare() else failures + 1
                if failures:
                    await self._clock.sleep(delay_s(failures, first_s=1.0, max_s=60.0, rng=self._rng))
                    continue
                self._taken.clear()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(left_s):
                        await self._taken.wait()
        finally:
            if self._warm is not None:
                self._warm.close()
                self._warm = None

    async def _prepare(self) -> bool:
        try:
            self._warm = await make_hole(self._hub)
        except Unreachable:
            return False
        return True


async def _read_line(sock: socket.socket) -> str:
    found = b""
    while not found.endswith(b"\n"):
        found += await read_exactly(sock, 1)
        if len(found) > _LONGEST_ANSWER:
            raise Unreachable("the hub's answer to a probe is too long")
    return found.decode("ascii", "replace")


def _outside(line: str) -> Address:
    host, _, port = line.strip().partition(" ")
    plain = plain_host(host)
    if not plain or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise Unreachable("the hub's answer to a probe cannot be read")
    return Address(plain, int(port))


async def _connect_again(hole: Hole, remote: Address, rng: random.Random) -> socket.socket:
    """Connect from the hole's port until it works.

    A router that refuses (rather than drops) ends our own side's opening, too: both SYNs must be under way at the same time. So at
    first a refused try is followed by the next at once, and our side is open nearly always.
    """
    for number in range(_MOST_TRIES):
        with contextlib.suppress(Unreachable, TimeoutError):
            async with new_socket(remote, port=hole.port) as sock, asyncio.timeout(rng.uniform(_SHORT_TRY_S, _LONG_TRY_S)):
                await connect_to(sock, remote)
                return sock
        await asyncio.sleep(rng.uniform(0.0, _PAUSE_S) if number >= _EAGER_TRIES else 0.0)
    raise Unreachable(f"no hole could be punched to {remote.host}")


async def _accept(hole: Hole, remote: Address) -> socket.socket:
    """Take the other end's connection to the hole's port. Waits for ever where the system does not let us listen there, too."""
    loop = asyncio.get_running_loop()
    with contextlib.suppress(Unreachable, OSError):
        async with new_socket(remote, port=hole.port) as listener:
            with listener:
                listener.listen(4)
                while True:
                    sock, (host, *_) = await loop.sock_accept(listener)
                    if plain_host(host) == remote.host:
                        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                        return sock
                    sock.close()
    return await loop.create_future()  # type: ignore[no-any-return]


async def _first(*ways: Coroutine[Any, Any, socket.socket]) -> socket.socket:
    """Return the first socket; what comes later is closed."""
    tasks = {asyncio.create_task(way) for way in ways}
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        won = done.pop()
        tasks.remove(won)
        return won.result()
    finally:
        for task in tasks:
            task.cancel()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(found, socket.socket):
                found.close()
