"""What VirtualBox's log and words mean, with lines recorded from the real 7.2; the files of a machine; calls that fail for a while."""

from __future__ import annotations

import json
import subprocess
import uuid
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from deskgrid.clock import FakeClock
from deskgrid.errors import MachineFailed
from deskgrid.machines import vboxmanage
from deskgrid.machines.driver import ExitCause, Exited
from deskgrid.machines.virtualbox import is_saved, read_log
from deskgrid.machines.virtualbox_files import Machine, create_differencing, write_machine
from deskgrid.units import GIB, MIB

STARTED = """\
00:00:00.423722 Changing the VM state from 'CREATED' to 'POWERING_ON'
00:00:00.423910 Changing the VM state from 'POWERING_ON' to 'RUNNING'
00:00:00.423914 Console: Machine state changed to 'Running'
"""
OFF = """\
00:03:13.860077 Changing the VM state from 'RUNNING' to 'POWERING_OFF'
00:03:13.861766 Changing the VM state from 'POWERING_OFF' to 'OFF'
00:03:13.862463 Console: Machine state changed to 'Stopping'
00:03:13.863026 Console::powerDown(): A request to power off the VM has been issued (mMachineState=Stopping, InUninit=0)
00:03:13.868407 Console: Machine state changed to 'PoweredOff'
00:03:13.875611 VBoxHeadless: exiting
"""
BY_US = """\
00:00:10.010207 Console: Machine state changed to 'Stopping'
00:00:10.010878 Console::powerDown(): A request to power off the VM has been issued (mMachineState=Stopping, InUninit=0)
00:00:10.011975 Changing the VM state from 'RUNNING' to 'POWERING_OFF'
"""
SAVED = """\
00:00:01.799955 Console: Machine state changed to 'Saving'
00:00:01.804381 Changing the VM state from 'SUSPENDED' to 'SAVING'
00:00:01.845993 Console::powerDown(): A request to power off the VM has been issued (mMachineState=Saving, InUninit=0)
00:00:01.846012 Changing the VM state from 'SUSPENDED' to 'POWERING_OFF'
00:00:01.852283 Console: Machine state changed to 'Saved'
00:00:01.859665 VBoxHeadless: exiting
"""
FULL = """\
00:00:04.356407 Console: Machine state changed to 'Paused'
00:00:04.357026 Console: VM runtime error: fatal=false, errorID=DevATA_DISKFULL message="Host system reported disk full. VM execution is suspended."
"""
STUCK = "00:00:00.458463 Changing the VM state from 'RUNNING' to 'GURU_MEDITATION'\n"
S5 = "00:03:13.860041 ACPI: Entering S5 power state (power down)\n"
APM = "00:00:03.860041 PcBios: APM shutdown request\n"
RESET = "00:00:00.617790 Reset initiated by keyboard controller\n"


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        (STARTED + S5 + OFF, ExitCause.POWERED_OFF),
        (STARTED + APM + OFF, ExitCause.POWERED_OFF),
        (STARTED + RESET + OFF, ExitCause.RESET),
        (STARTED + OFF, ExitCause.RESET),
        (STARTED + BY_US, ExitCause.KILLED),
        (STARTED + FULL, ExitCause.IO_ERROR),
        (STARTED + FULL + BY_US, ExitCause.IO_ERROR),
        (STARTED + STUCK, ExitCause.RESET),
        (STARTED + "00:00:21.0 VBoxHeadless: VBoxSVC became unavailable, exiting.\n", ExitCause.KILLED),
    ],
)
def test_log_tells_how_a_machine_ended(log: str, cause: ExitCause) -> None:
    journal = read_log(log)
    assert journal.began
    end = journal.exit()
    assert end is not None and end.cause is cause


@pytest.mark.parametrize("log", ["", STARTED, STARTED + SAVED, "nonsense\n" * 100])
def test_log_of_a_machine_that_was_killed_or_saved_tells_no_end(log: str) -> None:
    assert read_log(log).exit() is None
    assert is_saved(log) == (SAVED in log)
    assert read_log(log).began == (STARTED in log)


def test_what_a_guest_writes_into_the_log_counts_for_nothing() -> None:
    forged = "".join(f"00:00:09.1 PcBios: {line[16:]}\n" for line in (FULL + STUCK + SAVED).splitlines())
    assert read_log(STARTED + forged).exit() is None
    assert not is_saved(STARTED + forged)
    assert read_log(STARTED + forged + S5 + OFF).exit() == Exited(ExitCause.POWERED_OFF)


@pytest.mark.parametrize(
    ("words", "meaning"),
    [
        ("VBoxHeadless: Error -1908 in suplibOsInit!\nVBoxHeadless: Kernel driver not installed", "modprobe vboxdrv"),
        ("VT-x is being used by another hypervisor (VERR_VMX_IN_VMX_ROOT_MODE)", "another hypervisor"),
        ("AMD-V is being used by another hypervisor (VERR_SVM_IN_USE).", "another hypervisor"),
        ("VT-x is disabled in the BIOS for all CPU modes (VERR_VMX_MSR_ALL_VMX_DISABLED)", "firmware"),
        ("AMD-V is disabled in the BIOS (or by the host OS) (VERR_SVM_DISABLED)", "firmware"),
        ("Failed to allocate (VERR_NO_MEMORY)", "memory_bytes"),
        ("VBoxHeadless: Error -10 in SUPR3HardenedMain!\nVBoxHeadless: Effective UID is not root", "sandbox"),
        ("VERR_SSM_LOAD_CPUID_MISMATCH", "saved state"),
        ("one\ntwo\nthe last words", "the last words"),
        ("", "no reason"),
    ],
)
def test_words_of_virtualbox_are_explained_with_what_to_do(words: str, meaning: str) -> None:
    assert meaning in vboxmanage.explain(words)


# ---- calls


def manage(folder: Path, script: str) -> Path:
    folder.mkdir(exist_ok=True)
    (folder / "VBoxManage").write_text(f"#!/bin/sh\n{script}")
    (folder / "VBoxManage").chmod(0o755)
    return folder


async def calling(folder: Path, clock: FakeClock) -> str:
    import asyncio

    task = asyncio.create_task(vboxmanage.call(folder, ["controlvm", "vm", "pause"], {"PATH": "/usr/bin:/bin"}, clock))
    while not task.done():
        await clock.advance(0.1)
        await asyncio.sleep(0.005)
    return task.result()


@pytest.mark.parametrize("code", ["NS_ERROR_FAILURE (0x80004005)", "VBOX_E_INVALID_OBJECT_STATE (0x80bb0007)", "(0x80080005)"])
async def test_call_that_meets_a_lock_is_made_again_with_growing_pauses(tmp_path: Path, code: str) -> None:
    folder = manage(
        tmp_path / "vb",
        f'cd {tmp_path}; echo x >>tries; [ "$(wc -l <tries)" -lt 4 ] && {{ echo "error: {code}"; exit 1; }}; echo done\n',
    )
    clock = FakeClock()
    began = clock.now()
    assert await calling(folder, clock) == "done\n"
    assert clock.now() - began >= 0.5 + 1 + 2
    assert len((tmp_path / "tries").read_text().split()) == 4


async def test_call_that_keeps_failing_is_given_up_and_another_error_at_once(tmp_path: Path) -> None:
    clock = FakeClock()
    folder = manage(tmp_path / "vb", f"echo x >>{tmp_path}/tries; echo 'Code NS_ERROR_FAILURE (0x80004005)'; exit 1\n")
    with pytest.raises(MachineFailed, match="controlvm"):
        await calling(folder, clock)
    assert len((tmp_path / "tries").read_text().split()) == 5
    manage(folder, f"echo x >>{tmp_path}/others; echo 'Invalid machine state: Paused (0x80bb0002)'; exit 1\n")
    with pytest.raises(MachineFailed, match="Paused"):
        await calling(folder, clock)
    assert len((tmp_path / "others").read_text().split()) == 1


async def test_call_that_hangs_is_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vboxmanage, "CALL_S", 0.1)
    folder = manage(tmp_path / "vb", f"echo $$ >{tmp_path}/pid; exec sleep 600\n")
    with pytest.raises(MachineFailed, match="no answer"):
        await calling(folder, FakeClock())
    assert not Path(f"/proc/{(tmp_path / 'pid').read_text().strip()}").exists()


# ---- files


@pytest.mark.parametrize("size", [512, MIB, 21 * MIB + 512, 40 * GIB])
def test_differencing_disk_is_what_others_take_for_one(tmp_path: Path, size: int) -> None:
    create_differencing(tmp_path / "disk.vdi", size, own=uuid.uuid4(), parent=uuid.uuid4())
    assert (tmp_path / "disk.vdi").stat().st_blocks * 512 < MIB
    # QEMU reads VDIs, but none with a parent: that, and nothing before it, is what it finds wrong.
    told = subprocess.run(["qemu-img", "info", "-f", "vdi", tmp_path / "disk.vdi"], capture_output=True, text=True, check=False)
    assert "unsupported VDI image (non-NULL link UUID)" in told.stderr or "type" in told.stderr
    data = bytearray((tmp_path / "disk.vdi").read_bytes())
    data[0x4C:0x50] = (1).to_bytes(4, "little")
    data[0x1A8:0x1B8] = bytes(16)
    (tmp_path / "alone.vdi").write_bytes(data)
    info = ["qemu-img", "info", "--output=json", "-f", "vdi", tmp_path / "alone.vdi"]
    found = json.loads(subprocess.run(info, check=True, capture_output=True).stdout)
    assert found["virtual-size"] == size


@pytest.mark.parametrize("iso", [False, True])
def test_names_cannot_change_the_machine(tmp_path: Path, iso: bool) -> None:
    workdir = tmp_path / "a \"b\" <c> & 'd'"
    workdir.mkdir()
    machine = Machine(
        workdir=workdir,
        identity=uuid.uuid4(),
        name='x" cheats="1',
        memory_mib=256,
        cpus=3,
        base=tmp_path / 'base"><Adapter enabled="true"/>.qcow2',
        iso=iso,
        virtual_bytes=8 * MIB,
        console="console.log",
        channel="channel.log",
        scratch="scratch.img",
        context="context.iso",
    )
    write_machine(machine)
    space = "{http://www.virtualbox.org/}"
    root = ElementTree.parse(workdir / "vm" / "vm.vbox").getroot()
    [vm] = root.findall(f"{space}Machine")
    assert vm.attrib["name"] == 'x" cheats="1'
    assert vm.attrib["snapshotFolder"] == str(workdir / "saved")
    [adapter] = root.iter(f"{space}Adapter")
    assert "enabled" not in adapter.attrib
    locations = [
        one.attrib["location"] for tag in ("HardDisk", "Image") for one in root.iter(f"{space}{tag}") if "location" in one.attrib
    ]
    assert str(machine.base) in locations
    bases = [one for one in root.iter(f"{space}HardDisk") if one.attrib["location"] == str(machine.base)]
    assert [one.attrib["type"] for one in bases] == ([] if iso else ["Immutable"])
    ElementTree.parse(workdir / "home" / "VirtualBox.xml")
