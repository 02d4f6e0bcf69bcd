"""The grid itself as a system: a pilot is a job in a virtual machine (client/pilots.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import msgspec

from deskgrid.client.pilots import Pilot
from deskgrid.core import pilots
from deskgrid.core.lifecycle import FINAL_JOB_STATES
from deskgrid.errors import NotFound
from deskgrid.model.ids import JobId
from deskgrid.pilots.system import Order

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["GridSystem"]


class GridSystem:
    """See pilots.system.System."""

    uses_links = False

    def __init__(self, plan: pilots.System, grid: Grid, pilot: Pilot) -> None:
        self.plan = plan
        self.lifetime_s, self.idle_s = pilot.lifetime_s, pilot.idle_s
        self._grid, self._pilot = grid, pilot

    async def send(self, order: Order) -> str:
        return str((await self._grid.submit_pilot(msgspec.structs.replace(self._pilot, name=order.name))).id)

    async def gone(self, references: Sequence[str]) -> set[str]:
        found = set()
        for reference in references:
            try:
                is_over = (await self._grid.job(JobId(int(reference)))).job.state in FINAL_JOB_STATES
            except NotFound:
                is_over = True
            if is_over:
                found.add(reference)
        return found

    async def call_back(self, reference: str) -> None:
        with contextlib.suppress(NotFound):
            await self._grid.cancel(JobId(int(reference)))
