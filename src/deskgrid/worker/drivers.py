"""The drivers of this PC: which there are, what they found out, which one takes a job."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import structlog

from deskgrid.clock import Clock
from deskgrid.core.matching import runs
from deskgrid.errors import DriverUnusable, InvalidInput
from deskgrid.machines.container import ContainerDriver
from deskgrid.machines.driver import Driver, MachineHandle, MachineSpec
from deskgrid.machines.fake import FakeDriver
from deskgrid.machines.process import SandboxDriver
from deskgrid.machines.qemu import QemuDriver
from deskgrid.machines.virtualbox import VirtualBoxDriver
from deskgrid.model.jobs import Machine
from deskgrid.model.machines import DriverName, Fingerprint, MachineKind
from deskgrid.settings import WorkerSettings
from deskgrid.worker.known import Known

__all__ = ["Drivers", "make_driver", "make_drivers"]

_log = structlog.get_logger()

_SOFTWARE = "tcg"


def make_driver(name: str, settings: WorkerSettings, clock: Clock, *, probes: Path | None = None) -> Driver:
    """Return a driver by its name, whose probes have their folders below `probes`. Raise InvalidInput for a name that is none."""
    lent: dict[str, Any] = {
        "nice": settings.nice,
        "overlay": settings.overlay,
        "internet": settings.internet,
        "probes": probes,
    }
    makers: dict[str, Callable[[], Driver]] = {
        DriverName.QEMU: lambda: QemuDriver(clock, accelerator=settings.accelerator or None, **lent),
        DriverName.VIRTUALBOX: lambda: VirtualBoxDriver(clock, **lent),
        DriverName.PROCESS: lambda: SandboxDriver(clock, unsandboxed=settings.unsandboxed, **lent),
        DriverName.CONTAINER: lambda: ContainerDriver(clock, **lent),
        DriverName.FAKE: lambda: FakeDriver(clock, **lent),
    }
    if name not in makers:
        raise InvalidInput(f"there is no driver {name!r}", where="drivers", hint=f"allowed: {', '.join(makers)}")
    return makers[name]()


def make_drivers(settings: WorkerSettings, clock: Clock, *, probes: Path | None = None) -> list[Driver]:
    """Return the drivers that the owner allows. Raise InvalidInput for a name that is none."""
    return [make_driver(name, settings, clock, probes=probes) for name in settings.drivers]


class Drivers:
    """Drivers with their fingerprints: none that takes a job until `probe` has returned.

    `spare` makes a driver by its name, for machines whose driver the owner has taken away since they were made.
    """

    def __init__(self, drivers: Iterable[Driver], spare: Callable[[str], Driver]) -> None:
        self._drivers = list(drivers)
        self._spare = spare
        self._probed: list[tuple[Fingerprint, Driver]] = []

    @property
    def fingerprints(self) -> tuple[Fingerprint, ...]:
        """What the drivers found out about this PC."""
        return tuple(fingerprint for fingerprint, _ in self._probed)

    async def probe(self, known: Known | None = None) -> None:
        """Let all drivers find out at the same time what they can do here; what is `known` is not tried again."""
        found = await asyncio.gather(*(known.ask(driver) if known else driver.fingerprint() for driver in self._drivers))
        self._probed = list(zip(found, self._drivers, strict=True))
        for fingerprint in found:
            _log.info(
                "driver",
                driver=fingerprint.driver.value,
                usable=fingerprint.usable,
                accelerator=fingerprint.accelerator,
                version=fingerprint.version,
                reason=fingerprint.reason,
            )

    def choose(self, machine: Machine) -> Driver:
        """Return the best driver that can run a machine. Raise DriverUnusable if none can.

        The best is one with the CPU's own virtualisation: QEMU's before VirtualBox's, and that before QEMU in software.
        """
        for fingerprint, driver in sorted(self._probed, key=lambda probed: probed[0].accelerator == _SOFTWARE):
            if runs(fingerprint, machine.kind, machine.network, machine.driver):
                return driver
        reasons = "; ".join(fingerprint.reason for fingerprint in self.fingerprints if fingerprint.reason)
        by = f" by {machine.driver}" if machine.driver else ""
        raise DriverUnusable(f"no driver of this PC runs a {machine.kind}{by} with network {machine.network}", hint=reasons)

    def of(self, handle: MachineHandle) -> Driver:
        """Return the driver that made a machine. Raise DriverUnusable if there is no such driver any more."""
        for fingerprint, driver in self._probed:
            if fingerprint.driver == handle.driver:
                return driver
        try:
            return self._spare(handle.driver)
        except InvalidInput as error:
            raise DriverUnusable(error.message) from error

    async def destroy_unknown(self, workdir: Path) -> None:
        """Remove a machine of which only the folder is known, whatever driver made it."""
        # A token that nothing has: the machine is then found by what its folder says, and by nothing else.
        spec = MachineSpec(name="unknown", kind=MachineKind.VM, memory_bytes=0, cpus=0, scratch_bytes=0)
        names = [fingerprint.driver for fingerprint in self.fingerprints] or list(DriverName)
        for name in names:
            handle = MachineHandle(name.value, str(workdir), spec, secrets.token_hex(16))
            await self.of(handle).destroy(handle)
