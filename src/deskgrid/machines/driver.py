"""The driver protocol: how a worker makes, watches and removes one kind of machine.

Rules that every driver keeps (testing/driver_contract.py holds them against it):

1. `prepare` makes names and files only, inside `workdir`, and starts no process. The handle it returns is plain data
   and is journalled by the worker before `start`.
2. `events` yields what happens, in order, and ends after exactly one `Exited` or `Saved`.
3. `destroy` may be called at any moment, in any state, any number of times, by another process than the one that
   started the machine. Afterwards no process, socket, port or file of the machine is left (workdir is gone).
4. `recover` looks for the machine by process id and start time, never by parenthood, and touches no process but ours.
5. A guest is hostile: what it writes is data to be checked, never a path or a command.
"""

from __future__ import annotations

import socket
from collections.abc import AsyncIterator
from enum import StrEnum
from pathlib import Path
from typing import Protocol, runtime_checkable

import msgspec
from msgspec import Struct

from deskgrid.model.machines import ContextLabel, DiskFormat, Fingerprint, MachineKind, Network

__all__ = [
    "Booted",
    "Caged",
    "Checkpointing",
    "ContextExited",
    "ContextStarted",
    "Conversing",
    "Doorway",
    "Driver",
    "ExitCause",
    "Exited",
    "Gone",
    "HasConsole",
    "Listening",
    "MachineEvent",
    "MachineHandle",
    "MachineSpec",
    "Metered",
    "Output",
    "Recalling",
    "Recovery",
    "Running",
    "Saved",
    "Stream",
    "Suspendable",
    "Viewable",
    "decode_handle",
    "encode_handle",
]


class Doorway(Struct, frozen=True):
    """A service that a machine may reach: at `host`, an address of its cage, and at `name`, in its hosts file."""

    name: str
    host: str
    port: int
    service: str
    """SERVICE.PEER, for people and programs."""


class MachineSpec(Struct, frozen=True):
    """All that a driver needs to make one machine. Paths are absolute."""

    name: str
    """For people and process lists, such as "job-42/attempt-1"; not unique, never a path."""
    kind: MachineKind
    memory_bytes: int
    cpus: int
    scratch_bytes: int
    """Size of the scratch file system as the guest sees it; sparse on the host."""
    disk: Path | None = None
    """The verified disk in the cache: shared, read-only."""
    disk_format: DiskFormat = DiskFormat.QCOW2
    context: Path | None = None
    """Folder with the user's context files, already unpacked and checked; None for an empty context."""
    context_label: ContextLabel = ContextLabel.CONTEXT
    network: Network = Network.NONE
    reach: tuple[Doorway, ...] = ()
    """With a network: what is listed in /context/services.json, the hosts file and the environment (DESKGRID_NAME=host:port)."""
    offer: tuple[tuple[str, int], ...] = ()
    """With a network: the machine's own services, as (name, port)."""
    ssh_keys: tuple[str, ...] = ()
    """Lines for root's authorized_keys."""
    credentials: Path | None = None
    """A file to appear as /context/grid/credentials.json, readable by root only."""
    secrets: Path | None = None
    """A folder with files to appear as /context/secrets/NAME, readable by root only. What is made of them is written over before it is removed."""
    data: tuple[tuple[str, Path], ...] = ()
    """Files in the cache to appear read-only as /context/data/NAME, as (NAME, path); they stay as long as the machine."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables for context.sh, as (name, value)."""
    command: tuple[str, ...] = ()
    """What runs in the place of /context/context.sh: a program and its arguments, never a shell's line."""
    program: Path | None = None
    """Folder with the files of the job's app for this platform, unpacked and checked; appears read-only as /app."""
    processes: int = 0
    """Processes and threads that may exist at the same time in a process or container; 0: no bound."""
    file_bytes: int = 0
    """Largest file that a process or container may write; 0: no bound but scratch_bytes."""
    interactive: bool = False
    """Of a process: `command` is a program that is talked to over one stream socket, its stdin and stdout (see Conversing)."""
    lifetime_s: float = 0.0
    """Seconds, suspensions left out, after which a process or container ends itself, should its worker not come back; 0: no bound."""
    cpu_time_s: float = 0.0
    """CPU seconds after which the kernel may end it, so that a machine that lost its worker cannot run for ever; 0: no bound."""


class MachineHandle(Struct, frozen=True):
    """A machine as it is journalled: enough to find, watch and remove it after a restart of the worker."""

    driver: str
    workdir: str
    """Absolute; belongs to this machine alone and is removed by `destroy`."""
    spec: MachineSpec
    token: str
    """Unguessable mark of this machine, found again in its process's arguments or environment."""


def encode_handle(handle: MachineHandle) -> bytes:
    """Return a handle as it is journalled (JSON)."""
    return msgspec.json.encode(handle, enc_hook=str)


def decode_handle(data: bytes) -> MachineHandle:
    """Return the handle that `encode_handle` wrote. Raise msgspec.DecodeError for anything else."""
    return msgspec.json.decode(data, type=MachineHandle, dec_hook=lambda kind, value: kind(value))


class Stream(StrEnum):
    """Where a piece of output came from."""

    STDOUT = "stdout"
    STDERR = "stderr"
    CONSOLE = "console"


class ExitCause(StrEnum):
    """Why a machine ended, as far as the hypervisor can tell."""

    POWERED_OFF = "powered_off"
    """The guest shut itself down."""
    RESET = "reset"
    """The guest rebooted or panicked, which ends it: a machine boots once."""
    STOPPED = "stopped"
    """We asked for it."""
    KILLED = "killed"
    """The process ended without a word: killed, out of memory, or crashed."""
    START_FAILED = "start_failed"
    """It never ran; `detail` has the hypervisor's words."""
    LIMIT = "limit"
    """It went past a limit of its job and was ended; `detail` says which."""
    IO_ERROR = "io_error"
    """The host could not write the machine's disks, most often because its disk is full."""


class Booted(Struct, frozen=True, tag="booted"):
    """The agent in the guest has the disks and begins."""


class ContextStarted(Struct, frozen=True, tag="context_started"):
    """context.sh begins."""


class Output(Struct, frozen=True, tag="output"):
    """Bytes as they came; best effort and live. What counts is in the report taken from scratch."""

    stream: Stream
    data: bytes


class ContextExited(Struct, frozen=True, tag="context_exited"):
    """context.sh ended, as the guest claims; the exit file on scratch is what counts."""

    exit_code: int


class Listening(Struct, frozen=True, tag="listening"):
    """Something in the machine listens on a port that its spec offers; told once per port."""

    port: int


class Exited(Struct, frozen=True, tag="exited"):
    """The machine is off. Its scratch can be read now."""

    cause: ExitCause
    detail: str = ""


class Saved(Struct, frozen=True, tag="saved"):
    """The machine is off, though it did not end by itself, and its last checkpoint is whole: `restore` goes on from there."""


MachineEvent = Booted | ContextStarted | Output | ContextExited | Listening | Exited | Saved


class Running(Struct, frozen=True, tag="running"):
    """Recovered: it runs, and `events` may be called; events that nobody saw are yielded again from its files."""


class Gone(Struct, frozen=True, tag="gone"):
    """Nothing of it is left, or it never started."""


Recovery = Running | Saved | Exited | Gone


class Driver(Protocol):
    """One kind of machine on this PC."""

    async def fingerprint(self) -> Fingerprint:
        """Find out, by really starting something small with a time limit, what this PC can do. Never raises."""
        ...

    async def prepare(self, spec: MachineSpec, workdir: Path) -> MachineHandle:
        """Create `workdir` and all files of the machine.

        Raise NoSpace, BadImage, InvalidInput (of the context) or MachineFailed; then, and if cancelled, nothing is left.
        """
        ...

    async def start(self, handle: MachineHandle) -> None:
        """Start the process. A failure to start is also told by events (`Exited`, START_FAILED)."""
        ...

    def events(self, handle: MachineHandle) -> AsyncIterator[MachineEvent]:
        """Yield events until `Exited` or `Saved`. One reader at a time; after `recover` said Running it works in a new process."""
        ...

    async def stop(self, handle: MachineHandle, *, grace_s: float) -> None:
        """Ask the guest to power off, and end the process after `grace_s`. Returns when it is off. Idempotent."""
        ...

    async def destroy(self, handle: MachineHandle) -> None:
        """Remove the machine: process, sockets, files, workdir. Idempotent; never raises for what is already gone."""
        ...

    async def recover(self, handle: MachineHandle) -> Recovery:
        """Find the machine of a journalled handle again after a restart of the worker."""
        ...

    def scratch(self, handle: MachineHandle) -> Path:
        """Return where the result is, to be read after `Exited`: a scratch image (raw ext4), or a folder (results.py)."""
        ...


@runtime_checkable
class Recalling(Protocol):
    """A driver whose `fingerprint` takes so long that it is not asked again while the system stays as it is."""

    def marks(self) -> list[str]:
        """Return texts that change when the answer may be another one: versions of programs, rights to devices."""
        ...

    def recall(self, found: Fingerprint) -> None:
        """Take what `fingerprint` returned earlier, with these marks, for what it would return now."""
        ...


@runtime_checkable
class Suspendable(Protocol):
    """A driver whose machines can be frozen in memory."""

    async def pause(self, handle: MachineHandle) -> None:
        """Stop the CPUs at once. Idempotent."""
        ...

    async def resume(self, handle: MachineHandle) -> None:
        """Let the CPUs run on. Idempotent."""
        ...


@runtime_checkable
class Metered(Protocol):
    """A driver that can tell what a machine uses, and stop its processes for moments. Both return at once; a machine that is off is none."""

    def cpu_time_s(self, handle: MachineHandle) -> float:
        """Return the CPU seconds that the job's processes have used; what ended without being waited for is not in it."""
        ...

    def let_run(self, handle: MachineHandle, run: bool) -> None:
        """Let the job's processes run, or stop them. It is not a pause: nothing that asks the machine for something may rely on an answer."""
        ...


@runtime_checkable
class Checkpointing(Protocol):
    """A driver whose machines can be written to the disk and go on from there, on the same PC, also after it was switched off.

    A checkpoint takes about the machine's memory of disk, twice that while a new one is made.
    """

    async def checkpoint(self, handle: MachineHandle) -> None:
        """Keep memory and disks as they are now, on the disk when it returns; the machine stands still meanwhile.

        It takes the place of the checkpoint before, which is good until then. Raise NoSpace or MachineFailed; the machine goes on as before.
        """
        ...

    async def save(self, handle: MachineHandle) -> None:
        """Make a checkpoint and turn the machine off, which is paused or running. `events` ends with `Saved`. Errors as `checkpoint`."""
        ...

    async def fall_back(self, handle: MachineHandle) -> bool:
        """Turn a machine off such that it is `Saved` as its last checkpoint has it; it may be off already. False if it has none: nothing happens.

        Raise MachineFailed if it cannot be ended.
        """
        ...

    async def restore(self, handle: MachineHandle) -> None:
        """Start a machine that is `Saved` from its last checkpoint; it runs when this returns. What it had said since is forgotten.

        Raise MachineFailed if that cannot be done; it is off then. Idempotent while it runs.
        """
        ...


@runtime_checkable
class Viewable(Protocol):
    """A driver whose machines have a screen."""

    async def picture(self, handle: MachineHandle, file: Path) -> None:
        """Write what is on the screen to a new file, a PNG. Raise MachineFailed, leaving no file, if the machine is off or it cannot be had."""
        ...


@runtime_checkable
class HasConsole(Protocol):
    """A driver whose machines show their screen, and take keys and the mouse, by VNC (RFB 3.8, RFC 6143)."""

    async def attach_console(self, handle: MachineHandle, connection: socket.socket, password: str) -> None:
        """Let the machine's VNC server serve a stream socket (AF_UNIX), of which it keeps a copy; ours may be closed then.

        Nobody listens: this is the only way to the screen. Who is at the other end has to prove within LOGIN_S that he knows the password
        (8 ASCII characters, for VNC uses no more). The next call makes it void. Works from the machine's start on, booted or not, frozen or not.
        Raise MachineFailed if the machine is off or shows no screen.
        """
        ...


@runtime_checkable
class Caged(Protocol):
    """A driver whose machines can be in a cage: a network of their own with nothing but a loopback (machines/cage.py).

    In it the machine's service on port P is at 127.0.0.1:P, and a listener on an address of a Doorway is what the machine reaches there.
    """

    async def open_socket(self, handle: MachineHandle) -> socket.socket:
        """Return a new TCP socket (IPv4, blocking) inside the machine's cage, to bind and listen, or to connect.

        Raise MachineFailed if the machine is off or has no cage.
        """
        ...


@runtime_checkable
class Conversing(Protocol):
    """A driver whose machines may keep a program that is given one thing to do after the other (MachineSpec.interactive)."""

    async def connect_program(self, handle: MachineHandle) -> socket.socket:
        """Return a stream socket (AF_UNIX, blocking) whose other end is the program's stdin and stdout; waits for one that starts.

        All calls give the same stream: only one may use it at a time. It ends when the program does. The program ends with the process that
        started it, however that ends: nobody else knows which jobs it was given.
        Raise MachineFailed if the machine is off, or not interactive.
        """
        ...
