"""A disk without our agent works: stock cloud-init in an ordinary Debian reads the context disk and does the same."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from deskgrid.clock import SystemClock
from deskgrid.machines.driver import (
    Booted,
    ContextExited,
    ContextStarted,
    ExitCause,
    Exited,
    MachineEvent,
    MachineHandle,
    MachineSpec,
    Output,
    Stream,
)
from deskgrid.machines.qemu import QemuDriver
from deskgrid.model.machines import ContextLabel, MachineKind
from deskgrid.testing.cloud_template import cloud_template
from deskgrid.testing.driver_contract import output_of, read_scratch
from deskgrid.units import GIB, MIB

# The disk is built by the first test; then each boots a whole distribution, in software emulation.
pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
BOOT_LIMIT_S = 300.0

SCRIPT = r"""
pwd
ls /dev/hda /dev/hdb
cat /context/input.txt
echo "$SAMPLE"
command -v systemctl
hostname
cat /made-by-user-data 2>/dev/null
printf 'no end: \0\377'
printf 'trouble: \303\274\n' >&2
mkdir out
echo result >out/file
exit 5
"""
STDOUT = b"/scratch\n/dev/hda\n/dev/hdb\nfrom the user\nit's; $HOME\n/usr/bin/systemctl\njob-1-attempt-1\n%sno end: \0\xff"
STDERR = "trouble: ü\n".encode()
OWN_USER_DATA = """\
#cloud-config
write_files:
  - path: /made-by-user-data
    content: "by the user's own user-data\\n"
runcmd:
  - mkdir -p /context
  - mount -o ro LABEL=CIDATA /context
  - sh /context/.deskgrid/agent.sh
"""


class CloudMachine:
    """One machine with the cloud disk and a context folder of the test's."""

    def __init__(self, folder: Path) -> None:
        self.driver = QemuDriver(SystemClock(), accelerator="tcg")
        self.context = folder / "context"
        self.context.mkdir()
        (self.context / "context.sh").write_text(SCRIPT)
        (self.context / "input.txt").write_text("from the user\n")
        self._workdir = folder / "machine"
        self._handle: MachineHandle | None = None

    async def run(self) -> list[MachineEvent]:
        """Boot, and return all events until it is off."""
        spec = MachineSpec(
            "job-1/attempt-1",
            MachineKind.VM,
            memory_bytes=512 * MIB,
            cpus=1,
            scratch_bytes=1 * GIB,
            disk=cloud_template(),
            context=self.context,
            context_label=ContextLabel.CIDATA,
            environment=(("SAMPLE", "it's; $HOME"),),
        )
        self._handle = await self.driver.prepare(spec, self._workdir)
        await self.driver.start(self._handle)
        seen: list[MachineEvent] = []
        try:
            async with asyncio.timeout(BOOT_LIMIT_S):
                async for event in self.driver.events(self._handle):
                    seen.append(event)  # noqa: PERF401 - what came before the limit is wanted too
        except TimeoutError:
            pytest.fail(f"not off after {BOOT_LIMIT_S:.0f} s; its console:\n{console(seen)}")
        return seen

    def read(self, path: str) -> bytes:
        """Return a file of scratch."""
        assert self._handle is not None
        return read_scratch(self.driver.scratch(self._handle), path)

    async def destroy(self) -> None:
        if self._handle is not None:
            await self.driver.destroy(self._handle)


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[CloudMachine]:
    made = CloudMachine(tmp_path)
    yield made
    await made.destroy()


async def test_cloud_init_runs_the_context_and_the_machine_powers_off(machine: CloudMachine) -> None:
    events = await machine.run()
    assert_ran(machine, events, stdout=STDOUT % b"")


async def test_user_data_of_the_user_goes_first_and_can_run_the_context_too(machine: CloudMachine) -> None:
    (machine.context / "user-data").write_text(OWN_USER_DATA)
    events = await machine.run()
    assert_ran(machine, events, stdout=STDOUT % b"by the user's own user-data\n")


def assert_ran(machine: CloudMachine, events: list[MachineEvent], *, stdout: bytes) -> None:
    told = [event for event in events if not isinstance(event, Output)]
    assert told == [Booted(), ContextStarted(), ContextExited(5), Exited(ExitCause.POWERED_OFF)], console(events)
    assert output_of(events, Stream.STDOUT) == stdout
    assert output_of(events, Stream.STDERR) == STDERR
    assert machine.read("/.deskgrid/exit") == b"5\n"
    assert machine.read("/.deskgrid/stdout") == stdout
    assert machine.read("/.deskgrid/stderr") == STDERR
    assert machine.read("/out/file") == b"result\n"


def console(events: list[MachineEvent]) -> str:
    """Return the end of what the guest said on its console, for a failed assertion."""
    return output_of(events, Stream.CONSOLE)[-4000:].decode(errors="replace")
