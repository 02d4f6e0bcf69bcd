"""Placement: which data should be on which workers. What the attributes mean exactly: core/placement.py."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from deskgrid.model.data import DataRef
from deskgrid.model.ids import DataId, Sha256, UserId, WorkerId

__all__ = ["ALL", "Attributes", "CopyState", "Holder", "Keep", "Placement", "Protocol"]

ALL = -1
"""As a number of replicas: every worker that may hold it."""


class Protocol(StrEnum):
    """How data travels to workers."""

    AUTO = "auto"
    """From other workers and the server where the PC's owner shares, otherwise from the server."""
    SWARM = "swarm"
    """Only to workers whose owners share."""
    HTTPS = "https"
    """Only from the server."""


class Attributes(Struct, frozen=True, kw_only=True):
    """What is wanted of data."""

    replicas: int = 0
    """Workers that should hold it; ALL."""
    fault_tolerant: bool = True
    """A worker that is not heard of for long does not count any more: another takes its place."""
    expires_at: float | None = None
    """Until then it is held."""
    lives_with: str = ""
    """job-NUMBER or array-NUMBER, until that has ended; data:NAME, as long as you have that."""
    affinity: str = ""
    """data:NAME, on the workers that hold that; job-NUMBER or array-NUMBER, where that runs; tag:NAME, on workers with that tag. Instead of `replicas`."""
    protocol: Protocol = Protocol.AUTO
    max_per_worker: int = 0
    """Of the data of this placement, so many at most on one worker. 0: no bound."""
    where: tuple[str, ...] = ()
    """Only on workers that are one of these: tag:NAME, group:NAME (of the PC's owner), worker:NUMBER. None: anywhere."""


class Placement(Struct, frozen=True, kw_only=True):
    """What a user wants of his data of some names, those that come later, too."""

    id: int
    owner_id: UserId
    owner: str
    pattern: str
    """NAME, NAME@VERSION, or a name with * and ?; without a version the newest is meant."""
    attributes: Attributes
    created_at: float
    data: int = 0
    """Pieces of data that it is for now."""
    holders: int = 0
    """Copies that workers hold of them."""


class CopyState(StrEnum):
    """How a worker stands to data."""

    ORDERED = "ordered"
    """It is to hold it and has not said to have it."""
    HELD = "held"
    """It has it and keeps it."""
    CACHED = "cached"
    """It has it for now, of a job."""


class Holder(Struct, frozen=True, kw_only=True):
    """A worker that has data, or is to have it."""

    worker_id: WorkerId
    worker: str
    state: CopyState
    since: float
    online: bool


class Keep(Struct, frozen=True, kw_only=True):
    """What a worker is to hold."""

    data_id: DataId
    content: Sha256
    """Of the unpacked disk, or of the bytes."""
    name: str
    ref: DataRef
    protocol: Protocol = Protocol.AUTO
