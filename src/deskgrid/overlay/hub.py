"""A hub: one port where peers register (TLS), learn what their NAT makes of them (PROBE) and have streams relayed (RELAY).

The decisions are core/rendezvous.py's; here are the sockets. Rules:

1. Whoever connects is a newcomer until it has said what it is: handshake_s at most. Newcomers are bounded in all and per address; when
   there are too many, the oldest goes.
2. Registrations live on the event loop without a task or a timer of their own; relayed streams live on pump threads.
3. One timer serves all: time limits are exact to a quarter of a second.
4. What is refused is logged, at a bounded rate.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import itertools
import os
import secrets
import socket
import ssl
import tempfile
from collections import Counter
from pathlib import Path

import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from deskgrid.clock import Clock
from deskgrid.core import frames
from deskgrid.core.frames import Message
from deskgrid.core.paths import plain_host
from deskgrid.core.rendezvous import (
    Close,
    Closed,
    CloseLeg,
    Closing,
    Effect,
    Ended,
    Event,
    LegClosed,
    LegOpened,
    Opened,
    Pair,
    Received,
    Refusal,
    Refused,
    Rendezvous,
    Send,
    Tick,
)
from deskgrid.errors import NoSpace, ProtocolError
from deskgrid.model.ids import Sha256
from deskgrid.model.overlay import Address
from deskgrid.overlay.background import Background
from deskgrid.overlay.control import ControlConnection
from deskgrid.overlay.files import raise_file_limit
from deskgrid.overlay.pump import Pumps
from deskgrid.overlay.relay import Relay
from deskgrid.settings import HubSettings

__all__ = ["BACKLOG", "HubServer"]

BACKLOG = 4096
PROBE_S = 300.0
"""Seconds for which a probe's connection, and with it the hole in a NAT, is kept open."""
_TICK_S = 0.25
_MOST_NEWCOMERS = 2048
_MOST_NEWCOMERS_PER_ADDRESS = 512
_MOST_PROBES = 4096
_MOST_PROBES_PER_ADDRESS = 256
_LEAST_S = 2.0
"""Seconds that a newcomer has in any case."""
_MOST_ACCEPTED = 64
"""Connections that are taken before others have their turn."""
_GOODBYE_S = 5.0
"""Seconds that a connection may take to end."""
_CLOSE_S = 1.0
_MOST_LOGGED_PER_S = 20
_SEND_BUFFER_BYTES = 64 << 10
_log = structlog.get_logger("deskgrid.hub")


class _Plain:
    """A connection that is no registration (yet)."""

    __slots__ = ("address", "control", "group", "number", "since", "sock", "words")

    def __init__(self, number: int, sock: socket.socket, address: Address, since: float) -> None:
        self.number, self.sock, self.address, self.since = number, sock, address, since
        self.group = _group(address.host)
        self.words = b""
        self.control: ControlConnection | None = None
        """From when it spoke TLS: then the socket is the event loop's."""


class _Crowd:
    """Plain connections of one kind, oldest first, counted by address."""

    def __init__(self, most: int, most_per_address: int) -> None:
        self._most, self._most_per_address = most, most_per_address
        self._members: dict[int, _Plain] = {}
        self._by_group: Counter[str] = Counter()

    def __len__(self) -> int:
        return len(self._members)

    @property
    def is_full(self) -> bool:
        return len(self._members) >= self._most

    @property
    def oldest(self) -> _Plain | None:
        return next(iter(self._members.values()), None)

    def may_join(self, group: str) -> bool:
        return self._by_group[group] < self._most_per_address

    def add(self, plain: _Plain) -> None:
        self._members[plain.number] = plain
        self._by_group[plain.group] += 1

    def remove(self, number: int) -> _Plain | None:
        plain = self._members.pop(number, None)
        if plain is not None:
            self._by_group[plain.group] -= 1
            if not self._by_group[plain.group]:
                del self._by_group[plain.group]
        return plain


class HubServer:
    """One hub. `start` it once, `close` it in the end; everything in one event loop, which must be able to watch sockets.

    The server's time is the clock's `now` plus `now_offset_s`.
    """

    def __init__(
        self,
        settings: HubSettings,
        *,
        clock: Clock,
        grant_key_pem: str,
        authority_pem: str,
        certificate_pem: str,
        key_pem: str,
        now_offset_s: float = 0.0,
    ) -> None:
        """Raise ProtocolError if keys or certificates are damaged or do not fit."""
        self._settings = settings
        self._clock = clock
        self._authority_pem = authority_pem
        self._now_offset_s = now_offset_s
        self._context = _make_context(authority_pem, certificate_pem, key_pem)
        self._rendezvous = Rendezvous(settings, _grant_key(grant_key_pem), token=lambda: secrets.token_bytes(frames.TOKEN_BYTES))
        self._pumps = Pumps(settings.pumps, name="hub")
        self._tasks = Background(1 << 30)
        self._listener: socket.socket | None = None
        self._accepting = False
        self._numbers = itertools.count(1)
        self._newcomers = _Crowd(_MOST_NEWCOMERS, _MOST_NEWCOMERS_PER_ADDRESS)
        self._probes = _Crowd(_MOST_PROBES, _MOST_PROBES_PER_ADDRESS)
        self._controls: dict[int, ControlConnection] = {}
        self._ending: dict[int, float] = {}
        """Controls that were told to close, and when they must have."""
        self._legs: dict[int, _Plain] = {}
        self._relays: dict[int, Relay] = {}
        self._all_lost = asyncio.Event()
        self._logged = self._unlogged = 0
        self._logging_since = 0.0

    @property
    def peers(self) -> int:
        """How many peers are registered."""
        return self._rendezvous.peers

    @property
    def streams(self) -> int:
        """How many streams are being relayed."""
        return self._rendezvous.streams

    async def start(self, listener: socket.socket) -> None:
        """Serve on a bound socket, which becomes the hub's. Raises this process's limit of open files as far as it may."""
        raise_file_limit()
        self._listener = listener
        listener.setblocking(False)
        listener.listen(BACKLOG)
        self._accept_more()
        self._tasks.start(self._keep_time())

    def replace_certificate(self, certificate_pem: str, key_pem: str) -> None:
        """Show another certificate from now on. Raise ProtocolError if it does not fit the key, NoSpace if it cannot be loaded just now."""
        self._context = _make_context(self._authority_pem, certificate_pem, key_pem)

    def follow_server(self, *, grant_key_pem: str, now: float) -> None:
        """Check grants by the server's key and time, as it told them just now. Raise ProtocolError if that is no key."""
        self._rendezvous.grant_key = _grant_key(grant_key_pem)
        self._now_offset_s = now - self._clock.now()

    async def close(self) -> None:
        """Say goodbye to all and end everything. Idempotent."""
        self._stop_accepting()
        if self._listener is not None:
            self._listener.close()
            self._listener = None
        self._handle(Closing("the hub is closing"))
        for crowd in (self._newcomers, self._probes):
            while (plain := crowd.oldest) is not None:
                self._drop(crowd, plain)
        for leg in list(self._legs.values()):
            self._close_leg(leg)
        await self._wait_for_goodbyes()
        for relay in list(self._relays.values()):
            relay.abort()
        await self._tasks.close()
        await asyncio.to_thread(self._pumps.close)

    async def _wait_for_goodbyes(self) -> None:
        self._all_lost.clear()
        if not self._controls:
            return
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._all_lost.wait(), _CLOSE_S)
        for control in list(self._controls.values()):
            control.abort()
        if self._controls:
            await self._all_lost.wait()

    # ---- newcomers

    def _accept_more(self) -> None:
        if self._listener is not None and not self._accepting:
            asyncio.get_running_loop().add_reader(self._listener, self._accept)
            self._accepting = True

    def _stop_accepting(self) -> None:
        if self._listener is not None and self._accepting:
            asyncio.get_running_loop().remove_reader(self._listener)
        self._accepting = False

    def _accept(self) -> None:
        for _ in range(_MOST_ACCEPTED):
            if self._listener is None or self._must_wait():
                return
            try:
                sock, found = self._listener.accept()
            except BlockingIOError:
                return
            except ConnectionError:
                continue
            except OSError as error:  # no file numbers or memory left
                self._refuse("", f"cannot accept: {error.strerror}")
                self._drop_oldest()
                self._stop_accepting()  # until the next tick
                return
            if self._newcomers.is_full:
                self._drop_oldest()
            self._greet(sock, Address(plain_host(str(found[0]).partition("%")[0]), found[1]))

    def _must_wait(self) -> bool:
        """Tell whether all places are taken by those who are too new to go; then others stay in the system's queue until the next tick."""
        oldest = self._newcomers.oldest
        if not self._newcomers.is_full or oldest is None or self._clock.monotonic() - oldest.since >= _LEAST_S:
            return False
        self._stop_accepting()
        return True

    def _drop_oldest(self) -> None:
        oldest = self._newcomers.oldest
        if oldest is not None:
            self._refuse("", "too many that have not said what they are")
            self._drop(self._newcomers, oldest)

    def _greet(self, sock: socket.socket, address: Address) -> None:
        if not self._newcomers.may_join(_group(address.host)):
            sock.close()
            self._refuse("", "too many of one address that have not said what they are")
            return
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        newcomer = _Plain(next(self._numbers), sock, address, self._clock.monotonic())
        self._newcomers.add(newcomer)
        asyncio.get_running_loop().add_reader(sock, self._hear, newcomer)

    def _hear(self, newcomer: _Plain) -> None:
        """Read what a newcomer says it is, but nothing that comes after; of TLS, nothing at all."""
        try:
            if not newcomer.words and newcomer.sock.recv(1, socket.MSG_PEEK)[:1] == bytes([frames.TLS_FIRST_BYTE]):
                self._start_tls(newcomer)
                return
            said = newcomer.sock.recv(_missing(newcomer.words))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            said = b""
        newcomer.words += said
        if not said:
            self._drop(self._newcomers, newcomer)
        elif not _may_be_word(newcomer.words):
            self._refuse("", "neither TLS nor a word of ours")
            self._drop(self._newcomers, newcomer)
        elif not _missing(newcomer.words):
            self._take(newcomer)

    def _take(self, newcomer: _Plain) -> None:
        self._forget(self._newcomers, newcomer)
        if newcomer.words == frames.PROBE:
            self._start_probe(newcomer)
        else:
            self._start_leg(newcomer)

    def _forget(self, crowd: _Crowd, plain: _Plain) -> None:
        crowd.remove(plain.number)
        if plain.control is None:
            asyncio.get_running_loop().remove_reader(plain.sock)

    def _drop(self, crowd: _Crowd, plain: _Plain) -> None:
        self._forget(crowd, plain)
        if plain.control is not None:
            plain.control.abort()
        else:
            plain.sock.close()

    # ---- registrations

    def _start_tls(self, newcomer: _Plain) -> None:
        asyncio.get_running_loop().remove_reader(newcomer.sock)
        with contextlib.suppress(OSError):
            newcomer.sock.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _SEND_BUFFER_BYTES)
        control = ControlConnection(newcomer.number, self._context, self)
        newcomer.control = self._controls[newcomer.number] = control
        self._tasks.start(self._hand_over(newcomer.sock, control))

    async def _hand_over(self, sock: socket.socket, control: ControlConnection) -> None:
        try:
            await asyncio.get_running_loop().connect_accepted_socket(lambda: control, sock)
        except OSError:
            sock.close()
            self.control_lost(control.number)

    def control_shaken(self, number: int, name: str, key: Sha256) -> None:
        newcomer = self._newcomers.remove(number)
        if newcomer is not None:
            self._handle(Opened(number, name, key, newcomer.address))

    def control_received(self, number: int, message: Message) -> None:
        self._handle(Received(number, message))

    def control_broke(self, number: int, reason: str) -> None:
        newcomer = self._newcomers.remove(number)
        if newcomer is None:
            self._handle(Refused(number, reason))
        else:
            self._refuse("", reason)
            self._end_control(number)

    def control_lost(self, number: int) -> None:
        self._newcomers.remove(number)
        self._controls.pop(number, None)
        self._ending.pop(number, None)
        self._handle(Closed(number))
        if not self._controls:
            self._all_lost.set()

    def _end_control(self, number: int) -> None:
        control = self._controls.get(number)
        if control is not None:
            self._ending[number] = self._clock.monotonic() + _GOODBYE_S
            control.end()

    # ---- probes

    def _start_probe(self, probe: _Plain) -> None:
        oldest = self._probes.oldest
        if self._probes.is_full and oldest is not None:
            self._drop(self._probes, oldest)
        if not self._probes.may_join(probe.group):
            self._refuse("", "too many probes of one address")
            probe.sock.close()
            return
        with contextlib.suppress(OSError):  # gone already: then it is readable
            probe.sock.send(f"{probe.address.host} {probe.address.port}\n".encode())
        self._probes.add(probe)
        asyncio.get_running_loop().add_reader(probe.sock, self._drop, self._probes, probe)  # whatever it says now is its end

    # ---- relayed streams

    def _start_leg(self, leg: _Plain) -> None:
        self._legs[leg.number] = leg
        asyncio.get_running_loop().add_reader(leg.sock, self._hear_leg, leg)
        self._handle(LegOpened(leg.number, leg.words[len(frames.RELAY) :]))

    def _hear_leg(self, leg: _Plain) -> None:
        """Let what a leg says before it is paired wait in the system's buffer; one that has closed is lost."""
        try:
            has_spoken = bool(leg.sock.recv(1, socket.MSG_PEEK))
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            has_spoken = False
        if has_spoken:
            asyncio.get_running_loop().remove_reader(leg.sock)
            return
        self._close_leg(leg)
        self._handle(LegClosed(leg.number))

    def _close_leg(self, leg: _Plain) -> None:
        if self._legs.pop(leg.number, None) is not None:
            asyncio.get_running_loop().remove_reader(leg.sock)
            leg.sock.close()

    def _pair(self, effect: Pair) -> None:
        loop = asyncio.get_running_loop()
        legs = [self._legs.pop(number) for number in (effect.first, effect.second)]
        for leg in legs:
            loop.remove_reader(leg.sock)
        settings = self._settings
        first, second = (leg.sock for leg in legs)
        try:
            relay = Relay(self._pumps, first, second, max_bytes_per_s=settings.max_bytes_per_s, idle_s=settings.idle_s)
        except OSError:  # one is broken already
            first.close()
            second.close()
            self._handle(Ended(effect.first))
            return
        self._relays[effect.first] = relay
        self._tasks.start(self._follow(effect.first, relay))

    async def _follow(self, stream: int, relay: Relay) -> None:
        try:
            await relay.wait_closed()
        finally:
            del self._relays[stream]
            self._handle(Ended(stream))

    # ---- decisions and time

    def _handle(self, event: Event) -> None:
        now = self._clock.monotonic()
        self._rendezvous.server_offset_s = self._clock.now() + self._now_offset_s - now
        for effect in self._rendezvous.handle(event, now=now):
            self._carry_out(effect)

    def _carry_out(self, effect: Effect) -> None:
        match effect:
            case Send(number, message):
                control = self._controls.get(number)
                if control is not None:
                    control.send(message)
            case Close(number):
                self._end_control(number)
            case Pair():
                self._pair(effect)
            case CloseLeg(number):
                leg = self._legs.get(number)
                if leg is not None:
                    self._close_leg(leg)
            case Refusal(name, reason):
                self._refuse(name, reason)

    async def _keep_time(self) -> None:
        while True:
            await self._clock.sleep(_TICK_S)
            now = self._clock.monotonic()
            deadline = self._rendezvous.deadline
            if deadline is not None and deadline <= now:
                self._handle(Tick())
            self._drop_older(self._newcomers, now - self._settings.handshake_s)
            self._drop_older(self._probes, now - PROBE_S)
            self._cut_those_that_do_not_end(now)
            self._count_unlogged(now)
            self._accept_more()

    def _drop_older(self, crowd: _Crowd, since: float) -> None:
        while (oldest := crowd.oldest) is not None and oldest.since <= since:
            if crowd is self._newcomers:
                self._refuse("", "did not say in time what it is")
            self._drop(crowd, oldest)

    def _cut_those_that_do_not_end(self, now: float) -> None:
        for number, until in list(self._ending.items()):
            if until > now:
                return  # those after it have longer
            del self._ending[number]
            self._controls[number].abort()

    def _refuse(self, name: str, reason: str) -> None:
        """Log that something was refused; strangers must not fill a disk by it."""
        if self._logged < _MOST_LOGGED_PER_S:
            self._logged += 1
            _log.info("refused", peer=name, reason=reason)
        else:
            self._unlogged += 1

    def _count_unlogged(self, now: float) -> None:
        if now - self._logging_since < 1.0:
            return
        if self._unlogged:
            _log.warning("refused more", count=self._unlogged)
        self._logging_since, self._logged, self._unlogged = now, 0, 0


def _missing(words: bytes) -> int:
    """Return how many bytes are missing until it is clear what a newcomer wants."""
    wanted = len(frames.RELAY) + (frames.TOKEN_BYTES if words.startswith(frames.RELAY) else 0)
    return wanted - len(words)


def _may_be_word(words: bytes) -> bool:
    start = words[: len(frames.RELAY)]
    return frames.PROBE.startswith(start) or frames.RELAY.startswith(start)


def _group(host: str) -> str:
    """Return what is counted as one address: an IPv4 address, or an IPv6 network of 64 bits, which is one customer's."""
    if ":" not in host:
        return host
    return str(ipaddress.ip_network((host, 64), strict=False))


def _grant_key(pem: str) -> Ed25519PublicKey:
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except ValueError as error:
        raise ProtocolError(f"the server's grant key cannot be read: {error}") from error
    if not isinstance(key, Ed25519PublicKey):
        raise ProtocolError("the server's grant key is not an Ed25519 key")
    return key


def _make_context(authority_pem: str, certificate_pem: str, key_pem: str) -> ssl.SSLContext:
    """Return how a hub speaks TLS. Unlike peers, it checks the dates of certificates."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.num_tickets = 0  # nobody resumes: each connection proves anew who it is
    try:
        context.load_verify_locations(cadata=authority_pem)
        _load_chain(context, certificate_pem, key_pem)
    except (ssl.SSLError, ValueError) as error:
        raise ProtocolError(f"the hub's certificate does not fit: {error}") from error
    except OSError as error:  # temporary files cannot be made; it must not end who renews
        raise NoSpace(f"the hub's certificate cannot be loaded: {error.strerror or error}") from error
    return context


def _load_chain(context: ssl.SSLContext, certificate_pem: str, key_pem: str) -> None:
    """Put certificate and key into a context. OpenSSL takes them from files only, so the key in the file is encrypted."""
    password = os.urandom(32).hex().encode()
    key = serialization.load_pem_private_key(key_pem.encode(), password=None)
    encryption = serialization.BestAvailableEncryption(password)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    with tempfile.TemporaryDirectory(prefix="deskgrid-") as folder:
        file = Path(folder) / "hub.pem"
        file.write_bytes(pem + certificate_pem.encode())
        context.load_cert_chain(file, password=password)
