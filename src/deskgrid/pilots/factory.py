"""The factory: looks at what waits, and keeps as many pilots as that needs, on each system that it knows.

What is decided stands in core/pilots.py. Which pilots are out is in a file of the factory's folder, written before each is sent, so one that is killed and
started again sends none twice and forgets none: a pilot is known by its name, which it joins under.
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
from deskgrid.errors import DeskgridError, InvalidInput
from deskgrid.files import write_durably
from deskgrid.pilots.system import Order, System

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["Factory"]

_log = structlog.get_logger()
_JOIN_S = 7 * 86400.0
"""How long a link may be used: for as long as a pilot may wait in a queue."""


class Factory:
    """`look` again and again."""

    def __init__(self, grid: Grid, systems: Sequence[System], folder: Path, *, clock: Clock, rng: random.Random) -> None:
        """`folder` keeps what is out. Raise InvalidInput for a file there that is none of the factory's."""
        self._grid, self._clock, self._rng = grid, clock, rng
        self._systems = {system.plan.name: system for system in systems}
        self._states: dict[str, SystemState] = {}
        self._file = folder / "pilots.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.out: dict[str, Sent] = {one.name: one for one in self._read()}

    async def look(self) -> Plan:
        """Look once, send and call back what is to be; return what was decided. Raise DeskgridError if the grid does not answer."""
        joined = {one.name for one in await self._grid.workers() if one.pilot_of}
        waiting = await self._grid.waiting()
        await self._note_what_is_there(joined)
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
        """Call back all that are out."""
        for pilot in list(self.out.values()):
            await self._call_back(pilot, is_late=False)

    async def _note_what_is_there(self, joined: set[str]) -> None:
        """Note who has joined, and forget those that have ended."""
        for pilot in list(self.out.values()):
            if pilot.name in joined and not pilot.joined:
                self.out[pilot.name] = msgspec.structs.replace(pilot, joined=True)
                self._states.pop(pilot.system, None)
                _log.info("pilot_joined", pilot=pilot.name, system=pilot.system)
        for pilot in [one for one in self.out.values() if one.joined and one.name not in joined]:
            _log.info("pilot_ended", pilot=pilot.name, system=pilot.system, joined=True)
            del self.out[pilot.name]
        for name, system in self._systems.items():
            known = {
                one.reference: one for one in self.out.values() if one.system == name and one.reference and one.name not in joined
            }
            if not known:
                continue
            try:
                gone = await system.gone(list(known))
            except DeskgridError as error:
                _log.warning("system_does_not_answer", system=name, error=str(error))
                continue
            for reference in gone:
                pilot = known[reference]
                _log.info("pilot_ended", pilot=pilot.name, system=name, joined=pilot.joined)
                if not pilot.joined:
                    self._failed(name)
                del self.out[pilot.name]
        for pilot in [one for one in self.out.values() if one.system not in self._systems]:
            _log.warning("pilot_of_no_system", pilot=pilot.name, system=pilot.system)
            del self.out[pilot.name]
        self._write()

    async def _send(self, system: System) -> bool:
        """Send one pilot; return whether the system took it."""
        name = system.plan.name
        pilot = Sent(name=f"{name}-{secrets.token_hex(4)}", system=name, sent_at=self._clock.now())
        self.out[pilot.name] = pilot
        self._write()
        try:
            link = ""
            if system.uses_links:
                patience_s = max(_JOIN_S, system.plan.patience_s)
                link = str(await self._grid.pilot_link(pilot_s=system.lifetime_s, lifetime_s=patience_s))
            order = Order(name=pilot.name, link=link, lifetime_s=system.lifetime_s, idle_s=system.idle_s)
            pilot = msgspec.structs.replace(pilot, reference=await system.send(order))
        except DeskgridError as error:
            _log.warning("system_refuses", system=name, error=str(error))
            del self.out[pilot.name]
            self._failed(name)
            self._write()
            return False
        self.out[pilot.name] = pilot
        _log.info("pilot_sent", pilot=pilot.name, system=name, reference=pilot.reference)
        self._write()
        return True

    async def _call_back(self, pilot: Sent, *, is_late: bool) -> None:
        _log.info("pilot_called_back", pilot=pilot.name, system=pilot.system, is_late=is_late)
        system = self._systems.get(pilot.system)
        if system is not None and pilot.reference:
            try:
                await system.call_back(pilot.reference)
            except DeskgridError as error:
                _log.warning("system_does_not_answer", system=pilot.system, error=str(error))
                return
        if is_late:
            self._failed(pilot.system)
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
