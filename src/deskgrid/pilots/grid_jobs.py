"""The grid itself as a system: a pilot is a job in a virtual machine (client/pilots.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from deskgrid.client.pilots import Pilot
from deskgrid.core import pilots
from deskgrid.core.lifecycle import FINAL_JOB_STATES
from deskgrid.core.pilots import Sent
from deskgrid.errors import NotFound
from deskgrid.model.ids import JobId
from deskgrid.pilots.system import Order

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["GridSystem"]

_NEWEST = 1000


class GridSystem:
    """See pilots.system.System."""

    uses_links = False

    def __init__(self, plan: pilots.System, grid: Grid, pilot: Pilot) -> None:
        self.plan = plan
        self.idle_s = pilot.idle_s
        self._grid, self._pilot = grid, pilot

    async def send(self, order: Order) -> str:
        return str((await self._grid.submit_pilot(msgspec.structs.replace(self._pilot, name=order.name))).id)

    async def gone(self, pilots: Sequence[Sent]) -> set[str]:
        numbers = await self._numbers(pilots)
        return {one.name for one in pilots if one.name not in numbers or await self._is_over(numbers[one.name])}

    async def call_back(self, pilot: Sent) -> None:
        for number in (await self._numbers([pilot])).values():
            with contextlib.suppress(NotFound):
                await self._grid.cancel(number)

    async def _numbers(self, pilots: Sequence[Sent]) -> dict[str, JobId]:
        """Return the jobs that pilots are, by name. One whose number was never told is among the newest jobs, or never got there."""
        numbers = {one.name: JobId(int(one.reference)) for one in pilots if one.reference}
        unknown = {one.name for one in pilots if not one.reference}
        if unknown:
            newest = await self._grid.jobs(limit=_NEWEST)
            numbers |= {job.spec.name: job.id for job in newest.jobs if job.spec.pilot and job.spec.name in unknown}
        return numbers

    async def _is_over(self, number: JobId) -> bool:
        try:
            return (await self._grid.job(number)).job.state in FINAL_JOB_STATES
        except NotFound:
            return True
