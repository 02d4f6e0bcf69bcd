"""A TCP door that tests can shut or break."""

from __future__ import annotations

import asyncio
from contextlib import suppress

__all__ = ["Gate"]


class Gate:
    """A TCP door between worker and server that can be shut, as a pulled cable would."""

    def __init__(self, target: str) -> None:
        self._host, _, port = target.rpartition(":")
        self._port = int(port)
        self._open = True
        self._streams: set[asyncio.StreamWriter] = set()
        self._left: int | None = None
        self.broken = 0
        """How often `break_after` has broken the line."""
        self._server: asyncio.Server | None = None
        self.address = ""

    async def __aenter__(self) -> Gate:
        self._server = await asyncio.start_server(self._carry, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self.shut()
        assert self._server is not None
        self._server.close()

    def shut(self) -> None:
        """Break what is open and let nothing in."""
        self._open = False
        for stream in list(self._streams):
            stream.transport.abort()

    def open(self) -> None:
        self._open = True

    def break_after(self, bytes_: int) -> None:
        """Break every connection once, after so many more bytes in either direction."""
        self._left = bytes_

    def _count(self, size: int) -> None:
        if self._left is None:
            return
        self._left -= size
        if self._left <= 0:
            self._left = None
            self.broken += 1
            for stream in list(self._streams):
                stream.transport.abort()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if not self._open:
            writer.transport.abort()
            return
        there, back = await asyncio.open_connection(self._host, self._port)
        self._streams |= {writer, back}
        with suppress(OSError):
            await asyncio.gather(self._pump(reader, back), self._pump(there, writer))
        self._streams -= {writer, back}

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        try:
            while chunk := await source.read(65536):
                target.write(chunk)
                await target.drain()
                self._count(len(chunk))
        finally:
            target.close()
