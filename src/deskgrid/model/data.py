"""Data: immutable blobs with human names."""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from msgspec import Meta, Struct

from deskgrid.model.ids import DataId, Sha256, UserId
from deskgrid.model.machines import ContextLabel, DiskFormat

__all__ = ["Blob", "Data", "DataFile", "DataKind", "DataRef", "Delta", "Disk", "Visibility"]


class DataKind(StrEnum):
    """What a blob is used as."""

    FILE = "file"
    DISK = "disk"


class Visibility(StrEnum):
    """Who besides the owner may use it."""

    PRIVATE = "private"
    GROUP = "group"
    """The members of a group that is named with it."""
    PUBLIC = "public"


class Blob(Struct, frozen=True, kw_only=True):
    """Bytes in the repository, as they travel."""

    sha256: Sha256
    size_bytes: Annotated[int, Meta(ge=0, le=1 << 62)]


class Disk(Struct, frozen=True, kw_only=True):
    """What a disk is once unpacked. A disk travels as one zstd frame of the image and is cached unpacked."""

    sha256: Sha256
    """Of the unpacked image, which is what the hypervisor opens."""
    size_bytes: int
    """Of the unpacked image file."""
    virtual_bytes: int
    """Of the disk as the guest sees it."""
    format: DiskFormat
    context_label: ContextLabel = ContextLabel.CIDATA
    """Label of the context disk that this disk's system looks for: its own agent's, or cloud-init's."""
    os: str = ""
    """As in "debian 12"."""
    arch: str = "x86_64"
    about: str = ""
    """What it is for, in a line."""


class Delta(Struct, frozen=True, kw_only=True):
    """How a disk is made from an older one, for those who have that."""

    base: Sha256
    """Of the unpacked image of the older disk."""
    base_blob: Sha256 = Sha256("")
    """The blob that this image must have come from, on the PC that has it; the server says it, whatever it was told."""
    blob: Blob
    """See machines/deltas.py."""


class Data(Struct, frozen=True, kw_only=True):
    """A named, immutable blob with its attributes."""

    id: DataId
    name: str
    version: int
    """Counted from 1 within the name; `name` alone means the newest."""
    kind: DataKind
    blob: Blob
    owner_id: UserId
    owner: str
    visibility: Visibility
    group: str = ""
    """With visibility `group`: whose members may use it."""
    created_at: float
    disk: Disk | None = None
    delta: Delta | None = None


class DataFile(Struct, frozen=True, kw_only=True):
    """Data that a job finds as a file."""

    name: str
    """Of the file in /context/data."""
    blob: Blob


class DataRef(Struct, frozen=True, kw_only=True):
    """What a worker needs to fetch a disk or a context."""

    blob: Blob
    disk: Disk | None = None
    delta: Delta | None = None
