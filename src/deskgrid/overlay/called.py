"""The called side: invitations of hubs, and connections of callers that become streams.

A connection becomes a stream in four steps: TLS with a certificate of the grid's authority, the caller's first record within five
seconds, the grant in it checked against that certificate and ours, the local service dialled. Whoever fails is told so, if a record
was read, and closed. The service may come late: the caller waits for our answer, and when it hangs up we stop.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
from collections.abc import Awaitable, Callable, Mapping
from typing import Any, Protocol

import structlog
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from deskgrid.core import frames
from deskgrid.core.opening import Answer, Opening, SeenIds, check_grant, decode_opening, encode_record, is_id, refusal
from deskgrid.core.paths import PathMemory, Remembered, Step, plan
from deskgrid.core.trust import Grant
from deskgrid.errors import Conflict, DeskgridError, Forbidden, ProtocolError, Unreachable
from deskgrid.model.overlay import ConnectionPath
from deskgrid.overlay.background import Background
from deskgrid.overlay.dial import dial_back, dial_relay, wait_readable
from deskgrid.overlay.endpoint import GREETING_S, Endpoint
from deskgrid.overlay.holes import Hole, punch
from deskgrid.overlay.identity import Identity, who_is
from deskgrid.overlay.registration import HubConnection
from deskgrid.overlay.stream_start import receive_record, secure, send_record

__all__ = ["MOST_STREAMS", "Callee", "Dial", "Joined"]

MOST_STREAMS = 4096
"""Streams and callers that wait for a service, of one peer."""
_MOST_INVITATIONS = 256
_RECORD_S = 5.0
_ANSWER_S = 5.0
_INVITATION_S = 10.0
_AT_ONCE_S = 0.05
"""Seconds after which a caller is told that the service is not there yet."""
_log = structlog.get_logger()

Dial = Callable[[], Awaitable[socket.socket]]
"""Makes a connection to a local service; it may take long. Raises DeskgridError."""


class Joined(Protocol):
    """Takes over both sockets: a stream of an incoming call begins."""

    def __call__(self, tls: ssl.SSLSocket, local: socket.socket, grant: Grant, path: ConnectionPath, received: bytes) -> None: ...


class Callee:
    """Takes the calls for one peer."""

    def __init__(
        self, endpoint: Endpoint, identity: Identity, offers: Mapping[str, Dial], *, joined: Joined, streams: Callable[[], int]
    ) -> None:
        """`offers` may change while calls are taken; `streams` tells how many there are."""
        self.identity = identity
        self._endpoint, self._offers, self._joined, self._streams = endpoint, offers, joined, streams
        self._grant_key: Ed25519PublicKey | None = None
        self._offset_s = 0.0
        self._seen = SeenIds()
        self._memory = PathMemory()
        """By which ways callers came."""
        self._invitations: dict[str, asyncio.Task[None]] = {}
        self._waiting = 0
        self._background = Background(2 * MOST_STREAMS)

    def trust(self, grant_key: Ed25519PublicKey, offset_s: float) -> None:
        """Use this key and server time (monotonic time + `offset_s`) to check grants."""
        self._grant_key, self._offset_s = grant_key, offset_s

    async def close(self) -> None:
        """Take no more calls, and end those that are no streams yet. Idempotent."""
        await self._background.close()

    # invitations

    def invited(self, hub: HubConnection, invite: frames.Invite) -> None:
        """Answer an invitation, and help the caller to get here."""
        try:
            if not is_id(invite.id) or len(invite.relay) != 2 * frames.TOKEN_BYTES or not _is_hexadecimal(invite.relay):
                raise ProtocolError("an invitation without id or token")
            grant = self._check(invite.grant)
            if len(self._invitations) >= _MOST_INVITATIONS or invite.id in self._invitations:
                raise Conflict("too many callers at the same time")
        except DeskgridError as error:
            _log.info("invitation_refused", hub=hub.hub.name, reason=str(error)[:200])
            with contextlib.suppress(Unreachable):
                hub.send(frames.Reject(id=invite.id[:32], reason=str(error)[:200]))
            return
        task = self._background.start(self._help(hub, invite, grant))
        if task is not None:
            self._invitations[invite.id] = task
            task.add_done_callback(lambda _: self._invitations.pop(invite.id, None))

    async def _help(self, hub: HubConnection, invite: frames.Invite, grant: Grant) -> None:
        """Accept, and try all ways to the caller until it has come by one."""
        endpoint = self._endpoint
        last = self._memory.best(grant.source_key, now=endpoint.clock.monotonic())
        hole = await self._hole(hub, last)
        try:
            own = endpoint.own_candidates(hub, hole, accepts=ConnectionPath.DIRECT)
            hub.send(frames.Accept(id=invite.id, candidates=own))
            steps = plan(
                own,
                invite.candidates,
                calling=False,
                allowed=endpoint.allowed,
                private=endpoint.settings.private,
                hub_rtt_s=hub.rtt_s,
                last=last,
                may_dial=endpoint.may_dial,
            )
            async with asyncio.timeout(_INVITATION_S), asyncio.TaskGroup() as tasks:
                for step in steps:
                    tasks.create_task(self._try(step, hub, invite, hole))
        except (TimeoutError, Unreachable):
            pass
        finally:
            if hole is not None:
                hole.close()

    async def _hole(self, hub: HubConnection, last: Remembered | None) -> Hole | None:
        """Return a hole if there is one at once; waits for one only where that is known to pay."""
        if ConnectionPath.PUNCHED not in self._endpoint.allowed:
            return None
        self._endpoint.holes.want(hub.address)
        needed = ConnectionPath.RELAYED not in self._endpoint.allowed
        worked = last is not None and last.path is ConnectionPath.PUNCHED
        return await self._endpoint.holes.take(hub.address, wait=needed or worked)

    async def _try(self, step: Step, hub: HubConnection, invite: frames.Invite, hole: Hole | None) -> None:
        await self._endpoint.clock.sleep(step.delay_s)
        try:
            tls = await self._open(step, hub, invite, hole)
        except (DeskgridError, OSError) as error:
            _log.debug("way_failed", path=step.path, reason=str(error)[:200])
            return
        if tls is not None:
            self.greet(tls, step.path)  # what comes of it does not end with the invitation

    async def _open(self, step: Step, hub: HubConnection, invite: frames.Invite, hole: Hole | None) -> ssl.SSLSocket | None:
        """Connect with the caller in one way; None if that is the caller's to do."""
        address = step.address
        if step.path is ConnectionPath.RELAYED:
            return await self._secured(await dial_relay(hub.address, invite.relay))
        if step.path is ConnectionPath.REVERSE and address is not None:
            return await self._secured(await dial_back(address, invite.id))
        if step.path is ConnectionPath.PUNCHED and address is not None and hole is not None:
            return await punch(hole, address, self._secured, rng=self._endpoint.rng)
        return None

    async def _secured(self, sock: socket.socket) -> ssl.SSLSocket:
        context = self.identity.server_context
        return await secure(self._endpoint.pumps, sock, context, server_side=True, limit_s=GREETING_S)

    # connections

    def greet(self, tls: ssl.SSLSocket, path: ConnectionPath) -> None:
        """Take a connection on which TLS is established: it becomes a stream, or is closed."""
        if self._background.start(self._take(tls, path)) is None:
            tls.close()

    async def _take(self, tls: ssl.SSLSocket, path: ConnectionPath) -> None:
        try:
            data = await receive_record(self._endpoint.pumps, tls, limit_s=_RECORD_S)
        except DeskgridError as error:  # also of a caller that came by several ways: it closes all but one
            _log.debug("no_opening", path=path, reason=str(error)[:200])
            return
        try:
            opening = decode_opening(data)
            grant = self._opened(tls, opening, path)
            local, received = await self._local(tls, grant.service, opening.data)
        except DeskgridError as error:
            _log.info("call_refused", path=path, reason=str(error)[:200])
            if tls.fileno() >= 0:
                with contextlib.suppress(DeskgridError):
                    await self._answer(tls, refusal(error))
            tls.close()
            return
        except BaseException:
            tls.close()
            raise
        try:
            await self._answer(tls, Answer(ok=True))
        except DeskgridError:
            local.close()
        except BaseException:
            local.close()
            raise
        else:
            self._joined(tls, local, grant, path, received)

    def _opened(self, tls: ssl.SSLSocket, opening: Opening, path: ConnectionPath) -> Grant:
        """Check what the caller wants, and that it may have it."""
        grant = self._check(opening.grant)
        if who_is(tls) != (grant.source, grant.source_key):
            raise Forbidden("this grant is for another caller")
        if not self._seen.add(grant.source_key, opening.id, until=grant.expires_at, now=self._now()):
            raise Forbidden("this connection was opened before")
        if self._streams() + self._waiting >= MOST_STREAMS:
            raise Conflict("this peer has too many streams")
        self._memory.worked(grant.source_key, path, now=self._endpoint.clock.monotonic())
        helping = self._invitations.get(opening.id)
        if helping is not None and path is not ConnectionPath.RELAYED:  # otherwise the caller still learns
            helping.cancel()
        return grant

    async def _local(self, tls: ssl.SSLSocket, service: str, data: bytes) -> tuple[socket.socket, bytes]:
        """Dial the service, until the caller hangs up. Return the connection, and what is to be said there first: `data` if the
        service is there at once.

        It is said only after the caller was told yes, so that who is refused may try again.
        """
        dialling: asyncio.Future[socket.socket] = asyncio.ensure_future(self._offers[service]())
        self._waiting += 1
        try:
            await asyncio.wait({dialling}, timeout=_AT_ONCE_S)
            if not dialling.done():
                # From now on nothing is lost for the caller if this PC goes away.
                await self._answer(tls, Answer(waiting=True))
                await _unless_left(tls, dialling)
                return dialling.result(), b""
            return dialling.result(), data
        except OSError as error:
            await _undo(dialling)
            raise Unreachable(f"the service does not answer: {error.strerror}") from error
        except BaseException:
            await _undo(dialling)
            raise
        finally:
            self._waiting -= 1

    async def _answer(self, tls: ssl.SSLSocket, answer: Answer) -> None:
        await send_record(self._endpoint.pumps, tls, encode_record(answer), limit_s=_ANSWER_S)

    def _check(self, text: str) -> Grant:
        if self._grant_key is None:
            raise Unreachable("not ready yet")
        return check_grant(
            text,
            self._grant_key,
            now=self._now(),
            target=self.identity.name,
            target_key=self.identity.key_hash,
            services=self._offers,
        )

    def _now(self) -> float:
        """Return the server's time."""
        return self._endpoint.clock.monotonic() + self._offset_s


async def _unless_left(tls: ssl.SSLSocket, dialling: asyncio.Future[socket.socket]) -> None:
    """Wait for the service. Raise Unreachable if the caller hangs up before."""
    leaving = asyncio.ensure_future(wait_readable(tls))
    try:
        either: set[asyncio.Future[Any]] = {dialling, leaving}
        await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
        if not dialling.done():
            raise Unreachable("the caller did not wait for the service")
    finally:
        leaving.cancel()
        await asyncio.wait({leaving})  # it watches a file number, which is another socket's once this one is closed


async def _undo(dialling: asyncio.Future[socket.socket]) -> None:
    dialling.cancel()
    with contextlib.suppress(asyncio.CancelledError, DeskgridError, OSError):
        (await dialling).close()


def _is_hexadecimal(text: str) -> bool:
    try:
        bytes.fromhex(text)
    except ValueError:
        return False
    return True
