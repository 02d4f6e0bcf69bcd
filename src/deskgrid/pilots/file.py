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
kind = "slurm"                 # or htcondor, ssh (host = "..."), command (submit, alive, cancel)
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
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from msgspec import Struct

from deskgrid.client.pilots import LEAST_BYTES, OWN_BYTES, Pilot, pilot_spec
from deskgrid.core import pilots
from deskgrid.errors import InvalidInput
from deskgrid.pilots.commands import Commands, CommandSystem, check_commands, slurm_commands, ssh_commands
from deskgrid.pilots.grid_jobs import GridSystem
from deskgrid.pilots.htcondor import HTCondorSystem, check_lines
from deskgrid.pilots.system import System
from deskgrid.settings import WorkerSettings
from deskgrid.units import format_size, parse_duration, parse_size

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["FactoryFile", "SystemPart", "make_system", "read_factory"]

_NAME = re.compile(r"[a-z][a-z0-9-]{0,30}")
_HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.@:-]{0,200}")
_LONGEST_S = 365 * 86400.0
_ELSEWHERE = {"setup", "worker", "deskgrid"}
_ALLOWED = {
    "grid": {"disk", "scratch", "accepts", "group"},
    "slurm": {"options", *_ELSEWHERE},
    "htcondor": {"options", *_ELSEWHERE},
    "ssh": {"host", "options", *_ELSEWHERE},
    "command": {"submit", "alive", "cancel", *_ELSEWHERE},
}
_NEEDED = {"grid": {"disk"}, "ssh": {"host"}, "command": {"submit", "alive", "cancel"}}
_NOT_OF_SBATCH = re.compile(r"(?:-[aJMW]|--(?:array|job-name|clusters|wait)(?:=|$)).*")
"""A pilot is one job, found again by its name, on one cluster."""


class SystemPart(Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One [[system]]."""

    name: str
    kind: Literal["grid", "slurm", "htcondor", "ssh", "command"]
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
    """Further ones of sbatch or ssh, or lines of HTCondor's submit description."""
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
    poll_s = _seconds(found.poll, "poll", str(file))
    for part in found.system:
        where = f"{file}: {part.name[:40]}"
        _check(part, where)
        if min(parse_duration(part.idle), parse_duration(part.lifetime)) < 2 * poll_s:
            raise InvalidInput(
                "its pilots may come and go between two looks", where=where, hint="idle and lifetime are twice poll at least"
            )
    return found


def _check(part: SystemPart, where: str) -> None:
    if not _NAME.fullmatch(part.name):
        raise InvalidInput(
            f"{part.name[:40]!r} is no name for a system", where=where, hint="a small letter, then letters, digits and -"
        )
    _check_fields(part, where)
    for name, value, least, most in (
        ("cpus", part.cpus, 1, 1024),
        ("most", part.most, 0, 100_000),
        ("jobs_per_pilot", part.jobs_per_pilot, 1, 10_000_000),
    ):
        if not least <= value <= most:
            raise InvalidInput(f"{name} = {value} is out of bounds", where=where, hint=f"{least} to {most}")
    for name in ("patience", "lifetime", "idle"):
        _seconds(getattr(part, name), name, where)
    for name in ("memory", "scratch"):
        with _at(f"{where}: {name}"):
            parse_size(getattr(part, name))
    if parse_size(part.memory) < LEAST_BYTES:
        raise InvalidInput(
            f"memory = {part.memory!r} is too little for a pilot", where=where, hint=f"at least {format_size(LEAST_BYTES)}"
        )
    if unknown := set(part.worker) - set(WorkerSettings.__struct_fields__):
        raise InvalidInput(f"{sorted(unknown)[0][:40]!r} is no setting of a worker", where=where)
    _CHECKS[part.kind](part, where)


def _check_fields(part: SystemPart, where: str) -> None:
    own = set().union(*_ALLOWED.values())
    blank = SystemPart(name=part.name, kind=part.kind)
    given = {name for name in own if getattr(part, name) != getattr(blank, name)}
    if wrong := given - _ALLOWED[part.kind]:
        raise InvalidInput(
            f"a {part.kind} has no {sorted(wrong)[0]}", where=where, hint=f"it has {', '.join(sorted(_ALLOWED[part.kind]))}"
        )
    if missing := {name for name in _NEEDED.get(part.kind, ()) if not getattr(part, name)}:
        raise InvalidInput(f"{sorted(missing)[0]} is missing", where=where)


def _check_grid(part: SystemPart, where: str) -> None:
    with _at(where):
        pilot_spec(_pilot(part))


def _check_slurm(part: SystemPart, where: str) -> None:
    for option in filter(_NOT_OF_SBATCH.fullmatch, part.options):
        raise InvalidInput(
            f"options: {option[:80]!r} is not for a pilot", where=where, hint="it is one job, found by its name, on one cluster"
        )
    check_commands(_commands(part), where=where)


def _check_ssh(part: SystemPart, where: str) -> None:
    if not _HOST.fullmatch(part.host):
        raise InvalidInput(f"{part.host[:80]!r} is no host", where=where)
    check_commands(_commands(part), where=where)


_CHECKS: dict[str, Callable[[SystemPart, str], object]] = {
    "grid": _check_grid,
    "slurm": _check_slurm,
    "htcondor": lambda part, where: check_lines(part.options, where=where),
    "ssh": _check_ssh,
    "command": lambda part, where: check_commands(_commands(part), where=where),
}


def _seconds(text: str, name: str, where: str) -> float:
    with _at(f"{where}: {name}"):
        found = parse_duration(text)
    if not 0 < found <= _LONGEST_S:
        raise InvalidInput(f"{name} = {text!r} is out of bounds", where=where, hint="up to 365d")
    return found


@contextmanager
def _at(where: str) -> Iterator[None]:
    """Let what is wrong name its place."""
    try:
        yield
    except InvalidInput as error:
        raise InvalidInput(error.message, where=where, hint=error.hint) from error


def make_system(part: SystemPart, grid: Grid) -> System:
    """Return the system that a part describes. Raise OperatorError if what drives it is not installed."""
    memory_bytes, idle_s = parse_size(part.memory), parse_duration(part.idle)
    plan = pilots.System(
        name=part.name,
        packages=frozenset(part.packages),
        cpus=part.cpus,
        memory_bytes=memory_bytes - OWN_BYTES,
        platform=part.platform,
        most=part.most,
        jobs_per_pilot=part.jobs_per_pilot,
        patience_s=parse_duration(part.patience),
        lifetime_s=parse_duration(part.lifetime),
    )
    if part.kind == "grid":
        return GridSystem(plan, grid, _pilot(part))
    rest: dict[str, Any] = {"command": part.deskgrid, "settings": part.worker, "setup": part.setup}
    if part.kind == "htcondor":
        return HTCondorSystem(plan, check_lines(part.options, where=part.name), idle_s=idle_s, **rest)
    return CommandSystem(plan, _commands(part), idle_s=idle_s, **rest)


def _pilot(part: SystemPart) -> Pilot:
    return Pilot(
        disk=part.disk,
        packages=part.packages,
        accepts=part.accepts,
        group=part.group,
        cpus=part.cpus,
        memory_bytes=parse_size(part.memory),
        scratch_bytes=parse_size(part.scratch),
        lifetime_s=parse_duration(part.lifetime),
        idle_s=parse_duration(part.idle),
    )


def _commands(part: SystemPart) -> Commands:
    if part.kind == "slurm":
        return slurm_commands(part.options)
    if part.kind == "ssh":
        return ssh_commands(part.host, part.options)
    return Commands(submit=part.submit, alive=part.alive, cancel=(part.cancel,))
