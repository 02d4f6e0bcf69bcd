"""A race of ways to another peer: all are tried at the same time, and the first on which TLS is established wins.

The relay starts late and stands back once more: when it comes first while another way is already connected and only TLS is missing,
that one gets a moment. After the relay has won the others may go on for a while, so that the next stream takes a better way.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from typing import Any

from msgspec import Struct

from deskgrid.clock import Clock
from deskgrid.core.paths import Step
from deskgrid.errors import DeskgridError, Unreachable
from deskgrid.model.overlay import Address, ConnectionPath

__all__ = ["Race", "Secure", "Way"]

_MOST_WAYS = 16
_LEAST_GRACE_S = 0.02
_MOST_GRACE_S = 0.5

Connect = Callable[[], Awaitable[socket.socket]]
Secure = Callable[[socket.socket], Awaitable[ssl.SSLSocket]]
"""Establishes TLS and checks who is there; closes the socket on failure."""
Open = Callable[[Secure], Awaitable[ssl.SSLSocket]]
"""Connects and establishes TLS."""


class Way(Struct, frozen=True):
    """A way on which TLS is established with the right peer."""

    tls: ssl.SSLSocket
    path: ConnectionPath
    address: Address | None
    """What was dialled, if an address was."""
    rtt_s: float
    """How long it took to connect, without TLS."""


class Race:
    """One race; `close` it."""

    def __init__(self, secure: Secure, *, clock: Clock, hub_rtt_s: float, late: Callable[[Way], None]) -> None:
        """`late` is told of ways that worked, but too late; they are closed then."""
        self._secure, self._clock, self._late = secure, clock, late
        self._grace_s = min(max(hub_rtt_s, _LEAST_GRACE_S), _MOST_GRACE_S)
        self._tasks: set[asyncio.Task[None]] = set()
        self._won: asyncio.Future[Way] = asyncio.get_running_loop().create_future()
        self._is_taken = False
        self._securing = 0
        """Ways but the relay that are connected, without TLS yet."""
        self._reasons: dict[ConnectionPath, str] = {}

    def enter(self, step: Step, connect: Connect) -> None:
        """Let a way take part."""
        self._begin(self._run(step, connect))

    def enter_open(self, step: Step, open_: Open) -> None:
        """Let a way take part that makes TLS a part of its own tries."""
        self._begin(self._run_open(step, open_))

    def enter_connected(self, path: ConnectionPath, sock: socket.socket) -> None:
        """Let a connection take part that the other peer has made. Owns the socket; closes it if there are too many."""
        if self._won.done() or len(self._tasks) >= _MOST_WAYS:
            sock.close()
            return

        async def connected() -> socket.socket:
            return sock

        task = self._begin(self._run(Step(path), connected))
        task.add_done_callback(lambda _: sock.close())  # if it never began; TLS has taken it over otherwise

    async def result(self, limit_s: float, *, may_come: bool) -> Way:
        """Return the winner, which is the caller's then. Raise Unreachable if there is none in time, or all have failed.

        `may_come`: the other peer may still connect to us, so that not all have failed before the time is up.
        """
        deadline = self._clock.monotonic() + limit_s
        while not self._won.done() and (self._tasks or may_come):
            left_s = deadline - self._clock.monotonic()
            if left_s <= 0:
                break
            news: set[asyncio.Future[Any]] = {self._won, *self._tasks}
            await asyncio.wait(news, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
        if self._won.done():
            self._is_taken = True
            return self._won.result()
        raise Unreachable(f"no way to the other peer ({self.reasons() or 'none was answered in time'})")

    def reasons(self) -> str:
        """Return why ways failed, for people."""
        return "; ".join(f"{path}: {reason}" for path, reason in sorted(self._reasons.items()))

    async def linger(self, limit_s: float) -> None:
        """Let the other ways go on for a while, to learn which would have worked."""
        if self._tasks:
            await asyncio.wait(set(self._tasks), timeout=limit_s)

    async def close(self) -> None:
        """End all that is still being tried. Idempotent."""
        while self._tasks:
            tasks = set(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)
        if not self._is_taken:
            self.drop_winner()

    def drop_winner(self) -> None:
        """Close the winner: who was to have it does not get it any more."""
        if self._won.done():
            self._won.result().tls.close()

    def _begin(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task

    async def _run_open(self, step: Step, open_: Open) -> None:
        async def counted(sock: socket.socket) -> ssl.SSLSocket:
            with self._counted(step.path):
                return await self._secure(sock)

        try:
            await self._clock.sleep(step.delay_s)
            await self._arrive(Way(await open_(counted), step.path, step.address, 0.0))
        except (DeskgridError, OSError) as error:
            self._reasons[step.path] = str(error)

    async def _run(self, step: Step, connect: Connect) -> None:
        try:
            await self._clock.sleep(step.delay_s)
            began = self._clock.monotonic()
            sock = await connect()
            rtt_s = self._clock.monotonic() - began
            with self._counted(step.path):
                tls = await self._secure(sock)
            await self._arrive(Way(tls, step.path, step.address, rtt_s))
        except (DeskgridError, OSError) as error:
            self._reasons[step.path] = str(error)

    @contextlib.contextmanager
    def _counted(self, path: ConnectionPath) -> Iterator[None]:
        is_relay = path is ConnectionPath.RELAYED
        self._securing += not is_relay
        try:
            yield
        finally:
            self._securing -= not is_relay

    async def _arrive(self, way: Way) -> None:
        try:
            if way.path is ConnectionPath.RELAYED and self._securing:
                await asyncio.wait({self._won}, timeout=self._grace_s)
        except BaseException:
            way.tls.close()
            raise
        if self._won.done():
            self._late(way)
            way.tls.close()
        else:
            self._won.set_result(way)
