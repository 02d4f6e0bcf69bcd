"""Virtual machines by QEMU, as an ordinary user.

The guest sees a PC with IDE disks (VirtualBox guests and old kernels know them, too):

    hda  the job's disk: an overlay of the attempt's own over the read-only cached file; an ISO as a CD
    hdb  scratch: ext4 in a qcow2, sparse; what the guest trims is given back to the owner's disk
    hdd  the context CD
    ttyS0 console, ttyS1 the agent's channel; no USB
    a VGA card, whose picture tells why a system does not boot; a VNC server that listens nowhere shows it to sockets that it is given
    a virtio network card if the job has a network, else none

With a network QEMU runs in a cage (cage.py): its user networking gives the guest 10.0.2.15 and dials for it whatever the guest
dials, and in the cage there are only the job's services to be dialled. 10.0.2.2 is the cage's 127.0.0.1, where only the guest's
own forwarded ports listen. There is no IPv6 and no other name server than the hosts file that the agent writes.

QEMU runs in its seccomp sandbox, at low priority, within bounds on memory (the guest's) and CPU time. Formats are always
given, so QEMU never guesses what an image is, and an image cannot name another file.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from deskgrid.archive import printable
from deskgrid.clock import Clock
from deskgrid.core.console import LOGIN_S
from deskgrid.errors import BadImage, DriverUnusable, MachineFailed
from deskgrid.machines import cage, processes, qmp
from deskgrid.machines.base import CHANNEL_LOG, CONSOLE_LOG, CONTEXT_DISK, OVERLAY_DISK, SCRATCH_DISK
from deskgrid.machines.checkpoint import RESTORING_MARK, Checkpoint, read_checkpoint, sync_files
from deskgrid.machines.checkpointing import CheckpointingDriver
from deskgrid.machines.context import create_context
from deskgrid.machines.disks import create_scratch
from deskgrid.machines.driver import MachineHandle, MachineSpec
from deskgrid.machines.probes import file_mark, probe_folder
from deskgrid.machines.processes import ProcessIdentity
from deskgrid.machines.qcow2 import create_overlay, pack_sparse, qcow2_virtual_size
from deskgrid.machines.sandbox import Confinement, run_confined
from deskgrid.model.machines import DiskFormat, DriverName, Fingerprint, MachineKind, Network

__all__ = ["DEFAULT_BINARY", "QemuDriver", "command_line"]

DEFAULT_BINARY = "qemu-system-x86_64"
SOFTWARE = "tcg"
_HARDWARE = {"linux": "kvm", "darwin": "hvf", "win32": "whpx"}
"""sys.platform -> what lets a guest run on the CPU itself there."""
_CHARDEV_OF = {CONSOLE_LOG: "console", CHANNEL_LOG: "channel"}
_SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"
PACKED_SCRATCH = "scratch.qcow2"
_MACHINE_NOTE = "machine-type"
_PICTURE = "screen.png"
_SCREEN = ("-display", "none", "-vnc", "none,password=on")
"""A VNC server without a port: it serves the sockets that it is given, each after a password. Without one set, nobody gets in."""
_SCREEN_MIB = 4
"""Memory of the VGA card, part of each checkpoint: enough for 1280 x 800."""
_VERSION_LIMIT_S = 10.0
_MEND_LIMIT_S = 600.0
_MEND_MEMORY_BYTES = 2 << 30
_LOCKED, _LOCKED_S = b'Failed to get "write" lock', 0.5
_STATE_FLOOR_S = 60.0
_STATE_BYTES_PER_S = 10 << 20
"""Slower than any disk writes a machine's memory."""
_PAUSE_LIMIT_S = 5.0
_STOP_LIMIT_S = 1.5
"""The owner has his CPUs back within two seconds."""


class QemuDriver(CheckpointingDriver):
    """The Driver, Suspendable, Caged and Checkpointing protocols by QEMU.

    `accelerator` ("kvm", "hvf", "whpx", "tcg") overrides what `fingerprint` finds; without either, the first `start` tries it out.
    """

    name = DriverName.QEMU

    def __init__(
        self,
        clock: Clock,
        *,
        binary: str = DEFAULT_BINARY,
        accelerator: str | None = None,
        nice: int = 19,
        overlay: bool = True,
        internet: bool = False,
        probes: Path | None = None,
    ) -> None:
        super().__init__(clock, nice=nice, overlay=overlay, internet=internet, probes=probes)
        self._binary = binary
        self._forced = accelerator
        self._found: str | None = None
        self._machine = ""

    async def fingerprint(self) -> Fingerprint:
        """See Driver. Takes 0.5 s with working hardware support, up to 20 s without; run it when the worker starts."""
        found = await asyncio.to_thread(_fingerprint, self._binary, self._forced, self._probes)
        self._found = found.accelerator or None
        return await self._with_networks(found)

    def marks(self) -> list[str]:
        """See Recalling."""
        programs = [file_mark(processes.find_program(name)) for name in (self._binary, "mke2fs")]
        usable = f"{os.access(KVM_DEVICE, os.R_OK | os.W_OK)}"
        return [*programs, file_mark(KVM_DEVICE), usable, f"{self._forced} {self._allowed}", *cage.namespaces_marks()]

    def recall(self, found: Fingerprint) -> None:
        """See Recalling."""
        self._found = found.accelerator or None
        self._networks = found.networks

    async def pause(self, handle: MachineHandle) -> None:
        """See Suspendable. Nothing happens if the machine is off."""
        try:
            await self._control(handle, "stop", _STOP_LIMIT_S)
        except MachineFailed:
            # Its disk is slow just now, and it waits for that before it stands still. The owner does not wait.
            self.let_run(handle, False)

    async def resume(self, handle: MachineHandle) -> None:
        """See Suspendable. Nothing happens if the machine is off."""
        self.let_run(handle, True)
        await self._control(handle, "cont")

    # ---- checkpoints: internal snapshots of the writable disks; the memory in an image of its own, new for each

    async def _runs(self, handle: MachineHandle) -> bool:
        return bool((await qmp.execute(Path(handle.workdir), "query-status")).get("running"))

    async def _freeze(self, handle: MachineHandle) -> None:
        await qmp.execute(Path(handle.workdir), "stop", limit_s=self._state_limit_s(handle))

    async def _thaw(self, handle: MachineHandle, limit_s: float = _PAUSE_LIMIT_S) -> None:
        await qmp.execute(Path(handle.workdir), "cont", limit_s=limit_s)

    def _state_limit_s(self, handle: MachineHandle) -> float:
        return _STATE_FLOOR_S + handle.spec.memory_bytes / _STATE_BYTES_PER_S

    async def _keep_frozen(self, handle: MachineHandle) -> None:
        # What a power cut leaves is a whole snapshot or none only if header and tables come to the disk in QEMU's order.
        await self._flush_disks(handle, True)
        try:
            await super()._keep_frozen(handle)
        except (MachineFailed, OSError):
            with contextlib.suppress(MachineFailed):
                await self._flush_disks(handle, False)
            raise
        # Not if it was cancelled: QEMU is busy with it, and until the next one the guest's flushes cost some time.
        await self._flush_disks(handle, False)

    async def _flush_disks(self, handle: MachineHandle, flush: bool) -> None:
        """Let QEMU heed flushes of the writable disks, or not."""
        for name, file in _writable_files(handle.spec).items():
            options = [_file_node(name, file, flush=flush)]
            await qmp.execute(Path(handle.workdir), "blockdev-reopen", {"options": options}, limit_s=self._state_limit_s(handle))

    async def _keep_state(self, handle: MachineHandle, tag: str) -> float:
        memory = _memory_image(handle, tag)
        create_overlay(memory, _MEMORY_DISK_BYTES)
        async with self._with_memory(handle, memory):
            arguments: dict[str, object] = {"tag": tag, "vmstate": _MEMORY, "devices": [*_writable(handle.spec), _MEMORY]}
            await qmp.run_job(Path(handle.workdir), "snapshot-save", arguments, limit_s=self._state_limit_s(handle))
        await asyncio.to_thread(sync_files, *_images(handle), memory)
        return 0.0

    @asynccontextmanager
    async def _with_memory(self, handle: MachineHandle, memory: Path) -> AsyncIterator[None]:
        """Let QEMU have the image of a checkpoint's memory during the block."""
        workdir, limit_s = Path(handle.workdir), self._state_limit_s(handle)
        with contextlib.suppress(MachineFailed):  # of a worker that was killed here
            await qmp.execute(workdir, "blockdev-del", {"node-name": _MEMORY}, limit_s=limit_s)
        file = {"driver": "file", "filename": memory.name}
        await qmp.execute(
            workdir, "blockdev-add", {"driver": "qcow2", "node-name": _MEMORY, "file": file, "backing": None}, limit_s=limit_s
        )
        yield
        await qmp.execute(workdir, "blockdev-del", {"node-name": _MEMORY}, limit_s=limit_s)

    async def _drop_state(self, handle: MachineHandle, tag: str) -> None:
        arguments: dict[str, object] = {"tag": tag, "devices": _writable(handle.spec)}
        await qmp.run_job(Path(handle.workdir), "snapshot-delete", arguments, limit_s=self._state_limit_s(handle))
        _memory_image(handle, tag).unlink(missing_ok=True)

    async def _quit(self, handle: MachineHandle) -> None:
        with contextlib.suppress(MachineFailed):
            await qmp.execute(Path(handle.workdir), "quit")

    async def _load_state(self, handle: MachineHandle, checkpoint: Checkpoint) -> None:
        async with self._with_memory(handle, _memory_image(handle, checkpoint.tag)):
            arguments: dict[str, object] = {
                "tag": checkpoint.tag,
                "vmstate": _MEMORY,
                "devices": [*_writable(handle.spec), _MEMORY],
            }
            await qmp.run_job(Path(handle.workdir), "snapshot-load", arguments, limit_s=self._state_limit_s(handle))
        await self._thaw(handle)

    async def _mend(self, handle: MachineHandle) -> None:
        """Let qemu-img, where it is, count anew what refers to each cluster: after a power cut the counts may be older than the tables."""
        program = processes.find_program("qemu-img")
        if program is None:
            return
        checkpoint = await asyncio.to_thread(read_checkpoint, Path(handle.workdir))
        memory = [_memory_image(handle, checkpoint.tag)] if checkpoint is not None else []
        for image in (*_images(handle), *memory):
            try:
                async with asyncio.timeout(_MEND_LIMIT_S):
                    while not await _mend_image(program, image):
                        await self._clock.sleep(_LOCKED_S)
            except TimeoutError as error:
                raise MachineFailed(f"{image.name} was not checked within {_MEND_LIMIT_S:.0f} s") from error

    async def _control(self, handle: MachineHandle, command: str, limit_s: float = _PAUSE_LIMIT_S) -> None:
        identity = self._identity(handle)
        if identity is None or not processes.is_alive(identity):
            return
        try:
            await qmp.execute(Path(handle.workdir), command, limit_s=limit_s)
        except MachineFailed:
            # It may have ended under our hands, which is no failure.
            if processes.is_alive(identity):
                raise

    def _make_files(self, handle: MachineHandle) -> None:
        spec, workdir = handle.spec, Path(handle.workdir)
        if spec.disk is None:
            raise MachineFailed("a virtual machine needs a disk")
        if spec.disk_format is DiskFormat.OCI:
            raise BadImage("is an image of a container, not a disk", where=str(spec.disk))
        if spec.disk_format is DiskFormat.QCOW2:
            create_overlay(workdir / OVERLAY_DISK, qcow2_virtual_size(spec.disk))
        create_scratch(workdir / SCRATCH_DISK, spec.scratch_bytes)
        pack_sparse(workdir / SCRATCH_DISK, workdir / PACKED_SCRATCH)
        (workdir / SCRATCH_DISK).unlink()
        create_context(workdir / CONTEXT_DISK, spec, instance=handle.token)
        qmp.create_journal(workdir)

    async def _command(self, handle: MachineHandle) -> list[str]:
        accelerator = self._forced or self._found
        if accelerator is None:
            found = await self.fingerprint()
            if not found.usable:
                raise DriverUnusable(found.reason)
            accelerator = found.accelerator
        restoring = (Path(handle.workdir) / RESTORING_MARK).exists()
        line = command_line(
            handle.spec,
            binary=self._binary,
            accelerator=accelerator,
            token=handle.token,
            machine=await asyncio.to_thread(self._machine_type, Path(handle.workdir), restoring),
        )
        # -S: it waits for the state that is loaded next.
        return [*line, "-S"] if restoring else line

    def _machine_type(self, workdir: Path, restoring: bool) -> str:
        """Return the PC that the guest sees, the same before and after a checkpoint although QEMU was upgraded meanwhile."""
        note = workdir / _MACHINE_NOTE
        if restoring and note.exists():
            return note.read_text()
        self._machine = self._machine or _versioned_machine(_version(self._binary))
        note.write_text(self._machine)
        return self._machine

    def scratch(self, handle: MachineHandle) -> Path:
        """See Driver."""
        return Path(handle.workdir) / PACKED_SCRATCH

    async def _ask_to_stop(self, handle: MachineHandle, identity: ProcessIdentity) -> bool:
        workdir = Path(handle.workdir)
        try:
            status = await qmp.execute(workdir, "query-status")
            if not status.get("running"):
                return False
            await qmp.execute(workdir, "system_powerdown")
        except MachineFailed:
            return False
        return True

    async def picture(self, handle: MachineHandle, file: Path) -> None:
        """See Viewable."""
        workdir = Path(handle.workdir)
        try:
            await qmp.execute(workdir, "screendump", {"filename": _PICTURE, "format": "png"})
            await asyncio.to_thread(shutil.move, workdir / _PICTURE, file)
        except OSError as error:
            raise MachineFailed(f"no picture of the screen: {error.strerror}") from error

    async def attach_console(self, handle: MachineHandle, connection: socket.socket, password: str) -> None:
        """See HasConsole."""
        self._living(handle)
        await qmp.attach_vnc(Path(handle.workdir), connection, password, lifetime_s=LOGIN_S)

    async def _cut(self, handle: MachineHandle, log: str) -> None:
        """Lead a serial line to nowhere: the guest runs on, and what counts of its output is on scratch."""
        if log not in _CHARDEV_OF:
            await super()._cut(handle, log)
            return
        arguments: dict[str, object] = {"id": _CHARDEV_OF[log], "backend": {"type": "null", "data": {}}}
        try:
            await qmp.execute(Path(handle.workdir), "chardev-change", arguments)
        except MachineFailed:
            await super()._cut(handle, log)


def _writable_files(spec: MachineSpec) -> dict[str, str]:
    """Return the disks that a guest may write to: name -> file in the machine's folder."""
    scratch = {"scratch": PACKED_SCRATCH}
    return {"disk": OVERLAY_DISK, **scratch} if spec.disk_format is DiskFormat.QCOW2 else scratch


def _writable(spec: MachineSpec) -> list[str]:
    return list(_writable_files(spec))


def _images(handle: MachineHandle) -> list[Path]:
    return [Path(handle.workdir) / file for file in _writable_files(handle.spec).values()]


_MEMORY = "memory"
"""The node with a checkpoint's memory. It is an image of its own that begins empty: a second state in the same image would be written over the
first, cluster by cluster, each with a flush of its own."""
_MEMORY_DISK_BYTES = 1 << 16
"""Of the disk that this image has besides, for it must have one."""


def _memory_image(handle: MachineHandle, tag: str) -> Path:
    return Path(handle.workdir) / f"memory-{tag}.qcow2"


async def _mend_image(program: str, image: Path) -> bool:
    """Check an image; False if somebody else has it: what a worker that was killed had begun ends by itself. Raise MachineFailed."""
    confinement = Confinement(memory_bytes=_MEND_MEMORY_BYTES, cpu_s=int(_MEND_LIMIT_S), writable=(str(image.parent),))
    command = [program, "check", "-q", "-f", "qcow2", "-r", "all", str(image)]
    finished = await run_confined(command, confinement, wall_s=_MEND_LIMIT_S)
    if finished.code in (0, 3):  # 3: clusters that nobody refers to, which do no harm
        return True
    if _LOCKED in finished.errors:
        return False
    raise MachineFailed(f"{image.name} is damaged: {printable(finished.errors[-200:].strip())}")


# ---- the command line


def command_line(
    spec: MachineSpec, *, binary: str, accelerator: str, token: str, machine: str = "pc", platform: str = sys.platform
) -> list[str]:
    """Return QEMU's command line. File names are relative to the machine's folder, except that of the cached disk."""
    return [
        *(binary, "-name", f"guest={_plain(spec.name)}@{token}"),
        *("-nodefaults", "-no-user-config", *_SCREEN, "-no-reboot", "-msg", "timestamp=on"),
        *(("-sandbox", _SANDBOX) if platform == "linux" else ()),
        *("-machine", f"{machine},usb=off,vmport=off", "-accel", accelerator, "-cpu", "max"),
        *("-m", f"{spec.memory_bytes >> 20}M", "-smp", str(spec.cpus)),
        *("-boot", "menu=off,strict=on"),
        *_disks(spec),
        *_network(spec),
        *("-device", f"VGA,vgamem_mb={_SCREEN_MIB}"),
        *_file_port("console", CONSOLE_LOG),
        *_file_port("channel", CHANNEL_LOG),
        *("-chardev", f"pipe,id=journal,path={qmp.JOURNAL_NAME}", "-mon", "chardev=journal,mode=control"),
        *("-chardev", f"socket,id=qmp,path={qmp.SOCKET_NAME},server=on,wait=off", "-mon", "chardev=qmp,mode=control"),
    ]


def _plain(name: str) -> str:
    """Return a name without what would have a meaning in QEMU's option syntax."""
    return re.sub(r"[^A-Za-z0-9._/-]", "_", name)[:100]


def _file_port(chardev: str, name: str) -> tuple[str, ...]:
    # Appended to, for a machine that goes on from a checkpoint.
    return ("-chardev", f"file,id={chardev},path={name},append=on", "-device", f"isa-serial,chardev={chardev}")


def _network(spec: MachineSpec) -> list[str]:
    if spec.network is Network.NONE:
        return []
    # QEMU listens for each service of the guest from the beginning; the agent tells when the guest does.
    ports = dict.fromkeys(port for _, port in spec.offer)
    forwards = [f"hostfwd=tcp:127.0.0.1:{port}-:{port}" for port in ports]
    # Without its ROM the card costs no time in the firmware, which never boots from it.
    card = "virtio-net-pci,netdev=net,romfile="
    return ["-netdev", ",".join(["user,id=net,ipv6=off", *forwards]), "-device", card]


def _disks(spec: MachineSpec) -> list[str]:
    first = _cd_nodes("disk", str(spec.disk)) if spec.disk_format is DiskFormat.ISO else _overlay_nodes(str(spec.disk))
    kind = "ide-cd" if spec.disk_format is DiskFormat.ISO else "ide-hd"
    scratch = _node("scratch", "qcow2", _file_node("scratch", PACKED_SCRATCH), discard="unmap")
    return [
        *first,
        *_device(kind, "disk", bus="ide.0", unit=0, bootindex=0),
        *scratch,
        *_device("ide-hd", "scratch", bus="ide.0", unit=1),
        *_cd_nodes("context", CONTEXT_DISK),
        *_device("ide-cd", "context", bus="ide.1", unit=1),
    ]


def _overlay_nodes(base: str) -> list[str]:
    """The overlay and its base, both with their formats given; the base may have no backing file of its own."""
    file = {"driver": "file", "filename": base, "read-only": True, "auto-read-only": False}
    return [
        *_node("base", "qcow2", file, **{"read-only": True, "backing": None}),
        *_node("disk", "qcow2", _file_node("disk", OVERLAY_DISK), backing="base", discard="unmap"),
    ]


def _cd_nodes(name: str, file: str) -> list[str]:
    return _node(name, "raw", {"driver": "file", "filename": file, "read-only": True}, **{"read-only": True})


def _file_node(name: str, file: str, *, flush: bool = False) -> dict[str, object]:
    """Return the file of a disk that a guest may write to. Without `flush` guests cannot make the owner's disk sync (decision 25)."""
    node = {"driver": "file", "node-name": f"{name}-file", "filename": file, "discard": "unmap"}
    return {**node, "cache": {"no-flush": not flush}}


def _node(name: str, driver: str, file: dict[str, object], **options: object) -> list[str]:
    node = {"driver": driver, "node-name": name, "file": file, "cache": {"no-flush": True}, **options}
    return ["-blockdev", msgspec.json.encode(node).decode()]


def _device(kind: str, node: str, **properties: object) -> list[str]:
    # A disk error freezes the machine: a guest that went on would write a result that looks whole.
    stop = {"werror": "stop", "rerror": "stop"} if kind == "ide-hd" else {}
    words = {"drive": node, "id": f"{node}-device", **properties, **stop}
    return ["-device", ",".join([kind, *(f"{key}={value}" for key, value in words.items())])]


# ---- what this PC can do


class _Trial(Struct, frozen=True):
    """How the probe guest fared. `seconds` is its time if it came to its end."""

    seconds: float | None
    words: str = ""


_EXIT_PORT = 0xF4
_EXIT_VALUE = 0x10
_EXIT_STATUS = _EXIT_VALUE << 1 | 1
_PROBE_LOOPS = 200_000_000
KVM_DEVICE = Path("/dev/kvm")
HARDWARE_LIMIT_S = 5.0
SOFTWARE_LIMIT_S = 90.0
"""Only to end what hangs: software emulation always works in the end, and a PC that is busy just now is slow."""


def _boot_sector() -> bytes:
    """A guest of 512 bytes that counts, then ends QEMU through its debug port.

    It counts because there are PCs (VMs in a cloud, mostly) whose KVM starts any guest but interprets every instruction, so
    that a kernel never comes up: QEMU's own translator counts to this in 0.5 s, such a KVM not in many seconds.
    """
    code = (
        b"\x66\xb9" + _PROBE_LOOPS.to_bytes(4, "little")  # mov ecx, loops
        + b"\x66\x49"  # again: dec ecx
        + b"\x75\xfc"  # jnz again
        + bytes([0xB0, _EXIT_VALUE])  # mov al, value
        + bytes([0xE6, _EXIT_PORT])  # out port, al
        + b"\xf4\xeb\xfd"  # halt: hlt; jmp halt
    )  # fmt: skip
    return code.ljust(510, b"\0") + b"\x55\xaa"


def _fingerprint(binary: str, forced: str | None, place: Path | None) -> Fingerprint:
    def result(usable: bool, reason: str, version: str = "", accelerator: str = "") -> Fingerprint:
        return Fingerprint(DriverName.QEMU, (MachineKind.VM,), usable, reason, version, accelerator)

    program = processes.find_program(binary)
    if program is None:
        return result(False, f"{binary} is not installed (on Debian: sudo apt-get install qemu-system-x86)")
    if processes.find_program("mke2fs") is None:
        return result(False, "mke2fs is not installed (on Debian: sudo apt-get install e2fsprogs)")
    version = _version(program)
    if not version:
        return result(False, f"{program} does not run")
    accelerator, doubt = (forced, "") if forced else _choose_hardware(program, place)
    if accelerator and not forced:
        return result(True, "", version, accelerator)
    trial = _try_out(program, accelerator or SOFTWARE, SOFTWARE_LIMIT_S, place)
    if trial.seconds is None:
        return result(False, f"QEMU cannot run even the smallest guest with {accelerator or SOFTWARE}: {trial.words}", version)
    return result(True, doubt, version, accelerator or SOFTWARE)


def _version(program: str) -> str:
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=_VERSION_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(r"version (\d+(?:\.\d+)+)", done.stdout)
    return match[1] if match else ""


def _versioned_machine(version: str) -> str:
    """Return the name that QEMU gives its PC of this version, which later versions keep; "pc" always means the newest."""
    match = re.match(r"(\d+\.\d+)", version)
    return f"pc-i440fx-{match[1]}" if match else "pc"


def _choose_hardware(program: str, place: Path | None) -> tuple[str, str]:
    """Return the hardware accelerator that works here, or "" and why there is none, in words for the owner."""
    slow = "; machines run in software emulation, about ten times slower"
    name = _HARDWARE.get(sys.platform)
    if name is None:
        return "", f"no hardware acceleration is known for this system{slow}"
    if name == "kvm" and not KVM_DEVICE.exists():
        return "", f"there is no /dev/kvm: virtualisation may be switched off in the firmware{slow}"
    if name == "kvm" and not os.access(KVM_DEVICE, os.R_OK | os.W_OK):
        return "", f"this user may not use /dev/kvm (on Debian: sudo adduser $USER kvm, and log in again){slow}"
    trial = _try_out(program, name, HARDWARE_LIMIT_S, place)
    return (name, "") if trial.seconds is not None else ("", f"{name} does not work here: {trial.words}{slow}")


def _try_out(program: str, accelerator: str, limit_s: float, place: Path | None) -> _Trial:
    with probe_folder(place) as folder:
        (folder / "probe.img").write_bytes(_boot_sector())
        # Should we be killed meanwhile, the kernel ends what hangs.
        line = processes.gently(_probe_line(program, accelerator), nice=0, cpu_time_s=2 * limit_s)
        began = time.monotonic()
        try:
            done = subprocess.run(line, cwd=folder, capture_output=True, timeout=limit_s, check=False)
        except subprocess.TimeoutExpired:
            return _Trial(None, f"a guest of 512 bytes was not done after {limit_s:.0f} s")
        except OSError as error:
            return _Trial(None, f"{error}")
        seconds = time.monotonic() - began
    if done.returncode != _EXIT_STATUS:
        return _Trial(None, done.stderr.decode(errors="replace").strip()[-200:] or f"QEMU ended with {done.returncode}")
    return _Trial(seconds)


def _probe_line(program: str, accelerator: str) -> Sequence[str]:
    return [
        *(program, "-nodefaults", "-no-user-config", *_SCREEN, "-no-reboot", "-machine", "pc", "-m", "16M"),
        *("-accel", accelerator, "-cpu", "max"),
        *("-device", f"isa-debug-exit,iobase={_EXIT_PORT:#x},iosize=0x04"),
        *_node("probe", "raw", {"driver": "file", "filename": "probe.img"}, **{"read-only": False}),
        *("-device", "ide-hd,bus=ide.0,unit=0,drive=probe,bootindex=0"),
    ]
