"""What drivers share whose machine is one process with its files in one folder: QEMU, and the fake.

The folder of a machine (its `workdir`):

    scratch.img  context.iso  disk.qcow2      its disks
    channel.log  console.log  process.log     what the agent tells, the console, the words of the process itself
    journal.in  journal.out                   why it ended (qmp.py)
    process.json                              which process it is
    checkpoint.json  restoring                from where it can go on (checkpoint.py)
    cage.sock  cage.pid                       with a network: the keeper of its cage (cage.py)
    stopped                                   there if we asked it to end

Everything that has to be known after a restart of the worker is in these files, so `events`, `recover` and `destroy` need
no memory of `start`. Removal first renames the folder to NAME.removed: a kill in between leaves nothing that looks alive.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import socket
from abc import ABC, abstractmethod
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import msgspec

from deskgrid.clock import Clock
from deskgrid.errors import MachineFailed
from deskgrid.machines import cage, process_tree, processes, qmp
from deskgrid.machines.channel import ChannelParser
from deskgrid.machines.checkpoint import RESTORING_MARK, read_checkpoint
from deskgrid.machines.clear_secrets import CONTEXT_DISK, CONTEXT_FOLDER, mark_secrets, wipe_secrets
from deskgrid.machines.disks import check_space, wrap_disk_error
from deskgrid.machines.driver import (
    ExitCause,
    Exited,
    Gone,
    MachineEvent,
    MachineHandle,
    MachineSpec,
    Output,
    Recovery,
    Running,
    Saved,
    Stream,
)
from deskgrid.machines.folders import remove_tree
from deskgrid.machines.processes import ProcessIdentity
from deskgrid.model.machines import DriverName, Fingerprint, Network

__all__ = [
    "CHANNEL_LOG",
    "CONSOLE_LOG",
    "CONTEXT_DISK",
    "CONTEXT_FOLDER",
    "OVERLAY_DISK",
    "SCRATCH_DISK",
    "STOPPED_MARK",
    "ProcessDriver",
    "earlier_part",
    "last_words",
]

SCRATCH_DISK = "scratch.img"
OVERLAY_DISK = "disk.qcow2"
CHANNEL_LOG = "channel.log"
CONSOLE_LOG = "console.log"
PROCESS_LOG = "process.log"
STOPPED_MARK = "stopped"

_READ_BYTES = 256 << 10
_POLL_MIN_S = 0.01
_POLL_MAX_S = 0.1
_LONGEST_POLL_S = 1.0
_PAUSE_BY_COST = 4000.0
"""How many times as long as asking whether the process lives, which is a fortieth of a look, a pause is at least: watching takes some 1 % of a CPU, also in
a machine that is itself emulated."""
LOG_MAX_BYTES = 64 << 20
"""What a guest may write to a serial line, or make QEMU write; then it is cut off, so that it cannot fill the owner's disk."""


class ProcessDriver(ABC):
    """The Driver protocol (driver.py) over one process; subclasses say how to make and control it."""

    name: DriverName

    def __init__(
        self, clock: Clock, *, nice: int = 19, overlay: bool = True, internet: bool = False, probes: Path | None = None
    ) -> None:
        self._clock = clock
        self._probes = probes
        """Where probes have their folders."""
        self._nice = nice
        self._allowed = (
            Network.NONE,
            *((Network.OVERLAY,) if overlay else ()),
            *((Network.INTERNET,) if overlay and internet else ()),
        )
        self._networks = self._allowed
        self._fresh: set[str] = set()
        """Tokens of machines that we made and have not started: there is no process to be looked for."""

    # ---- what a subclass says

    @abstractmethod
    async def fingerprint(self) -> Fingerprint:
        """See Driver."""

    @abstractmethod
    def _make_files(self, handle: MachineHandle) -> None:
        """Make the machine's files in its workdir. Runs in a thread; may raise OSError."""

    @abstractmethod
    async def _command(self, handle: MachineHandle) -> list[str]:
        """Return the command line of the process, with the handle's token in it."""

    @abstractmethod
    async def _ask_to_stop(self, handle: MachineHandle, identity: ProcessIdentity) -> bool:
        """Ask the guest to power off; False if it cannot hear."""

    def journal_file(self, workdir: Path) -> Path:
        """Return the file that tells why the machine ended; it only grows while the machine runs."""
        return workdir / qmp.JOURNAL_OUTPUT

    def read_journal(self, workdir: Path) -> qmp.Journal:
        """Return what that file tells so far."""
        return qmp.read_journal(workdir)

    async def _cut(self, handle: MachineHandle, log: str) -> None:
        """Stop the guest from writing on to `log`, which has become too long. This one ends the machine."""
        identity = self._identity(handle)
        if identity is not None:
            await self._kill(handle, identity)

    async def _kill(self, handle: MachineHandle, identity: ProcessIdentity) -> None:
        """End the machine's process and all that ends with it."""
        await processes.kill(identity, self._clock)

    # ---- the protocol

    async def prepare(self, spec: MachineSpec, workdir: Path) -> MachineHandle:
        """See Driver."""
        self._check(spec)
        handle = MachineHandle(self.name.value, str(workdir.absolute()), spec, secrets.token_hex(16))
        making = asyncio.create_task(asyncio.to_thread(self._prepare, handle))
        try:
            await asyncio.shield(making)
        except asyncio.CancelledError:
            # The thread cannot be interrupted; what it makes has to be removed after it.
            await asyncio.wait({making})
            if making.cancelled() or making.exception() is None:
                await self.destroy(handle)
            raise
        self._fresh.add(handle.token)
        return handle

    async def start(self, handle: MachineHandle) -> None:
        """See Driver. Idempotent while it runs; raise MachineFailed if it ran already or was removed."""
        workdir = Path(handle.workdir)
        identity = None if handle.token in self._fresh else self._identity(handle)
        if identity is not None:
            if processes.is_alive(identity):
                return
            raise MachineFailed("the machine has ended: it starts only once")
        if not workdir.is_dir():
            raise MachineFailed("the machine was removed")
        await self._spawn(handle)

    async def _spawn(self, handle: MachineHandle) -> ProcessIdentity:
        workdir = Path(handle.workdir)
        command = await self._command(handle)
        if handle.spec.network is not Network.NONE:
            command = cage.enter(command, workdir)
        command = processes.gently(command, nice=self._nice, cpu_time_s=handle.spec.cpu_time_s)
        self._fresh.discard(handle.token)
        identity = processes.spawn(command, cwd=workdir, log=workdir / PROCESS_LOG)
        processes.write_identity(workdir, identity)
        return identity

    async def events(self, handle: MachineHandle) -> AsyncIterator[MachineEvent]:
        """See Driver. What the machine wrote before is yielded again."""
        workdir = Path(handle.workdir)
        logs = _Logs(workdir, frozenset(port for _, port in handle.spec.offer), self)
        identity = self._identity(handle)
        delay_s = least_s = _POLL_MIN_S
        while True:
            # Asked before reading: what it wrote before its end is then read in this round.
            began = self._clock.monotonic()
            alive = identity is not None and processes.is_alive(identity)
            # Somebody else may have had the CPU meanwhile: one look that took long says little.
            least_s = min(_PAUSE_BY_COST * (self._clock.monotonic() - began), 1.5 * max(least_s, _POLL_MIN_S), _LONGEST_POLL_S)
            news = False
            for event in logs.read():
                news = True
                yield event
            if identity is None or (not alive and not news):
                break
            if alive and logs.journal().hopeless:
                await self._kill(handle, identity)
                continue
            for log in logs.overlong():
                await self._cut(handle, log)
            delay_s = _POLL_MIN_S if news else min(delay_s * 1.5, _POLL_MAX_S)
            if alive and not logs.more:
                await processes.wait_ended(identity, self._clock, max(delay_s, least_s))
        yield self._exit(handle)

    async def stop(self, handle: MachineHandle, *, grace_s: float) -> None:
        """See Driver."""
        identity = self._identity(handle)
        if identity is None or not processes.is_alive(identity):
            return
        (Path(handle.workdir) / STOPPED_MARK).touch()
        if grace_s > 0 and await self._ask_to_stop(handle, identity):
            await processes.wait_gone(identity, self._clock, limit_s=grace_s)
        await self._kill(handle, identity)

    async def destroy(self, handle: MachineHandle) -> None:
        """See Driver. Raise MachineFailed only if the process cannot be ended or the files cannot be removed."""
        self._fresh.discard(handle.token)
        identity = self._identity(handle)
        if identity is not None:
            await self._kill(handle, identity)
        await cage.wait_keeper_gone(Path(handle.workdir), self._clock)
        await asyncio.to_thread(_remove, Path(handle.workdir))

    async def recover(self, handle: MachineHandle) -> Recovery:
        """See Driver."""
        workdir = Path(handle.workdir)
        if not workdir.is_dir():
            # A removal may have been cut short.
            await self.destroy(handle)
            return Gone()
        identity = self._identity(handle)
        if (workdir / RESTORING_MARK).exists():
            # What was started from the checkpoint has not begun to run.
            if identity is not None:
                await self._kill(handle, identity)
            return self._exit(handle)
        if identity is None:
            return Gone()
        if not processes.is_alive(identity):
            return self._exit(handle)
        processes.write_identity(workdir, identity)
        return Running()

    async def fall_back(self, handle: MachineHandle) -> bool:
        """See Checkpointing."""
        if read_checkpoint(Path(handle.workdir)) is None:
            return False
        identity = self._identity(handle)
        if identity is not None:
            await self._kill(handle, identity)
        return isinstance(self._exit(handle), Saved)

    def scratch(self, handle: MachineHandle) -> Path:
        """See Driver."""
        return Path(handle.workdir) / SCRATCH_DISK

    async def open_socket(self, handle: MachineHandle) -> socket.socket:
        """See Caged."""
        if handle.spec.network is Network.NONE:
            raise MachineFailed("the machine has no network")
        identity = self._identity(handle)
        if identity is None:
            raise MachineFailed("the machine is off")
        return await cage.open_socket(Path(handle.workdir), lambda: processes.is_alive(identity))

    def cpu_time_s(self, handle: MachineHandle) -> float:
        """See Metered."""
        return process_tree.usage(self._pids(handle)).cpu_s

    def let_run(self, handle: MachineHandle, run: bool) -> None:
        """See Metered."""
        process_tree.send(self._pids(handle), signal.SIGCONT if run else signal.SIGSTOP)

    def _pids(self, handle: MachineHandle) -> list[int]:
        """Return the processes that do the job's work."""
        identity = processes.read_identity(Path(handle.workdir))
        return [identity.pid] if identity is not None and processes.is_alive(identity) else []

    # ---- shared parts

    async def _with_networks(self, found: Fingerprint) -> Fingerprint:
        """Return a fingerprint with the networks that machines can have here, and why not those that the owner allows besides."""
        doubt = await cage.probe_cage(self._clock, self._probes) if self._allowed != (Network.NONE,) else ""
        self._networks = (Network.NONE,) if doubt else self._allowed
        reason = "; ".join(words for words in (found.reason, doubt) if words)
        return msgspec.structs.replace(found, networks=self._networks, reason=reason)

    def _check(self, spec: MachineSpec) -> None:
        if spec.network not in self._networks:
            raise MachineFailed(f"the {self.name} driver does not offer network {spec.network}")

    def _prepare(self, handle: MachineHandle) -> None:
        workdir = Path(handle.workdir)
        try:
            workdir.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise wrap_disk_error(error) from error
        try:
            check_space(workdir)
            if handle.spec.secrets is not None:
                mark_secrets(workdir)
            self._make_files(handle)
        except BaseException as error:
            _remove(workdir)
            if isinstance(error, OSError):
                raise wrap_disk_error(error) from error
            raise

    def _identity(self, handle: MachineHandle) -> ProcessIdentity | None:
        """Return the machine's process, alive or not; found by its token if nobody came to write it down."""
        return processes.read_identity(Path(handle.workdir)) or processes.find_by_token(handle.token)

    def _exit(self, handle: MachineHandle) -> Exited | Saved:
        """Say why the machine, which is off, ended, or that it can go on."""
        workdir = Path(handle.workdir)
        if not workdir.is_dir():
            return Exited(ExitCause.STOPPED, "the machine was removed")
        journal = self.read_journal(workdir)
        told = journal.exit()
        if told is not None and told.cause is ExitCause.IO_ERROR:
            return told
        if (workdir / STOPPED_MARK).exists():
            return Exited(ExitCause.STOPPED)
        if told is not None and told.cause is not ExitCause.KILLED:
            return told
        if read_checkpoint(workdir) is not None:
            return Saved()
        if told is not None:
            return told
        words = last_words(workdir)
        return Exited(ExitCause.KILLED, words) if journal.began else Exited(ExitCause.START_FAILED, words or "it was never started")


class _Tail:
    """Reads on in a file that another process writes, after what is in the file with its earlier part, if there is one."""

    def __init__(self, path: Path) -> None:
        self._parts = [earlier_part(path), path]
        self._at = 0
        self._read_bytes = 0

    def read(self) -> bytes:
        """Return at most _READ_BYTES of what is new; nothing if there is no file, or after the bound."""
        while True:
            data = self._read_on()
            if data or len(self._parts) == 1:
                return data
            self._parts, self._at = self._parts[1:], 0

    def _read_on(self) -> bytes:
        try:
            # Most often there is nothing new: a look at the size is much less work than to open and read.
            if _size(self._parts[0]) <= self._at:
                return b""
            with self._parts[0].open("rb") as file:
                file.seek(self._at)
                data = file.read(min(_READ_BYTES, LOG_MAX_BYTES - self._read_bytes))
        except OSError:
            return b""
        self._at += len(data)
        self._read_bytes += len(data)
        return data


def earlier_part(log: Path) -> Path:
    """Return where that part of a log is which was written before the machine's process was started from a checkpoint, if it is kept apart."""
    return log.with_name(f"{log.name}.earlier")


class _Logs:
    """The two serial lines of a machine."""

    def __init__(self, workdir: Path, offered: frozenset[int], driver: ProcessDriver) -> None:
        self._workdir = workdir
        self._driver = driver
        self._journal_file = driver.journal_file(workdir)
        self._journal = (-1, qmp.Journal())
        self._channel = _Tail(workdir / CHANNEL_LOG)
        self._console = _Tail(workdir / CONSOLE_LOG)
        self._parser = ChannelParser(offered)
        self._bounded = [*(workdir / name for name in (CHANNEL_LOG, CONSOLE_LOG, PROCESS_LOG)), self._journal_file]
        """Files that are not at their bound yet."""
        self.more = False
        """The last read did not come to the end."""

    def read(self) -> Iterator[MachineEvent]:
        """Yield what is new, the console first: the guest says there why it cannot go on."""
        console = self._console.read()
        if console:
            yield Output(Stream.CONSOLE, console)
        channel = self._channel.read()
        yield from self._parser.feed(channel)
        self.more = _READ_BYTES in (len(console), len(channel))

    def journal(self) -> qmp.Journal:
        """Return the journal, read anew only if it has grown."""
        size = _size(self._journal_file)
        if size != self._journal[0]:
            self._journal = (size, self._driver.read_journal(self._workdir))
        return self._journal[1]

    def overlong(self) -> list[str]:
        """Return the files that have come to their bound since the last call."""
        found = [file for file in self._bounded if _size(file) >= LOG_MAX_BYTES]
        self._bounded = [file for file in self._bounded if file not in found] if found else self._bounded
        return [file.name for file in found]


def _size(path: Path) -> int:
    try:
        return os.stat(path).st_size  # noqa: PTH116 half the time of Path.stat
    except OSError:
        return 0


def last_words(workdir: Path) -> str:
    """Return what the process itself said last."""
    try:
        lines = (workdir / PROCESS_LOG).read_bytes()[-2000:].decode(errors="replace").splitlines()
    except OSError:
        return ""
    return "; ".join(lines[-3:])


def _remove(workdir: Path) -> None:
    """Remove a folder such that it is either whole or not there under its name, secrets first. Idempotent."""
    removed = workdir.with_name(f"{workdir.name}.removed")
    try:
        _remove_tree(removed)
        if workdir.exists():
            wipe_secrets(workdir)
            workdir.rename(removed)
            _remove_tree(removed)
    except FileNotFoundError:
        # Somebody else is removing it too.
        return
    except OSError as error:
        raise MachineFailed(f"the machine's files cannot be removed: {error}") from error


def _remove_tree(folder: Path) -> None:
    if folder.exists():
        remove_tree(str(folder))
