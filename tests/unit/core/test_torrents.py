"""Torrents as BitTorrent v2 has them."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import libtorrent
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskgrid.core.torrents import HASH_BYTES, PieceHasher, bencoded, piece_bytes, piece_count, torrent_name, torrent_of
from deskgrid.model.data import Blob
from deskgrid.model.ids import Sha256

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30


@given(st.integers(1, 1 << 40))
def test_a_blob_has_few_pieces_of_sizes_that_the_protocol_knows(size: int) -> None:
    length = piece_bytes(size)
    assert length.bit_count() == 1 and 256 * KIB <= length <= 16 * MIB
    assert piece_count(size) <= 2048 or length == 16 * MIB
    assert (piece_count(size) - 1) * length < size <= piece_count(size) * length


@pytest.mark.parametrize("size", [256 * KIB + 1, 5 * MIB, 5 * MIB + 1, 768 * KIB, MIB + 16 * KIB, 9 * MIB - 100])
@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_our_torrent_is_byte_for_byte_what_libtorrent_makes(size: int, tmp_path: Path) -> None:
    data = random.Random(size).randbytes(size)
    blob = Blob(sha256=Sha256(hashlib.sha256(data).hexdigest()), size_bytes=size)
    hasher = PieceHasher(size)
    hasher.update(data)
    ours = torrent_of(blob, hasher.layer(), b"CERTIFICATE")
    (tmp_path / torrent_name(blob.sha256)).write_bytes(data)
    files = libtorrent.file_storage()
    libtorrent.add_files(files, str(tmp_path / torrent_name(blob.sha256)))
    theirs = libtorrent.create_torrent(files, piece_bytes(size), libtorrent.create_torrent.v2_only)
    theirs.set_priv(True)
    theirs.set_root_cert("CERTIFICATE")
    libtorrent.set_piece_hashes(theirs, str(tmp_path))
    made = theirs.generate()
    made.pop(b"creation date")
    assert ours == libtorrent.bencode(made)


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3 * MIB), st.lists(st.integers(2_000, 100_000), min_size=1, max_size=5))
def test_the_layer_does_not_depend_on_how_the_bytes_come(size: int, cuts: list[int]) -> None:
    data = random.Random(size).randbytes(size)
    whole, pieced = PieceHasher(size), PieceHasher(size)
    whole.update(data)
    at = number = 0
    while at < size:
        cut = cuts[number % len(cuts)]
        pieced.update(data[at : at + cut])
        at, number = at + cut, number + 1
    layer = whole.layer()
    assert pieced.layer() == layer
    assert len(layer) == piece_count(size) * HASH_BYTES


def test_a_layer_of_another_size_makes_no_torrent() -> None:
    blob = Blob(sha256=Sha256("a" * 64), size_bytes=MIB)
    for layer in (b"", bytes(HASH_BYTES * 3), bytes(HASH_BYTES * 4 + 1)):
        with pytest.raises(ValueError, match="layer"):
            torrent_of(blob, layer, b"")
    with pytest.raises(ValueError, match="layer"):
        torrent_of(Blob(sha256=Sha256("a" * 64), size_bytes=10), bytes(HASH_BYTES), b"")  # of one piece there is none


def test_a_name_fits_into_a_certificate() -> None:
    assert len(torrent_name(Sha256("a" * 64))) <= 64


@given(
    st.recursive(
        st.integers(-(1 << 70), 1 << 70) | st.binary(max_size=30), lambda kids: st.dictionaries(st.binary(max_size=9), kids)
    )
)
def test_bencoded_values_are_read_back_by_libtorrent(value: object) -> None:
    if not _small(value):
        return
    assert libtorrent.bdecode(bencoded(value)) == value  # type: ignore[arg-type]


def _small(value: object) -> bool:
    """libtorrent's numbers have 64 bits."""
    if isinstance(value, dict):
        return all(_small(one) for one in value.values())
    return not isinstance(value, int) or abs(value) < 1 << 63
