"""The scratch disk, and what the owner's disk says of room. Nothing is mounted, nothing needs root. Overlays are in qcow2.py."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from pathlib import Path

from deskgrid.errors import DriverUnusable, MachineFailed, NoSpace
from deskgrid.machines.processes import find_program

__all__ = ["SCRATCH_LABEL", "check_space", "create_scratch", "wrap_disk_error"]

SCRATCH_LABEL = "SCRATCH"
MIN_SCRATCH_BYTES = 4 << 20

_MKE2FS_LIMIT_S = 120.0
_SPACE_FLOOR_BYTES = 64 << 20

_FEATURES = (
    "none,ext_attr,dir_index,filetype,extent,64bit,flex_bg,sparse_super,large_file,huge_file,dir_nlink,extra_isize,metadata_csum"
)
"""Named one by one, because what mke2fs takes by default differs between PCs, and older guests cannot mount the newest.
No journal: after a crash nobody mounts it again."""


def create_scratch(path: Path, size_bytes: int, *, content: Path | None = None) -> None:
    """Create a sparse raw ext4 image labelled SCRATCH, owned by root, filled with folder `content` if given.

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
