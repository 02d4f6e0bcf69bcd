"""Peers reach each other's services, with real hubs and real TLS."""

from __future__ import annotations

import asyncio
import random
import socket
import ssl
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from deskgrid.core.opening import MOST_DATA_BYTES, Answer
from deskgrid.errors import Conflict, DeskgridError, Forbidden, NotFound, ProtocolError, Unreachable
from deskgrid.model.overlay import ConnectionPath
from deskgrid.overlay.called import Callee
from deskgrid.overlay.peer import Dial, Peer
from deskgrid.settings import PeerSettings
from tests.unit.overlay.small_grid import CallsOf, SmallGrid, echo_service, exchange, pair


@pytest.fixture
async def grid() -> AsyncIterator[SmallGrid]:
    async with SmallGrid() as grid:
        yield grid


@pytest.fixture
async def echo() -> AsyncIterator[Dial]:
    service, dial = await echo_service()
    yield dial
    service.close()


async def eventually(is_so: Callable[[], bool], limit_s: float = 10.0) -> None:
    async with asyncio.timeout(limit_s):
        while not is_so():
            await asyncio.sleep(0.01)


def only(*paths: str) -> PeerSettings:
    return PeerSettings(listen="127.0.0.1:0", paths=paths)


async def two(grid: SmallGrid, echo: Dial, settings: PeerSettings | None = None, *, loopback: bool = False) -> tuple[Peer, Peer]:
    """Return a caller and a peer that offers an echo, registered at a hub."""
    if not grid.hubs:
        await grid.start_hub()
    called = await grid.peer("b", await grid.endpoint(settings, loopback=loopback), {"echo": echo})
    caller = await grid.peer("a", await grid.endpoint(settings, loopback=loopback))
    await called.ready(5)
    await caller.ready(5)
    return caller, called


async def talk(caller: Peer, *, service: str = "echo.b", wait_s: float = 0.0) -> ConnectionPath:
    """Make a connection, exchange some bytes, and return the path it took."""
    local, program = await pair()
    with local, program:
        before = set(caller.connections())
        stream = await caller.connect(service, local, wait_s=wait_s)
        path = next(one.path for one in caller.connections() if one not in before)
        async with asyncio.timeout(10):
            assert await exchange(program, b"hello" * 50_000) == b"hello" * 50_000
            assert await stream.wait_closed() == "finished"
        return path


async def test_peers_on_loopback_talk_through_the_hub_because_loopback_is_never_dialled(grid: SmallGrid, echo: Dial) -> None:
    caller, called = await two(grid, echo)
    assert await talk(caller) is ConnectionPath.RELAYED
    await eventually(lambda: not caller.connections() and not called.connections())


@pytest.mark.parametrize("path", ["direct", "reverse", "punched", "relayed"])
async def test_each_path_carries_a_stream(grid: SmallGrid, echo: Dial, path: str) -> None:
    caller, _ = await two(grid, echo, only(path), loopback=True)
    for _ in range(2):
        assert await talk(caller) == path


async def test_a_direct_path_is_preferred_to_the_relay(grid: SmallGrid, echo: Dial) -> None:
    caller, _ = await two(grid, echo, loopback=True)
    assert await talk(caller) is not ConnectionPath.RELAYED


async def test_a_target_reached_directly_is_dialled_again_without_hub_and_server(grid: SmallGrid, echo: Dial) -> None:
    caller, _ = await two(grid, echo, only("direct"), loopback=True)
    await talk(caller)
    asked = grid.asked
    await grid.stop_hub("hub-1.deskgrid")
    assert await talk(caller) is ConnectionPath.DIRECT
    assert grid.asked == asked


async def test_direct_streams_live_on_when_the_hub_dies_and_peers_move_to_another(grid: SmallGrid, echo: Dial) -> None:
    caller, called = await two(grid, echo, only("direct"), loopback=True)
    local, program = await pair()
    stream = await caller.connect("echo.b", local)
    await grid.start_hub(2)
    await asyncio.gather(*(peer.offer("another", echo) for peer in (caller, called)))  # any renewal tells them of the new hub
    await grid.stop_hub("hub-1.deskgrid")
    await eventually(lambda: grid.find("b").request.hub == "hub-2.deskgrid")  # type: ignore[union-attr]
    with program:
        assert await exchange(program, b"still here") == b"still here"
    assert await stream.wait_closed() == "finished"
    assert await talk(caller, wait_s=5) is ConnectionPath.DIRECT


async def test_a_hub_that_starts_after_the_peers_is_found(grid: SmallGrid, echo: Dial) -> None:
    called = await grid.peer("b", await grid.endpoint(), {"echo": echo})
    caller = await grid.peer("a", await grid.endpoint())
    with pytest.raises(Unreachable):
        await called.ready(0.05)
    await grid.start_hub()
    await called.ready(10)
    assert await talk(caller) is ConnectionPath.RELAYED


async def test_a_peer_at_another_hub_is_called_there(grid: SmallGrid, echo: Dial) -> None:
    await grid.start_hub(1)
    called = await grid.peer("b", await grid.endpoint(), {"echo": echo})
    await called.ready(5)
    first = grid.hubs.pop("hub-1.deskgrid")
    second = await grid.start_hub(2)
    caller = await grid.peer("a", await grid.endpoint())
    await caller.ready(5)
    grid.hubs["hub-1.deskgrid"] = first
    assert await talk(caller) is ConnectionPath.RELAYED
    assert grid.find("a").request.hub == "hub-2.deskgrid"  # type: ignore[union-attr]
    assert (first[1].peers, second.peers) == (2, 1)


async def test_the_nearest_hub_wins_and_a_dead_one_does_no_harm(grid: SmallGrid, echo: Dial) -> None:
    await grid.start_hub(1)
    hub, server = grid.hubs["hub-1.deskgrid"]
    with socket.create_server(("127.0.0.1", 0)) as silent:
        dead = hub.__class__(name="hub-9.deskgrid", address=f"127.0.0.1:{silent.getsockname()[1]}")
        grid.hubs["hub-9.deskgrid"] = (dead, server)
        peer = await grid.peer("b", await grid.endpoint(), {"echo": echo})
        await peer.ready(5)
        assert grid.find("b").request.hub == "hub-1.deskgrid"  # type: ignore[union-attr]
        await grid.stack.aclose()
        del grid.hubs["hub-9.deskgrid"]


async def test_a_peer_that_comes_later_is_waited_for(grid: SmallGrid, echo: Dial) -> None:
    await grid.start_hub()
    caller = await grid.peer("a", await grid.endpoint())
    talking = asyncio.create_task(talk(caller, wait_s=10))
    await eventually(lambda: grid.asked >= 1)
    await grid.peer("b", await grid.endpoint(), {"echo": echo})
    assert await talking is ConnectionPath.RELAYED


async def test_a_service_that_starts_later_is_waited_for(grid: SmallGrid, echo: Dial) -> None:
    started, dialled = asyncio.Event(), asyncio.Event()

    async def late() -> socket.socket:
        dialled.set()
        await started.wait()
        return await echo()

    caller, _ = await two(grid, late)
    talking = asyncio.create_task(talk(caller, wait_s=10))
    await dialled.wait()
    started.set()
    assert await talking is ConnectionPath.RELAYED


@pytest.mark.parametrize("size", [1, MOST_DATA_BYTES, 100_000])
@pytest.mark.parametrize("late_s", [0.0, 0.2])
async def test_what_a_program_said_before_its_service_was_reached_comes_first_and_once(
    grid: SmallGrid, echo: Dial, size: int, late_s: float
) -> None:
    async def late() -> socket.socket:
        await asyncio.sleep(late_s)
        return await echo()

    caller, _ = await two(grid, late)
    local, program = await pair()
    said = random.Random(size).randbytes(size)
    with program:
        await asyncio.get_running_loop().sock_sendall(program, said)
        stream = await caller.connect("echo.b", local, wait_s=5)
        assert await exchange(program, b"more") == said + b"more"
        assert await stream.wait_closed() == "finished"
    assert (stream.sent_bytes, stream.received_bytes) == (size + 4, size + 4)


class Loser:
    """Stands in for what answers a caller: the connection breaks instead, the first time."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.lost = 0
        self._answer = Callee._answer
        loser = self

        async def lose(callee: Callee, tls: ssl.SSLSocket, answer: Answer) -> None:
            if loser.lost:
                await loser._answer(callee, tls, answer)
            else:
                loser.lost += 1
                tls.close()
                raise Unreachable("lost")

        monkeypatch.setattr(Callee, "_answer", lose)


async def test_first_bytes_that_may_have_arrived_are_not_sent_again(
    grid: SmallGrid, echo: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, _ = await two(grid, echo)
    loser = Loser(monkeypatch)
    local, program = await pair()
    with local, program:
        program.send(b"pay")
        with pytest.raises(ProtocolError, match="may have got"):
            await caller.connect("echo.b", local, wait_s=30)
    assert loser.lost == 1


async def test_a_called_peer_lost_before_anything_was_said_is_tried_again(
    grid: SmallGrid, echo: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    caller, _ = await two(grid, echo)
    loser = Loser(monkeypatch)
    local, program = await pair()
    with program:
        await caller.connect("echo.b", local, wait_s=30)
        assert await exchange(program, b"hello") == b"hello"
    assert loser.lost == 1


async def test_a_caller_that_gives_up_ends_the_wait_for_its_service(grid: SmallGrid, echo: Dial) -> None:
    dialled, gave_up = asyncio.Event(), asyncio.Event()

    async def never() -> socket.socket:
        dialled.set()
        try:
            return await asyncio.get_running_loop().create_future()
        except asyncio.CancelledError:
            gave_up.set()
            raise

    caller, _ = await two(grid, never)
    talking = asyncio.create_task(talk(caller, wait_s=60))
    await dialled.wait()
    talking.cancel()
    await asyncio.wait_for(gave_up.wait(), 5)


@pytest.mark.parametrize("error", [Forbidden("no"), NotFound("none"), Unreachable("away"), OSError("broken")])
async def test_what_goes_wrong_at_the_service_is_told_to_the_caller(grid: SmallGrid, error: Exception) -> None:
    async def fails() -> socket.socket:
        raise error

    caller, _ = await two(grid, fails)
    local, program = await pair()
    with local, program:
        with pytest.raises(type(error) if isinstance(error, DeskgridError) else Unreachable):
            await caller.connect("echo.b", local)
        assert local.fileno() >= 0, "it is still the caller's"


async def test_a_service_that_is_not_offered_is_not_found(grid: SmallGrid, echo: Dial) -> None:
    caller, called = await two(grid, echo)
    with pytest.raises(Unreachable, match="no service"):  # the hub carries the reason, not its kind
        await talk(caller, service="web.b")
    await called.offer("web", echo)
    await talk(caller, service="web.b")
    await called.withdraw("web")
    with pytest.raises(DeskgridError):
        await talk(caller, service="web.b")


async def test_what_the_server_refuses_is_refused(grid: SmallGrid, echo: Dial) -> None:
    caller, _ = await two(grid, echo)
    with pytest.raises(NotFound):
        await talk(caller, service="web.nobody", wait_s=10)


async def test_a_peer_that_is_not_there_is_not_waited_for_unless_asked(grid: SmallGrid, echo: Dial) -> None:
    caller, _ = await two(grid, echo)
    with pytest.raises(Unreachable, match="not there"):
        await talk(caller, service="web.c")


async def test_a_service_that_moved_is_found_again(grid: SmallGrid, echo: Dial) -> None:
    await grid.start_hub()
    caller = await grid.peer("a", await grid.endpoint(loopback=True))
    async with Peer(await grid.endpoint(loopback=True), _calls(grid, "b"), offers={"echo": echo}) as old:
        await old.ready(5)
        await talk(caller)
    moved = await grid.peer("b", await grid.endpoint(loopback=True), {"echo": echo})
    await moved.ready(5)
    await talk(caller)


async def test_several_peers_share_an_endpoint(grid: SmallGrid, echo: Dial) -> None:
    await grid.start_hub()
    endpoint = await grid.endpoint(only("direct"), loopback=True)
    called = [await grid.peer(name, endpoint, {"echo": echo}) for name in ("b", "c", "d")]
    caller = await grid.peer("a", endpoint)
    await asyncio.gather(*(peer.ready(5) for peer in called))
    for name in ("c", "b", "d"):
        assert await talk(caller, service=f"echo.{name}") is ConnectionPath.DIRECT


async def test_stream_that_has_ended_is_no_connection_before_anybody_was_told(grid: SmallGrid, echo: Dial) -> None:
    caller, called = await two(grid, echo)
    local, program = await pair()
    with program:
        stream = await caller.connect("echo.b", local)
        assert [one.service for one in caller.connections()] == ["echo.b"]
        stream.abort()
        deadline = time.monotonic() + 10
        while not stream.is_closed and time.monotonic() < deadline:
            time.sleep(0.001)  # the event loop stands still: it hears nothing of what its threads do
        assert caller.connections() == ()
    await eventually(lambda: not called.connections())


async def test_many_connect_at_once_with_one_grant(grid: SmallGrid, echo: Dial) -> None:
    caller, called = await two(grid, echo, loopback=True)
    paths = await asyncio.gather(*(_talk_at_once(caller) for _ in range(100)))
    assert set(paths) <= {"finished"}
    assert grid.asked == 1
    await eventually(lambda: not called.connections())


async def _talk_at_once(caller: Peer) -> str:
    local, program = await pair()
    with program:
        stream = await caller.connect("echo.b", local)
        assert await exchange(program, b"x" * 1000) == b"x" * 1000
        return await stream.wait_closed()


async def test_calls_that_are_no_streams_yet_are_bounded_with_the_streams(
    grid: SmallGrid, echo: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deskgrid.overlay.peer.MOST_STREAMS", 2)
    caller, _ = await two(grid, echo)
    (local, program), (other, waiting), (third, refused) = [await pair() for _ in range(3)]
    with program, other, waiting, third, refused:
        await caller.connect("echo.b", local)
        calling = asyncio.create_task(caller.connect("echo.late", other, wait_s=60))
        await eventually(lambda: caller._connecting == 1)
        with pytest.raises(Conflict):
            await caller.connect("echo.b", third)
        calling.cancel()
        await asyncio.wait({calling})
    await eventually(lambda: not caller.connections())
    assert await talk(caller) is ConnectionPath.RELAYED


async def test_a_peer_that_hides_its_address_dials_hubs_only(grid: SmallGrid, echo: Dial) -> None:
    hidden = PeerSettings(listen="127.0.0.1:0", relay_only=True)
    await grid.start_hub()
    endpoint = await grid.endpoint(hidden, loopback=True)
    called = await grid.peer("b", endpoint, {"echo": echo})
    caller = await grid.peer("a", await grid.endpoint(loopback=True))
    await called.ready(5)
    assert endpoint.port == 0
    assert await talk(caller) is ConnectionPath.RELAYED


async def test_a_peer_renews_itself_and_reports_what_it_carries(
    grid: SmallGrid, echo: Dial, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("deskgrid.overlay.peer._REPORT_S", 0.1)
    grid.lifetime_s = 1.5
    caller, _ = await two(grid, echo)
    local, program = await pair()
    await caller.connect("echo.b", local)
    await eventually(lambda: bool(grid.find("a").request.connections))  # type: ignore[union-attr]
    (seen,) = grid.find("a").request.connections  # type: ignore[union-attr]
    assert (seen.service, seen.outgoing, seen.path) == ("echo.b", True, ConnectionPath.RELAYED)
    program.close()
    await eventually(lambda: not grid.find("a").request.connections)  # type: ignore[union-attr]
    before = grid.registered
    await eventually(lambda: grid.registered > before)


async def test_a_server_that_is_away_stops_new_grants_only(grid: SmallGrid, echo: Dial) -> None:
    grid.lifetime_s = 1.5
    caller, _ = await two(grid, echo)
    await talk(caller)
    grid.is_away = True
    assert await talk(caller) is ConnectionPath.RELAYED, "the grant is still valid"
    with pytest.raises(Unreachable):
        await talk(caller, service="other.b")
    talking = asyncio.create_task(talk(caller, service="echo.c", wait_s=10))
    await grid_back(grid, echo)
    await talking


async def grid_back(grid: SmallGrid, echo: Dial) -> None:
    grid.is_away = False
    await grid.peer("c", await grid.endpoint(), {"echo": echo})


async def test_leaving_ends_streams_and_is_told_to_the_server(grid: SmallGrid, echo: Dial) -> None:
    await grid.start_hub()
    called = await grid.peer("b", await grid.endpoint(), {"echo": echo})
    await called.ready(5)
    local, program = await pair()
    async with Peer(await grid.endpoint(), calls := _calls(grid, "a")) as caller:
        await caller.connect("echo.b", local)
    assert calls.removed == 1
    assert not caller.connections()
    with program, pytest.raises(ConnectionResetError):
        await asyncio.get_running_loop().sock_recv(program, 1)
    await eventually(lambda: not called.connections())


async def test_what_was_sent_before_leaving_arrives_if_it_is_let_finish(grid: SmallGrid) -> None:
    last_words = bytes(3_000_000)

    async def speaks_and_goes() -> socket.socket:
        local, program = await pair()
        asyncio.get_running_loop().run_in_executor(None, _say, program, last_words)
        return local

    await grid.start_hub()
    local, program = await pair()
    async with Peer(await grid.endpoint(), _calls(grid, "b"), offers={"bye": speaks_and_goes}) as called:
        await called.ready(5)
        caller = await grid.peer("a", await grid.endpoint())
        await caller.connect("bye.b", local)
        hearing = asyncio.create_task(_hear(program))
        await eventually(lambda: hearing.done() or bool(called.connections()))
        await called.finish_streams(30)
    assert await hearing == last_words


async def test_a_stream_that_does_not_finish_is_waited_for_no_longer_than_said(grid: SmallGrid, echo: Dial) -> None:
    caller, called = await two(grid, echo)
    local, program = await pair()
    await caller.connect("echo.b", local)
    with program:
        await eventually(lambda: bool(called.connections()))
        await called.finish_streams(0.05)
        assert called.connections()


async def _hear(program: socket.socket) -> bytes:
    heard = bytearray()
    with program:
        while data := await asyncio.get_running_loop().sock_recv(program, 1 << 16):
            heard += data
    return bytes(heard)


def _say(program: socket.socket, words: bytes) -> None:
    with program:
        program.setblocking(True)
        program.sendall(words)


async def test_a_peer_may_be_entered_again_after_the_server_was_away(grid: SmallGrid, echo: Dial) -> None:
    grid.is_away = True
    peer = Peer(await grid.endpoint(), _calls(grid, "b"), offers={"echo": echo})
    with pytest.raises(Unreachable):
        await peer.__aenter__()
    grid.is_away = False
    await grid.start_hub()
    async with peer:
        await peer.ready(5)


def _calls(grid: SmallGrid, name: str) -> CallsOf:
    return CallsOf(grid, name)


async def test_peer_renews_again_after_its_certificate_could_not_be_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    async with SmallGrid(lifetime_s=1.5) as grid:
        await grid.start_hub()
        peer = await grid.peer("a", await grid.endpoint())
        await peer.ready(5)
        before = grid.registered
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "missing"))
        await eventually(lambda: grid.registered > before)
        monkeypatch.setattr(tempfile, "tempdir", None)
        before = grid.registered
        await eventually(lambda: grid.registered >= before + 2)


async def test_server_that_was_away_hears_soon_of_another_hub(grid: SmallGrid):
    grid.lifetime_s = 600.0
    await grid.start_hub(1)
    await grid.start_hub(2)
    peer = await grid.peer("a", await grid.endpoint())
    await peer.ready(5)
    (known,) = grid.known.values()
    old = known.request.hub
    grid.is_away = True
    await grid.stop_hub(old)
    await eventually(lambda: grid.refused > 0)
    grid.is_away = False
    await eventually(lambda: grid.known[known.id].request.hub not in ("", old))


async def test_peer_leaves_a_hub_that_the_server_knows_no_longer(grid: SmallGrid, echo: Dial):
    grid.lifetime_s = 1.5
    caller, _ = await two(grid, echo)
    await grid.start_hub(2)
    _, abandoned = grid.hubs.pop("hub-1.deskgrid")
    try:
        await eventually(lambda: {one.request.hub for one in grid.known.values()} == {"hub-2.deskgrid"})
        await talk(caller)
    finally:
        await abandoned.close()
