"""Deltas: how a disk image is made from an older one. Images built from the same packages have most of their 4 KiB blocks in common, but elsewhere.

Layout of a delta, as it travels: one zstd frame of

    magic      8 bytes  "dgdelta1"
    records    each: offset u64, length u64, little endian, in whole blocks of 4 KiB but for the length of the last one
        offset < 2^64 - 1     `length` bytes of the old image from `offset` on
        offset = 2^64 - 1     `length` bytes, at most 1 MiB, that follow here
    end        offset and length 0

A delta is hostile input: what it makes is bounded by the size that the new image is to have, and counts only if its sha256 is right
(machines/images.py). Nothing but the old image is read. Whole blocks bound what a small delta can cost in time, too, and what somebody who knows only
a part of the old image could try to guess of the rest.

Measured (docs/benchmarks.md): 0.3 % of a Debian disk for one package more; zstd's own --patch-from makes as small ones, but needs memory
for the whole old image on the PC where it is applied.
"""

from __future__ import annotations

import hashlib
import os
import struct
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from deskgrid.archive import ParallelSha256, atomic_file, frame_pieces, write_all, zstd
from deskgrid.errors import ProtocolError
from deskgrid.machines.blocking import CHUNK, Progress, Stopped, chunks, in_thread, on_loop
from deskgrid.model.data import Blob
from deskgrid.model.ids import Sha256

__all__ = ["MOST_BASE_BYTES", "applied", "make_delta"]

MOST_BASE_BYTES = 16 << 30
"""Of the old image: what is known of its blocks while a delta is made takes about 120 bytes of memory for each."""
_MAGIC = b"dgdelta1"
_RECORD = struct.Struct("<QQ")
_LITERAL = (1 << 64) - 1
_BLOCK = 4096
_LEVEL = 9


async def make_delta(
    base: Path, transport: Path, output: Path, *, most_bytes: int, progress: Progress | None = None
) -> Blob | None:
    """Write how the image packed in `transport` is made from the image `base`; return what it is, None (and no file) if it has more than `most_bytes`."""
    tell = on_loop(progress)
    return await in_thread(lambda stop: _make(base, transport, output, most_bytes, tell, stop))


def _make(base: Path, transport: Path, output: Path, most_bytes: int, progress: Progress, stop: threading.Event) -> Blob | None:
    if base.stat().st_size > MOST_BASE_BYTES:
        return None
    compressor = zstd.ZstdCompressor(
        options={zstd.CompressionParameter.compression_level: _LEVEL, zstd.CompressionParameter.checksum_flag: 1}
    )
    size = 0
    with base.open("rb", buffering=0) as old, transport.open("rb", buffering=0) as source, ParallelSha256() as digest:
        known = _known_blocks(old, stop)
        try:
            with atomic_file(output, mode=0o644) as target:

                def put(data: bytes) -> int:
                    digest.update(data)
                    write_all(target, data)
                    if size + len(data) > most_bytes:
                        raise _TooLarge
                    return len(data)

                for piece in _records(old, known, _blocks(frame_pieces(source), progress, stop)):
                    size += put(compressor.compress(piece))
                size += put(compressor.flush())
        except _TooLarge:
            return None
    return Blob(sha256=Sha256(digest.hexdigest()), size_bytes=size)


class _TooLarge(Exception):
    """It does not pay."""


def _known_blocks(old: BinaryIO, stop: threading.Event) -> dict[bytes, int]:
    """Return where each whole block of an image is found first, by a short digest."""
    known: dict[bytes, int] = {}
    offset = 0
    for chunk in chunks(old, stop):
        for start in range(0, len(chunk) - _BLOCK + 1, _BLOCK):
            known.setdefault(_digest(chunk[start : start + _BLOCK]), offset + start)
        offset += len(chunk)
    return known


def _digest(block: bytes) -> bytes:
    return hashlib.blake2b(block, digest_size=8).digest()


def _blocks(pieces: Iterator[bytes], progress: Progress, stop: threading.Event) -> Iterator[bytes]:
    """Yield whole blocks, and what is left at the end."""
    rest, done = b"", 0
    for piece in pieces:
        if stop.is_set():
            raise Stopped
        data = rest + piece
        whole = len(data) - len(data) % _BLOCK
        for start in range(0, whole, _BLOCK):
            yield data[start : start + _BLOCK]
        rest = data[whole:]
        done += len(piece)
        progress(done, 0)
    if rest:
        yield rest


def _records(old: BinaryIO, known: dict[bytes, int], blocks: Iterator[bytes]) -> Iterator[bytes]:
    """Yield the delta before it is packed. Neighbours in the old image become one record."""
    yield _MAGIC
    literal = bytearray()
    offset = length = 0
    for block in blocks:
        found = _find(old, known, block, offset + length if length else None)
        if found is None:
            if length:
                yield _RECORD.pack(offset, length)
                length = 0
            literal += block
            if len(literal) >= CHUNK:
                yield _RECORD.pack(_LITERAL, len(literal)) + literal
                literal.clear()
            continue
        if literal:
            yield _RECORD.pack(_LITERAL, len(literal)) + literal
            literal.clear()
        if length and found == offset + length:
            length += _BLOCK
            continue
        if length:
            yield _RECORD.pack(offset, length)
        offset, length = found, _BLOCK
    if length:
        yield _RECORD.pack(offset, length)
    if literal:
        yield _RECORD.pack(_LITERAL, len(literal)) + literal
    yield _RECORD.pack(0, 0)


def _find(old: BinaryIO, known: dict[bytes, int], block: bytes, after: int | None) -> int | None:
    """Return where a block is in the old image, by preference after the one before: then it makes that record longer."""
    for place in (after, known.get(_digest(block))):
        if place is not None and len(block) == _BLOCK and _read(old, place, _BLOCK) == block:
            return place
    return None


def _read(image: BinaryIO, offset: int, size: int) -> bytes:
    image.seek(offset)
    return image.read(size)


# Applying


def applied(base: BinaryIO, packed: BinaryIO) -> Iterator[bytes]:
    """Yield the new image that a packed delta makes of an old one, at most 1 MiB at a time.

    Raise ProtocolError or BadArchive if it is no delta, or not of this image.
    """
    base_bytes = os.fstat(base.fileno()).st_size
    stream = _Stream(frame_pieces(packed))
    if stream.take(len(_MAGIC)) != _MAGIC:
        raise ProtocolError("this is not a delta")
    whole = True
    while True:
        offset, length = _RECORD.unpack(stream.take(_RECORD.size))
        if length and not whole:
            raise ProtocolError("the delta has a piece that is no whole block")
        whole = length % _BLOCK == 0 and (offset == _LITERAL or offset % _BLOCK == 0)
        if offset == _LITERAL:
            if not 0 < length <= CHUNK:
                raise ProtocolError("the delta has a piece of a wrong length")
            yield stream.take(length)
        elif length:
            if not whole:
                raise ProtocolError("the delta copies what is no whole block")
            if offset + length > base_bytes:
                raise ProtocolError("the delta is of another disk: it reaches past the end of this one")
            yield from _copied(base, offset, length)
        else:
            stream.end()
            return


def _copied(base: BinaryIO, offset: int, length: int) -> Iterator[bytes]:
    end = offset + length
    while offset < end:
        piece = _read(base, offset, min(CHUNK, end - offset))
        if not piece:
            raise ProtocolError("the disk that the delta is of was changed")
        yield piece
        offset += len(piece)


class _Stream:
    """Pieces read as a stream of bytes."""

    def __init__(self, pieces: Iterator[bytes]) -> None:
        self._pieces = pieces
        self._rest = bytearray()

    def take(self, size: int) -> bytes:
        while len(self._rest) < size:
            piece = next(self._pieces, None)
            if piece is None:
                raise ProtocolError("the delta is cut short")
            self._rest += piece
        taken = bytes(self._rest[:size])
        del self._rest[:size]
        return taken

    def end(self) -> None:
        """Raise ProtocolError if anything follows."""
        if self._rest or any(self._pieces):
            raise ProtocolError("something follows the end of the delta")
