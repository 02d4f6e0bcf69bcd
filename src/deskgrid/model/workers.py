"""Workers: what they offer, what they hold, what they tell."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from deskgrid.model.data import Blob, DataFile, DataRef
from deskgrid.model.ids import AttemptId, JobId, Sha256, UserId, WorkerId
from deskgrid.model.jobs import AttemptState, JobSpec
from deskgrid.model.machines import Fingerprint

__all__ = ["MOST_VALUE_BYTES", "Assignment", "AttemptReport", "Capacity", "Profile", "Worker", "WorkerState"]

MOST_VALUE_BYTES = 1 << 16


class WorkerState(StrEnum):
    """A worker as the grid sees it. `offline` is derived from when it last called."""

    ONLINE = "online"
    PAUSED = "paused"
    OFFLINE = "offline"
    LEFT = "left"


class Capacity(Struct, frozen=True, kw_only=True):
    """An amount of a PC's resources."""

    cpus: int
    memory_bytes: int
    disk_bytes: int


class Profile(Struct, frozen=True, kw_only=True):
    """What a PC is and what its owner lends."""

    os: str
    """linux, windows or darwin."""
    arch: str
    """x86_64 or aarch64."""
    drivers: tuple[Fingerprint, ...]
    lent: Capacity
    """The owner's bounds, all machines together."""
    version: str
    """Of deskgrid on this PC."""
    packages: tuple[str, ...] = ()
    """What its owner says is installed, for jobs that `need` it."""
    endorsers: tuple[str, ...] = ()
    """One of them must vouch for a disk; none: no matter who."""
    accepts: tuple[str, ...] = ("everyone",)
    """Whose jobs it takes: mine (its owner's), user:NAME, group:NAME or everyone."""
    tags: tuple[str, ...] = ()
    """Words by which its owner says where or what it is, for placements."""
    shares: bool = False
    """It fetches data from other workers and gives it to them."""
    keeps_bytes: int = 0
    """Data that it may be told to hold."""
    secrets_key: str = ""
    """Its public key to which secrets of jobs are sealed (core/sealing.py); empty: it takes no jobs that have any."""


class AttemptReport(Struct, frozen=True, kw_only=True):
    """What a worker says of one attempt that it holds. It repeats a final report until the server has acknowledged it."""

    attempt_id: AttemptId
    state: AttemptState
    """leased (preparing), running, suspended; or succeeded, failed, refused."""
    exit_code: int | None = None
    reason: str = ""
    result: Blob | None = None
    """The uploaded archive; with `succeeded` always unless the job's spec wants no files, with `failed` if there was something to take."""
    value: bytes | None = None
    """What a warm program answered; at most MOST_VALUE_BYTES."""


class Assignment(Struct, frozen=True, kw_only=True):
    """An attempt that the server leased to this worker."""

    attempt_id: AttemptId
    job_id: JobId
    number: int
    spec: JobSpec
    owner_id: UserId = UserId(0)
    disk: DataRef | None
    """None for a process."""
    context: Blob | None
    data: tuple[DataFile, ...] = ()
    """Of its spec, as files."""
    program: Blob | None = None
    """The files of the job's app for this worker's platform."""
    programs: dict[str, Blob] = {}
    """All of them, by platform, before one was chosen; empty on the wire."""
    class_id: int = 0
    """Of the job's requirement class, for Sync.ahead."""
    index: int = 0
    parameters: dict[str, str] = {}
    in_array: bool = False
    """Then {index} and {NAME} are filled in, with `index` and `parameters`."""
    statements: tuple[str, ...] = ()
    """Signed, by which those whom the owner asks for vouch for the disk (core/manifests.py)."""
    hold: bool = False
    """Prepare, but start only when the server says so: its set starts together."""
    secrets: bytes = b""
    """The job's secrets, sealed to this worker for this attempt (core/sealing.py). Empty although its spec names some: the server cannot open them."""


class Worker(Struct, frozen=True, kw_only=True):
    """The agent on a volunteer's PC, as users see it."""

    id: WorkerId
    name: str
    state: WorkerState
    joined_at: float
    seen_at: float
    running: int
    """Live attempts."""
    profile: Profile | None = None
    cached: tuple[Sha256, ...] = ()
    """Unpacked disks in its cache."""
    owner: str = ""
    """The user whose PC it is; empty: nobody said."""
    pilot_of: str = ""
    """Of a pilot: the user whose it is. It runs what he may see and nothing else; `owner` is whose PC it is on."""
    pilot_job_id: JobId | None = None
    """The job that it is, if it is one of this grid's."""
    ends_at: float | None = None
    """When the grid knows it no more, if that is set."""
    reserved_for: str = ""
    """user:NAME or group:NAME: only their jobs run there."""
    reserved_until: float | None = None
    """None: until the admin says otherwise."""
