"""The screen of an attempt's machine, shown to the job's owner (core/console.py).

A machine in the overlay offers it beside its own services (services.py). One without a network, which is nobody's peer, gets a peer for its
screen alone while the server says that it is wanted, and for as long as somebody looks at it.
"""

from __future__ import annotations

import asyncio
import secrets
import socket

import structlog

from deskgrid.core.backoff import delay_s
from deskgrid.core.console import CONSOLE, first_line
from deskgrid.errors import DeskgridError, NotFound
from deskgrid.machines.driver import Driver, HasConsole, MachineHandle
from deskgrid.model.ids import AttemptId
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.workers import Assignment
from deskgrid.overlay.peer import Dial, Peer
from deskgrid.worker.kit import Kit, Overlay

__all__ = ["Console", "console_dialler", "make_console"]

_LETTERS = "abcdefghijkmnpqrstuvwxyz23456789"
"""None that look alike: people may have to type it. Eight of 32 are enough, for each wrong guess ends the stream."""
_PASSWORD_LETTERS = 8
_LOOK_S = 60.0
_log = structlog.get_logger()


def console_dialler(kit: Kit, driver: object, handle: MachineHandle) -> Dial:
    """Return what makes a connection to a machine's screen; what comes from it first is the line with the password."""

    async def dial() -> socket.socket:
        if not isinstance(driver, HasConsole):
            raise NotFound(f"machines of the driver {handle.driver} do not show their screen")
        password = "".join(secrets.choice(_LETTERS) for _ in range(_PASSWORD_LETTERS))
        kit.unthrottle(handle)
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                theirs.sendall(first_line(password))  # before the machine has the socket, so it comes before what the machine says
                await driver.attach_console(handle, theirs, password)
        except BaseException:
            ours.close()
            raise
        return ours

    return dial


def make_console(kit: Kit, assignment: Assignment) -> Console | None:
    """Return the console of an attempt whose machine has no network; None if it has no screen, or services that show it."""
    machine = assignment.spec.machine
    if kit.overlay is None or machine.kind is not MachineKind.VM or machine.network is not Network.NONE:
        return None
    return Console(kit, kit.overlay, assignment.attempt_id)


class Console:
    """The peer of one attempt for its screen. `run` beside its machine; `want` whenever the server says whether it is wanted."""

    def __init__(self, kit: Kit, overlay: Overlay, attempt_id: AttemptId) -> None:
        self._kit, self._overlay, self._attempt_id = kit, overlay, attempt_id
        self._wanted, self._unwanted = asyncio.Event(), asyncio.Event()

    def want(self, wanted: bool) -> None:
        """Note whether somebody wants to see it. Idempotent."""
        now, before = (self._wanted, self._unwanted) if wanted else (self._unwanted, self._wanted)
        before.clear()
        now.set()

    async def run(self, driver: Driver, handle: MachineHandle) -> None:
        """Show it until cancelled. What fails here is begun again after a pause: it never ends the attempt."""
        failures = 0
        while True:
            await self._wanted.wait()
            try:
                await self._show(driver, handle)
                failures = 0
                continue
            except DeskgridError as error:
                _log.warning("console_not_registered", attempt_id=self._attempt_id, error=str(error))
            except Exception:
                _log.exception("console_broke", attempt_id=self._attempt_id)
            failures += 1
            settings = self._kit.settings
            pause_s = delay_s(failures, first_s=settings.backoff_s, max_s=settings.max_backoff_s, rng=self._kit.rng)
            await self._kit.clock.sleep(pause_s)

    async def _show(self, driver: Driver, handle: MachineHandle) -> None:
        """Be a peer while it is wanted, and while somebody looks at it."""
        offers = {CONSOLE: console_dialler(self._kit, driver, handle)}
        async with Peer(self._overlay.endpoint, self._overlay.calls, attempt_id=self._attempt_id, offers=offers) as peer:
            await self._unwanted.wait()
            while peer.connections():
                await peer.finish_streams(_LOOK_S)
                await self._unwanted.wait()
