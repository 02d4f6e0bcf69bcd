"""Disk images of every kind, for tests."""

from __future__ import annotations

import bz2
import gzip
import hashlib
import lzma
import random
import struct
import subprocess
import zipfile
from pathlib import Path

from deskgrid.archive import zstd

__all__ = ["IMAGE_BYTES", "boot_sector", "iso_bytes", "make_gallery", "qemu_img"]

IMAGE_BYTES = 8 << 20
"""Size of each disk of the gallery as a guest sees it."""


def qemu_img(*arguments: object) -> None:
    """Run qemu-img; it must succeed."""
    subprocess.run(["qemu-img", *map(str, arguments)], check=True, capture_output=True)


def boot_sector() -> bytes:
    """Return a sector that a PC would boot."""
    return bytes(510) + b"\x55\xaa"


def iso_bytes(sectors: int = 100, *, hybrid: bool = False, kept: int | None = None) -> bytes:
    """Return what looks like an ISO image; of it `kept` bytes."""
    data = bytearray(2048 * sectors)
    data[32768:32774] = b"\1CD001"
    struct.pack_into("<I", data, 32768 + 80, sectors)
    if hybrid:
        data[:512] = boot_sector()
    return bytes(data[: kept or len(data)])


def make_gallery(folder: Path) -> Path:
    """Write one image of every kind into `folder`; all of a kind that holds a disk have that of `raw`. Return the folder."""
    raw = folder / "raw"
    raw.write_bytes(boot_sector() + random.Random(1).randbytes(1 << 20) + bytes(3 << 20))  # noqa: S311 the same each time
    with raw.open("rb+") as file:
        file.truncate(IMAGE_BYTES)
    _make_qcow2(folder, raw)
    _make_foreign(folder, raw)
    _make_packed(folder)
    (folder / "iso").write_bytes(iso_bytes())
    (folder / "isohybrid").write_bytes(iso_bytes(hybrid=True))
    (folder / "gpt").write_bytes(bytes(512) + b"EFI PART" + bytes(4096))
    subprocess.run(["mke2fs", "-q", "-t", "ext4", folder / "ext4", "1024"], check=True, capture_output=True)
    (folder / "text").write_text("hello")
    return folder


def _make_qcow2(folder: Path, raw: Path) -> None:
    convert = ("convert", "-f", "raw", "-O", "qcow2")
    qemu_img(*convert, raw, folder / "qcow2")
    qemu_img(*convert, "-o", "compat=0.10", raw, folder / "qcow2-old")
    qemu_img(*convert, "-o", "extended_l2=on,cluster_size=128k", raw, folder / "qcow2-wide")
    qemu_img(*convert, "-c", raw, folder / "qcow2-compressed")
    qemu_img(*convert, "-c", "-o", "compression_type=zstd", raw, folder / "qcow2-zstd")
    qemu_img(*convert, raw, folder / "qcow2-snapshot")
    qemu_img("snapshot", "-c", "one", folder / "qcow2-snapshot")
    qemu_img("create", "-f", "qcow2", "-b", folder / "qcow2", "-F", "qcow2", folder / "qcow2-backed")
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={folder / 'data'}", folder / "qcow2-external", "1M")
    qemu_img("create", "-f", "qcow2", "-o", f"data_file={folder / 'data2'},data_file_raw=on", folder / "qcow2-external-raw", "1M")
    encrypted = bytearray((folder / "qcow2").read_bytes())
    encrypted[32:36] = struct.pack(">I", 2)  # by hand: qemu-img measures its key derivation, which fails on a busy PC
    (folder / "qcow2-encrypted").write_bytes(encrypted)


def _make_foreign(folder: Path, raw: Path) -> None:
    for kind in ("qcow", "vmdk", "vdi", "vhdx", "vpc", "qed", "parallels"):
        qemu_img("convert", "-f", "raw", "-O", kind, raw, folder / kind)
    variants = {
        "vmdk-stream": ("vmdk", "subformat=streamOptimized"),
        "vmdk-flat": ("vmdk", "subformat=monolithicFlat"),
        "vmdk-split": ("vmdk", "subformat=twoGbMaxExtentSparse"),
        "vdi-fixed": ("vdi", "static=on"),
        "vpc-fixed": ("vpc", "subformat=fixed"),
        "vhdx-fixed": ("vhdx", "subformat=fixed"),
    }
    for name, (kind, options) in variants.items():
        qemu_img("convert", "-f", "raw", "-O", kind, "-o", options, raw, folder / name)
    qemu_img("create", "-f", "vmdk", "-b", folder / "vmdk", "-F", "vmdk", folder / "vmdk-backed")


def _make_packed(folder: Path) -> None:
    raw = folder / "raw"
    for name, packer in (("gz", gzip), ("xz", lzma), ("bz2", bz2)):
        (folder / name).write_bytes(packer.compress(raw.read_bytes()))
    # With the checksum that the program zstd adds by default.
    checked = {int(zstd.CompressionParameter.checksum_flag): 1}
    (folder / "zst").write_bytes(zstd.compress(raw.read_bytes(), options=checked))
    disk = (folder / "vmdk-stream").read_bytes()
    (folder / "box.ovf").write_text("<Envelope/>")
    (folder / "box.vmdk").write_bytes(disk)
    (folder / "box.mf").write_text(f"SHA256(box.vmdk)= {hashlib.sha256(disk).hexdigest()}\n")
    tar = ["tar", "-C", str(folder), "-cf"]
    subprocess.run([*tar, str(folder / "ova"), "box.ovf", "box.mf", "box.vmdk"], check=True)
    (folder / "box.mf").write_text(f"SHA1(box.vmdk)= {'0' * 40}\n")
    subprocess.run([*tar, str(folder / "ova-changed"), "box.ovf", "box.mf", "box.vmdk"], check=True)
    subprocess.run([*tar, str(folder / "tar-two"), "box.vmdk", "qcow2"], check=True)
    subprocess.run([*tar, str(folder / "tar-none"), "box.ovf"], check=True)
    subprocess.run([*tar, str(folder / "tgz"), "-z", "--format=pax", "raw"], check=True)
    with zipfile.ZipFile(folder / "zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(folder / "box.ovf", "readme")
        archive.write(folder / "vdi", "folder/disk.vdi")
