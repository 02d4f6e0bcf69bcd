"""One process's place in the overlay: its listening socket, its pumps, what it remembers of paths; any number of peers live on it.

What connects to the listener says with its first bytes what it is:

    22 (TLS)                  a caller that dials directly; the name it asks for (SNI) tells which of our peers it wants
    DIAL_BACK, then 16 bytes  a called peer that dials back, with the id of the connection; then we are the TLS client

Everything else is closed. What has not become a stream is bounded in number, in all and for each address, and in time.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import ssl
from collections import Counter
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Protocol

import structlog

from deskgrid.clock import Clock
from deskgrid.core.frames import TLS_FIRST_BYTE, Candidates
from deskgrid.core.paths import MayDial, PathMemory, dialable, plain_host
from deskgrid.errors import DeskgridError, InvalidInput, Unreachable
from deskgrid.model.overlay import ConnectionPath
from deskgrid.overlay.background import Background
from deskgrid.overlay.dial import DIAL_BACK, ID_BYTES, read_exactly, wait_readable
from deskgrid.overlay.files import raise_file_limit
from deskgrid.overlay.holes import Hole, Holes
from deskgrid.overlay.identity import Identity, listening_context
from deskgrid.overlay.pump import Pumps
from deskgrid.overlay.registration import HubConnection
from deskgrid.overlay.stream_start import secure
from deskgrid.settings import PeerSettings

__all__ = ["GREETING_S", "Called", "Endpoint"]

GREETING_S = 10.0
"""Seconds that a connection may take until TLS is established."""
_MOST_GREETINGS = 1024
_MOST_GREETINGS_PER_HOST = 512
_MOST_RACES = 128
"""At the same time: fewer than another endpoint greets."""
_MOST_TASKS = 16_384
_BACKLOG = 256
_log = structlog.get_logger()


class Called(Protocol):
    """A peer here that can be called."""

    identity: Identity

    def greet(self, tls: ssl.SSLSocket, path: ConnectionPath) -> None:
        """Take a connection on which TLS is established; it is the peer's then."""
        ...


class Endpoint:
    """Where the peers of this process listen. Use as an async context manager."""

    pumps: Pumps
    """Threads that carry the streams of all peers here."""

    def __init__(
        self,
        settings: PeerSettings,
        *,
        clock: Clock,
        rng: random.Random,
        authority_pem: str,
        may_dial: MayDial = dialable,
        pace: Callable[[int], float] | None = None,
    ) -> None:
        """`may_dial` is for tests: nothing on loopback may be dialled. `pace` bounds what all streams carry (see Pumps)."""
        self._pace = pace
        self.settings = settings
        self.clock = clock
        self.rng = rng
        self.authority_pem = authority_pem
        self.may_dial = may_dial
        self.memory = PathMemory()
        self.allowed = frozenset({ConnectionPath(path) for path in settings.paths})
        """Ways that may be tried."""
        if settings.relay_only:
            self.allowed = frozenset({ConnectionPath.RELAYED})
        self.background = Background(_MOST_TASKS)
        self.holes = Holes(clock, rng, self.background)
        self.racing = asyncio.Semaphore(_MOST_RACES)
        """To be held by who calls a peer."""
        self._peers: tuple[Called, ...] = ()
        self._called_back: dict[bytes, Callable[[socket.socket], None]] = {}
        self.greetings: Counter[str] = Counter()
        """Connections that have not said what they are, by address."""
        self._listener: socket.socket | None = None
        self._context = listening_context(authority_pem)
        self._context.sni_callback = self._choose

    @property
    def has_room(self) -> bool:
        """Tell whether more may be done beside."""
        return len(self.background) < _MOST_TASKS - 1

    @property
    def port(self) -> int:
        """The port that others may dial; 0 if we do not listen."""
        return 0 if self._listener is None else int(self._listener.getsockname()[1])

    async def __aenter__(self) -> Endpoint:
        raise_file_limit()  # the usual 1024 are fewer than the greetings that anybody may begin
        self._listener = _listen(self.settings) if self._listens() else None
        self.pumps = Pumps(self.settings.pumps, name="stream", pace=self._pace)
        if self._listener is not None:
            self.background.start(self._accept(self._listener))
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        await self.background.close()
        if self._listener is not None:
            self._listener.close()
        await asyncio.to_thread(self.pumps.close)

    def add(self, peer: Called) -> None:
        """Let a peer be called here."""
        self._peers = (*self._peers, peer)  # never changed in place: pump threads read it

    def drop(self, peer: Called) -> None:
        """Forget a peer. Idempotent."""
        self._peers = tuple(one for one in self._peers if one is not peer)

    @contextlib.contextmanager
    def called_back(self, connection_id: str, take: Callable[[socket.socket], None]) -> Iterator[None]:
        """Give what dials back for a connection to `take`, while the block lasts. `take` must not wait, and owns the socket."""
        key = bytes.fromhex(connection_id)
        self._called_back[key] = take
        try:
            yield
        finally:
            del self._called_back[key]

    def _listens(self) -> bool:
        takes = {ConnectionPath.DIRECT, ConnectionPath.REVERSE} & self.allowed
        return bool(takes) and self.settings.listen != "off"

    async def _accept(self, listener: socket.socket) -> None:
        loop = asyncio.get_running_loop()
        while True:
            try:
                sock, (host, *_) = await loop.sock_accept(listener)
            except OSError as error:  # out of descriptors, or the other end left at once
                _log.warning("accept_failed", error=str(error))
                await asyncio.sleep(0.1)
                continue
            self._begin(sock, plain_host(host.partition("%")[0]))

    def _begin(self, sock: socket.socket, host: str) -> None:
        """Greet a new connection, if there are not too many already."""
        full = self.greetings.total() >= _MOST_GREETINGS or self.greetings[host] >= _MOST_GREETINGS_PER_HOST
        task = None if full else self.background.start(self._greet(sock, host))
        if task is None:
            sock.close()
            return
        self.greetings[host] += 1
        task.add_done_callback(lambda _: self._greeted(sock, host))

    def _greeted(self, sock: socket.socket, host: str) -> None:
        self.greetings[host] -= 1
        if not self.greetings[host]:
            del self.greetings[host]

    async def _greet(self, sock: socket.socket, host: str) -> None:
        """Find out what a new connection is, and hand it on."""
        try:
            async with asyncio.timeout(GREETING_S):
                hand_on = await self._recognise(sock)
        except (DeskgridError, OSError, TimeoutError) as error:
            sock.close()
            _log.info("connection_refused", host=host, reason=str(error)[:200] or "too slow")
            return
        except BaseException:
            sock.close()
            raise
        hand_on()

    async def _recognise(self, sock: socket.socket) -> Callable[[], None]:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        await wait_readable(sock)
        first = sock.recv(1, socket.MSG_PEEK)
        if first == bytes([TLS_FIRST_BYTE]) and ConnectionPath.DIRECT in self.allowed:
            tls = await secure(self.pumps, sock, self._context, server_side=True, limit_s=GREETING_S)
            peer = next((peer for peer in self._peers if peer.identity.server_context is tls.context), None)
            if peer is None:
                tls.close()
                raise Unreachable("it wants a peer that is not here")
            return lambda: peer.greet(tls, ConnectionPath.DIRECT)
        if first != DIAL_BACK[:1]:
            raise Unreachable("it does not speak our protocol")
        preamble = await read_exactly(sock, len(DIAL_BACK) + ID_BYTES)
        take = self._called_back.get(preamble[len(DIAL_BACK) :])
        if not preamble.startswith(DIAL_BACK) or take is None:
            raise Unreachable("it dials back for a connection that nobody waits for")
        return lambda: take(sock)

    def _choose(self, tls: ssl.SSLObject | ssl.SSLSocket, name: str | None, _context: ssl.SSLContext) -> int | None:
        """Choose the peer that a caller asks for; the newest, if several have that name."""
        for peer in reversed(self._peers):
            if peer.identity.name and peer.identity.name == name:
                tls.context = peer.identity.server_context
                return None
        return ssl.ALERT_DESCRIPTION_UNRECOGNIZED_NAME

    def own_candidates(self, hub: HubConnection, hole: Hole | None, *, accepts: ConnectionPath) -> Candidates:
        """Return where we may be dialled: by a called peer (`accepts` is REVERSE) or by a caller (DIRECT)."""
        observed = hub.observed.host
        if self.settings.relay_only:
            return Candidates(observed=observed, relay_only=True)
        fits = self._listener is not None and (self._listener.family == socket.AF_INET6 or ":" not in observed)
        return Candidates(
            observed=observed,
            port=self.port if fits and accepts in self.allowed else 0,
            private=(hub.own_host,) if self.settings.private and hub.own_host else (),
            punch=hole.outside if hole is not None else None,
        )


def _listen(settings: PeerSettings) -> socket.socket:
    host, _, port = settings.listen.rpartition(":")
    host = host.strip("[]")
    try:
        listener = socket.create_server(
            (host, int(port)),
            family=socket.AF_INET6 if ":" in host else socket.AF_INET,
            backlog=_BACKLOG,
            dualstack_ipv6=host == "::" and socket.has_dualstack_ipv6(),
        )
    except (OSError, ValueError, OverflowError) as error:
        raise InvalidInput(f"cannot listen on {settings.listen}: {error}", where="listen", hint='HOST:PORT, or "off"') from error
    listener.setblocking(False)
    return listener
