"""The factory: looks at what waits, and keeps as many pilots as that needs, on each system that it knows.

What is decided stands in core/pilots.py. Which pilots are out is in a file of the factory's folder, written before each is sent, so one that is killed and
started again sends none twice and forgets none: a pilot is known by its name, which it joins under. While it is not at work its system is asked whether it
is there; no answer is never taken for its end.
"""

from __future__ import annotations

import random
import secrets
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec
import structlog

from deskgrid.clock import Clock
from deskgrid.core.pilots import Plan, Sent, SystemState, after_failure, plan
from deskgrid.errors import DeskgridError, InvalidInput, OperatorError, PeerError, StoreUnavailable, Unreachable
from deskgrid.files import write_durably
from deskgrid.model.workers import WorkerState
from deskgrid.pilots.system import GIVING_BACK_S, NoAnswer, Order, System

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["Factory"]

_log = structlog.get_logger()
_JOIN_S = 7 * 86400.0
"""How long a link may be used: for as long as a pilot may wait in a queue."""


class Factory:
    """Call `run`, or `look` once."""

    def __init__(self, grid: Grid, systems: Sequence[System], folder: Path, *, clock: Clock, rng: random.Random) -> None:
        """`folder` keeps what is out. Raise InvalidInput for a file there that is none of the factory's."""
        self._grid, self._clock, self._rng = grid, clock, rng
        self._systems = {system.plan.name: system for system in systems}
        self._states: dict[str, SystemState] = {}
        self._file = folder / "pilots.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.out: dict[str, Sent] = {one.name: one for one in self._read()}

    async def run(self, poll_s: float) -> None:
        """Look every so often, also while the grid does not answer. Raise DeskgridError if it refuses: then its user must act."""
        while True:
            try:
                await self.look()
            except (PeerError, OperatorError) as error:
                _log.warning("grid_does_not_answer", error=str(error))
            await self._clock.sleep(poll_s)

    async def look(self) -> Plan:
        """Look once, send and call back what is to be; return what was decided. Raise DeskgridError if the grid does not answer, or refuses."""
        workers = {one.name: one.state for one in await self._grid.workers() if one.pilot_of}
        waiting = await self._grid.waiting()
        self._note_who_joined_and_left(set(workers))
        for system in self._systems.values():
            await self._ask(system, {name for name, state in workers.items() if state is not WorkerState.OFFLINE})
        systems = [system.plan for system in self._systems.values()]
        decided = plan(waiting, systems, self._states, list(self.out.values()), now=self._clock.now())
        for name in decided.call_back:
            await self._call_back(self.out[name], is_late=name in decided.overdue)
        for name, count in decided.send.items():
            for _ in range(count):
                if not await self._send(self._systems[name]):
                    break
        return decided

    async def call_all_back(self) -> None:
        """Call back all that are out. Those whose system does not answer stay out."""
        for pilot in list(self.out.values()):
            await self._call_back(pilot, is_late=False)

    def _note_who_joined_and_left(self, names: set[str]) -> None:
        for pilot in list(self.out.values()):
            if pilot.system not in self._systems:
                _log.warning("pilot_of_no_system", pilot=pilot.name, system=pilot.system)
            if pilot.name in names and not pilot.joined:
                _log.info("pilot_joined", pilot=pilot.name, system=pilot.system)
                self._states.pop(pilot.system, None)
                self._keep(msgspec.structs.replace(pilot, joined=True))
            elif pilot.joined and pilot.name not in names:
                _log.info("pilot_ended", pilot=pilot.name, system=pilot.system, joined=True)
                self._forget(pilot)

    async def _ask(self, system: System, at_work: set[str]) -> None:
        """Ask a system for its pilots that are not at work, and forget those that are gone."""
        asked = [one for one in self.out.values() if one.system == system.plan.name and one.name not in at_work]
        try:
            gone = await system.gone(asked) if asked else set()
        except DeskgridError as error:
            _log.warning("system_does_not_answer", system=system.plan.name, error=str(error))
            return
        for pilot in [one for one in asked if one.name in gone]:
            _log.info("pilot_ended", pilot=pilot.name, system=pilot.system, joined=pilot.joined)
            if pilot.reference and not pilot.joined:  # without a reference it was never there, which is known as a failure already
                self._failed(pilot.system)
            self._forget(pilot)

    async def _send(self, system: System) -> bool:
        """Send one pilot; return whether the system took it. Raise DeskgridError for what is not the system's failure but the grid's."""
        name = system.plan.name
        link = await self._link(system)
        pilot = Sent(name=f"{name}-{secrets.token_hex(4)}", system=name, sent_at=self._clock.now())
        self._keep(pilot)
        try:
            reference = await system.send(
                Order(name=pilot.name, link=link, lifetime_s=system.plan.lifetime_s, idle_s=system.idle_s)
            )
        except (Unreachable, StoreUnavailable):  # perhaps it was sent: it is asked for when the grid answers
            raise
        except DeskgridError as error:
            is_sure = not isinstance(error, NoAnswer)
            _log.warning("system_refuses", system=name, pilot=pilot.name, is_sure=is_sure, error=str(error))
            self._failed(name)
            if is_sure:
                self._forget(pilot)
            return False
        _log.info("pilot_sent", pilot=pilot.name, system=name, reference=reference)
        self._keep(msgspec.structs.replace(pilot, reference=reference))
        return True

    async def _link(self, system: System) -> str:
        if not system.uses_links:
            return ""
        patience_s = max(_JOIN_S, system.plan.patience_s)
        return str(await self._grid.pilot_link(pilot_s=system.plan.lifetime_s + GIVING_BACK_S, lifetime_s=patience_s))

    async def _call_back(self, pilot: Sent, *, is_late: bool) -> None:
        system = self._systems.get(pilot.system)
        if system is None:
            _log.warning("pilot_of_no_system", pilot=pilot.name, system=pilot.system)
            return
        _log.info("pilot_called_back", pilot=pilot.name, system=pilot.system, is_late=is_late)
        try:
            await system.call_back(pilot)
        except DeskgridError as error:
            _log.warning("system_does_not_answer", system=pilot.system, error=str(error))
            return
        if is_late:
            self._failed(pilot.system)
        self._forget(pilot)

    def _keep(self, pilot: Sent) -> None:
        self.out[pilot.name] = pilot
        self._write()

    def _forget(self, pilot: Sent) -> None:
        del self.out[pilot.name]
        self._write()

    def _failed(self, system: str) -> None:
        state = self._states.get(system, SystemState())
        if state.until <= self._clock.now():  # several at once are one failure
            self._states[system] = after_failure(state, now=self._clock.now(), rng=self._rng)

    def _read(self) -> list[Sent]:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=list[Sent])
        except FileNotFoundError:
            return []
        except msgspec.DecodeError as error:
            raise InvalidInput(str(error), where=str(self._file), hint="remove it if it is not the factory's") from error

    def _write(self) -> None:
        write_durably(self._file, msgspec.json.encode(list(self.out.values())))
