"""What an X server tells: when keyboard and mouse were last used (its MIT-SCREEN-SAVER extension), and whether a window fills the screen (EWMH)."""

from __future__ import annotations

import contextlib
import threading
from typing import Any

from Xlib import X
from Xlib.display import Display
from Xlib.error import ConnectionClosedError, DisplayError, XError
from Xlib.ext import screensaver

from deskgrid.worker.presence import Presented

__all__ = ["XServer"]

_ERRORS = (XError, DisplayError, ConnectionClosedError, OSError, ValueError, AttributeError, AssertionError)
"""The library lets through whatever a server that goes away does to it."""


class XServer:
    """One display. Blocks; may be used from several threads, one after the other."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._display: Any = None
        self._lock = threading.Lock()

    def look(self) -> Presented | None:
        """Return what is seen now, None if there is no such display. Never raises."""
        with self._lock:
            try:
                if self._display is None:
                    self._display = Display(self._name)
                return Presented(self._idle_s(), self._full_screen())
            except _ERRORS:
                self._close()
                return None

    def close(self) -> None:
        """Leave the display. Idempotent."""
        with self._lock:
            self._close()

    def _close(self) -> None:
        display, self._display = self._display, None
        if display is not None:
            with contextlib.suppress(*_ERRORS):
                display.close()

    def _idle_s(self) -> float:
        info = screensaver.query_info(self._display.screen().root)
        return float(info.idle) / 1000

    def _full_screen(self) -> bool:
        """Tell whether the active window says that it fills the screen."""
        active = self._property(self._display.screen().root, "_NET_ACTIVE_WINDOW")
        if not active or not active[0]:
            return False
        window = self._display.create_resource_object("window", active[0])
        try:
            states = self._property(window, "_NET_WM_STATE")
        except XError:  # it has just been closed
            return False
        return self._display.intern_atom("_NET_WM_STATE_FULLSCREEN") in states

    def _property(self, window: Any, name: str) -> list[int]:
        found = window.get_full_property(self._display.intern_atom(name), X.AnyPropertyType)
        return list(found.value) if found is not None else []
