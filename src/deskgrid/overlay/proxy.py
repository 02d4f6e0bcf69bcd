"""A local port that is a service of another peer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
import sys
from collections.abc import Awaitable, Callable

import structlog

from deskgrid.errors import DeskgridError
from deskgrid.overlay.background import Background
from deskgrid.overlay.peer import Peer

__all__ = ["reset", "serve", "serve_port"]

_MOST_AT_ONCE = 1024
"""Connections of one listener that are not joined with anything yet."""
_PAUSE_S = 0.1
_ABORTIVE = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
_log = structlog.get_logger()


async def serve_port(peer: Peer, service: str, listener: socket.socket, *, wait_s: float) -> None:
    """Join what connects to `listener` with a service (SERVICE.PEER), until cancelled; streams that were joined go on.

    A service that is not there is waited for up to `wait_s`. If it cannot be reached, the local connection is reset.
    """

    async def join(local: socket.socket) -> None:
        try:
            await peer.connect(service, local, wait_s=wait_s)
        except DeskgridError as error:
            _log.warning("service_not_reached", service=service, error=str(error)[:300])
            reset(local)
        except BaseException:
            reset(local)
            raise

    await serve(listener, join)


async def serve(listener: socket.socket, take: Callable[[socket.socket], Awaitable[None]]) -> None:
    """Give each connection to `take`, which owns it, many at once; until cancelled, and then `take` is cancelled, too."""
    listener.setblocking(False)
    loop = asyncio.get_running_loop()
    room = asyncio.Semaphore(_MOST_AT_ONCE)
    tasks = Background(2 * _MOST_AT_ONCE)
    new: set[socket.socket] = set()
    """Not given to `take` yet."""

    async def taken(local: socket.socket) -> None:
        new.discard(local)
        await take(local)

    try:
        while True:
            await room.acquire()  # the others wait in the system's queue
            try:
                local, _ = await loop.sock_accept(listener)
            except OSError as error:  # it left at once, or we have no descriptors left
                room.release()
                _log.warning("accept_failed", error=str(error))
                await asyncio.sleep(_PAUSE_S)
                continue
            new.add(local)
            task = tasks.start(taken(local))
            if task is not None:
                task.add_done_callback(lambda _: room.release())
    finally:
        await tasks.close()
        for local in new:
            reset(local)


def reset(sock: socket.socket) -> None:
    """Close a connection so that the program at its other end sees an error. Idempotent."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTIVE)
    sock.close()
