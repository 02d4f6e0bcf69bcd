"""Certificates and registrations are renewed long before their end, over several lifetimes, while streams go on."""

from __future__ import annotations

import asyncio
import datetime
import random
import socket
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
import sqlalchemy as sa
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from deskgrid.client.grid import Grid
from deskgrid.client.peers import ServerCalls
from deskgrid.client.transport import Transport
from deskgrid.clock import SystemClock
from deskgrid.errors import Unreachable
from deskgrid.model import wire
from deskgrid.model.overlay import Hub
from deskgrid.overlay.endpoint import Endpoint
from deskgrid.overlay.identity import Identity
from deskgrid.overlay.peer import Dial, Peer
from deskgrid.overlay.registration import HubConnection
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import hub as hub_table
from deskgrid.server.store.schema import peer as peer_table
from deskgrid.settings import PeerSettings, ServerSettings
from deskgrid.testing.grids import TestGrid, running_grid
from tests.unit.overlay.small_grid import Authority, SmallGrid, dial_loopback, echo_service, pair

LIFETIME_S = 2.4
LIFETIMES = 3
SERVICE = "echo.user"


async def say(program: socket.socket, words: bytes) -> None:
    """Say something to an echo and hear it."""
    program.send(words)
    found = b""
    while len(found) < len(words) and (piece := await asyncio.get_running_loop().sock_recv(program, 1000)):
        found += piece
    assert found == words


async def ends_well(program: socket.socket) -> None:
    with program:
        program.shutdown(socket.SHUT_WR)
        assert await asyncio.get_running_loop().sock_recv(program, 1) == b""


async def connected(caller: Peer, service: str) -> socket.socket:
    """Connect, and have a word back."""
    local, program = await pair()
    await caller.connect(service, local, wait_s=10)
    await say(program, b"begins")
    return program


class NotedCalls(ServerCalls):
    """The way to a real server; notes what it answers."""

    def __init__(self, transport: Transport) -> None:
        super().__init__(transport)
        self.answers: list[wire.PeerAnswer] = []

    async def register(self, request: wire.RegisterPeer) -> wire.PeerAnswer:
        answer = await super().register(request)
        self.answers.append(answer)
        return answer

    @property
    def passed_s(self) -> float:
        """How long it has been known to the server."""
        return self.answers[-1].now - self.answers[0].now

    def ends(self) -> list[datetime.datetime]:
        """Return until when its certificates are good."""
        return [x509.load_pem_x509_certificate(answer.certificate.encode()).not_valid_after_utc for answer in self.answers]


async def left_s(grid: TestGrid) -> float:
    """Return how long, of all that are registered, the first to end is still so."""

    def read(tx: Transaction) -> float:
        ends = [row.expires_at for table in (peer_table, hub_table) for row in tx.rows(sa.select(table))]
        assert len(ends) == 3
        return min(ends) - tx.now

    return await grid.services.store.read(read)


async def test_registrations_and_certificates_are_renewed_long_before_their_end_while_streams_go_on(tmp_path: Path) -> None:
    settings = ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, peer_s=LIFETIME_S, grant_s=6.0)
    service, dial = await echo_service()
    async with service, running_grid(tmp_path / "server", settings, hub=True) as grid, AsyncExitStack() as stack:
        credentials = await grid.admin()
        transport = await stack.enter_async_context(Transport(credentials))

        async def peer(calls: NotedCalls, offers: dict[str, Dial]) -> Peer:
            own = PeerSettings(listen="127.0.0.1:0")
            rng, pem = random.Random(1), credentials.authority_pem
            endpoint = Endpoint(own, clock=SystemClock(), rng=rng, authority_pem=pem, may_dial=dial_loopback)
            found = Peer(await stack.enter_async_context(endpoint), calls, offers=offers)
            await stack.enter_async_context(found)
            await found.ready(10)
            return found

        notes = NotedCalls(transport), NotedCalls(transport)
        await peer(notes[0], {"echo": dial})
        caller = await peer(notes[1], {})
        program = await connected(caller, SERVICE)
        async with asyncio.timeout(60):
            while min(one.passed_s for one in notes) < LIFETIMES * LIFETIME_S:
                await say(program, b"goes on")
                await asyncio.sleep(0.02)
                assert await left_s(grid) > LIFETIME_S / 3
        await ends_well(await connected(caller, SERVICE))
        await ends_well(program)
        for one in notes:
            assert len({answer.peer_id for answer in one.answers}) == 1, "it stays the same peer"
            ends = one.ends()
            assert ends == sorted(ends)
            assert (ends[-1] - ends[0]).total_seconds() >= LIFETIMES * LIFETIME_S - 1
        async with Grid(credentials) as user:
            assert sorted(found.id for found in await user.peers()) == sorted(one.answers[0].peer_id for one in notes)


class HastyAuthority(Authority):
    """Its certificates end when the registration does, without the hour more that the server's have."""

    def sign(self, name: str, public_pem: str) -> str:
        whole = x509.load_pem_x509_certificate(super().sign(name, public_pem).encode())
        if name.startswith("hub-"):
            return whole.public_bytes(serialization.Encoding.PEM).decode()
        builder = x509.CertificateBuilder(whole.issuer, whole.subject, whole.public_key(), whole.serial_number)
        now = datetime.datetime.now(datetime.UTC)
        builder = builder.not_valid_before(whole.not_valid_before_utc).not_valid_after(now + datetime.timedelta(seconds=LIFETIME_S))
        for extension in whole.extensions:
            builder = builder.add_extension(extension.value, critical=extension.critical)
        return builder.sign(self.key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM).decode()


async def test_hub_takes_peers_by_their_renewed_certificates_when_the_first_have_long_ended() -> None:
    only_relayed = PeerSettings(listen="127.0.0.1:0", paths=("relayed",))
    service, dial = await echo_service()
    async with service, SmallGrid(authority=HastyAuthority(), lifetime_s=LIFETIME_S) as grid:
        await grid.start_hub(1)
        called = await grid.peer("b", await grid.endpoint(only_relayed), {"echo": dial})
        caller = await grid.peer("a", await grid.endpoint(only_relayed))
        await called.ready(10)
        await caller.ready(10)
        never_renewed = Identity(grid.authority.pem)
        never_renewed.renew("user-7.deskgrid", grid.authority.sign("user-7.deskgrid", never_renewed.public_pem))
        program = await connected(caller, "echo.b")
        began = grid.now()
        async with asyncio.timeout(60):
            while grid.now() < began + LIFETIMES * LIFETIME_S:
                await say(program, b"goes on")
                await asyncio.sleep(0.02)
        await ends_well(program)
        await grid.start_hub(2)
        await grid.stop_hub("hub-1.deskgrid")
        await ends_well(await connected(caller, "echo.b"))
        assert {one.request.hub for one in grid.known.values()} == {"hub-2.deskgrid"}
        with pytest.raises(Unreachable):
            await register(grid.hubs["hub-2.deskgrid"][0], never_renewed)


async def register(hub: Hub, identity: Identity) -> None:
    context = identity.client_context
    connection = await HubConnection.open(hub, context, clock=SystemClock(), rng=random.Random(1), invited=lambda *_: None)
    await connection.close()
