"""A peer's registered connection to a hub: TLS, messages of core/frames, signs of life."""

from __future__ import annotations

import asyncio
import contextlib
import random
import ssl
from collections.abc import Callable, Iterable

import structlog

from deskgrid.clock import Clock
from deskgrid.core import frames
from deskgrid.core.frames import FrameReader, Message
from deskgrid.core.paths import plain_host
from deskgrid.errors import DeskgridError, ProtocolError, Unreachable
from deskgrid.model.overlay import Address, Hub

__all__ = ["HubConnection", "Invited", "nearest"]

_OPEN_S = 10.0
_PONG_S = 15.0
_LEAST_PING_S, _MOST_PING_S = 0.1, 600.0
_CHUNK = 16 << 10
_MOST_UNSENT_BYTES = 1 << 20
_MOST_WAITING = 4096
_log = structlog.get_logger()

Invited = Callable[["HubConnection", frames.Invite], None]
"""Told of an invitation; must not wait."""


class HubConnection:
    """One registered connection. `open` makes one; it ends by itself when the hub does, and `ended` tells."""

    def __init__(
        self,
        hub: Hub,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        clock: Clock,
        rng: random.Random,
        invited: Invited,
    ) -> None:
        self.hub = hub
        self.ended = asyncio.Event()
        self.used_at = clock.monotonic()
        """When it was last wanted, by the clock."""
        self.rtt_s = 0.0
        self.observed = Address("", 0)
        """Where the hub sees us."""
        self.address = Address(*writer.get_extra_info("peername")[:2])
        """Of the hub, after its name was resolved."""
        self.own_host = plain_host(str(writer.get_extra_info("sockname")[0]).partition("%")[0])
        self._reader, self._writer, self._clock, self._rng, self._invited = reader, writer, clock, rng, invited
        self._waiting: dict[str, asyncio.Future[frames.Accepted | frames.Rejected]] = {}
        self._pinged_at = 0.0
        self._number = 0
        self._answered = asyncio.Event()
        self._task: asyncio.Task[None] | None = None

    @classmethod
    async def open(cls, hub: Hub, context: ssl.SSLContext, *, clock: Clock, rng: random.Random, invited: Invited) -> HubConnection:
        """Connect and register. Raise Unreachable or ProtocolError."""
        host, _, port = hub.address.rpartition(":")
        began = clock.monotonic()
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(_OPEN_S):
                reader, writer = await asyncio.open_connection(
                    host.strip("[]"), int(port), ssl=context, server_hostname=hub.name, limit=_CHUNK
                )
                self = cls(hub, reader, writer, clock, rng, invited)
                await self._register()
        except (OSError, TimeoutError, ValueError, DeskgridError) as error:
            await _end(writer)
            if isinstance(error, DeskgridError):
                raise
            raise Unreachable(f"{hub.name} at {hub.address} does not answer: {error or 'no answer in time'}") from error
        except BaseException:
            await _end(writer)
            raise
        _log.debug("registered_at_hub", hub=hub.name, rtt_s=round(self.rtt_s, 4), took_s=round(clock.monotonic() - began, 4))
        return self

    async def ask(self, message: frames.Connect, limit_s: float) -> frames.Accepted | frames.Rejected:
        """Ask for a connection and return the answer. Raise Unreachable if none comes in time, or the hub went away."""
        if len(self._waiting) >= _MOST_WAITING:
            raise Unreachable("too many connections are being made")
        future: asyncio.Future[frames.Accepted | frames.Rejected] = asyncio.get_running_loop().create_future()
        self._waiting[message.id] = future
        try:
            self.send(message)
            async with asyncio.timeout(limit_s):
                return await future
        except TimeoutError as error:
            raise Unreachable("the other peer did not answer in time") from error
        finally:
            self._waiting.pop(message.id, None)

    def send(self, message: Message) -> None:
        """Send a message. Raise Unreachable if the connection has ended."""
        if self.ended.is_set():
            raise Unreachable(f"the connection to {self.hub.name} has ended")
        if self._writer.transport.get_write_buffer_size() > _MOST_UNSENT_BYTES:
            self._writer.transport.abort()
            raise Unreachable(f"{self.hub.name} does not take our messages")
        self._writer.write(frames.encode(message))

    async def close(self) -> None:
        """End the connection. Idempotent."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait([self._task])
        await _end(self._writer)

    async def _register(self) -> None:
        sent_at = self._clock.monotonic()
        self.send(frames.Register())
        parser = FrameReader()
        messages: list[Message] = []
        while not messages:
            messages = await self._receive(parser)
        self.rtt_s = self._clock.monotonic() - sent_at
        match messages.pop(0):
            case frames.Registered(observed=observed, ping_s=ping_s):
                self.observed = Address(plain_host(observed.host), observed.port)
                ping_s = min(max(ping_s, _LEAST_PING_S), _MOST_PING_S)
                self._task = asyncio.create_task(self._run(parser, messages, ping_s))
            case frames.Goodbye(reason=reason):
                raise Unreachable(f"{self.hub.name} says: {reason[:200]}")
            case _:
                raise ProtocolError(f"{self.hub.name} does not keep to the protocol")

    async def _receive(self, parser: FrameReader) -> list[Message]:
        data = await self._reader.read(_CHUNK)
        if not data:
            raise Unreachable("the hub closed the connection")
        return parser.feed(data)

    async def _run(self, parser: FrameReader, messages: list[Message], ping_s: float) -> None:
        """Take what the hub sends until the connection ends."""
        pinging = asyncio.create_task(self._ping(ping_s))
        try:
            while True:
                for message in messages:
                    self._take(message)
                messages = await self._receive(parser)
        except (DeskgridError, OSError) as error:
            _log.info("lost_hub", hub=self.hub.name, reason=str(error)[:300])
        finally:
            pinging.cancel()
            self.ended.set()
            self._writer.transport.abort()
            for future in self._waiting.values():
                if not future.done():
                    future.set_exception(Unreachable(f"the connection to {self.hub.name} broke"))

    def _take(self, message: Message) -> None:
        match message:
            case frames.Accepted() | frames.Rejected():
                future = self._waiting.get(message.id)
                if future is not None and not future.done():
                    future.set_result(message)
            case frames.Invite():
                self._invited(self, message)
            case frames.Pong(number=number):
                if number == self._number and not self._answered.is_set():
                    self.rtt_s = self._clock.monotonic() - self._pinged_at
                    self._answered.set()
            case frames.Goodbye(reason=reason):
                raise Unreachable(f"the hub says: {reason[:200]}")
            case _:
                raise ProtocolError("a message that hubs do not send")

    async def _ping(self, ping_s: float) -> None:
        while True:
            await self._clock.sleep(ping_s * (0.75 + 0.25 * self._rng.random()))
            self._number += 1
            self._answered.clear()
            self._pinged_at = self._clock.monotonic()
            try:
                self.send(frames.Ping(self._number))
                async with asyncio.timeout(_PONG_S):
                    await self._answered.wait()
            except (Unreachable, TimeoutError):
                self._writer.transport.abort()  # the reader notices
                return


async def nearest(
    hubs: Iterable[Hub], context: ssl.SSLContext, *, clock: Clock, rng: random.Random, invited: Invited
) -> HubConnection:
    """Register at the hub that answers first; all are tried at once. Raise Unreachable if none does."""
    tasks = {asyncio.create_task(HubConnection.open(hub, context, clock=clock, rng=rng, invited=invited)) for hub in hubs}
    reasons: list[str] = []
    try:
        while tasks:
            done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            opened = [task.result() for task in done if task.exception() is None]
            reasons += [str(task.exception()) for task in done if task.exception() is not None]
            if opened:
                for late in opened[1:]:
                    await late.close()
                return opened[0]
    finally:
        for task in tasks:
            task.cancel()
        for found in await asyncio.gather(*tasks, return_exceptions=True):
            if isinstance(found, HubConnection):
                await found.close()
    raise Unreachable("no hub answers: " + ("; ".join(reasons) or "the server knows of none"))


async def _end(writer: asyncio.StreamWriter | None) -> None:
    if writer is not None:
        writer.transport.abort()
        with contextlib.suppress(OSError, ssl.SSLError):
            await writer.wait_closed()
