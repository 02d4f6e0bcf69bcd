"""qcow2 images of our own (docs/interop/qcow2.txt of QEMU): made without a program, and read, when a guest has filled them, without one.

All are of version 3 with clusters of 64 KiB. Numbers are big-endian.

    cluster 0   header: magic u32, version u32, backing file offset u64 and length u32, cluster bits u32, size u64, encryption u32,
                L1 entries u32, L1 offset u64, refcount table offset u64 and clusters u32, snapshots u32 and their offset u64;
                features (incompatible, compatible, autoclear) u64, refcount order u32, header length u32
    refcounts   a table of u64 offsets of blocks, each with a u16 per cluster of the file
    L1          u64 offsets of L2 tables
    L2          a table is one cluster of u64 entries: where a cluster of the disk is in the file

    entry       bits 9..55 offset (0: nothing there), bit 0 reads as zeros, bit 62 compressed, bit 63 nobody else refers to it

An image never names its base: the driver gives that explicitly, so no file is opened because an image says so. Checkpoints are
internal snapshots: a snapshot has an L1 table of its own, and what it refers to is never written again.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from deskgrid.errors import BadImage
from deskgrid.machines.ext4 import ReadAt

__all__ = ["Qcow2Reader", "create_overlay", "is_qcow2", "pack_sparse", "qcow2_virtual_size", "vital_features"]

_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_ENTRIES = _CLUSTER // 8
_REFCOUNTS = _CLUSTER // 2
"""Clusters that one refcount block counts."""
_MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
_HEADER_V3 = struct.Struct(">QQQII")
_HEADER_BYTES = _HEADER.size + _HEADER_V3.size
_MAX_VIRTUAL_BYTES = 1 << 46
_ALONE = 1 << 63
_COMPRESSED = 1 << 62
_ZERO = 1
_OFFSET = 0x00FFFFFFFFFFFE00
_CACHED_TABLES = 64


def is_qcow2(head: bytes) -> bool:
    """Tell whether a file that begins so is a qcow2 image."""
    return head[:4] == _MAGIC


def qcow2_virtual_size(path: Path) -> int:
    """Return the size in bytes of a qcow2 image as a guest sees it.

    Raise BadImage unless the image stands alone: no backing file, no external data file, no encryption. (The full check
    was made when it came into the cache; this is the last line, at the moment of use.)
    """
    with path.open("rb") as image:
        head = image.read(_HEADER_BYTES)
    if len(head) < _HEADER.size or not is_qcow2(head):
        raise BadImage("this is not a qcow2 disk", where=path.name)
    _, version, backing, _, _, size, encryption, *_ = _HEADER.unpack_from(head)
    features = _HEADER_V3.unpack_from(head, _HEADER.size)[0] if version >= 3 and len(head) == _HEADER_BYTES else 0
    if backing or encryption or features & 0b100:
        raise BadImage(
            "the disk depends on another file, or is encrypted",
            where=path.name,
            hint="qemu-img convert makes one that stands alone",
        )
    if not 0 < size <= _MAX_VIRTUAL_BYTES:
        raise BadImage(f"a disk of {size} bytes is not taken", where=path.name)
    return int(size)


def vital_features(path: Path) -> int:
    """Return the bits of what a program must understand to read a qcow2 image."""
    with path.open("rb") as image:
        head = image.read(_HEADER_BYTES)
    return int(_HEADER_V3.unpack_from(head, _HEADER.size)[0]) if len(head) == _HEADER_BYTES and head[7] >= 3 else 0


# ---- making


def create_overlay(path: Path, size_bytes: int) -> None:
    """Create an empty overlay of the given virtual size: every sector not written yet is read from its base."""
    with path.open("xb") as image:
        _write(image, size_bytes, [], [])


def pack_sparse(raw: Path, path: Path) -> None:
    """Create an image that stands alone from the data of a sparse raw file; holes take no room. The system must tell holes (lseek)."""
    with raw.open("rb") as source, path.open("xb") as image:
        size = source.seek(0, os.SEEK_END)
        numbers = list(_data_clusters(source.fileno(), size))
        _write(image, size, numbers, (_read_cluster(source, number) for number in numbers))


def _data_clusters(descriptor: int, size: int) -> Iterator[int]:
    """Yield the numbers of the clusters that have data, each once, ascending."""
    at, last = 0, -1
    while at < size:
        try:
            start = os.lseek(descriptor, at, os.SEEK_DATA)
        except OSError:  # nothing but a hole
            return
        at = os.lseek(descriptor, start, os.SEEK_HOLE)
        for number in range(max(start // _CLUSTER, last + 1), -(-at // _CLUSTER)):
            yield number
            last = number


def _read_cluster(source: BinaryIO, number: int) -> bytes:
    source.seek(number * _CLUSTER)
    return source.read(_CLUSTER).ljust(_CLUSTER, b"\0")


def _write(image: BinaryIO, size: int, numbers: list[int], data: Iterable[bytes]) -> None:
    """Write an image whose clusters `numbers` have this data."""
    l1_entries = -(-size // (_CLUSTER * _ENTRIES))
    l1_clusters = max(1, -(-l1_entries * 8 // _CLUSTER))
    tables: dict[int, bytearray] = {}
    for number in numbers:
        tables.setdefault(number // _ENTRIES, bytearray(_CLUSTER))
    blocks = 1
    while (clusters := 2 + blocks + l1_clusters + len(tables) + len(numbers)) > blocks * _REFCOUNTS:
        blocks += 1
    if blocks > _ENTRIES:
        raise BadImage(f"a disk of {size} bytes is not taken")
    l1_at = 2 + blocks
    l2_at = l1_at + l1_clusters
    data_at = l2_at + len(tables)
    for place, number in enumerate(numbers):
        entry = _ALONE | (data_at + place) * _CLUSTER
        struct.pack_into(">Q", tables[number // _ENTRIES], number % _ENTRIES * 8, entry)
    l1 = bytearray(l1_clusters * _CLUSTER)
    for place, index in enumerate(tables):
        struct.pack_into(">Q", l1, index * 8, _ALONE | (l2_at + place) * _CLUSTER)
    image.write(_HEADER.pack(_MAGIC, 3, 0, 0, _CLUSTER_BITS, size, 0, l1_entries, l1_at * _CLUSTER, _CLUSTER, 1, 0, 0))
    image.write(_HEADER_V3.pack(0, 0, 0, 4, _HEADER_BYTES))
    image.seek(_CLUSTER)
    image.write(struct.pack(f">{blocks}Q", *((2 + block) * _CLUSTER for block in range(blocks))))
    image.seek(2 * _CLUSTER)
    image.write(struct.pack(">H", 1) * clusters)
    if tables:
        image.seek(l1_at * _CLUSTER)
        image.write(l1)
        image.writelines(tables.values())
        image.writelines(data)
    image.truncate(clusters * _CLUSTER)


# ---- reading


class Qcow2Reader:
    """The disk in an image that stands alone, read through a function that reads the file. Every offset is checked. All errors are BadImage.

    `size_bytes` is the disk's size as the guest saw it.
    """

    def __init__(self, read_at: ReadAt) -> None:
        self._file = read_at
        head = read_at(0, _HEADER_BYTES)
        if len(head) < _HEADER_BYTES or not is_qcow2(head):
            raise BadImage("the disk is not a qcow2 image")
        _, version, backing, _, bits, size, encryption, l1_entries, l1_at, *_ = _HEADER.unpack_from(head)
        features = _HEADER_V3.unpack_from(head, _HEADER.size)[0]
        if (version, backing, bits, encryption, features) != (3, 0, _CLUSTER_BITS, 0, 0):
            raise BadImage("the disk is a qcow2 image of a kind that we do not make")
        needed = -(-size // (_CLUSTER * _ENTRIES))
        if not 0 < size <= _MAX_VIRTUAL_BYTES or l1_entries < needed:
            raise BadImage("the disk's image is damaged: its header makes no sense")
        self.size_bytes: int = size
        self._l1 = self._entries(l1_at, needed)
        self._tables: dict[int, tuple[int, ...]] = {}

    def read_at(self, offset: int, size: int) -> bytes:
        """Return the bytes at an offset of the disk; fewer at its end."""
        pieces = []
        end = min(offset + size, self.size_bytes)
        while offset < end:
            place, length = self.locate(offset, end - offset)
            data = bytes(length) if place is None else self._file(place, length)
            if len(data) < length:
                raise BadImage("the disk's image is cut short")
            pieces.append(data)
            offset += length
        return b"".join(pieces)

    def locate(self, offset: int, size: int) -> tuple[int | None, int]:
        """Return where in the file the disk's bytes from `offset` on are, None for zeros, and how many of `size` bytes follow there without a gap."""
        size = min(size, self.size_bytes - offset)
        place = self._place(offset)
        length = min(size, _CLUSTER - offset % _CLUSTER)
        while length < size:
            following = self._place(offset + length)
            if following != (None if place is None else place + length):
                break
            length = min(size, length + _CLUSTER)
        return place, length

    def _place(self, offset: int) -> int | None:
        number = offset >> _CLUSTER_BITS
        entry = self._table(number // _ENTRIES)[number % _ENTRIES]
        if entry & _COMPRESSED:
            raise BadImage("the disk's image has compressed clusters, which we do not make")
        at = entry & _OFFSET
        return None if entry & _ZERO or not at else at + offset % _CLUSTER

    def _table(self, index: int) -> tuple[int, ...]:
        table = self._tables.get(index)
        if table is None:
            at = self._l1[index] & _OFFSET
            table = self._entries(at, _ENTRIES) if at else (0,) * _ENTRIES
            if len(self._tables) >= _CACHED_TABLES:
                del self._tables[next(iter(self._tables))]
            self._tables[index] = table
        return table

    def _entries(self, at: int, count: int) -> tuple[int, ...]:
        data = self._file(at, count * 8)
        if at % _CLUSTER or len(data) < count * 8:
            raise BadImage("the disk's image is damaged: a table is outside the file")
        return struct.unpack(f">{count}Q", data)
