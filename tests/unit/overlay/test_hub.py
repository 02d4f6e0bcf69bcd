"""The hub over real sockets: who may register, what is relayed, and what hostile connections cost."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import random
import socket
import ssl
import threading
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from deskgrid.clock import SystemClock
from deskgrid.core import frames
from deskgrid.core.frames import Candidates, FrameReader, Message
from deskgrid.core.trust import Grant, key_hash, sign_grant
from deskgrid.errors import ProtocolError
from deskgrid.model.ids import Sha256
from deskgrid.overlay import hub as hub_module
from deskgrid.overlay.hub import HubServer
from deskgrid.settings import HubSettings

HUB, ANN, BOB = "hub-1.deskgrid", "user-1.deskgrid", "attempt-1.job-42.deskgrid"
ID = "a" * 32
LIMIT_S = 20.0
pytestmark = pytest.mark.timeout(60)
SERVER_AHEAD_S = 5000.0


class Authority:
    """A grid's authority, and its grant key."""

    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.pem = self._sign(key=self.key, ca=True, days=1)
        self.grant_key = Ed25519PrivateKey.generate()

    @property
    def grant_pem(self) -> str:
        return _public_pem(self.grant_key)

    def issue(self, *names: str, days: float = 1) -> Holder:
        key = ec.generate_private_key(ec.SECP256R1())
        return Holder(names[0] if names else "", key, self._sign(*names, key=key, days=days))

    def grant(self, source: Holder, target: Holder, **changes: Any) -> str:
        grant = Grant(
            source=source.name,
            source_key=source.key_hash,
            target=target.name,
            target_key=target.key_hash,
            service="web",
            expires_at=SystemClock().now() + SERVER_AHEAD_S + 60,
            nonce="",
        )
        return sign_grant(msgspec.structs.replace(grant, **changes), self.grant_key)

    def _sign(self, *names: str, key: ec.EllipticCurvePrivateKey, ca: bool = False, days: float) -> str:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority" if ca else "one")]))
            .issuer_name(x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "authority")]))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=9))
            .not_valid_after(now + datetime.timedelta(days=days))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        )
        if names and not ca:
            builder = builder.add_extension(x509.SubjectAlternativeName([x509.DNSName(name) for name in names]), critical=False)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


class Holder:
    """A key and its certificate."""

    def __init__(self, name: str, key: ec.EllipticCurvePrivateKey, certificate: str) -> None:
        self.name, self.certificate = name, certificate
        self.pem = key.private_bytes(
            serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
        ).decode()
        der = key.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
        self.key_hash = Sha256(key_hash(der))


def _public_pem(key: Ed25519PrivateKey) -> str:
    public = key.public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


class Site:
    """A hub on loopback and those who connect to it."""

    def __init__(self, folder: Path, hub: HubServer, authority: Authority, address: tuple[str, int]) -> None:
        self.folder, self.hub, self.authority, self.address = folder, hub, authority, address

    def context(self, holder: Holder | None, authority_pem: str | None = None) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.load_verify_locations(cadata=authority_pem or self.authority.pem)
        if holder is not None:
            file = self.folder / "client.pem"
            file.write_text(holder.certificate + holder.pem)
            context.load_cert_chain(file)
        return context

    async def member(self, holder: Holder | None, context: ssl.SSLContext | None = None) -> Member:
        """Connect with TLS, without registering."""
        reader, writer = await asyncio.open_connection(*self.address, ssl=context or self.context(holder), server_hostname=HUB)
        return Member(reader, writer)

    async def join(self, holder: Holder) -> Member:
        member = await self.member(holder)
        member.say(frames.Register())
        member.registered = await member.hear(frames.Registered)
        return member

    async def plain(self, words: bytes = b"") -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        reader, writer = await asyncio.open_connection(*self.address)
        writer.write(words)
        return reader, writer


class Member:
    """One TLS connection to the hub."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.registered: Any = None
        self._frames = FrameReader()
        self._heard: list[Message] = []

    def say(self, message: Message) -> None:
        self.writer.write(frames.encode(message))

    async def hear(self, kind: type[Any]) -> Any:
        """Return the next message, which must be of a kind."""
        while not self._heard:
            data = await self.reader.read(1 << 16)
            assert data, f"closed instead of {kind.__name__}"
            self._heard += self._frames.feed(data)
        message = self._heard.pop(0)
        assert isinstance(message, kind), message
        return message

    async def dismissed(self) -> str:
        """Return why the hub said goodbye, once it has closed the connection."""
        goodbye: frames.Goodbye = await self.hear(frames.Goodbye)
        assert await self.reader.read(1) == b""
        return goodbye.reason

    async def leave(self) -> None:
        self.writer.close()
        with contextlib.suppress(OSError, ssl.SSLError):
            await self.writer.wait_closed()


@contextlib.asynccontextmanager
async def _site(folder: Path, **settings: Any) -> AsyncIterator[Site]:
    """Run a hub; afterwards nothing of it may be left."""
    authority = Authority()
    holder = authority.issue(HUB)
    before, tasks = set(threading.enumerate()), asyncio.all_tasks()
    hub = HubServer(
        HubSettings(**settings),
        clock=SystemClock(),
        grant_key_pem=authority.grant_pem,
        authority_pem=authority.pem,
        certificate_pem=holder.certificate,
        key_pem=holder.pem,
        now_offset_s=SERVER_AHEAD_S,
    )
    listener = socket.create_server(("127.0.0.1", 0))
    port = listener.getsockname()[1]
    await hub.start(listener)
    try:
        yield Site(folder, hub, authority, ("127.0.0.1", port))
    finally:
        await hub.close()
        await hub.close()
        left = set(threading.enumerate()) - before
        assert not [thread for thread in left if not thread.name.startswith("asyncio_")]  # those are the loop's
        await _until(lambda: not _own_sockets(port))
        await _until(lambda: asyncio.all_tasks() - {asyncio.current_task()} <= tasks)


def _own_sockets(port: int) -> list[str]:
    """Return this process's TCP sockets whose local port is the hub's."""
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(f"/proc/self/fd/{name}"))
    lines = Path("/proc/self/net/tcp").read_text().splitlines()[1:]
    fields = [line.split() for line in lines]
    return [line[1] for line in fields if line[1].endswith(f":{port:04X}") and f"socket:[{line[9]}]" in inodes]


async def _until(holds: Any) -> None:
    async with asyncio.timeout(LIMIT_S):
        while not holds():
            await asyncio.sleep(0.01)


@pytest.fixture
async def site(tmp_path: Path) -> AsyncIterator[Site]:
    async with _site(tmp_path) as found:
        yield found


# ---- registration


async def test_a_peer_registers_and_learns_how_it_is_seen(site: Site):
    member = await site.join(site.authority.issue(ANN))
    assert member.registered.observed.host == "127.0.0.1"
    assert member.registered.observed.port == member.writer.get_extra_info("sockname")[1]
    assert site.hub.peers == 1
    member.say(frames.Ping(7))
    assert await member.hear(frames.Pong) == frames.Pong(7)
    await member.leave()
    await _until(lambda: site.hub.peers == 0)


async def test_frames_may_come_byte_by_byte(site: Site):
    member = await site.member(site.authority.issue(ANN))
    for byte in frames.encode(frames.Register()) + frames.encode(frames.Ping(1)):
        member.writer.write(bytes([byte]))
        await member.writer.drain()
    await member.hear(frames.Registered)
    await member.hear(frames.Pong)


async def _is_refused(site: Site, holder: Holder | None, context: ssl.SSLContext | None = None) -> bool:
    """Tell whether the hub ends the connection without having let it register. In TLS 1.3 the client learns it when it reads."""
    with contextlib.suppress(OSError, ssl.SSLError):
        member = await site.member(holder, context)
        member.say(frames.Register())
        data = await member.reader.read(1 << 16)
        assert not any(isinstance(message, frames.Registered) for message in FrameReader().feed(data))
    return site.hub.peers == 0


async def test_a_peer_without_a_certificate_of_the_grid_is_refused(site: Site):
    assert await _is_refused(site, None)
    stranger = Authority().issue(ANN)
    assert await _is_refused(site, stranger)
    await site.join(site.authority.issue(ANN))


async def test_a_certificate_that_has_ended_is_refused(site: Site):
    assert await _is_refused(site, site.authority.issue(ANN, days=-0.1))


@pytest.mark.parametrize("names", [(HUB,), ("hub-2.deskgrid",), ("server.deskgrid",), (ANN, BOB), ()])
async def test_only_certificates_with_one_name_of_a_peer_may_register(site: Site, names: tuple[str, ...]):
    assert await _is_refused(site, site.authority.issue(*names))


async def test_older_tls_is_refused(site: Site):
    holder = site.authority.issue(ANN)
    context = site.context(holder)
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    assert await _is_refused(site, holder, context)


async def test_a_newer_connection_with_the_same_key_replaces_the_older(site: Site):
    holder = site.authority.issue(ANN)
    older = await site.join(holder)
    newer = await site.join(holder)
    assert "another connection" in await older.dismissed()
    newer.say(frames.Ping(1))
    await newer.hear(frames.Pong)
    assert site.hub.peers == 1


async def test_a_silent_peer_is_dismissed(tmp_path: Path):
    async with _site(tmp_path, ping_s=0.1) as site:
        member = await site.join(site.authority.issue(ANN))
        assert await member.dismissed() == "silent for too long"
        assert site.hub.peers == 0


async def test_a_hub_that_closes_says_goodbye(tmp_path: Path):
    async with _site(tmp_path) as site:
        members = [await site.join(site.authority.issue(name)) for name in (ANN, BOB)]
        closing = asyncio.create_task(site.hub.close())
        assert [await member.dismissed() for member in members] == ["the hub is closing"] * 2
        await closing


async def test_a_new_certificate_is_shown_from_then_on(site: Site):
    first = await site.join(site.authority.issue(ANN))
    renewed = site.authority.issue(HUB)
    site.hub.replace_certificate(renewed.certificate, renewed.pem)
    second = await site.join(site.authority.issue(BOB))
    shown = [member.writer.get_extra_info("ssl_object").getpeercert(True) for member in (first, second)]
    assert shown[0] != shown[1] == ssl.PEM_cert_to_DER_cert(renewed.certificate)
    first.say(frames.Ping())
    await first.hear(frames.Pong)


async def test_a_certificate_that_does_not_fit_is_not_taken(site: Site):
    one, other = site.authority.issue(HUB), site.authority.issue(HUB)
    for certificate, key in ((one.certificate, other.pem), ("", one.pem), (one.certificate, "")):
        with pytest.raises(ProtocolError):
            site.hub.replace_certificate(certificate, key)
    await site.join(site.authority.issue(ANN))


# ---- calls


async def _call(site: Site, ann: Holder, bob: Holder) -> tuple[Member, Member, bytes]:
    caller, target = await site.join(ann), await site.join(bob)
    caller.say(frames.Connect(id=ID, grant=site.authority.grant(ann, bob), candidates=Candidates(port=9)))
    invite = await target.hear(frames.Invite)
    assert (invite.candidates.observed, invite.candidates.port) == ("127.0.0.1", 9)
    target.say(frames.Accept(id=ID, candidates=Candidates()))
    accepted = await caller.hear(frames.Accepted)
    assert accepted.relay == invite.relay
    return caller, target, bytes.fromhex(accepted.relay)


async def test_a_relayed_stream_carries_bytes_both_ways_and_ends(site: Site):
    _, _, token = await _call(site, site.authority.issue(ANN), site.authority.issue(BOB))
    ends = [await site.plain(frames.RELAY + token) for _ in range(2)]
    (one_reader, one), (other_reader, other) = ends
    await _until(lambda: site.hub.streams == 1)
    one.write(b"there" * 100_000)
    one.write_eof()
    assert await other_reader.read(-1) == b"there" * 100_000
    other.write(b"back")
    other.write_eof()
    assert await one_reader.read(-1) == b"back"
    await _until(lambda: site.hub.streams == 0)
    third, _ = await site.plain(frames.RELAY + token)
    assert await third.read(1) == b""


async def test_a_relayed_stream_outlives_both_registrations(site: Site):
    caller, target, token = await _call(site, site.authority.issue(ANN), site.authority.issue(BOB))
    ends = [await site.plain(frames.RELAY + token) for _ in range(2)]
    (one_reader, _), (_, other) = ends
    await _until(lambda: site.hub.streams == 1)
    for member in (caller, target):
        await member.leave()
    await _until(lambda: site.hub.peers == 0)
    other.write(b"still")
    assert await one_reader.readexactly(5) == b"still"


async def test_a_leg_that_left_makes_room_for_the_next(site: Site):
    _, _, token = await _call(site, site.authority.issue(ANN), site.authority.issue(BOB))
    _, lost = await site.plain(frames.RELAY + token)
    await _until(lambda: site.hub._legs)
    lost.close()
    await _until(lambda: not site.hub._legs)
    _ends = [await site.plain(frames.RELAY + token) for _ in range(2)]
    await _until(lambda: site.hub.streams == 1)


async def test_what_one_end_says_before_the_other_is_there_waits_for_it(site: Site):
    _, _, token = await _call(site, site.authority.issue(ANN), site.authority.issue(BOB))
    reader, _ = await site.plain(frames.RELAY + token + b"early")
    await _until(lambda: site.hub._legs)
    other_reader, other = await site.plain(frames.RELAY + token)
    assert await other_reader.readexactly(5) == b"early"
    other.write(b"back")
    assert await reader.readexactly(4) == b"back"


async def test_an_end_that_spoke_and_left_is_heard_to_its_end(site: Site):
    _, _, token = await _call(site, site.authority.issue(ANN), site.authority.issue(BOB))
    _, gone = await site.plain(frames.RELAY + token + b"early")
    await _until(lambda: site.hub._legs)
    gone.close()
    other_reader, other = await site.plain(frames.RELAY + token)
    assert await other_reader.read(-1) == b"early"
    other.close()
    await _until(lambda: site.hub.streams == 0)


async def test_grants_are_checked_by_the_servers_clock_and_its_newest_key(site: Site):
    ann, bob = site.authority.issue(ANN), site.authority.issue(BOB)
    caller, target = await site.join(ann), await site.join(bob)
    late = site.authority.grant(ann, bob, expires_at=SystemClock().now() + SERVER_AHEAD_S - 1)
    caller.say(frames.Connect(id=ID, grant=late, candidates=Candidates()))
    assert (await caller.hear(frames.Rejected)).reason == "this grant has expired"
    site.authority.grant_key = Ed25519PrivateKey.generate()
    site.hub.follow_server(grant_key_pem=site.authority.grant_pem, now=SystemClock().now() - 50)
    grant = site.authority.grant(ann, bob, expires_at=SystemClock().now() - 40)
    caller.say(frames.Connect(id=ID, grant=grant, candidates=Candidates()))
    await target.hear(frames.Invite)
    with pytest.raises(ProtocolError):
        site.hub.follow_server(grant_key_pem="nonsense", now=0.0)


async def test_callers_learn_at_once_that_the_called_peer_left(site: Site):
    ann, bob = site.authority.issue(ANN), site.authority.issue(BOB)
    caller, target = await site.join(ann), await site.join(bob)
    caller.say(frames.Connect(id=ID, grant=site.authority.grant(ann, bob), candidates=Candidates()))
    await target.hear(frames.Invite)
    await target.leave()
    assert (await caller.hear(frames.Rejected)).absent


# ---- probes


async def test_a_probe_learns_its_address_and_is_held_until_it_closes(site: Site):
    reader, writer = await site.plain(frames.PROBE)
    host, port = (await reader.readline()).split()
    assert (host.decode(), int(port)) == writer.get_extra_info("sockname")
    assert len(site.hub._probes) == 1
    writer.close()
    await _until(lambda: not len(site.hub._probes))


async def test_a_probe_is_not_held_for_ever(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub_module, "PROBE_S", 0.1)
    async with _site(tmp_path) as site:
        reader, _ = await site.plain(frames.PROBE)
        await reader.readline()
        assert await reader.read(1) == b""


async def test_probes_are_bounded_per_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub_module, "_MOST_PROBES_PER_ADDRESS", 3)
    async with _site(tmp_path) as site:
        probes = [await site.plain(frames.PROBE) for _ in range(4)]
        answers = [await reader.readline() for reader, _ in probes]
        assert [bool(answer) for answer in answers] == [True, True, True, False]


# ---- hostile


@pytest.mark.parametrize(
    "words", [b"", b"D", b"DGR1" + b"x" * 31, b"\x16", b"\x16\x03\x01\x02\x00\x01", b"\x16\x03\x01\x40\x00" + b"\0" * 99]
)
async def test_who_does_not_say_what_it_is_in_time_is_cut(tmp_path: Path, words: bytes):
    async with _site(tmp_path, handshake_s=0.3) as site:
        reader, _ = await site.plain(words)
        with contextlib.suppress(ConnectionError):
            await reader.read(1 << 16)  # perhaps an alert of TLS
            assert await reader.read(1) == b""
        await _until(lambda: not len(site.hub._newcomers))


async def test_a_slow_drip_is_cut_in_time(tmp_path: Path):
    async with _site(tmp_path, handshake_s=0.5) as site:
        reader, writer = await site.plain()
        ended = asyncio.create_task(reader.read(1))
        with contextlib.suppress(ConnectionError):
            for byte in frames.RELAY + b"x" * 31:
                writer.write(bytes([byte]))
                await writer.drain()
                await asyncio.wait((ended,), timeout=0.05)
                if ended.done():
                    break
            await ended
        assert ended.done()


async def test_a_peer_that_shakes_hands_but_does_not_register_is_dismissed(tmp_path: Path):
    async with _site(tmp_path, handshake_s=0.3) as site:
        member = await site.member(site.authority.issue(ANN))
        for byte in frames.encode(frames.Register())[:-1]:
            member.writer.write(bytes([byte]))
        assert await member.dismissed() == "did not register"


@pytest.mark.parametrize("words", [b"GET / HTTP/1.1\r\n", b"\x00", b"DGP2", b"DGR1" + b"x" * 32, b"DGC1" + b"x" * 16, b"\x80" * 50])
async def test_nonsense_is_cut_at_once(site: Site, words: bytes):
    reader, _ = await site.plain(words)
    with contextlib.suppress(ConnectionError):
        assert await reader.read(1) == b""
    await site.join(site.authority.issue(ANN))


async def test_random_bytes_never_hurt_the_hub(tmp_path: Path):
    rng = random.Random(7)
    async with _site(tmp_path, handshake_s=0.3) as site:
        member = await site.join(site.authority.issue(ANN))
        for _ in range(100):
            start = rng.choice([b"", b"\x16", b"\x16\x03\x01", frames.PROBE, frames.RELAY])
            _, writer = await site.plain(start + rng.randbytes(rng.randrange(200)))
            if rng.random() < 0.7:
                writer.transport.abort()
        await _until(lambda: not len(site.hub._newcomers))
        member.say(frames.Ping(1))
        await member.hear(frames.Pong)


async def test_fuzzed_frames_end_their_connection_only(site: Site):
    rng = random.Random(8)
    witness = await site.join(site.authority.issue(BOB))
    holder = site.authority.issue(ANN)
    valid = frames.encode(frames.Connect(id=ID, grant="x" * 200, candidates=Candidates(private=("10.0.0.1",))))
    for turn in range(40):
        member = await site.join(holder)
        raw = bytearray(valid)
        for _ in range(rng.randrange(1, 6)):
            raw[rng.randrange(len(raw))] = rng.randrange(256)
        member.writer.write(bytes(raw) if turn % 2 else rng.randbytes(100))
        await member.leave()
    witness.say(frames.Ping(1))
    await witness.hear(frames.Pong)


async def test_a_frame_that_is_no_message_is_answered_with_goodbye(site: Site):
    member = await site.join(site.authority.issue(ANN))
    member.writer.write(b"\0\0\0\2{}")
    assert "no message" in await member.dismissed()
    member = await site.join(site.authority.issue(ANN))
    member.writer.write(b"\xff\xff\xff\xff")
    assert "at most" in await member.dismissed()


async def test_a_peer_that_does_not_read_is_cut(tmp_path: Path):
    async with _site(tmp_path, max_connects_per_s=1e9) as site:
        sock = socket.create_connection(site.address)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        holder = site.authority.issue(ANN)
        reader, writer = await asyncio.open_connection(sock=sock, ssl=site.context(holder), server_hostname=HUB, limit=1 << 10)
        writer.write(frames.encode(frames.Register()))
        await _until(lambda: site.hub.peers == 1)
        writer.transport.pause_reading()  # type: ignore[attr-defined]
        pings = frames.encode(frames.Ping(2**50)) * 1000
        with contextlib.suppress(ConnectionError):
            while site.hub.peers:
                writer.write(pings)
                await asyncio.wait_for(writer.drain(), 1)
        assert site.hub.peers == 0
        writer.transport.abort()
        del reader


async def test_newcomers_are_bounded_per_address(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub_module, "_MOST_NEWCOMERS_PER_ADDRESS", 5)
    async with _site(tmp_path) as site:
        waiting = [await site.plain() for _ in range(5)]
        await _until(lambda: len(site.hub._newcomers) == 5)
        late, _ = await site.plain()
        assert await late.read(1) == b""
        waiting[0][1].close()
        await _until(lambda: len(site.hub._newcomers) == 4)
        await site.join(site.authority.issue(ANN))


async def test_when_newcomers_are_too_many_the_oldest_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(hub_module, "_MOST_NEWCOMERS", 3)
    monkeypatch.setattr(hub_module, "_LEAST_S", 0.2)
    async with _site(tmp_path, handshake_s=100.0) as site:
        waiting = [await site.plain() for _ in range(3)]
        await _until(lambda: len(site.hub._newcomers) == 3)
        await site.join(site.authority.issue(ANN))
        assert await waiting[0][0].read(1) == b""
        assert len(site.hub._newcomers) == 2


async def test_refusals_are_logged_at_a_bounded_rate(site: Site, capsys: pytest.CaptureFixture[str]):
    for _ in range(100):
        reader, _ = await site.plain(b"nonsense")
        with contextlib.suppress(ConnectionError):
            await reader.read(1)
    printed = capsys.readouterr().out
    assert 1 <= printed.count("neither TLS nor a word of ours") <= 60


async def test_everything_ends_with_the_hub(tmp_path: Path):
    """The fixture looks for what is left: sockets, tasks, threads."""
    async with _site(tmp_path) as site:
        _, _, token = await _call(site, site.authority.issue(ANN), site.authority.issue(BOB))
        relayed = [await site.plain(frames.RELAY + token) for _ in range(2)]
        await _until(lambda: site.hub.streams == 1)
        others = [await site.plain(words) for words in (b"", frames.PROBE, b"\x16\x03\x01", frames.RELAY)]
        await _until(lambda: len(site.hub._newcomers) == 3 and len(site.hub._probes) == 1)
    for reader, _ in relayed + others:
        with contextlib.suppress(ConnectionError):
            await asyncio.wait_for(reader.read(-1), LIMIT_S)  # to its end
