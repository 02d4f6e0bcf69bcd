"""The one disk image inside packed files and archives, as hostile input: an .ova is a tar, a cloud image may be disk.raw.xz or in a zip.

What is written is one file with a name of ours, whatever an archive calls it: no name of a member is ever opened. What a member is, is found by
its content; the manifest (.mf) of an .ova is checked if it is there. Bounds: layers, bytes unpacked, room left on the disk, memory.
"""

from __future__ import annotations

import bz2
import gzip
import hashlib
import io
import lzma
import os
import re
import shutil
import threading
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO, Protocol, TypeVar

from deskgrid.archive import out_of_space, printable, zstd
from deskgrid.errors import BadImage, NoSpace
from deskgrid.machines.blocking import CHUNK, Progress, Stopped, in_thread, on_loop
from deskgrid.machines.ext4 import ReadAt
from deskgrid.machines.images import ImageKind, detect, detect_format, opened
from deskgrid.machines.tar_members import TarMember, tar_members

__all__ = ["SPARE_BYTES", "unwrap"]

M = TypeVar("M")
SPARE_BYTES = 1 << 30
"""Left free on the disk."""
_MOST_LAYERS = 4
_MOST_MEMBERS = 10_000
_MOST_DIRECTORY_BYTES = 4 << 20
"""Of a zip; more than is read at once of a member."""
_ZIP_PACKINGS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
"""What ever is in a zip of a disk. For the memory that LZMA may ask for zipfile knows no bound."""
_XZ_MEMORY_BYTES = 512 << 20
_DISKS = (ImageKind.QCOW2, ImageKind.RAW, ImageKind.VMDK, ImageKind.VDI, ImageKind.VHD, ImageKind.VHDX)
_MOST_MANIFEST_BYTES = 1 << 16
_MANIFEST_LINE = re.compile(rb"(SHA1|SHA256|SHA512) ?\(([^)\n]{1,255})\) ?= ?([0-9a-fA-F]{40,128})")
_ERRORS = (
    *(EOFError, RuntimeError, NotImplementedError, ValueError),
    *(zipfile.BadZipFile, zlib.error, lzma.LZMAError, zstd.ZstdError, gzip.BadGzipFile),
)


async def unwrap(source: Path, folder: Path, *, max_bytes: int, progress: Progress | None = None) -> Path:
    """Return the file with the disk image: `source` itself, or a new file in `folder`.

    Raise BadImage (several disks, none, damaged, more than `max_bytes`), NoSpace if less than a GiB would be left.
    When it fails or is cancelled, nothing is left.
    """
    tell = on_loop(progress)
    file = source
    for layer in range(_MOST_LAYERS):
        unpack = _UNPACKERS.get(detect_format(file))
        if unpack is None:
            return file
        target = folder / f".{os.getpid()}.layer{layer}.part"
        try:
            await in_thread(_work(unpack, file, target, max_bytes, tell))
        except BaseException:
            target.unlink(missing_ok=True)
            raise
        finally:
            if file != source:
                file.unlink(missing_ok=True)
        file = target
    file.unlink(missing_ok=True)
    raise BadImage(f"is packed more than {_MOST_LAYERS} times")


def _work(
    unpack: Callable[[Path, _Target], None], file: Path, target: Path, max_bytes: int, tell: Progress
) -> Callable[[threading.Event], None]:
    def work(stop: threading.Event) -> None:
        with out_of_space("the unpacked disk"), target.open("xb") as output:
            try:
                unpack(file, _Target(output, max_bytes, tell, stop))
            except (*_ERRORS, OSError) as error:
                if isinstance(error, OSError) and error.errno is not None:
                    raise  # the system's; what has no number is bz2's word for damage
                raise BadImage(
                    f"cannot be unpacked: {printable(str(error))[:200] or 'it is damaged'}", hint="fetch it again"
                ) from error

    return work


class _Readable(Protocol):
    def read(self, size: int, /) -> bytes: ...


class _Target:
    """The file that is written: bounded, with holes for zeros."""

    def __init__(self, output: BinaryIO, max_bytes: int, tell: Progress, stop: threading.Event) -> None:
        self._output = output
        self._max_bytes = max_bytes
        self._tell = tell
        self._stop = stop

    def fill(self, pieces: Iterable[bytes], total_bytes: int = 0) -> None:
        """Write what there is. Raise BadImage, NoSpace, Stopped."""
        size = kept = 0
        room = shutil.disk_usage(Path(self._output.name).parent).free - SPARE_BYTES
        for data in pieces:
            if self._stop.is_set():
                raise Stopped
            size += len(data)
            if size > self._max_bytes:
                raise BadImage(f"unpacks to more than the {self._max_bytes} bytes allowed")
            if data.count(0) != len(data):  # zeros become a hole
                kept += len(data)
                if kept > room:
                    raise NoSpace("no space for the unpacked disk: less than 1 GiB would be left free", hint="free some disk space")
                self._output.seek(size - len(data))
                self._output.write(data)
            self._tell(size, total_bytes)
        self._output.truncate(size)


# ---- packed files


def _unpack_gzip(file: Path, target: _Target) -> None:
    with gzip.open(file) as source:
        target.fill(_pieces(source))


def _unpack_bzip2(file: Path, target: _Target) -> None:
    with bz2.open(file) as source:
        target.fill(_pieces(source))


def _unpack_zstd(file: Path, target: _Target) -> None:
    with zstd.open(file) as source:
        target.fill(_pieces(source))


def _pieces(source: _Readable) -> Iterator[bytes]:
    while data := source.read(CHUNK):
        yield data


def _unpack_xz(file: Path, target: _Target) -> None:
    with file.open("rb") as source:
        target.fill(_xz_pieces(source))


def _xz_pieces(source: BinaryIO) -> Iterator[bytes]:
    """Yield what the streams hold. lzma.open has no bound on the memory that a header may ask for."""
    rest = source.read(CHUNK)
    while rest:
        stream = lzma.LZMADecompressor(format=lzma.FORMAT_XZ, memlimit=_XZ_MEMORY_BYTES)
        while not stream.eof:
            if stream.needs_input and not rest and not (rest := source.read(CHUNK)):
                raise EOFError("it is cut short")
            data, rest = stream.decompress(rest, CHUNK), b""
            if data:
                yield data
        rest = _after_padding(source, stream.unused_data)


def _after_padding(source: BinaryIO, rest: bytes) -> bytes:
    """Return what comes after zeros, which may be between streams; nothing at the end."""
    while not (rest := rest.lstrip(b"\0")):
        if not (rest := source.read(CHUNK)):
            break
    return rest


# ---- archives


def _unpack_tar(file: Path, target: _Target) -> None:
    with opened(file) as (read_at, size):
        members = [member for member in tar_members(read_at, size) if member.is_file]
        kinds = {member: detect(_window(read_at, member), member.size) for member in members}
        chosen = _choose({member: (member.name, kind) for member, kind in kinds.items()})
        pieces: Iterator[bytes] = _slices(read_at, chosen)
        target.fill(_checked(pieces, chosen.name, _manifests(read_at, members)), chosen.size)


def _window(read_at: ReadAt, member: TarMember) -> ReadAt:
    return lambda offset, size: read_at(member.at + offset, max(0, min(size, member.size - offset)))


def _slices(read_at: ReadAt, member: TarMember) -> Iterator[bytes]:
    for offset in range(0, member.size, CHUNK):
        yield read_at(member.at + offset, min(CHUNK, member.size - offset))


def _manifests(read_at: ReadAt, members: list[TarMember]) -> dict[str, tuple[str, str]]:
    """Return what the manifests of an .ova say: algorithm and digest of each file."""
    wanted = [member for member in members if member.name.endswith(".mf") and member.size <= _MOST_MANIFEST_BYTES]
    lines = (found for member in wanted[:1] for found in _MANIFEST_LINE.findall(read_at(member.at, member.size)))
    return {
        name.decode(errors="replace"): (algorithm.decode().lower(), digest.decode().lower()) for algorithm, name, digest in lines
    }


def _checked(pieces: Iterator[bytes], name: str, promised: dict[str, tuple[str, str]]) -> Iterator[bytes]:
    """Pass the pieces on. Raise BadImage at the end if they are not what the manifest says."""
    if name not in promised:
        yield from pieces
        return
    algorithm, wanted = promised[name]
    digest = hashlib.new(algorithm, usedforsecurity=False)
    for data in pieces:
        digest.update(data)
        yield data
    if digest.hexdigest() != wanted:
        raise BadImage(f"is damaged: {printable(name)} is not what its manifest says", hint="fetch it again")


class _ZipFile(io.BufferedReader):
    """A file of a bounded directory: zipfile reads all of it at once before it tells how many members there are."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MOST_DIRECTORY_BYTES:
            raise BadImage(f"has a directory of more than {_MOST_DIRECTORY_BYTES} bytes")
        return super().read(size)


def _unpack_zip(file: Path, target: _Target) -> None:
    with _ZipFile(io.FileIO(file)) as source, zipfile.ZipFile(source) as archive:
        _unpack_member(archive, target)


def _unpack_member(archive: zipfile.ZipFile, target: _Target) -> None:
    members = [member for member in archive.infolist() if not member.is_dir()]
    if len(members) > _MOST_MEMBERS:
        raise BadImage(f"has more than {_MOST_MEMBERS} members")
    if any(member.compress_type not in _ZIP_PACKINGS for member in members):
        raise BadImage("is packed in a way that is not taken", hint="make the zip without LZMA and bzip2, or unpack it first")
    found = {}
    for member in members:
        with archive.open(member) as source:
            head = source.read(1 << 16)
        found[member] = (member.filename, detect(lambda offset, size, head=head: head[offset : offset + size], len(head)))  # type: ignore[misc]
    chosen = _choose(found)
    with archive.open(chosen) as source:
        target.fill(_pieces(source), chosen.file_size)


def _choose(found: dict[M, tuple[str, ImageKind]]) -> M:
    """Return the one member with a disk; else the one ISO, or the one packed file. Raise BadImage."""
    for wanted in (_DISKS, (ImageKind.ISO,), tuple(_UNPACKERS)):
        members = [member for member, (_, kind) in found.items() if kind in wanted]
        if len(members) > 1:
            names = ", ".join(printable(found[member][0])[:100] for member in members[:5])
            raise BadImage(f"has several disks in it: {names}", hint="unpack it, and import the one that boots")
        if members:
            return members[0]
    raise BadImage("has no disk in it")


_UNPACKERS: dict[ImageKind, Callable[[Path, _Target], None]] = {
    ImageKind.GZIP: _unpack_gzip,
    ImageKind.BZIP2: _unpack_bzip2,
    ImageKind.ZSTD: _unpack_zstd,
    ImageKind.XZ: _unpack_xz,
    ImageKind.TAR: _unpack_tar,
    ImageKind.ZIP: _unpack_zip,
}
