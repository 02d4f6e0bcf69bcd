"""What the desktops of a Linux PC tell of the person at them, by D-Bus and X.

The session bus is asked what the worker's own user may ask; of other people's sessions only logind tells, by the hint that each desktop gives it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dbus_fast import BusType, DBusError, Message, MessageFlag, MessageType
from dbus_fast.aio import MessageBus

from deskgrid.worker.desktop_x11 import Screen, XServer
from deskgrid.worker.presence import Presented

__all__ = ["LinuxDesktop"]

_CALL_S = 0.5
_RETRY_S = 30.0
"""Between tries to reach a bus that was not there."""
_IDLE_MONITORS = (
    ("org.gnome.Mutter.IdleMonitor", "/org/gnome/Mutter/IdleMonitor/Core", "org.gnome.Mutter.IdleMonitor", "GetIdletime"),
    ("org.freedesktop.ScreenSaver", "/org/freedesktop/ScreenSaver", "org.freedesktop.ScreenSaver", "GetSessionIdleTime"),
)
"""Name, path, interface and method; each answers in milliseconds (so does KDE's, whatever the draft of its standard says)."""
_GNOME_SESSION = ("org.gnome.SessionManager", "/org/gnome/SessionManager", "org.gnome.SessionManager", "IsInhibited")
_INHIBIT_IDLE = 8
_LOGIN = "org.freedesktop.login1"
_SCREENS = ("x11", "wayland", "mir")


class LinuxDesktop:
    """See Desktop. `environment` has DISPLAY, WAYLAND_DISPLAY and where the buses are."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._session = _Bus(BusType.SESSION, environment.get("DBUS_SESSION_BUS_ADDRESS", ""))
        self._system = _Bus(BusType.SYSTEM, environment.get("DBUS_SYSTEM_BUS_ADDRESS", ""))
        display = environment.get("DISPLAY", "")
        # Under Wayland an X server sees only what its own windows are told: its word would be a guess.
        self._x = Screen(XServer(display)) if display and not environment.get("WAYLAND_DISPLAY") else None

    async def look(self, *, idle: bool = True) -> Presented | None:
        """See Desktop."""
        if not idle:
            shown, inhibited = await asyncio.gather(self._look_at_screen(), self._inhibited())
            return Presented(None, (shown is not None and shown.full_screen) or inhibited)
        # All at the same time: one that does not answer must not hold up the others.
        shown, idle_s, inhibited, sessions = await asyncio.gather(
            self._look_at_screen(), self._session_idle_s(), self._inhibited(), self._login_sessions()
        )
        full = (shown is not None and shown.full_screen) or inhibited
        own_s = idle_s if idle_s is not None else shown.idle_s if shown is not None else None
        hangs = self._x is not None and self._x.hangs
        if own_s is None and (hangs or (sessions is None and _has_screen())):
            return None  # there may be a desktop of which nobody tells
        # What ours tells is more exact than its hint.
        others = [idle for user, idle in sessions or () if own_s is None or user != os.getuid()]
        return Presented(own_s, full, tuple(others))

    async def close(self) -> None:
        """See Desktop."""
        self._session.close()
        self._system.close()
        if self._x is not None:
            self._x.close()

    async def _look_at_screen(self) -> Presented | None:
        return await self._x.look() if self._x is not None else None

    async def _session_idle_s(self) -> float | None:
        for name, path, interface, member in _IDLE_MONITORS:
            answer = await self._session.call(name, path, interface, member)
            if answer and isinstance(answer[0], int):
                return answer[0] / 1000
        return None

    async def _inhibited(self) -> bool:
        """Tell whether a program keeps the desktop from resting, as players of films and talks do under GNOME."""
        answer = await self._session.call(*_GNOME_SESSION, "u", [_INHIBIT_IDLE])
        return bool(answer and answer[0] is True)

    async def _login_sessions(self) -> list[tuple[int, float]] | None:
        """Return user and idle seconds of each local session with a screen; None if the login service cannot be asked."""
        answer = await self._system.call(_LOGIN, "/org/freedesktop/login1", f"{_LOGIN}.Manager", "ListSessions")
        if not answer:
            return None
        found = []
        for session in answer[0]:
            values = await self._properties(str(session[4]))
            if values.get("Type") in _SCREENS and values.get("Class") == "user" and not values.get("Remote"):
                since_us = values.get("IdleSinceHint", 0) if values.get("IdleHint") else 0
                found.append((int(session[1]), max(0.0, time.time() - since_us / 1e6) if since_us else 0.0))
        return found

    async def _properties(self, path: str) -> dict[str, Any]:
        answer = await self._system.call(_LOGIN, path, "org.freedesktop.DBus.Properties", "GetAll", "s", [f"{_LOGIN}.Session"])
        return {name: getattr(value, "value", value) for name, value in answer[0].items()} if answer else {}


class _Bus:
    """One message bus, connected when it is first asked, and again when it comes back."""

    def __init__(self, kind: BusType, address: str) -> None:
        self._kind = kind
        self._address = address
        self._bus: MessageBus | None = None
        self._next_try = 0.0
        self._connecting = asyncio.Lock()

    async def call(
        self, name: str, path: str, interface: str, member: str, signature: str = "", body: list[Any] | None = None
    ) -> list[Any] | None:
        """Return the answer's values; None if nobody answers. Starts no service."""
        try:
            async with asyncio.timeout(_CALL_S):
                async with self._connecting:
                    bus = await self._connected()
                if bus is None:
                    return None
                message = Message(
                    destination=name,
                    path=path,
                    interface=interface,
                    member=member,
                    signature=signature,
                    body=body or [],
                    flags=MessageFlag.NO_AUTOSTART,
                )
                answer = await bus.call(message)
        except (DBusError, OSError, EOFError, TimeoutError, ValueError):
            return None
        return list(answer.body) if answer is not None and answer.message_type is MessageType.METHOD_RETURN else None

    async def _connected(self) -> MessageBus | None:
        if self._bus is not None and self._bus.connected:
            return self._bus
        if self._kind is BusType.SESSION and not self._address:
            return None
        now = time.monotonic()
        if now < self._next_try:
            return None
        self._next_try = now + _RETRY_S
        self.close()
        bus = MessageBus(self._address or None, bus_type=self._kind)
        try:
            self._bus = await bus.connect()
        except Exception:  # whatever is not a bus does whatever to the library
            with contextlib.suppress(Exception):
                bus.disconnect()
        return self._bus

    def close(self) -> None:
        """Leave the bus. Idempotent."""
        bus, self._bus = self._bus, None
        if bus is not None:
            with contextlib.suppress(Exception):
                bus.disconnect()


def _has_screen() -> bool:
    """Tell whether something draws on a screen of this PC: then somebody may be looking at it."""
    held = Path("/sys/class/drm")
    with contextlib.suppress(OSError):
        return any((card / "status").read_text().strip() == "connected" for card in held.glob("card*-*"))
    return False
