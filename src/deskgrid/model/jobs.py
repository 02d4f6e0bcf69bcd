"""Jobs and attempts."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from deskgrid.model.ids import AttemptId, JobId, Sha256, UserId, WorkerId
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.overlay import Offer, Reach
from deskgrid.units import GIB, MIB

__all__ = [
    "Attempt",
    "AttemptState",
    "Job",
    "JobSpec",
    "JobState",
    "Limits",
    "Machine",
    "Results",
]


class JobState(StrEnum):
    """Where a job stands. The last three are final."""

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

    disk: str
    """The disk to boot: name, name@version or sha256."""
    kind: MachineKind = MachineKind.VM
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


class Results(Struct, frozen=True, kw_only=True):
    """What comes back."""

    paths: tuple[str, ...] = ("**",)
    """Globs of files below /scratch."""


class JobSpec(Struct, frozen=True, kw_only=True):
    """What a user submits."""

    machine: Machine
    name: str = "job"
    limits: Limits = Limits()
    results: Results = Results()


class Job(Struct, frozen=True, kw_only=True):
    """A unit of work that a user submitted. Times are seconds since 1970, UTC, by the store's clock."""

    id: JobId
    owner_id: UserId
    owner: str
    spec: JobSpec
    state: JobState
    created_at: float
    finished_at: float | None = None
    disk_sha256: Sha256
    """The unpacked disk, resolved when the job was submitted."""
    context: Sha256 | None = None
    result: Sha256 | None = None
    """The archive of the accepted result, tar with zstd."""
    result_bytes: int | None = None
    exit_code: int | None = None
    """Of context.sh in the accepted result, or in the last attempt that failed with one."""
    message: str = ""
    """Why it failed or was cancelled, for people."""


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
