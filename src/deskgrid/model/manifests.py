"""Manifests: what somebody vouches for about a disk, and what is said when a disk must not be started any more."""

from __future__ import annotations

from msgspec import Struct

from deskgrid.model.data import Data, Disk
from deskgrid.model.ids import Sha256

__all__ = ["Bundle", "DiskDetail", "Manifest", "Revocation"]


class Manifest(Struct, frozen=True, kw_only=True, tag="manifest"):
    """A grid says who vouches for a disk, and until when."""

    grid: str
    """Name of the grid that says so."""
    name: str
    """Of the disk, with its version, when this was said."""
    disk: Disk
    endorser: str
    """grid (an admin), group:NAME or user:NAME; with @GRID, of another grid that this one trusts."""
    by: str
    """The user who spoke for the endorser."""
    issued_at: float
    expires_at: float
    """Seconds since 1970. After that it says nothing."""


class Revocation(Struct, frozen=True, kw_only=True, tag="revocation"):
    """A grid says that a disk must not be started any more, whoever vouches for it."""

    grid: str
    disk_sha256: Sha256
    """Of the unpacked image, or of a package."""
    reason: str
    by: str
    at: float
    owner: str = ""
    """Whose disks with that content; empty: everybody's."""


class DiskDetail(Struct, frozen=True, kw_only=True):
    """A disk of the repository with all that is said of it."""

    data: Data
    manifests: tuple[Manifest, ...] = ()
    """Those that have not expired."""
    revocation: Revocation | None = None


class Bundle(Struct, frozen=True, kw_only=True):
    """What a grid says of a disk, to carry to another grid: a file of JSON."""

    grid: str
    authority: str
    """Certificate of the grid's authority, PEM; the other grid knows its fingerprint."""
    statements: tuple[str, ...]
    """Signed, see core/manifests.py."""
