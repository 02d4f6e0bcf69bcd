"""Disk images as hostile input: what a file is, and what a worker takes. (What a publisher makes of others: disk_import.py.)

Policy. A disk of the grid is a plain qcow2 or an ISO. Publisher and worker both call `check_image`, which reads a few kilobytes
in pure Python; qemu-img sees an image only afterwards, confined, with its format always given, never probed.

    by content               publisher                                      worker
    qcow2, plain             kept as it is                                  taken
    qcow2, compressed        converted: compressed clusters triple boots    taken
    qcow2 with snapshots     converted, which leaves them out               taken: a guest cannot reach them
    qcow2 pointing outside   refused: backing file, external data file      refused
    qcow2, other             refused: encrypted, marked damaged or dirty, of unknown features, of absurd sizes
    OCI archive              kept: an image of a container                  taken, podman unpacks it confined
    ISO 9660 (also isohybrid) kept                                          taken
    raw with a boot sector   converted                                      refused
    vmdk, vdi, vhd, vhdx     converted, if they stand alone                 refused
    zst, gz, xz, bz2         unpacked, then as what is inside               refused
    tar (.ova), zip          the one disk inside is taken                   refused
    anything else            refused with what to do

qcow2 header (QEMU, docs/interop/qcow2.rst; all numbers big-endian): magic u32, version u32, backing file offset u64 and
length u32, cluster bits u32, size u64, encryption u32, L1 entries u32, L1 offset u64, refcount table offset u64 and clusters
u32, snapshots u32 and their offset u64; version 3: incompatible, compatible, autoclear features u64, refcount order u32,
header length u32; then extensions { type u32, length u32, data padded to 8 }.

A disk travels as one zstd frame of the image file, so that the cached file, once unpacked, is what the hypervisor opens.
"""

from __future__ import annotations

import contextlib
import os
import re
import stat
import struct
import threading
from collections.abc import Callable, Iterator
from enum import StrEnum
from pathlib import Path
from typing import BinaryIO

from msgspec import Struct

from deskgrid.archive import ParallelSha256, atomic_file, frame_pieces, write_all
from deskgrid.errors import BadArchive, BadImage, ProtocolError
from deskgrid.machines.blocking import Progress, Stopped, in_thread, on_loop
from deskgrid.machines.container_image import check_archive, looks_like_archive
from deskgrid.machines.deltas import applied
from deskgrid.machines.ext4 import ReadAt, file_reader
from deskgrid.model.ids import Sha256
from deskgrid.model.machines import DiskFormat

__all__ = [
    "CONVERT_HINT",
    "MAX_VIRTUAL_BYTES",
    "ImageInfo",
    "ImageKind",
    "check_image",
    "detect",
    "detect_format",
    "opened",
    "unpack_disk",
]

MAX_VIRTUAL_BYTES = 2 << 40
"""Largest disk taken if the caller sets no bound."""
_PADDING_BYTES = 1 << 20


class ImageKind(StrEnum):
    """What a file is, by its content alone."""

    QCOW2 = "qcow2"
    ISO = "iso"
    OCI = "oci"
    RAW = "raw disk"
    QCOW1 = "qcow (version 1)"
    VMDK = "vmdk"
    VDI = "vdi"
    VHD = "vhd"
    VHDX = "vhdx"
    QED = "qed"
    PARALLELS = "parallels"
    LUKS = "encrypted (LUKS)"
    FILE_SYSTEM = "bare ext file system"
    ZSTD = "packed file (zstd)"
    GZIP = "packed file (gzip)"
    XZ = "packed file (xz)"
    BZIP2 = "packed file (bzip2)"
    SEVEN_ZIP = "archive (7z)"
    ZIP = "archive (zip)"
    TAR = "archive (tar)"
    UNKNOWN = "unknown"


class ImageInfo(Struct, frozen=True, kw_only=True):
    """What an accepted image is."""

    format: DiskFormat
    virtual_bytes: int
    """Of the disk as the guest sees it."""
    file_bytes: int
    compressed: bool = False
    """Whether a qcow2 has compressed clusters (looked for in its first 65,536 tables)."""
    snapshots: int = 0
    """Internal snapshots of a qcow2. They are ignored."""


# --- what is it? ---

_MAGICS = (
    (0, b"KDMV", ImageKind.VMDK),
    (0, b"COWD", ImageKind.VMDK),
    (0, b"# Disk DescriptorFile", ImageKind.VMDK),
    (64, b"\x7f\x10\xda\xbe", ImageKind.VDI),
    (0, b"conectix", ImageKind.VHD),
    (0, b"vhdxfile", ImageKind.VHDX),
    (0, b"QED\0", ImageKind.QED),
    (0, b"WithoutFreeSpace", ImageKind.PARALLELS),
    (0, b"WithouFreSpacExt", ImageKind.PARALLELS),
    (0, b"LUKS\xba\xbe", ImageKind.LUKS),
    (0, b"\x28\xb5\x2f\xfd", ImageKind.ZSTD),
    (0, b"\x1f\x8b", ImageKind.GZIP),
    (0, b"\xfd7zXZ\0", ImageKind.XZ),
    (0, b"7z\xbc\xaf\x27\x1c", ImageKind.SEVEN_ZIP),
    (0, b"BZh", ImageKind.BZIP2),
    (0, b"PK\3\4", ImageKind.ZIP),
    (257, b"ustar", ImageKind.TAR),
    (510, b"\x55\xaa", ImageKind.RAW),
    (512, b"EFI PART", ImageKind.RAW),
    (1080, b"\x53\xef", ImageKind.FILE_SYSTEM),
)
"""Offset, bytes, kind; after qcow2 and ISO, in this order."""
CONVERT_HINT = "convert it first: qemu-img convert -O qcow2 FILE disk.qcow2"
_HINTS = {
    ImageKind.QCOW1: CONVERT_HINT,
    ImageKind.QED: CONVERT_HINT,
    ImageKind.PARALLELS: CONVERT_HINT,
    ImageKind.SEVEN_ZIP: "unpack it first",
    ImageKind.LUKS: "every worker must be able to read it, so it cannot be encrypted",
    ImageKind.FILE_SYSTEM: "a disk must have a boot sector",
    ImageKind.UNKNOWN: "a disk is a qcow2 or ISO image, or a raw disk with a boot sector",
}
_ISO_MARK_AT = 32769


def detect_format(path: Path) -> ImageKind:
    """Return what a file is by its content; its name does not count. Raise BadImage if it cannot be read."""
    with opened(path) as (read_at, size):
        return detect(read_at, size)


def detect(read_at: ReadAt, size: int) -> ImageKind:
    """Return what the bytes are that a function reads."""
    head = read_at(0, 4096)
    if head.startswith(b"QFI\xfb"):
        return ImageKind.QCOW2 if head[4:8] in (b"\0\0\0\2", b"\0\0\0\3") else ImageKind.QCOW1
    # Before raw: an isohybrid has a boot sector too, so that it boots from a stick.
    if read_at(_ISO_MARK_AT, 5) == b"CD001":
        return ImageKind.ISO
    if size >= 512 and read_at(size - 512, 8) == b"conectix":
        return ImageKind.VHD
    if head[257:262] == b"ustar" and looks_like_archive(read_at, size):
        return ImageKind.OCI
    return next((kind for at, mark, kind in _MAGICS if head[at : at + len(mark)] == mark), ImageKind.UNKNOWN)


@contextlib.contextmanager
def opened(path: Path) -> Iterator[tuple[ReadAt, int]]:
    """Open a regular file as a reader and its size. Raise BadImage if it cannot be."""
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(path, flags)
    except OSError as error:
        raise BadImage(f"cannot be opened: {error.strerror}", where=str(path)) from error
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode) or not status.st_size:
            raise BadImage("is empty or not a file", where=str(path))
        yield file_reader(descriptor), status.st_size
    finally:
        os.close(descriptor)


# --- may it be used? ---


def check_image(path: Path, *, max_virtual_bytes: int = MAX_VIRTUAL_BYTES) -> ImageInfo:
    """Check a disk by the policy above, reading its header and tables only. Raise BadImage, saying why and what to do.

    The format is found by content; compare it with the one that was promised. Guest and image may still disagree about what is inside:
    what holds then is that the hypervisor opens this file and no other.
    """
    with opened(path) as (read_at, size):
        return _check(read_at, size, max_virtual_bytes, str(path))


def _check(read_at: ReadAt, size: int, max_virtual_bytes: int, where: str) -> ImageInfo:
    kind = detect(read_at, size)
    if kind not in _CHECKS:
        raise BadImage(
            f"is of a kind that is not taken: {kind}", where=where, hint=_HINTS.get(kind, "deskgrid disk import takes it")
        )
    info = _CHECKS[kind](read_at, size, where)
    if info.virtual_bytes > max_virtual_bytes:
        raise BadImage(f"is a disk of {info.virtual_bytes} bytes, more than the {max_virtual_bytes} allowed", where=where)
    return info


def _check_iso(read_at: ReadAt, size: int, where: str) -> ImageInfo:
    sectors = int.from_bytes(read_at(32768 + 80, 4), "little")
    # Some writers count padding that they do not write, 300 KiB at most.
    if read_at(32768, 1) == b"\1" and sectors * 2048 > size + _PADDING_BYTES:
        raise BadImage(f"is cut short: {size} bytes of {sectors * 2048}", where=where, hint="download it again")
    return ImageInfo(format=DiskFormat.ISO, virtual_bytes=size, file_bytes=size)


def _check_oci(read_at: ReadAt, size: int, where: str) -> ImageInfo:
    try:
        return ImageInfo(format=DiskFormat.OCI, virtual_bytes=check_archive(read_at, size), file_bytes=size)
    except BadImage as error:
        raise BadImage(error.message, where=where, hint=error.hint) from error


_HEADER_2 = struct.Struct(">4s I Q I I Q I I Q Q I I Q")
_HEADER_3 = struct.Struct(">Q Q Q I I")
_DIRTY, _CORRUPT, _EXTERNAL, _PACKING, _WIDE_ENTRIES = 1, 2, 4, 8, 16
_KNOWN = _DIRTY | _CORRUPT | _EXTERNAL | _PACKING | _WIDE_ENTRIES
_REFUSED_EXTENSIONS = {
    0xE2792ACA: "a backing file",
    0x44415441: "an external data file",
    0x0537BE77: "encryption",
}
_REFUSED_FEATURES = {
    _EXTERNAL: ("keeps its data in another file", "make it one file: qemu-img convert -O qcow2 FILE disk.qcow2"),
    _CORRUPT: ("is marked as damaged", "repair it: qemu-img check -r all FILE"),
    _DIRTY: ("was not closed properly", "repair it: qemu-img check -r all FILE"),
}
_HEADER_BYTES = 1 << 16
_MAX_L1_BYTES = 32 << 20  # QEMU's own bound
_MAX_REFCOUNT_BYTES = 8 << 20
_MAX_TABLES = 1 << 16
_L1_PIECE_BYTES = 1 << 20
_OFFSET_BITS = 0x00FFFFFFFFFFFE00
_COMPRESSED_ENTRY = re.compile(rb"[\x40-\x7f\xc0-\xff]")
"""Top bytes of table entries with bit 62 set."""


class _Qcow2(Struct, frozen=True):
    """The header fields that matter once the refusals are through."""

    cluster: int
    size: int
    l1_entries: int
    l1_offset: int
    snapshots: int
    entry_bytes: int

    @property
    def table_covers(self) -> int:
        """Bytes of the disk that one L2 table stands for."""
        return self.cluster // self.entry_bytes * self.cluster


def _check_qcow2(read_at: ReadAt, size: int, where: str) -> ImageInfo:
    try:
        header = _read_header(read_at(0, _HEADER_BYTES), size)
    except BadImage as error:
        raise BadImage(error.message, where=where, hint=error.hint) from None
    compressed = _has_compressed(header, read_at, size, where)
    return ImageInfo(
        format=DiskFormat.QCOW2, virtual_bytes=header.size, file_bytes=size, compressed=compressed, snapshots=header.snapshots
    )


def _read_header(data: bytes, file_bytes: int) -> _Qcow2:
    if len(data) < 104:
        raise BadImage("is cut short")
    (_, version, backing, backing_length, bits, size, crypt, l1_entries, l1_offset, refcounts, refcount_clusters, snapshots, _) = (
        _HEADER_2.unpack_from(data)
    )
    features, _, autoclear, refcount_order, length = _HEADER_3.unpack_from(data, 72) if version == 3 else (0, 0, 0, 4, 72)
    if backing or backing_length:
        raise BadImage("has a backing file", hint="make it one file: qemu-img convert -O qcow2 FILE disk.qcow2")
    _check_features(features, autoclear)
    if crypt:
        raise BadImage("is encrypted", hint=_HINTS[ImageKind.LUKS])
    if not 9 <= bits <= 21 or (features & _WIDE_ENTRIES and bits < 14):
        raise BadImage(f"has clusters of 2^{bits} bytes")
    cluster = 1 << bits
    if version == 3 and (not 104 <= length <= cluster or length % 8 or refcount_order > 6):
        raise BadImage("has a header that makes no sense")
    if features & _PACKING and (length < 105 or data[104] > 1):
        raise BadImage("is compressed in a way that is not known")
    _check_extensions(data[:cluster], length)
    header = _Qcow2(cluster, size, l1_entries, l1_offset, snapshots, 16 if features & _WIDE_ENTRIES else 8)
    _check_tables(header, refcounts, refcount_clusters, file_bytes)
    return header


def _check_features(features: int, autoclear: int) -> None:
    if autoclear & 2:
        features |= _EXTERNAL  # "raw external": the same thing said again
    for bit, (message, hint) in _REFUSED_FEATURES.items():
        if features & bit:
            raise BadImage(message, hint=hint)
    if features & ~_KNOWN:
        raise BadImage(f"has unknown features ({features & ~_KNOWN:#x})", hint="convert it with an older qemu-img")


def _check_extensions(data: bytes, at: int) -> None:
    """Walk the header extensions; they end with type 0 or with the first cluster."""
    while at + 8 <= len(data):
        kind, length = struct.unpack_from(">II", data, at)
        if kind == 0:
            return
        if kind in _REFUSED_EXTENSIONS:
            raise BadImage(f"has {_REFUSED_EXTENSIONS[kind]}")
        at += 8 + length + -length % 8
    if at > len(data):
        raise BadImage("has header extensions that do not end")


def _check_tables(header: _Qcow2, refcounts: int, refcount_clusters: int, file_bytes: int) -> None:
    needed = -(-header.size // header.table_covers)
    l1_bytes = header.l1_entries * 8
    sensible = (
        0 < header.size < 1 << 63
        and needed <= header.l1_entries
        and l1_bytes <= _MAX_L1_BYTES
        and refcount_clusters * header.cluster <= _MAX_REFCOUNT_BYTES
        and header.l1_offset % header.cluster == 0
        and refcounts % header.cluster == 0
        and header.l1_offset > 0
        and refcounts > 0
        and header.snapshots <= 65536
    )
    if not sensible:
        raise BadImage("has a header that makes no sense")
    if header.l1_offset + l1_bytes > file_bytes or refcounts + refcount_clusters * header.cluster > file_bytes:
        raise BadImage("is cut short or damaged: its tables are outside the file")


def _has_compressed(header: _Qcow2, read_at: ReadAt, file_bytes: int, where: str) -> bool:
    """Look for a compressed cluster in the tables of the disk, each read once; check on the way that they are in the file."""
    looked_at = {0}  # no table
    for offset in _tables(header, read_at):
        if offset in looked_at:
            continue
        if offset % header.cluster or offset + header.cluster > file_bytes:
            raise BadImage("is cut short or damaged: a table is outside the file", where=where)
        if len(looked_at) <= _MAX_TABLES:
            looked_at.add(offset)
            if _COMPRESSED_ENTRY.search(read_at(offset, header.cluster)[:: header.entry_bytes]):
                return True
    return False


def _tables(header: _Qcow2, read_at: ReadAt) -> Iterator[int]:
    """Yield where the tables of the disk are; 0: nowhere. Read piece by piece: the list of them may have 4 million entries."""
    end = header.l1_offset + -(-header.size // header.table_covers) * 8
    for at in range(header.l1_offset, end, _L1_PIECE_BYTES):
        piece = read_at(at, min(_L1_PIECE_BYTES, end - at))
        yield from (entry & _OFFSET_BITS for (entry,) in struct.iter_unpack(">Q", piece))


_CHECKS: dict[ImageKind, Callable[[ReadAt, int, str], ImageInfo]] = {
    ImageKind.QCOW2: _check_qcow2,
    ImageKind.ISO: _check_iso,
    ImageKind.OCI: _check_oci,
}


# --- fetching ---


async def unpack_disk(
    transport: Path,
    output: Path,
    *,
    sha256: Sha256,
    size_bytes: int,
    format: DiskFormat,
    base: Path | None = None,
    progress: Progress | None = None,
    max_virtual_bytes: int = MAX_VIRTUAL_BYTES,
) -> ImageInfo:
    """Unpack a published disk into the cache: read-only, checked, complete and on disk, or not at all.

    With `base` `transport` is a delta to that older disk.

    Raises ProtocolError if it is not what `sha256`, `size_bytes` and `format` promise, BadImage if the policy refuses it, NoSpace.
    Never writes more than `size_bytes`. When cancelled, it stops within a second and leaves no part of a file.
    """
    tell = on_loop(progress)

    def work(stop: threading.Event) -> ImageInfo:
        with atomic_file(output, mode=0o444) as target, transport.open("rb", buffering=0) as source:
            if base is None:
                _unpack_into(target, frame_pieces(source), sha256, size_bytes, tell, stop)
            else:
                with base.open("rb", buffering=0) as old:
                    _unpack_into(target, applied(old, source), sha256, size_bytes, tell, stop)
            info = _check(file_reader(target.fileno()), size_bytes, max_virtual_bytes, output.name)
            if info.format is not format:
                raise ProtocolError(f"the disk is {info.format}, {format} was promised")
        return info

    return await in_thread(work)


def _unpack_into(
    target: BinaryIO, pieces: Iterator[bytes], sha256: Sha256, size_bytes: int, progress: Progress, stop: threading.Event
) -> None:
    done = 0
    with ParallelSha256() as digest:
        try:
            for piece in pieces:
                if stop.is_set():
                    raise Stopped
                done += len(piece)
                if done > size_bytes:
                    raise ProtocolError(f"the disk unpacks to more than the {size_bytes} bytes that were promised")
                digest.update(piece)
                write_all(target, piece)
                progress(done, size_bytes)
        except BadArchive as error:
            raise ProtocolError(f"the disk cannot be unpacked: {error.message}") from error
        if done != size_bytes or digest.hexdigest() != sha256:
            raise ProtocolError("the disk is not the one that was promised: its size or sha256 is different")
