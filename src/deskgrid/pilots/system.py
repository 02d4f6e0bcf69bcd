"""What a system is to the factory: a place that takes pilots, tells which are gone, and lets them be called back."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Protocol

from msgspec import Struct

from deskgrid.core import pilots
from deskgrid.core.pilots import Sent
from deskgrid.errors import OperatorError

__all__ = ["GIVING_BACK_S", "NoAnswer", "Order", "System", "pilot_script", "worker_settings"]

GIVING_BACK_S = 300.0
"""By so much is a pilot's time longer than its life, on the system and in the grid: then it gives back what it has."""


class NoAnswer(OperatorError):
    """A system did not say whether it took a pilot: perhaps it did."""


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
    idle_s: float
    uses_links: bool
    """Whether an order needs a link."""

    async def send(self, order: Order) -> str:
        """Send a pilot; return by what name the system knows it. Raise NoAnswer if it is not known whether it took it, another DeskgridError if it did not."""
        ...

    async def gone(self, pilots: Sequence[Sent]) -> set[str]:
        """Return the names of those that the system has no more, as far as it tells. Raise DeskgridError if it does not answer."""
        ...

    async def call_back(self, pilot: Sent) -> None:
        """Let a pilot be no more. One that is gone already is no error. Raise DeskgridError if the system does not answer."""
        ...


def worker_settings(plan: pilots.System, further: Mapping[str, object]) -> dict[str, object]:
    """Return the settings of the worker in a pilot on another system; `further` are the user's, and come first."""
    return {
        "drivers": "process",
        "overlay": False,
        "cpus": plan.cpus,
        "memory_bytes": plan.memory_bytes,
        "packages": sorted(plan.packages),
        **further,
    }


def pilot_script(order: Order, *, command: str, settings: Mapping[str, object], setup: str) -> str:
    """Return the shell script that is a pilot on another system: it joins, works, and leaves nothing. Told to end, by TERM, it gives its jobs back.

    `command` is how deskgrid is called there, `setup` lines of shell before. The link is in the script and nowhere else: no argument, no variable.
    """
    variables = {f"DESKGRID_WORKER_{name.upper()}": _shown(value) for name, value in settings.items()}
    run = ["worker", "run", "--once", "--name", order.name]
    run += ["--lifetime", f"{order.lifetime_s:.0f}s", "--idle", f"{order.idle_s:.0f}s"]
    return "\n".join(
        [
            "#!/bin/sh",
            "{ # read as a whole: of a script that was cut off on its way nothing runs",
            "umask 077",
            "place= worker= ended=",
            'trap \'test -z "$place" || rm -rf "$place"\' EXIT',
            'trap \'ended=1; test -z "$worker" || kill -TERM "$worker"\' TERM INT HUP',
            "place=$(mktemp -d) || exit 1",
            "cat >\"$place/link\" <<'LINK'",
            order.link,
            "LINK",
            'export DESKGRID_PROGRAM_HOME="$place"',  # if deskgrid is one file there
            *([setup] if setup else []),
            *(f"export {name}={shlex.quote(value)}" for name, value in variables.items()),
            'test -z "$ended" || exit 1',
            f'{command} {shlex.join(run)} --join "$place/link" --home "$place/home" &',
            "worker=$!",
            'test -z "$ended" || kill -TERM "$worker"',
            'while kill -0 "$worker" 2>/dev/null; do wait "$worker"; done',
            "exit",
            "}",
            "",
        ]
    )


def _shown(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return ",".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)
