"""Deltas between disk images: what is made from one is the new image, bit for bit, or refused."""

from __future__ import annotations

import hashlib
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskgrid.archive import zstd
from deskgrid.errors import BadArchive, ProtocolError
from deskgrid.machines.deltas import applied, make_delta
from deskgrid.machines.images import unpack_disk
from deskgrid.model.ids import Sha256
from deskgrid.model.machines import DiskFormat
from deskgrid.testing.images import iso_bytes

BLOCK = 4096
LITERAL = (1 << 64) - 1


async def delta_between(folder: Path, old: bytes, new: bytes, *, most_bytes: int = 1 << 30) -> Path | None:
    (folder / "old").write_bytes(old)
    (folder / "new.zst").write_bytes(zstd.compress(new))
    made = await make_delta(folder / "old", folder / "new.zst", folder / "delta", most_bytes=most_bytes)
    if made is None:
        assert sorted(file.name for file in folder.iterdir()) == ["new.zst", "old"]
        return None
    content = (folder / "delta").read_bytes()
    assert (made.size_bytes, made.sha256) == (len(content), hashlib.sha256(content).hexdigest())
    return folder / "delta"


def made_from(folder: Path, delta: Path) -> bytes:
    with (folder / "old").open("rb", buffering=0) as old, delta.open("rb") as packed:
        return b"".join(applied(old, packed))


def noise(seed: int, size: int) -> bytes:
    return random.Random(seed).randbytes(size)


IMAGES = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 3)), max_size=12)


@settings(deadline=None)
@given(IMAGES, IMAGES, st.binary(max_size=BLOCK - 1))
async def test_image_made_from_the_old_one_is_the_new_one(tmp_path_factory: pytest.TempPathFactory, old, new, tail: bytes):
    folder = tmp_path_factory.mktemp("delta")
    before, after = (b"".join(noise(kind, BLOCK) * count for kind, count in image) for image in (old, new))
    delta = await delta_between(folder, before, after + tail)
    assert delta is not None
    assert made_from(folder, delta) == after + tail


async def test_what_moved_within_the_image_costs_next_to_nothing(tmp_path: Path):
    old = noise(1, 3 << 20)
    new = old[1 << 20 :] + noise(2, 5 * BLOCK) + old[: 1 << 20]
    delta = await delta_between(tmp_path, old, new)
    assert delta is not None
    assert made_from(tmp_path, delta) == new
    assert delta.stat().st_size < 6 * BLOCK


async def test_long_new_pieces_go_in_parts(tmp_path: Path):
    old, new = noise(1, BLOCK), noise(2, (3 << 20) + 100)
    delta = await delta_between(tmp_path, old, new)
    assert delta is not None
    assert made_from(tmp_path, delta) == new


async def test_delta_that_does_not_pay_is_not_kept(tmp_path: Path):
    assert await delta_between(tmp_path, noise(1, 1 << 20), noise(2, 1 << 20), most_bytes=1 << 19) is None


def packed(tmp_path: Path, *records: bytes) -> Path:
    (tmp_path / "old").write_bytes(noise(1, 2 * BLOCK))
    (tmp_path / "delta").write_bytes(zstd.compress(b"".join(records)))
    return tmp_path / "delta"


def record(offset: int, length: int) -> bytes:
    return struct.pack("<QQ", offset, length)


@pytest.mark.parametrize(
    "records",
    [
        (b"",),
        (b"dgdelta2", record(0, 0)),
        (b"dgdelta1",),
        (b"dgdelta1", record(0, 10)),
        (b"dgdelta1", record(0, 0), b"x"),
        (b"dgdelta1", record(LITERAL, 0), record(0, 0)),
        (b"dgdelta1", record(LITERAL, 2 << 20), bytes(2 << 20), record(0, 0)),
        (b"dgdelta1", record(LITERAL, 10), b"short"),
        (b"dgdelta1", record(2 * BLOCK, 1), record(0, 0)),
        (b"dgdelta1", record(LITERAL - 1, 2), record(0, 0)),
        (b"dgdelta1", record(0, 1), record(0, 0)),
        (b"dgdelta1", record(1, BLOCK), record(0, 0)),
        (b"dgdelta1", record(LITERAL, 1), b"x", record(LITERAL, 1), b"x", record(0, 0)),
        (b"dgdelta1", record(LITERAL, 1), b"x", record(0, BLOCK), record(0, 0)),
    ],
)
def test_what_is_no_delta_is_refused(tmp_path: Path, records: tuple[bytes, ...]):
    with pytest.raises(ProtocolError):
        made_from(tmp_path, packed(tmp_path, *records))


@given(st.binary(max_size=200))
def test_any_bytes_are_a_delta_or_refused(tmp_path_factory: pytest.TempPathFactory, content: bytes):
    folder = tmp_path_factory.mktemp("delta")
    (folder / "old").write_bytes(b"old")
    (folder / "delta").write_bytes(content)
    with pytest.raises((ProtocolError, BadArchive)):
        made_from(folder, folder / "delta")


async def test_delta_that_makes_more_than_was_promised_is_stopped_and_leaves_nothing(tmp_path: Path):
    bomb = packed(tmp_path, b"dgdelta1", *[record(0, 2 * BLOCK)] * 1000, record(0, 0))
    digest = Sha256("a" * 64)
    with pytest.raises(ProtocolError, match="more than the 100 bytes"):
        await unpack_disk(bomb, tmp_path / "out", sha256=digest, size_bytes=100, format=DiskFormat.ISO, base=tmp_path / "old")
    assert not (tmp_path / "out").exists()


async def test_disk_made_by_a_delta_is_checked_like_one_that_came_whole(tmp_path: Path):
    old, new = iso_bytes(), iso_bytes() + noise(3, BLOCK)
    delta = await delta_between(tmp_path, old, new)
    assert delta is not None
    wanted = {"size_bytes": len(new), "format": DiskFormat.ISO, "base": tmp_path / "old"}
    with pytest.raises(ProtocolError, match="not the one that was promised"):
        await unpack_disk(delta, tmp_path / "out", sha256=Sha256("a" * 64), **wanted)
    (tmp_path / "old").write_bytes(noise(4, len(old)))
    right = Sha256(hashlib.sha256(new).hexdigest())
    with pytest.raises(ProtocolError):
        await unpack_disk(delta, tmp_path / "out", sha256=right, **wanted)
    (tmp_path / "old").write_bytes(old)
    await unpack_disk(delta, tmp_path / "out", sha256=right, **wanted)
    assert (tmp_path / "out").read_bytes() == new
