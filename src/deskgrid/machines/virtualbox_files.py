"""The files of a VirtualBox machine, all written by us: no call of VBoxManage makes or registers anything, so nothing of it can be left behind.

    home/VirtualBox.xml     settings and registry of a VirtualBox that knows this one machine (VBOX_USER_HOME)
    vm/vm.vbox              the machine (schema 1.20 of VirtualBox 7); VirtualBox rewrites it while it runs
    disk.vdi                a differencing disk over the cached one
    scratch.img             raw, attached as it is

The cached disk is registered as immutable: as a normal one VirtualBox would open it for writing, where it may, and change its header.

A differencing VDI (version 1.1; VDICore.h of VirtualBox, all numbers little-endian): 64 bytes of text, signature, version, size of the header, type 4,
flags, 256 bytes of comment, offsets of block map and data, geometry (4 x u32), size u64, block size u32, extra u32, blocks, blocks allocated, four
UUIDs (own, of its last change, parent's, of the parent's last change), geometry. The block map has -1 for each block: it is read from the parent.
"""

from __future__ import annotations

import struct
import uuid
from pathlib import Path
from xml.sax.saxutils import quoteattr

from msgspec import Struct

__all__ = ["Machine", "create_differencing", "write_machine"]

_BLOCK = 1 << 20
_DATA_AT_LEAST = 0x200
_SIGNATURE, _VERSION, _HEADER_BYTES, _DIFFERENCING = 0xBEDA107F, 0x00010001, 0x190, 4


class Machine(Struct, frozen=True, kw_only=True):
    """What the files are made from."""

    workdir: Path
    identity: uuid.UUID
    name: str
    memory_mib: int
    cpus: int
    base: Path
    iso: bool
    """The base is a CD in the place of the first disk; otherwise it is a qcow2."""
    virtual_bytes: int
    """Of the base."""
    console: str
    channel: str
    scratch: str
    """Name of the raw scratch disk in `workdir`; empty: none."""
    context: str
    """Name of the context CD in `workdir`; empty: none."""
    interpreted: bool = False
    """Let VirtualBox interpret the guest where it has no kernel module (tests; some fifty times slower)."""


def create_differencing(path: Path, size_bytes: int, *, own: uuid.UUID, parent: uuid.UUID) -> None:
    """Create an empty differencing disk of a size."""
    blocks = -(-size_bytes // _BLOCK)
    data_at = -(-(_DATA_AT_LEAST + 4 * blocks) // _BLOCK) * _BLOCK
    header = b"<<< deskgrid differencing disk >>>\n".ljust(64, b"\0")
    header += struct.pack("<IIIII", _SIGNATURE, _VERSION, _HEADER_BYTES, _DIFFERENCING, 0) + bytes(256)
    header += struct.pack("<IIIIIIIQIIII", _DATA_AT_LEAST, data_at, 0, 0, 0, 512, 0, size_bytes, _BLOCK, 0, blocks, 0)
    header += own.bytes_le + uuid.uuid4().bytes_le + parent.bytes_le + bytes(16) + struct.pack("<IIII", 0, 0, 0, 512)
    with path.open("xb") as file:
        file.write(header.ljust(_DATA_AT_LEAST, b"\0"))
        file.write(b"\xff" * 4 * blocks)
        file.truncate(data_at)


def write_machine(machine: Machine) -> None:
    """Write all files of a machine but scratch and context."""
    workdir = machine.workdir
    for name in ("home", "vm", "saved"):
        (workdir / name).mkdir()
    disks, cds, devices = _media(machine)
    identity = _braced(machine.identity)
    settings = _VM.format(
        id=identity,
        name=quoteattr(machine.name),
        saved=quoteattr(str(workdir / "saved")),
        engine=' executionEngine="Recompiler"' if machine.interpreted else "",
        disks=disks,
        cds=cds,
        extra=_extra(machine),
        memory=machine.memory_mib,
        first="DVD" if machine.iso else "HardDisk",
        console=quoteattr(str(workdir / machine.console)),
        channel=quoteattr(str(workdir / machine.channel)),
        devices=devices,
        cpus=machine.cpus,
    )
    (workdir / "vm" / "vm.vbox").write_text(settings, encoding="utf-8")
    place, machines = quoteattr(str(workdir / "vm" / "vm.vbox")), quoteattr(str(workdir / "machines"))
    (workdir / "home" / "VirtualBox.xml").write_text(_HOME.format(id=identity, place=place, machines=machines), encoding="utf-8")


def _media(machine: Machine) -> tuple[str, str, str]:
    """Return the XML of hard disks, CDs and what is attached where; make the differencing disk."""
    workdir, disks, cds, devices = machine.workdir, "", "", ""
    base = uuid.uuid4()
    if machine.iso:
        cds += _CD.format(id=_braced(base), file=quoteattr(str(machine.base)))
        devices += _ATTACHED_CD.format(id=_braced(base), port=0, device=0)
    else:
        own = uuid.uuid4()
        create_differencing(workdir / "disk.vdi", machine.virtual_bytes, own=own, parent=base)
        file, overlay = quoteattr(str(machine.base)), quoteattr(str(workdir / "disk.vdi"))
        disks += _BASE.format(id=_braced(base), file=file, own=_braced(own), overlay=overlay)
        devices += _ATTACHED_DISK.format(id=_braced(own), port=0, device=0)
    if machine.scratch:
        scratch = _braced(uuid.uuid4())
        disks += _RAW.format(id=scratch, file=quoteattr(str(workdir / machine.scratch)))
        devices += _ATTACHED_DISK.format(id=scratch, port=0, device=1)
    if machine.context:
        context = _braced(uuid.uuid4())
        cds += _CD.format(id=context, file=quoteattr(str(workdir / machine.context)))
        devices += _ATTACHED_CD.format(id=context, port=1, device=1)
    return disks, cds, devices


def _extra(machine: Machine) -> str:
    # A machine boots once: a guest that reboots ends, which its log tells from a power-off.
    values = {"VBoxInternal2/TurnResetIntoPowerOff": "1"}
    if machine.interpreted:
        values["VBoxInternal/HM/FallbackToIEM"] = "1"
    return "".join(f'<ExtraDataItem name="{name}" value="{value}"/>' for name, value in values.items())


def _braced(identity: uuid.UUID) -> str:
    return f"{{{identity}}}"


_CD = '<Image uuid="{id}" location={file}/>'
_RAW = '<HardDisk uuid="{id}" location={file} format="RAW" type="Normal"/>'
_BASE = (
    '<HardDisk uuid="{id}" location={file} format="QCOW" type="Immutable">'
    '<HardDisk uuid="{own}" location={overlay} format="VDI"/></HardDisk>'
)
_ATTACHED_DISK = (
    '<AttachedDevice type="HardDisk" hotpluggable="false" port="{port}" device="{device}"><Image uuid="{id}"/></AttachedDevice>'
)
_ATTACHED_CD = (
    '<AttachedDevice passthrough="false" type="DVD" hotpluggable="false" port="{port}" device="{device}">'
    '<Image uuid="{id}"/></AttachedDevice>'
)
_VM = """<?xml version="1.0"?>
<VirtualBox xmlns="http://www.virtualbox.org/" version="1.20-linux">
  <Machine uuid="{id}" name={name} OSType="Linux26_64" snapshotFolder={saved} lastStateChange="2026-01-01T00:00:00Z" processPriority="Low"{engine}>
    <MediaRegistry><HardDisks>{disks}</HardDisks><DVDImages>{cds}</DVDImages></MediaRegistry>
    <ExtraData>{extra}</ExtraData>
    <Hardware>
      <Memory RAMSize="{memory}"/>
      <Paravirt provider="KVM"/>
      <Boot><Order position="1" device="{first}"/><Order position="2" device="None"/><Order position="3" device="None"/><Order position="4" device="None"/></Boot>
      <Display controller="VMSVGA" VRAMSize="9"/>
      <RemoteDisplay enabled="false"/>
      <Firmware>
        <IOAPIC enabled="true"/><Logo fadeIn="false" fadeOut="false" displayTime="0"/><BootMenu mode="Disabled"/>
        <SmbiosUuidLittleEndian enabled="true"/><AutoSerialNumGen enabled="true"/>
      </Firmware>
      <Network><Adapter slot="0" type="82540EM"><NAT localhost-reachable="false"/></Adapter></Network>
      <UART>
        <Port slot="0" enabled="true" IOAddress="0x3f8" IRQ="4" path={console} hostMode="RawFile"/>
        <Port slot="1" enabled="true" IOAddress="0x2f8" IRQ="3" path={channel} hostMode="RawFile"/>
      </UART>
      <AudioAdapter driver="Null"/>
      <Clipboard/>
      <StorageControllers>
        <StorageController name="IDE" type="PIIX4" PortCount="2" useHostIOCache="true" Bootable="true">{devices}</StorageController>
      </StorageControllers>
    </Hardware>
    <Platform architecture="x86">
      <RTC localOrUTC="UTC"/>
      <CPU count="{cpus}" executionCap="100"/>
      <x86><CPU>
        <HardwareVirtExLargePages enabled="false"/><PAE enabled="false"/><LongMode enabled="true"/><TripleFaultReset enabled="true"/><X2APIC enabled="true"/>
      </CPU></x86>
    </Platform>
  </Machine>
</VirtualBox>
"""
_HOME = """<?xml version="1.0"?>
<VirtualBox xmlns="http://www.virtualbox.org/" version="1.12-linux">
  <Global>
    <MachineRegistry><MachineEntry uuid="{id}" src={place}/></MachineRegistry>
    <Updates enabled="false"/>
    <SystemProperties defaultMachineFolder={machines} LogHistoryCount="0"/>
  </Global>
</VirtualBox>
"""
