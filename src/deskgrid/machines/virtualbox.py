"""Virtual machines by VirtualBox 7, for PCs where QEMU has no hardware support.

The guest sees the same PC as with QEMU (qemu.py): IDE disks hda, hdb and hdd, two serial ports, no network card. Each machine has a VirtualBox of
its own: settings, registry and service (VBOX_USER_HOME, VBOX_IPC_SOCKETID). So the owner's machines are never seen, two of ours never meet, and
removing a machine is ending its processes and removing its folder. All its files are written by us (virtualbox_files.py).

    VBoxHeadless     the machine: a child of ours, found by the token in its name; ends with the guest
    VBoxSVC          the service that it starts; ends by itself five seconds after it, or with `destroy`
    vm/Logs/VBox.log why it ended; made anew by each start
    saved/*.sav      memory, after `save`; VirtualBox removes it when it goes on, so `restore` first puts a copy of all into kept/

There is no network: VirtualBox's programs are setuid and refuse the namespaces of a cage, and its own NAT reaches the owner's network and the
internet. The fingerprint therefore offers `none` only, and jobs with services go elsewhere.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import secrets
import shutil
import uuid
from collections.abc import AsyncIterator, Iterable
from pathlib import Path

from deskgrid.clock import Clock
from deskgrid.errors import BadImage, DriverUnusable, MachineFailed
from deskgrid.machines import processes, vboxmanage
from deskgrid.machines.base import CHANNEL_LOG, CONSOLE_LOG, CONTEXT_DISK, SCRATCH_DISK, ProcessDriver, earlier_part
from deskgrid.machines.checkpoint import (
    NOTE_NAME,
    RESTORING_MARK,
    Checkpoint,
    read_checkpoint,
    sync_files,
    write_checkpoint,
)
from deskgrid.machines.context import create_context
from deskgrid.machines.disks import create_scratch, wrap_disk_error
from deskgrid.machines.driver import ExitCause, Exited, MachineEvent, MachineHandle, MachineSpec, Recovery, Saved
from deskgrid.machines.folders import remove_tree
from deskgrid.machines.probes import file_mark, probe_folder
from deskgrid.machines.processes import ProcessIdentity
from deskgrid.machines.qcow2 import pack_sparse, qcow2_virtual_size, vital_features
from deskgrid.machines.qmp import Journal
from deskgrid.machines.virtualbox_files import Machine, write_machine
from deskgrid.model.machines import DiskFormat, DriverName, Fingerprint, MachineKind, Network

__all__ = ["VirtualBoxDriver", "read_log"]

_LOG = Path("vm", "Logs", "VBox.log")
_IPC_NOTE = "ipc"
_KEPT, _DIRTY = "kept", "dirty"
_LOG_PART_BYTES = 1 << 20
_PROBE_LIMIT_S = 30.0
_PROBE_LOOPS, _PROBE_LOOPS_INTERPRETED = 20_000_000, 1000
_SAVE_LIMIT_S = 600.0
_SVC_LIMIT_S = 5.0
_UNREADABLE_FEATURES = 0x8 | 0x10
"""Of a qcow2: another compression than zlib, and wide table entries."""


class VirtualBoxDriver(ProcessDriver):
    """The Driver, Suspendable and Checkpointing protocols by VirtualBox.

    `folder` is where its programs are, where that is not the usual place; `headless` the program that runs machines, if it is another one than
    VBoxHeadless there. `interpreted` lets VirtualBox interpret guests where it has no kernel module, for tests.
    """

    name = DriverName.VIRTUALBOX

    def __init__(
        self,
        clock: Clock,
        *,
        nice: int = 19,
        overlay: bool = True,
        internet: bool = False,
        probes: Path | None = None,
        folder: Path | None = None,
        headless: str = "VBoxHeadless",
        interpreted: bool = False,
    ) -> None:
        super().__init__(clock, nice=nice, overlay=False, internet=False, probes=probes)
        self._folder = folder or vboxmanage.find_folder()
        self._headless = headless
        self._interpreted = interpreted
        self._saving: dict[str, asyncio.Lock] = {}
        """Held while a machine is saved, by token."""

    # ---- what this PC can do

    async def fingerprint(self) -> Fingerprint:
        """See Driver. Runs a guest of 512 bytes; takes some seconds."""
        version, reason = "", ""
        if self._folder is None:
            reason = "VirtualBox is not installed (see virtualbox.org; it needs a kernel module, so root must install it)"
        elif processes.find_program("mke2fs") is None:
            reason = "mke2fs is not installed (on Debian: sudo apt-get install e2fsprogs)"
        else:
            try:
                version = await self._version()
                reason = await self._try_out()
            except (MachineFailed, OSError) as error:
                reason = str(error)
        words = "" if reason or not version else self._accelerator
        return Fingerprint(self.name, (MachineKind.VM,), not reason, reason, version, words, (Network.NONE,))

    def marks(self) -> list[str]:
        """See Recalling."""
        folder = self._folder or Path("none")
        programs = [file_mark(folder / name) for name in (self._headless, "VBoxSVC", "VBoxVMM.so")]
        return [*programs, file_mark("/dev/vboxdrv"), f"{os.access('/dev/vboxdrv', os.R_OK | os.W_OK)}"]

    def recall(self, found: Fingerprint) -> None:
        """See Recalling."""

    @property
    def _accelerator(self) -> str:
        return "interpreter" if self._interpreted else "hardware"

    async def _version(self) -> str:
        words = await vboxmanage.call(self._programs(), ["--version"], _BARE_ENVIRONMENT, self._clock)
        found = re.search(r"(\d+\.\d+\.\d+)", words.strip().splitlines()[-1] if words.strip() else "")
        if found is None:
            raise MachineFailed(f"VirtualBox does not tell its version: {vboxmanage.explain(words)}")
        if int(found[1].split(".")[0]) < 7:
            raise MachineFailed(f"VirtualBox {found[1]} is too old: it must be 7 or newer")
        return found[1]

    async def _try_out(self) -> str:
        """Run the smallest guest; return why that did not work."""
        with probe_folder(self._probes) as folder:
            workdir = folder / "machine"
            workdir.mkdir()
            spec = MachineSpec("probe", MachineKind.VM, 32 << 20, 1, 0)
            handle = MachineHandle(self.name.value, str(workdir), spec, secrets.token_hex(16))
            try:
                await asyncio.to_thread(self._make_probe, handle)
                identity = await self._spawn(handle)
                if not await processes.wait_gone(identity, self._clock, limit_s=_PROBE_LIMIT_S):
                    return f"a guest of 512 bytes was not done after {_PROBE_LIMIT_S:.0f} s"
                end = self._exit(handle)
                return "" if end == Exited(ExitCause.POWERED_OFF) else vboxmanage.explain(getattr(end, "detail", ""))
            finally:
                await asyncio.shield(self.destroy(handle))

    def _make_probe(self, handle: MachineHandle) -> None:
        workdir = Path(handle.workdir)
        raw, disk = workdir / "probe.img", workdir / "probe.qcow2"
        raw.write_bytes(_boot_sector(_PROBE_LOOPS_INTERPRETED if self._interpreted else _PROBE_LOOPS).ljust(1 << 20, b"\0"))
        pack_sparse(raw, disk)
        self._write(handle, disk, iso=False, virtual_bytes=1 << 20, scratch="", context="")

    # ---- the machine

    def _make_files(self, handle: MachineHandle) -> None:
        spec, workdir = handle.spec, Path(handle.workdir)
        if spec.disk is None:
            raise MachineFailed("a virtual machine needs a disk")
        if spec.disk_format is DiskFormat.OCI:
            raise BadImage("is an image of a container, not a disk", where=str(spec.disk))
        iso = spec.disk_format is DiskFormat.ISO
        if not iso and vital_features(spec.disk) & _UNREADABLE_FEATURES:
            raise MachineFailed("VirtualBox cannot read this disk: it is compressed with zstd, or has extended tables")
        create_scratch(workdir / SCRATCH_DISK, spec.scratch_bytes)
        create_context(workdir / CONTEXT_DISK, spec, instance=handle.token)
        size = 0 if iso else qcow2_virtual_size(spec.disk)
        self._write(handle, spec.disk, iso=iso, virtual_bytes=size, scratch=SCRATCH_DISK, context=CONTEXT_DISK)

    def _write(self, handle: MachineHandle, disk: Path, *, iso: bool, virtual_bytes: int, scratch: str, context: str) -> None:
        workdir = Path(handle.workdir)
        (workdir / _IPC_NOTE).write_text(_ipc_name(handle.token))
        machine = Machine(
            workdir=workdir,
            identity=_identity_of(handle),
            name=f"deskgrid-{handle.token}",
            memory_mib=handle.spec.memory_bytes >> 20,
            cpus=handle.spec.cpus,
            base=disk,
            iso=iso,
            virtual_bytes=virtual_bytes,
            console=CONSOLE_LOG,
            channel=CHANNEL_LOG,
            scratch=scratch,
            context=context,
            interpreted=self._interpreted,
        )
        write_machine(machine)

    async def _command(self, handle: MachineHandle) -> list[str]:
        env = processes.find_program("env") or "env"
        variables = [f"{name}={value}" for name, value in _environment(handle).items()]
        headless = str(self._programs() / self._headless)
        return [env, "-i", *variables, headless, "--startvm", f"deskgrid-{handle.token}", "--vrde", "off"]

    def _programs(self) -> Path:
        if self._folder is None:
            raise DriverUnusable("VirtualBox is not installed on this PC")
        return self._folder

    async def _manage(self, handle: MachineHandle, *arguments: str) -> str:
        machine = str(_identity_of(handle))
        return await vboxmanage.call(self._programs(), ["controlvm", machine, *arguments], _environment(handle), self._clock)

    async def picture(self, handle: MachineHandle, file: Path) -> None:
        """See Viewable."""
        await self._manage(handle, "screenshotpng", str(file.absolute()))

    def journal_file(self, workdir: Path) -> Path:
        """See ProcessDriver."""
        return workdir / _LOG

    def read_journal(self, workdir: Path) -> Journal:
        """See ProcessDriver."""
        return read_log(_both_ends(workdir / _LOG))

    def _exit(self, handle: MachineHandle) -> Exited | Saved:
        found = super()._exit(handle)
        if isinstance(found, Exited) and found.cause is ExitCause.START_FAILED:
            return Exited(found.cause, vboxmanage.explain(found.detail))
        return found

    async def _ask_to_stop(self, handle: MachineHandle, identity: ProcessIdentity) -> bool:
        try:
            await self._manage(handle, "acpipowerbutton")
        except MachineFailed:
            return False
        return True

    async def _kill(self, handle: MachineHandle, identity: ProcessIdentity) -> None:
        await super()._kill(handle, identity)
        await self._end_service(handle)

    async def destroy(self, handle: MachineHandle) -> None:
        """See Driver."""
        await self._end_service(handle, with_machine=True)
        name = self._ipc_of(handle)
        await super().destroy(handle)
        # VirtualBox leaves the folder of its socket, always there (nsLocalFile.cpp), whatever TMPDIR says.
        with contextlib.suppress(OSError):
            remove_tree(f"/tmp/.vbox-{name}-ipc")  # noqa: S108

    async def _end_service(self, handle: MachineHandle, *, with_machine: bool = False) -> None:
        """End the processes that belong to this machine's VirtualBox."""
        name = self._ipc_of(handle)
        if with_machine and (identity := self._identity(handle)) is not None:
            await processes.kill(identity, self._clock)
        for identity in await asyncio.to_thread(processes.find_by_variable, "VBOX_IPC_SOCKETID", name):
            await processes.kill(identity, self._clock, limit_s=_SVC_LIMIT_S)

    def _ipc_of(self, handle: MachineHandle) -> str:
        """Return the name of the machine's service; a stray folder tells it itself."""
        with contextlib.suppress(OSError):
            told = (Path(handle.workdir) / _IPC_NOTE).read_text()
            if re.fullmatch(r"deskgrid-[0-9a-f]{32}", told):
                return told
        return _ipc_name(handle.token)

    async def _cut(self, handle: MachineHandle, log: str) -> None:
        ports = {CONSOLE_LOG: "changeuartmode1", CHANNEL_LOG: "changeuartmode2"}
        try:
            if log not in ports:
                raise MachineFailed(f"{log} cannot be cut")
            await self._manage(handle, ports[log], "disconnected")
        except MachineFailed:
            await super()._cut(handle, log)

    # ---- Suspendable

    async def pause(self, handle: MachineHandle) -> None:
        """See Suspendable."""
        await self._switch(handle, "pause", "Paused")

    async def resume(self, handle: MachineHandle) -> None:
        """See Suspendable."""
        await self._switch(handle, "resume", "Running")

    async def _switch(self, handle: MachineHandle, command: str, wanted: str) -> None:
        identity = self._identity(handle)
        if identity is None or not processes.is_alive(identity):
            return
        try:
            await self._manage(handle, command)
        except MachineFailed:
            # It may be so already, or have ended under our hands.
            if processes.is_alive(identity) and last_state(_both_ends(Path(handle.workdir) / _LOG)) != wanted:
                raise

    # ---- Checkpointing

    async def checkpoint(self, handle: MachineHandle) -> None:
        """See Checkpointing; the machine is off afterwards, since VirtualBox keeps its memory only so, and `restore` lets it go on."""
        await self.save(handle)

    async def save(self, handle: MachineHandle) -> None:
        """See Checkpointing."""
        lock = self._saving.setdefault(handle.token, asyncio.Lock())
        try:
            async with lock:
                await self._save(handle)
        finally:
            self._saving.pop(handle.token, None)

    async def events(self, handle: MachineHandle) -> AsyncIterator[MachineEvent]:
        """See Driver."""
        async for event in super().events(handle):
            if isinstance(event, Exited | Saved):
                # VirtualBox ends first, and only then can be noted that all is saved.
                async with self._saving.get(handle.token, asyncio.Lock()):
                    yield self._exit(handle)
            else:
                yield event

    async def recover(self, handle: MachineHandle) -> Recovery:
        """See Driver. A machine that VirtualBox had saved when its worker was killed is noted as saved now."""
        workdir = Path(handle.workdir)
        found = await super().recover(handle)
        saved = isinstance(found, Exited) and found.cause is ExitCause.KILLED and is_saved(_both_ends(workdir / _LOG))
        if not saved or (workdir / _DIRTY).exists():
            return found
        await asyncio.to_thread(_note_saved, workdir)
        return self._exit(handle)

    async def _save(self, handle: MachineHandle) -> None:
        identity = self._identity(handle)
        if identity is None or not processes.is_alive(identity):
            raise MachineFailed("the machine is off")
        workdir = Path(handle.workdir)
        await self._manage(handle, "savestate")
        if not await processes.wait_gone(identity, self._clock, limit_s=_SAVE_LIMIT_S):
            raise MachineFailed("VirtualBox did not end after it had saved the machine")
        if not is_saved(_both_ends(workdir / _LOG)):
            raise MachineFailed("VirtualBox did not save the machine")
        await self._end_service(handle)
        try:
            await asyncio.to_thread(_note_saved, workdir)
        except OSError as error:
            raise wrap_disk_error(error) from error

    async def restore(self, handle: MachineHandle) -> None:
        """See Checkpointing."""
        workdir = Path(handle.workdir)
        mark = workdir / RESTORING_MARK
        identity = self._identity(handle)
        if identity is not None and processes.is_alive(identity) and not mark.exists():
            return
        if not isinstance(self._exit(handle), Saved):
            raise MachineFailed("the machine has no checkpoint to go on from")
        await self._end_service(handle, with_machine=True)
        try:
            mark.touch()
            processes.forget_identity(workdir)
            await asyncio.to_thread(_make_ready, workdir)
        except OSError as error:
            raise wrap_disk_error(error) from error
        identity = await self._spawn(handle)
        try:
            await self._wait_running(handle, identity)
        except BaseException:
            await asyncio.shield(self._kill(handle, identity))
            raise
        mark.unlink()

    async def _wait_running(self, handle: MachineHandle, identity: ProcessIdentity) -> None:
        workdir = Path(handle.workdir)
        deadline = self._clock.monotonic() + _SAVE_LIMIT_S
        while not self.read_journal(workdir).began:
            if not processes.is_alive(identity) or self._clock.monotonic() >= deadline:
                words = (workdir / "process.log").read_text(errors="replace")[-2000:]
                raise MachineFailed(f"VirtualBox did not let the machine go on: {vboxmanage.explain(words)}")
            await self._clock.sleep(0.05)


_BARE_ENVIRONMENT = {"LC_ALL": "C.UTF-8", "PATH": "/usr/bin:/bin"}


def _environment(handle: MachineHandle) -> dict[str, str]:
    return {
        **_BARE_ENVIRONMENT,
        "VBOX_USER_HOME": str(Path(handle.workdir) / "home"),
        "VBOX_IPC_SOCKETID": _ipc_name(handle.token),
    }


def _ipc_name(token: str) -> str:
    return f"deskgrid-{token}"


def _identity_of(handle: MachineHandle) -> uuid.UUID:
    """Return VirtualBox's own identifier of the machine: its token, written with dashes, so that who names it so is not taken for it."""
    return uuid.UUID(hex=handle.token)


def _boot_sector(loops: int) -> bytes:
    """A guest of 512 bytes that counts, then writes "Shutdown" to the port at which VirtualBox's firmware turns itself off."""
    code = (
        b"\x66\xb9" + loops.to_bytes(4, "little")  # mov ecx, loops
        + b"\x66\x49\x75\xfc"  # again: dec ecx; jnz again
        + b"\x31\xc0\x8e\xd8"  # xor ax, ax; mov ds, ax
        + b"\xbe\x20\x7c\xba\x0f\x04\xfc"  # mov si, text; mov dx, 0x40f; cld
        + b"\xac\x08\xc0\x74\x03\xee\xeb\xf8"  # next: lodsb; or al, al; jz halt; out dx, al; jmp next
        + b"\xf4\xeb\xfd"  # halt: hlt; jmp halt
        + b"Shutdown\0"
    )  # fmt: skip
    return code.ljust(510, b"\0") + b"\x55\xaa"


# ---- its log


_AT = r"^[0-9:.]+ "
"""A line begins with its time; what a guest can put into the log comes behind a name."""
_RAN = re.compile(_AT + r"Changing the VM state from '(?:POWERING_ON|RESUMING)' to 'RUNNING'", re.MULTILINE)
_GUEST_OFF = re.compile(_AT + r"(?:ACPI: Entering S5 power state|PcBios: APM shutdown request)", re.MULTILINE)
_OURS = re.compile(_AT + r"Console::powerDown\(\): A request to power off", re.MULTILINE)
_OFF = re.compile(_AT + r"Changing the VM state from '[A-Z_]+' to 'POWERING_OFF'", re.MULTILINE)
_SAVED = re.compile(_AT + r"Console: Machine state changed to 'Saved'", re.MULTILINE)
_NO_SERVICE = re.compile(_AT + r".*VBoxSVC became unavailable", re.MULTILINE)
_RUNTIME_ERROR = re.compile(_AT + r"Console: VM runtime error: fatal=\w+, errorID=(\w+) message=\"([^\"]*)", re.MULTILINE)
_STUCK = re.compile(_AT + r"(?:Console: Machine state changed to 'Stuck'|Changing the VM state from '\w+' to 'GURU)", re.MULTILINE)
_STATE = re.compile(_AT + r"Console: Machine state changed to '(\w+)'", re.MULTILINE)


def read_log(log: str) -> Journal:
    """Return what VirtualBox's log says of a machine's end. Its exit code says nothing: it is 0 even if the machine could not be started."""
    began = _RAN.search(log) is not None
    if (error := _RUNTIME_ERROR.search(log)) is not None:
        full = error[1] == "DevATA_DISKFULL"
        words = "the disk of this PC is full" if full else f"{error[1]}: {error[2]}"
        return Journal(began, io_error=f"the machine's disk cannot be written: {words}")
    if _STUCK.search(log):
        return Journal(began, stuck="the guest crashed VirtualBox (guru meditation)")
    if _NO_SERVICE.search(log):
        return Journal(began, shutdown_reason="its service VBoxSVC was gone")
    off = _OFF.search(log)
    if off is None or not began or _SAVED.search(log):
        return Journal(began)
    if _OURS.search(log, 0, off.end()):
        return Journal(began, shutdown_reason="host")
    return Journal(began, shutdown_reason="guest-shutdown" if _GUEST_OFF.search(log, 0, off.end()) else "guest-reset")


def is_saved(log: str) -> bool:
    """Tell whether the log ends with a saved machine."""
    return _SAVED.search(log) is not None


def last_state(log: str) -> str:
    """Return the last state that the log names."""
    return next((found[1] for found in reversed(list(_STATE.finditer(log)))), "")


def _both_ends(path: Path) -> str:
    """Return the beginning and the end of a log that may be long."""
    try:
        with path.open("rb") as file:
            data = file.read(_LOG_PART_BYTES)
            file.seek(max(len(data), os.fstat(file.fileno()).st_size - _LOG_PART_BYTES))
            return (data + file.read(_LOG_PART_BYTES)).decode(errors="replace")
    except OSError:
        return ""


# ---- what is saved
#
# A saved machine is its folder as it lies there. Going on changes it (VirtualBox removes the .sav at once), so a copy is made first: `kept`. From
# then on the folder is `dirty`, until the next save makes it the good one again. Each step can be cut short:
#
#     save      VirtualBox saves; logs, note, sync; `dirty` goes, which is the moment when the new state counts
#     restore   not dirty: kept.new is copied and renamed to kept, then `dirty` comes; dirty: the files come from kept


_FILES = (SCRATCH_DISK, "disk.vdi", "vm/vm.vbox")


def _note_saved(workdir: Path) -> None:
    """Make the folder, in which VirtualBox has just saved the machine, the good state."""
    lengths = {}
    for name in (CHANNEL_LOG, CONSOLE_LOG):
        earlier = earlier_part(workdir / name)
        with earlier.open("ab") as target:
            if (workdir / name).exists():
                target.write((workdir / name).read_bytes())
            target.flush()
            os.fsync(target.fileno())
        # VirtualBox truncates it at the next start; nobody shall read it twice until then.
        (workdir / name).write_bytes(b"")
        lengths[earlier.name] = earlier.stat().st_size
    sync_files(*_state_files(workdir))
    write_checkpoint(workdir, Checkpoint("saved", lengths))
    (workdir / _DIRTY).unlink(missing_ok=True)


def _make_ready(workdir: Path) -> None:
    """Make the folder such that VirtualBox can go on in it, and the state is kept."""
    kept = workdir / _KEPT
    if (workdir / _DIRTY).exists():
        _copy_state(kept, workdir)
        shutil.copyfile(kept / NOTE_NAME, workdir / NOTE_NAME)
    else:
        new = workdir / f"{_KEPT}.new"
        for folder in (new, kept):
            if folder.exists():
                remove_tree(str(folder))
        new.mkdir()
        _copy_state(workdir, new)
        shutil.copyfile(workdir / NOTE_NAME, new / NOTE_NAME)
        sync_files(*(path for path in new.rglob("*") if path.is_file()))
        new.rename(kept)
        (workdir / _DIRTY).touch()
    note = read_checkpoint(workdir)
    for name, length in (note.logs if note is not None else {}).items():
        if (workdir / name).exists():
            os.truncate(workdir / name, length)
    for name in (CHANNEL_LOG, CONSOLE_LOG):
        (workdir / name).write_bytes(b"")
    (workdir / _LOG).unlink(missing_ok=True)


def _state_files(folder: Path) -> Iterable[Path]:
    return [*(folder / name for name in _FILES if (folder / name).exists()), *(folder / "saved").glob("*.sav")]


def _copy_state(source: Path, target: Path) -> None:
    for name in ("vm", "saved"):
        (target / name).mkdir(exist_ok=True)
    for old in (target / "saved").glob("*.sav"):
        old.unlink()
    for path in _state_files(source):
        _copy_sparse(path, target / path.relative_to(source))


def _copy_sparse(source: Path, target: Path) -> None:
    """Copy what a sparse file holds; where the file system can, without copying it."""
    with source.open("rb") as read, target.open("wb") as write:
        size = read.seek(0, os.SEEK_END)
        write.truncate(size)
        at = 0
        while at < size:
            try:
                at = os.lseek(read.fileno(), at, os.SEEK_DATA)
            except OSError:
                break
            end = os.lseek(read.fileno(), at, os.SEEK_HOLE)
            while at < end:
                at += _copy_piece(read.fileno(), write.fileno(), at, end - at)


def _copy_piece(source: int, target: int, at: int, size: int) -> int:
    if hasattr(os, "copy_file_range"):
        copied: int = os.copy_file_range(source, target, min(size, 1 << 30), at, at)
        return copied or size
    data = os.pread(source, min(size, 1 << 20), at)
    os.pwrite(target, data, at)
    return len(data) or size
