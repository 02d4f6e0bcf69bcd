"""The files that a machine's disks are made of: overlay, scratch. Nothing is mounted, nothing needs root.

An overlay is an empty qcow2 version 3 image (docs/interop/qcow2.txt of QEMU) of four clusters of 64 KiB:

    0  header   1  refcount table   2  one refcount block   3..  L1 table, all zero: every read goes to the base

It does not name its base: the driver gives that explicitly when it attaches both, so no file is ever opened because an
image says so.
"""

from __future__ import annotations

import errno
import os
import shutil
import struct
import subprocess
from pathlib import Path

from deskgrid.errors import BadImage, DriverUnusable, MachineFailed, NoSpace
from deskgrid.machines.processes import find_program

__all__ = ["SCRATCH_LABEL", "check_space", "create_overlay", "create_scratch", "qcow2_virtual_size", "wrap_disk_error"]

SCRATCH_LABEL = "SCRATCH"
MIN_SCRATCH_BYTES = 4 << 20

_CLUSTER_BITS = 16
_CLUSTER = 1 << _CLUSTER_BITS
_QCOW2_MAGIC = b"QFI\xfb"
_HEADER = struct.Struct(">4sIQIIQIIQQIIQ")
"""magic, version, backing file (offset, length), cluster bits, size, encryption, L1 (entries, offset), refcount table
(offset, clusters), snapshots (number, offset)."""
_HEADER_V3 = struct.Struct(">QQQII")
"""Features (incompatible, compatible, autoclear), refcount order, header length."""
_MAX_VIRTUAL_BYTES = 1 << 46
_MKE2FS_LIMIT_S = 120.0
_SPACE_FLOOR_BYTES = 64 << 20

_FEATURES = (
    "none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
)
"""Named one by one, because what mke2fs takes by default differs between PCs, and older guests cannot mount the newest.
No journal: after a crash nobody mounts it again."""


def qcow2_virtual_size(path: Path) -> int:
    """Return the size in bytes of a qcow2 image as a guest sees it.

    Raise BadImage unless the image stands alone: no backing file, no external data file, no encryption. (The full check
    was made when it came into the cache; this is the last line, at the moment of use.)
    """
    with path.open("rb") as image:
        head = image.read(_HEADER.size + _HEADER_V3.size)
    if len(head) < _HEADER.size or head[:4] != _QCOW2_MAGIC:
        raise BadImage("this is not a qcow2 disk", where=path.name)
    _, version, backing, _, _, size, encryption, *_ = _HEADER.unpack_from(head)
    features = _HEADER_V3.unpack_from(head, _HEADER.size)[0] if version >= 3 and len(head) > _HEADER.size else 0
    if backing or encryption or features & 0b100:
        raise BadImage(
            "the disk depends on another file, or is encrypted",
            where=path.name,
            hint="qemu-img convert makes one that stands alone",
        )
    if not 0 < size <= _MAX_VIRTUAL_BYTES:
        raise BadImage(f"a disk of {size} bytes is not taken", where=path.name)
    return int(size)


def create_overlay(path: Path, size_bytes: int) -> None:
    """Create an empty overlay of the given virtual size: every sector not written yet is read from its base."""
    l1_entries = -(-size_bytes // (_CLUSTER * (_CLUSTER // 8)))
    l1_clusters = max(1, -(-l1_entries * 8 // _CLUSTER))
    header = _HEADER.pack(_QCOW2_MAGIC, 3, 0, 0, _CLUSTER_BITS, size_bytes, 0, l1_entries, 3 * _CLUSTER, _CLUSTER, 1, 0, 0)
    header += _HEADER_V3.pack(0, 0, 0, 4, _HEADER.size + _HEADER_V3.size)
    clusters = 3 + l1_clusters
    with path.open("xb") as image:
        image.write(header)
        image.seek(_CLUSTER)
        image.write(struct.pack(">Q", 2 * _CLUSTER))
        image.seek(2 * _CLUSTER)
        image.write(struct.pack(">H", 1) * clusters)
        image.truncate(clusters * _CLUSTER)


def create_scratch(path: Path, size_bytes: int, *, content: Path | None = None) -> None:
    """Create a sparse ext4 image labelled SCRATCH, owned by root, filled with folder `content` if given.

    8 GiB take 0.02 s and 4 MiB of the disk. Raise NoSpace, MachineFailed, or DriverUnusable without mke2fs.
    """
    command = scratch_command(path, content)
    if size_bytes < MIN_SCRATCH_BYTES:
        raise MachineFailed(f"a scratch disk of {size_bytes} bytes is too small for a file system")
    with path.open("xb") as image:
        image.truncate(size_bytes)
    # Without a configuration of the PC's own, and with a clock that does not matter.
    environment = dict(os.environ, LC_ALL="C", MKE2FS_CONFIG=os.devnull)
    try:
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=_MKE2FS_LIMIT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise MachineFailed("mke2fs did not end") from error
    if done.returncode != 0:
        words = " ".join(done.stderr.split())[-300:]
        raise (NoSpace if "No space left" in words else MachineFailed)(f"the scratch disk cannot be made: {words}")


def scratch_command(path: Path, content: Path | None) -> list[str]:
    """Return the command that makes a file of the right size a scratch disk. Raise DriverUnusable without mke2fs."""
    program = find_program("mke2fs")
    if program is None:
        raise DriverUnusable("mke2fs is missing on this PC", hint="sudo apt-get install e2fsprogs")
    command = [program, "-q", "-F", "-t", "ext4", "-I", "256", "-L", SCRATCH_LABEL, "-m", "0", "-O", _FEATURES]
    return [*command, "-E", "lazy_itable_init=1,nodiscard,root_owner=0:0", *(["-d", str(content)] if content else []), str(path)]


def check_space(folder: Path) -> None:
    """Raise NoSpace if the disk of `folder` is so full that a machine could not even begin.

    Scratch is sparse, so its size promises nothing; the owner's bounds are the worker's to hold.
    """
    free = shutil.disk_usage(folder).free
    if free < _SPACE_FLOOR_BYTES:
        raise NoSpace(f"only {free >> 20} MiB are free in {folder}", hint="free some space, or give the worker another folder")


def wrap_disk_error(error: OSError) -> NoSpace | MachineFailed:
    """Return our error for what the system said about writing a machine's files."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return NoSpace(f"the machine's files cannot be written: {error.strerror}", hint="free some space on the disk")
    return MachineFailed(f"the machine's files cannot be made: {error}")
