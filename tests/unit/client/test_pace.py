"""A bound on the network holds for transfers and for streams, in any number of pieces and threads."""

from __future__ import annotations

import asyncio
import socket
import threading
import time

import pytest

from deskgrid.client import pace as pace_module
from deskgrid.client.pace import Pace
from deskgrid.overlay.pump import READ, Pump, Pumps


class Ticking:
    """A clock for the module that only tests move."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 100.0
        monkeypatch.setattr(pace_module.time, "monotonic", lambda: self.now)


def test_what_went_too_fast_is_owed(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Ticking(monkeypatch)
    pace = Pace(1000)
    assert pace.spend(200) == 0.0
    assert pace.spend(500) == pytest.approx(0.5)
    clock.now += 0.25
    assert pace.spend(0) == pytest.approx(0.25)
    clock.now += 0.25
    assert pace.spend(0) == 0.0


def test_threads_share_one_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    Ticking(monkeypatch)
    pace = Pace(1000)
    threads = [threading.Thread(target=lambda: [pace.spend(1) for _ in range(1000)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert pace.spend(0) == pytest.approx((8000 - 200) / 1000)


async def test_keep_returns_when_more_may_go(monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []

    async def sleep(seconds: float) -> None:
        slept.append(seconds)

    Ticking(monkeypatch)
    monkeypatch.setattr(asyncio, "sleep", sleep)
    await Pace(1000).keep(700)
    assert slept == [pytest.approx(0.5)]


class Drain:
    """A task that takes what comes."""

    def __init__(self, end: socket.socket) -> None:
        self.end, self.taken, self.over = end, 0, threading.Event()
        self.pump: Pump | None = None

    def start(self, pump: Pump) -> None:
        self.pump = pump
        pump.watch(self.end.fileno(), READ, self)

    def ready(self, fd: int, mask: int) -> None:
        assert self.pump is not None
        size = len(self.end.recv(1000))
        self.taken += size
        self.pump.count(size)
        if not size:
            self.pump.watch(self.end.fileno(), None, self)
            self.pump.forget(self)
            self.over.set()

    def abandon(self, reason: str) -> None:
        self.over.set()


def test_threads_that_carry_streams_rest_when_enough_has_gone() -> None:
    asked: list[int] = []
    owed = [0.02] * 5

    def pace(size: int) -> float:
        asked.append(size)
        return owed.pop() if owed and not size else 0.0

    pumps = Pumps(1, pace=pace)
    near, far = socket.socketpair()
    far.setblocking(False)
    task = Drain(far)
    try:
        pumps.carry(task)
        began = time.monotonic()
        near.sendall(b"x" * 10_000)
        near.close()
        assert task.over.wait(10)
        assert sum(asked) == task.taken == 10_000
        assert not owed and time.monotonic() - began >= 0.1
    finally:
        pumps.close()
        far.close()
