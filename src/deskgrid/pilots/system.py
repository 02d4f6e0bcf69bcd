"""What a system is to the factory: a place that takes pilots, tells which are gone, and lets them be called back."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from deskgrid.core import pilots

__all__ = ["Order", "System", "pilot_script"]


class Order(Struct, frozen=True, kw_only=True):
    """One pilot that is to be sent."""

    name: str
    link: str
    """By which it joins, once."""
    lifetime_s: float
    idle_s: float


class System(Protocol):
    """A place for pilots."""

    plan: pilots.System
    lifetime_s: float
    idle_s: float
    uses_links: bool
    """Whether an order needs a link."""

    async def send(self, order: Order) -> str:
        """Send a pilot; return by what name the system knows it. Raise DeskgridError if it refuses."""
        ...

    async def gone(self, references: Sequence[str]) -> set[str]:
        """Return which of these the system has no more. Raise DeskgridError if it does not answer."""
        ...

    async def call_back(self, reference: str) -> None:
        """Let a pilot be no more. One that is gone already is no error."""
        ...


def pilot_script(order: Order, *, command: str, settings: Mapping[str, object], setup: str) -> str:
    """Return the shell script that is a pilot on another system: it joins, works, and leaves nothing.

    `command` is how deskgrid is called there, `setup` lines of shell before. The link is in the script and nowhere else: no argument, no variable.
    """
    variables = {f"DESKGRID_WORKER_{name.upper()}": _shown(value) for name, value in settings.items()}
    run = [
        "worker",
        "run",
        "--once",
        "--name",
        order.name,
        "--lifetime",
        f"{order.lifetime_s:.0f}s",
        "--idle",
        f"{order.idle_s:.0f}s",
    ]
    return "\n".join(
        [
            "#!/bin/sh",
            "umask 077",
            "place=$(mktemp -d) || exit 1",
            "worker=",
            "trap 'rm -rf \"$place\"' EXIT",
            'trap \'test -z "$worker" || kill -TERM "$worker"\' TERM INT HUP',
            "cat >\"$place/link\" <<'LINK'",
            order.link,
            "LINK",
            *([setup] if setup else []),
            *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
            f'{command} {shlex.join(run)} --join "$place/link" --home "$place/home" &',
            "worker=$!",
            'while kill -0 "$worker" 2>/dev/null; do wait "$worker"; done',
            "",
        ]
    )


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
