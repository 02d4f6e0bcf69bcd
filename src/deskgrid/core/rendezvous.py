"""The hub's decisions: who is registered, who may call whom, which two connections make a relayed stream.

No IO: `handle` takes what happened and returns what is to be done. Connections of peers, plain connections (legs) and streams
are numbered by whoever does the IO. Everything that a peer says is hostile.

Rules:

1. A peer is its key. It registers first, within handshake_s; a newer registration of the same key replaces the older.
2. A Connect needs a grant of the server for exactly this caller's name and key, and a target that is registered here under the name
   and key of the grant. Only then does the target hear of it.
3. Every Connect is answered once: Accepted, or Rejected by the target, the hub, the target's leaving, or time.
4. An id names one connection at the called peer. It is remembered as long as anything of that connection can still happen (a minute at
   most), and refused meanwhile, whoever comes with it.
5. A relay token joins two legs, once, while the target has not refused and at most RELAY_S after it accepted.
6. What a peer says of its own addresses is passed on only where it can do no harm: `observed` is the hub's own word, a hole's host
   must be the observed one, private addresses are private and go only to a peer in the same network.
7. Registrations, messages, connects, invitations and relayed streams are bounded per peer. Only messages that are whole are signs of life.
"""

from __future__ import annotations

import heapq
import ipaddress
import re
from collections import Counter
from collections.abc import Callable
from enum import StrEnum
from typing import TypeVar

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Struct

from deskgrid.core import frames
from deskgrid.core.frames import Candidates, Message
from deskgrid.core.paths import is_near, plain_host
from deskgrid.core.trust import Grant, verify_grant
from deskgrid.errors import Forbidden
from deskgrid.model.ids import Sha256
from deskgrid.model.overlay import Address
from deskgrid.settings import HubSettings

__all__ = [
    "ANSWER_S",
    "RELAY_S",
    "Close",
    "CloseLeg",
    "Closed",
    "Closing",
    "Effect",
    "Ended",
    "Event",
    "LegClosed",
    "LegOpened",
    "Opened",
    "Pair",
    "Received",
    "Refusal",
    "Refused",
    "Rendezvous",
    "Send",
    "Tick",
    "is_peer_name",
]

ANSWER_S = 30.0
"""Seconds that a called peer has for its answer."""
RELAY_S = 30.0
"""Seconds after the answer in which both ends must have come to the relay."""
VERSION = 1
MAX_PRIVATE = 16
"""Private addresses that one peer may name."""
_MAX_UNREGISTERED = 1024
_MAX_UNREGISTERED_PER_NAME = 16
_MAX_REASON = 300
_BURST_S = 10.0
_MESSAGES_PER_CONNECT = 10.0
"""Messages that a peer may send for each Connect that it may send: answers that came too late, pings."""
_LEAST_MESSAGES_PER_S = 20.0
_ID = re.compile(r"[0-9a-f]{32}")
_NUMBER = r"[1-9][0-9]{0,17}"
_PEER_NAME = re.compile(rf"attempt-{_NUMBER}\.job-{_NUMBER}\.deskgrid|user-{_NUMBER}\.deskgrid|worker-{_NUMBER}\.deskgrid")

K = TypeVar("K")
CallKey = tuple[Sha256, str]
"""Key of the called peer, id: what an answer names."""


# ---- what happens


class Opened(Struct, frozen=True):
    """A connection was made by whoever holds this certificate, which has been checked. Numbers are never used again."""

    connection: int
    name: str
    key: Sha256
    observed: Address


class Received(Struct, frozen=True):
    """A peer sent a message."""

    connection: int
    message: Message


class Refused(Struct, frozen=True):
    """A peer sent what is no message, or does not read what it is sent."""

    connection: int
    reason: str


class Closed(Struct, frozen=True):
    """A connection has ended."""

    connection: int


class LegOpened(Struct, frozen=True):
    """A plain connection came with a relay token. Numbers are never used again."""

    leg: int
    token: bytes


class LegClosed(Struct, frozen=True):
    """A leg that was not paired yet has ended."""

    leg: int


class Ended(Struct, frozen=True):
    """A relayed stream has ended. A stream has the number of its first leg."""

    stream: int


class Tick(Struct, frozen=True):
    """Time has passed."""


class Closing(Struct, frozen=True):
    """The hub is about to end."""

    reason: str


Event = Opened | Received | Refused | Closed | LegOpened | LegClosed | Ended | Tick | Closing


# ---- what is to be done


class Send(Struct, frozen=True):
    """Send a message to a peer."""

    connection: int
    message: Message


class Close(Struct, frozen=True):
    """End a connection, after what was sent on it."""

    connection: int


class Pair(Struct, frozen=True):
    """Tell both legs that they are paired, and carry bytes between them. The stream has the number of the first."""

    first: int
    second: int


class CloseLeg(Struct, frozen=True):
    """End a plain connection."""

    leg: int


class Refusal(Struct, frozen=True):
    """To be logged: something was refused."""

    name: str
    """Of the peer; empty if it is not known."""
    reason: str


Effect = Send | Close | Pair | CloseLeg | Refusal


# ---- state


class _Bucket:
    """So many a second on average, ten seconds' worth at once."""

    __slots__ = ("at", "left", "rate")

    def __init__(self, rate: float, now: float) -> None:
        self.rate, self.left, self.at = rate, max(rate * _BURST_S, 1.0), now

    def take(self, now: float) -> bool:
        most = max(self.rate * _BURST_S, 1.0)
        self.left, self.at = min(most, self.left + (now - self.at) * self.rate), now
        if self.left < 1.0:
            return False
        self.left -= 1.0
        return True


class _Peer:
    """One connection of a peer."""

    __slots__ = ("calls", "connection", "connects", "due", "entry", "invites", "key", "messages", "name", "observed", "registered")

    def __init__(self, event: Opened, due: float, settings: HubSettings, now: float) -> None:
        self.connection, self.name, self.key = event.connection, event.name, event.key
        self.observed = Address(plain_host(event.observed.host), event.observed.port)
        self.due, self.entry = due, 0
        self.registered = False
        self.connects = _Bucket(settings.max_connects_per_s, now)
        rate = max(settings.max_connects_per_s * _MESSAGES_PER_CONNECT, _LEAST_MESSAGES_PER_S)
        self.messages = _Bucket(rate, now)
        self.calls: set[CallKey] | None = None
        self.invites: set[CallKey] | None = None
        """Without an answer yet. Most peers are idle, so these are made when needed."""


class _State(StrEnum):
    INVITED = "invited"
    ACCEPTED = "accepted"
    OVER = "over"
    """Only the id is remembered."""


class _Call:
    """One connection that a peer asked for."""

    __slots__ = ("caller", "due", "ends", "entry", "key", "legs", "state", "target", "token")

    def __init__(self, key: CallKey, caller: _Peer, target: _Peer, token: bytes, due: float) -> None:
        self.key, self.caller, self.target, self.token, self.due = key, caller.connection, target.connection, token, due
        self.ends = frozenset({caller.key, target.key})
        self.state, self.entry = _State.INVITED, 0
        self.legs: list[int] = []
        """At most one: it waits for the other."""


class Rendezvous:
    """One hub's peers, calls and relay tokens.

    `token` returns TOKEN_BYTES random bytes. `now` of `handle` is in monotonic seconds; `server_offset_s` added to it gives the server's
    time, in which grants expire. `grant_key` and `server_offset_s` may be replaced.
    """

    def __init__(
        self,
        settings: HubSettings,
        grant_key: Ed25519PublicKey,
        *,
        token: Callable[[], bytes],
        server_offset_s: float = 0.0,
    ) -> None:
        self.grant_key = grant_key
        self.server_offset_s = server_offset_s
        self._settings = settings
        self._token = token
        self._peers: dict[int, _Peer] = {}
        self._registered: dict[Sha256, _Peer] = {}
        self._registered_names: Counter[str] = Counter()
        self._unregistered_names: Counter[str] = Counter()
        self._calls: dict[CallKey, _Call] = {}
        self._tokens: dict[bytes, _Call] = {}
        self._legs: dict[int, _Call] = {}
        """Those that wait for the other."""
        self._streams: dict[int, frozenset[Sha256]] = {}
        self._streams_of: Counter[Sha256] = Counter()
        """Relayed streams, and legs that wait, by peer."""
        self._due: list[tuple[float, int, int | CallKey]] = []
        """A heap: when, number of the entry, what. What is due later by now, or is gone, is noticed when its turn comes."""
        self._pushed = 0
        self._effects: list[Effect] = []

    @property
    def peers(self) -> int:
        """How many peers are registered."""
        return len(self._registered)

    @property
    def streams(self) -> int:
        """How many relayed streams are being carried."""
        return len(self._streams)

    @property
    def deadline(self) -> float | None:
        """When something may be due, in the time of `handle`; None if nothing is."""
        return self._due[0][0] if self._due else None

    def handle(self, event: Event, *, now: float) -> list[Effect]:
        """Take what happened and return what is to be done, in order. Never raises for what a peer did. `now` never goes back."""
        effects: list[Effect] = []
        self._effects = effects
        self._expire(now)
        match event:
            case Opened():
                self._open(event, now)
            case Received():
                self._receive(event, now)
            case Refused():
                self._dismiss(self._peers.get(event.connection), event.reason)
            case Closed():
                self._forget(self._peers.get(event.connection))
            case LegOpened():
                self._open_leg(event)
            case LegClosed():
                self._drop_leg(event.leg)
            case Ended():
                self._end_stream(event.stream)
            case Closing():
                for peer in list(self._peers.values()):
                    self._say_goodbye(peer, event.reason)
            case Tick():
                pass
        return effects

    # ---- time

    def _schedule(self, found: _Peer | _Call) -> None:
        """Have a look at it when it is due; an earlier entry in the heap counts no more."""
        self._pushed += 1
        found.entry = self._pushed
        what = found.connection if isinstance(found, _Peer) else found.key
        heapq.heappush(self._due, (found.due, found.entry, what))

    def _expire(self, now: float) -> None:
        while self._due and self._due[0][0] <= now:
            _, entry, what = heapq.heappop(self._due)
            found: _Peer | _Call | None = self._peers.get(what) if isinstance(what, int) else self._calls.get(what)
            if found is None or found.entry != entry:
                continue
            if found.due > now:
                self._schedule(found)
            elif isinstance(found, _Peer):
                self._dismiss(found, "silent for too long" if found.registered else "did not register")
            else:
                self._expire_call(found)

    def _expire_call(self, call: _Call) -> None:
        if call.state is _State.INVITED:
            self._reject(call, "the called peer did not answer")
        self._finish(call)
        del self._calls[call.key]

    # ---- connections

    def _open(self, event: Opened, now: float) -> None:
        unregistered = len(self._peers) - len(self._registered)
        reason = ""
        if not is_peer_name(event.name):
            reason = "only peers may register"
        elif unregistered >= _MAX_UNREGISTERED or self._unregistered_names[event.name] >= _MAX_UNREGISTERED_PER_NAME:
            reason = "too many connections that have not registered"
        if reason:
            self._do(Refusal(event.name, reason), Send(event.connection, frames.Goodbye(reason)), Close(event.connection))
            return
        peer = _Peer(event, now + self._settings.handshake_s, self._settings, now)
        self._peers[event.connection] = peer
        self._unregistered_names[event.name] += 1
        self._schedule(peer)

    def _receive(self, event: Received, now: float) -> None:
        peer = self._peers.get(event.connection)
        if peer is None:
            return
        message = event.message
        if not peer.registered:
            self._first(peer, message, now)
            return
        peer.due = now + 3 * self._settings.ping_s
        match message:
            case frames.Connect():
                self._connect(peer, message, now)
            case frames.Accept() | frames.Reject():
                self._answer(peer, message, now)
            case frames.Ping():
                if self._may_speak(peer, now):
                    self._do(Send(peer.connection, frames.Pong(message.number)))
            case _:
                self._dismiss(peer, "a message that peers do not send")

    def _first(self, peer: _Peer, message: Message, now: float) -> None:
        if not isinstance(message, frames.Register):
            self._dismiss(peer, "a message before Register")
        elif message.version != VERSION:
            self._dismiss(peer, f"this hub speaks version {VERSION}")
        else:
            self._register(peer, now)

    def _register(self, peer: _Peer, now: float) -> None:
        older = self._registered.get(peer.key)
        if older is not None:
            self._say_goodbye(older, "another connection with this key took its place")
        if len(self._registered) >= self._settings.max_peers:
            self._dismiss(peer, "this hub is full")
        elif self._registered_names[peer.name] >= self._settings.max_peers_per_name:
            self._dismiss(peer, "too many registrations with this name")
        else:
            _subtract(self._unregistered_names, peer.name)
            self._registered_names[peer.name] += 1
            self._registered[peer.key] = peer
            peer.registered = True
            peer.due = now + 3 * self._settings.ping_s
            self._schedule(peer)
            registered = frames.Registered(observed=peer.observed, ping_s=self._settings.ping_s)
            self._do(Send(peer.connection, registered))

    def _may_speak(self, peer: _Peer, now: float) -> bool:
        """Count a message that nothing else bounds; a peer that sends too many is dismissed."""
        if peer.messages.take(now):
            return True
        self._dismiss(peer, "too many messages")
        return False

    def _dismiss(self, peer: _Peer | None, reason: str) -> None:
        if peer is not None:
            self._do(Refusal(peer.name, reason))
            self._say_goodbye(peer, reason)

    def _say_goodbye(self, peer: _Peer, reason: str) -> None:
        self._do(Send(peer.connection, frames.Goodbye(reason)), Close(peer.connection))
        self._forget(peer)

    def _forget(self, peer: _Peer | None) -> None:
        if peer is None:
            return
        del self._peers[peer.connection]
        if not peer.registered:
            _subtract(self._unregistered_names, peer.name)
            return
        del self._registered[peer.key]
        _subtract(self._registered_names, peer.name)
        for key in list(peer.invites or ()):
            self._reject(self._calls[key], "the called peer left", absent=True)
        for key in list(peer.calls or ()):
            self._finish(self._calls[key])

    # ---- calls

    def _connect(self, caller: _Peer, message: frames.Connect, now: float) -> None:
        if not _ID.fullmatch(message.id):
            self._dismiss(caller, "a Connect whose id is not 32 hexadecimal digits")
            return
        if not caller.connects.take(now):
            if self._may_speak(caller, now):
                self._refuse(caller, message, "too many connects; wait a little")
            return
        try:
            grant = self._checked(caller, message, now)
        except Forbidden as error:
            self._refuse(caller, message, error.message)
            return
        target = self._registered.get(grant.target_key)
        if target is None or target.name != grant.target:
            self._do(Send(caller.connection, frames.Rejected(id=message.id, reason="it is not registered here", absent=True)))
        elif (target.key, message.id) in self._calls:
            self._refuse(caller, message, "this id was used before")
        elif len(target.invites or ()) >= self._settings.max_streams_per_peer:
            self._refuse(caller, message, "the called peer has too many calls to answer")
        else:
            self._invite(caller, target, message, now)

    def _checked(self, caller: _Peer, message: frames.Connect, now: float) -> Grant:
        """Return the grant. Raise Forbidden if it does not hold for this caller."""
        grant = verify_grant(message.grant, self.grant_key, now=now + self.server_offset_s)
        if grant.source_key != caller.key or grant.source != caller.name:
            raise Forbidden("this grant is somebody else's")
        return grant

    def _refuse(self, caller: _Peer, message: frames.Connect, reason: str) -> None:
        self._do(Refusal(caller.name, reason), Send(caller.connection, frames.Rejected(id=message.id, reason=reason)))

    def _invite(self, caller: _Peer, target: _Peer, message: frames.Connect, now: float) -> None:
        key = (target.key, message.id)
        call = _Call(key, caller, target, self._token(), now + ANSWER_S)
        self._calls[key] = self._tokens[call.token] = call
        caller.calls = _with(caller.calls, key)
        target.invites = _with(target.invites, key)
        self._schedule(call)
        candidates = _passed_on(message.candidates, caller, target)
        invite = frames.Invite(id=message.id, grant=message.grant, candidates=candidates, relay=call.token.hex())
        self._do(Send(target.connection, invite))

    def _answer(self, target: _Peer, message: frames.Accept | frames.Reject, now: float) -> None:
        call = self._calls.get((target.key, message.id))
        if call is None or call.state is not _State.INVITED or call.target != target.connection:
            self._may_speak(target, now)  # it may have come too late
        elif isinstance(message, frames.Reject):
            self._reject(call, _plain_text(message.reason) or "the called peer refused")
        else:
            self._settle(call)
            call.state, call.due = _State.ACCEPTED, now + RELAY_S
            candidates = _passed_on(message.candidates, target, self._peers[call.caller])
            accepted = frames.Accepted(id=message.id, candidates=candidates, relay=call.token.hex())
            self._do(Send(call.caller, accepted))

    def _reject(self, call: _Call, reason: str, *, absent: bool = False) -> None:
        if call.caller in self._peers:  # a peer may have called itself, and left
            self._do(Send(call.caller, frames.Rejected(id=call.key[1], reason=reason, absent=absent)))
        self._finish(call)

    def _settle(self, call: _Call) -> None:
        """Note that nobody waits for an answer any more."""
        for peer in (self._peers.get(call.caller), self._peers.get(call.target)):
            if peer is not None:
                (peer.calls or set()).discard(call.key)
                (peer.invites or set()).discard(call.key)

    def _finish(self, call: _Call) -> None:
        """End a call but for its id. Idempotent."""
        self._settle(call)
        call.state = _State.OVER
        self._tokens.pop(call.token, None)
        for leg in list(call.legs):
            self._do(CloseLeg(leg))
            self._drop_leg(leg)

    # ---- relay

    def _open_leg(self, event: LegOpened) -> None:
        call = self._tokens.get(event.token)
        if call is None:
            self._refuse_leg(event.leg, "a relay token that is unknown, used or expired")
        elif not call.legs:
            self._wait(call, event.leg)
        elif call.state is _State.INVITED:
            # The caller cannot know the token before it is told that the target accepted.
            self._refuse_leg(event.leg, "the same end came to the relay twice")
        else:
            self._pair(call, event.leg)

    def _refuse_leg(self, leg: int, reason: str) -> None:
        self._do(Refusal("", reason), CloseLeg(leg))

    def _wait(self, call: _Call, leg: int) -> None:
        if any(self._streams_of[key] >= self._settings.max_streams_per_peer for key in call.ends):
            self._refuse_leg(leg, "too many relayed streams of one peer")
            return
        call.legs.append(leg)
        self._legs[leg] = call
        self._streams_of.update(call.ends)

    def _pair(self, call: _Call, leg: int) -> None:
        first = call.legs.pop()
        del self._legs[first]  # its place among the peers' streams is now the stream's
        self._streams[first] = call.ends
        self._finish(call)
        self._do(Pair(first, leg))

    def _drop_leg(self, leg: int) -> None:
        call = self._legs.pop(leg, None)
        if call is not None:
            call.legs.remove(leg)
            self._release(call.ends)

    def _end_stream(self, stream: int) -> None:
        self._release(self._streams.pop(stream, frozenset()))

    def _release(self, ends: frozenset[Sha256]) -> None:
        for key in ends:
            _subtract(self._streams_of, key)

    def _do(self, *effects: Effect) -> None:
        self._effects.extend(effects)


# ---- what is passed on of what a peer said of itself


def _passed_on(said: Candidates, owner: _Peer, other: _Peer) -> Candidates:
    """Return the candidates of `owner` as `other` may have them."""
    if said.relay_only:
        return Candidates(relay_only=True)
    observed = owner.observed.host
    near = is_near(observed, other.observed.host)
    return Candidates(
        observed=observed,
        port=said.port if _is_port(said.port) else 0,
        private=_private_addresses(said.private) if near else (),
        punch=_hole(said.punch, observed),
    )


def _hole(said: Address | None, observed: str) -> Address | None:
    if said is None or not _is_port(said.port) or plain_host(said.host) != observed:
        return None
    return Address(observed, said.port)


def _private_addresses(said: tuple[str, ...]) -> tuple[str, ...]:
    hosts = (plain_host(text) for text in said[:MAX_PRIVATE])
    return tuple(dict.fromkeys(host for host in hosts if host and _is_private(host)))


def _is_private(host: str) -> bool:
    """Tell whether an address is of a private network: not public, and none of those that nobody may dial."""
    address = ipaddress.ip_address(host)
    never = address.is_loopback or address.is_link_local or address.is_multicast or address.is_unspecified or address.is_reserved
    return not never and (address.is_private or address in _SHARED)


_SHARED = ipaddress.ip_network("100.64.0.0/10")
"""Between a provider's NAT and its customers (RFC 6598)."""


def _is_port(port: int) -> bool:
    return 1 <= port <= 65535


def is_peer_name(name: str) -> bool:
    """Tell whether a certificate's name is that of a job's attempt, a user's program or a worker: not of a hub or the server."""
    return _PEER_NAME.fullmatch(name) is not None


def _plain_text(text: str) -> str:
    """Return a peer's words as other peers may get them: short, one line."""
    return "".join(c if c.isprintable() else " " for c in text[:_MAX_REASON]).strip()


def _with(keys: set[CallKey] | None, key: CallKey) -> set[CallKey]:
    keys = set() if keys is None else keys
    keys.add(key)
    return keys


def _subtract(counter: Counter[K], key: K) -> None:
    counter[key] -= 1
    if counter[key] <= 0:
        del counter[key]
