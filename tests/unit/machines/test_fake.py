"""The fake's plan is read strictly."""

from __future__ import annotations

from pathlib import Path

import pytest

from deskgrid.clock import SystemClock
from deskgrid.errors import InvalidInput
from deskgrid.machines.driver import MachineSpec
from deskgrid.machines.fake import PLAN_FILE, FakeDriver
from deskgrid.model.machines import MachineKind
from deskgrid.units import MIB


@pytest.mark.parametrize("plan", ["exit_code = 'x'", "unknown = 1", "[", "hangs = 1", 'files = {"/etc/x" = "y"}'])
async def test_bad_plan_is_refused_with_the_files_name_and_nothing_is_left(tmp_path: Path, plan: str) -> None:
    context = tmp_path / "context"
    context.mkdir()
    (context / PLAN_FILE).write_text(plan)
    spec = MachineSpec("job-1/attempt-1", MachineKind.VM, 64 * MIB, 1, 16 * MIB, context=context)
    with pytest.raises(InvalidInput) as caught:
        await FakeDriver(SystemClock()).prepare(spec, tmp_path / "machine")
    assert caught.value.where == PLAN_FILE
    assert not (tmp_path / "machine").exists()


async def test_context_is_not_needed(tmp_path: Path) -> None:
    driver = FakeDriver(SystemClock())
    handle = await driver.prepare(MachineSpec("job-1/attempt-1", MachineKind.VM, 64 * MIB, 1, 16 * MIB), tmp_path / "machine")
    await driver.destroy(handle)
    assert not list(tmp_path.iterdir())
