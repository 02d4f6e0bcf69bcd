"""What an attempt runs in, as the server asks for it and a driver makes it."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

__all__ = ["ContextLabel", "DiskFormat", "DriverName", "Fingerprint", "MachineKind", "Network"]


class MachineKind(StrEnum):
    """What a job asks to run in."""

    VM = "vm"
    PROCESS = "process"
    """A native program in a sandbox: sees its own folders and the system's programs, and no network but its services."""
    CONTAINER = "container"
    """An image of the repository, run by the owner's rootless podman."""


class DriverName(StrEnum):
    """The code that runs one kind of machine."""

    QEMU = "qemu"
    VIRTUALBOX = "virtualbox"
    PROCESS = "process"
    CONTAINER = "container"
    FAKE = "fake"


class Network(StrEnum):
    """What a machine can reach: nothing, the services of its job, or the internet besides."""

    NONE = "none"
    OVERLAY = "overlay"
    INTERNET = "internet"


class DiskFormat(StrEnum):
    """Format of a disk as it lies in a worker's cache; found once by content and then always given explicitly."""

    QCOW2 = "qcow2"
    """Attached as the first disk, through an overlay of the attempt's own."""
    ISO = "iso"
    """Attached read-only as a CD in the place of the first disk."""
    OCI = "oci"
    """Not a disk of a VM but an image of a container: an OCI archive (a tar file)."""


class ContextLabel(StrEnum):
    """Volume label of the context disk. One volume has one label, and cloud-init knows only its own."""

    CONTEXT = "CONTEXT"
    CIDATA = "CIDATA"
    CERNVM = "CERNVM"
    """CernVM knows no label, but sources a context.sh that lies at the top of any volume: so the files are in a folder of this one."""


class Fingerprint(Struct, frozen=True):
    """What a driver can do on this PC, found by trying. `reason` says in one sentence why it is not usable."""

    driver: DriverName
    kinds: tuple[MachineKind, ...]
    usable: bool
    reason: str = ""
    version: str = ""
    accelerator: str = ""
    """What runs the guest's CPU: kvm, hvf, whpx or tcg (software)."""
    networks: tuple[Network, ...] = (Network.NONE,)
    """The network modes that this driver can confine here."""
