"""Whether the owner of the PC lets us work now: a file that is there while not, so that it outlives the worker."""

from __future__ import annotations

from pathlib import Path

from deskgrid.archive import sync_folder
from deskgrid.worker.home import write_durably

__all__ = ["Owner"]


class Owner:
    """The owner's will, read once and then kept with its file. Both changes are durable when they return, and idempotent."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.paused = file.exists()

    def pause(self) -> None:
        """Note that no work may be done. It holds for this process even if the disk is full."""
        self.paused = True
        write_durably(self._file, b"deskgrid worker resume removes this file\n")

    def resume(self) -> None:
        """Note that work may be done."""
        self._file.unlink(missing_ok=True)
        sync_folder(self._file.parent)
        self.paused = False
