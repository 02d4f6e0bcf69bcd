"""What drivers found out about this PC, kept so that not every start of the worker tries it again.

An answer holds while deskgrid, the system since it was switched on, and the driver's own marks (machines/driver.py, Recalling) stay as they
were; one that names a trouble, for a day only: what is in its way may go without a trace.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import platform
from pathlib import Path

import msgspec
import psutil
from msgspec import Struct

from deskgrid import __version__
from deskgrid.clock import Clock
from deskgrid.files import write_whole
from deskgrid.machines.driver import Driver, Recalling
from deskgrid.model.machines import Fingerprint

__all__ = ["Known"]

_TROUBLE_S = 86400.0


class _Answer(Struct, frozen=True):
    marks: str
    at: float
    found: Fingerprint


class Known:
    """Answers in a file. What cannot be read counts as nothing known."""

    def __init__(self, file: Path, clock: Clock) -> None:
        self._file = file
        self._clock = clock

    async def ask(self, driver: Driver) -> Fingerprint:
        """Return a driver's fingerprint: the one that is known, if it still holds."""
        if not isinstance(driver, Recalling):
            return await driver.fingerprint()
        name, marks = type(driver).__name__, await asyncio.to_thread(_digest, driver)
        answer = self._read().get(name)
        if answer is not None and answer.marks == marks and self._holds(answer):
            driver.recall(answer.found)
            return answer.found
        found = await driver.fingerprint()
        answers = {**self._read(), name: _Answer(marks, self._clock.now(), found)}
        with contextlib.suppress(OSError):  # then it is tried again
            write_whole(self._file, msgspec.json.encode(answers))
        return found

    def _holds(self, answer: _Answer) -> bool:
        return not answer.found.reason or 0 <= self._clock.now() - answer.at < _TROUBLE_S

    def _read(self) -> dict[str, _Answer]:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=dict[str, _Answer])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return {}


def _digest(driver: Recalling) -> str:
    system = [__version__, platform.platform(), f"{psutil.boot_time():.0f}"]
    return hashlib.sha256("\n".join([*system, *driver.marks()]).encode()).hexdigest()
