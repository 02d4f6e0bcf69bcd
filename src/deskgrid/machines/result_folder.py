"""A folder with a job's result, read as if it were a scratch image (results.py): the job made it, so it is hostile.

    DESCRIPTOR/report      exit, stdout, stderr: ours
    DESCRIPTOR/scratch     the result

Everything is opened by one name below an open folder, never through a link, and looked at again once it is open; files that are none are
never opened. It should be at rest; where it is not, what vanished is `Unreadable` and what shrank is filled up with zeros.
"""

from __future__ import annotations

import contextlib
import errno
import os
import stat
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from deskgrid.archive import MAX_EXTENTS
from deskgrid.errors import BadImage
from deskgrid.machines.ext4 import Inode, Run

__all__ = ["MOST_OPEN", "REPORT_BYTES", "ResultFolder", "Unreadable", "read_report"]

MOST_OPEN = 64
"""Descriptors that reading takes at the same time, besides those that are open."""
REPORT_BYTES = 1 << 20
"""Of each file of the report, its end."""
_MOST_FOLDERS = MOST_OPEN - 8
_FOLDER = os.O_RDONLY | getattr(os, "O_DIRECTORY", 0) | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
_FILE = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0)
_ROOT, _SCRATCH, _REPORT = 0, 1, 2


def read_report(folder: Path) -> dict[str, bytes]:
    """Return the ends of the files of the report in a result folder by name; what is not a file there is left out. Blocks.

    Nothing is parsed. Where there is no sandbox a job can put anything in their places.
    """
    found = {}
    try:
        outer = os.open(folder, _FOLDER)
        try:
            report = os.open("report", _FOLDER, dir_fd=outer)
        finally:
            os.close(outer)
    except OSError:
        return {}
    try:
        for name in ("exit", "stdout", "stderr"):
            with contextlib.suppress(OSError):
                file = os.open(name, _FILE, dir_fd=report)
                try:
                    status = os.fstat(file)
                    if stat.S_ISREG(status.st_mode):
                        found[name] = os.pread(file, REPORT_BYTES, max(0, status.st_size - REPORT_BYTES))
                finally:
                    os.close(file)
    finally:
        os.close(report)
    return found


class Unreadable(BadImage):
    """One entry cannot be read: it went away, or nobody may."""


class _Entry(Struct, frozen=True):
    parent: int
    name: bytes


class ResultFolder:
    """What `Ext4` is for an image: entries have numbers, given when their folder is listed."""

    clean = True

    def __init__(self, descriptor: int) -> None:
        self._entries = [_Entry(_ROOT, b"."), _Entry(_ROOT, b"scratch"), _Entry(_ROOT, b"report")]
        self._open: OrderedDict[int, int] = OrderedDict()
        """Folders that are open, the one used longest ago first."""
        self._root = descriptor
        self._file: int | None = None
        self._device = os.fstat(descriptor).st_dev

    def root(self) -> Inode:
        """Return the folder that is the result. Raise BadImage if there is none."""
        root = self.inode(_SCRATCH)
        if not stat.S_ISDIR(root.mode):
            raise BadImage("the scratch is not a folder")
        return root

    def report(self) -> Iterator[tuple[bytes, int]]:
        """Yield name and number of the files of the report."""
        folder = self.inode(_REPORT)
        if stat.S_ISDIR(folder.mode):
            yield from self.records(folder)

    def inode(self, number: int) -> Inode:
        """Return what an entry is now. Raise Unreadable."""
        entry = self._entries[number]
        try:
            found = os.stat(entry.name, dir_fd=self._folder(entry.parent), follow_symlinks=False)
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from error
        # The number of the entry travels in the place of the image's own data.
        return Inode(found.st_ino, found.st_mode, found.st_size, int(found.st_mtime), found.st_nlink, 0, number.to_bytes(8, "big"))

    def records(self, folder: Inode) -> Iterator[tuple[bytes, int]]:
        """Yield name and number of what is in a folder. Raise Unreadable."""
        number = _number(folder)
        descriptor = self._folder(number)
        try:
            # Not all at once: a folder may have more entries than are allowed.
            with os.scandir(descriptor) as entries:
                for entry in entries:
                    self._entries.append(_Entry(number, os.fsencode(entry.name)))
                    yield os.fsencode(entry.name), len(self._entries) - 1
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from error

    def link_target(self, inode: Inode) -> bytes:
        """Return where a link points. Raise Unreadable."""
        entry = self._entries[_number(inode)]
        try:
            return os.readlink(entry.name, dir_fd=self._folder(entry.parent))
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from error

    def runs(self, inode: Inode) -> list[Run]:
        """Open a file, and return the pieces of it that are no holes. Raise Unreadable."""
        self._open_file(inode)
        runs: list[Run] = []
        offset, size = 0, inode.size_bytes
        while offset < size:
            start = self._seek(offset, getattr(os, "SEEK_DATA", None), size)
            end = self._seek(start, getattr(os, "SEEK_HOLE", None), size)
            if start >= size:
                break
            if len(runs) >= MAX_EXTENTS - 1:
                end = size  # the rest with its holes
            runs.append(Run(start, start, max(end, start + 1) - start))
            offset = start + runs[-1].length
        return runs

    def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """Return bytes of a file. Raise Unreadable."""
        self._open_file(inode)
        assert self._file is not None
        return os.pread(self._file, size, offset)

    def read_into(self, piece: memoryview, source: int) -> int:
        """Read from the file that was opened last; what is not there any more is zeros."""
        assert self._file is not None
        count = os.preadv(self._file, [piece], source)
        if not count:
            piece[:] = bytes(len(piece))
            return len(piece)
        return count

    def _seek(self, offset: int, whence: int | None, size: int) -> int:
        """Return where data or a hole begins, at most `size`."""
        assert self._file is not None
        if whence is None:
            return offset if offset == 0 else size
        try:
            return min(os.lseek(self._file, offset, whence), size)
        except OSError as error:
            if error.errno == errno.ENXIO:  # no data after it
                return size
            raise Unreadable(f"cannot be read: {error.strerror}") from error

    def _open_file(self, inode: Inode) -> None:
        entry = self._entries[_number(inode)]
        if self._file is not None:
            os.close(self._file)
            self._file = None
        try:
            self._file = os.open(entry.name, _FILE, dir_fd=self._folder(entry.parent))
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from error
        found = os.fstat(self._file)
        if not stat.S_ISREG(found.st_mode) or found.st_ino != inode.number:
            raise Unreadable("was replaced while it was read")

    def _folder(self, number: int) -> int:
        """Return an open folder. Raise Unreadable."""
        if number == _ROOT:
            return self._root
        missing = []
        while number != _ROOT and number not in self._open:
            missing.append(number)
            number = self._entries[number].parent
        descriptor = self._root if number == _ROOT else self._open[number]
        if number != _ROOT:
            self._open.move_to_end(number)
        for step in reversed(missing):
            descriptor = self._open_folder(step, descriptor)
        return descriptor

    def _open_folder(self, number: int, parent: int) -> int:
        try:
            descriptor = os.open(self._entries[number].name, _FOLDER, dir_fd=parent)
        except OSError as error:
            raise Unreadable(f"cannot be read: {error.strerror}") from error
        if os.fstat(descriptor).st_dev != self._device:
            os.close(descriptor)
            raise Unreadable("is another file system")
        self._open[number] = descriptor
        if len(self._open) > _MOST_FOLDERS:
            _, oldest = self._open.popitem(last=False)
            os.close(oldest)
        return descriptor


def _number(inode: Inode) -> int:
    return int.from_bytes(inode.block, "big")
