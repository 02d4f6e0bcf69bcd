"""Disk images: the policy, the header checks, fetching."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskgrid import archive
from deskgrid.archive import zstd
from deskgrid.errors import BadImage, NoSpace, ProtocolError
from deskgrid.machines import images
from deskgrid.machines.disk_import import PreparedDisk, prepare_disk
from deskgrid.machines.images import ImageKind, check_image, detect_format, unpack_disk
from deskgrid.model.ids import Sha256
from deskgrid.model.machines import DiskFormat
from deskgrid.testing.images import iso_bytes


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qcow2", ImageKind.QCOW2),
        ("qcow2-old", ImageKind.QCOW2),
        ("qcow", ImageKind.QCOW1),
        ("iso", ImageKind.ISO),
        ("isohybrid", ImageKind.ISO),
        ("raw", ImageKind.RAW),
        ("gpt", ImageKind.RAW),
        ("vmdk", ImageKind.VMDK),
        ("vdi", ImageKind.VDI),
        ("vpc", ImageKind.VHD),
        ("vpc-fixed", ImageKind.VHD),
        ("vhdx", ImageKind.VHDX),
        ("qed", ImageKind.QED),
        ("parallels", ImageKind.PARALLELS),
        ("vmdk-flat", ImageKind.VMDK),
        ("zst", ImageKind.ZSTD),
        ("gz", ImageKind.GZIP),
        ("xz", ImageKind.XZ),
        ("bz2", ImageKind.BZIP2),
        ("zip", ImageKind.ZIP),
        ("ova", ImageKind.TAR),
        ("ext4", ImageKind.FILE_SYSTEM),
        ("text", ImageKind.UNKNOWN),
    ],
)
def test_kind_is_found_by_content(gallery: Path, name: str, kind: ImageKind) -> None:
    assert detect_format(gallery / name) is kind


@pytest.mark.parametrize("name", ["qcow2", "qcow2-old", "qcow2-wide", "qcow2-compressed", "qcow2-zstd", "qcow2-snapshot"])
def test_sound_qcow2_is_taken(gallery: Path, name: str) -> None:
    info = check_image(gallery / name)
    assert info.format is DiskFormat.QCOW2
    assert info.virtual_bytes == 8 << 20
    assert info.file_bytes == (gallery / name).stat().st_size
    assert info.compressed == (name in ("qcow2-compressed", "qcow2-zstd"))
    assert info.snapshots == (name == "qcow2-snapshot")


@pytest.mark.parametrize("name", ["iso", "isohybrid"])
def test_iso_is_taken(gallery: Path, name: str) -> None:
    assert check_image(gallery / name).format is DiskFormat.ISO


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qcow2-backed", "backing file"),
        ("qcow2-external", "another file"),
        ("qcow2-external-raw", "another file"),
        ("qcow2-encrypted", "encrypted"),
        ("qcow", "convert it first"),
        ("vmdk", "disk import takes it"),
        ("vdi", "disk import takes it"),
        ("raw", "disk import takes it"),
        ("zst", "disk import takes it"),
        ("ova", "disk import takes it"),
        ("ext4", "boot sector"),
        ("text", "boot sector"),
        ("missing", "cannot be opened"),
        (".", "not a file"),
    ],
)
def test_everything_else_is_refused_with_what_to_do(gallery: Path, name: str, words: str) -> None:
    with pytest.raises(BadImage, match=words):
        check_image(gallery / name)


def changed(gallery: Path, tmp_path: Path, offset: int, data: bytes, name: str = "qcow2") -> Path:
    image = bytearray((gallery / name).read_bytes())
    image[offset : offset + len(data)] = data
    (tmp_path / "image").write_bytes(image)
    return tmp_path / "image"


@pytest.mark.parametrize(
    ("offset", "data", "words"),
    [
        (8, struct.pack(">QI", 0x200, 10), "backing"),
        (20, struct.pack(">I", 8), "clusters"),
        (20, struct.pack(">I", 22), "clusters"),
        (20, struct.pack(">I", 0xFFFFFFFF), "clusters"),
        (24, struct.pack(">Q", 0), "no sense"),
        (24, struct.pack(">Q", 1 << 63), "no sense"),
        (24, struct.pack(">Q", 1 << 42), "no sense"),
        (32, struct.pack(">I", 1), "encrypted"),
        (32, struct.pack(">I", 2), "encrypted"),
        (36, struct.pack(">I", 0), "no sense"),
        (36, struct.pack(">I", 0xFFFFFFFF), "no sense"),
        (40, struct.pack(">Q", 0), "no sense"),
        (40, struct.pack(">Q", 7), "no sense"),
        (40, struct.pack(">Q", 1 << 50), "outside"),
        (48, struct.pack(">Q", 1 << 50), "outside"),
        (56, struct.pack(">I", 0xFFFFFFFF), "no sense"),
        (60, struct.pack(">I", 0xFFFFFFFF), "no sense"),
        (72, struct.pack(">Q", 1), "not closed"),
        (72, struct.pack(">Q", 2), "damaged"),
        (72, struct.pack(">Q", 4), "another file"),
        (72, struct.pack(">Q", 1 << 5), "unknown features"),
        (72, struct.pack(">Q", 1 << 63), "unknown features"),
        (88, struct.pack(">Q", 2), "another file"),
        (96, struct.pack(">I", 7), "no sense"),
        (100, struct.pack(">I", 100), "no sense"),
        (100, struct.pack(">I", 1 << 30), "no sense"),
        (112, struct.pack(">II", 0x44415441, 8), "external data"),
        (112, struct.pack(">II", 0xE2792ACA, 8), "backing"),
        (112, struct.pack(">II", 1, 0xFFFFFFF0), "do not end"),
    ],
)
def test_qcow2_header_without_sense_is_refused(gallery: Path, tmp_path: Path, offset: int, data: bytes, words: str) -> None:
    with pytest.raises(BadImage, match=words):
        check_image(changed(gallery, tmp_path, offset, data))


def test_table_outside_the_file_is_refused(gallery: Path, tmp_path: Path) -> None:
    l1 = struct.unpack_from(">Q", (gallery / "qcow2").read_bytes(), 40)[0]
    with pytest.raises(BadImage, match="outside"):
        check_image(changed(gallery, tmp_path, l1, struct.pack(">Q", 1 << 40 | 1 << 63)))


def test_disk_larger_than_allowed_is_refused(gallery: Path) -> None:
    with pytest.raises(BadImage, match="more than"):
        check_image(gallery / "qcow2", max_virtual_bytes=(8 << 20) - 1)


def test_iso_cut_short_is_refused(tmp_path: Path) -> None:
    (tmp_path / "iso").write_bytes(iso_bytes(2000, kept=2 << 20))
    with pytest.raises(BadImage, match="cut short"):
        check_image(tmp_path / "iso")


@pytest.fixture(scope="module")
def headers(gallery: Path) -> list[bytes]:
    return [(gallery / name).read_bytes() for name in ("qcow2", "qcow2-old", "qcow2-wide", "qcow2-compressed")]


@settings(max_examples=400, deadline=None)
@given(
    which=st.integers(0, 3),
    changes=st.lists(st.tuples(st.integers(0, 200), st.binary(min_size=1, max_size=8)), min_size=1, max_size=5),
    end=st.one_of(st.none(), st.integers(0, 200_000)),
)
def test_mutated_qcow2_is_taken_or_refused(
    headers: list[bytes], which: int, changes: list[tuple[int, bytes]], end: int | None
) -> None:
    data = bytearray(headers[which])
    for at, value in changes:
        data[at : at + len(value)] = value
    image = bytes(data[:end])
    try:
        info = images._check(lambda offset, size: image[offset : offset + size], len(image), 1 << 40, "image")
    except BadImage:
        return
    assert 0 < info.virtual_bytes <= 1 << 40
    if info.format is DiskFormat.QCOW2:
        assert image[8:20] == bytes(12)


@settings(max_examples=200, deadline=None)
@given(st.binary(max_size=3000))
def test_random_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        images._check(lambda offset, size: data[offset : offset + size], len(data), 1 << 40, "image")


# --- fetching ---


async def fetched(disk: PreparedDisk, output: Path, **changes: object):
    promised = {"sha256": disk.sha256, "size_bytes": disk.size_bytes, "format": disk.format} | changes
    return await unpack_disk(disk.path, output, **promised)  # type: ignore[arg-type]


@pytest.fixture
async def disk(gallery: Path, tmp_path: Path) -> PreparedDisk:
    (tmp_path / "published").mkdir()
    return await prepare_disk(gallery / "qcow2", tmp_path / "published")


async def test_fetched_disk_is_the_published_one_and_read_only(gallery: Path, tmp_path: Path, disk: PreparedDisk) -> None:
    info = await fetched(disk, tmp_path / "cached")
    assert (tmp_path / "cached").read_bytes() == (gallery / "qcow2").read_bytes()
    assert (tmp_path / "cached").stat().st_mode & 0o777 == 0o444
    assert info == check_image(gallery / "qcow2")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sha256": Sha256("0" * 64)}, "sha256"),
        ({"size_bytes": 1 << 40}, "size"),
        ({"size_bytes": 1000}, "more than"),
        ({"format": DiskFormat.ISO}, "promised"),
    ],
)
async def test_disk_that_is_not_what_was_promised_is_refused(
    tmp_path: Path, disk: PreparedDisk, change: dict[str, object], words: str
) -> None:
    with pytest.raises(ProtocolError, match=words):
        await fetched(disk, tmp_path / "cached", **change)
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


@pytest.mark.parametrize(
    "damage", [lambda d: d[:-5], lambda d: d + b"x", lambda d: d[:50] + b"\0\0" + d[52:], lambda d: b"", bytes.upper]
)
async def test_damaged_transport_is_refused(tmp_path: Path, disk: PreparedDisk, damage: Callable[[bytes], bytes]) -> None:
    disk.path.write_bytes(damage(disk.path.read_bytes()))
    with pytest.raises(ProtocolError):
        await fetched(disk, tmp_path / "cached")
    assert [path.name for path in tmp_path.iterdir()] == ["published"]


async def test_published_disk_that_points_outside_is_refused_by_the_worker(gallery: Path, tmp_path: Path) -> None:
    data = (gallery / "qcow2-backed").read_bytes()
    (tmp_path / "t").write_bytes(zstd.compress(data))
    with pytest.raises(BadImage, match="backing"):
        await unpack_disk(
            tmp_path / "t",
            tmp_path / "cached",
            sha256=Sha256(hashlib.sha256(data).hexdigest()),
            size_bytes=len(data),
            format=DiskFormat.QCOW2,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


async def test_full_disk_is_no_space(tmp_path: Path, disk: PreparedDisk, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(output: object, data: bytes) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(images, "write_all", full)
    with pytest.raises(NoSpace):
        await fetched(disk, tmp_path / "cached")
    assert [path.name for path in tmp_path.iterdir()] == ["published"]
    assert archive.write_all is not full


async def test_cancelled_fetch_leaves_nothing(tmp_path: Path) -> None:
    data = iso_bytes() + bytes(300 << 20)
    (tmp_path / "t").write_bytes(zstd.compress(data))
    sha256 = Sha256(hashlib.sha256(data).hexdigest())
    task = asyncio.create_task(
        unpack_disk(tmp_path / "t", tmp_path / "cached", sha256=sha256, size_bytes=len(data), format=DiskFormat.ISO)
    )
    await asyncio.sleep(0.03)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert [path.name for path in tmp_path.iterdir()] == ["t"]


def test_long_list_of_tables_takes_little_memory():
    entries = 1 << 18
    header = images._Qcow2(512, entries * 64 * 512, entries, 512, 0, 8)
    listed = struct.pack(f">{entries}Q", *((number + 1) * 512 for number in range(entries)))

    def read_at(offset: int, size: int) -> bytes:
        return bytes(512) if size == 512 else listed[offset - 512 : offset - 512 + size]

    tracemalloc.start()
    try:
        assert not images._has_compressed(header, read_at, 1 << 40, "")
        assert tracemalloc.get_traced_memory()[1] < 16 << 20
        with pytest.raises(BadImage, match="outside the file"):
            images._has_compressed(header, read_at, entries * 512, "")
    finally:
        tracemalloc.stop()
