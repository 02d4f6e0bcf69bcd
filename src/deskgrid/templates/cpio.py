"""The cpio archive that the Linux kernel unpacks as its first root file system.

Layout ("newc", Documentation/driver-api/early-userspace/buffer-format.rst of the kernel): per member a header of the magic
070701 and thirteen fields of eight hexadecimal digits, the name with a final NUL, then the data, each padded with NUL to a
multiple of four bytes; the member TRAILER!!! ends it. All members belong to root and have time 0, so that the same input
gives the same bytes, and no fakeroot is needed.
"""

from __future__ import annotations

import stat
from pathlib import PurePosixPath

__all__ = ["CpioWriter"]

_TRAILER = "TRAILER!!!"


class CpioWriter:
    """Collects members in memory. Parent folders are added by themselves; a name added again is ignored."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._names: set[str] = set()

    def directory(self, name: str) -> None:
        """Add a folder, mode 0755."""
        self._add(name, stat.S_IFDIR | 0o755)

    def file(self, name: str, data: bytes, *, executable: bool = False) -> None:
        """Add a regular file, mode 0755 or 0644."""
        self._add(name, stat.S_IFREG | (0o755 if executable else 0o644), data)

    def symlink(self, name: str, target: str) -> None:
        """Add a symbolic link."""
        self._add(name, stat.S_IFLNK | 0o777, target.encode())

    def character_device(self, name: str, major: int, minor: int) -> None:
        """Add a character device, mode 0600."""
        self._add(name, stat.S_IFCHR | 0o600, device=(major, minor))

    def finish(self) -> bytes:
        """Return the whole archive."""
        self._member(_TRAILER, 0, b"", (0, 0))
        return bytes(self._bytes)

    def _add(self, name: str, mode: int, data: bytes = b"", device: tuple[int, int] = (0, 0)) -> None:
        if name in self._names:
            return
        parent = str(PurePosixPath(name).parent)
        if parent != ".":
            self.directory(parent)
        self._names.add(name)
        self._member(name, mode, data, device)

    def _member(self, name: str, mode: int, data: bytes, device: tuple[int, int]) -> None:
        encoded = name.encode() + b"\0"
        inode = len(self._names)
        links, uid, gid, mtime, checksum = 1, 0, 0, 0, 0
        fields = (inode, mode, uid, gid, links, mtime, len(data), 0, 0, *device, len(encoded), checksum)
        self._bytes += b"070701" + b"".join(b"%08X" % field for field in fields) + encoded
        self._pad()
        self._bytes += data
        self._pad()

    def _pad(self) -> None:
        self._bytes += bytes(-len(self._bytes) % 4)
