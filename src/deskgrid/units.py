"""Sizes and durations as people write them: "8GiB", "10m"."""

from __future__ import annotations

import re

from deskgrid.errors import InvalidInput

__all__ = ["GIB", "KIB", "MIB", "format_duration", "format_size", "parse_duration", "parse_size"]

KIB, MIB, GIB = 1 << 10, 1 << 20, 1 << 30

_SIZE_UNITS = {
    "B": 1,
    "KiB": KIB,
    "MiB": MIB,
    "GiB": GIB,
    "TiB": 1 << 40,
    "kB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "TB": 10**12,
}
_DURATION_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([A-Za-z]+)")
_DURATION = re.compile(r"(?:\d+(?:\.\d+)?[smhd])+")


def parse_size(text: str) -> int:
    """Return the bytes of a size such as "8GiB" or "1.5 GB". Raise InvalidInput otherwise."""
    match = _SIZE.fullmatch(text.strip())
    if match is None or match[2] not in _SIZE_UNITS:
        raise InvalidInput(f"{text!r} is not a size", hint=f"a number and one of {', '.join(_SIZE_UNITS)}, as in 8GiB")
    size = float(match[1]) * _SIZE_UNITS[match[2]]
    if size >= 1 << 63:
        raise InvalidInput(f"{text[:40]!r} is too large for a size")
    return int(size)


def parse_duration(text: str) -> float:
    """Return the seconds of a duration such as "10m" or "1h30m". Raise InvalidInput otherwise."""
    if not _DURATION.fullmatch(text.strip()):
        raise InvalidInput(f"{text!r} is not a duration", hint="numbers with s, m, h or d, as in 10m or 1h30m")
    return sum(float(number) * _DURATION_UNITS[unit] for number, unit in re.findall(r"(\d+(?:\.\d+)?)([smhd])", text))


def format_size(size_bytes: float) -> str:
    """Show bytes with a binary unit and three digits: 1.50GiB."""
    for unit, factor in (("TiB", 1 << 40), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if size_bytes >= factor:
            return f"{size_bytes / factor:.3g}{unit}"
    return f"{int(size_bytes)}B"


def format_duration(seconds: float) -> str:
    """Show seconds in at most two units: 1h30m, 12s, 0.4s."""
    if seconds < 10:
        return f"{seconds:.1f}s"
    whole = round(seconds)
    parts = []
    for unit, factor in (("d", 86400), ("h", 3600), ("m", 60), ("s", 1)):
        if whole >= factor:
            parts.append(f"{whole // factor}{unit}")
            whole %= factor
    return "".join(parts[:2])
