"""What all attempts of one worker share."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from pathlib import Path
from random import Random
from typing import Protocol

from msgspec import Struct

from deskgrid.client.transport import Credentials
from deskgrid.clock import Clock
from deskgrid.machines.driver import MachineHandle
from deskgrid.machines.images import unpack_disk
from deskgrid.machines.results import ExtractLimits, ResultReport, extract_results
from deskgrid.overlay.endpoint import Endpoint
from deskgrid.overlay.peer import Calls
from deskgrid.settings import WorkerSettings
from deskgrid.swarm.cache import Cache
from deskgrid.worker.connection import Connection
from deskgrid.worker.drivers import Drivers
from deskgrid.worker.home import Home
from deskgrid.worker.installed import InstalledDisks
from deskgrid.worker.journal import Journal
from deskgrid.worker.owner import Owner
from deskgrid.worker.secrets import SecretsKey
from deskgrid.worker.sharing import Sharing

__all__ = ["Extract", "Kit", "Overlay"]


class Overlay(Struct, frozen=True, kw_only=True):
    """A worker's part in the overlay."""

    endpoint: Endpoint
    calls: Calls
    credentials: Credentials
    """The worker's own: where the server is, and how to know it."""


class Extract(Protocol):
    """Takes a result out of a scratch image; see machines.results.extract_results."""

    async def __call__(self, image: Path, output: Path, *, paths: tuple[str, ...], limits: ExtractLimits) -> ResultReport: ...


class Kit(Struct, frozen=True, kw_only=True):
    """What all attempts of one worker share."""

    home: Home
    settings: WorkerSettings
    journal: Journal
    installed: InstalledDisks
    secrets: SecretsKey
    cache: Cache
    sharing: Sharing
    connection: Connection
    drivers: Drivers
    owner: Owner
    clock: Clock
    rng: Random
    changed: Callable[[], None]
    """Tell the server soon."""
    freed: Callable[[], None]
    """A machine's place is free."""
    fault: Callable[[str], None]
    """This PC could not do what was asked, for this reason: take no new work for a while."""
    unthrottle: Callable[[MachineHandle], None]
    """Let a machine's processes run, whatever its share: it is asked for something."""
    result_room: Callable[[], int]
    """Bytes that a packed result may take now."""
    authority_pem: str = ""
    """Certificate of the grid's authority: who signed what is checked by it."""
    overlay: Overlay | None = None
    """How machines get a network; None: they get none."""
    unpack: Callable[..., Awaitable[object]] = unpack_disk
    extract: Extract = extract_results
