"""factory.toml: the systems that a factory may send pilots to.

poll = "30s"

[[system]]
kind = "grid"                  # virtual machines on the grid's own PCs
name = "vm"
disk = "root"
packages = ["root"]
cpus = 2
memory = "3GiB"
most = 10                      # pilots at the same time

[[system]]
kind = "slurm"                 # or ssh (host = "..."), or command (submit, alive, cancel)
name = "cluster"
packages = ["root"]
cpus = 4
memory = "8GiB"
options = ["--partition=short"]
setup = "module load deskgrid"
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import msgspec
from msgspec import Struct

from deskgrid.client.pilots import OWN_BYTES, Pilot
from deskgrid.core import pilots
from deskgrid.errors import InvalidInput
from deskgrid.pilots.commands import Commands, CommandSystem, slurm_commands, ssh_commands
from deskgrid.pilots.grid_jobs import GridSystem
from deskgrid.pilots.system import System
from deskgrid.units import parse_duration, parse_size

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["FactoryFile", "SystemPart", "make_system", "read_factory"]

_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@:-]{0,200}")
_ALLOWED = {
    "grid": {"disk", "scratch", "accepts", "group"},
    "slurm": {"options", "setup", "worker", "deskgrid"},
    "ssh": {"host", "options", "setup", "worker", "deskgrid"},
    "command": {"submit", "alive", "cancel", "setup", "worker", "deskgrid"},
}
_NEEDED = {"grid": {"disk"}, "slurm": set[str](), "ssh": {"host"}, "command": {"submit", "alive", "cancel"}}


class SystemPart(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One [[system]]."""

    name: str
    kind: Literal["grid", "slurm", "ssh", "command"]
    packages: tuple[str, ...] = ()
    """What its pilots have, for jobs that need it."""
    cpus: int = 1
    memory: str = "2GiB"
    most: int = 10
    """Pilots at the same time."""
    jobs_per_pilot: int = 10
    """Waiting jobs for which one more is sent."""
    patience: str = "1h"
    """After which a pilot that has not joined is called back."""
    lifetime: str = "4h"
    idle: str = "10m"
    platform: str = "linux-x86_64"
    disk: str = ""
    scratch: str = "16GiB"
    accepts: tuple[str, ...] = ("everyone",)
    group: str = ""
    host: str = ""
    options: tuple[str, ...] = ()
    """Further ones of sbatch or ssh."""
    submit: tuple[str, ...] = ()
    alive: tuple[str, ...] = ()
    cancel: tuple[str, ...] = ()
    setup: str = ""
    """Lines of shell, run before the worker."""
    deskgrid: str = "deskgrid"
    """How it is called there."""
    worker: dict[str, str | int | bool | tuple[str, ...]] = {}
    """Settings of the worker there, as in worker.toml."""


class FactoryFile(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file."""

    system: tuple[SystemPart, ...]
    poll: str = "30s"


def read_factory(file: Path) -> FactoryFile:
    """Read a factory's file. Raise InvalidInput with what is wrong and what is allowed."""
    try:
        found = msgspec.convert(tomllib.loads(file.read_text(encoding="utf-8")), FactoryFile)
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidInput(str(error), where=str(file)) from error
    if not found.system or len({part.name for part in found.system}) < len(found.system):
        raise InvalidInput("a factory has [[system]] parts with different names", where=str(file))
    for part in found.system:
        _check(part, f"{file}: {part.name[:40]}")
    _seconds(found.poll, "poll", str(file))
    return found


def _check(part: SystemPart, where: str) -> None:
    if not _NAME.fullmatch(part.name):
        raise InvalidInput(
            f"{part.name[:40]!r} is no name for a system", where=where, hint="a small letter, then letters, digits and -"
        )
    own = set().union(*_ALLOWED.values())
    blank = SystemPart(name=part.name, kind=part.kind)
    given = {name for name in own if getattr(part, name) != getattr(blank, name)}
    if wrong := given - _ALLOWED[part.kind]:
        raise InvalidInput(
            f"a {part.kind} has no {sorted(wrong)[0]}", where=where, hint=f"it has {', '.join(sorted(_ALLOWED[part.kind]))}"
        )
    if missing := {name for name in _NEEDED[part.kind] if not getattr(part, name)}:
        raise InvalidInput(f"{sorted(missing)[0]} is missing", where=where)
    if part.kind == "ssh" and not _HOST.fullmatch(part.host):
        raise InvalidInput(f"{part.host[:80]!r} is no host", where=where)
    for name, value, least, most in (
        ("cpus", part.cpus, 1, 1024),
        ("most", part.most, 0, 100_000),
        ("jobs_per_pilot", part.jobs_per_pilot, 1, 10_000_000),
    ):
        if not least <= value <= most:
            raise InvalidInput(f"{name} = {value} is out of bounds", where=where, hint=f"{least} to {most}")
    for name in ("patience", "lifetime", "idle"):
        _seconds(getattr(part, name), name, where)
    if any("\n" in word or "\0" in word for words in (part.submit, part.alive, part.cancel, part.options) for word in words):
        raise InvalidInput("a word of a command has no line ends", where=where)


def _seconds(text: str, name: str, where: str) -> float:
    found = parse_duration(text)
    if not 0 < found <= 366 * 86400:
        raise InvalidInput(f"{name} = {text!r} is out of bounds", where=where, hint="up to 366d")
    return found


def make_system(part: SystemPart, grid: Grid) -> System:
    """Return the system that a part describes."""
    memory_bytes, lifetime_s, idle_s = parse_size(part.memory), parse_duration(part.lifetime), parse_duration(part.idle)
    plan = pilots.System(
        name=part.name,
        packages=frozenset(part.packages),
        cpus=part.cpus,
        memory_bytes=memory_bytes - OWN_BYTES if part.kind == "grid" else memory_bytes,
        platform=part.platform,
        most=part.most,
        jobs_per_pilot=part.jobs_per_pilot,
        patience_s=parse_duration(part.patience),
        lifetime_s=lifetime_s,
    )
    if part.kind == "grid":
        pilot = Pilot(
            disk=part.disk,
            packages=part.packages,
            accepts=part.accepts,
            group=part.group,
            cpus=part.cpus,
            memory_bytes=memory_bytes,
            scratch_bytes=parse_size(part.scratch),
            lifetime_s=lifetime_s,
            idle_s=idle_s,
        )
        return GridSystem(plan, grid, pilot)
    commands = {
        "slurm": lambda: slurm_commands(part.options),
        "ssh": lambda: ssh_commands(part.host, part.options),
        "command": lambda: Commands(submit=part.submit, alive=part.alive, cancel=part.cancel),
    }[part.kind]()
    return CommandSystem(
        plan, commands, lifetime_s=lifetime_s, idle_s=idle_s, command=part.deskgrid, settings=part.worker, setup=part.setup
    )
