"""What a job may ask for, whoever asks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

from deskgrid.core.console import CONSOLE
from deskgrid.core.reach import check_share, is_trust
from deskgrid.core.secret_names import check_names
from deskgrid.errors import InvalidInput
from deskgrid.model.data import DataFile
from deskgrid.model.jobs import INSTALLED, JobSpec, Machine
from deskgrid.model.machines import DriverName, MachineKind, Network
from deskgrid.model.overlay import API_SERVICE, CACHE_SERVICE, Offer, Reach, parse_offer, parse_reach
from deskgrid.units import GIB, MIB, format_size

__all__ = [
    "MOST_DATA_BYTES",
    "MOST_DATA_FILES",
    "MOST_JOBS",
    "MOST_SERVICES",
    "PLATFORM",
    "check_array",
    "check_data_size",
    "check_shares",
    "check_spec",
]

_BOUNDS: tuple[tuple[str, str, float, float], ...] = (
    ("machine", "scratch_bytes", 16 * MIB, 16 * 1024 * GIB),
    ("machine", "memory_bytes", 32 * MIB, 4 * 1024 * GIB),
    ("machine", "cpus", 1, 1024),
    ("machine", "reach_wait_s", 0, 86400),
    ("limits", "wall_time_s", 1, 366 * 86400),
    ("limits", "boot_time_s", 1, 86400),
    ("limits", "attempts", 1, 100),
    ("limits", "max_lost", 1, 1000),
    ("limits", "max_suspend_s", 1, 366 * 86400),
    ("limits", "processes", 1, 1_000_000),
    ("limits", "file_bytes", 0, 16 * 1024 * GIB),
    ("", "priority", -1000, 1000),
    ("", "retain_s", 0, 366 * 86400 * 10),
)
MOST_SERVICES = 64
"""That a job may offer, and as many that it may reach."""
MOST_JOBS = 100_000_000
"""That one array may have."""
_MOST_NAMES, _MOST_COMMAND_BYTES = 100, 32_000
_PARAMETER = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,63}")
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]{0,127}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,99}")
_DATA = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}(@[0-9]{1,18})?")
PLATFORM = re.compile(r"(linux|windows|darwin)-[a-z0-9_]{2,20}")
_ON = re.compile(r"worker:[1-9][0-9]{0,17}|group:[a-z][a-z0-9_.-]{0,62}")
MOST_DATA_FILES = 100
"""That one job may have."""
MOST_DATA_BYTES = 4 * GIB - 2048
"""Of one, in a virtual machine: what ISO 9660 takes in one piece."""
_MOST_SHARES = 64
_MOST_KEYS, _LONGEST_KEY_BYTES = 20, 2048
_RESERVED_NAMES = ("localhost", "job", "attempt", "cpus", "socks", "services", "secrets")
"""What a machine's hosts file and its variables DESKGRID_... say already."""
_MOST_PATHS, _LONGEST_NAME, _LONGEST_PATH = 100, 200, 1000
_LARGEST_SHOWN = 1 << 60
"""As a size; JSON has numbers of thousands of digits, which are no float."""
_MOST_PATHS_BYTES = 20_000
"""All together: the worker hands them to a program as one argument, of which Linux takes 128 KiB (JSON may need six bytes for one)."""


def check_spec(spec: JobSpec, *, in_set: bool = False) -> None:
    """Check every value of a job against what is allowed. Raise InvalidInput naming the field and its bounds.

    In a set, services of other members may be reached.
    """
    for part, field, least, most in _BOUNDS:
        value = getattr(getattr(spec, part) if part else spec, field)
        if not least <= value <= most:  # nor is NaN between them
            raise InvalidInput(
                f"{_shown(field, value)} is out of bounds",
                where=f"{part}.{_label(field)}".lstrip("."),
                hint=_range(field, least, most),
            )
    if not spec.name or len(spec.name) > _LONGEST_NAME or not spec.name.isprintable():
        raise InvalidInput("a name has 1 to 200 printable characters", where="name")
    _check_machine(spec.machine)
    _check_command(spec)
    _check_network(spec.machine, in_set=in_set)
    _check_secrets(spec)
    _check_data(spec)
    if spec.pilot and all(reach.service != API_SERVICE for reach in spec.machine.reach):
        raise InvalidInput(
            "a pilot joins the grid, so it must reach it", where="pilot", hint=f'reach = {{ grid = "{API_SERVICE}" }}'
        )
    paths = spec.results.paths
    if (
        (not paths and spec.machine.kind is MachineKind.VM)
        or len(paths) > _MOST_PATHS
        or any(not path or len(path) > _LONGEST_PATH or "\0" in path for path in paths)
    ):
        raise InvalidInput("1 to 100 globs of at most 1000 characters", where="results.paths", hint='as in ["**"]')
    if sum(len(path.encode()) for path in paths) > _MOST_PATHS_BYTES:
        raise InvalidInput(f"more than {_MOST_PATHS_BYTES} bytes of globs", where="results.paths", hint="name folders, not files")


def check_array(count: int, names: tuple[str, ...], *, has_table: bool) -> None:
    """Check the size of an array and the names of its parameters. Raise InvalidInput."""
    if not 1 <= count <= MOST_JOBS:
        raise InvalidInput(f"an array of {count} jobs", where="array.count", hint=f"1 to {MOST_JOBS}")
    if bool(names) != has_table:
        raise InvalidInput("a table has names for its columns, and only a table has them", where="array.table")
    if len(names) > _MOST_NAMES or len(set(names)) < len(names):
        raise InvalidInput("the columns of a table have different names", where="array.table", hint=f"at most {_MOST_NAMES}")
    for name in names:
        if not _PARAMETER.fullmatch(name) or name == "index":
            raise InvalidInput(
                f"{name[:40]!r} is not a parameter's name",
                where="array.table",
                hint="a letter, then letters, digits and _; not index",
            )


def _check_machine(machine: Machine) -> None:
    if machine.kind is MachineKind.PROCESS:
        if machine.disk:
            raise InvalidInput("a process has no disk", where="machine.disk", hint='kind = "vm", or no disk')
    elif not machine.disk:
        raise InvalidInput("a disk is needed", where="machine.disk", hint="name, name@version or sha256")
    if machine.disk.startswith(INSTALLED) and (machine.kind is not MachineKind.VM or not _WORD.fullmatch(machine.installed_disk)):
        raise InvalidInput(f"{machine.disk[:60]!r} will not do", where="machine.disk", hint="installed:NAME, of a virtual machine")
    if machine.driver and machine.driver not in [name.value for name in DriverName]:
        allowed = ", ".join(name for name in DriverName if name is not DriverName.FAKE)
        raise InvalidInput(
            f"there is no driver {machine.driver[:40]!r}", where="machine.driver", hint=f"{allowed}, or none of them"
        )
    if machine.warm and machine.kind is not MachineKind.PROCESS:
        raise InvalidInput("only a process can be kept warm", where="machine.warm", hint='kind = "process"')
    for where, values, form, hint in (
        ("machine.platforms", machine.platforms, PLATFORM, "as in linux-x86_64"),
        ("machine.need", machine.need, _WORD, "letters, digits and _ . + - only"),
    ):
        if len(values) > _MOST_NAMES or any(not form.fullmatch(value) for value in values):
            raise InvalidInput(f"{', '.join(values)[:60]!r} will not do", where=where, hint=f"{hint}; at most {_MOST_NAMES}")
    if machine.on and not _ON.fullmatch(machine.on):
        raise InvalidInput(f"{machine.on[:40]!r} is neither a worker nor a group", where="machine.on", hint="worker:7 or group:hep")


def _check_warm(spec: JobSpec) -> None:
    """Check that all jobs of a warm program can be told in a line each."""
    if not spec.command:
        raise InvalidInput("a warm program is a command", where="command", hint='command = ["/app/program"]')
    if spec.results.paths:
        raise InvalidInput(
            "jobs of a warm program answer with a value, and bring no files", where="results.paths", hint="paths = []"
        )
    if spec.machine.network is not Network.NONE:
        raise InvalidInput("a warm program has no network", where="machine.network", hint='network = "none"')
    if spec.fill:
        raise InvalidInput("nothing is filled in for a warm program: it is told its parameters", where="fill")


def _check_command(spec: JobSpec) -> None:
    if spec.machine.warm:
        _check_warm(spec)
    if sum(len(part.encode()) for part in spec.command) > _MOST_COMMAND_BYTES or any("\0" in part for part in spec.command):
        raise InvalidInput("a command has no NUL", where="command", hint=f"and at most {_MOST_COMMAND_BYTES} bytes")
    if spec.command and not spec.command[0]:
        raise InvalidInput("a command begins with a program", where="command")
    for name, value in spec.environment:
        if (
            not _VARIABLE.fullmatch(name)
            or name.startswith("DESKGRID_")
            or "\0" in value
            or len(value.encode()) > _MOST_COMMAND_BYTES
        ):
            raise InvalidInput(
                f"{name[:40]!r} is not a variable",
                where="environment",
                hint=f"letters, digits and _, not DESKGRID_...; a value has at most {_MOST_COMMAND_BYTES} bytes",
            )
    if len(spec.environment) > _MOST_NAMES:
        raise InvalidInput(f"{len(spec.environment)} variables are too many", where="environment", hint=f"at most {_MOST_NAMES}")
    if len(spec.fill) > _MOST_PATHS:
        raise InvalidInput(f"{len(spec.fill)} files to fill in are too many", where="fill", hint=f"at most {_MOST_PATHS}")


def check_shares(shares: tuple[str, ...], where: str) -> None:
    """Check a list of those to share with. Raise InvalidInput."""
    if len(shares) > _MOST_SHARES:
        raise InvalidInput(f"{len(shares)} are too many to share with", where=where, hint=f"at most {_MOST_SHARES}; make a group")
    for share in shares:
        check_share(share, where)


def _check_network(machine: Machine, *, in_set: bool) -> None:
    """Check the services of a job. What comes over the wire need not have been written in a job file."""
    for offer in machine.offer:
        _require_as_read(offer, lambda one: parse_offer(str(one)), "machine.offer")
        if offer.name == CONSOLE:
            raise InvalidInput(
                f"{CONSOLE} is the machine's screen", where="machine.offer", hint="choose another name for the service"
            )
    for reach in machine.reach:
        _require_as_read(reach, lambda one: parse_reach(one.name, str(one)), "machine.reach")
        _check_reach(reach, in_set=in_set)
    _check_distinct((offer.name for offer in machine.offer), "two offers are called {}", "machine.offer")
    _check_distinct((offer.port for offer in machine.offer), "two offers are at port {}", "machine.offer")
    _check_distinct((reach.name for reach in machine.reach), "two services to reach are called {}", "machine.reach")
    for where, services in (("machine.offer", machine.offer), ("machine.reach", machine.reach)):
        if len(services) > MOST_SERVICES:
            raise InvalidInput(f"{len(services)} services are too many", where=where, hint=f"at most {MOST_SERVICES}")
        if services and machine.network is Network.NONE:
            raise InvalidInput("without a network there are no services", where=where, hint='network = "overlay"')
    check_shares(machine.share, "machine.share")
    if machine.share and not machine.offer:
        raise InvalidInput("there is nothing to share", where="machine.share", hint='offer = ["web:8080"]')
    _check_keys(machine.ssh_keys)


def _check_secrets(spec: JobSpec) -> None:
    where = "secrets.trust"
    check_names(spec.secrets)
    if len(spec.trust) > _MOST_SHARES:
        raise InvalidInput(f"{len(spec.trust)} are too many to trust", where=where, hint=f"at most {_MOST_SHARES}; make a group")
    for trusted in spec.trust:
        if not is_trust(trusted):
            raise InvalidInput(f"{trusted[:80]!r} is nobody to trust", where=where, hint="mine, group:NAME, user:NAME or everyone")
    if spec.secrets and not spec.trust:
        raise InvalidInput("whose PCs may see the secrets?", where=where, hint='as in ["mine"]')
    if spec.secrets and spec.machine.warm:
        raise InvalidInput("a program that is kept warm has no secrets", where="secrets.files", hint="warm = false")


def _check_data(spec: JobSpec) -> None:
    if len(spec.data) > MOST_DATA_FILES:
        raise InvalidInput(f"{len(spec.data)} files of data are too many", where="data", hint=f"at most {MOST_DATA_FILES}")
    for name, reference in spec.data:
        if not _WORD.fullmatch(name):
            raise InvalidInput(
                f"{name[:60]!r} is not the name of a file",
                where=f"data.{name}"[:_LONGEST_PATH],
                hint="1 to 100 letters, digits and _ . + -, the first a letter or digit",
            )
        if not _DATA.fullmatch(reference):
            raise InvalidInput(
                f"{reference[:60]!r} is no data", where=f"data.{name}", hint="name, name@version or sha256; nothing is filled in"
            )
    _check_distinct((name for name, _ in spec.data), "two files of data are called {}", "data")


def check_data_size(spec: JobSpec, files: Iterable[DataFile]) -> None:
    """Check that the machine can be given its data. Raise InvalidInput."""
    if spec.machine.kind is not MachineKind.VM:
        return
    files = list(files)
    if sum(file.blob.size_bytes for file in files) > 4 * MOST_DATA_BYTES:
        raise InvalidInput(
            "this is too much data for a virtual machine's context disk",
            where="data",
            hint=f"at most {format_size(4 * MOST_DATA_BYTES)}; a process sees it without a copy",
        )
    for file in files:
        if file.blob.size_bytes > MOST_DATA_BYTES:
            raise InvalidInput(
                f"{format_size(file.blob.size_bytes)} are too much for a virtual machine's context disk",
                where=f"data.{file.name}",
                hint=f"at most {format_size(MOST_DATA_BYTES)} in a file: split it, or run the job as a process",
            )


def _require_as_read(one: Offer | Reach, read: Callable[..., Offer | Reach], where: str) -> None:
    try:
        same = read(one) == one
    except InvalidInput as error:
        raise InvalidInput(error.message, where=where, hint=error.hint) from error
    if not same:
        raise InvalidInput(f"{str(one)[:100]!r} is not a service", where=where)


def _check_reach(reach: Reach, *, in_set: bool) -> None:
    if reach.service.member is not None and not in_set:
        raise InvalidInput(
            f"{reach.service} is of a set", where="machine.reach", hint="only jobs of the same set reach each other so"
        )
    if reach.service.service == CONSOLE and (reach.service.job_id is not None or reach.service.member is not None):
        raise InvalidInput("a job cannot reach the screen of a job", where="machine.reach", hint="deskgrid console job-N")
    if reach.name in _RESERVED_NAMES:
        raise InvalidInput(f"{reach.name} is taken", where="machine.reach", hint=f"any name but {', '.join(_RESERVED_NAMES)}")
    if not reach.service.is_of_peer and reach.service not in (API_SERVICE, CACHE_SERVICE):
        raise InvalidInput(f"there is no {reach.service}", where="machine.reach", hint=f"only {API_SERVICE} and {CACHE_SERVICE}")


def _check_distinct(values: Iterable[object], message: str, where: str) -> None:
    seen = set()
    for value in values:
        if value in seen:
            raise InvalidInput(message.format(value), where=where)
        seen.add(value)


def _check_keys(keys: tuple[str, ...]) -> None:
    if len(keys) > _MOST_KEYS or any(not key.isprintable() or len(key.encode()) > _LONGEST_KEY_BYTES or not key for key in keys):
        raise InvalidInput(
            f"at most {_MOST_KEYS} lines as in authorized_keys, of at most {_LONGEST_KEY_BYTES} bytes", where="machine.ssh_keys"
        )


def _label(field: str) -> str:
    return field.removesuffix("_bytes").removesuffix("_s")


def _shown(field: str, value: float) -> str:
    return format_size(value) if field.endswith("_bytes") and 0 < value < _LARGEST_SHOWN else str(value)[:40]


def _range(field: str, least: float, most: float) -> str:
    unit = " seconds" if field.endswith("_s") else ""
    return f"{_shown(field, least)} to {_shown(field, most)}{unit}"
