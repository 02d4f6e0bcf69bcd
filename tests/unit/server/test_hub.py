"""The hub inside the server: peers register there with what the server gave them, and it is a hub like any other."""

from __future__ import annotations

import asyncio
import ssl
import tempfile
from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deskgrid.client.grid import Grid
from deskgrid.client.peers import ServerCalls
from deskgrid.client.transport import Transport
from deskgrid.clock import FakeClock
from deskgrid.core import frames
from deskgrid.errors import Conflict, OperatorError
from deskgrid.model import wire
from deskgrid.server.hub import OwnHub
from deskgrid.server.setup import hub_address, listen_hub
from deskgrid.settings import ServerSettings
from deskgrid.testing.grids import running_grid


async def test_peer_registers_at_the_servers_hub_with_the_certificate_that_it_got(tmp_path: Path):
    async with running_grid(tmp_path / "server", hub=True) as grid:
        credentials = await grid.admin()
        key = ec.generate_private_key(ec.SECP256R1())
        public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
        async with Transport(credentials) as transport, Grid(credentials) as user:
            answer = await ServerCalls(transport).register(wire.RegisterPeer(key=public.decode()))
            [hub] = answer.hubs
            [detail] = await user.hubs()
            assert (detail.hub, detail.label, detail.alive) == (hub, "server", True)
        (tmp_path / "chain.pem").write_text(answer.certificate)
        (tmp_path / "key.pem").write_bytes(
            key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        )
        context = ssl.create_default_context(cadata=credentials.authority_pem)
        context.load_cert_chain(tmp_path / "chain.pem", tmp_path / "key.pem")
        host, _, port = hub.address.rpartition(":")
        async with asyncio.timeout(20):
            reader, writer = await asyncio.open_connection(host, int(port), ssl=context, server_hostname=hub.name)
            writer.write(frames.encode(frames.Register()))
            parser, messages = frames.FrameReader(), []
            while not messages:
                messages = parser.feed(await reader.read(1 << 14))
            writer.close()
        assert isinstance(messages[0], frames.Registered)


async def test_hub_is_the_same_after_a_restart_and_not_alive_in_between(tmp_path: Path):
    seen = []
    for hub in (True, False, True):
        async with running_grid(tmp_path / "server", hub=hub) as grid, Grid(await grid.admin()) as user:
            [detail] = await user.hubs()
            seen.append((detail.hub.name, detail.alive))
    assert seen == [("hub-1.deskgrid", True), ("hub-1.deskgrid", False), ("hub-1.deskgrid", True)]


async def test_servers_own_hub_cannot_be_removed(tmp_path: Path):
    async with running_grid(tmp_path / "server", hub=True) as grid, Grid(await grid.admin()) as user:
        with pytest.raises(Conflict, match="server's own"):
            await user.remove_hub(1)


async def test_hub_says_in_time_that_it_is_there(tmp_path: Path):
    clock = FakeClock()
    async with running_grid(tmp_path / "server", clock=clock) as grid:
        own = OwnHub(tmp_path / "server", grid.services, "127.0.0.1:1")
        with listen_hub(grid.settings, 0) as listener:
            await own.start(listener)
            renewing = asyncio.create_task(own.renew_forever())
            expiries = [await expires_at(grid)]
            async with asyncio.timeout(20):
                while len(expiries) < 4:
                    await clock.advance(grid.settings.peer_s / 3)
                    found = await expires_at(grid)
                    assert found > clock.now()
                    if found != expiries[-1]:
                        expiries.append(found)
            renewing.cancel()
            await asyncio.wait([renewing])
            await own.close()
            await own.close()


async def test_hub_renews_again_after_its_certificate_could_not_be_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    clock = FakeClock()
    async with running_grid(tmp_path / "server", clock=clock) as grid:
        own = OwnHub(tmp_path / "server", grid.services, "127.0.0.1:1")
        with listen_hub(grid.settings, 0) as listener:
            await own.start(listener)
            renewing = asyncio.create_task(own.renew_forever())
            seen = {await expires_at(grid)}
            monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
            async with asyncio.timeout(20):
                while len(seen) < 4:
                    await clock.advance(grid.settings.peer_s / 3)
                    seen.add(await expires_at(grid))
            monkeypatch.setattr(tempfile, "tempdir", None)
            assert not renewing.done()
            renewing.cancel()
            await asyncio.wait([renewing])
            await own.close()


async def expires_at(grid) -> float:
    from deskgrid.server.store.schema import hub

    return await grid.services.store.read(lambda tx: tx.value(hub.select().with_only_columns(hub.c.expires_at)))


def test_hub_takes_the_next_port_or_a_free_one_or_exactly_what_is_set():
    with listen_hub(ServerSettings(listen="127.0.0.1:0"), 0) as taken:
        port = taken.getsockname()[1]
        with listen_hub(ServerSettings(listen=f"127.0.0.1:{port - 1}"), port - 1) as other:
            assert other.getsockname()[1] != port
        with pytest.raises(OperatorError, match="cannot listen"):
            listen_hub(ServerSettings(hub_listen=f"127.0.0.1:{port}"), 1)
    settings = ServerSettings(listen=f"127.0.0.1:{port - 1}")
    with listen_hub(settings, port - 1) as found:
        assert hub_address(found, settings) == f"127.0.0.1:{port}"


@pytest.mark.parametrize(
    ("settings", "host"),
    [
        (ServerSettings(listen="127.0.0.1:8470"), "127.0.0.1"),
        (ServerSettings(listen="127.0.0.1:8470", address="grid.example.org:443"), "grid.example.org"),
        (ServerSettings(listen="127.0.0.1:8470", address="[2001:db8::1]:443"), "[2001:db8::1]"),
    ],
)
def test_peers_dial_the_hub_where_they_dial_the_server(settings: ServerSettings, host: str):
    with listen_hub(ServerSettings(listen="127.0.0.1:0"), 0) as found:
        assert hub_address(found, settings) == f"{host}:{found.getsockname()[1]}"
        elsewhere = ServerSettings(hub_address="hub.example.org:1")
        assert hub_address(found, elsewhere) == "hub.example.org:1"
