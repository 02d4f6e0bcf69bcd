"""Disks that are on the PC already: their owner declares them by a name, and jobs that ask for it boot them; nothing is downloaded.

A file is used where it lies, through an overlay, and never written. It counts while it is as it was when it was declared (size and time of
change): one that was changed is no longer offered, and machines that were saved on it do not go on.
"""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from msgspec import Struct

from deskgrid.errors import BadImage, InvalidInput, MachineFailed, NotFound
from deskgrid.files import write_durably
from deskgrid.machines.images import check_image
from deskgrid.model.jobs import INSTALLED
from deskgrid.model.machines import ContextLabel, DiskFormat

__all__ = ["InstalledDisk", "InstalledDisks"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,63}")
_MOST = 100


class InstalledDisk(Struct, frozen=True, kw_only=True):
    """A disk on this PC."""

    name: str
    path: str
    size_bytes: int
    changed_ns: int
    format: DiskFormat
    virtual_bytes: int
    context_label: ContextLabel = ContextLabel.CIDATA

    @property
    def unchanged(self) -> bool:
        """Whether the file is there and as it was."""
        return _stamp(Path(self.path)) == (self.size_bytes, self.changed_ns)


class InstalledDisks:
    """What is declared, in one file that commands and the running worker read anew each time."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def all(self) -> tuple[InstalledDisk, ...]:
        """Return what is declared, by name. A file that cannot be read declares nothing."""
        try:
            found = msgspec.json.decode(self._file.read_bytes(), type=tuple[InstalledDisk, ...])
        except (OSError, msgspec.DecodeError, UnicodeDecodeError):
            return ()
        return tuple(sorted(found, key=lambda disk: disk.name))

    def packages(self) -> tuple[str, ...]:
        """Return what the grid is told: a package for each disk that can be used."""
        return tuple(f"{INSTALLED}{disk.name}" for disk in self.all() if disk.unchanged)

    def find(self, name: str) -> InstalledDisk:
        """Return a disk that can be used. Raise MachineFailed: another PC may have it."""
        for disk in self.all():
            if disk.name == name:
                if disk.unchanged:
                    return disk
                raise MachineFailed(f"the disk {name!r} of this PC was changed or removed")
        raise MachineFailed(f"this PC has no disk {name!r}")

    def add(self, file: Path, name: str, label: ContextLabel) -> InstalledDisk:
        """Declare a disk, in the place of another of that name. Raise BadImage for what a worker does not take, InvalidInput."""
        if not _NAME.fullmatch(name):
            raise InvalidInput(f"{name[:80]!r} cannot be a disk's name", where="--name", hint="letters, digits and _ . + -")
        path = file.resolve()
        before = _stamp(path)
        info = check_image(path)
        if info.format is DiskFormat.OCI:
            raise BadImage("is an image of a container", where=str(file), hint="deskgrid disk import")
        if before is None or _stamp(path) != before:
            raise BadImage("is being written", where=str(file), hint="shut down the machine that uses it")
        disk = InstalledDisk(
            name=name,
            path=str(path),
            size_bytes=before[0],
            changed_ns=before[1],
            format=info.format,
            virtual_bytes=info.virtual_bytes,
            context_label=label,
        )
        others = [other for other in self.all() if other.name != name]
        if len(others) >= _MOST:
            raise InvalidInput(f"{_MOST} disks are declared already", hint="deskgrid worker disk remove NAME")
        self._write([*others, disk])
        return disk

    def remove(self, name: str) -> None:
        """Declare a disk no more; its file stays. Raise NotFound."""
        disks = self.all()
        left = [disk for disk in disks if disk.name != name]
        if len(left) == len(disks):
            raise NotFound(f"no disk {name!r} is declared", hint="deskgrid worker disk list")
        self._write(left)

    def _write(self, disks: list[InstalledDisk]) -> None:
        write_durably(self._file, msgspec.json.format(msgspec.json.encode(disks)))


def _stamp(path: Path) -> tuple[int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns
