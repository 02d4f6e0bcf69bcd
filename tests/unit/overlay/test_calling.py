"""The calling side, where hubs are slow or impatient."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import AsyncIterator

import pytest

from deskgrid.model.overlay import ConnectionPath
from deskgrid.overlay.called import Callee
from deskgrid.overlay.peer import Dial
from deskgrid.overlay.race import Race
from deskgrid.settings import HubSettings
from tests.unit.overlay.small_grid import SmallGrid, echo_service, pair
from tests.unit.overlay.test_peer import eventually, only, talk, two


@pytest.fixture
async def echo() -> AsyncIterator[Dial]:
    service, dial = await echo_service()
    yield dial
    service.close()


async def test_a_relay_dialled_early_is_dialled_again_if_the_hub_would_not_wait(
    echo: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with SmallGrid(hub_settings=HubSettings(ping_s=5.0, handshake_s=0.5)) as grid:
        caller, _ = await two(grid, echo, only("relayed"))
        _, hub = grid.hubs["hub-1.deskgrid"]

        async def slow(*_: object) -> None:
            await eventually(lambda: len(hub._newcomers) == 1)
            await eventually(lambda: len(hub._newcomers) == 0)

        monkeypatch.setattr(Callee, "_hole", slow)
        assert await talk(caller) is ConnectionPath.RELAYED


async def test_a_caller_cancelled_just_after_its_way_won_leaves_no_connection(echo: Dial, monkeypatch: pytest.MonkeyPatch) -> None:
    won: list[ssl.SSLSocket] = []
    closing = asyncio.Event()
    close = Race.close

    async def slow_close(race: Race) -> None:
        if race._won.done():
            won.append(race._won.result().tls)
            closing.set()
        try:
            await asyncio.Event().wait()
        finally:
            await close(race)

    async with SmallGrid() as grid:
        caller, _ = await two(grid, echo, only("direct"), loopback=True)
        monkeypatch.setattr(Race, "close", slow_close)
        local, program = await pair()
        with local, program:
            connecting = asyncio.create_task(caller.connect("echo.b", local))
            await closing.wait()
            connecting.cancel()
            await asyncio.wait([connecting])
        assert won[0].fileno() == -1
        monkeypatch.undo()


async def test_a_peer_whose_calls_hang_leaves_room_for_the_others_of_its_endpoint(echo: Dial) -> None:
    """A guest may begin as many connections as it likes; the jobs beside it on the worker still get theirs."""
    async with SmallGrid() as grid:
        honest, _ = await two(grid, echo)
        greedy = await grid.peer("c", honest._endpoint)
        stuck = await grid.peer("d", await grid.endpoint(), {"echo": echo})
        for peer in (greedy, stuck):
            await peer.ready(5)

        async def never(*_: object) -> None:
            await asyncio.Event().wait()

        stuck._callee._hole = never  # type: ignore[method-assign, assignment]
        pairs = [await pair() for _ in range(150)]
        calls = [asyncio.create_task(greedy.connect("echo.d", local)) for local, _ in pairs]
        await eventually(lambda: len(stuck._callee._invitations) >= 64)
        async with asyncio.timeout(5):
            await talk(honest)
        for call in calls:
            call.cancel()
        await asyncio.wait(calls)
        for sock in (sock for both in pairs for sock in both):
            sock.close()
