"""What this PC can run for the grid and why not, in words for its owner: everything is tried anew, whatever the settings allow."""

from __future__ import annotations

import asyncio
import math
import shutil
from enum import StrEnum
from pathlib import Path

from msgspec import Struct

from deskgrid.clock import Clock
from deskgrid.core.owner import Presence
from deskgrid.model.machines import DriverName, Fingerprint, MachineKind, Network
from deskgrid.settings import WorkerSettings
from deskgrid.units import format_duration, format_size
from deskgrid.worker.drivers import make_driver
from deskgrid.worker.owner import rules_of
from deskgrid.worker.presence import Sight, make_desktop
from deskgrid.worker.probe import lent_by

__all__ = ["Finding", "State", "examine"]

_KINDS = {MachineKind.VM: "virtual machines", MachineKind.PROCESS: "programs in a sandbox", MachineKind.CONTAINER: "containers"}
_DRIVERS = tuple(name for name in DriverName if name is not DriverName.FAKE)
_SOFTWARE = "tcg"


class State(StrEnum):
    """How something is."""

    OK = "ok"
    LIMITED = "limited"
    """It works, but not as well as it could."""
    NO = "no"
    OFF = "off"
    """It would work, and the owner's settings do not use it."""


class Finding(Struct, frozen=True):
    """One thing that was looked at."""

    subject: str
    state: State
    words: str

    def __str__(self) -> str:
        """Show it to people."""
        return f"{self.state.value:8}{self.subject}: {self.words}"


async def examine(home: Path, settings: WorkerSettings, clock: Clock) -> list[Finding]:
    """Try everything out. Takes 10 s on most PCs and two minutes at most. Raise InvalidInput for settings that make no sense."""
    place = home / "probes"
    place.mkdir(parents=True, exist_ok=True, mode=0o700)
    drivers = [make_driver(name, settings, clock, probes=place) for name in _DRIVERS]
    found = await asyncio.gather(*(driver.fingerprint() for driver in drivers))
    return [
        *(_of_driver(one, settings) for one in found),
        _of_network(found, settings),
        *_of_bounds(home, settings),
        *await _of_owner(settings, clock),
    ]


def _of_driver(found: Fingerprint, settings: WorkerSettings) -> Finding:
    subject = f"{' and '.join(_KINDS[kind] for kind in found.kinds)} ({found.driver})"
    if not found.usable:
        return Finding(subject, State.NO, found.reason)
    words = " ".join(word for word in (found.version, found.accelerator) if word) or "works"
    words = f"{words}; {found.reason}" if found.reason else words
    if found.driver not in settings.drivers:
        allowed = ", ".join(f'"{name}"' for name in (*settings.drivers, found.driver.value))
        return Finding(subject, State.OFF, f"{words}; to allow it: drivers = [{allowed}] in worker.toml")
    limited = found.accelerator == _SOFTWARE or found.reason
    return Finding(subject, State.LIMITED if limited else State.OK, words)


def _of_network(found: list[Fingerprint], settings: WorkerSettings) -> Finding:
    subject = "services of jobs over the network"
    if not settings.overlay:
        return Finding(subject, State.OFF, "to allow it: overlay = true in worker.toml")
    usable = [one for one in found if one.usable]
    if any(Network.OVERLAY in one.networks for one in usable):
        return Finding(subject, State.OK, "machines can be confined to the services of their job")
    return Finding(subject, State.NO, next((one.reason for one in usable if one.reason), "no driver is usable"))


def _of_bounds(home: Path, settings: WorkerSettings) -> list[Finding]:
    lent, free = lent_by(settings), shutil.disk_usage(home).free
    wanted = lent.disk_bytes + settings.cache_bytes + settings.reserve_bytes
    bounds = f"{lent.cpus} CPUs, {format_size(lent.memory_bytes)} memory, {format_size(lent.disk_bytes)} disk"
    cache = f"{format_size(settings.cache_bytes)} for disks that are kept"
    if free < wanted:
        short = f"{format_size(free)} are free, so less than that; {format_size(settings.reserve_bytes)} always stay free"
        return [Finding("lent", State.LIMITED, f"{bounds}, {cache}; on the disk {short}")]
    return [Finding("lent", State.OK, f"{bounds}, {cache}")]


async def _of_owner(settings: WorkerSettings, clock: Clock) -> list[Finding]:
    rules = rules_of(settings)
    desktop = make_desktop()
    try:
        told = await desktop.look()
    finally:
        await desktop.close()
    findings = []
    if told is None:
        words = "cannot be seen: this PC has a screen, and neither its desktop nor the login service can be asked"
        state = State.NO if rules.idle_s else State.LIMITED
        findings.append(Finding("keyboard and mouse", state, words + ("; so it never works (idle_s)" if rules.idle_s else "")))
    else:
        idle_s = min(told.idle_s if told.idle_s is not None else math.inf, *told.others_idle_s, math.inf)
        words = "nobody is at a screen" if math.isinf(idle_s) else f"used {format_duration(idle_s)} ago"
        findings.append(Finding("keyboard and mouse", State.OK, words))
    sight = Sight(rules, clock)
    try:
        objection = Presence(rules).why_not(await sight.look(), now=clock.monotonic())
    finally:
        await sight.close()
    findings.append(Finding("now", State.OFF if objection else State.OK, objection or "it may work"))
    return findings
