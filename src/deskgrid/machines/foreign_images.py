"""Disk images of other hypervisors, as hostile input: what may be given to the converter, and as what.

    kind                taken                                           refused
    vmdk                monolithicSparse, streamOptimized               of several files (flat, split), changes to another disk
    vdi                 dynamic, fixed                                  undo, changes to another disk
    vhd                 dynamic, fixed                                  changes to another disk
    vhdx                dynamic, fixed                                  changes to another disk

The first bytes decide; nothing that an image names is opened. The converter (qemu-img, confined to this one file) reads the rest.

    VMDK   "Virtual Disk Format 5.0", VMware 2011: sparse extent header, little-endian; the descriptor is text within the file
    VDI    VDICore.h of VirtualBox: signature at 64, header at 72, little-endian
    VHD    "Virtual Hard Disk Image Format Specification", Microsoft 2006: footer in the last sector, big-endian
    VHDX   MS-VHDX: region table at 192 KiB, metadata region, little-endian
"""

from __future__ import annotations

import re
import struct
import uuid
from collections.abc import Callable

from msgspec import Struct

from deskgrid.errors import BadImage
from deskgrid.machines.ext4 import ReadAt

__all__ = ["Foreign", "read_vdi", "read_vhd", "read_vhdx", "read_vmdk"]


class Foreign(Struct, frozen=True):
    """An image that can be converted."""

    driver: str
    """What QEMU calls the format."""
    virtual_bytes: int
    options: tuple[str, ...] = ()
    """For QEMU's driver, KEY=VALUE."""


Reader = Callable[[ReadAt, int], Foreign]
_STANDS_ALONE = "export it as a disk of its own (VBoxManage clonemedium, qemu-img convert, or the hypervisor's own export)"


def _only_changes() -> BadImage:
    return BadImage("has only the changes to another disk", hint=_STANDS_ALONE)


def _in_pieces() -> BadImage:
    return BadImage("keeps its data in other files", hint="make it one file: qemu-img convert -O qcow2 FILE disk.qcow2")


# ---- VMDK

_SECTOR = 512
_VMDK = struct.Struct("<4sIIQQQQIQQQB")
_MOST_DESCRIPTOR_BYTES = 1 << 20
_QEMU_READS = slice(_SECTOR, 21 * _SECTOR)
"""Where QEMU looks for a parent, whatever the header says; it opens one that is named anywhere in it, whatever parentCID is."""
_EXTENT = re.compile(rb"^[ \t]*(?:RW|RDONLY|NOACCESS)[ \t]+\d+[ \t]+(\w+)", re.MULTILINE)


def read_vmdk(read_at: ReadAt, size: int) -> Foreign:
    """Check a VMDK. Raise BadImage."""
    head = read_at(0, _SECTOR)
    if not head.startswith(b"KDMV") or len(head) < _SECTOR:
        raise _in_pieces()  # a descriptor alone, or one of the pieces it names
    _, version, _, capacity, grain, at, sectors, *_ = _VMDK.unpack_from(head)
    if not 1 <= version <= 3 or not capacity or not grain:
        # Without capacity QEMU takes it for a descriptor, which names files.
        raise BadImage("has a header that makes no sense")
    if not at or not sectors:
        raise _in_pieces()
    if at * _SECTOR != _QEMU_READS.start:
        raise BadImage("has its description where nobody writes it")
    length = sectors * _SECTOR
    if length > _MOST_DESCRIPTOR_BYTES or at * _SECTOR + length > size:
        raise BadImage("is cut short or damaged: its description is outside the file")
    description = read_at(at * _SECTOR, length).rstrip(b"\0")
    parent = _word(description, rb"parentCID")
    both = description + read_at(_QEMU_READS.start, _QEMU_READS.stop - _QEMU_READS.start)
    if parent not in (b"", b"ffffffff") or b"parentfilenamehint" in both.lower():
        raise _only_changes()
    if _EXTENT.findall(description) != [b"SPARSE"]:
        raise _in_pieces()
    return Foreign("vmdk", capacity * _SECTOR)


def _word(description: bytes, key: bytes) -> bytes:
    """Return a value of a VMDK's description, in lower case; empty if it is not there."""
    found = re.search(rb"^[ \t]*" + key + rb'[ \t]*=[ \t]*"?([^"\r\n]*)', description, re.MULTILINE | re.IGNORECASE)
    return found[1].strip().lower() if found else b""


# ---- VDI


def read_vdi(read_at: ReadAt, size: int) -> Foreign:
    """Check a VDI. Raise BadImage."""
    head = read_at(0, _SECTOR)
    if len(head) < _SECTOR:
        raise BadImage("is cut short")
    version, _, kind = struct.unpack_from("<III", head, 68)
    (virtual_bytes,) = struct.unpack_from("<Q", head, 368)
    link, parent = head[424:440], head[440:456]
    if version >> 16 != 1 or not virtual_bytes:
        raise BadImage("has a header that makes no sense")
    if kind not in (1, 2) or any(link) or any(parent):
        raise _only_changes()
    return Foreign("vdi", virtual_bytes)


# ---- VHD

_FIXED, _DYNAMIC, _DIFFERENCING = 2, 3, 4


def read_vhd(read_at: ReadAt, size: int) -> Foreign:
    """Check a VHD. Raise BadImage."""
    head = read_at(0, _SECTOR)
    footer = head if head.startswith(b"conectix") else read_at(size - _SECTOR, _SECTOR)
    if len(footer) < _SECTOR:
        raise BadImage("is cut short")
    (virtual_bytes,) = struct.unpack_from(">Q", footer, 48)
    kind, checksum = struct.unpack_from(">II", footer, 60)
    if checksum != ~(sum(footer[:64]) + sum(footer[68:])) & 0xFFFFFFFF or not virtual_bytes:
        raise BadImage("has a header that makes no sense")
    if kind == _DIFFERENCING:
        raise _only_changes()
    if kind not in (_FIXED, _DYNAMIC):
        raise BadImage(f"is a VHD of an unknown kind: {kind}")
    if kind == _FIXED and virtual_bytes + _SECTOR > size:
        raise BadImage(f"is cut short: {size} bytes of {virtual_bytes + _SECTOR}", hint="download it again")
    # By default QEMU believes the geometry of some makers, which is rounded.
    return Foreign("vpc", virtual_bytes, ("force_size_calc=current_size",))


# ---- VHDX

_REGIONS_AT, _REGIONS_BYTES = 192 << 10, 64 << 10
_METADATA = uuid.UUID("8b7ca206-4790-4b9a-b8fe-575f050f886e").bytes_le
_PARAMETERS = uuid.UUID("caa16737-fa36-4d43-b3b6-33f0aa44e76b").bytes_le
_DISK_SIZE = uuid.UUID("2fa54224-cd1b-4876-b211-5dbed83bf4b8").bytes_le
_MOST_ENTRIES = 2047
_HAS_PARENT = 2


def read_vhdx(read_at: ReadAt, size: int) -> Foreign:
    """Check a VHDX. Raise BadImage."""
    regions = _table(read_at(_REGIONS_AT, _REGIONS_BYTES), b"regi", 8, 16, struct.Struct("<16sQII"))
    region = regions.get(_METADATA)
    if region is None:
        raise BadImage("is damaged: it has no metadata")
    at = region[0]
    items = _table(read_at(at, _REGIONS_BYTES), b"metadata", 10, 32, struct.Struct("<16sIIII"))
    if _PARAMETERS not in items or _DISK_SIZE not in items:
        raise BadImage("is damaged: its metadata lack the size")
    parameters, virtual = (read_at(at + items[which][0], 8) for which in (_PARAMETERS, _DISK_SIZE))
    if len(parameters) < 8 or len(virtual) < 8:
        raise BadImage("is cut short")
    if struct.unpack("<II", parameters)[1] & _HAS_PARENT:
        raise _only_changes()
    virtual_bytes = int.from_bytes(virtual, "little")
    if not virtual_bytes:
        raise BadImage("has a header that makes no sense")
    return Foreign("vhdx", virtual_bytes)


def _table(data: bytes, mark: bytes, count_at: int, entries_at: int, entry: struct.Struct) -> dict[bytes, tuple[int, ...]]:
    """Read a table of VHDX: what it says of each GUID."""
    if len(data) < entries_at or not data.startswith(mark):
        raise BadImage("is damaged: a table is missing")
    count = int.from_bytes(data[count_at : count_at + 2], "little")
    if count > _MOST_ENTRIES or entries_at + count * entry.size > len(data):
        raise BadImage("is damaged: a table does not end")
    rows = (entry.unpack_from(data, entries_at + index * entry.size) for index in range(count))
    return {row[0]: row[1:] for row in rows}
