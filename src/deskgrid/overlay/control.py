"""A hub's end of a peer's registration: TLS 1.3 with both certificates, then frames. Made for tens of thousands of idle ones.

asyncio's own TLS keeps a buffer of 256 KiB for each connection; here OpenSSL works on two memory buffers that are empty while nothing
happens. What a peer does not read is bounded, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import ssl
from typing import Protocol, cast

from deskgrid.core.frames import FrameReader, Message, encode
from deskgrid.errors import Forbidden, ProtocolError
from deskgrid.model.ids import Sha256
from deskgrid.overlay.identity import who_is

__all__ = ["MAX_UNREAD_BYTES", "ControlConnection", "ControlEvents"]

MAX_UNREAD_BYTES = 256 << 10
"""Bytes that may wait in this process for a peer to read."""
_READ_BYTES = 16 << 10


class ControlEvents(Protocol):
    """What a control connection tells its hub. Nothing is told after `control_lost`, or of a connection after `end` and `abort`."""

    def control_shaken(self, number: int, name: str, key: Sha256) -> None:
        """The other end has proved to be who its certificate says."""

    def control_received(self, number: int, message: Message) -> None:
        """A message has come."""

    def control_broke(self, number: int, reason: str) -> None:
        """What came makes no sense, or the other end does not read. The hub ends it."""

    def control_lost(self, number: int) -> None:
        """The connection is gone; always the last."""


class ControlConnection(asyncio.Protocol):
    """One connection; a protocol for an accepted socket."""

    __slots__ = ("_ended", "_events", "_incoming", "_outgoing", "_reader", "_shaken", "_tls", "_transport", "number")

    def __init__(self, number: int, context: ssl.SSLContext, events: ControlEvents) -> None:
        self.number = number
        self._events = events
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_side=True)
        self._reader = FrameReader()
        self._transport: asyncio.Transport | None = None
        self._shaken = self._ended = False

    def send(self, message: Message) -> None:
        """Send a message, if the connection still takes any."""
        if self._ended:
            return
        try:
            self._tls.write(encode(message))
        except ssl.SSLError:
            self.abort()
            return
        self._flush()

    def end(self) -> None:
        """Close after what was sent. Whoever calls this also bounds how long it may take. Idempotent."""
        if self._ended:
            return
        self._ended = True
        with contextlib.suppress(ssl.SSLError):  # it wants the other end's goodbye, for which nobody waits
            self._tls.unwrap()
        self._flush()
        if self._transport is not None:
            self._transport.close()

    def abort(self) -> None:
        """Close at once. Idempotent."""
        self._ended = True
        if self._transport is not None:
            self._transport.abort()

    # what asyncio calls

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        if self._ended:
            self._transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        self._ended, self._transport = True, None
        self._events.control_lost(self.number)

    def eof_received(self) -> bool | None:
        return None  # a peer's half of a connection is of no use: the transport closes

    def data_received(self, data: bytes) -> None:
        if self._ended:
            return
        self._incoming.write(data)
        try:
            self._advance()
        except ssl.SSLWantReadError:
            pass
        except (ssl.SSLError, Forbidden, ProtocolError) as error:
            self._broke(_reason(error))
        self._flush()

    def _advance(self) -> None:
        if not self._shaken:
            self._tls.do_handshake()
            self._shaken = True
            name, key = who_is(cast(ssl.SSLSocket, self._tls))  # both have what it asks
            self._events.control_shaken(self.number, name, key)
        while not self._ended:
            data = self._tls.read(_READ_BYTES)
            if not data:
                self.end()  # the other end said that it closes
            for message in self._reader.feed(data):
                if not self._ended:
                    self._events.control_received(self.number, message)

    def _broke(self, reason: str) -> None:
        self._flush()  # TLS may have an alert to say
        if not self._ended:
            self._events.control_broke(self.number, reason)

    def _flush(self) -> None:
        """Hand what OpenSSL wrote to the socket; cut a peer that does not read."""
        if self._transport is None or not self._outgoing.pending:
            return
        self._transport.write(self._outgoing.read())
        if self._transport.get_write_buffer_size() > MAX_UNREAD_BYTES:
            was_ended = self._ended
            self.abort()
            if not was_ended:
                self._events.control_broke(self.number, "does not read")


def _reason(error: Exception) -> str:
    return f"TLS: {error.reason or error}" if isinstance(error, ssl.SSLError) else str(error)
