"""A hub's life beside the server: it waits for it once, then goes on without it."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import stat
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from deskgrid.client.hubs import HubProgram, _address_of, _ensure_key, run_hub
from deskgrid.client.transport import Credentials
from deskgrid.clock import FakeClock
from deskgrid.errors import InvalidInput, OperatorError, Unauthenticated, Unreachable
from deskgrid.model import wire
from deskgrid.settings import HubSettings
from tests.unit.overlay.small_grid import SmallGrid

LIFETIME_S = 900.0


class Server:
    """What a hub sees of the server."""

    def __init__(self) -> None:
        self.grid = SmallGrid()
        self.asked: list[wire.RenewHub] = []
        self.error: Exception | None = None

    async def call(self, route: wire.Route[Any, Any], body: Any = None) -> Any:
        assert route is wire.RENEW_HUB
        self.asked.append(body)
        if self.error is not None:
            raise self.error
        return wire.HubAnswer(
            name="hub-1.deskgrid",
            certificate=self.grid.authority.sign("hub-1.deskgrid", body.key),
            grant_key=self.grid.grant_key_pem,
            now=0.0,
            lifetime_s=LIFETIME_S,
        )


class Play:
    """A hub program with a clock of its own."""

    def __init__(self, folder: Path) -> None:
        self.server, self.clock = Server(), FakeClock()
        self.credentials = Credentials(address="127.0.0.1:1", authority_pem=self.server.grid.authority.pem, token="t", name="lab")
        self.ready: list[str] = []
        self.key = _ensure_key(folder / "hub.key")
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        self.task: asyncio.Task[None] | None = None

    async def start(self) -> None:
        program = HubProgram(HubSettings(), self.credentials, self.key, self.server, clock=self.clock, rng=random.Random(1))
        self.task = asyncio.create_task(program.run(self.listener, "hub.example:1", ready=self.ready.append))
        await self.until(lambda: self.server.asked)

    async def until(self, holds: Any) -> None:
        async with asyncio.timeout(10):
            while not holds():
                await asyncio.sleep(0.01)

    async def certificate(self) -> bytes:
        """Return the certificate that the hub shows."""
        import ssl

        context = ssl.create_default_context(cadata=self.server.grid.authority.pem)
        _, writer = await asyncio.open_connection("127.0.0.1", self.port, ssl=context, server_hostname="hub-1.deskgrid")
        shown: bytes = writer.get_extra_info("ssl_object").getpeercert(True)
        writer.transport.abort()
        return shown


@pytest.fixture
async def play(tmp_path: Path) -> AsyncIterator[Play]:
    found = Play(tmp_path)
    yield found
    if found.task is not None:
        found.task.cancel()
        with contextlib.suppress(asyncio.CancelledError, Unauthenticated):
            await found.task
    found.listener.close()


async def test_a_hub_renews_every_third_of_its_lifetime_and_shows_the_new_certificate(play: Play):
    await play.start()
    await play.until(lambda: play.ready == ["hub.example:1"])
    first = await play.certificate()
    await play.clock.advance(LIFETIME_S / 3 - 1)
    assert len(play.server.asked) == 1
    await play.clock.advance(1)
    await play.until(lambda: len(play.server.asked) == 2)
    assert await play.certificate() != first
    assert {(request.key, request.address) for request in play.server.asked} == {(play.server.asked[0].key, "hub.example:1")}
    assert "PUBLIC" in play.server.asked[0].key and play.ready == ["hub.example:1"]


async def test_a_hub_waits_for_a_server_that_is_away_when_it_starts(play: Play):
    play.server.error = Unreachable("away")
    await play.start()
    assert not play.ready
    play.server.error = None
    await play.clock.advance(2)
    await play.until(lambda: play.ready)


async def test_a_hub_goes_on_while_the_server_is_away_and_comes_back_soon(play: Play):
    await play.start()
    await play.until(lambda: play.ready)
    play.server.error = Unreachable("away")
    await play.clock.advance(LIFETIME_S)
    assert len(play.server.asked) > 3
    assert await play.certificate()
    play.server.error = None
    before = len(play.server.asked)
    await play.clock.advance(60)
    await play.until(lambda: len(play.server.asked) > before)


async def test_a_hub_that_ends_in_good_order_says_so(play: Play):
    await play.start()
    await play.until(lambda: play.ready)
    assert play.task is not None
    play.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await play.task
    assert [request.leaving for request in play.server.asked] == [False, True]


async def test_a_hub_that_was_removed_ends(play: Play):
    await play.start()
    await play.until(lambda: play.ready)
    play.server.error = Unauthenticated("this token was revoked")
    await play.clock.advance(LIFETIME_S / 3)
    assert play.task is not None
    with pytest.raises(Unauthenticated):
        await asyncio.wait_for(play.task, 10)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", play.port), timeout=1)


def test_a_key_is_made_once_and_for_its_owner_only(tmp_path: Path):
    file = tmp_path / "hub.key"
    made = _ensure_key(file)
    assert _ensure_key(file) == made
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    file.write_text("nonsense")
    with pytest.raises(InvalidInput):
        _ensure_key(file)


async def test_a_folder_without_a_hub_says_what_to_do(tmp_path: Path):
    with pytest.raises(InvalidInput, match="hub join"):
        await run_hub(tmp_path, HubSettings())


@pytest.mark.parametrize("listen", ["", "8471", "127.0.0.1:x", "127.0.0.1:99999"])
async def test_an_address_that_is_none_is_told(tmp_path: Path, listen: str):
    (tmp_path / "credentials.json").write_text('{"address":"a:1","authority_pem":""}')
    with pytest.raises(InvalidInput, match="HOST:PORT"):
        await run_hub(tmp_path, HubSettings(listen=listen))


async def test_a_port_that_is_taken_is_told(tmp_path: Path):
    (tmp_path / "credentials.json").write_text('{"address":"a:1","authority_pem":""}')
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(OperatorError, match="cannot listen"):
        await run_hub(tmp_path, HubSettings(listen=f"127.0.0.1:{taken.getsockname()[1]}"))


def test_peers_dial_this_machines_name_if_the_hub_listens_everywhere():
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        assert _address_of(listener, "127.0.0.1:0") == f"127.0.0.1:{port}"
        assert _address_of(listener, "0.0.0.0:0") == f"{socket.getfqdn()}:{port}"
