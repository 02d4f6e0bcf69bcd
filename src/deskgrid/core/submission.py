"""What a job may ask for, whoever asks."""

from __future__ import annotations

import math

from deskgrid.errors import InvalidInput
from deskgrid.model.jobs import JobSpec
from deskgrid.model.machines import Network
from deskgrid.units import GIB, MIB, format_size

__all__ = ["check_spec"]

_BOUNDS: tuple[tuple[str, str, float, float], ...] = (
    ("machine", "scratch_bytes", 16 * MIB, 16 * 1024 * GIB),
    ("machine", "memory_bytes", 32 * MIB, 4 * 1024 * GIB),
    ("machine", "cpus", 1, 1024),
    ("limits", "wall_time_s", 1, 366 * 86400),
    ("limits", "boot_time_s", 1, 86400),
    ("limits", "attempts", 1, 100),
    ("limits", "max_lost", 1, 1000),
    ("limits", "max_suspend_s", 1, 366 * 86400),
)
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
    if spec.machine.network is not Network.NONE:
        raise InvalidInput(f"network {spec.machine.network.value!r} is not offered yet", where="machine.network", hint='"none"')
    paths = spec.results.paths
    if not paths or len(paths) > _MOST_PATHS or any(not path or len(path) > _LONGEST_PATH or "\0" in path for path in paths):
        raise InvalidInput("1 to 100 globs of at most 1000 characters", where="results.paths", hint='as in ["**"]')
    if sum(len(path.encode()) for path in paths) > _MOST_PATHS_BYTES:
        raise InvalidInput(f"more than {_MOST_PATHS_BYTES} bytes of globs", where="results.paths", hint="name folders, not files")


def _label(field: str) -> str:
    return field.removesuffix("_bytes").removesuffix("_s")


def _shown(field: str, value: float) -> str:
    return format_size(value) if field.endswith("_bytes") and math.isfinite(value) and value > 0 else str(value)


def _range(field: str, least: float, most: float) -> str:
    unit = " seconds" if field.endswith("_s") else ""
    return f"{_shown(field, least)} to {_shown(field, most)}{unit}"
