"""What Windows tells of the person at the PC. Untested. A worker that runs as a service sees no desktop; it has to run in the owner's session."""

from __future__ import annotations

import ctypes
from typing import Any

from deskgrid.worker.presence import Presented

__all__ = ["WindowsDesktop"]

_BUSY_STATES = (2, 3, 4)
"""QUERY_USER_NOTIFICATION_STATE: busy, a full-screen program, a presentation."""


class _LastInput(ctypes.Structure):
    _fields_ = [("size", ctypes.c_uint), ("ticks", ctypes.c_uint)]


class WindowsDesktop:
    """See Desktop, by GetLastInputInfo and SHQueryUserNotificationState."""

    async def look(self, *, idle: bool = True) -> Presented | None:
        """See Desktop."""
        system: Any = getattr(ctypes, "windll", None)
        if system is None:
            return None
        last = _LastInput(ctypes.sizeof(_LastInput), 0)
        if not system.user32.GetLastInputInfo(ctypes.byref(last)):
            return None
        state = ctypes.c_int(0)
        system.shell32.SHQueryUserNotificationState(ctypes.byref(state))
        idle_ms = (system.kernel32.GetTickCount() - last.ticks) & 0xFFFFFFFF
        return Presented(idle_ms / 1000, state.value in _BUSY_STATES)

    async def close(self) -> None:
        """See Desktop."""
