"""What hostile callers and hubs can do to a peer: be refused."""

from __future__ import annotations

import asyncio
import contextlib
import random
import secrets
import socket
import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import msgspec
import pytest

from deskgrid.core import frames
from deskgrid.core.frames import Candidates
from deskgrid.core.opening import MAX_RECORD_BYTES, MOST_DATA_BYTES, Opening, decode_answer, encode_record
from deskgrid.core.trust import Grant, sign_grant
from deskgrid.errors import Conflict, DeskgridError, Forbidden, NotFound, ProtocolError, Unreachable
from deskgrid.model.overlay import Address, Hub
from deskgrid.overlay.dial import DIAL_BACK
from deskgrid.overlay.endpoint import Endpoint
from deskgrid.overlay.identity import Identity
from deskgrid.overlay.peer import Dial, Peer
from deskgrid.overlay.pump import Pumps
from deskgrid.overlay.registration import HubConnection
from deskgrid.overlay.stream_start import receive_record, secure, send_record
from tests.unit.overlay.small_grid import Authority, SmallGrid, echo_service, peer_name
from tests.unit.overlay.test_peer import eventually, talk


@dataclass
class Scene:
    """A peer that offers `echo` directly, and somebody with a certificate of the same authority."""

    grid: SmallGrid
    endpoint: Endpoint
    called: Peer
    caller: Peer
    pumps: Pumps
    stranger: Identity

    @property
    def address(self) -> tuple[str, int]:
        return ("127.0.0.1", self.endpoint.port)

    def grant(self, **changes: object) -> str:
        values = {
            "source": self.stranger.name,
            "source_key": self.stranger.key_hash,
            "target": self.called.name,
            "target_key": self.called.identity.key_hash,
            "service": "echo",
            "expires_at": self.grid.now() + 60,
            "nonce": "n",
        }
        return sign_grant(Grant(**{**values, **changes}), self.grid.grant_key)  # type: ignore[arg-type]

    async def tls(self, identity: Identity | None = None) -> ssl.SSLSocket:
        sock = socket.create_connection(self.address)
        context = (identity or self.stranger).client_context
        return await secure(self.pumps, sock, context, server_hostname=self.called.name, limit_s=5)

    async def open(self, record: bytes, identity: Identity | None = None) -> None:
        """Send a first record and return if the peer says yes. Raise what it says otherwise."""
        tls = await self.tls(identity)
        try:
            await send_record(self.pumps, tls, record, limit_s=5)
            decode_answer(await receive_record(self.pumps, tls, limit_s=10))
        finally:
            tls.close()

    async def still_serves(self) -> None:
        await talk(self.caller)


@pytest.fixture
async def echo() -> AsyncIterator[Dial]:
    service, dial = await echo_service()
    yield dial
    service.close()


@pytest.fixture
async def scene(echo: Dial) -> AsyncIterator[Scene]:
    async with SmallGrid() as grid:
        await grid.start_hub()
        endpoint = await grid.endpoint(loopback=True)
        called = await grid.peer("b", endpoint, {"echo": echo})
        caller = await grid.peer("a", await grid.endpoint(loopback=True))
        await called.ready(5)
        await caller.ready(5)
        stranger = Identity(grid.authority.pem)
        stranger.renew("user-7.deskgrid", grid.authority.sign("user-7.deskgrid", stranger.public_pem))
        pumps = Pumps(1)
        yield Scene(grid, endpoint, called, caller, pumps, stranger)
        await asyncio.to_thread(pumps.close)


def opening(grant: str, connection_id: str | None = None) -> bytes:
    return encode_record(Opening(grant=grant, id=connection_id or secrets.token_hex(16)))


async def test_a_grant_opens_a_service(scene: Scene) -> None:
    await scene.open(opening(scene.grant()))


@pytest.mark.parametrize(
    ("changes", "error"),
    [
        ({"source": "user-8.deskgrid"}, Forbidden),
        ({"source_key": "ab" * 32}, Forbidden),
        ({"target": "user-9.deskgrid"}, Forbidden),
        ({"target_key": "ab" * 32}, Forbidden),
        ({"expires_at": 0.0}, Forbidden),
        ({"service": "ssh"}, NotFound),
        ({"service": ""}, NotFound),
    ],
)
async def test_a_grant_for_something_else_is_refused(scene: Scene, changes: dict[str, object], error: type[DeskgridError]) -> None:
    with pytest.raises(error):
        await scene.open(opening(scene.grant(**changes)))
    await scene.still_serves()


async def test_a_grant_expires_in_the_servers_time(scene: Scene) -> None:
    with pytest.raises(Forbidden, match="expired"):
        await scene.open(opening(scene.grant(expires_at=scene.grid.now() - 0.1)))


async def test_an_id_opens_one_connection_only(scene: Scene) -> None:
    record = opening(scene.grant())
    await scene.open(record)
    with pytest.raises(Forbidden, match="before"):
        await scene.open(record)


async def test_a_grant_of_another_key_is_refused(scene: Scene) -> None:
    other = SmallGrid()
    forged = sign_grant(msgspec.convert(_claims(scene), Grant), other.grant_key)
    with pytest.raises(Forbidden):
        await scene.open(opening(forged))


def _claims(scene: Scene) -> dict[str, object]:
    return {
        "source": scene.stranger.name, "source_key": scene.stranger.key_hash, "target": scene.called.name,
        "target_key": scene.called.identity.key_hash, "service": "echo", "expires_at": scene.grid.now() + 60, "nonce": "",
    }  # fmt: skip


@pytest.mark.parametrize(
    "record",
    [
        *(b"", b"{}", b"[]", b"\xff" * 100, b'{"grant": "x.y", "id": "zz"}', b'{"grant": 1, "id": 2}', b"[" * 16_000),
        encode_record(Opening(grant="x.y", id="0" * 32, data=bytes(MOST_DATA_BYTES + 1))),
        b'{"grant": "x.y", "id": "00000000000000000000000000000000", "data": "no base64"}',
        bytes(MAX_RECORD_BYTES + 1),
    ],
)
async def test_a_first_record_that_is_none_is_refused(scene: Scene, record: bytes) -> None:
    with pytest.raises(DeskgridError):
        await scene.open(record)
    await scene.still_serves()


async def test_a_certificate_of_another_authority_is_refused(scene: Scene) -> None:
    foreign = Authority()
    impostor = Identity(scene.grid.authority.pem)
    impostor.renew("user-7.deskgrid", foreign.sign("user-7.deskgrid", impostor.public_pem))
    with pytest.raises(DeskgridError):
        await scene.open(opening(scene.grant()), impostor)
    await scene.still_serves()


async def test_whoever_says_nothing_is_cut(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deskgrid.overlay.endpoint.GREETING_S", 0.2)
    monkeypatch.setattr("deskgrid.overlay.called._RECORD_S", 0.2)
    silent, dripping = socket.create_connection(scene.address), socket.create_connection(scene.address)
    dripping.send(b"\x16")
    mute = await scene.tls()
    for sock in (silent, dripping, mute):
        sock.settimeout(5)
        assert await asyncio.to_thread(_is_cut, sock)
        sock.close()
    await scene.still_serves()


def _is_cut(sock: socket.socket) -> bool:
    try:
        while sock.recv(4096):
            pass
    except (ConnectionResetError, ssl.SSLError):
        return True
    except TimeoutError:
        return False
    return True


async def test_connections_of_one_address_that_say_nothing_are_bounded(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deskgrid.overlay.endpoint._MOST_GREETINGS_PER_HOST", 5)
    with contextlib.ExitStack() as sockets:
        many = [sockets.enter_context(socket.create_connection(scene.address)) for _ in range(20)]
        for sock in many:
            sock.settimeout(0.5)
        cut = [sock for sock in many if await asyncio.to_thread(_is_cut, sock)]
        assert len(cut) == 15
    await eventually(lambda: not scene.endpoint.greetings)
    await scene.still_serves()


async def test_junk_on_the_listener_is_refused(scene: Scene) -> None:
    rng = random.Random(5)
    first = [
        b"\x16",
        b"\x16\x03\x01\x02\x00\x01",
        DIAL_BACK,
        DIAL_BACK + bytes(16),
        b"GET / HTTP/1.0\r\n\r\n",
        b"",
        b"DG",
        b"D" * 20,
    ]
    for number in range(60):
        with socket.create_connection(scene.address) as sock:
            sock.sendall(rng.choice(first) + rng.randbytes(rng.choice([0, 1, 20, 3000])))
            if number % 2:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")
    await eventually(lambda: not scene.endpoint.greetings, 15)
    await scene.still_serves()


async def test_streams_of_a_peer_are_bounded(scene: Scene, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deskgrid.overlay.called.MOST_STREAMS", 0)
    with pytest.raises(Conflict):
        await scene.open(opening(scene.grant()))


# what a hostile hub may send


@dataclass
class FakeHub:
    """Registers a peer, then sends what it likes."""

    hub: Hub
    registered: asyncio.Event
    writer: asyncio.StreamWriter | None = None
    heard: bytes = b""


@contextlib.asynccontextmanager
async def fake_hub(grid: SmallGrid, *, first: bytes | None = None) -> AsyncIterator[FakeHub]:
    identity = Identity(grid.authority.pem)
    identity.renew("hub-1.deskgrid", grid.authority.sign("hub-1.deskgrid", identity.public_pem))
    fake = FakeHub(Hub(name="hub-1.deskgrid", address=""), asyncio.Event())

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError, ssl.SSLError):
            fake.heard += await reader.read(1000)
            writer.write(first or frames.encode(frames.Registered(observed=Address("127.0.0.1", 5), ping_s=60.0)))
            fake.writer = writer
            fake.registered.set()
            while data := await reader.read(10_000):
                fake.heard += data
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=identity.server_context)
    fake.hub = Hub(name="hub-1.deskgrid", address=f"127.0.0.1:{server.sockets[0].getsockname()[1]}")
    try:
        yield fake
    finally:
        server.close()


@pytest.fixture
def stranger_of() -> Callable[[SmallGrid], Identity]:
    def make(grid: SmallGrid) -> Identity:
        identity = Identity(grid.authority.pem)
        identity.renew("user-7.deskgrid", grid.authority.sign("user-7.deskgrid", identity.public_pem))
        return identity

    return make


def _connection(fake: FakeHub, identity: Identity, invited: list[object]) -> object:
    from deskgrid.clock import SystemClock

    return HubConnection.open(
        fake.hub,
        identity.client_context,
        clock=SystemClock(),
        rng=random.Random(1),
        invited=lambda _, invite: invited.append(invite),
    )


@pytest.mark.parametrize("seed", range(30))
async def test_whatever_a_hub_sends_the_connection_ends_in_order(seed: int, stranger_of: Callable[[SmallGrid], Identity]) -> None:
    rng = random.Random(seed)
    grid = SmallGrid()
    async with fake_hub(grid) as fake:
        connection = await _connection(fake, stranger_of(grid), [])  # type: ignore[misc]
        assert fake.writer is not None
        asking = asyncio.create_task(connection.ask(frames.Connect(id="ab" * 16, grant="", candidates=Candidates()), 30))
        valid = [
            frames.encode(frames.Rejected(id="zz", reason="")),
            frames.encode(frames.Pong(77)),
            frames.encode(frames.Invite(id="", grant="", candidates=Candidates(), relay="")),
        ]
        for _ in range(rng.randrange(1, 20)):
            fake.writer.write(rng.choice(valid))
        junk = bytearray(rng.choice(valid) + rng.randbytes(rng.randrange(1, 50)))
        junk[rng.randrange(len(junk))] ^= 0xFF
        fake.writer.write(bytes(junk) + b"\xff" * 40_000)
        await asyncio.wait_for(connection.ended.wait(), 5)
        with pytest.raises(Unreachable):
            await asking
        await connection.close()


@pytest.mark.parametrize(
    "message",
    [
        frames.Register(),
        frames.Connect(id="", grant="", candidates=Candidates()),
        frames.Accept(id="", candidates=Candidates()),
        frames.Goodbye("tired"),
        frames.Registered(observed=Address("1.2.3.4", 5), ping_s=1.0),
    ],
)
async def test_a_message_that_hubs_do_not_send_ends_the_connection(
    message: frames.Message, stranger_of: Callable[[SmallGrid], Identity]
) -> None:
    grid = SmallGrid()
    async with fake_hub(grid) as fake:
        connection = await _connection(fake, stranger_of(grid), [])  # type: ignore[misc]
        assert fake.writer is not None
        fake.writer.write(frames.encode(message))
        await asyncio.wait_for(connection.ended.wait(), 5)
        await connection.close()


@pytest.mark.parametrize("first", [frames.encode(frames.Goodbye("full")), frames.encode(frames.Pong()), b"\xff" * 10])
async def test_a_hub_that_does_not_register_us_is_left(first: bytes, stranger_of: Callable[[SmallGrid], Identity]) -> None:
    grid = SmallGrid()
    async with fake_hub(grid, first=first) as fake:
        with pytest.raises((Unreachable, ProtocolError)):
            await _connection(fake, stranger_of(grid), [])  # type: ignore[misc]


async def test_a_hub_with_another_name_is_not_registered_at(stranger_of: Callable[[SmallGrid], Identity]) -> None:
    grid = SmallGrid()
    async with fake_hub(grid) as fake:
        fake.hub = Hub(name="hub-2.deskgrid", address=fake.hub.address)
        with pytest.raises(Unreachable):
            await _connection(fake, stranger_of(grid), [])  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(20))
async def test_invitations_of_a_hostile_hub_are_rejected_or_come_to_nothing(seed: int, echo: Dial) -> None:
    rng = random.Random(seed)
    async with SmallGrid() as grid:
        async with fake_hub(grid) as fake:
            grid.hubs["hub-1.deskgrid"] = (fake.hub, None)  # type: ignore[assignment]
            called = await grid.peer("b", await grid.endpoint(), {"echo": echo})
            await called.ready(5)
            known = grid.find("b")
            assert known is not None and fake.writer is not None
            for _ in range(50):
                fake.writer.write(frames.encode(_invitation(rng, grid.sign(known, known, "echo"))))
            fake.writer.write(frames.encode(frames.Invite(id="ab" * 16, grant="", candidates=Candidates(), relay="cd" * 32)))
            await eventually(lambda: b'"reject"' in fake.heard and b"ab" * 16 in fake.heard)
            await grid.stack.aclose()
        grid.hubs.clear()


def _invitation(rng: random.Random, grant: str) -> frames.Invite:
    hosts = ["127.0.0.1", "192.168.1.1", "", "::1", "x" * 100, "203.0.113.1", "\x00", "8.8.8.8%1"]
    return frames.Invite(
        id=rng.choice(["ab" * 16, secrets.token_hex(16), "", "x" * 32, "../../etc"]),
        grant=rng.choice([grant, "", ".", grant[:-3], "é.ü", "A" * 5000]),
        candidates=Candidates(
            observed=rng.choice(hosts),
            port=rng.choice([0, -1, 1, 22, 70_000, 2**40]),
            private=tuple(rng.choices(hosts, k=rng.randrange(30))),
            punch=rng.choice([None, Address(rng.choice(hosts), rng.choice([0, 22, -5]))]),
        ),
        relay=rng.choice(["cd" * 32, "", "zz" * 32, "c" * 63, "é" * 64]),
    )


def test_names_for_short_names_differ() -> None:
    assert len({peer_name(name) for name in ("a", "b", "c", "d")}) == 4
