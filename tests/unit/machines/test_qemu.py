"""QEMU's command line says what the guest may have, and nothing has to be guessed."""

from __future__ import annotations

import itertools
import subprocess
from pathlib import Path

import msgspec
import pytest

from deskgrid.clock import SystemClock
from deskgrid.errors import DriverUnusable, MachineFailed
from deskgrid.machines import base, qemu
from deskgrid.machines.driver import Doorway, MachineSpec
from deskgrid.machines.qemu import QemuDriver, command_line
from deskgrid.model.machines import DiskFormat, MachineKind, Network
from deskgrid.units import GIB, MIB

SPEC = MachineSpec("job-1/attempt-2", MachineKind.VM, 300 * MIB, 3, GIB, disk=Path("/cache/ab"))


def line(spec: MachineSpec = SPEC, accelerator: str = "kvm", platform: str = "linux") -> list[str]:
    return command_line(spec, binary="qemu", accelerator=accelerator, token="t0ken", platform=platform)


def values(command: list[str], option: str) -> list[str]:
    return [value for word, value in itertools.pairwise(command) if word == option]


def devices(command: list[str]) -> list[str]:
    """Name the kinds of hardware that the guest sees."""
    return [value.partition(",")[0] for value in values(command, "-device")]


def nodes(command: list[str]) -> dict[str, dict]:
    return {node["node-name"]: node for node in map(msgspec.json.decode, values(command, "-blockdev"))}


def test_guest_gets_memory_and_cpus_of_the_spec() -> None:
    assert values(line(), "-m") == ["300M"]
    assert values(line(), "-smp") == ["3"]


def test_token_is_in_the_arguments_and_the_name_cannot_break_out() -> None:
    named = msgspec.structs.replace(SPEC, name="x,debug-threads=on\n ü")
    assert values(line(named), "-name") == ["guest=x_debug-threads_on___@t0ken"]


def test_every_format_is_given_down_to_the_file() -> None:
    found = nodes(line())
    assert {name: node["driver"] for name, node in found.items()} == {
        "base": "qcow2",
        "disk": "qcow2",
        "scratch": "qcow2",
        "context": "raw",
    }
    assert all(node["file"]["driver"] == "file" for node in found.values())


def test_cached_disk_is_read_only_and_has_no_backing_file() -> None:
    base = nodes(line())["base"]
    assert base["read-only"] is True
    assert base["file"] == {"driver": "file", "filename": "/cache/ab", "read-only": True, "auto-read-only": False}
    assert base["backing"] is None
    assert nodes(line())["disk"]["backing"] == "base"


def test_iso_is_attached_as_a_cd_in_the_place_of_the_first_disk() -> None:
    command = line(msgspec.structs.replace(SPEC, disk_format=DiskFormat.ISO))
    assert nodes(command)["disk"]["read-only"] is True
    assert "base" not in nodes(command)
    assert any(word.startswith("ide-cd,drive=disk,") and "bus=ide.0,unit=0" in word for word in command)


def test_disks_are_in_the_places_that_guests_know() -> None:
    drives = [value for value in values(line(), "-device") if value.startswith("ide-")]
    places = [tuple(part for part in drive.split(",") if part.partition("=")[0] in ("drive", "bus", "unit")) for drive in drives]
    assert places == [
        ("drive=disk", "bus=ide.0", "unit=0"),
        ("drive=scratch", "bus=ide.0", "unit=1"),
        ("drive=context", "bus=ide.1", "unit=1"),
    ]


def test_disk_errors_freeze_the_machine() -> None:
    writable = [value for value in values(line(), "-device") if value.startswith("ide-hd")]
    assert len(writable) == 2
    assert all("werror=stop" in device and "rerror=stop" in device for device in writable)


def test_nothing_is_there_that_was_not_asked_for() -> None:
    command = line()
    assert "-nodefaults" in command
    assert "-no-user-config" in command
    assert not {"-nic", "-netdev", "-net", "-usb"} & set(command)
    assert command[command.index("-vnc") + 1] == "none,password=on"
    assert devices(command) == ["ide-hd", "ide-hd", "ide-cd", "VGA", "isa-serial", "isa-serial"]


def test_with_a_network_there_is_one_card_and_the_offered_ports_are_forwarded_from_the_cage() -> None:
    reach = (Doorway("db", "10.64.1.1", 5432, "db.job-1"),)
    spec = msgspec.structs.replace(SPEC, network=Network.OVERLAY, offer=(("ssh", 22), ("web", 8080), ("also", 8080)), reach=reach)
    command = line(spec)
    assert values(command, "-netdev") == ["user,id=net,ipv6=off,hostfwd=tcp:127.0.0.1:22-:22,hostfwd=tcp:127.0.0.1:8080-:8080"]
    assert values(command, "-device").count("virtio-net-pci,netdev=net,romfile=") == 1
    assert len(devices(command)) == len(devices(line())) + 1


def test_system_calls_are_bounded_where_the_system_can() -> None:
    assert values(line(), "-sandbox") == ["on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"]
    assert values(line(platform="darwin"), "-sandbox") == []


# ---- networks


@pytest.mark.parametrize(
    ("lent", "networks"),
    [
        ({}, {Network.NONE, Network.OVERLAY}),
        ({"internet": True}, {Network.NONE, Network.OVERLAY, Network.INTERNET}),
        ({"overlay": False, "internet": True}, {Network.NONE}),
    ],
)
async def test_networks_are_those_that_the_owner_allows(tmp_path: Path, lent: dict[str, bool], networks: set[Network]) -> None:
    driver = QemuDriver(SystemClock(), binary=fake_qemu(tmp_path, "exit 33\n"), accelerator="tcg", **lent)
    assert set((await driver.fingerprint()).networks) == networks
    for network in set(Network) - networks:
        with pytest.raises(MachineFailed):
            await driver.prepare(msgspec.structs.replace(SPEC, network=network), tmp_path / "machine")


async def test_pc_without_cages_offers_no_network_and_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def probe(clock: object, place: object) -> str:
        return "no cage here"

    monkeypatch.setattr(base.cage, "probe_cage", probe)
    driver = QemuDriver(SystemClock(), binary=fake_qemu(tmp_path, "exit 33\n"), accelerator="tcg")
    found = await driver.fingerprint()
    assert (found.usable, found.networks, found.reason) == (True, (Network.NONE,), "no cage here")
    with pytest.raises(MachineFailed):
        await driver.prepare(msgspec.structs.replace(SPEC, network=Network.OVERLAY), tmp_path / "machine")


# ---- fingerprint, with programs that stand for QEMU


def fake_qemu(folder: Path, body: str) -> str:
    """Write a program that answers --version and else does `body`, with $accel set."""
    program = folder / "qemu"
    program.write_text(
        "#!/bin/sh\n"
        'case "$1" in --version) echo "QEMU emulator version 9.1.2 (x)"; exit 0;; esac\n'
        'while [ $# -gt 0 ]; do [ "$1" = -accel ] && accel=$2; shift; done\n' + body
    )
    program.chmod(0o755)
    return str(program)


@pytest.fixture
def usable_kvm(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu.sys, "platform", "linux")
    monkeypatch.setattr(qemu, "KVM_DEVICE", Path("/dev/null"))


@pytest.mark.usefixtures("usable_kvm")
async def test_hardware_that_runs_the_probe_is_taken(tmp_path: Path) -> None:
    driver = QemuDriver(SystemClock(), binary=fake_qemu(tmp_path, "exit 33\n"))
    found = await driver.fingerprint()
    assert (found.usable, found.accelerator, found.version, found.reason) == (True, "kvm", "9.1.2", "")


@pytest.mark.usefixtures("usable_kvm")
async def test_hardware_on_which_the_probe_hangs_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu, "HARDWARE_LIMIT_S", 0.2)
    driver = QemuDriver(SystemClock(), binary=fake_qemu(tmp_path, "[ $accel = tcg ] && exit 33\nexec sleep 60\n"))
    found = await driver.fingerprint()
    assert (found.usable, found.accelerator) == (True, "tcg")
    assert "kvm does not work here" in found.reason


@pytest.mark.usefixtures("usable_kvm")
async def test_qemu_that_runs_no_guest_at_all_is_not_usable_and_says_why(tmp_path: Path) -> None:
    driver = QemuDriver(SystemClock(), binary=fake_qemu(tmp_path, "echo no firmware >&2; exit 1\n"))
    found = await driver.fingerprint()
    assert not found.usable
    assert "no firmware" in found.reason


async def test_missing_kvm_device_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(qemu.sys, "platform", "linux")
    monkeypatch.setattr(qemu, "KVM_DEVICE", tmp_path / "kvm")
    found = await QemuDriver(SystemClock(), binary=fake_qemu(tmp_path, "exit 33\n")).fingerprint()
    assert (found.usable, found.accelerator) == (True, "tcg")
    assert "firmware" in found.reason


async def test_missing_qemu_is_not_usable_and_says_how_to_get_it(tmp_path: Path) -> None:
    driver = QemuDriver(SystemClock(), binary=str(tmp_path / "none"))
    found = await driver.fingerprint()
    assert not found.usable
    assert "apt-get install" in found.reason


async def test_machine_without_a_disk_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineFailed):
        await QemuDriver(SystemClock()).prepare(msgspec.structs.replace(SPEC, disk=None), tmp_path / "machine")
    assert not (tmp_path / "machine").exists()


async def test_start_on_a_pc_that_cannot_says_why(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "1M"], check=True)
    driver = QemuDriver(SystemClock(), binary=str(tmp_path / "none"))
    handle = await driver.prepare(msgspec.structs.replace(SPEC, disk=disk), tmp_path / "machine")
    with pytest.raises(DriverUnusable, match="not installed"):
        await driver.start(handle)
    await driver.destroy(handle)
    assert not (tmp_path / "machine").exists()
