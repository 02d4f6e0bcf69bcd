"""The grid as a system, with a real server: its pilots are jobs, which nobody runs here."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deskgrid.client.grid import Grid
from deskgrid.client.pilots import Pilot
from deskgrid.core import pilots
from deskgrid.core.pilots import Sent
from deskgrid.model.ids import JobId
from deskgrid.model.jobs import JobState
from deskgrid.pilots.grid_jobs import GridSystem
from deskgrid.pilots.system import Order
from deskgrid.testing.grids import play_job, running_grid


@pytest.fixture
async def grid(tmp_path: Path) -> AsyncIterator[Grid]:
    async with running_grid(tmp_path / "server") as found:
        owner = await found.admin()
        async with Grid(await found.worker()) as host:
            await play_job(owner, host.transport)  # publishes the disk
        async with Grid(owner) as user:
            yield user


def sent(name: str, reference: str = "") -> Sent:
    return Sent(name=name, system="vm", sent_at=0.0, reference=reference)


@pytest.mark.parametrize("is_known", [True, False])
async def test_pilot_is_found_and_called_back_also_if_its_number_was_never_told(is_known: bool, grid: Grid) -> None:
    system = GridSystem(pilots.System(name="vm"), grid, Pilot(disk="played"))
    number = await system.send(Order(name="vm-1", link="", lifetime_s=3600.0, idle_s=60.0))
    mine = sent("vm-1", number if is_known else "")
    assert await system.gone([mine, sent("vm-2"), sent("vm-3", "4711")]) == {"vm-2", "vm-3"}
    await system.call_back(mine)
    assert (await grid.job(JobId(int(number)))).job.state is JobState.CANCELLED
    assert await system.gone([mine]) == {"vm-1"}
    await system.call_back(mine)
    await system.call_back(sent("vm-2"))
