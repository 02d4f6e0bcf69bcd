"""Folders for large files of a while. A process that is killed leaves its own; the next one that makes such a folder removes it.

Whoever works in one holds its lock (flock), which ends with the process, however it ends. Where there are no such locks (Windows, some network
file systems), what is left stays.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

__all__ = ["work_folder"]


@contextlib.contextmanager
def work_folder(parent: Path, prefix: str) -> Iterator[Path]:
    """Make a folder in `parent`, removed at the end. Those of ours with this prefix that nobody works in are removed first."""
    for left in parent.glob(f"{prefix}*"):
        with contextlib.suppress(OSError), _locked(left, wait=False):
            shutil.rmtree(left, ignore_errors=True)
    while True:
        with tempfile.TemporaryDirectory(prefix=prefix, dir=parent) as name, contextlib.ExitStack() as held:
            with contextlib.suppress(OSError):
                held.enter_context(_locked(Path(name), wait=True))
            if Path(name).exists():  # else another process took it for one that was left
                yield Path(name)
                return


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool) -> Iterator[None]:
    """Hold the lock of a folder of ours. Raise OSError if that is not possible, or another has it."""
    if fcntl is None:
        raise OSError("no locks here")
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(descriptor).st_uid != os.geteuid():
            raise PermissionError(f"{folder} is somebody else's")
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
    finally:
        os.close(descriptor)
