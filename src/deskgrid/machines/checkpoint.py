"""The last good checkpoint of a machine: a note in its folder, written when everything that it names is on the disk.

    checkpoint.json    which state of memory and disks, and how long the machine's logs were then
    restoring          there while the machine is being made from it: a process that is found then has not begun to run

Two names for states take turns, so that the last one is whole until the next one is.
"""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
from msgspec import Struct

from deskgrid.files import sync_folder

__all__ = [
    "NOTE_NAME",
    "RESTORING_MARK",
    "Checkpoint",
    "next_tag",
    "read_checkpoint",
    "sync_files",
    "truncate_logs",
    "write_checkpoint",
]

RESTORING_MARK = "restoring"
NOTE_NAME = "checkpoint.json"
_TAGS = ("deskgrid-a", "deskgrid-b")


class Checkpoint(Struct, frozen=True):
    """One state of a machine."""

    tag: str
    logs: dict[str, int]
    """Bytes of each log, by its name, when the state was taken."""
    ran_s: float = 0.0
    """Seconds that the process had run (the fake's)."""


def read_checkpoint(workdir: Path) -> Checkpoint | None:
    """Return the last good checkpoint of the machine in `workdir`, or None."""
    try:
        return msgspec.json.decode((workdir / NOTE_NAME).read_bytes(), type=Checkpoint)
    except (OSError, msgspec.DecodeError):
        return None


def next_tag(last: Checkpoint | None) -> str:
    """Return the name for the next state."""
    return _TAGS[last is not None and last.tag == _TAGS[0]]


def write_checkpoint(workdir: Path, checkpoint: Checkpoint) -> None:
    """Make this the last good one, such that a power cut leaves it or the one before. Blocks; raise OSError."""
    temporary = workdir / f"{NOTE_NAME}.new"
    with temporary.open("wb") as file:
        file.write(msgspec.json.encode(checkpoint))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(workdir / NOTE_NAME)
    sync_folder(workdir)


def sync_files(*paths: Path) -> None:
    """Return when what was written to these files, by whatever process, is on the disk. Blocks; raise OSError."""
    for path in paths:
        descriptor = os.open(path, os.O_RDWR | getattr(os, "O_CLOEXEC", 0))
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def truncate_logs(workdir: Path, checkpoint: Checkpoint) -> None:
    """Forget what the machine has said since the checkpoint: it will say it again. Blocks; raise OSError."""
    for name, length in checkpoint.logs.items():
        path = workdir / name
        if path.exists() and path.stat().st_size > length:
            os.truncate(path, length)
