"""Making a disk of the grid from any image: what is taken, what is refused, and that nothing is left behind."""

from __future__ import annotations

import asyncio
import bz2
import gzip
import hashlib
import io
import lzma
import random
import shutil
import struct
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deskgrid.archive import zstd
from deskgrid.errors import BadImage, DeskgridError, DriverUnusable, NoSpace
from deskgrid.machines import disk_import, foreign_images, unwrapping
from deskgrid.machines.blocking import CHUNK
from deskgrid.machines.disk_import import PreparedDisk, prepare_disk
from deskgrid.machines.images import check_image
from deskgrid.machines.unwrapping import unwrap
from deskgrid.model.machines import DiskFormat
from deskgrid.testing.images import IMAGE_BYTES, boot_sector, iso_bytes, qemu_img


def unpacked_bytes(disk: PreparedDisk) -> bytes:
    packed = disk.path.read_bytes()
    assert hashlib.sha256(packed).hexdigest() == disk.transport_sha256
    assert len(packed) == disk.transport_bytes
    data = zstd.decompress(packed)
    assert hashlib.sha256(data).hexdigest() == disk.sha256
    assert len(data) == disk.size_bytes
    return data


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


@pytest.mark.parametrize("name", ["qcow2", "iso", "isohybrid"])
async def test_plain_image_travels_as_it_is(gallery: Path, out: Path, name: str) -> None:
    stages: list[str] = []
    told: list[tuple[int, int]] = []

    def begin(title: str) -> Callable[[int, int], None]:
        stages.append(title)
        return lambda done, whole: told.append((done, whole))

    disk = await prepare_disk(gallery / name, out, begin)
    assert unpacked_bytes(disk) == (gallery / name).read_bytes()
    await asyncio.sleep(0)
    assert told[-1] == (disk.size_bytes, disk.size_bytes)
    assert stages == [f"look at {name}", "pack"]


@pytest.mark.parametrize(
    "name",
    [
        *("raw", "qcow2-compressed", "qcow2-zstd", "qcow2-snapshot"),
        *("vmdk", "vmdk-stream", "vdi", "vdi-fixed", "vpc", "vpc-fixed", "vhdx", "vhdx-fixed"),
        *("zst", "gz", "xz", "bz2", "ova", "tgz", "zip"),
    ],
)
async def test_other_image_becomes_a_plain_qcow2_of_the_same_disk(gallery: Path, out: Path, name: str) -> None:
    disk = await prepare_disk(gallery / name, out)
    assert {path.name for path in out.iterdir()} == {disk.path.name}
    (out / "plain").write_bytes(unpacked_bytes(disk))
    info = check_image(out / "plain")
    assert (info.format, info.compressed, info.snapshots) == (DiskFormat.QCOW2, False, 0)
    # VHD counts in cylinders where qemu-img made it.
    assert IMAGE_BYTES <= info.virtual_bytes <= IMAGE_BYTES + (1 << 20 if name.startswith("vpc") else 0)
    qemu_img("compare", "-f", "raw", "-F", "qcow2", gallery / "raw", out / "plain")


async def test_same_image_becomes_the_same_disk(gallery: Path, out: Path) -> None:
    first, again = [await prepare_disk(gallery / name, out) for name in ("vdi", "vdi")]
    assert first == again


async def test_shrunk_disk_has_no_room_for_zeros(gallery: Path, out: Path) -> None:
    qemu_img("convert", "-f", "raw", "-O", "qcow2", "-S", "0", gallery / "raw", out / "full")
    as_it_is, shrunk = await prepare_disk(out / "full", out), await prepare_disk(out / "full", out, shrink=True)
    assert as_it_is.size_bytes > IMAGE_BYTES
    assert shrunk.size_bytes < 2 << 20
    assert shrunk.virtual_bytes == IMAGE_BYTES


async def test_name_that_looks_like_an_option_or_protocol_is_just_a_name(gallery: Path, tmp_path: Path, out: Path) -> None:
    for name in ("-o,x", "nbd:x", "json:{}", "a,b c", "x,file.filename=y", "fat:rw:x"):
        shutil.copy(gallery / "vdi", tmp_path / name)
        await prepare_disk(tmp_path / name, out)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qcow2-backed", "backing file"),
        ("qcow2-external", "another file"),
        ("vmdk-backed", "changes to another disk"),
        ("vmdk-flat", "other files"),
        ("vmdk-split", "other files"),
        ("qcow", "convert it first"),
        ("qed", "convert it first"),
        ("text", "boot sector"),
        ("ext4", "boot sector"),
        ("ova-changed", "manifest"),
        ("tar-two", "several disks in it: box.vmdk, qcow2"),
        ("tar-none", "no disk in it"),
    ],
)
async def test_image_that_is_refused_leaves_nothing(gallery: Path, out: Path, name: str, words: str) -> None:
    with pytest.raises(BadImage, match=words) as refused:
        await prepare_disk(gallery / name, out)
    assert refused.value.where == str(gallery / name)
    assert list(out.iterdir()) == []


# ---- images that lie


def changed(file: Path, target: Path, offset: int, data: bytes) -> Path:
    image = bytearray(file.read_bytes())
    offset %= len(image)
    image[offset : offset + len(data)] = data
    target.write_bytes(image)
    return target


def vhd_with(gallery: Path, target: Path, offset: int, data: bytes) -> Path:
    """A VHD whose footer says something else, with the right checksum."""
    image = bytearray((gallery / "vpc-fixed").read_bytes())
    footer = image[-512:]
    footer[offset : offset + len(data)] = data
    footer[64:68] = struct.pack(">I", ~(sum(footer[:64]) + sum(footer[68:])) & 0xFFFFFFFF)
    target.write_bytes(bytes(image[:-512]) + bytes(footer))
    return target


async def test_vhd_that_lies_is_refused(gallery: Path, tmp_path: Path, out: Path) -> None:
    for offset, data, words in (
        (60, b"\0\0\0\4", "changes to another disk"),
        (60, b"\0\0\0\7", "unknown kind"),
        (48, struct.pack(">Q", 1 << 50), "cut short"),
        (48, bytes(8), "no sense"),
    ):
        with pytest.raises(BadImage, match=words):
            await prepare_disk(vhd_with(gallery, tmp_path / "vhd", offset, data), out)
    with pytest.raises(BadImage, match="no sense"):
        await prepare_disk(changed(gallery / "vpc-fixed", tmp_path / "vhd", -512 + 50, b"\1"), out)


@pytest.mark.parametrize(
    ("name", "offset", "data", "words"),
    [
        ("vdi", 76, struct.pack("<I", 4), "changes to another disk"),
        ("vdi", 440, b"\1" * 16, "changes to another disk"),
        ("vdi", 368, struct.pack("<Q", 1 << 60), "more than"),
        ("vdi", 368, bytes(8), "no sense"),
        ("vmdk", 12, bytes(8), "no sense"),
        ("vmdk", 12, struct.pack("<Q", 1 << 50), "more than"),
        ("vmdk", 28, bytes(8), "other files"),
        ("vmdk", 36, struct.pack("<Q", 1 << 40), "outside the file"),
        ("vhdx", 192 << 10, b"x", "table is missing"),
        ("vhdx", (192 << 10) + 8, b"\xff\xff", "does not end"),
    ],
)
async def test_header_that_lies_is_refused(
    gallery: Path, tmp_path: Path, out: Path, name: str, offset: int, data: bytes, words: str
) -> None:
    with pytest.raises(BadImage, match=words):
        await prepare_disk(changed(gallery / name, tmp_path / name, offset, data), out)
    assert list(out.iterdir()) == []


async def test_vmdk_whose_description_names_another_file_opens_none(gallery: Path, tmp_path: Path, out: Path) -> None:
    image = (gallery / "vmdk").read_bytes()
    for line in (b'RW 1 FLAT "/etc/hostname" 0\n', b'parentFileNameHint="/etc/hostname"\n', b"parentCID=12345678\n"):
        at = image.index(b"# Extent description\n") + len(b"# Extent description\n")
        (tmp_path / "vmdk").write_bytes(image[:at] + line + image[at + len(line) :])
        with pytest.raises(BadImage):
            await prepare_disk(tmp_path / "vmdk", out)
    assert list(out.iterdir()) == []


def test_vmdk_is_refused_that_names_a_parent_wherever_qemu_looks_for_one(gallery: Path):
    image = bytearray((gallery / "vmdk").read_bytes())
    end = image.index(b"\0", 512)
    hint = b'parentFileNameHint="/etc/hostname"'

    def read(changed: bytes) -> foreign_images.Foreign:
        return foreign_images.read_vmdk(lambda offset, size: changed[offset : offset + size], len(changed))

    assert read(bytes(image)).driver == "vmdk"
    within_a_line = b"#" + hint
    beyond_the_header_s_length = bytes(image[:end]) + hint + bytes(image[end + len(hint) :])
    short = bytearray(beyond_the_header_s_length)
    struct.pack_into("<Q", short, 36, 1)
    for changed in (
        bytes(image[:end]) + within_a_line + bytes(image[end + len(within_a_line) :]),
        bytes(short),
        bytes(image[: 21 * 512 - len(hint)]) + hint + bytes(image[21 * 512 :]),
    ):
        with pytest.raises(BadImage, match="changes to another disk"):
            read(changed)
    # The header points to a harmless copy.
    copied = bytearray(beyond_the_header_s_length) + image[512 : 21 * 512]
    struct.pack_into("<Q", copied, 28, len(image) // 512)
    with pytest.raises(BadImage, match="where nobody writes it"):
        read(bytes(copied))


@pytest.mark.parametrize("name", ["vmdk", "vdi", "vpc", "vhdx"])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(data=st.data())
def test_mutated_header_is_taken_or_refused(gallery: Path, name: str, data: st.DataObject) -> None:
    image = bytearray((gallery / name).read_bytes())
    places = st.one_of(st.integers(0, 512), st.integers(192 << 10, 257 << 10), st.integers(0, len(image) - 8))
    for _ in range(data.draw(st.integers(1, 4))):
        place = data.draw(places) % (len(image) - 8)
        piece = data.draw(st.binary(min_size=1, max_size=8))
        image[place : place + len(piece)] = piece
    read = {
        "vmdk": foreign_images.read_vmdk,
        "vdi": foreign_images.read_vdi,
        "vpc": foreign_images.read_vhd,
        "vhdx": foreign_images.read_vhdx,
    }
    try:
        foreign = read[name](lambda offset, size: bytes(image[offset : offset + size]), len(image))
    except BadImage:
        return
    assert foreign.virtual_bytes > 0


# ---- bombs


def bomb(pack: Callable[[bytes], bytes]) -> bytes:
    return pack(boot_sector() + bytes(64 << 20))


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress, zstd.compress])
async def test_packed_bomb_is_refused(tmp_path: Path, out: Path, pack: Callable[[bytes], bytes]) -> None:
    (tmp_path / "bomb").write_bytes(bomb(pack))
    with pytest.raises(BadImage, match="more than"):
        await prepare_disk(tmp_path / "bomb", out, max_virtual_bytes=32 << 20)
    assert list(out.iterdir()) == []


async def test_zip_that_lies_of_its_size_is_refused(tmp_path: Path, out: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("disk", boot_sector() + bytes(64 << 20))
    with pytest.raises(BadImage, match="more than"):
        await prepare_disk(tmp_path / "bomb", out, max_virtual_bytes=32 << 20)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("packing", [zipfile.ZIP_LZMA, zipfile.ZIP_BZIP2])
async def test_zip_with_a_packing_whose_memory_has_no_bound_is_refused(tmp_path: Path, out: Path, packing: int) -> None:
    with zipfile.ZipFile(tmp_path / "zip", "w", packing) as archive:
        archive.writestr("disk", boot_sector())
    with pytest.raises(BadImage, match="not taken"):
        await prepare_disk(tmp_path / "zip", out)


async def test_zip_with_a_large_directory_is_refused_before_it_is_read(tmp_path: Path, out: Path) -> None:
    with zipfile.ZipFile(tmp_path / "zip", "w") as archive:
        archive.writestr("disk", boot_sector())
    data = bytearray((tmp_path / "zip").read_bytes()) + bytes(6 << 20)
    end = data.rindex(b"PK\5\6")
    data += data[end : end + 22]
    struct.pack_into("<II", data, len(data) - 10, 5 << 20, 0)
    (tmp_path / "zip").write_bytes(data)
    with pytest.raises(BadImage, match="directory of more than"):
        await prepare_disk(tmp_path / "zip", out)


async def test_xz_of_two_streams_with_much_padding_between_is_read_to_its_end(tmp_path: Path, out: Path) -> None:
    first, second = boot_sector() + bytes(1 << 20), b"end" + bytes(509)
    padding = bytes(3 * CHUNK)
    (tmp_path / "disk.xz").write_bytes(lzma.compress(first) + padding + lzma.compress(second) + padding)
    plain = await unwrap(tmp_path / "disk.xz", out, max_bytes=1 << 30)
    assert plain.read_bytes() == first + second


async def test_image_packed_too_often_is_refused(tmp_path: Path, out: Path) -> None:
    data = boot_sector()
    for _ in range(5):
        data = gzip.compress(data)
    (tmp_path / "deep").write_bytes(data)
    with pytest.raises(BadImage, match="packed more than"):
        await prepare_disk(tmp_path / "deep", out)
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("name", ["zst", "gz", "xz", "bz2", "ova", "zip"])
async def test_damaged_package_is_refused_and_leaves_nothing(gallery: Path, tmp_path: Path, out: Path, name: str) -> None:
    whole = (gallery / name).read_bytes()
    rng = random.Random(name)
    for damage in (lambda data: data[: len(data) // 2], lambda data: data[:1000] + rng.randbytes(2000) + data[3000:]):
        (tmp_path / name).write_bytes(damage(whole))
        with pytest.raises(BadImage):
            await prepare_disk(tmp_path / name, out)
        assert list(out.iterdir()) == []


async def test_xz_that_asks_for_much_memory_is_refused(tmp_path: Path, out: Path) -> None:
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}]
    (tmp_path / "xz").write_bytes(lzma.compress(boot_sector(), filters=filters))
    with pytest.raises(BadImage, match="cannot be unpacked"):
        await prepare_disk(tmp_path / "xz", out)


async def test_names_in_an_archive_are_never_opened(gallery: Path, tmp_path: Path, out: Path) -> None:
    with tarfile.open(tmp_path / "ova", "w") as archive:
        link = tarfile.TarInfo("disk.vmdk")
        link.type, link.linkname = tarfile.SYMTYPE, str(tmp_path / "ova")
        archive.addfile(link)
        data = (gallery / "vdi").read_bytes()
        member = tarfile.TarInfo("../../escaped.vdi")
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    disk = await prepare_disk(tmp_path / "ova", out)
    assert disk.virtual_bytes == IMAGE_BYTES
    assert sorted(path.name for path in tmp_path.rglob("*")) == sorted(["out", "ova", disk.path.name])


async def test_disk_without_room_is_refused(gallery: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (unwrapping, disk_import):
        monkeypatch.setattr(module, "SPARE_BYTES", 1 << 60)
    for name in ("zst", "vdi"):
        with pytest.raises(NoSpace):
            await prepare_disk(gallery / name, out)
    # Of a disk that fills up meanwhile, one GiB stays free: qemu-img may not write more than that.
    usage = shutil.disk_usage(out)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage)  # other tests write and remove meanwhile
    monkeypatch.setattr(disk_import, "SPARE_BYTES", usage.free - (1 << 19))
    with pytest.raises(NoSpace):
        await prepare_disk(gallery / "vdi", out)
    assert list(out.iterdir()) == []


# ---- faults


async def test_contradicting_tables_are_found(gallery: Path, tmp_path: Path, out: Path) -> None:
    table = struct.unpack_from(">Q", (gallery / "qcow2").read_bytes(), 48)[0]
    image = changed(gallery / "qcow2", tmp_path / "image", table, bytes(8))
    assert check_image(image).format is DiskFormat.QCOW2
    with pytest.raises(BadImage, match="damaged"):
        await prepare_disk(image, out)
    assert list(out.iterdir()) == []


async def test_missing_qemu_img_matters_only_for_conversions(gallery: Path, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    await prepare_disk(gallery / "qcow2", out)
    with pytest.raises(DriverUnusable, match="qemu-utils"):
        await prepare_disk(gallery / "raw", out)


async def test_cancelled_import_leaves_nothing(gallery: Path, tmp_path: Path, out: Path) -> None:
    (tmp_path / "big").write_bytes(iso_bytes() + random.Random(2).randbytes(60 << 20))
    (tmp_path / "big.gz").write_bytes(gzip.compress(boot_sector() + bytes(300 << 20), 1))
    for name, delay in ((gallery / "raw", 0.01), (tmp_path / "big", 0.1), (tmp_path / "big.gz", 0.05)):
        task = asyncio.create_task(prepare_disk(name, out))
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert list(out.iterdir()) == []


async def test_every_error_is_ours(tmp_path: Path, out: Path) -> None:
    rng = random.Random(3)
    for mark in (
        b"\x1f\x8b\x08",
        b"BZh9",
        b"\xfd7zXZ\0",
        b"PK\3\4",
        b"\x28\xb5\x2f\xfd",
        b"KDMV",
        b"conectix",
        b"vhdxfile",
        b"QFI\xfb\0\0\0\3",
    ):
        for _ in range(20):
            (tmp_path / "image").write_bytes(mark + rng.randbytes(3000))
            with pytest.raises(DeskgridError):
                await prepare_disk(tmp_path / "image", out)
    assert list(out.iterdir()) == []
