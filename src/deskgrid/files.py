"""Files that survive kills and power cuts, and locks between processes."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path

__all__ = ["locked", "sync_folder", "write_durably", "write_whole"]


def sync_folder(folder: Path) -> None:
    """Write a folder's entries to disk, where the system has such a call; a rename lasts only after it."""
    if os.name != "posix":
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes, *, mode: int = 0o600) -> None:
    """Write a file such that after a power cut it is there whole, or as it was before. Raise OSError."""
    write_whole(path, data, mode=mode, synced=True)
    sync_folder(path.parent)


def write_whole(path: Path, data: bytes, *, mode: int = 0o600, synced: bool = False) -> None:
    """Write a file such that it is there whole or as it was before, whenever we are killed. Raise OSError. `synced`: it is on the disk."""
    temporary = path.with_name(f"{path.name}.new")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode), "wb") as file:
            file.write(data)
            file.flush()
            if synced:
                os.fsync(file.fileno())
        temporary.replace(path)
    except OSError:
        temporary.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def locked(file: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock that other processes respect; the system ends it with the process. The file is made, and stays.

    Raise OSError if another has it and we do not `wait`. Windows never waits.
    """
    with file.open("a+b") as held:
        if sys.platform == "win32":
            import msvcrt

            held.seek(0)
            msvcrt.locking(held.fileno(), msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(held, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        yield
