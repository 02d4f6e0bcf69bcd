"""Probes: what drivers start to find out what this PC can do. Each has a folder of its own, in which its processes work.

A probe cleans up behind itself. What is left of one that was cut short (the worker was killed while a guest hung) is found by its folder.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil

from deskgrid.clock import Clock
from deskgrid.machines import processes
from deskgrid.machines.folders import remove_tree
from deskgrid.machines.processes import ProcessIdentity

__all__ = ["clear_probes", "file_mark", "probe_folder"]

_PREFIX = "deskgrid-probe-"


@contextlib.contextmanager
def probe_folder(place: Path | None) -> Iterator[Path]:
    """Make a folder for one probe below `place` (None: the system's temporary folder), removed afterwards."""
    with tempfile.TemporaryDirectory(prefix=_PREFIX, dir=place) as folder:
        yield Path(folder)


async def clear_probes(place: Path, clock: Clock) -> None:
    """End and remove what probes below `place` have left. None may be under way there."""
    for identity in _working_in(place):
        await processes.kill(identity, clock)
    for folder in place.glob(f"{_PREFIX}*"):
        remove_tree(str(folder))


def _working_in(place: Path) -> list[ProcessIdentity]:
    """Return the processes of our own user whose current folder is that of a probe."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.cwd().startswith(str(place / _PREFIX)):
                identity = processes.identify(process.pid)
                found += [identity] if identity is not None else []
    return found


def file_mark(path: str | Path | None) -> str:
    """Return a text that changes when a file, device or program does; it does not follow what is in it."""
    try:
        status = Path(path or "").stat()
    except OSError:
        return f"{path}: none"
    return f"{path}: {status.st_mode} {status.st_uid} {status.st_gid} {status.st_size} {status.st_mtime_ns} {status.st_rdev}"
