"""The VirtualBox driver against the real VirtualBox 7.2 of Debian sid, whose interpreter runs the guests (deskgrid.testing.virtualbox).

Guests of one sector, which say what an agent says, stand for Linux where that would take three minutes; one test boots Linux.
"""

from __future__ import annotations

import asyncio
import hashlib
import os
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from deskgrid.clock import SystemClock
from deskgrid.errors import MachineFailed
from deskgrid.machines import base, processes
from deskgrid.machines.driver import (
    Booted,
    ContextExited,
    ContextStarted,
    ExitCause,
    Exited,
    MachineHandle,
    MachineSpec,
    Output,
    Running,
    Saved,
    Stream,
)
from deskgrid.machines.processes import find_by_token, find_by_variable
from deskgrid.machines.virtualbox import VirtualBoxDriver
from deskgrid.model.machines import ContextLabel, MachineKind
from deskgrid.testing import driver_contract
from deskgrid.testing.driver_contract import (
    BROKEN,
    TICKING,
    CheckpointContract,
    ContractJob,
    SuspendableDriver,
    events_until_exit,
    output_of,
    read_scratch,
)
from deskgrid.testing.tiny_template import tiny_template
from deskgrid.testing.virtualbox import DRIVERLESS, virtualbox_folder
from deskgrid.units import MIB

pytestmark = [pytest.mark.full, pytest.mark.timeout(900), pytest.mark.xdist_group("virtualbox")]

_LOOPS = 60_000
"""That the interpreter counts to between two ticks."""
RESET = bytes.fromhex("b0fe e664 f4ebfd")
CHATTER = bytes.fromhex("baf803 b041 ee ebfd")


def speaking(said: bytes, then: bytes) -> bytes:
    """Return a sector that says something on the second serial port, then goes on with `then`, which may call the same routine at 0x7c05."""
    #        jmp start; puts: lodsb; or al,al; jz ret; mov ah,al; mov dx,2fd; wait: in al,dx; test al,20; jz wait
    head = bytes.fromhex("eb1a 909090 ac 08c0 7412 88c4 bafd02 ec a820 74fb")
    #        mov al,ah; mov dx,2f8; out dx,al; jmp puts; ret
    head += bytes.fromhex("88e0 baf802 ee ebe9 c3")
    head = head.ljust(0x1D, b"\x90")
    text_at = 0x7C00 + len(head) + 11 + len(then)
    #                 xor ax,ax; mov ds,ax; cld; mov si,text           call puts
    start = bytes.fromhex("31c0 8ed8 fc be") + text_at.to_bytes(2, "little")
    start += b"\xe8" + (0x05 - (len(head) + len(start) + 3)).to_bytes(2, "little", signed=True)
    code = bytearray(head + start + then + said + b"\0")
    code[1] = len(head) - 2
    return bytes(code)


def ticking() -> bytes:
    """Return a sector that counts aloud for ever."""
    line = b"1 tick 000000\n\0"
    said = b"! booted\n! context-started\n"
    size = 0x1D + 11
    then_size = 34
    line_at = 0x7C00 + size + then_size + len(said) + 1
    loop = size
    #       mov bx,last digit; inc: inc byte [bx]; cmp byte [bx],3a; jne say; mov byte [bx],30; dec bx; jmp inc
    then = b"\xbb" + (line_at + 12).to_bytes(2, "little") + bytes.fromhex("fe07 803f3a 7506 c60730 4b ebf3")
    #       say: mov si,line; call puts
    then += b"\xbe" + line_at.to_bytes(2, "little")
    then += b"\xe8" + (0x05 - (loop + len(then) + 3)).to_bytes(2, "little", signed=True)
    #       mov ecx,loops; count: dec ecx; jnz count; jmp loop
    then += b"\x66\xb9" + _LOOPS.to_bytes(4, "little") + bytes.fromhex("6649 75fc")
    then += b"\xeb" + (-(len(then) + 2)).to_bytes(1, "little", signed=True)
    assert len(then) == then_size, len(then)
    return speaking(said, then) + line


def ending(said: bytes) -> bytes:
    """Return a sector that says something and turns the machine off (a port of VirtualBox's firmware)."""
    size = 0x1D + 11
    word = b"Shutdown\0"
    then_size = 17
    word_at = 0x7C00 + size + then_size + len(said) + 1
    then = b"\xbe" + word_at.to_bytes(2, "little") + bytes.fromhex("ba0f04 ac 08c0 7403 ee ebf8 f4ebfd")
    assert len(then) == then_size, len(then)
    return speaking(said, then) + word


def boot_disk(path: Path, code: bytes) -> Path:
    """Make a qcow2 disk of one megabyte whose first sector is `code`."""
    assert len(code) <= 510
    raw = path.with_suffix(".raw")
    raw.write_bytes((code.ljust(510, b"\0") + b"\x55\xaa").ljust(MIB, b"\0"))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    path.chmod(0o444)
    return path


@pytest.fixture(scope="session")
def programs() -> Path:
    return virtualbox_folder()


class TestVirtualBoxDriver(CheckpointContract):
    caged = False

    def leftovers(self, handle: MachineHandle) -> list[str]:
        name = f"deskgrid-{handle.token}"
        folder = Path(f"/tmp/.vbox-{name}-ipc")
        services = [f"process {one.pid}" for one in find_by_variable("VBOX_IPC_SOCKETID", name)]
        return [*([str(folder)] if folder.exists() else []), *services]

    @pytest.fixture
    def new_driver(self, programs: Path) -> Callable[[], SuspendableDriver]:
        return lambda: VirtualBoxDriver(SystemClock(), folder=programs, headless=DRIVERLESS, interpreted=True)

    @pytest.fixture
    def spec(self, tmp_path: Path) -> MachineSpec:
        disk = boot_disk(tmp_path / "ticking.qcow2", ticking())
        return MachineSpec("job-1/attempt-1", MachineKind.VM, memory_bytes=32 * MIB, cpus=1, scratch_bytes=64 * MIB, disk=disk)

    @pytest.fixture
    async def prepare(self, driver: Any, spec: MachineSpec, tmp_path: Path) -> AsyncIterator[Any]:
        """As in the contract; each job is played by a sector, which the context does not reach."""
        handles: list[MachineHandle] = []
        ended = boot_disk(tmp_path / "ended.qcow2", ending(b"! booted\n! context-started\n! context-exited 0\n"))

        async def make(job: ContractJob, **changes: Any) -> MachineHandle:
            context = job.write(tmp_path / f"job-{len(handles)}")
            disks = {} if job == TICKING else {"disk": ended}
            changed = msgspec.structs.replace(spec, context=context, **{**disks, **changes})
            handles.append(await driver.prepare(changed, tmp_path / f"machine-{len(handles)}"))
            return handles[-1]

        yield make
        for handle in handles:
            await driver.destroy(handle)
            assert find_by_token(handle.token) is None
            assert not self.leftovers(handle)

    # What needs a network, or Linux: see below.
    test_handle_survives_the_journal = None
    test_machine_talks_through_sockets_of_its_cage_and_a_restarted_worker_gets_new_ones = None
    test_killed_machine_takes_its_keeper_along = None
    test_destroy_right_after_start_in_a_cage_leaves_nothing = None
    test_destroy_of_a_running_machine_in_a_cage_leaves_nothing = None
    test_job_runs_is_told_in_order_and_leaves_its_result = None

    async def test_fingerprint_runs_a_guest_offers_no_network_and_leaves_nothing(self, programs: Path, tmp_path: Path) -> None:
        driver = VirtualBoxDriver(SystemClock(), folder=programs, headless=DRIVERLESS, interpreted=True, probes=tmp_path)
        found = await driver.fingerprint()
        assert (found.usable, found.reason, found.accelerator, [*found.networks]) == (True, "", "interpreter", ["none"])
        assert found.version.startswith("7.")
        assert not list(tmp_path.iterdir())

    async def test_without_its_kernel_module_it_is_not_usable_and_says_what_to_do(self, programs: Path) -> None:
        found = await VirtualBoxDriver(SystemClock(), folder=programs).fingerprint()
        assert not found.usable
        assert "modprobe vboxdrv" in found.reason

    async def test_start_that_fails_says_why(self, programs: Path, spec: MachineSpec, tmp_path: Path) -> None:
        driver = VirtualBoxDriver(SystemClock(), folder=programs)
        handle = await driver.prepare(spec, tmp_path / "machine")
        try:
            await driver.start(handle)
            [end] = [event for event in await events_until_exit(driver, handle) if isinstance(event, Exited)]
            assert end.cause is ExitCause.START_FAILED
            assert "modprobe vboxdrv" in end.detail
        finally:
            await driver.destroy(handle)

    async def test_linux_boots_and_leaves_its_result_and_the_cached_disk_is_not_touched(
        self, driver: VirtualBoxDriver, spec: MachineSpec, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(driver_contract, "BOOT_LIMIT_S", 840.0)
        disk = tmp_path / "tiny.qcow2"
        disk.write_bytes(tiny_template().qcow2.read_bytes())
        before = hashlib.sha256(disk.read_bytes()).hexdigest()
        changes = {"disk": disk, "memory_bytes": 256 * MIB, "context_label": ContextLabel.CONTEXT}
        context = BROKEN.write(tmp_path / "job")
        handle = await driver.prepare(msgspec.structs.replace(spec, context=context, **changes), tmp_path / "machine")
        try:
            await driver.start(handle)
            events = await events_until_exit(driver, handle)
            told = [event for event in events if not isinstance(event, Output)]
            assert told == [Booted(), ContextStarted(), ContextExited(7), Exited(ExitCause.POWERED_OFF)]
            assert output_of(events, Stream.STDOUT) == b"first\n\nthird without end"
            assert read_scratch(driver.scratch(handle), "/out/file") == b"result\n"
            assert hashlib.sha256(disk.read_bytes()).hexdigest() == before
        finally:
            await driver.destroy(handle)

    async def test_guest_that_turns_off_and_one_that_resets_are_told_apart(
        self, driver: VirtualBoxDriver, new_driver: Callable[[], VirtualBoxDriver], prepare: Any, tmp_path: Path
    ) -> None:
        for code, cause in ((ending(b"! booted\n"), ExitCause.POWERED_OFF), (RESET, ExitCause.RESET)):
            handle = await prepare(BROKEN, disk=boot_disk(tmp_path / f"{cause}.qcow2", code))
            await driver.start(handle)
            end = (await events_until_exit(driver, handle))[-1]
            assert isinstance(end, Exited) and end.cause is cause
            assert await new_driver().recover(handle) == end

    async def test_guest_that_writes_without_end_is_cut_off_and_runs_on(
        self, driver: VirtualBoxDriver, prepare: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bound = 512 << 10  # more than VirtualBox's own log
        monkeypatch.setattr(base, "LOG_MAX_BYTES", bound)
        handle = await prepare(BROKEN, disk=boot_disk(tmp_path / "chatter.qcow2", CHATTER))
        await driver.start(handle)
        log, read, reading = Path(handle.workdir) / base.CONSOLE_LOG, 0, driver.events(handle)
        async with asyncio.timeout(300):
            while read < bound:
                event = await anext(reading)
                read += len(event.data) if isinstance(event, Output) else 0
            waiting = asyncio.ensure_future(anext(reading))
            size = -1
            while size != (size := log.stat().st_size):
                await asyncio.wait({waiting}, timeout=1.0)
        assert not waiting.done()
        assert await driver.recover(handle) == Running()
        await driver.stop(handle, grace_s=0)
        assert await waiting == Exited(ExitCause.STOPPED)

    async def test_two_machines_share_a_disk_and_nothing_else(self, driver: VirtualBoxDriver, prepare: Any) -> None:
        first, second = await prepare(TICKING), await prepare(TICKING)
        for handle in (first, second):
            await driver.start(handle)
        for handle in (first, second):
            await driver_contract._ticks_of(driver, handle, 2)
        await driver.pause(first)
        await driver_contract._ticks_of(driver, second, 5)
        await driver.destroy(first)
        assert await driver.recover(second) == Running()

    async def test_service_that_is_killed_ends_the_machine_as_this_pcs_fault(self, driver: VirtualBoxDriver, prepare: Any) -> None:
        handle = await prepare(TICKING)
        await driver.start(handle)
        await driver_contract._ticks_of(driver, handle, 1)
        for identity in find_by_variable("VBOX_IPC_SOCKETID", f"deskgrid-{handle.token}"):
            if "VBoxSVC" in Path(f"/proc/{identity.pid}/cmdline").read_text():
                os.kill(identity.pid, 9)
        end = (await events_until_exit(driver, handle))[-1]
        assert isinstance(end, Exited) and end.cause is ExitCause.KILLED

    async def test_machine_whose_worker_was_killed_while_virtualbox_saved_it_goes_on(
        self, driver: VirtualBoxDriver, new_driver: Callable[[], VirtualBoxDriver], prepare: Any
    ) -> None:
        handle = await prepare(TICKING)
        await driver.start(handle)
        await driver_contract._ticks_of(driver, handle, 3)
        identity = find_by_token(handle.token)
        assert identity is not None
        await driver._manage(handle, "savestate")
        assert await processes.wait_gone(identity, SystemClock(), limit_s=60)
        later = new_driver()
        assert await later.recover(handle) == Saved()
        await later.restore(handle)
        ticks = await driver_contract._ticks_of(later, handle, 8)
        assert ticks == list(range(1, len(ticks) + 1))

    async def test_disk_that_virtualbox_cannot_read_is_refused_before_it_starts(
        self, driver: VirtualBoxDriver, spec: MachineSpec, tmp_path: Path
    ) -> None:
        disk = tmp_path / "wide.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-o", "extended_l2=on", disk, "8M"], check=True)
        with pytest.raises(MachineFailed, match="cannot read"):
            await driver.prepare(msgspec.structs.replace(spec, disk=disk), tmp_path / "machine")
        assert not (tmp_path / "machine").exists()
        assert processes.find_by_token(str(tmp_path)) is None
