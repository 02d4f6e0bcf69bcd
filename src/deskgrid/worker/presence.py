"""What is seen of the owner's PC: is somebody at it, what do other programs need, does it run on battery, is the screen filled?

Every source may be missing, and its programs may end and come back. On Linux, in this order:

    desktop's session bus     GNOME's idle monitor, the freedesktop screen saver of others      desktop.py
    X server                  its screen saver extension, where no Wayland session runs          desktop_x11.py
    logind                    sessions with a screen: the hint that the desktop gives            desktop.py
    terminals                 when something was last typed at each, as w(1) tells

On Windows and macOS the system itself tells (untested).
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

import psutil
from msgspec import Struct

from deskgrid.clock import Clock
from deskgrid.core.owner import Rules, Seen

__all__ = ["Desktop", "Presented", "Sight", "Watcher", "busy_seconds", "combine", "terminals_idle_s"]


class Presented(Struct, frozen=True):
    """What a desktop tells of the person at it."""

    idle_s: float | None = None
    """Seconds since keyboard or mouse were used; None: it does not tell."""
    full_screen: bool = False
    others_idle_s: tuple[float, ...] = ()
    """Likewise for each session with a screen of which only the login service tells."""


class Desktop(Protocol):
    """What tells of the desktops of this PC."""

    async def look(self, *, idle: bool = True) -> Presented | None:
        """Return what is seen now; None if this PC's desktops cannot be asked at all. Never raises, takes a second at most.

        Without `idle` nobody is asked when keyboard and mouse were used.
        """
        ...

    async def close(self) -> None:
        """Let go of what is asked. Idempotent."""
        ...


class Watcher(Protocol):
    """What looks at the PC."""

    async def look(self) -> Seen:
        """Return what is seen now. Never raises."""
        ...

    async def close(self) -> None:
        """Let go of what is asked. Idempotent."""
        ...


class Sight:
    """Looks at this PC for a worker with these rules. What no rule asks for is not looked at."""

    def __init__(
        self,
        rules: Rules,
        clock: Clock,
        *,
        desktop: Desktop | None = None,
        terminals: Callable[[float], float] | None = None,
        plugged: Callable[[], bool] | None = None,
        busy: Callable[[], float | None] | None = None,
    ) -> None:
        self._rules = rules
        self._clock = clock
        self._desktop = desktop or make_desktop()
        self._terminals = terminals or terminals_idle_s
        self._plugged = plugged or is_plugged
        self._busy = busy or busy_seconds
        self._load: tuple[float, float] | None = None

    async def look(self) -> Seen:
        """Return what is seen now. Never raises."""
        rules = self._rules
        local = time.localtime(self._clock.now())
        told = await self._desktop.look(idle=bool(rules.idle_s)) if rules.idle_s or not rules.full_screen else None
        return Seen(
            weekday=local.tm_wday,
            minute=local.tm_hour * 60 + local.tm_min,
            idle_s=await asyncio.to_thread(self._idle_s, told) if rules.idle_s else None,
            busy_cpus=self._busy_cpus() if rules.busy_cpus else None,
            on_battery=not rules.on_battery and not self._plugged(),
            full_screen=told is not None and told.full_screen,
        )

    async def close(self) -> None:
        """Let go of what is asked. Idempotent."""
        await self._desktop.close()

    def _idle_s(self, told: Presented | None) -> float | None:
        return combine(told, self._terminals(self._clock.now()))

    def _busy_cpus(self) -> float | None:
        """Return how many CPUs were used by others since the last look; None at the first."""
        seconds, now = self._busy(), self._clock.monotonic()
        if seconds is None:
            return None
        before, self._load = self._load, (now, seconds)
        if before is None or now <= before[0]:
            return 0.0
        return max(0.0, (seconds - before[1]) / (now - before[0]))


def combine(told: Presented | None, terminals_s: float) -> float | None:
    """Return for how many seconds nobody has used the PC, of what desktops and terminals tell; None if that cannot be told."""
    if told is None:
        return None
    desktop_s = told.idle_s if told.idle_s is not None else math.inf
    return min(desktop_s, terminals_s, *told.others_idle_s, math.inf)


def is_plugged() -> bool:
    """Tell whether the PC has mains power, or no battery. Never raises."""
    try:
        battery = psutil.sensors_battery()
    except (AttributeError, OSError, RuntimeError):
        return True
    return battery is None or battery.power_plugged is not False


def busy_seconds() -> float | None:
    """Return the CPU seconds that programs of ordinary priority have used since the PC was switched on: machines and worker run at a low one.

    None where the system does not count them apart (Windows).
    """
    times = psutil.cpu_times()
    return float(times.user) if hasattr(times, "nice") else None


def terminals_idle_s(now: float) -> float:
    """Return for how many seconds nothing was typed at any terminal of somebody who is logged in; infinity without any. Blocks."""
    idle_s = math.inf
    with contextlib.suppress(OSError, RuntimeError, psutil.Error):
        for user in psutil.users():
            with contextlib.suppress(OSError):
                idle_s = min(idle_s, max(0.0, now - Path("/dev", user.terminal or "none").stat().st_atime))
    return idle_s


def make_desktop() -> Desktop:
    """Return what tells of the desktops of this kind of system."""
    if sys.platform == "linux":
        from deskgrid.worker.desktop import LinuxDesktop

        return LinuxDesktop(dict(os.environ))
    if sys.platform == "win32":
        from deskgrid.worker.desktop_windows import WindowsDesktop

        return WindowsDesktop()
    from deskgrid.worker.desktop_mac import MacDesktop

    return MacDesktop()
