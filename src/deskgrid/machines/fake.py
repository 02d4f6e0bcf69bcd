"""A driver without virtual machines, for tests and for trying deskgrid out: it runs none of the user's code.

Its machine is a small process of its own that plays what `fake.toml` in the context folder says, and leaves what QEMU and the
agent would leave: the channel, the journal, and a real ext4 scratch disk with the report on it. So everything around the driver (kill -9,
recovery, taking results out of the disk) is the real thing.

    exit_code = 0               of the context.sh that is not run
    stdout = "text"             and stderr
    duration_s = 0.0            from the start of the context to its end
    until = "/path"             its end waits for this file, too
    boot_s = 0.0
    tick_s = 0.0                write the line "tick N" this often, without end
    no_checkpoints = false      none can be made
    hangs = false               also: never_boots, crashes, reboots, refuses (to start), io_error (as if the disk were full)
    serve = [8080]              echo servers on these ports of the machine, from its boot to its end; each is told as listening
    listening = [8080]          told as listening, too: what serves there is put into the machine's cage by a test
    console = false             has a VNC server, from its start on: a screen of one pixel; what is typed there comes as output
    fetch = ["db:5432"]         say "hello from db" to the doorway db, and leave its answer in scratch as fetched/db
    [files]                     what is left in scratch: path -> text
"a/b.txt" = "text"
"""

from __future__ import annotations

import asyncio
import secrets
import signal
import socket
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath

import msgspec
import psutil
from cryptography.hazmat.decrepit.ciphers.algorithms import TripleDES
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.modes import ECB
from msgspec import Struct

from deskgrid.errors import InvalidInput, MachineFailed
from deskgrid.machines import fake_machine, processes, qmp
from deskgrid.machines.base import CHANNEL_LOG, CONSOLE_LOG, CONTEXT_DISK, SCRATCH_DISK
from deskgrid.machines.channel import channel_lines
from deskgrid.machines.checkpoint import NOTE_NAME, Checkpoint
from deskgrid.machines.checkpointing import CheckpointingDriver
from deskgrid.machines.context import create_context
from deskgrid.machines.disks import create_scratch, scratch_command
from deskgrid.machines.driver import Doorway, MachineHandle, MachineSpec, Stream
from deskgrid.machines.processes import ProcessIdentity
from deskgrid.model.machines import DriverName, Fingerprint, MachineKind

__all__ = ["PLAN_FILE", "FakeDriver", "FakePlan", "vnc_answer"]

PLAN_FILE = "fake.toml"
_PLAN = "plan.json"
_OUTPUT = "output"
_FINISHED_DISK = "finished.img"
_RESULT = "result"
_BEGAN = "began"
_CONSOLE_LIMIT_S = 5.0


def _chunk(kind: bytes, data: bytes) -> bytes:
    return len(data).to_bytes(4, "big") + kind + data + zlib.crc32(kind + data).to_bytes(4, "big")


_PIXEL = (
    b"\x89PNG\r\n\x1a\n"
    + _chunk(b"IHDR", bytes((0, 0, 0, 1, 0, 0, 0, 1, 8, 0, 0, 0, 0)))
    + _chunk(b"IDAT", zlib.compress(b"\0\0"))
    + _chunk(b"IEND", b"")
)
"""A PNG of one pixel (RFC 2083)."""


def vnc_answer(password: str, question: bytes) -> bytes:
    """Return what VNC has a viewer answer (RFC 6143, 7.2.2): DES, the bits of each byte of the key in the other order."""
    key = bytes(int(f"{byte:08b}"[::-1], 2) for byte in password.encode("ascii")[:8].ljust(8, b"\0"))
    encryptor = Cipher(TripleDES(key * 3), ECB()).encryptor()  # noqa: S305 - what VNC is
    return encryptor.update(question) + encryptor.finalize()


class FakePlan(Struct, frozen=True, forbid_unknown_fields=True):
    """What a fake machine does; see the module's text."""

    exit_code: int = 0
    stdout: str = ""
    stderr: str = ""
    duration_s: float = 0.0
    until: str = ""
    boot_s: float = 0.0
    tick_s: float = 0.0
    no_checkpoints: bool = False
    hangs: bool = False
    never_boots: bool = False
    crashes: bool = False
    reboots: bool = False
    refuses: bool = False
    io_error: bool = False
    serve: tuple[int, ...] = ()
    listening: tuple[int, ...] = ()
    console: bool = False
    fetch: tuple[str, ...] = ()
    files: dict[str, str] = {}


class FakeDriver(CheckpointingDriver):
    """The Driver, Suspendable, Caged and Checkpointing protocols without a hypervisor.

    The state of a fake machine is how long it has run and what it has said: ticks are counted on from the channel's log.
    """

    name = DriverName.FAKE

    async def fingerprint(self) -> Fingerprint:
        """See Driver."""
        return await self._with_networks(Fingerprint(DriverName.FAKE, (MachineKind.VM,), usable=True, version="1"))

    async def pause(self, handle: MachineHandle) -> None:
        """See Suspendable."""
        self._signal(handle, signal.SIGSTOP)

    async def resume(self, handle: MachineHandle) -> None:
        """See Suspendable."""
        self._signal(handle, signal.SIGCONT)

    async def picture(self, handle: MachineHandle, file: Path) -> None:
        """See Viewable: one black pixel."""
        self._living(handle)
        file.write_bytes(_PIXEL)

    async def attach_console(self, handle: MachineHandle, connection: socket.socket, password: str) -> None:
        """See HasConsole. The machine knows no password: it gets one question and its answer."""
        self._living(handle)
        if not msgspec.json.decode((Path(handle.workdir) / _PLAN).read_bytes())["console"]:  # the context may be gone by now
            raise MachineFailed("the fake machine was not told to show its screen")
        question = secrets.token_bytes(16)
        order = msgspec.json.encode({"question": question.hex(), "answer": vnc_answer(password, question).hex()})
        try:
            async with asyncio.timeout(_CONSOLE_LIMIT_S):
                with await qmp.connect(Path(handle.workdir) / fake_machine.CONSOLE_SOCKET) as machine:
                    socket.send_fds(machine, [order], [connection.fileno()])
        except (OSError, TimeoutError) as error:
            raise MachineFailed("the fake machine does not show its screen") from error

    async def _runs(self, handle: MachineHandle) -> bool:
        return psutil.Process(self._living(handle).pid).status() != psutil.STATUS_STOPPED

    async def _freeze(self, handle: MachineHandle) -> None:
        self._signal(handle, signal.SIGSTOP)

    async def _thaw(self, handle: MachineHandle, limit_s: float = 0.0) -> None:
        self._signal(handle, signal.SIGCONT)

    def _state_limit_s(self, handle: MachineHandle) -> float:
        return 0.0

    async def _keep_state(self, handle: MachineHandle, tag: str) -> float:
        if _read_plan(handle.spec.context).no_checkpoints:
            raise MachineFailed("the fake machine was told to make no checkpoint")
        return time.time() - float((Path(handle.workdir) / _BEGAN).read_text())

    async def _drop_state(self, handle: MachineHandle, tag: str) -> None:
        """Nothing is kept but the note."""

    async def _quit(self, handle: MachineHandle) -> None:
        self._signal(handle, signal.SIGKILL)

    async def _load_state(self, handle: MachineHandle, checkpoint: Checkpoint) -> None:
        """It reads the note itself."""

    def _signal(self, handle: MachineHandle, number: signal.Signals) -> None:
        identity = self._identity(handle)
        if identity is not None:
            processes.send_signal(identity, number)

    def _make_files(self, handle: MachineHandle) -> None:
        spec, workdir = handle.spec, Path(handle.workdir)
        plan = _read_plan(spec.context)
        create_scratch(workdir / SCRATCH_DISK, spec.scratch_bytes)
        result = workdir / _RESULT
        _leave_result(result, plan)
        create_scratch(workdir / _FINISHED_DISK, spec.scratch_bytes, content=result)
        create_context(workdir / CONTEXT_DISK, spec, instance=handle.token)
        qmp.create_journal(workdir)
        output = channel_lines(Stream.STDOUT, plan.stdout.encode()) + channel_lines(Stream.STDERR, plan.stderr.encode())
        (workdir / _OUTPUT).write_bytes(output)
        (workdir / _PLAN).write_bytes(msgspec.json.encode(_orders(plan, spec, workdir)))

    async def _command(self, handle: MachineHandle) -> list[str]:
        # -I -S: no site packages to search, so that it starts in 10 ms.
        return [sys.executable, "-I", "-S", str(Path(fake_machine.__file__)), handle.workdir, handle.token]

    async def _ask_to_stop(self, handle: MachineHandle, identity: ProcessIdentity) -> bool:
        processes.send_signal(identity, signal.SIGTERM)
        return True


def _read_plan(context: Path | None) -> FakePlan:
    path = context / PLAN_FILE if context else None
    if path is None or not path.is_file():
        return FakePlan()
    try:
        return msgspec.toml.decode(path.read_bytes(), type=FakePlan)
    except msgspec.DecodeError as error:
        raise InvalidInput(str(error), where=PLAN_FILE) from error


def _leave_result(folder: Path, plan: FakePlan) -> None:
    report = folder / ".deskgrid"
    report.mkdir(parents=True)
    (report / "stdout").write_text(plan.stdout)
    (report / "stderr").write_text(plan.stderr)
    (report / "exit").write_text(f"{plan.exit_code}\n")
    for name, text in plan.files.items():
        relative = PurePosixPath(name)
        if relative.is_absolute() or ".." in relative.parts:
            raise InvalidInput(f"{name!r} is not a path inside scratch", where=PLAN_FILE)
        (folder / relative).parent.mkdir(parents=True, exist_ok=True)
        (folder / relative).write_text(text)


def _fetches(plan: FakePlan, doorways: Sequence[Doorway]) -> Iterator[tuple[str, str, int]]:
    """Yield name, address and port of what is to be fetched."""
    hosts = {doorway.name: doorway.host for doorway in doorways}
    for word in plan.fetch:
        name, _, port = word.partition(":")
        if name not in hosts or not port.isdecimal():
            raise InvalidInput(
                f"{word!r} is no doorway of this machine", where=PLAN_FILE, hint=f"it has {', '.join(hosts) or 'none'}"
            )
        yield name, hosts[name], int(port)


def _orders(plan: FakePlan, spec: MachineSpec, workdir: Path) -> dict[str, object]:
    """Return what the process is told: the plan, the names of its files, and the words for its journal."""
    return {
        **msgspec.structs.asdict(plan),
        "fetch": list(_fetches(plan, spec.reach)),
        "result": _RESULT,
        "remake": scratch_command(workdir / _FINISHED_DISK, workdir / _RESULT),
        "journal": qmp.JOURNAL_OUTPUT,
        "channel": CHANNEL_LOG,
        "console_log": CONSOLE_LOG,
        "scratch": SCRATCH_DISK,
        "finished": _FINISHED_DISK,
        "output": _OUTPUT,
        "began": _BEGAN,
        "checkpoint": NOTE_NAME,
        "power_off": qmp.journal_event("SHUTDOWN", guest=True, reason="guest-shutdown").decode(),
        "reset": qmp.journal_event("SHUTDOWN", guest=True, reason="guest-reset").decode(),
        "full": qmp.journal_event("BLOCK_IO_ERROR", action="stop", operation="write", nospace=True).decode(),
    }
