"""A server in forty lines for peers under test: an authority that signs, grants for everybody, real hubs."""

from __future__ import annotations

import asyncio
import datetime
import random
import secrets
import socket
from contextlib import AsyncExitStack
from dataclasses import dataclass, field

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.x509.oid import NameOID

from deskgrid.clock import SystemClock
from deskgrid.core.frames import Candidates
from deskgrid.core.trust import Grant, key_hash, sign_grant
from deskgrid.errors import NotFound, Unreachable
from deskgrid.model import wire
from deskgrid.model.overlay import Address, Hub
from deskgrid.overlay.endpoint import Endpoint
from deskgrid.overlay.hub import HubServer
from deskgrid.overlay.peer import Dial, Peer
from deskgrid.settings import HubSettings, PeerSettings

SERVER_AHEAD_S = 5_000.0
"""The server's clock is that wrong, or ours."""


class Authority:
    def __init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "test authority")])
        self.name = name
        self.certificate = self._build(name, self.key.public_key(), x509.BasicConstraints(ca=True, path_length=1))
        self.pem = self.certificate

    def sign(self, name: str, public_pem: str) -> str:
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        key = serialization.load_pem_public_key(public_pem.encode())
        return self._build(subject, key, x509.SubjectAlternativeName([x509.DNSName(name)]))

    def _build(self, subject: x509.Name, key: object, extension: x509.ExtensionType) -> str:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(self.name)
            .public_key(key)
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(extension, critical=isinstance(extension, x509.BasicConstraints))
        )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


def key_pair() -> tuple[str, str]:
    """Return a new private key and its public key, PEM."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return private.decode(), public.decode()


@dataclass
class Known:
    """A peer as the server knows it."""

    id: int
    name: str
    request: wire.RegisterPeer


@dataclass
class SmallGrid:
    """Use `async with`. Services are named SERVICE.NAME, where NAME is what `peer` was called with."""

    lifetime_s: float = 60.0
    grant_s: float = 60.0
    hub_settings: HubSettings = field(default_factory=lambda: HubSettings(ping_s=5.0))
    authority: Authority = field(default_factory=Authority)
    grant_key: Ed25519PrivateKey = field(default_factory=Ed25519PrivateKey.generate)
    hubs: dict[str, tuple[Hub, HubServer]] = field(default_factory=dict)
    known: dict[int, Known] = field(default_factory=dict)
    asked: int = 0
    registered: int = 0
    refused: int = 0
    """Registrations with a hub that came while the server was away."""
    is_away: bool = False
    stack: AsyncExitStack = field(default_factory=AsyncExitStack)

    async def __aenter__(self) -> SmallGrid:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stack.aclose()
        for name in list(self.hubs):
            await self.stop_hub(name)

    def now(self) -> float:
        return SystemClock().monotonic() + SERVER_AHEAD_S

    @property
    def grant_key_pem(self) -> str:
        public = self.grant_key.public_key()
        return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()

    async def start_hub(self, number: int = 1, *, host: str = "127.0.0.1", port: int = 0) -> HubServer:
        name = f"hub-{number}.deskgrid"
        private, public = key_pair()
        server = HubServer(
            self.hub_settings,
            clock=SystemClock(),
            grant_key_pem=self.grant_key_pem,
            authority_pem=self.authority.pem,
            certificate_pem=self.authority.sign(name, public),
            key_pem=private,
            now_offset_s=self.now() - SystemClock().now(),
        )
        listener = socket.create_server((host, port))
        address = f"{host}:{listener.getsockname()[1]}"
        await server.start(listener)
        self.hubs[name] = (Hub(name=name, address=address), server)
        return server

    async def stop_hub(self, name: str) -> None:
        await self.hubs.pop(name)[1].close()

    async def endpoint(self, settings: PeerSettings | None = None, *, loopback: bool = False) -> Endpoint:
        chosen = settings or PeerSettings(listen="127.0.0.1:0")
        policy = {"may_dial": dial_loopback} if loopback else {}
        endpoint = Endpoint(
            chosen,
            clock=SystemClock(),
            rng=random.Random(1),
            authority_pem=self.authority.pem,
            **policy,  # type: ignore[arg-type]
        )
        return await self.stack.enter_async_context(endpoint)

    async def peer(self, name: str, endpoint: Endpoint, offers: dict[str, Dial] | None = None) -> Peer:
        peer = Peer(endpoint, CallsOf(self, name), offers=offers or {})
        return await self.stack.enter_async_context(peer)

    def sign(self, source: Known, target: Known, service: str, *, seconds: float | None = None) -> str:
        grant = Grant(
            source=peer_name(source.name),
            source_key=_hash(source.request.key),
            target=peer_name(target.name),
            target_key=_hash(target.request.key),
            service=service,
            expires_at=self.now() + (self.grant_s if seconds is None else seconds),
            nonce=secrets.token_hex(8),
        )
        return sign_grant(grant, self.grant_key)

    def find(self, name: str) -> Known | None:
        return next((one for one in reversed(self.known.values()) if one.name == name), None)


@dataclass
class CallsOf:
    """What a peer has of the server."""

    grid: SmallGrid
    name: str
    removed: int = 0

    async def register(self, request: wire.RegisterPeer) -> wire.PeerAnswer:
        if self.grid.is_away:
            self.grid.refused += bool(request.hub)
            raise Unreachable("the server is away")
        self.grid.registered += 1
        number = next((one.id for one in self.grid.known.values() if one.request.key == request.key), len(self.grid.known) + 1)
        self.grid.known[number] = Known(number, self.name, request)
        return wire.PeerAnswer(
            peer_id=number,
            name=peer_name(self.name),
            certificate=self.grid.authority.sign(peer_name(self.name), request.key),
            grant_key=self.grid.grant_key_pem,
            hubs=tuple(hub for hub, _ in self.grid.hubs.values()),
            now=self.grid.now(),
            lifetime_s=self.grid.lifetime_s,
        )

    async def ask_grant(self, request: wire.AskGrant, wait_s: float) -> wire.GrantAnswer:
        if self.grid.is_away:
            raise Unreachable("the server is away")
        self.grid.asked += 1
        service, _, name = request.service.partition(".")
        if name == "nobody":
            raise NotFound("there is no such peer")
        deadline = SystemClock().monotonic() + wait_s
        while (target := self.grid.find(name)) is None or target.request.hub not in self.grid.hubs:
            if SystemClock().monotonic() >= deadline:
                return wire.GrantAnswer(waiting_for=f"{name} is not there")
            await asyncio.sleep(0.02)
        hub = self.grid.hubs[target.request.hub][0]
        grant = self.grid.sign(self.grid.known[request.peer_id], target, service)
        return wire.GrantAnswer(grant=grant, target=peer_name(name), hub=hub, lifetime_s=self.grid.grant_s)

    async def remove(self, peer_id: int) -> None:
        self.removed += 1
        self.grid.known.pop(peer_id, None)


def peer_name(name: str) -> str:
    """Return a certificate's name for a short name: a number."""
    return f"user-{sum(name.encode()) + 1}.deskgrid"


def dial_loopback(own: Candidates, other: Candidates, *, private: bool) -> tuple[Address, ...]:
    """Stands in for core.paths.dialable: everything is on loopback here."""
    return (Address("127.0.0.1", other.port),) if other.port and not own.relay_only and not other.relay_only else ()


def _hash(public_pem: str) -> str:
    key = serialization.load_pem_public_key(public_pem.encode())
    return key_hash(key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))


async def echo_service() -> tuple[asyncio.Server, Dial]:
    """Return a service that answers with what it gets, and a way to dial it."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    address = server.sockets[0].getsockname()

    async def dial() -> socket.socket:
        sock = socket.socket()
        sock.setblocking(False)
        await asyncio.get_running_loop().sock_connect(sock, address)
        return sock

    return server, dial


async def pair() -> tuple[socket.socket, socket.socket]:
    """Return the two ends of a TCP connection: the one to hand over, and the program's."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        program = socket.create_connection(listener.getsockname())
        local, _ = listener.accept()
    for sock in (local, program):
        sock.setblocking(False)
    return local, program


async def exchange(program: socket.socket, data: bytes) -> bytes:
    """Send, end, and return all that comes back."""
    loop = asyncio.get_running_loop()

    async def send() -> None:
        await loop.sock_sendall(program, data)
        program.shutdown(socket.SHUT_WR)

    sending = asyncio.create_task(send())
    found = bytearray()
    while piece := await loop.sock_recv(program, 1 << 16):
        found += piece
    await sending
    return bytes(found)
