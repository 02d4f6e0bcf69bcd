"""Holds machines to the owner's share of the CPUs by stopping and continuing their processes (SIGSTOP, SIGCONT) some ten times a second.

What a machine's processes use is read from outside, so it does not matter what they are. A machine that is paused is left alone: who pauses
it wants it to stay so, and QEMU must hear that. Linux only; elsewhere the number of CPUs bounds a machine, not a share of them.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable

from msgspec import Struct

from deskgrid.clock import Clock
from deskgrid.core.throttle import Throttle
from deskgrid.machines.driver import MachineHandle, Metered

__all__ = ["Throttled", "Throttles"]

_LOOK_S = 0.04


class Throttled(Struct, frozen=True):
    """A machine that runs."""

    driver: Metered
    handle: MachineHandle


class Throttles:
    """The throttles of one worker's machines. `running` returns those that run and are not paused."""

    def __init__(self, share: float, clock: Clock, running: Callable[[], Iterable[Throttled]]) -> None:
        self._share = share
        self._clock = clock
        self._running = running
        self._throttles: dict[str, Throttle] = {}
        self._stopped: dict[str, Throttled] = {}

    async def run(self) -> None:
        """Hold machines to their share until cancelled; then all that were stopped run on."""
        if self._share >= 1 or sys.platform != "linux":
            return
        try:
            while True:
                self._look()
                await self._clock.sleep(_LOOK_S)
        finally:
            for one in self._stopped.values():
                _let_run(one, True)

    def release(self, handle: MachineHandle) -> None:
        """Let a machine run until the next look at it."""
        stopped = self._stopped.pop(handle.token, None)
        if stopped is not None:
            _let_run(stopped, True)

    def _look(self) -> None:
        now = self._clock.monotonic()
        running = {one.handle.token: one for one in self._running()}
        for token in self._throttles.keys() - running.keys():
            del self._throttles[token]
            if token in self._stopped:
                self.release(self._stopped[token].handle)
        for token, one in running.items():
            used_s = one.driver.cpu_time_s(one.handle)
            rate = self._share * one.handle.spec.cpus
            throttle = self._throttles.setdefault(token, Throttle(rate, used_s=used_s, now=now))
            self._obey(token, one, throttle.may_run(used_s, now=now))

    def _obey(self, token: str, one: Throttled, may_run: bool) -> None:
        if may_run and token in self._stopped:
            del self._stopped[token]
            _let_run(one, True)
        elif not may_run:
            # Each time: a process may have been made since.
            self._stopped[token] = one
            _let_run(one, False)


def _let_run(one: Throttled, run: bool) -> None:
    with contextlib.suppress(OSError):
        one.driver.let_run(one.handle, run)
