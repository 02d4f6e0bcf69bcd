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
from msgspec import Struct

from deskgrid.clock import Clock
from deskgrid.core.pilots import Demand, Plan, Sent, SystemState, after_failure, after_joining, plan
from deskgrid.errors import DeskgridError, InvalidInput
from deskgrid.files import write_durably
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.wire import WaitingClass
from deskgrid.pilots.system import Order, System

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["Factory", "Record"]

_log = structlog.get_logger()
_JOIN_S = 7 * 86400.0
"""How long a link may be used: for as long as a pilot may wait in a queue."""


class Record(Struct, kw_only=True):
    """A pilot that is out."""

    name: str
    system: str
    sent_at: float
    reference: str = ""
    """By what the system knows it; empty: perhaps it never got there."""
    joined: bool = False


class Factory:
    """`look` again and again."""

    def __init__(self, grid: Grid, systems: Sequence[System], folder: Path, *, clock: Clock, rng: random.Random) -> None:
        """`folder` keeps what is out. Raise InvalidInput for a file there that is none of the factory's."""
        self._grid, self._clock, self._rng = grid, clock, rng
        self._systems = {system.plan.name: system for system in systems}
        self._states: dict[str, SystemState] = {}
        self._file = folder / "pilots.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.out: dict[str, Record] = {one.name: one for one in self._read()}

    async def look(self) -> Plan:
        """Look once, send and call back what is to be; return what was decided. Raise DeskgridError if the grid does not answer."""
        joined = {one.name for one in await self._grid.workers() if one.pilot_of}
        demands = [_demand(one) for one in await self._grid.waiting()]
        await self._note_what_is_there(joined)
        sent = [Sent(name=one.name, system=one.system, sent_at=one.sent_at, joined=one.joined) for one in self.out.values()]
        systems = [system.plan for system in self._systems.values()]
        decided = plan(demands, systems, self._states, sent, now=self._clock.now())
        for name in decided.call_back:
            await self._call_back(self.out[name], is_late=name in decided.overdue)
        for name, count in decided.send.items():
            for _ in range(count):
                if not await self._send(self._systems[name]):
                    break
        return decided

    async def call_all_back(self) -> None:
        """Call back all that are out."""
        for record in list(self.out.values()):
            await self._call_back(record, is_late=False)

    async def _note_what_is_there(self, joined: set[str]) -> None:
        """Note who has joined, and forget those that have ended."""
        for record in self.out.values():
            if record.name in joined and not record.joined:
                record.joined = True
                self._states[record.system] = after_joining(self._states.get(record.system, SystemState()))
                _log.info("pilot_joined", pilot=record.name, system=record.system)
        for record in [one for one in self.out.values() if one.joined and one.name not in joined]:
            _log.info("pilot_ended", pilot=record.name, system=record.system, joined=True)
            del self.out[record.name]
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
                record = known[reference]
                _log.info("pilot_ended", pilot=record.name, system=name, joined=record.joined)
                if not record.joined:
                    self._failed(name)
                del self.out[record.name]
        for record in [one for one in self.out.values() if one.system not in self._systems]:
            _log.warning("pilot_of_no_system", pilot=record.name, system=record.system)
            del self.out[record.name]
        self._write()

    async def _send(self, system: System) -> bool:
        """Send one pilot; return whether the system took it."""
        name = system.plan.name
        record = Record(name=f"{name}-{secrets.token_hex(4)}", system=name, sent_at=self._clock.now())
        self.out[record.name] = record
        self._write()
        try:
            link = ""
            if system.uses_links:
                patience_s = max(_JOIN_S, system.plan.patience_s)
                link = str(await self._grid.pilot_link(pilot_s=system.lifetime_s, lifetime_s=patience_s))
            order = Order(name=record.name, link=link, lifetime_s=system.lifetime_s, idle_s=system.idle_s)
            record.reference = await system.send(order)
        except DeskgridError as error:
            _log.warning("system_refuses", system=name, error=str(error))
            del self.out[record.name]
            self._failed(name)
            self._write()
            return False
        _log.info("pilot_sent", pilot=record.name, system=name, reference=record.reference)
        self._write()
        return True

    async def _call_back(self, record: Record, *, is_late: bool) -> None:
        _log.info("pilot_called_back", pilot=record.name, system=record.system, is_late=is_late)
        system = self._systems.get(record.system)
        if system is not None and record.reference:
            try:
                await system.call_back(record.reference)
            except DeskgridError as error:
                _log.warning("system_does_not_answer", system=record.system, error=str(error))
                return
        if is_late:
            self._failed(record.system)
        del self.out[record.name]
        self._write()

    def _failed(self, system: str) -> None:
        state = self._states.get(system, SystemState())
        if state.until <= self._clock.now():  # several at once are one failure
            self._states[system] = after_failure(state, now=self._clock.now(), rng=self._rng)

    def _read(self) -> list[Record]:
        try:
            return msgspec.json.decode(self._file.read_bytes(), type=list[Record])
        except FileNotFoundError:
            return []
        except msgspec.DecodeError as error:
            raise InvalidInput(str(error), where=str(self._file), hint="remove it if it is not the factory's") from error

    def _write(self) -> None:
        write_durably(self._file, msgspec.json.encode(list(self.out.values())))


def _demand(found: WaitingClass) -> Demand:
    return Demand(
        jobs=found.jobs,
        packages=frozenset(found.packages),
        cpus=found.cpus,
        memory_bytes=found.memory_bytes,
        is_process=found.kind is MachineKind.PROCESS,
        platforms=frozenset(found.platforms),
        needs_network=found.network is not Network.NONE,
        workers=found.workers,
    )
