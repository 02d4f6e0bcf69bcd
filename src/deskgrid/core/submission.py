"""What a job may ask for, whoever asks."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from deskgrid.core.reach import check_share
from deskgrid.errors import InvalidInput
from deskgrid.model.jobs import JobSpec, Machine
from deskgrid.model.machines import Network
from deskgrid.model.overlay import API_SERVICE, Offer, Reach, parse_offer, parse_reach
from deskgrid.units import GIB, MIB, format_size

__all__ = ["MOST_SERVICES", "check_shares", "check_spec"]

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
)
MOST_SERVICES = 64
"""That a job may offer, and as many that it may reach."""
_MOST_SHARES = 64
_MOST_KEYS, _LONGEST_KEY_BYTES = 20, 2048
_RESERVED_NAMES = ("localhost", "job", "attempt", "cpus", "socks", "services")
"""What a machine's hosts file and its variables DESKGRID_... say already."""
_MOST_PATHS, _LONGEST_NAME, _LONGEST_PATH = 100, 200, 1000
_MOST_PATHS_BYTES = 20_000
"""All together: the worker hands them to a program as one argument, of which Linux takes 128 KiB (JSON may need six bytes for one)."""


def check_spec(spec: JobSpec) -> None:
    """Check every value of a job against what is allowed. Raise InvalidInput naming the field and its bounds."""
    for part, field, least, most in _BOUNDS:
        value = getattr(getattr(spec, part), field)
        if not math.isfinite(value) or not least <= value <= most:
            raise InvalidInput(
                f"{_shown(field, value)} is out of bounds", where=f"{part}.{_label(field)}", hint=_range(field, least, most)
            )
    if not spec.name or len(spec.name) > _LONGEST_NAME or not spec.name.isprintable():
        raise InvalidInput("a name has 1 to 200 printable characters", where="name")
    if not spec.machine.disk:
        raise InvalidInput("a disk is needed", where="machine.disk", hint="name, name@version or sha256")
    _check_network(spec.machine)
    paths = spec.results.paths
    if not paths or len(paths) > _MOST_PATHS or any(not path or len(path) > _LONGEST_PATH or "\0" in path for path in paths):
        raise InvalidInput("1 to 100 globs of at most 1000 characters", where="results.paths", hint='as in ["**"]')
    if sum(len(path.encode()) for path in paths) > _MOST_PATHS_BYTES:
        raise InvalidInput(f"more than {_MOST_PATHS_BYTES} bytes of globs", where="results.paths", hint="name folders, not files")


def check_shares(shares: tuple[str, ...], where: str) -> None:
    """Check a list of those to share with. Raise InvalidInput."""
    if len(shares) > _MOST_SHARES:
        raise InvalidInput(f"{len(shares)} are too many to share with", where=where, hint=f"at most {_MOST_SHARES}; make a group")
    for share in shares:
        check_share(share, where)


def _check_network(machine: Machine) -> None:
    """Check the services of a job. What comes over the wire need not have been written in a job file."""
    for offer in machine.offer:
        _require_as_read(offer, lambda one: parse_offer(str(one)), "machine.offer")
    for reach in machine.reach:
        _require_as_read(reach, lambda one: parse_reach(one.name, str(one)), "machine.reach")
        _check_reach(reach)
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


def _require_as_read(one: Offer | Reach, read: Callable[..., Offer | Reach], where: str) -> None:
    try:
        same = read(one) == one
    except InvalidInput as error:
        raise InvalidInput(error.message, where=where, hint=error.hint) from error
    if not same:
        raise InvalidInput(f"{str(one)[:100]!r} is not a service", where=where)


def _check_reach(reach: Reach) -> None:
    if reach.name in _RESERVED_NAMES:
        raise InvalidInput(f"{reach.name} is taken", where="machine.reach", hint=f"any name but {', '.join(_RESERVED_NAMES)}")
    if reach.service.peer == API_SERVICE.peer and reach.service != API_SERVICE:
        raise InvalidInput(f"the server has no service {reach.service.service}", where="machine.reach", hint=f"only {API_SERVICE}")


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
    return format_size(value) if field.endswith("_bytes") and math.isfinite(value) and value > 0 else str(value)


def _range(field: str, least: float, most: float) -> str:
    unit = " seconds" if field.endswith("_s") else ""
    return f"{_shown(field, least)} to {_shown(field, most)}{unit}"
