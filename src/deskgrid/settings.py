"""One frozen settings object per program, read once from TOML and the environment and passed on explicitly.

A file holds the fields of the struct by name. Sizes and durations may be written for people ("8GiB", "10m") where a field's
name ends in `_bytes` or `_s`. The environment variable PREFIX_FIELD (as DESKGRID_SERVER_LEASE_S) wins over the file.
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

__all__ = ["ServerSettings", "WorkerSettings", "client_home", "load_settings", "server_home", "worker_home"]

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


class WorkerSettings(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What the owner of a PC lends: HOME/worker.toml, or DESKGRID_WORKER_*."""

    cpus: int = 0
    """CPUs that all machines together may use; 0: all but one, at least one."""
    memory_bytes: int = 0
    """Memory that all machines together may use; 0: half of the PC's."""
    disk_bytes: int = 20 * (1 << 30)
    """Disk that machines and results may fill, besides the cache."""
    cache_bytes: int = 20 * (1 << 30)
    """Disk that the cache of verified disks may fill; the one used longest ago goes first."""
    reserve_bytes: int = 1 << 30
    """Free bytes that stay on the owner's disk whatever the bounds above say."""
    max_result_bytes: int = 64 * (1 << 30)
    """Largest content of a scratch that is taken out."""
    drivers: tuple[str, ...] = ("qemu",)
    """Drivers that may be used, by name."""
    accelerator: str = ""
    """kvm, hvf, whpx or tcg; empty: the best that is found to work."""
    nice: int = 19
    """Scheduling priority of machines and of the worker's own work, 0 to 19 (lowest)."""
    stop_grace_s: float = 5.0
    """Seconds that a guest gets to power off when its job is cancelled."""
    backoff_s: float = 1.0
    """First pause after the server could not be reached; doubles, with jitter, up to max_backoff_s."""
    max_backoff_s: float = 60.0
    """Longest pause between tries to reach the server."""


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
    if name.endswith("_bytes"):
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
