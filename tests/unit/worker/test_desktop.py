"""What desktops tell, over a real message bus with services that answer as GNOME's, KDE's and the login service do."""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from dbus_fast import Message, Variant
from dbus_fast.aio import MessageBus

from deskgrid.clock import FakeClock
from deskgrid.core.owner import Rules
from deskgrid.worker import desktop, desktop_x11
from deskgrid.worker.desktop import LinuxDesktop
from deskgrid.worker.desktop_x11 import Screen, XServer
from deskgrid.worker.presence import Presented, Sight, busy_seconds, combine, terminals_idle_s

ME = os.getuid()


@pytest.fixture
def bus(tmp_path: Path) -> Iterator[str]:
    """A message bus of our own; its address."""
    config = tmp_path / "bus.conf"
    config.write_text(
        f"<busconfig><type>session</type><listen>unix:path={tmp_path}/bus</listen><auth>EXTERNAL</auth>"
        '<policy context="default"><allow send_destination="*" eavesdrop="true"/><allow eavesdrop="true"/><allow own="*"/></policy></busconfig>'
    )
    daemon = subprocess.Popen(
        ["dbus-daemon", "--nofork", "--print-address", f"--config-file={config}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert daemon.stdout is not None
        yield daemon.stdout.readline().decode().strip()
    finally:
        daemon.kill()
        daemon.communicate()


@asynccontextmanager
async def service(
    address: str, name: str, answers: dict[str, tuple[str, list[Any]]]
) -> AsyncIterator[dict[str, tuple[str, list[Any]]]]:
    """Answer calls of these methods (as member or path:member) by signature and values."""
    connection = await MessageBus(address).connect()

    def answer(message: Message) -> Message | None:
        found = answers.get(f"{message.path}:{message.member}") or answers.get(str(message.member))
        return Message.new_method_return(message, *found) if found else None

    connection.add_message_handler(answer)
    await connection.request_name(name)
    try:
        yield answers
    finally:
        connection.disconnect()


@asynccontextmanager
async def looking(**environment: str) -> AsyncIterator[LinuxDesktop]:
    found = LinuxDesktop({"DBUS_SYSTEM_BUS_ADDRESS": "unix:path=/nowhere", **environment})
    try:
        yield found
    finally:
        await found.close()


async def test_gnome_tells_how_long_nobody_was_there_and_that_a_film_is_on(bus: str) -> None:
    monitor = service(bus, "org.gnome.Mutter.IdleMonitor", {"GetIdletime": ("t", [61_500])})
    async with looking(DBUS_SESSION_BUS_ADDRESS=bus) as seen, monitor as answers:
        assert await seen.look() == Presented(61.5)
        answers["GetIdletime"] = ("t", [0])
        async with service(bus, "org.gnome.SessionManager", {"IsInhibited": ("b", [True])}):
            assert await seen.look() == Presented(0.0, full_screen=True)
            assert await seen.look(idle=False) == Presented(None, full_screen=True)
        assert await seen.look() == Presented(0.0)


async def test_other_desktops_tell_by_the_screen_saver(bus: str) -> None:
    async with (
        looking(DBUS_SESSION_BUS_ADDRESS=bus) as seen,
        service(bus, "org.freedesktop.ScreenSaver", {"GetSessionIdleTime": ("u", [4000])}),
    ):
        assert await seen.look() == Presented(4.0)


def session(user: int, **properties: Any) -> dict[str, Variant]:
    kinds = {str: "s", bool: "b", int: "t"}
    whole = {"Type": "wayland", "Class": "user", "Remote": False, "IdleHint": False, "IdleSinceHint": 0, **properties}
    return {name: Variant(kinds[type(value)], value) for name, value in whole.items()}


def login(*sessions: tuple[int, dict[str, Variant]]) -> dict[str, tuple[str, list[Any]]]:
    listed = [[str(number), user, "name", "seat0", f"/session/{number}"] for number, (user, _) in enumerate(sessions)]
    answers: dict[str, tuple[str, list[Any]]] = {"ListSessions": ("a(susso)", [listed])}
    for number, (_, properties) in enumerate(sessions):
        answers[f"/session/{number}:GetAll"] = ("a{sv}", [properties])
    return answers


async def test_login_service_tells_of_sessions_that_we_may_not_ask(bus: str) -> None:
    hour_ago = int((time.time() - 3600) * 1e6)
    sessions = login(
        (ME, session(ME, IdleHint=True, IdleSinceHint=hour_ago)),
        (ME, session(ME, Type="tty")),
        (ME, session(ME, Remote=True)),
        (0, session(0, Class="greeter")),
    )
    async with looking(DBUS_SYSTEM_BUS_ADDRESS=bus) as seen, service(bus, "org.freedesktop.login1", sessions):
        told = await seen.look()
        assert told is not None and told.idle_s is None
        assert told.others_idle_s == (pytest.approx(3600, abs=60),)


async def test_somebody_elses_session_that_is_used_counts_beside_ours_that_rests(bus: str) -> None:
    sessions = login((ME, session(ME)), (ME + 1, session(ME + 1)))
    async with (
        looking(DBUS_SYSTEM_BUS_ADDRESS=bus, DBUS_SESSION_BUS_ADDRESS=bus) as seen,
        service(bus, "org.freedesktop.login1", sessions),
        service(bus, "org.gnome.Mutter.IdleMonitor", {"GetIdletime": ("t", [100_000])}),
    ):
        told = await seen.look()
        assert told == Presented(100.0, others_idle_s=(0.0,))
        assert combine(told, math.inf) == 0.0


@pytest.mark.parametrize(("connected", "wanted"), [(True, None), (False, Presented())])
async def test_pc_with_a_screen_of_which_nobody_tells_cannot_be_judged(
    monkeypatch: pytest.MonkeyPatch, connected: bool, wanted: Presented | None
) -> None:
    monkeypatch.setattr(desktop, "_has_screen", lambda: connected)
    async with looking() as seen:
        assert await seen.look() == wanted


async def test_bus_that_does_not_answer_costs_a_second_at_most(bus: str, tmp_path: Path) -> None:
    stuck = await asyncio.start_unix_server(lambda _reader, _writer: asyncio.sleep(3600), tmp_path / "stuck")
    address = f"unix:path={tmp_path}/stuck"
    async with looking(DBUS_SESSION_BUS_ADDRESS=address, DBUS_SYSTEM_BUS_ADDRESS=bus) as seen:
        async with asyncio.timeout(10):
            for _ in range(20):
                await seen.look()
    stuck.close()


# ---- an X server that hangs


@pytest.fixture
def stuck() -> Iterator[tuple[str, socket.socket]]:
    """An X server that accepts and never answers; its name and where it listens."""
    with socket.socket(socket.AF_UNIX) as listener:
        number = next(number for number in range(1000, 2000) if bound(listener, f"\0/tmp/.X11-unix/X{number}"))
        listener.listen()
        listener.setblocking(False)
        yield f":{number}", listener


def bound(listener: socket.socket, address: str) -> bool:
    with contextlib.suppress(OSError):
        listener.bind(address)
        return True
    return False


async def test_x_server_that_hangs_cannot_tell_who_is_there_and_is_asked_once(
    stuck: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, listener = stuck
    monkeypatch.setattr(desktop_x11, "_LOOK_S", 0.1)
    monkeypatch.setattr(desktop, "_has_screen", lambda: False)
    async with asyncio.timeout(10):
        async with looking(DISPLAY=name) as seen:
            for _ in range(20):
                assert await seen.look() is None
            assert await seen.look(idle=False) == Presented()
        listener.accept()[0].close()
    with pytest.raises(BlockingIOError):
        listener.accept()


async def test_x_server_that_hung_is_asked_again_when_it_has_answered(
    stuck: tuple[str, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    name, listener = stuck
    monkeypatch.setattr(desktop_x11, "_LOOK_S", 0.1)
    screen = Screen(XServer(name))
    async with asyncio.timeout(10):
        await screen.look()
        listener.accept()[0].close()
        while screen.hangs:
            await asyncio.sleep(0.01)
        await screen.look()
        listener.accept()[0].close()


async def test_what_filled_the_screen_still_does_while_the_x_server_hangs(monkeypatch: pytest.MonkeyPatch) -> None:
    class Busy(XServer):
        def __init__(self) -> None:
            self.free = threading.Event()

        def look(self) -> Presented | None:
            self.free.wait()
            return Presented(5.0, full_screen=True)

    monkeypatch.setattr(desktop_x11, "_LOOK_S", 0.1)
    server = Busy()
    screen = Screen(server)
    server.free.set()
    assert await screen.look() == Presented(5.0, full_screen=True)
    server.free.clear()
    assert await screen.look() == Presented(None, full_screen=True)
    server.free.set()


def test_process_that_asked_an_x_server_that_hangs_ends(stuck: tuple[str, socket.socket]) -> None:
    program = """
import asyncio, sys
from deskgrid.worker.desktop import LinuxDesktop

async def look():
    desktop = LinuxDesktop({"DISPLAY": sys.argv[1]})
    await desktop.look(idle=False)
    await desktop.close()

asyncio.run(look())
"""
    subprocess.run([sys.executable, "-c", program, stuck[0]], check=True, timeout=30)


# ---- all together


class Told:
    def __init__(self, *told: Presented | None) -> None:
        self.told = list(told)

    async def look(self, *, idle: bool = True) -> Presented | None:
        return self.told.pop(0)

    async def close(self) -> None:
        pass


@pytest.mark.parametrize(
    ("told", "terminals_s", "idle_s"),
    [
        (None, 5.0, None),
        (Presented(), math.inf, math.inf),
        (Presented(30.0), 100.0, 30.0),
        (Presented(30.0), 10.0, 10.0),
        (Presented(None, others_idle_s=(50.0, 20.0)), 100.0, 20.0),
    ],
)
def test_who_used_the_pc_last_counts(told: Presented | None, terminals_s: float, idle_s: float | None) -> None:
    assert combine(told, terminals_s) == idle_s


async def test_what_no_rule_asks_for_is_not_looked_at() -> None:
    def never(*_: object) -> Any:
        raise AssertionError("nobody asked for that")

    sight = Sight(Rules(on_battery=True, full_screen=True), FakeClock(), desktop=Told(), terminals=never, plugged=never, busy=never)
    seen = await sight.look()
    assert (seen.idle_s, seen.busy_cpus, seen.on_battery, seen.full_screen) == (None, None, False, False)


async def test_load_is_what_was_used_since_the_look_before() -> None:
    clock, used = FakeClock(), [100.0, 103.0, 103.0]
    sight = Sight(Rules(busy_cpus=1.0, full_screen=True), clock, desktop=Told(), busy=lambda: used.pop(0), plugged=lambda: True)
    loads = []
    for _ in range(3):
        loads.append((await sight.look()).busy_cpus)
        await clock.advance(2.0)
    assert loads == [0.0, 1.5, 0.0]


def test_programs_of_low_priority_are_not_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The system counts what they use apart, and that is left out. (What ordinary programs use meanwhile is not in a test's hands.)"""
    apart, used = psutil.cpu_times().nice, resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime
    subprocess.run(["nice", "-n", "19", "sh", "-c", "i=0; while [ $i -lt 300000 ]; do i=$((i + 1)); done"], check=True)
    used = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - used
    assert psutil.cpu_times().nice - apart >= used / 2 > 0
    monkeypatch.setattr(psutil, "cpu_times", lambda: SimpleNamespace(user=7.0, nice=50.0))
    assert busy_seconds() == 7.0


def test_terminals_tell_when_something_was_typed_last() -> None:
    assert terminals_idle_s(time.time()) >= 0.0
