"""The overlay's words: peers, the services they offer, the ways between them.

A peer is one end of the overlay: an attempt of a job, a program of a user, a worker. Its certificate has one DNS name:

    attempt-3.job-42.deskgrid     the third attempt of job 42
    user-7.deskgrid               user number 7; each of his programs is a peer with a key of its own
    worker-5.deskgrid             worker number 5
    hub-2.deskgrid                hub number 2

People write services as SERVICE.PEER: `web.job-42`, `db.user` (of the job's own user), `db.user-ann`, `api.server`.
"""

from __future__ import annotations

import re
from enum import StrEnum

from msgspec import Struct

from deskgrid.errors import InvalidInput
from deskgrid.model.ids import JobId, UserId, WorkerId

__all__ = [
    "API_SERVICE",
    "CACHE_SERVICE",
    "Address",
    "Connection",
    "ConnectionPath",
    "Hub",
    "Offer",
    "Peer",
    "PeerKind",
    "Reach",
    "ServiceRef",
    "attempt_peer",
    "hub_peer",
    "parse_offer",
    "parse_reach",
    "parse_service",
    "parse_worker",
    "user_peer",
    "worker_name",
    "worker_peer",
]

_NUMBER = re.compile(r"[1-9][0-9]{0,17}")
_SERVICE = re.compile(r"[a-z][a-z0-9-]{0,30}")
_PEER = re.compile(r"job-[1-9][0-9]{0,17}|user|user-[a-z][a-z0-9_.-]{0,62}|server|worker|[a-z][a-z0-9-]{0,30}\.set")


class PeerKind(StrEnum):
    """What a peer acts for."""

    JOB = "job"
    USER = "user"
    WORKER = "worker"


class ConnectionPath(StrEnum):
    """How the TCP connection between two peers came about."""

    DIRECT = "direct"
    """The caller dialled."""
    REVERSE = "reverse"
    """The called peer dialled back."""
    PUNCHED = "punched"
    """Both dialled at the same time through their NATs."""
    RELAYED = "relayed"
    """Both dialled the hub."""


class Address(Struct, frozen=True, array_like=True):
    """An IP address and a TCP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class ServiceRef(Struct, frozen=True):
    """A service of a peer, as people name it."""

    service: str
    peer: str
    """job-N, user (the job's own), user-NAME, server, worker (the job's own), or MEMBER.set: another job of the same set."""

    def __str__(self) -> str:
        return f"{self.service}.{self.peer}"

    @property
    def job_id(self) -> JobId | None:
        """The job whose service it is, if it is a job's."""
        return JobId(int(self.peer[4:])) if self.peer.startswith("job-") else None

    @property
    def member(self) -> str | None:
        """The member of the job's own set whose service it is, if it is that."""
        return self.peer.removesuffix(".set") if self.peer.endswith(".set") else None

    @property
    def is_of_peer(self) -> bool:
        """Whether a peer offers it: what the server and the worker are asked for is not in the overlay."""
        return self.peer not in (API_SERVICE.peer, CACHE_SERVICE.peer)

    @property
    def user(self) -> str | None:
        """The user whose service it is: a name, "" for the job's own user, None if it is no user's."""
        return self.peer.removeprefix("user").removeprefix("-") if self.peer.startswith("user") else None


API_SERVICE = ServiceRef("api", "server")
"""The server itself, for jobs that work with the grid."""
CACHE_SERVICE = ServiceRef("cache", "worker")
"""The cache of the PC that a job runs on, for jobs that are themselves a worker."""
_PORTS = {API_SERVICE: 8470, CACHE_SERVICE: 8475}


class Offer(Struct, frozen=True):
    """A service of a job: `ssh:22`."""

    name: str
    port: int
    """TCP port in the machine."""

    def __str__(self) -> str:
        return f"{self.name}:{self.port}"


class Reach(Struct, frozen=True):
    """A service that a job may reach, as `name:port` in its machine."""

    name: str
    service: ServiceRef
    port: int

    def __str__(self) -> str:
        return f"{self.service}:{self.port}"


class Hub(Struct, frozen=True, kw_only=True):
    """Where peers register. `name` is that of its certificate."""

    name: str
    address: str
    """HOST:PORT."""


class Connection(Struct, frozen=True, kw_only=True):
    """One stream through the overlay, as one of its ends sees it."""

    service: str
    peer: str
    """The other end's name."""
    outgoing: bool
    path: ConnectionPath
    since: float
    """Seconds since 1970 by the reporter's clock; for people."""
    sent_bytes: int
    received_bytes: int
    rtt_s: float | None = None
    """Round-trip time of its TCP connection (to the hub, if relayed); None if the system does not tell."""


class Peer(Struct, frozen=True, kw_only=True):
    """A registered peer, as users see it."""

    id: int
    kind: PeerKind
    name: str
    """Of its certificate."""
    owner: str
    """The user it acts for; of a worker, the worker's name."""
    job_id: JobId | None = None
    services: tuple[str, ...] = ()
    hub: str = ""
    """Name of the hub where it is registered; empty while it is at none."""
    registered_at: float
    connections: tuple[Connection, ...] = ()


def attempt_peer(job_id: JobId, number: int) -> str:
    """Return the name of a job's n-th attempt as a peer."""
    return f"attempt-{number}.job-{job_id}.deskgrid"


def user_peer(user_id: UserId) -> str:
    """Return the name of a user's programs as peers."""
    return f"user-{user_id}.deskgrid"


def worker_peer(worker_id: WorkerId) -> str:
    """Return the name of a worker as a peer."""
    return f"{worker_name(worker_id)}.deskgrid"


def worker_name(worker_id: WorkerId) -> str:
    """Return by what name workers call each other."""
    return f"worker-{worker_id}"


def parse_worker(name: str) -> WorkerId | None:
    """Read `worker_name`; None for anything else."""
    kind, _, number = name.partition("-")
    return WorkerId(int(number)) if kind == "worker" and _NUMBER.fullmatch(number) else None


def hub_peer(hub_id: int) -> str:
    """Return the name of a hub."""
    return f"hub-{hub_id}.deskgrid"


def parse_service(text: str, where: str = "") -> ServiceRef:
    """Read SERVICE.PEER. Raise InvalidInput for anything else."""
    service, _, peer = text.strip().partition(".")
    if not _SERVICE.fullmatch(service) or not _PEER.fullmatch(peer):
        raise InvalidInput(f"{text[:100]!r} is not a service", where=where, hint="SERVICE.PEER, as web.job-42 or web.user")
    return ServiceRef(service, peer)


def parse_offer(text: str, where: str = "") -> Offer:
    """Read NAME:PORT. Raise InvalidInput for anything else."""
    name, _, port = text.partition(":")
    if not _SERVICE.fullmatch(name) or not _is_port(port):
        raise InvalidInput(f"{text[:100]!r} is not a service to offer", where=where, hint="NAME:PORT, as in ssh:22")
    return Offer(name, int(port))


def parse_reach(name: str, text: str, where: str = "") -> Reach:
    """Read what `name` stands for: SERVICE.PEER:PORT; the port may be left out for api.server and cache.worker. Raise InvalidInput otherwise."""
    if not _SERVICE.fullmatch(name):
        raise InvalidInput(f"{name[:40]!r} is not a name for a service", where=where, hint="a letter, then letters, digits and -")
    service, _, port = text.partition(":")
    found = parse_service(service, where)
    if not port and found in _PORTS:
        return Reach(name, found, _PORTS[found])
    if not _is_port(port):
        raise InvalidInput(f"{text[:100]!r} has no port", where=where, hint=f'as in {name} = "{found}:8000"')
    return Reach(name, found, int(port))


def _is_port(text: str) -> bool:
    return text.isascii() and text.isdecimal() and len(text) <= 5 and 1 <= int(text) <= 65535
