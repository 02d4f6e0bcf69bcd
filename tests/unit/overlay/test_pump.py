from __future__ import annotations

import asyncio
import socket
import threading
from collections.abc import AsyncIterator, Callable

import pytest

from deskgrid.overlay.pump import READ, WRITE, Outcome, Pump, Pumps

from .loopback import eventually, nothing_left, tcp_pair


@pytest.fixture(params=[False, True], ids=["epoll", "portable"])
async def pumps(request: pytest.FixtureRequest) -> AsyncIterator[Pumps]:
    async with nothing_left(portable=request.param) as made:
        yield made


class Watcher:
    """A task that notes what it is told."""

    def __init__(self, sock: socket.socket | None = None, mask: int = READ, on_ready: Callable[[], None] | None = None) -> None:
        self.sock, self.mask, self.on_ready = sock, mask, on_ready
        self.seen: list[tuple[int, int]] = []
        self.reason = ""
        self.thread: threading.Thread | None = None
        self.pump: Pump | None = None
        self.done = Outcome[str]()

    def start(self, pump: Pump) -> None:
        self.pump, self.thread = pump, threading.current_thread()
        if self.sock is not None:
            pump.watch(self.sock.fileno(), self.mask, self)

    def ready(self, fd: int, mask: int) -> None:
        self.seen.append((fd, mask))
        if self.on_ready is not None:
            self.on_ready()
        self.end("ready")

    def abandon(self, reason: str) -> None:
        self.end(reason)

    def end(self, reason: str) -> None:
        if self.done.is_set:
            return
        if self.pump is not None:
            if self.sock is not None:
                self.pump.watch(self.sock.fileno(), None, self)
            self.pump.forget(self)
        self.reason = reason
        self.done.set(reason)


async def test_task_is_called_when_its_socket_is_ready(pumps: Pumps) -> None:
    near, far = tcp_pair()
    reader, writer = Watcher(near), Watcher(far, WRITE)
    pumps.carry(reader)
    pumps.carry(writer)
    assert await writer.done.wait() == "ready"
    assert not reader.seen
    far.send(b"x")
    assert await reader.done.wait() == "ready"
    assert reader.seen[0][0] == near.fileno() and reader.seen[0][1] & READ
    near.close()
    far.close()


async def test_no_thread_before_there_is_work() -> None:
    before = threading.active_count()
    pumps = Pumps(8)
    assert threading.active_count() == before
    pumps.close()


async def test_tasks_are_spread_over_the_threads(pumps: Pumps) -> None:
    watchers = [Watcher() for _ in range(6)]
    for watcher in watchers:
        pumps.carry(watcher)
    await eventually(lambda: all(watcher.thread for watcher in watchers))
    assert len({watcher.thread for watcher in watchers}) == 2
    assert len(pumps) == 6
    pumps.close()
    assert {watcher.reason for watcher in watchers} == {"closed"}


async def test_task_that_fails_harms_no_other(pumps: Pumps) -> None:
    def fail() -> None:
        raise ZeroDivisionError

    near, far = tcp_pair()
    failing, other = Watcher(far, WRITE, fail), Watcher(near)
    pumps.carry(other)
    pumps.carry(Watcher())
    pumps.carry(failing)  # with `other`, in the first thread
    assert "error" in await failing.done.wait()
    far.send(b"x")
    assert await other.done.wait() == "ready"
    pumps.close()
    near.close()
    far.close()


async def test_timers_fire_in_order_and_not_when_cancelled(pumps: Pumps) -> None:
    fired: list[int] = []
    watcher = Watcher()
    pump = pumps.carry(watcher)
    assert pump is not None

    def arm() -> None:
        pump.after(0.03, lambda: fired.append(3))
        pump.after(0.02, lambda: fired.append(2)).cancel()
        pump.after(0.01, lambda: fired.append(1))

    pump.post(arm)
    await eventually(lambda: len(fired) == 2)
    assert fired == [1, 3]
    pump.post(lambda: watcher.end("enough"))
    await watcher.done.wait()


async def test_posts_from_many_threads_are_all_done(pumps: Pumps) -> None:
    done: list[int] = []
    watcher = Watcher()
    pump = pumps.carry(watcher)
    assert pump is not None
    threads = [threading.Thread(target=lambda: [pump.post(lambda: done.append(1)) for _ in range(1000)]) for _ in range(4)]
    for thread in threads:
        thread.start()
    await eventually(lambda: len(done) == 4000 and not any(thread.is_alive() for thread in threads))
    pump.post(lambda: watcher.end("enough"))
    await watcher.done.wait()


async def test_task_for_closed_pumps_is_abandoned() -> None:
    pumps = Pumps()
    pumps.close()
    watcher = Watcher()
    assert pumps.carry(watcher) is None
    assert watcher.reason == "closed"


async def test_outcome_is_set_once_and_raises_its_error() -> None:
    outcome = Outcome[int]()
    waiting = asyncio.create_task(outcome.wait())
    await asyncio.sleep(0)
    outcome.set(error=ValueError("first"))
    outcome.set(2)
    with pytest.raises(ValueError, match="first"):
        await waiting
    with pytest.raises(ValueError, match="first"):
        await outcome.wait()


def test_outcome_survives_a_loop_that_has_ended() -> None:
    outcome = Outcome[int]()
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(outcome.wait())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    outcome.set(1)
    assert outcome.is_set
    waiting._log_destroy_pending = False  # type: ignore[attr-defined]


def test_pumps_of_a_closed_process_part_leave_no_thread() -> None:
    before = threading.active_count()
    for _ in range(5):
        pumps = Pumps()
        watchers = [Watcher() for _ in range(3)]
        for watcher in watchers:
            pumps.carry(watcher)
        pumps.close()
        assert all(watcher.done.is_set for watcher in watchers)
    assert threading.active_count() == before
