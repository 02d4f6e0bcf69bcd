"""The calling side: from a grant to a TLS connection with the peer that it names."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import socket
import ssl
from collections.abc import Iterator

import structlog

from deskgrid.core import frames
from deskgrid.core.frames import Candidates
from deskgrid.core.opening import plain_text
from deskgrid.core.paths import Remembered, Step, plan
from deskgrid.core.trust import Grant
from deskgrid.errors import DeskgridError, ProtocolError, Unreachable
from deskgrid.model.overlay import Address, ConnectionPath
from deskgrid.overlay.dial import ID_BYTES, dial, dial_relay, enter_relay
from deskgrid.overlay.endpoint import GREETING_S, Endpoint
from deskgrid.overlay.granting import Granted
from deskgrid.overlay.holes import PUNCH_S, Hole, punch
from deskgrid.overlay.hubs import Hubs
from deskgrid.overlay.identity import Identity, who_is
from deskgrid.overlay.race import Race, Secure, Way
from deskgrid.overlay.registration import HubConnection
from deskgrid.overlay.stream_start import secure

__all__ = ["Caller"]

_log = structlog.get_logger()
_ANSWER_S = 10.0
_RACE_S = 10.0
_AT_ONCE_LEAST_S = 0.25
_MOST_RACES = 64
"""At the same time: half of what an endpoint has room for, so that one peer, whose calls may all hang, does not take all."""


class Caller:
    """Makes the connections of one peer to others."""

    def __init__(self, endpoint: Endpoint, identity: Identity, hubs: Hubs) -> None:
        self._endpoint, self._identity, self._hubs = endpoint, identity, hubs
        self._racing = asyncio.Semaphore(_MOST_RACES)

    async def reach(self, granted: Granted) -> tuple[Way, str]:
        """Return a way to the peer of a grant, and the id of the connection. Raise Unreachable."""
        async with self._racing, self._endpoint.racing:
            return await self._reach(granted)

    async def _reach(self, granted: Granted) -> tuple[Way, str]:
        last = self._endpoint.memory.best(granted.grant.target_key, now=self._endpoint.clock.monotonic())
        if last is not None and last.path is ConnectionPath.DIRECT and ConnectionPath.DIRECT in self._endpoint.allowed:
            with contextlib.suppress(DeskgridError):
                return await self._at_once(granted.grant, last), secrets.token_hex(ID_BYTES)
            self._endpoint.memory.failed(granted.grant.target_key)
            last = None
        return await self._through_hub(granted, last)

    async def _at_once(self, grant: Grant, last: Remembered) -> Way:
        """Dial what answered a moment ago."""
        address = last.address
        if address is None:
            raise Unreachable("no address is remembered")
        race = self._race(grant, last.rtt_s)
        race.enter(Step(ConnectionPath.DIRECT, address=address), lambda: dial(address))
        with _returned(race):
            try:
                way = await race.result(_AT_ONCE_LEAST_S + 4.0 * last.rtt_s, may_come=False)
            finally:
                await race.close()
        self._remember(grant, way)
        return way

    async def _through_hub(self, granted: Granted, last: Remembered | None) -> tuple[Way, str]:
        endpoint, connection_id = self._endpoint, secrets.token_hex(ID_BYTES)
        hub = await self._hubs.to(granted.hub)
        hole = await self._hole(hub, last)
        race = self._race(granted.grant, hub.rtt_s)
        with _returned(race):
            async with contextlib.AsyncExitStack() as held:
                if hole is not None:
                    held.callback(hole.close)
                held.enter_context(
                    endpoint.called_back(connection_id, lambda sock: race.enter_connected(ConnectionPath.REVERSE, sock))
                )
                held.push_async_callback(race.close)
                relay = held.enter_context(_Predialled(hub, wanted=self._wants_relay(last)))
                own = endpoint.own_candidates(hub, hole, accepts=ConnectionPath.REVERSE)
                answer = await self._ask(hub, granted, connection_id, own)
                steps = self._steps(own, answer.candidates, hub, last)
                for step in steps:
                    self._enter(race, step, relay, hole, own, answer)
                may_come = any(step.path is ConnectionPath.REVERSE for step in steps)
                way = await race.result(_RACE_S, may_come=may_come)
                self._remember(granted.grant, way)
                if way.path is ConnectionPath.RELAYED and endpoint.has_room:
                    endpoint.background.start(_learn(race, held.pop_all()))
        return way, connection_id

    async def _hole(self, hub: HubConnection, last: Remembered | None) -> Hole | None:
        """Return a hole if there is one at once; waits for one only where that is known to pay."""
        if ConnectionPath.PUNCHED not in self._endpoint.allowed:
            return None
        self._endpoint.holes.want(hub.address)
        needed = ConnectionPath.RELAYED not in self._endpoint.allowed
        worked = last is not None and last.path is ConnectionPath.PUNCHED
        return await self._endpoint.holes.take(hub.address, wait=needed or worked)

    async def _ask(self, hub: HubConnection, granted: Granted, connection_id: str, own: Candidates) -> frames.Accepted:
        answer = await hub.ask(frames.Connect(id=connection_id, grant=granted.text, candidates=own), _ANSWER_S)
        if isinstance(answer, frames.Accepted):
            return answer
        raise Unreachable(plain_text(answer.reason) or "the other peer refused")

    def _steps(self, own: Candidates, other: Candidates, hub: HubConnection, last: Remembered | None) -> tuple[Step, ...]:
        endpoint = self._endpoint
        return plan(
            own,
            other,
            calling=True,
            allowed=endpoint.allowed,
            private=endpoint.settings.private,
            hub_rtt_s=hub.rtt_s,
            last=last,
            punch=endpoint.memory.may_punch(own.observed, other.observed, now=endpoint.clock.monotonic()),
            may_dial=endpoint.may_dial,
        )

    def _wants_relay(self, last: Remembered | None) -> bool:
        """Tell whether the relay may well be needed."""
        return ConnectionPath.RELAYED in self._endpoint.allowed and (last is None or last.path is ConnectionPath.RELAYED)

    def _enter(
        self, race: Race, step: Step, relay: _Predialled, hole: Hole | None, own: Candidates, answer: frames.Accepted
    ) -> None:
        address = step.address
        if step.path is ConnectionPath.DIRECT and address is not None:
            race.enter(step, lambda: dial(address))
        elif step.path is ConnectionPath.PUNCHED and address is not None and hole is not None:
            race.enter_open(step, lambda secured: self._punch(hole, address, secured, own, answer.candidates))
        elif step.path is ConnectionPath.RELAYED:
            race.enter(step, lambda: relay.enter(answer.relay))

    async def _punch(self, hole: Hole, address: Address, secured: Secure, own: Candidates, other: Candidates) -> ssl.SSLSocket:
        try:
            return await punch(hole, address, secured, rng=self._endpoint.rng)
        except Unreachable:
            self._endpoint.memory.not_punched(own.observed, other.observed, now=self._endpoint.clock.monotonic())
            raise

    def _race(self, grant: Grant, hub_rtt_s: float) -> Race:
        async def secured(sock: socket.socket) -> ssl.SSLSocket:
            tls = await secure(
                self._endpoint.pumps, sock, self._identity.client_context, server_hostname=grant.target, limit_s=GREETING_S
            )
            try:
                if who_is(tls)[1] != grant.target_key:
                    raise ProtocolError("another program of that name answers")
            except DeskgridError:
                tls.close()
                raise
            return tls

        def late(way: Way) -> None:
            now = self._endpoint.clock.monotonic()
            self._endpoint.memory.worked_too(grant.target_key, way.path, now=now, address=way.address, rtt_s=way.rtt_s)

        return Race(secured, clock=self._endpoint.clock, hub_rtt_s=hub_rtt_s, late=late)

    def _remember(self, grant: Grant, way: Way) -> None:
        now = self._endpoint.clock.monotonic()
        self._endpoint.memory.worked(grant.target_key, way.path, now=now, address=way.address, rtt_s=way.rtt_s)


class _Predialled:
    """A connection with a hub's relay, made while the hub is asked for the other peer, which saves a round trip."""

    def __init__(self, hub: HubConnection, *, wanted: bool) -> None:
        self._address = hub.address
        self._dialling = asyncio.create_task(dial(hub.address)) if wanted else None

    def __enter__(self) -> _Predialled:
        return self

    def __exit__(self, *_error: object) -> None:
        if self._dialling is not None:
            self._dialling.add_done_callback(_close_result)
            self._dialling.cancel()

    async def enter(self, token: str) -> socket.socket:
        """Return it as one end of a relayed stream; a new one if there is none, or the hub has closed it. Raise Unreachable."""
        dialling, self._dialling = self._dialling, None
        if dialling is None:
            return await dial_relay(self._address, token)
        try:
            sock = await dialling
        except asyncio.CancelledError:
            dialling.add_done_callback(_close_result)
            raise
        if _has_ended(sock):  # the hub does not wait for ever
            sock.close()
            return await dial_relay(self._address, token)
        return await enter_relay(sock, token)


@contextlib.contextmanager
def _returned(race: Race) -> Iterator[None]:
    """Close the winner if the block fails after all: if it is cancelled while the others are being ended."""
    try:
        yield
    except BaseException:
        race.drop_winner()
        raise


def _has_ended(sock: socket.socket) -> bool:
    """Tell whether the other end, which was to say nothing, has closed a connection."""
    try:
        return not sock.recv(1, socket.MSG_PEEK)
    except (BlockingIOError, InterruptedError):
        return False
    except OSError:
        return True


def _close_result(dialling: asyncio.Task[socket.socket]) -> None:
    if not dialling.cancelled() and dialling.exception() is None:
        dialling.result().close()


async def _learn(race: Race, held: contextlib.AsyncExitStack) -> None:
    """Let the ways that lost against the relay go on, so that the next stream takes a better one."""
    async with held:
        await race.linger(PUNCH_S + 0.5)
        _log.debug("learned", failed=race.reasons())
