"""A peer: one identity on an endpoint. It is known to the server, at home at a hub, calls others and is called.

server   a key, a certificate for it, the hubs, the server's time; renewed at a third of their lifetime (docs/decisions/012)
hubs     overlay/hubs.py
calling  overlay/calling.py: a grant of the server for each service, kept while it is valid
called   overlay/called.py
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Callable, Mapping
from types import TracebackType
from typing import Protocol

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import load_pem_public_key
from msgspec import Struct
from msgspec.structs import replace

from deskgrid.core import frames
from deskgrid.core.backoff import delay_s
from deskgrid.core.opening import MOST_DATA_BYTES, Opening, decode_answer, encode_record
from deskgrid.core.trust import Grant
from deskgrid.errors import Conflict, DeskgridError, ProtocolError, Unreachable
from deskgrid.model import wire
from deskgrid.model.ids import AttemptId, Sha256
from deskgrid.model.overlay import Connection, ConnectionPath
from deskgrid.overlay.background import Background
from deskgrid.overlay.called import MOST_STREAMS, Callee, Dial
from deskgrid.overlay.calling import Caller
from deskgrid.overlay.endpoint import Endpoint
from deskgrid.overlay.granting import Granted, Grants
from deskgrid.overlay.hubs import Hubs
from deskgrid.overlay.identity import Identity
from deskgrid.overlay.pump import Pumps
from deskgrid.overlay.registration import HubConnection
from deskgrid.overlay.stream import Stream
from deskgrid.overlay.stream_start import receive_record, send_record

__all__ = ["Calls", "Dial", "Peer"]

_REPORT_S = 10.0
_MOST_REPORTED = 256
_LEAST_RENEWAL_S = 0.5
_GOODBYE_S = 5.0
_ANSWER_S = 10.0
_FIRST_PAUSE_S, _MAX_PAUSE_S = 0.2, 3.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 60.0
_LEFT = "the local program reset its connection"
_log = structlog.get_logger()


class Calls(Protocol):
    """The way to the server, given by whoever makes a peer."""

    async def register(self, request: wire.RegisterPeer) -> wire.PeerAnswer:
        """Make a peer known, or renew it. Raise DeskgridError."""
        ...

    async def ask_grant(self, request: wire.AskGrant, wait_s: float) -> wire.GrantAnswer:
        """Ask for a grant; the server may hold its answer for `wait_s` while there is none. Raise DeskgridError."""
        ...

    async def remove(self, peer_id: int) -> None:
        """Forget a peer. Raise DeskgridError."""
        ...


class _Final(ProtocolError):
    """Not to be tried again: the called peer was lost while it had the program's first bytes, which must not come twice, or the
    program has left."""


class _Carried(Struct, frozen=True):
    """A stream of ours."""

    stream: Stream
    service: str
    peer: str
    outgoing: bool
    path: ConnectionPath
    since: float

    def as_seen(self) -> Connection:
        """Return it as people see it."""
        return Connection(
            service=self.service,
            peer=self.peer,
            outgoing=self.outgoing,
            path=self.path,
            since=self.since,
            sent_bytes=self.stream.sent_bytes,
            received_bytes=self.stream.received_bytes,
            rtt_s=self.stream.rtt_s(),
        )


class Peer:
    """One identity on an endpoint. Use as an async context manager, which may be entered again after it failed.

    It is known to the server once entered; a hub that cannot be reached is tried again beside.
    """

    def __init__(
        self,
        endpoint: Endpoint,
        calls: Calls,
        *,
        attempt_id: AttemptId | None = None,
        offers: Mapping[str, Dial] | None = None,
        shares: tuple[wire.PeerOffer, ...] = (),
        job_token_hash: Sha256 | None = None,
        reports: bool = True,
    ) -> None:
        """`reports`: the server hears of its connections, for people."""
        self._reports = reports
        self._endpoint, self._calls, self._clock = endpoint, calls, endpoint.clock
        self._attempt_id, self._job_token_hash = attempt_id, job_token_hash
        self._offers = dict(offers or {})
        self._shares = {share.name: share for share in shares}
        self._answer: wire.PeerAnswer | None = None
        self._registered_at = 0.0
        self._registering = asyncio.Lock()
        self._carried: dict[Stream, _Carried] = {}
        self._connecting = 0
        """Calls that are no streams yet."""
        self._reported: tuple[Connection, ...] = ()
        self._is_urgent = False
        self._woken = asyncio.Event()
        self._is_known = asyncio.Event()
        """The server knows at which hub we are."""
        self._background = Background(2 * MOST_STREAMS)
        self.identity = Identity(endpoint.authority_pem)
        self._hubs = Hubs(self.identity, clock=self._clock, rng=endpoint.rng, invited=self._invited, changed=self._hurry)
        self._grants = Grants(self._ask_grant, clock=self._clock)
        self._caller = Caller(endpoint, self.identity, self._hubs)
        self._callee = Callee(endpoint, self.identity, self._offers, joined=self._called, streams=lambda: len(self._carried))

    @property
    def name(self) -> str:
        """The name in its certificate; empty before it was entered."""
        return self.identity.name

    @property
    def pumps(self) -> Pumps:
        """What carries its streams."""
        return self._endpoint.pumps

    @property
    def observed(self) -> str:
        """The address that its hub sees, often that of this PC's router; empty while it is at no hub."""
        home = self._hubs.home
        return home.observed.host if home is not None else ""

    async def __aenter__(self) -> Peer:
        await self._register()
        self._endpoint.add(self._callee)
        self._hubs.start()
        self._background.start(self._keep_registered())
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._endpoint.drop(self._callee)
        try:
            await self._callee.close()
            await self._grants.close()
            await self._hubs.close()
            await self._end_streams()
        finally:
            await self._background.close()
            await self._say_goodbye()

    async def ready(self, limit_s: float) -> None:
        """Wait until it is registered at a hub, and the server knows. Raise Unreachable after `limit_s`."""
        try:
            async with asyncio.timeout(limit_s):
                await self._is_known.wait()
        except TimeoutError as error:
            raise Unreachable("no hub answers", hint="is the hub's port open? deskgrid hub list") from error

    async def offer(self, name: str, dial: Dial, share: tuple[str, ...] = ()) -> None:
        """Offer one more service, or another one under this name. Raise DeskgridError if the server does not take it."""
        self._offers[name] = dial
        self._shares[name] = wire.PeerOffer(name=name, share=share)
        await self._register()

    async def withdraw(self, name: str) -> None:
        """Offer a service no longer; its streams go on. Idempotent."""
        self._offers.pop(name, None)
        self._shares.pop(name, None)
        await self._register()

    def connections(self) -> tuple[Connection, ...]:
        """Return what it carries now: nothing that has ended, though nobody may have been told of it yet."""
        return tuple(one.as_seen() for stream, one in self._carried.items() if not stream.is_closed)

    # calling

    async def look_up(self, service: str) -> str:
        """Prepare for connections to a service: the first one saves a round trip.

        Return what it waits for if it is not there yet, "" if it is. Raise Forbidden, NotFound, Unreachable.
        """
        return await self._grants.look_up(service)

    async def connect(
        self, service: str, local: socket.socket, *, wait_s: float = 0.0, connected: Callable[[], None] | None = None
    ) -> Stream:
        """Join a local socket with a service of another peer, SERVICE.PEER. The socket is taken over, if this does not raise.

        Waits up to `wait_s` for a service that is not there yet. `connected` is called once the service is there, before any byte
        is carried. Raise Forbidden, NotFound, Conflict, Unreachable, ProtocolError.
        """
        if len(self._carried) + self._connecting >= MOST_STREAMS:
            raise Conflict("this peer has too many streams")
        self._connecting += 1
        try:
            return await self._connect(service, local, self._clock.monotonic() + wait_s, connected)
        finally:
            self._connecting -= 1

    async def _connect(self, service: str, local: socket.socket, deadline: float, connected: Callable[[], None] | None) -> Stream:
        failures = 0
        while True:
            try:
                return await self._connect_once(service, local, deadline, connected)
            except Unreachable as error:
                failures += 1
                pause_s = delay_s(failures, first_s=_FIRST_PAUSE_S, max_s=_MAX_PAUSE_S, rng=self._endpoint.rng)
                if self._clock.monotonic() + pause_s >= deadline:
                    raise
                _log.debug("connect_again", service=service, reason=str(error)[:200])
                await self._clock.sleep(pause_s)

    async def _connect_once(
        self, service: str, local: socket.socket, deadline: float, connected: Callable[[], None] | None
    ) -> Stream:
        kept = self._grants.kept(service)
        if kept is not None:
            try:
                return await self._open(service, kept, local, deadline, connected)
            except _Final:
                raise
            except DeskgridError as error:
                self._grants.drop(service, kept)  # it may have moved, or may not be reached any more: the server knows
                _log.debug("grant_outdated", service=service, reason=str(error)[:200])
        granted = await self._grants.ask(service, deadline=deadline)
        try:
            return await self._open(service, granted, local, deadline, connected)
        except DeskgridError:
            self._grants.drop(service, granted)
            raise

    async def _open(
        self, service: str, granted: Granted, local: socket.socket, deadline: float, connected: Callable[[], None] | None
    ) -> Stream:
        pumps = self._endpoint.pumps
        way, connection_id = await self._caller.reach(granted)
        try:
            data = _peek(local)
        except _Final:
            way.tls.close()
            raise
        opening = encode_record(Opening(grant=granted.text, id=connection_id, data=data))
        await send_record(pumps, way.tls, opening, limit_s=_ANSWER_S)
        if not await self._answered(way.tls, _ANSWER_S, said=bool(data)):
            data = b""
            if not await self._answered(way.tls, max(deadline - self._clock.monotonic(), _ANSWER_S), said=False):
                way.tls.close()
                raise ProtocolError("the called peer asks to wait twice")
        try:
            _drop(local, len(data))
            if connected is not None:
                connected()
        except BaseException:
            way.tls.close()
            raise
        return self._carry(way.tls, local, granted.grant.target, service, way.path, outgoing=True, sent_bytes=len(data))

    async def _answered(self, tls: ssl.SSLSocket, limit_s: float, *, said: bool) -> bool:
        """Return whether the service is there, or waited for. `said`: bytes of the program are with the called peer now."""
        try:
            answer = await receive_record(self._endpoint.pumps, tls, limit_s=limit_s)
        except DeskgridError as error:  # also of an answer that somebody on the way has damaged
            if said:
                raise _Final(f"{error}; the service may have got what was sent") from error
            raise
        try:
            return decode_answer(answer)
        except BaseException:
            tls.close()
            raise

    async def _ask_grant(self, service: str, wait_s: float) -> wire.GrantAnswer:
        if self._answer is None:
            raise Unreachable("not registered at the server")
        return await self._calls.ask_grant(wire.AskGrant(peer_id=self._answer.peer_id, service=service), wait_s)

    # ending

    async def finish_streams(self, limit_s: float) -> None:
        """Wait until the streams that there are have ended by themselves, at most `limit_s`: for when the programs behind them have ended.

        Leaving cuts what is still on the way.
        """
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(limit_s):
                for stream in list(self._carried):
                    await stream.wait_closed()

    # called

    def _invited(self, hub: HubConnection, invite: frames.Invite) -> None:
        self._callee.invited(hub, invite)

    def _called(self, tls: ssl.SSLSocket, local: socket.socket, grant: Grant, path: ConnectionPath, received: bytes) -> None:
        self._carry(tls, local, grant.source, grant.service, path, outgoing=False, received=received)

    # streams

    def _carry(
        self,
        tls: ssl.SSLSocket,
        local: socket.socket,
        peer: str,
        service: str,
        path: ConnectionPath,
        *,
        outgoing: bool,
        sent_bytes: int = 0,
        received: bytes = b"",
    ) -> Stream:
        stream = Stream(self._endpoint.pumps, tls, local, sent_bytes=sent_bytes, received=received)
        self._carried[stream] = _Carried(stream, service, peer, outgoing, path, self._clock.now())
        if self._background.start(self._watch(stream)) is None:
            self._carried.pop(stream)
            stream.abort("its peer left")
        self._woken.set()
        _log.info("stream_begins", service=service, peer=peer, outgoing=outgoing, path=path)
        return stream

    async def _watch(self, stream: Stream) -> None:
        try:
            reason = await stream.wait_closed()
        finally:
            one = self._carried.pop(stream)
            self._woken.set()
        _log.info("stream_ended", service=one.service, peer=one.peer, outgoing=one.outgoing, path=one.path, reason=reason)

    async def _end_streams(self) -> None:
        for stream in self._carried:
            stream.abort("its peer left")
        await self.finish_streams(_GOODBYE_S)

    # the server

    def _hurry(self) -> None:
        """Tell the server at once."""
        self._is_urgent = True
        self._woken.set()

    async def _register(self) -> None:
        async with self._registering:
            self._is_urgent = False
            home = self._hubs.home
            hub = home.hub.name if home is not None else ""
            connections = self._to_report()
            sent_at = self._clock.monotonic()
            answer = await self._calls.register(
                wire.RegisterPeer(
                    key=self.identity.public_pem,
                    attempt_id=self._attempt_id,
                    offers=self._told_offers(),
                    hub=hub,
                    connections=connections,
                    job_token_hash=self._job_token_hash,
                )
            )
            self._take(answer, sent_at)
            self._reported = _compared(connections)
            if any(one.name == hub for one in answer.hubs):
                self._is_known.set()

    def _to_report(self) -> tuple[Connection, ...]:
        return self.connections()[:_MOST_REPORTED] if self._reports else ()

    def _told_offers(self) -> tuple[wire.PeerOffer, ...]:
        if self._attempt_id is not None:  # what a job offers is in its spec
            return ()
        return tuple(self._shares.get(name) or wire.PeerOffer(name=name) for name in self._offers)

    def _take(self, answer: wire.PeerAnswer, sent_at: float) -> None:
        """Use what the server said. Its time is counted from before it was asked, so that no grant seems to live longer than it does."""
        try:
            grant_key = load_pem_public_key(answer.grant_key.encode())
        except ValueError as error:
            raise ProtocolError("the server sent a grant key that cannot be read") from error
        if not isinstance(grant_key, Ed25519PublicKey):
            raise ProtocolError("the server sent a grant key of another kind")
        self.identity.renew(answer.name, answer.certificate)
        self._answer, self._registered_at = answer, sent_at
        self._hubs.learn(answer.hubs)
        for one in (self._callee, self._grants):
            one.trust(grant_key, answer.now - sent_at)

    async def _keep_registered(self) -> None:
        failures = 0
        while True:
            await self._until_due()
            try:
                await self._register()
                failures = 0
            except DeskgridError as error:
                failures += 1
                self._is_urgent = True  # what the server did not hear, as where we are at home, it must hear soon
                _log.warning("peer_not_renewed", peer=self.name, error=str(error)[:200], failures=failures)
                await self._clock.sleep(delay_s(failures, first_s=_FIRST_BACKOFF_S, max_s=_MAX_BACKOFF_S, rng=self._endpoint.rng))

    async def _until_due(self) -> None:
        """Return when the server is to hear of us: a third of our lifetime has gone, the hub changed, or what we carry did."""
        while True:
            passed_s = self._clock.monotonic() - self._registered_at
            lifetime_s = self._answer.lifetime_s if self._answer is not None else 0.0
            left_s = max(lifetime_s / 3.0, _LEAST_RENEWAL_S) - passed_s
            if self._is_urgent or left_s <= 0:
                return
            if passed_s >= _REPORT_S and _compared(self._to_report()) != self._reported:
                return
            if self._carried or self._reported:
                left_s = min(left_s, _REPORT_S)
            self._woken.clear()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(left_s):
                    await self._woken.wait()

    async def _say_goodbye(self) -> None:
        if self._answer is None:
            return
        try:
            async with asyncio.timeout(_GOODBYE_S):
                await self._calls.remove(self._answer.peer_id)
        except (DeskgridError, TimeoutError) as error:
            _log.info("goodbye_not_heard", peer=self.name, error=str(error)[:200])
        self._answer = None


def _peek(local: socket.socket) -> bytes:
    """Return what a program has said already, which stays in the system's buffer. Raise _Final if it has reset its connection."""
    try:
        local.setblocking(False)
        return local.recv(MOST_DATA_BYTES, socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return b""
    except OSError as error:  # told once only: the stream would take what comes then for an end of data
        raise _Final(_LEFT) from error


def _drop(local: socket.socket, size: int) -> None:
    """Take out what was seen by `_peek`. Raise _Final if it is not there any more."""
    try:
        if size and len(local.recv(size)) < size:
            raise _Final(_LEFT)
    except OSError as error:
        raise _Final(_LEFT) from error


def _compared(connections: tuple[Connection, ...]) -> tuple[Connection, ...]:
    """Return connections without what changes by itself."""
    return tuple(replace(one, rtt_s=None) for one in connections)
