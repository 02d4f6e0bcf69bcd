"""The torrent of a blob: BitTorrent v2 (BEP 52), one file, in which every 16 KiB can be checked by itself. Pure.

    torrent     bencoded {"info": INFO, "piece layers": {ROOT: LAYER}}
    INFO        {"file tree": {NAME: {"": {"length": SIZE, "pieces root": ROOT}}}, "meta version": 2, "name": NAME, "piece length": N,
                 "private": 1, "ssl-cert": CERTIFICATE OF THE GRID'S AUTHORITY}
    LAYER       the sha256 at the top of each piece's Merkle tree, 32 bytes each; ROOT is the top of the tree over them

Private: peers are told by the server alone. The certificate makes all connections TLS, and only who shows one for NAME, signed by that
authority, takes part: knowing the torrent is not enough. What the server keeps of a blob is LAYER; the rest follows from it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping

from deskgrid.model.data import Blob
from deskgrid.model.ids import Sha256

__all__ = ["HASH_BYTES", "LEAST_BYTES", "PieceHasher", "bencoded", "piece_bytes", "piece_count", "torrent_name", "torrent_of"]

HASH_BYTES = 32
LEAST_BYTES = 4 << 20
"""Smaller blobs have no torrent: by the time that others are found, they have come from the server."""
_BLOCK_BYTES = 1 << 14
_LEAST_PIECE_BYTES = 1 << 18
_MOST_PIECE_BYTES = 1 << 24
_PIECES = 2048
"""That a blob is cut into at most, unless its pieces would be larger than 16 MiB."""
_NAME_DIGITS = 40
"""Of the blob's sha256, in names: a certificate's name has 64 characters at most."""


def torrent_name(sha256: Sha256) -> str:
    """Return the name of a blob in its torrent and in the certificates of those who may share it."""
    return f"{sha256[:_NAME_DIGITS]}.blob.deskgrid"


def piece_bytes(size_bytes: int) -> int:
    """Return the size of the pieces of a blob: a power of two, 256 KiB to 16 MiB."""
    size = _LEAST_PIECE_BYTES
    while size * _PIECES < size_bytes and size < _MOST_PIECE_BYTES:
        size *= 2
    return size


def piece_count(size_bytes: int) -> int:
    """Return how many pieces a blob has."""
    return -(-size_bytes // piece_bytes(size_bytes))


class PieceHasher:
    """Makes the layer of a blob's pieces while its bytes go by."""

    def __init__(self, size_bytes: int) -> None:
        self._blocks_in_piece = piece_bytes(size_bytes) // _BLOCK_BYTES
        self._rest = b""
        self._leaves: list[bytes] = []
        self._layer: list[bytes] = []

    def update(self, data: bytes) -> None:
        """Take the next bytes."""
        view = memoryview(self._rest + data if self._rest else data)
        whole = len(view) - len(view) % _BLOCK_BYTES
        for start in range(0, whole, _BLOCK_BYTES):
            self._leaf(view[start : start + _BLOCK_BYTES])
        self._rest = bytes(view[whole:])

    def layer(self) -> bytes:
        """Return the layer, once all bytes were taken."""
        if self._rest:
            self._leaf(memoryview(self._rest))
            self._rest = b""
        if self._leaves:
            self._end_piece()
        return b"".join(self._layer)

    def _leaf(self, block: memoryview) -> None:
        self._leaves.append(hashlib.sha256(block).digest())
        if len(self._leaves) == self._blocks_in_piece:
            self._end_piece()

    def _end_piece(self) -> None:
        self._layer.append(_top(self._leaves, self._blocks_in_piece, bytes(HASH_BYTES)))
        self._leaves = []


def torrent_of(blob: Blob, layer: bytes, authority_pem: bytes) -> bytes:
    """Return the torrent of a blob with this layer, of two pieces or more. Raise ValueError if it is not that blob's."""
    count, length = piece_count(blob.size_bytes), piece_bytes(blob.size_bytes)
    if count < 2 or len(layer) != count * HASH_BYTES:
        raise ValueError(f"{len(layer)} bytes are not the layer of {count} pieces")
    hashes = [layer[start : start + HASH_BYTES] for start in range(0, len(layer), HASH_BYTES)]
    width = 1 << (count - 1).bit_length()
    blocks = length // _BLOCK_BYTES
    root = _top(hashes, width, _top([], blocks, bytes(HASH_BYTES)))
    name = torrent_name(blob.sha256).encode()
    info = {
        b"file tree": {name: {b"": {b"length": blob.size_bytes, b"pieces root": root}}},
        b"meta version": 2,
        b"name": name,
        b"piece length": length,
        b"private": 1,
        b"ssl-cert": authority_pem,
    }
    return bencoded({b"info": info, b"piece layers": {root: layer}})


def _top(hashes: list[bytes], width: int, padding: bytes) -> bytes:
    """Return the top of the Merkle tree over `width` hashes (a power of two), of which the last are `padding`."""
    level = hashes
    while width > 1:
        if len(level) % 2:
            level = [*level, padding]
        level = [hashlib.sha256(level[at] + level[at + 1]).digest() for at in range(0, len(level), 2)]
        padding = hashlib.sha256(padding + padding).digest()
        width //= 2
    return level[0] if level else padding


def bencoded(value: int | bytes | Mapping[bytes, object]) -> bytes:
    """Return a value in BitTorrent's encoding: numbers, bytes, and dictionaries of them."""
    if isinstance(value, int):
        return b"i%de" % value
    if isinstance(value, bytes):
        return b"%d:%s" % (len(value), value)
    items = (bencoded(key) + bencoded(value[key]) for key in sorted(value))  # type: ignore[arg-type]
    return b"d" + b"".join(items) + b"e"
