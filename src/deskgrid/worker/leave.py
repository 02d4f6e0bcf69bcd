"""The end of a worker on this PC: machines destroyed, files removed; also what can be told and done while it does not run."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterable
from pathlib import Path

import structlog

from deskgrid.client.transport import Transport, load_credentials
from deskgrid.clock import SystemClock
from deskgrid.errors import DeskgridError, InvalidInput, PeerError, Unauthenticated
from deskgrid.machines.driver import MachineHandle
from deskgrid.machines.folders import wipe
from deskgrid.model import wire
from deskgrid.settings import WorkerSettings, load_settings
from deskgrid.worker.connection import Connection
from deskgrid.worker.control import AttemptStatus, StatusAnswer
from deskgrid.worker.drivers import Drivers, make_driver
from deskgrid.worker.home import MACHINE, Home, remove, remove_attempt
from deskgrid.worker.journal import Entry, Journal
from deskgrid.worker.tasks import in_thread

__all__ = ["destroy_strays", "leave_home", "remove_files", "say_goodbye", "status_of_home"]

_log = structlog.get_logger()


async def leave_home(home: Home) -> StatusAnswer:
    """Leave the grid with the worker of a folder, which does not run. Raise InvalidInput if it has not joined one."""
    credentials = load_credentials(home.credentials)
    settings = load_settings(WorkerSettings, home.folder / "worker.toml", "DESKGRID_WORKER")
    home.create()
    drivers = Drivers((), lambda name: make_driver(name, settings, SystemClock()))
    journal = Journal(home.journal)
    await destroy_journalled(journal.read(), drivers)
    for handle in journal.machines().values():
        await destroy_one(handle, drivers)
    await destroy_strays(home, drivers, known=())
    async with Transport(credentials, rng=random.Random()) as connection:  # noqa: S311 - jitter
        told = await say_goodbye(connection)
    remove_files(home)
    return StatusAnswer(running=False, name="", address=credentials.address, paused=False, message=told)


async def destroy_journalled(entries: Iterable[Entry], drivers: Drivers) -> None:
    """Destroy the machines of journal entries."""
    for entry in entries:
        if entry.handle is not None:
            await destroy_one(entry.handle, drivers)


async def destroy_one(handle: MachineHandle, drivers: Drivers) -> None:
    """Destroy a machine, or say in the log that it cannot be done."""
    try:
        await drivers.of(handle).destroy(handle)
    except DeskgridError as error:
        _log.error("machine_not_removed", name=handle.spec.name, error=str(error))


async def destroy_strays(home: Home, drivers: Drivers, *, known: Iterable[Path]) -> None:
    """Remove the folders below attempts/ that no journal entry names, with whatever machine is still in them."""
    known = set(known)
    for folder in sorted(home.attempts.iterdir()):
        if folder in known:
            continue
        _log.warning("stray_attempt_removed", folder=folder.name)
        try:
            if folder.is_dir():
                await drivers.destroy_unknown(folder / MACHINE)
            await in_thread(remove_attempt, folder)
        except (DeskgridError, OSError) as error:
            _log.error("stray_attempt_not_removed", folder=folder.name, error=str(error))


async def say_goodbye(connection: Connection) -> str:
    """Tell the server that we leave; return what has come of it, in words. Never raises."""
    try:
        await connection.call(wire.LEAVE, wire.Nothing())
    except Unauthenticated:
        return "left; the server did not know this worker any more"
    except (PeerError, DeskgridError) as error:
        return f"left, but the server was not told and will find out by itself: {error}"
    return "left the grid"


def remove_files(home: Home) -> None:
    """Remove all that a worker has on this PC but its settings, after its machines."""
    files = (home.credentials, home.paused, home.control, home.journal, home.attempts, home.cache, home.probes)
    for path, take in ((home.secrets_key, wipe), *((file, remove) for file in files)):
        try:
            take(path)
        except OSError as error:
            _log.error("files_not_removed", path=str(path), error=str(error))


def status_of_home(home: Home, message: str = "") -> StatusAnswer:
    """Return what is on the disk about the worker of a folder, which does not run."""
    name = address = ""
    with contextlib.suppress(InvalidInput):
        credentials = load_credentials(home.credentials)
        name, address = credentials.name, credentials.address
    disks = [path for path in home.cache.iterdir() if path.is_file()] if home.cache.is_dir() else []
    entries = Journal(home.journal).read() if home.journal.is_dir() else []
    return StatusAnswer(
        running=False,
        name=name,
        address=address,
        paused=home.paused.exists(),
        message=message,
        attempts=tuple(attempt_status(entry) for entry in entries),
        cached=len(disks),
        cache_bytes=sum(path.stat().st_size for path in disks),
    )


def attempt_status(entry: Entry) -> AttemptStatus:
    """Return what the journal says of an attempt."""
    assignment = entry.assignment
    return AttemptStatus(
        attempt_id=assignment.attempt_id,
        job_id=assignment.job_id,
        number=assignment.number,
        name=assignment.spec.name,
        phase=entry.phase.value,
        state=entry.report.state.value if entry.report else "",
        started_at=entry.started_at,
        ran_s=entry.ran_s,
        cpus=assignment.spec.machine.cpus,
        memory_bytes=assignment.spec.machine.memory_bytes,
        disk_bytes=0,
    )
