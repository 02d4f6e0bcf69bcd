"""The fake driver keeps the contract, and plays what fake.toml says."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deskgrid.clock import SystemClock
from deskgrid.errors import InvalidInput, MachineFailed
from deskgrid.machines.driver import ExitCause, Exited, MachineSpec, Output, Stream
from deskgrid.machines.fake import FakeDriver
from deskgrid.machines.processes import find_by_token
from deskgrid.model.machines import MachineKind
from deskgrid.testing.driver_contract import (
    NETWORK,
    ConsoleContract,
    ContractJob,
    Prepare,
    SuspendableDriver,
    attach_viewer,
    events_until_exit,
    read_scratch,
)
from deskgrid.units import MIB


class TestFakeDriver(ConsoleContract):
    @pytest.fixture
    def new_driver(self) -> Callable[[], SuspendableDriver]:
        return lambda: FakeDriver(SystemClock())

    @pytest.fixture
    def spec(self) -> MachineSpec:
        return MachineSpec("job-1/attempt-1", MachineKind.VM, memory_bytes=64 * MIB, cpus=1, scratch_bytes=64 * MIB)

    @pytest.mark.parametrize(
        ("plan", "cause"),
        [
            ({"refuses": True}, ExitCause.START_FAILED),
            ({"crashes": True}, ExitCause.KILLED),
            ({"reboots": True}, ExitCause.RESET),
            ({"io_error": True}, ExitCause.IO_ERROR),
        ],
    )
    async def test_every_bad_end_can_be_played(
        self, driver: FakeDriver, prepare: Prepare, plan: dict[str, object], cause: ExitCause
    ) -> None:
        handle = await prepare(ContractJob("", plan))
        await driver.start(handle)
        end = (await events_until_exit(driver, handle))[-1]
        assert isinstance(end, Exited)
        assert end.cause is cause
        assert find_by_token(handle.token) is None
        assert read_scratch(driver.scratch(handle), "/.deskgrid/exit") == b""

    async def test_empty_plan_ends_at_once(self, driver: FakeDriver, prepare: Prepare) -> None:
        handle = await prepare(ContractJob("", {}))
        began = time.monotonic()
        await driver.start(handle)
        assert (await events_until_exit(driver, handle))[-1] == Exited(ExitCause.POWERED_OFF)
        assert time.monotonic() - began < 2.0

    async def test_guest_that_never_boots_runs_until_it_is_stopped(self, driver: FakeDriver, prepare: Prepare) -> None:
        handle = await prepare(ContractJob("", {"never_boots": True}))
        await driver.start(handle)
        reading = asyncio.create_task(events_until_exit(driver, handle))
        await driver.stop(handle, grace_s=1)
        assert (await reading)[-1] == Exited(ExitCause.STOPPED)

    async def test_keys_typed_at_the_console_come_as_output(self, driver: FakeDriver, prepare: Prepare) -> None:
        handle = await prepare(ContractJob("", {"console": True, "never_boots": True}))
        await driver.start(handle)
        events = driver.events(handle)
        assert await anext(events) == Output(Stream.CONSOLE, b"fake: no bootable device\n")
        with await attach_viewer(driver, handle, "password") as viewer:
            assert await asyncio.to_thread(viewer.log_in, "password")
            viewer.type("q")
            assert await anext(events) == Output(Stream.STDOUT, b"q\n")
        await events.aclose()

    async def test_machine_that_was_not_told_to_shows_no_screen(self, driver: FakeDriver, prepare: Prepare) -> None:
        handle = await prepare(ContractJob("", {"hangs": True}))
        await driver.start(handle)
        with pytest.raises(MachineFailed):
            await attach_viewer(driver, handle, "password")

    async def test_fetch_from_what_is_no_doorway_is_refused(self, prepare: Prepare) -> None:
        with pytest.raises(InvalidInput, match="mail"):
            await prepare(ContractJob("", {"fetch": ["mail:25"]}), **NETWORK)

    async def test_misspelt_plan_is_refused_and_leaves_nothing(self, prepare: Prepare, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput):
            await prepare(ContractJob("", {"exitcode": 1}))
        assert not list(tmp_path.glob("machine-*"))

    async def test_file_outside_scratch_is_refused(self, prepare: Prepare, tmp_path: Path) -> None:
        with pytest.raises(InvalidInput):
            await prepare(ContractJob("", {"files": {"../x": "text"}}))
        assert not list(tmp_path.glob("**/x"))
