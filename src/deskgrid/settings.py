"""One frozen settings object per program, read once from TOML and the environment and passed on explicitly.

A file holds the fields of the struct by name. Sizes and durations may be written for people ("8GiB", "10m") where a field's
name ends in `_bytes`, `_bytes_per_s` or `_s`. The environment variable PREFIX_FIELD (as DESKGRID_SERVER_LEASE_S) wins over the file.
"""

from __future__ import annotations

import os
import tomllib
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import platformdirs
from msgspec import Struct

from deskgrid.errors import InvalidInput
from deskgrid.units import parse_duration, parse_size

__all__ = [
    "HubSettings",
    "PeerSettings",
    "ServerSettings",
    "WorkerSettings",
    "client_home",
    "hub_home",
    "load_settings",
    "server_home",
    "worker_home",
]

S = TypeVar("S", bound=Struct)


class ServerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The server's settings: HOME/server.toml, or DESKGRID_SERVER_*."""

    name: str = "deskgrid"
    """Name of the grid, shown to people."""
    listen: str = "127.0.0.1:8470"
    """HOST:PORT to listen on; port 0 takes a free one. 0.0.0.0 for all interfaces."""
    address: str = ""
    """HOST:PORT that workers and users dial, for links; empty: what `listen` says."""
    database: str = ""
    """SQLAlchemy URL; empty: SQLite at HOME/grid.sqlite."""
    lease_s: float = 60.0
    """Seconds after which an attempt whose worker is silent is lost."""
    interval_s: float = 20.0
    """Seconds between a worker's calls when nothing happens. At most a third of the lease."""
    max_workers_held: int = 2000
    """Workers whose wake calls are held at the same time, so that new jobs reach them at once; the others come at their interval."""
    max_interval_s: float = 300.0
    """Longest interval between the calls of an idle worker, told when there are many of them."""
    calls_per_s: float = 500.0
    """Calls of workers in a second that the grid aims at: with more workers the intervals grow, up to max_interval_s, and leases with them."""
    max_waiting: int = 10_000_000
    """Jobs of one user that may wait; an admin can say otherwise for a user. 0: no bound."""
    max_running: int = 0
    """Jobs of one user that may run at the same time, likewise. 0: no bound."""
    together_s: float = 60.0
    """Seconds in which all jobs of a set that starts together must find workers; then others have their turn."""
    retain_s: float = 0.0
    """Seconds that results are kept after their job's end, where a job does not say otherwise; 0: until they are removed."""
    forget_s: float = 0.0
    """Seconds after their end when jobs and arrays themselves are forgotten, with their results; 0: never."""
    max_bytes: int = 0
    """Bytes of data, contexts and results that one user may keep; an admin can say otherwise for a user. 0: no bound."""
    blobs: str = ""
    """s3://BUCKET/PREFIX?endpoint=URL&public=URL&region=NAME for blobs in an S3 store; empty: in the server's folder. `public`: the URL
    by which workers and users reach the store, if it is another one. Keys are in AWS's environment variables or HOME/s3.toml."""
    sweep_s: float = 5.0
    """Seconds between looks for expired leases."""
    upload_lifetime_s: float = 86400.0
    """Seconds after which an upload that nothing refers to is removed."""
    max_upload_bytes: int = 64 * (1 << 30)
    """Largest blob that is taken."""
    reserve_bytes: int = 256 * (1 << 20)
    """Free bytes on the blob folder's disk below which uploads are refused, so that the database can go on."""
    max_log_bytes: int = 1 << 20
    """Live output kept per attempt and stream."""
    hub_listen: str = ""
    """HOST:PORT of the hub inside the server; empty: the host of `listen` and the next port; "off": no hub in this process."""
    hub_address: str = ""
    """HOST:PORT that peers dial, if it is another one than the hub listens on."""
    grant_s: float = 60.0
    """Seconds that a grant is valid."""
    token_s: float = 90 * 86400.0
    """Seconds after which a login ends, unless it is renewed; 0: never. Tokens of workers and hubs end when they leave or are removed."""
    max_workers_per_user: int = 100
    """PCs that one user may let join; an admin's links without an owner are not counted."""
    trusted_grids: tuple[str, ...] = ()
    """Grids whose word on disks is believed, each as NAME=FINGERPRINT: what it is called here, and the sha256 of its authority's certificate, which
    its admin sees with `deskgrid disk export`."""
    audit_s: float = 366 * 86400.0
    """Seconds that the audit log is kept."""
    metrics_listen: str = ""
    """HOST:PORT where /metrics, /health and /ready are told without a token and without TLS, as in 127.0.0.1:9470; empty: nowhere. At `listen`
    an admin's token opens /metrics."""
    peer_s: float = 900.0
    """Seconds after which a peer or hub that was not heard of is forgotten."""
    max_peers_per_user: int = 1000
    """Programs and attempts of one user that may be peers at the same time."""


class WorkerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the owner of a PC lends: HOME/worker.toml, or DESKGRID_WORKER_*."""

    cpus: int = 0
    """CPUs that all machines together may use; 0: all but one, at least one."""
    cpu_share: float = 1.0
    """Part of the time of each CPU above that a machine may use, 0.05 to 1. Linux only."""
    memory_bytes: int = 0
    """Memory that all machines together may use; 0: half of the PC's."""
    disk_bytes: int = 20 * (1 << 30)
    """Disk that machines and results may fill, besides the cache."""
    cache_bytes: int = 20 * (1 << 30)
    """Disk that the cache of verified disks may fill; the one used longest ago goes first."""
    network_bytes_per_s: int = 0
    """Bytes that may go to and from the network in a second, both directions together: disks, results, streams of jobs. With `share`, half of them are
    for other workers. 0: no bound."""
    reserve_bytes: int = 1 << 30
    """Free bytes that stay on the owner's disk whatever the bounds above say."""
    max_result_bytes: int = 64 * (1 << 30)
    """Largest content of a scratch that is taken out."""
    drivers: tuple[str, ...] = ("qemu", "virtualbox")
    """Drivers that may be used, by name, the preferred ones first; one with the CPU's own virtualisation goes before one without."""
    endorsers: tuple[str, ...] = ()
    """Who must vouch for a disk of the grid before a machine boots it here: grid (an admin), group:NAME, user:NAME, with @GRID of another grid that
    this one trusts; one of them is enough. Empty: any disk. Disks that you installed yourself are not asked about."""
    accepts: tuple[str, ...] = ("everyone",)
    """Whose jobs it takes: mine (the PC's owner, who made its link), group:NAME, user:NAME or everyone."""
    packages: tuple[str, ...] = ()
    """What is installed on this PC, for jobs that need it, as in root or cuda-12."""
    unsandboxed: bool = False
    """Whether process jobs may run even where no sandbox can be made. WARNING: such a job is a program of the user who runs the worker: it can read,
    change and remove all his files, use his network and see his other programs. Only for PCs that hold nothing else, with `accepts` set to
    people whom you trust. Where a sandbox can be made it is used all the same."""
    hours: tuple[str, ...] = ()
    """When it may work, in local time, as in ["mon-fri 18:00-08:00", "sat,sun"]; empty: always."""
    idle_s: float = 0.0
    """Seconds that keyboard and mouse must have rested; 0: it works beside its owner, at the lowest priority."""
    busy_cpus: float = 0.0
    """CPUs that other programs may use together, as in 1.5, before it makes way; 0: they do not matter. Not on Windows."""
    on_battery: bool = False
    """Whether it works on battery."""
    full_screen: bool = False
    """Whether it works while a program fills the screen, as a game or a talk does."""
    share: bool = False
    """Whether disks are fetched from other workers, too, and given to them: then other PCs of the grid connect to this one, on `share_port`. Needs
    libtorrent (deskgrid[swarm])."""
    tags: tuple[str, ...] = ()
    """Words for what or where it is, as in lab-2 or fast-disk: users may name them where they say which workers should hold their data."""
    keep_bytes: int = 0
    """Part of the cache that may be filled with data which users want to be held here; 0: half of it if `share` is set, otherwise nothing."""
    share_near: str = ""
    """HOST:PORT of the cache of the PC in whose virtual machine this worker runs, as in cache:8475, with `share`: what it shares is fetched from
    it. Then no other PC is told to connect to this one. Empty: none."""
    share_port: int = 0
    """Port for that; 0: any that is free."""
    share_bytes_per_s: int = 0
    """Bytes that are given to other workers in a second. 0: no bound but network_bytes_per_s."""
    overlay: bool = True
    """Whether machines may have a network with the services of their jobs."""
    internet: bool = False
    """Whether machines may reach public addresses on the internet, too; private ones never."""
    accelerator: str = ""
    """kvm, hvf, whpx or tcg; empty: the best that is found to work."""
    checkpoint_s: float = 3600.0
    """Seconds of running after which the state of a virtual machine is written to the disk, so that a PC that is switched off loses no more; 0: never."""
    release_s: float = 900.0
    """Seconds after the owner came back, or paused it, when virtual machines are written to the disk and their memory is given back; other machines, of which that
    cannot be done, are ended then. 0: never."""
    nice: int = 19
    """Scheduling priority of machines and of the worker's own work, 0 to 19 (lowest)."""
    stop_grace_s: float = 5.0
    """Seconds that a guest gets to power off when its job is cancelled."""
    backoff_s: float = 1.0
    """First pause after the server could not be reached; doubles, with jitter, up to max_backoff_s."""
    max_backoff_s: float = 60.0
    """Longest pause between tries to reach the server."""


class HubSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A hub's settings: HOME/hub.toml, or DESKGRID_HUB_*; they hold for the hub inside a server, too."""

    listen: str = "0.0.0.0:8471"
    """HOST:PORT to listen on."""
    address: str = ""
    """HOST:PORT that peers dial; empty: what `listen` says."""
    max_peers: int = 20_000
    """Registered peers."""
    max_peers_per_name: int = 64
    """Registrations with the same name in the certificate: programs of one user."""
    max_streams_per_peer: int = 4096
    """Relayed streams that one peer may have at the same time, called or calling."""
    max_connects_per_s: float = 100.0
    """Connects that one peer may ask for, on average; bursts of ten times as many."""
    max_bytes_per_s: int = 0
    """Bytes that one relayed stream may carry in a second, both directions together; 0: no bound."""
    idle_s: float = 86400.0
    """Seconds after which a relayed stream that carried nothing is ended."""
    handshake_s: float = 10.0
    """Seconds that a connection may take until it has said what it is."""
    ping_s: float = 60.0
    """Seconds between a peer's signs of life."""
    pumps: int = 2
    """Threads that carry relayed streams."""


class PeerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How this PC takes part in the overlay: HOME/peer.toml, or DESKGRID_PEER_*."""

    listen: str = "0.0.0.0:0"
    """HOST:PORT to listen on for other peers; port 0 takes a free one; "off": do not listen."""
    relay_only: bool = False
    """Hide this PC's addresses: every stream goes through a hub."""
    private: bool = True
    """Whether private addresses of peers behind the same router may be dialled."""
    paths: tuple[str, ...] = ("direct", "reverse", "punched", "relayed")
    """Ways that may be tried."""
    pumps: int = 2
    """Threads that carry streams."""


def load_settings(kind: type[S], file: Path, prefix: str) -> S:
    """Read settings from `file` (which may be missing) and the environment. Raise InvalidInput naming file and field."""
    values: dict[str, Any] = {}
    if file.exists():
        try:
            values = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise InvalidInput(str(error), where=str(file)) from error
    for field in msgspec.structs.fields(kind):
        text = os.environ.get(f"{prefix}_{field.name.upper()}")
        if text is not None:
            values[field.name] = text.split(",") if "tuple" in str(field.type) else text
    try:
        return msgspec.convert({name: _plain(name, value) for name, value in values.items()}, kind, strict=False)
    except msgspec.ValidationError as error:
        allowed = ", ".join(field.name for field in msgspec.structs.fields(kind))
        raise InvalidInput(str(error), where=str(file), hint=f"allowed: {allowed}") from error


def _plain(name: str, value: Any) -> Any:
    """Return sizes and durations as numbers."""
    if not isinstance(value, str) or value.replace(".", "", 1).isdigit():
        return value
    if name.endswith(("_bytes", "_bytes_per_s")):
        return parse_size(value)
    return parse_duration(value) if name.endswith("_s") else value


def server_home() -> Path:
    """Return the folder of the server, where --home does not say otherwise."""
    return Path(os.environ.get("DESKGRID_SERVER_HOME") or platformdirs.user_data_path("deskgrid") / "server")


def worker_home() -> Path:
    """Return the folder of the worker, where --home does not say otherwise."""
    return Path(os.environ.get("DESKGRID_WORKER_HOME") or platformdirs.user_data_path("deskgrid") / "worker")


def client_home() -> Path:
    """Return the folder where a user's logins are kept."""
    return Path(os.environ.get("DESKGRID_CLIENT_HOME") or platformdirs.user_config_path("deskgrid"))


def hub_home() -> Path:
    """Return the folder of a hub, where --home does not say otherwise."""
    return Path(os.environ.get("DESKGRID_HUB_HOME") or platformdirs.user_data_path("deskgrid") / "hub")
