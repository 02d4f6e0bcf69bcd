"""Jobs and attempts."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from deskgrid.model.ids import ArrayId, AttemptId, JobId, Sha256, UserId, WorkerId
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.overlay import Offer, Reach
from deskgrid.units import GIB, MIB

__all__ = [
    "INSTALLED",
    "Array",
    "ArrayState",
    "Attempt",
    "AttemptState",
    "Job",
    "JobSpec",
    "JobState",
    "Limits",
    "Machine",
    "Results",
]


INSTALLED = "installed:"
"""Begins the name of a disk that is on the worker's PC already, and of the package by which a worker declares it."""


class JobState(StrEnum):
    """Where a job stands. The last three are final."""

    BLOCKED = "blocked"
    """It comes after jobs that have not ended yet."""
    WAITING = "waiting"
    ACTIVE = "active"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"


class AttemptState(StrEnum):
    """Where an attempt stands. The first three are live: they hold a lease."""

    LEASED = "leased"
    RUNNING = "running"
    SUSPENDED = "suspended"
    SUCCEEDED = "succeeded"
    FAILED = "failed"
    LOST = "lost"
    REFUSED = "refused"
    CANCELLED = "cancelled"


class Machine(Struct, frozen=True, kw_only=True):
    """The machine that a job asks for."""

    disk: str = ""
    """The disk to boot, or the image of a container: name, name@version or sha256; or installed:NAME, a disk that PCs have already.
    Empty for a process."""
    kind: MachineKind = MachineKind.VM
    driver: str = ""
    """Only by this driver, as in qemu or virtualbox; empty: by the best one that a PC has."""
    platforms: tuple[str, ...] = ()
    """Where a process or container may run, as in linux-x86_64; empty: anywhere, or where its app has files for."""
    need: tuple[str, ...] = ()
    """Packages that the worker must declare."""
    on: str = ""
    """Only on this worker or on the workers of this group: worker:NAME or group:NAME."""
    warm: bool = False
    """Of a process: the command is a program that stays and is given one job after the other (docs/how-to.md, Many short jobs)."""
    scratch_bytes: int = 8 * GIB
    memory_bytes: int = 256 * MIB
    cpus: int = 1
    network: Network = Network.NONE
    offer: tuple[Offer, ...] = ()
    """Services of this job; need network overlay or internet."""
    reach: tuple[Reach, ...] = ()
    """Services that this job may reach, by the name and port that they have in its machine."""
    share: tuple[str, ...] = ()
    """Who may reach the services besides the submitter and his jobs: group:NAME, user:NAME or everyone."""
    reach_wait_s: float = 300.0
    """Seconds that a connection waits for a service that is not there yet."""
    ssh_keys: tuple[str, ...] = ()
    """Public keys (lines as in authorized_keys) that may log in as root."""

    @property
    def installed_disk(self) -> str:
        """The name of the disk on the worker's PC that is booted; empty if the disk is the grid's."""
        return self.disk.removeprefix(INSTALLED) if self.disk.startswith(INSTALLED) else ""


class Limits(Struct, frozen=True, kw_only=True):
    """Bounds of a job."""

    wall_time_s: float = 3600.0
    """Seconds that one attempt may run, from the start of its machine; time suspended does not count."""
    boot_time_s: float = 300.0
    """Seconds from the start of the machine to the agent's first sign."""
    attempts: int = 3
    """Failed attempts after which the job has failed."""
    max_lost: int = 20
    """Lost attempts after which the job has failed; a closed laptop lid is not the job's fault."""
    max_suspend_s: float = 86400.0
    """Seconds that a suspended attempt keeps its lease."""
    processes: int = 1000
    """Processes and threads at the same time, in a process or container."""
    file_bytes: int = 0
    """Largest file that a process or container may write; 0: what scratch holds."""


class Results(Struct, frozen=True, kw_only=True):
    """What comes back."""

    paths: tuple[str, ...] = ("**",)
    """Globs of files below /scratch."""


class JobSpec(Struct, frozen=True, kw_only=True):
    """What a user submits."""

    machine: Machine
    name: str = "job"
    app: str = ""
    """The app that it runs: name or name@version."""
    command: tuple[str, ...] = ()
    """What runs in the place of /context/context.sh. In arrays, {index} and the names of parameters are filled in."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables of the command, as (name, value), filled in likewise."""
    fill: tuple[str, ...] = ()
    """Files of the context that are filled in likewise."""
    data: tuple[tuple[str, str], ...] = ()
    """Files /context/data/NAME, as (NAME, data: its name, name@version or sha256). All jobs of an array have the same."""
    group: str = ""
    """The group that it is done for: its share counts. Empty: the user's own."""
    priority: int = 0
    """Among the jobs of one user and group the highest goes first."""
    after: tuple[str, ...] = ()
    """Jobs and arrays that must have completed before it starts, as in job-41 or array-3; if one fails, it is cancelled."""
    after_end: tuple[str, ...] = ()
    """Jobs and arrays that must have ended before, however."""
    retain_s: float = 0.0
    """Seconds that its results are kept after its end; 0: what the server says."""
    limits: Limits = Limits()
    results: Results = Results()
    pilot: bool = False
    """It is a pilot: its own token lets it join as a worker, once in each attempt, and opens nothing else."""
    secrets: tuple[str, ...] = ()
    """Names of its secrets, which are submitted sealed beside it and appear as files /context/secrets/NAME."""
    trust: tuple[str, ...] = ()
    """Owners of the PCs that it may run on: mine (the submitter's own), user:NAME, group:NAME or everyone. Empty: everyone, without secrets only."""


class Job(Struct, frozen=True, kw_only=True):
    """A unit of work that a user submitted. Times are seconds since 1970, UTC, by the store's clock."""

    id: JobId
    owner_id: UserId
    owner: str
    spec: JobSpec
    state: JobState
    created_at: float
    finished_at: float | None = None
    disk_sha256: Sha256 | None = None
    """The unpacked disk, resolved when the job was submitted; None for a process."""
    context: Sha256 | None = None
    result: Sha256 | None = None
    """The archive of the accepted result, tar with zstd."""
    result_bytes: int | None = None
    exit_code: int | None = None
    """Of context.sh in the accepted result, or in the last attempt that failed with one."""
    message: str = ""
    """Why it failed or was cancelled, for people."""
    array_id: ArrayId | None = None
    index: int = 0
    """Within its array, from 0."""
    parameters: dict[str, str] = {}
    """Its line of the array's table."""
    value: bytes | None = None
    """What a warm program answered."""


class ArrayState(StrEnum):
    """Where an array stands."""

    FILLING = "filling"
    """Its jobs are being made; none runs yet."""
    BLOCKED = "blocked"
    """It comes after jobs that have not ended yet."""
    OPEN = "open"
    """Its jobs are leased to workers."""
    CANCELLED = "cancelled"
    """By its user, or because it could not be filled or what it comes after failed: `message` says which."""
    ENDED = "ended"
    """All its jobs are final."""


class Array(Struct, frozen=True, kw_only=True):
    """Many jobs of one spec, submitted in one call."""

    id: ArrayId
    owner_id: UserId
    owner: str
    spec: JobSpec
    state: ArrayState
    count: int
    """Jobs that it has when it is filled."""
    jobs: dict[JobState, int]
    """How many of its jobs are in which state; together `count`, or what is there so far while it is being filled."""
    created_at: float
    finished_at: float | None = None
    message: str = ""


class Attempt(Struct, frozen=True, kw_only=True):
    """One execution of a job by one worker, under a lease."""

    id: AttemptId
    job_id: JobId
    number: int
    """Counted from 1 within the job."""
    worker_id: WorkerId
    worker: str
    state: AttemptState
    leased_at: float
    started_at: float | None = None
    ended_at: float | None = None
    exit_code: int | None = None
    reason: str = ""
    """Why it ended, for people."""
