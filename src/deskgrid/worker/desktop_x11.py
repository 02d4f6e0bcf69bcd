"""What an X server tells: when keyboard and mouse were last used (its MIT-SCREEN-SAVER extension), and whether a window fills the screen (EWMH)."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from typing import Any

from Xlib import X
from Xlib.display import Display
from Xlib.error import XError
from Xlib.ext import screensaver

from deskgrid.worker.presence import Presented

__all__ = ["Screen", "XServer"]

_LOOK_S = 1.0


class Screen:
    """An X server that may hang. It is asked in a thread that nobody waits for: neither the owner's rules nor the end of the worker."""

    def __init__(self, server: XServer) -> None:
        self._server = server
        self._answer: asyncio.Future[Presented | None] | None = None
        self._last: Presented | None = None

    @property
    def hangs(self) -> bool:
        """Tell whether the last look has no answer yet; until it has one there is no other."""
        return self._answer is not None and not self._answer.done()

    async def look(self) -> Presented | None:
        """Return what is seen now, None if there is no such display. Takes a second at most.

        While the server hangs it does not tell who is there, and what filled the screen still does: games keep a server busy.
        """
        if not self.hangs:
            answer = self._answer = self._ask()
            await asyncio.wait({answer}, timeout=_LOOK_S)
            if answer.done():
                self._last = answer.result()
                return self._last
        return Presented(None, self._last is not None and self._last.full_screen)

    def close(self) -> None:
        """Leave the display; if it hangs the thread has it until the process ends. Idempotent."""
        if not self.hangs:
            self._server.close()

    def _ask(self) -> asyncio.Future[Presented | None]:
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Presented | None] = loop.create_future()

        def ask() -> None:
            told = self._server.look()
            with contextlib.suppress(RuntimeError):  # the loop is closed, nobody wants to know any more
                loop.call_soon_threadsafe(answer.set_result, told)

        # Not one of the loop's own threads: the process would wait for it.
        threading.Thread(target=ask, name="x-server", daemon=True).start()
        return answer


class XServer:
    """One display. Blocks, for as long as the server likes; one call at a time."""

    def __init__(self, name: str) -> None:
        self._name = name
        self._display: Any = None

    def look(self) -> Presented | None:
        """Return what is seen now, None if there is no such display. Never raises."""
        try:
            if self._display is None:
                self._display = Display(self._name)
            return Presented(self._idle_s(), self._full_screen())
        except Exception:  # the library lets through whatever a server that goes away does to it
            self.close()
            return None

    def close(self) -> None:
        """Leave the display. Idempotent."""
        display, self._display = self._display, None
        if display is not None:
            with contextlib.suppress(Exception):
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
