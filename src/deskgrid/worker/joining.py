"""Other workers' engines through the overlay, where no connection reaches them directly: most PCs at home are behind a router.

While blobs are shared the worker is a peer of its own with one service, SWARM, which is its engine. To reach another's it opens a port on
loopback, to which its own engine connects. Grants for that are for workers that are in one swarm (server/grants.py). Only direct ways are tried, hole
punching among them: through a hub, which is mostly the server, bytes would cost more than from the server itself.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
from collections.abc import Callable
from functools import partial

import msgspec
import structlog

from deskgrid.clock import Clock
from deskgrid.core.paths import MayDial, dialable
from deskgrid.core.transfer import SWARM
from deskgrid.errors import DeskgridError, Unreachable
from deskgrid.model.overlay import ConnectionPath
from deskgrid.overlay.endpoint import Endpoint
from deskgrid.overlay.peer import Calls, Peer
from deskgrid.overlay.proxy import serve_port
from deskgrid.settings import PeerSettings
from deskgrid.worker.tasks import finish

__all__ = ["Joining", "connect_engine"]

_log = structlog.get_logger()
_LOOPBACK = "127.0.0.1"
_MOST_DOORS = 64
_WAIT_S = 6.0
"""For another that the server does not know at a hub yet; the engine waits for 8."""


async def connect_engine(port: int) -> socket.socket:
    """Connect to this worker's own engine. Raise Unreachable."""
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, (_LOOPBACK, port))
    except OSError as error:
        sock.close()
        raise Unreachable("nothing is shared here now") from error
    except BaseException:
        sock.close()
        raise
    return sock


class Joining:
    """A worker's part in the overlay for its swarms. `start` and `close` it with its engine, as often as that comes and goes."""

    def __init__(
        self,
        settings: PeerSettings,
        calls: Calls,
        *,
        authority_pem: str,
        clock: Clock,
        rng: random.Random,
        may_dial: MayDial = dialable,
    ) -> None:
        """`may_dial` is for tests: see Endpoint."""
        direct = tuple(path for path in settings.paths if path != ConnectionPath.RELAYED.value)
        host = settings.listen.rpartition(":")[0]
        # The owner's port is that of the machines' endpoint.
        listen = f"{host}:0" if host else settings.listen
        self._settings = msgspec.structs.replace(settings, paths=direct, listen=listen)
        self._may = bool(direct) and not settings.relay_only
        self._calls = calls
        self._make_endpoint = partial(
            Endpoint, self._settings, clock=clock, rng=rng, authority_pem=authority_pem, may_dial=may_dial
        )
        self._running: contextlib.AsyncExitStack | None = None
        self._peer: Peer | None = None
        self._doors: dict[str, tuple[int, asyncio.Task[None]]] = {}

    @property
    def joined(self) -> bool:
        """Whether others can reach this worker so: it is at a hub."""
        return self._peer is not None and bool(self._peer.observed)

    async def start(self, port: Callable[[], int]) -> None:
        """Take part, with the engine that listens on `port`; without a hub, or if the owner hides the PC's address, nothing is done. Idempotent."""
        if self._running is not None or not self._may:
            return

        endpoint = self._make_endpoint()
        async with contextlib.AsyncExitStack() as stack:
            try:
                await stack.enter_async_context(endpoint)
                self._peer = await stack.enter_async_context(
                    Peer(endpoint, self._calls, offers={SWARM: lambda: connect_engine(port())}, reports=False)
                )
            except (DeskgridError, OSError) as error:
                _log.warning("not_joined_with_others", error=str(error))
                return
            self._running = stack.pop_all()

    async def close(self) -> None:
        """Take part no more. Idempotent."""
        doors, self._doors = self._doors, {}
        running, self._running, self._peer = self._running, None, None
        for _, task in doors.values():
            task.cancel()
        await asyncio.gather(*(task for _, task in doors.values()), return_exceptions=True)
        if running is not None:
            await finish(running.aclose())

    def door(self, name: str) -> int:
        """Return the port on loopback that leads to the engine of a worker (a peer's name); 0 if this worker takes no part."""
        peer = self._peer
        if peer is None:
            return 0
        if name not in self._doors:
            while len(self._doors) >= _MOST_DOORS:
                self._doors.pop(next(iter(self._doors)))[1].cancel()
            try:
                listener = socket.create_server((_LOOPBACK, 0))
            except OSError as error:  # too many are open
                _log.warning("no_door", peer=name, error=str(error))
                return 0
            task = asyncio.create_task(serve_port(peer, f"{SWARM}.{name}", listener, wait_s=_WAIT_S))
            task.add_done_callback(lambda _: listener.close())  # also of one that is cancelled before it began
            self._doors[name] = listener.getsockname()[1], task
        return self._doors[name][0]
