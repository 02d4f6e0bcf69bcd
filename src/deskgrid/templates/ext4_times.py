"""Times in a new ext4 file system, so that the same files give the same bytes: no program sets when an inode was changed.

Layout (Linux, Documentation/filesystems/ext4): the superblock is at 1024 of the file system, the group descriptors in the block after it; each
tells where its group's table of inodes is, and how many at its end were never used. Times are u32 seconds at 8 (access), 12 (change), 16
(modification) and 144 (creation) of an inode, each with a u32 of nanoseconds and an epoch: 140, 132, 136 and 148.

Only for file systems without metadata_csum, where an inode has no checksum.
"""

from __future__ import annotations

import struct
from pathlib import Path
from typing import BinaryIO

from deskgrid.errors import OperatorError

__all__ = ["set_times"]

_SUPERBLOCK_AT = 1024
_METADATA_CSUM, _64BIT = 0x400, 0x80
_ALWAYS, _MODIFICATION = ((8, 140), (12, 132), (144, 148)), (16, 136)


def set_times(disk: Path, offset: int, *, changed_since: int, epoch: int) -> None:
    """Set access, change and creation of all files of the file system at `offset` to `epoch`, and modification where it is not before `changed_since`.

    Times are seconds since 1970. Raise OperatorError for a file system with checksums.
    """
    with disk.open("r+b") as file:
        file.seek(offset + _SUPERBLOCK_AT)
        superblock = file.read(1024)
        inodes, blocks = struct.unpack_from("<II", superblock)
        (block_log,) = struct.unpack_from("<I", superblock, 24)
        blocks_per_group, _, per_group = struct.unpack_from("<III", superblock, 32)
        inode_bytes, _, _, incompat, readonly = struct.unpack_from("<HHIII", superblock, 88)
        wide = incompat & _64BIT
        descriptor_bytes = struct.unpack_from("<H", superblock, 254)[0] if wide else 32
        if readonly & _METADATA_CSUM or inode_bytes < 256:
            raise OperatorError("the file system has checksums, so its times cannot be set")
        block = 1024 << block_log
        first = struct.unpack_from("<I", superblock, 20)[0]
        file.seek(offset + (first + 1) * block)
        groups = -(-(blocks - first) // blocks_per_group)
        descriptors = file.read(groups * descriptor_bytes)
        for group in range(min(groups, -(-inodes // per_group))):
            low, unused = struct.unpack_from("<8xI16xH", descriptors, group * descriptor_bytes)
            high = struct.unpack_from("<I", descriptors, group * descriptor_bytes + 40)[0] if wide else 0
            _set_in_table(file, offset + (high << 32 | low) * block, per_group - unused, inode_bytes, changed_since, epoch)


def _set_in_table(file: BinaryIO, at: int, count: int, inode_bytes: int, changed_since: int, epoch: int) -> None:
    file.seek(at)
    table = bytearray(file.read(count * inode_bytes))
    for start in range(0, len(table), inode_bytes):
        if not struct.unpack_from("<H", table, start)[0]:  # no mode: not used
            continue
        (modified,) = struct.unpack_from("<I", table, start + 16)
        for seconds, more in (*_ALWAYS, *((_MODIFICATION,) if modified >= changed_since else ())):
            struct.pack_into("<I", table, start + seconds, epoch)
            struct.pack_into("<I", table, start + more, 0)
    file.seek(at)
    file.write(table)
