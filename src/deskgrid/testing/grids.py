"""A real server inside a test's process: real TLS, real store, real repository, on a free loopback port."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import uvicorn

from deskgrid.client.grid import Grid, describe_file, join, join_hub, login
from deskgrid.client.transport import Credentials, Transport
from deskgrid.clock import Clock, SystemClock
from deskgrid.link import Link
from deskgrid.model import wire
from deskgrid.model.data import DataKind, Disk
from deskgrid.model.jobs import AttemptState, Job, JobSpec, Machine
from deskgrid.model.machines import DiskFormat, DriverName, Fingerprint, MachineKind, Network
from deskgrid.model.workers import Assignment, AttemptReport, Capacity, Profile
from deskgrid.server.app import make_app
from deskgrid.server.authority import ensure_certificate
from deskgrid.server.routes.handler import Services
from deskgrid.server.setup import (
    hub_address,
    init_server,
    listen,
    listen_hub,
    make_hub_link,
    make_join_link,
    make_login_link,
    open_services,
    running_hub,
    server_config,
)
from deskgrid.settings import ServerSettings
from deskgrid.testing.databases import make_empty_database
from deskgrid.units import GIB

__all__ = ["PlayedJob", "TestGrid", "play_job", "played_sync", "running_grid"]


class TestGrid:
    """A running server with ways in."""

    __test__ = False  # not a test class, whatever its name

    def __init__(self, home: Path, settings: ServerSettings, services: Services) -> None:
        self.home = home
        self.settings = settings
        self.services = services

    async def admin(self) -> Credentials:
        """Return credentials of the admin."""
        return await self.user("admin")

    async def user(self, name: str) -> Credentials:
        """Return new credentials of a user that exists."""
        return await login(await make_login_link(self.home, self.settings, name), "test")

    async def worker(self, name: str = "pc") -> Credentials:
        """Return credentials of a new worker."""
        return await join(await self.join_link(), name)

    async def hub(self, name: str = "hub") -> Credentials:
        """Return credentials of a new hub."""
        return await join_hub(await make_hub_link(self.home, self.settings), name)

    async def join_link(self) -> Link:
        """Return a link for one worker."""
        return await make_join_link(self.home, self.settings)


class PlayedJob:
    """A job that a worker, played by hand, holds. Its machine needs no disk that boots."""

    def __init__(self, job: Job, worker: Transport, assignment: Assignment) -> None:
        self.id = job.id
        self.owner = job.owner
        self.worker = worker
        self.assignment = assignment

    async def report(self, state: AttemptState) -> wire.SyncAnswer:
        """Say how the attempt stands."""
        return await self.worker.call(wire.SYNC, played_sync(AttemptReport(attempt_id=self.assignment.attempt_id, state=state)))


def played_sync(*reports: AttemptReport, room: bool = False, networks: tuple[Network, ...] = tuple(Network)) -> wire.Sync:
    """Return what a worker says that holds these attempts and, with `room`, wants more."""
    driver = Fingerprint(driver=DriverName.FAKE, kinds=(MachineKind.VM,), usable=True, networks=networks)
    lent = Capacity(cpus=64, memory_bytes=64 * GIB, disk_bytes=640 * GIB)
    none = Capacity(cpus=0, memory_bytes=0, disk_bytes=0)
    profile = Profile(os="linux", arch="x86_64", drivers=(driver,), lent=lent, version="test")
    return wire.Sync(profile=profile, paused=False, attempts=reports, free=lent if room else none, cached=())


async def play_job(user: Credentials, worker: Transport, **machine: Any) -> PlayedJob:
    """Submit a job with these values of its machine, and lease it to `worker`, which must hold nothing else."""
    async with Grid(user) as grid:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "played"
            file.write_bytes(b"disk")
            blob = describe_file(file)
            disk = Disk(sha256=blob.sha256, size_bytes=4, virtual_bytes=4, format=DiskFormat.ISO)
            await grid.put(file, "played", kind=DataKind.DISK, disk=disk)
        job = await grid.submit(JobSpec(machine=Machine(disk="played", **machine)))
    [assignment] = (await worker.call(wire.SYNC, played_sync(room=True))).assignments
    return PlayedJob(job, worker, assignment)


@contextlib.asynccontextmanager
async def running_grid(
    home: Path, settings: ServerSettings | None = None, clock: Clock | None = None, *, hub: bool = False
) -> AsyncIterator[TestGrid]:
    """Run a server, with a hub if asked for, in this event loop until the block ends. Its lease sweep is left to the test."""
    chosen = settings or ServerSettings(listen="127.0.0.1:0", reserve_bytes=0)
    if not chosen.database and not (home / "grid.sqlite").exists():
        make_empty_database(home / "grid.sqlite")
    await init_server(home, chosen)
    with listen(chosen) as listener:
        (home / "address").write_text(f"127.0.0.1:{listener.getsockname()[1]}")
        chain, key = ensure_certificate(home / "authority", [], datetime.datetime.now(datetime.UTC))
        async with open_services(home, chosen, clock or SystemClock()) as services, contextlib.AsyncExitStack() as running:
            if hub:
                hub_listener = running.enter_context(listen_hub(chosen, 0))
                await running.enter_async_context(running_hub(home, services, hub_listener, hub_address(hub_listener, chosen)))
            server = uvicorn.Server(server_config(make_app(services), chain, key))
            server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]
            task = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                yield TestGrid(home, chosen, services)
            finally:
                server.should_exit = True
                await task
