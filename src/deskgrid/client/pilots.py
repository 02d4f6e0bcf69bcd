"""Pilots in virtual machines of the grid: a job that boots a disk with deskgrid in it and is a worker there.

It reaches the server and the cache of the PC it is on, and nothing else. Its jobs run as processes in the machine. It leaves when it has had no job for
a while, or when its time is over.
"""

from __future__ import annotations

import shlex
from pathlib import Path

from msgspec import Struct

from deskgrid.errors import InvalidInput
from deskgrid.model.jobs import JobSpec, Limits, Machine, Results
from deskgrid.model.machines import Network
from deskgrid.model.overlay import API_SERVICE, CACHE_SERVICE, parse_reach
from deskgrid.units import GIB, MIB, format_size

__all__ = ["LEAST_BYTES", "OWN_BYTES", "Pilot", "pilot_spec", "write_pilot"]

_GRID, _CACHE = parse_reach("grid", str(API_SERVICE)), parse_reach("cache", str(CACHE_SERVICE))
"""All that it reaches."""
OWN_BYTES = 384 * MIB
"""Of a pilot's memory, for the worker, and the system if it is a machine."""
LEAST_BYTES = OWN_BYTES + 128 * MIB
_BOOT_S, _GOODBYE_S = 900.0, 900.0
"""For what is on its way when the time is over, too."""
_NO_FILE = "pilot.log"
"""A machine's results have a pattern; this one matches nothing that a pilot leaves."""


class Pilot(Struct, frozen=True, kw_only=True):
    """What a pilot is to be."""

    disk: str
    """One with deskgrid in it, as the templates worker and root."""
    name: str = "pilot"
    packages: tuple[str, ...] = ()
    """What is installed on the disk, for jobs that need it."""
    accepts: tuple[str, ...] = ("everyone",)
    """Whose jobs it takes, of those that its user may see: mine, group:NAME, user:NAME or everyone."""
    group: str = ""
    """The group that it is done for."""
    cpus: int = 1
    memory_bytes: int = 2 * GIB
    scratch_bytes: int = 16 * GIB
    lifetime_s: float = 4 * 3600.0
    idle_s: float = 600.0
    priority: int = 0


def pilot_spec(pilot: Pilot) -> JobSpec:
    """Return the job that is a pilot. Raise InvalidInput for one that could run nothing."""
    if pilot.memory_bytes < LEAST_BYTES:
        raise InvalidInput(
            f"{format_size(pilot.memory_bytes)} are too little for a pilot",
            where="memory",
            hint=f"at least {format_size(LEAST_BYTES)}",
        )
    return JobSpec(
        name=pilot.name,
        group=pilot.group,
        priority=pilot.priority,
        pilot=True,
        machine=Machine(
            disk=pilot.disk,
            cpus=pilot.cpus,
            memory_bytes=pilot.memory_bytes,
            scratch_bytes=pilot.scratch_bytes,
            network=Network.OVERLAY,
            reach=(_GRID, _CACHE),
        ),
        limits=Limits(wall_time_s=_BOOT_S + pilot.lifetime_s + _GOODBYE_S, boot_time_s=_BOOT_S, attempts=1),
        results=Results(paths=(_NO_FILE,)),
    )


def write_pilot(folder: Path, pilot: Pilot) -> None:
    """Write the context of a pilot's job into a folder. There is no secret in it: the job's own token is what it joins with."""
    settings = {
        "drivers": "process",
        "overlay": "false",
        "cpus": pilot.cpus,
        "memory_bytes": pilot.memory_bytes - OWN_BYTES,
        "disk_bytes": pilot.scratch_bytes // 2,
        "cache_bytes": pilot.scratch_bytes // 4,
        "reserve_bytes": pilot.scratch_bytes // 16,
        "packages": ",".join(pilot.packages),
        "accepts": ",".join(pilot.accepts),
        "share": "true",
        "share_near": f"{_CACHE.name}:{_CACHE.port}",
        "nice": 0,
    }
    command = ["deskgrid", "worker", "run", "--once", "--join", "/context/grid/credentials.json", "--home", "/scratch/.pilot"]
    command += ["--name", pilot.name, "--lifetime", f"{pilot.lifetime_s:.0f}s", "--idle", f"{pilot.idle_s:.0f}s"]
    lines = [
        "export HOME=/root",
        *(f"export DESKGRID_WORKER_{name.upper()}={shlex.quote(str(value))}" for name, value in settings.items() if value != ""),
        f"exec {shlex.join(command)}",
    ]
    (folder / "context.sh").write_text("\n".join(lines) + "\n", encoding="utf-8")
