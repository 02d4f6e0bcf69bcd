"""Names and bounds of a job's secrets: what programs must know that seal nothing (sealing.py loads much)."""

from __future__ import annotations

import re
from collections.abc import Collection

from deskgrid.errors import InvalidInput

__all__ = ["MOST_SECRETS", "MOST_SECRET_BYTES", "check_names"]

MOST_SECRETS, MOST_SECRET_BYTES = 100, 64 << 10
"""Of one job, all together."""
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}")


def check_names(names: Collection[str], where: str = "secrets.files") -> None:
    """Check the names of a job's secrets. Raise InvalidInput."""
    if len(names) > MOST_SECRETS:
        raise InvalidInput(f"{len(names)} secrets are too many", where=where, hint=f"at most {MOST_SECRETS}")
    for name in names:
        if not _NAME.fullmatch(name):
            raise InvalidInput(
                f"{name[:40]!r} is not a name for a secret",
                where=where,
                hint="letters, digits and _ . -, at most 100, the first no sign",
            )
    if len(set(names)) < len(names):
        raise InvalidInput("two secrets have the same name", where=where)
