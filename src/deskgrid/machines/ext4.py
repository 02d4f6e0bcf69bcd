"""A read-only reader of ext4 for images that a guest has written: hostile input, read without mount, root or C code.

Layout (kernel documentation, filesystems/ext4: super.rst, group_descr.rst, inodes.rst, ifork.rst, directory.rst; all
numbers little-endian):

    byte 1024          superblock, 1024 bytes: block size, counts, feature bits
    next block         group descriptors, 32 or 64 bytes each: where each group's inode table is
    inode table        inodes of 128 bytes and more, numbered from 1; 2 is the root folder
    i_block, 60 bytes  of a file: root of the extent tree (header, then index or leaf entries of 12 bytes), or in the
                       older way 12 blocks, then blocks of numbers one, two and three levels deep;
                       of a symbolic link shorter than 60 bytes: its target
    folder             a file of records { inode u32, record length u16, name length u8, type u8, name }, which may not
                       cross blocks; hashed folders hide their index in records that this linear reading skips

What mke2fs makes for us and a guest's kernel turns it into is read; anything else is refused by its feature bit. A
journal is ignored, and an image whose journal still has to be replayed is refused. Checksums are not looked at: they
show accidents, and a hostile guest computes them anew.

Every offset is checked against the image and every loop ends: an extent tree is at most 5 levels deep and its entries ascend, so
that it can have only `MAX_EXTENTS` of them; a folder's records are at least 8 bytes long. Folders that contain
each other are possible here and for the caller to notice. All errors are BadImage.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Callable, Iterator
from struct import Struct as Layout
from typing import NamedTuple

from deskgrid.errors import BadImage

__all__ = ["MAX_EXTENTS", "ROOT_INODE", "Ext4", "Inode", "ReadAt", "Run", "file_reader"]

ReadAt = Callable[[int, int], bytes]
"""Returns the bytes at an offset; fewer at the end of the image."""

ROOT_INODE = 2
MAX_EXTENTS = (1 << 20) - 2
"""Runs of one file; a file in more pieces is refused."""

_SUPERBLOCK_AT = 1024
_MAGIC = 0xEF53
_CLEAN = 1
_EXTENT_HEADER = Layout("<HHHH4x")
_EXTENT_INDEX = Layout("<IIHxx")
_EXTENT_LEAF = Layout("<IHHI")
_EXTENT_MAGIC = 0xF30A
_MAX_DEPTH = 5
_RECORD = Layout("<IHBx")
_EXTENTS_FLAG, _ENCRYPTED_FLAG, _EA_INODE_FLAG, _INLINE_FLAG = 0x80000, 0x800, 0x200000, 0x10000000
_CACHED_BLOCKS = 256
_MAX_PIECES = 1 << 22
"""Extents of one file before they are merged, and single blocks of the older block map."""

_64BIT = 0x80
_READABLE = {
    0x2: "filetype",
    0x40: "extent",
    _64BIT: "64bit",
    0x200: "flex_bg",
    0x2000: "metadata_csum_seed",
    0x4000: "large_dir",
}
_REFUSED = {
    0x1: "compression",
    0x4: "a journal that has to be replayed; the system inside was not shut down",
    0x8: "being a journal device",
    0x10: "meta_bg",
    0x100: "mmp",
    0x400: "ea_inode",
    0x1000: "dirdata",
    0x8000: "inline_data",
    0x10000: "encryption",
    0x20000: "casefold",
}


class Inode(NamedTuple):
    """A file, folder or link, with what is needed to read it."""

    number: int
    mode: int
    """Type and permission bits as in `stat`."""
    size_bytes: int
    mtime: int
    """Seconds since 1970, can be negative."""
    links: int
    flags: int
    block: bytes
    """The 60 bytes of i_block."""


class Run(NamedTuple):
    """A piece of a file that is really in the image; what lies between runs is zeros."""

    offset: int
    """Bytes from the start of the file."""
    source: int
    """Bytes from the start of the image."""
    length: int


def file_reader(descriptor: int) -> ReadAt:
    """Return a reader of an open file; it moves no file position where the system has pread."""
    if hasattr(os, "pread"):
        return lambda offset, size: os.pread(descriptor, size, offset)

    def read_at(offset: int, size: int) -> bytes:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, size)

    return read_at


class Ext4:
    """One file system. `size_bytes` is the size of the image, behind which nothing is read."""

    def __init__(self, read_at: ReadAt, size_bytes: int) -> None:
        self._read_at = read_at
        self._size = size_bytes
        self._cache: dict[int, bytes] = {}
        self._read_superblock()

    @property
    def clean(self) -> bool:
        """Whether the guest unmounted it. If not, files written last may be missing or short."""
        return self._clean

    def inode(self, number: int) -> Inode:
        """Return an inode by its number."""
        if not 1 <= number <= self._inodes:
            raise BadImage(f"the file system names inode {number}, which does not exist")
        group, index = divmod(number - 1, self._inodes_per_group)
        offset = self._inode_table(group) * self._block_size + index * self._inode_size
        block, at = divmod(offset, self._block_size)
        data = self._block(block)[at : at + self._inode_size]
        mode = _u16(data, 0x0)
        size = _u32(data, 0x4)
        if stat.S_ISREG(mode):
            size |= _u32(data, 0x6C) << 32
        if size > self._block_size << 32:
            raise BadImage(f"inode {number} claims {size} bytes, more than ext4 allows")
        return Inode(number, mode, size, _mtime(data), _u16(data, 0x1A), _u32(data, 0x20), data[0x28:0x64])

    def runs(self, inode: Inode) -> list[Run]:
        """Return where a file's bytes are, ascending, merged and cut to its size. Holes and preallocated space are left out."""
        if inode.flags & (_ENCRYPTED_FLAG | _INLINE_FLAG | _EA_INODE_FLAG):
            raise BadImage(f"inode {inode.number} is encrypted or stored inline, which is not supported")
        pieces = self._leaves(inode.block, None) if inode.flags & _EXTENTS_FLAG else self._mapped(inode)
        runs: list[Run] = []
        end = 0
        for seen, (logical, physical, count) in enumerate(pieces):
            if logical < end or not count:
                raise BadImage(f"the blocks of inode {inode.number} overlap")
            if seen >= _MAX_PIECES:
                raise BadImage(f"inode {inode.number} is in more than {_MAX_PIECES} pieces")
            end = logical + count
            if physical:
                self._add_run(runs, inode, logical, physical, count)
        return runs

    def records(self, folder: Inode) -> Iterator[tuple[bytes, int]]:
        """Yield the name and inode number of each entry of a folder but `.` and `..`, as they are: any bytes, also twice."""
        if not stat.S_ISDIR(folder.mode):
            raise BadImage(f"inode {folder.number} is used as a folder and is none")
        for run in self.runs(folder):
            if run.length % self._block_size:
                raise BadImage(f"the folder of inode {folder.number} does not end with a block")
            for offset in range(run.source, run.source + run.length, self._block_size):
                yield from self._block_records(offset // self._block_size)

    def link_target(self, inode: Inode) -> bytes:
        """Return the target of a symbolic link, of 1 to 4095 bytes and without NUL."""
        size = inode.size_bytes
        if not 0 < size < min(4096, self._block_size):
            raise BadImage(f"inode {inode.number} is a link of {size} bytes")
        target = inode.block[:size] if self._is_short_link(inode) else self.read(inode, 0, size)
        if b"\0" in target:
            raise BadImage(f"the target of the link of inode {inode.number} contains NUL")
        return target

    def read(self, inode: Inode, offset: int, size: int) -> bytes:
        """Return bytes of a file, holes as zeros, at most up to its end. For small pieces: `size` is memory."""
        size = max(0, min(size, inode.size_bytes - offset))
        data = bytearray(size)
        for run in self.runs(inode):
            start = max(run.offset, offset)
            stop = min(run.offset + run.length, offset + size)
            if start < stop:
                data[start - offset : stop - offset] = self._exactly(run.source + start - run.offset, stop - start)
        return bytes(data)

    def _read_superblock(self) -> None:
        data = self._exactly(_SUPERBLOCK_AT, 1024)
        if _u16(data, 0x38) != _MAGIC:
            raise BadImage("not an ext4 file system")
        old = _u32(data, 0x4C) == 0
        features = 0 if old else _u32(data, 0x60)
        _check_features(features)
        self._wide = bool(features & _64BIT)
        if _u32(data, 0x18) > 6:
            raise BadImage(f"the file system claims blocks of 2^{10 + _u32(data, 0x18)} bytes")
        self._block_size = 1024 << _u32(data, 0x18)
        self._blocks = _u32(data, 0x4) | (_u32(data, 0x150) << 32 if self._wide else 0)
        self._inodes_per_group = _u32(data, 0x28)
        self._inode_size = 128 if old else _u16(data, 0x58)
        self._descriptor_size = _u16(data, 0xFE) if self._wide else 32
        first, per_group = _u32(data, 0x14), _u32(data, 0x20)
        self._check_geometry(first, per_group)
        self._inodes = min(_u32(data, 0x0), self._inodes_per_group * -(-(self._blocks - first) // per_group))
        self._descriptors_at = (first + 1) * self._block_size
        self._clean = bool(_u16(data, 0x3A) & _CLEAN)

    def _check_geometry(self, first: int, per_group: int) -> None:
        size = self._block_size
        sensible = (
            first == (1 if size == 1024 else 0)
            and first < self._blocks
            and 0 < per_group <= 8 * size << 16  # with bigalloc one bit stands for many blocks
            and 0 < self._inodes_per_group <= 8 * size
            and _is_power_of_two(self._inode_size, 128, size)
            and _is_power_of_two(self._descriptor_size, 32, 1024)
        )
        if not sensible:
            raise BadImage("the file system's superblock makes no sense")
        if self._blocks * size > self._size:
            raise BadImage(f"the file system claims {self._blocks * size} bytes, the image has {self._size}")

    def _inode_table(self, group: int) -> int:
        """Return the block at which a group's inode table starts."""
        offset = self._descriptors_at + group * self._descriptor_size
        block, at = divmod(offset, self._block_size)
        data = self._block(block)
        high = _u32(data, at + 0x28) << 32 if self._descriptor_size >= 64 else 0
        return _u32(data, at + 0x8) | high

    def _leaves(self, node: bytes, depth: int | None) -> Iterator[tuple[int, int, int]]:
        """Yield (logical, physical, count) in blocks from an extent tree, physical 0 for preallocated space.

        `depth` is what the parent said, None at the root. An empty node below the root is refused, so that every node costs its
        writer an extent of ascending place.
        """
        magic, entries, _, here = _EXTENT_HEADER.unpack_from(node)
        capacity = len(node) // 12 - 1
        if magic != _EXTENT_MAGIC or entries > capacity or (here > _MAX_DEPTH if depth is None else here != depth or not entries):
            raise BadImage("an extent tree is damaged")
        for at in range(12, 12 + 12 * entries, 12):
            if here:
                _, low, high = _EXTENT_INDEX.unpack_from(node, at)
                yield from self._leaves(self._block(low | high << 32), here - 1)
            else:
                logical, count, high, low = _EXTENT_LEAF.unpack_from(node, at)
                written = count <= 32768
                yield logical, (low | high << 32) if written else 0, count if written else count - 32768

    def _mapped(self, inode: Inode) -> Iterator[tuple[int, int, int]]:
        """Yield (logical, physical, count) in blocks from the block map of ext2 and ext3."""
        numbers = Layout("<15I").unpack(inode.block)
        last = -(-inode.size_bytes // self._block_size)
        logical = 0
        for place, number in enumerate(numbers):
            level = max(0, place - 11)
            if logical >= last:
                return
            yield from self._map_level(number, level, logical, last)
            logical += (self._block_size // 4) ** level

    def _map_level(self, number: int, level: int, logical: int, last: int) -> Iterator[tuple[int, int, int]]:
        if number == 0 or logical >= last:
            return
        if level == 0:
            yield logical, number, 1
            return
        block = self._block(number)
        if block.count(0) == len(block):
            return  # or blocks of zeros, all three levels of them, would take hours to find nothing
        below = (self._block_size // 4) ** (level - 1)
        for (entry,) in Layout("<I").iter_unpack(block):
            yield from self._map_level(entry, level - 1, logical, last)
            logical += below

    def _add_run(self, runs: list[Run], inode: Inode, logical: int, physical: int, count: int) -> None:
        if physical + count > self._blocks:
            raise BadImage(f"inode {inode.number} has blocks outside the file system")
        offset, source = logical * self._block_size, physical * self._block_size
        length = min(count * self._block_size, inode.size_bytes - offset)
        if length <= 0:
            return
        if runs and runs[-1].offset + runs[-1].length == offset and runs[-1].source + runs[-1].length == source:
            runs[-1] = runs[-1]._replace(length=runs[-1].length + length)
            return
        if len(runs) >= MAX_EXTENTS:
            raise BadImage(f"inode {inode.number} is in more than {MAX_EXTENTS} pieces")
        runs.append(Run(offset, source, length))

    def _block_records(self, number: int) -> Iterator[tuple[bytes, int]]:
        data = self._block(number)
        at = 0
        while at < len(data):
            inode, length, name_length = _RECORD.unpack_from(data, at)
            if self._block_size == 1 << 16 and length in (0, 65535):
                length = 1 << 16  # does not fit u16; see directory.rst
            left = len(data) - at - length
            # Nothing or a whole record must be left: 4 bytes would be read over the block's end.
            if length < 8 or length % 4 or left < 0 or left == 4 or (inode and name_length > length - 8):
                raise BadImage(f"a folder is damaged in block {number}")
            name = data[at + 8 : at + 8 + name_length]
            if inode and name not in (b".", b".."):
                yield name, inode
            at += length

    def _is_short_link(self, inode: Inode) -> bool:
        return inode.size_bytes < len(inode.block) and not inode.flags & _EXTENTS_FLAG

    def _block(self, number: int) -> bytes:
        """Return a block of metadata, from a small cache."""
        data = self._cache.get(number)
        if data is None:
            if number >= self._blocks:
                raise BadImage(f"the file system points to block {number}, outside itself")
            data = self._exactly(number * self._block_size, self._block_size)
            if len(self._cache) >= _CACHED_BLOCKS:
                self._cache.clear()
            self._cache[number] = data
        return data

    def _exactly(self, offset: int, size: int) -> bytes:
        if offset + size > self._size:
            raise BadImage("the image is cut short")
        data = self._read_at(offset, size)
        while len(data) < size:
            more = self._read_at(offset + len(data), size - len(data))
            if not more:
                raise BadImage("the image is cut short")
            data += more
        return data


def _check_features(incompatible: int) -> None:
    for bit in (1 << n for n in range(32)):
        if incompatible & bit and bit not in _READABLE:
            raise BadImage(f"the file system has a feature that is not read: {_REFUSED.get(bit, hex(bit))}")


def _mtime(inode: bytes) -> int:
    """Return the modification time with the two bits that carry it past 2038."""
    low = _u32(inode, 0x10)
    seconds = low - (1 << 32) if low >= 1 << 31 else low
    if len(inode) > 128 and _u16(inode, 0x80) >= 12:
        seconds += (inode[0x88] & 3) << 32
    return seconds


def _u16(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 2], "little")


def _u32(data: bytes, at: int) -> int:
    return int.from_bytes(data[at : at + 4], "little")


def _is_power_of_two(number: int, low: int, high: int) -> bool:
    return low <= number <= high and number & (number - 1) == 0
