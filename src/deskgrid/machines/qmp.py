"""QEMU's monitor: a journal that QEMU itself writes, and commands over a socket.

The journal. QEMU gets a second monitor whose input is a file with the one line that negotiates capabilities, and whose output
is a file. So QEMU writes every event (docs/interop/qmp-spec of QEMU, a JSON object a line) to disk by itself from its first
moment on, whether a worker listens or not; after a restart the worker reads there why the machine ended. A listener
on the socket would lose what happens while nobody is connected.

Commands go over a socket in the machine's folder, a connection each, so none is held while QEMU may be killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import msgspec
from msgspec import Struct
from qemu.qmp import ConnectError, QMPClient, QMPError
from qemu.qmp.qmp_client import GreetingError

from deskgrid.errors import MachineFailed
from deskgrid.machines.driver import ExitCause, Exited

__all__ = [
    "JOURNAL_INPUT",
    "JOURNAL_NAME",
    "JOURNAL_OUTPUT",
    "SOCKET_NAME",
    "Journal",
    "attach_vnc",
    "connect",
    "create_journal",
    "execute",
    "journal_event",
    "read_journal",
    "run_job",
]

SOCKET_NAME = "qmp.sock"
JOURNAL_NAME = "journal"
JOURNAL_INPUT = f"{JOURNAL_NAME}.in"
JOURNAL_OUTPUT = f"{JOURNAL_NAME}.out"
"""QEMU's `pipe` device appends these endings; it takes ordinary files as well (every version can, unlike `file` with input)."""

_JOURNAL_PART_BYTES = 1 << 20
_CONNECT_RETRY_S = 0.02
_JOB_POLL_S = 0.02
_VIEWER = "viewer"
_DISCONNECT_LIMIT_S = 1.0
_RESETS = frozenset({"guest-reset", "guest-panic", "subsystem-reset"})

# It logs a traceback for each QEMU that ends while a connection is open, which is an ordinary end here.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL + 1)


class _Details(Struct, frozen=True):
    reason: str = ""
    action: str = ""
    operation: str = ""
    nospace: bool = False
    fatal: bool = False


class _Event(Struct, frozen=True):
    event: str = ""
    data: _Details = _Details()
    QMP: dict[str, Any] | None = None


class Journal(Struct, frozen=True):
    """What the journal says so far."""

    began: bool = False
    """QEMU took its command line and opened its files."""
    shutdown_reason: str = ""
    """Why it ended, in QEMU's words (ShutdownCause); empty while it runs or if it was killed."""
    io_error: str = ""
    """A disk error that froze the machine, for people; empty if there was none."""

    stuck: str = ""
    """Why the hypervisor gave the machine up, though its process lives on."""

    @property
    def hopeless(self) -> bool:
        """Whether it will not go on, though its process lives."""
        return bool(self.io_error or self.stuck)

    def exit(self) -> Exited | None:
        """Return how the machine ended, as far as the journal tells."""
        if self.io_error:
            return Exited(ExitCause.IO_ERROR, self.io_error)
        if self.stuck:
            return Exited(ExitCause.RESET, self.stuck)
        if self.shutdown_reason == "guest-shutdown":
            return Exited(ExitCause.POWERED_OFF)
        if self.shutdown_reason in _RESETS:
            return Exited(ExitCause.RESET, f"the guest ended by {self.shutdown_reason}")
        if self.shutdown_reason:
            return Exited(ExitCause.KILLED, f"QEMU ended: {self.shutdown_reason}")
        return None


def create_journal(workdir: Path) -> None:
    """Make the two files of the journal before QEMU starts."""
    (workdir / JOURNAL_INPUT).write_bytes(b'{"execute": "qmp_capabilities"}\n')
    (workdir / JOURNAL_OUTPUT).write_bytes(b"")


def read_journal(workdir: Path) -> Journal:
    """Read the journal; a missing one, or lines that are not whole, count as nothing said."""
    try:
        with (workdir / JOURNAL_OUTPUT).open("rb") as file:
            data = file.read(_JOURNAL_PART_BYTES)
            # A guest can make QEMU write an event now and then (RTC_CHANGE) for days: what counts is at the two ends.
            file.seek(max(len(data), os.fstat(file.fileno()).st_size - _JOURNAL_PART_BYTES))
            data += file.read(_JOURNAL_PART_BYTES)
    except OSError:
        return Journal()
    journal = Journal()
    for line in data.split(b"\n"):
        journal = _account(journal, line)
    return journal


def journal_event(event: str, **data: object) -> bytes:
    """Return an event as QEMU journals it."""
    return msgspec.json.encode({"event": event, "data": data}) + b"\n"


def _account(journal: Journal, line: bytes) -> Journal:
    try:
        event = msgspec.json.decode(line, type=_Event)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return journal
    change = msgspec.structs.replace
    if event.QMP is not None:
        return change(journal, began=True)
    if event.event == "SHUTDOWN" and not journal.shutdown_reason:
        return change(journal, shutdown_reason=event.data.reason or "unknown")
    if event.event == "BLOCK_IO_ERROR" and event.data.action == "stop" and not journal.io_error:
        why = "the disk of this PC is full" if event.data.nospace else event.data.reason or "unknown"
        return change(journal, io_error=f"the machine's disk cannot be {_DONE.get(event.data.operation, 'used')}: {why}")
    if event.event == "BLOCK_IMAGE_CORRUPTED" and event.data.fatal and not journal.io_error:
        return change(journal, io_error="the machine's disk image is damaged")
    return journal


_DONE = {"read": "read", "write": "written"}


async def execute(workdir: Path, command: str, arguments: dict[str, object] | None = None, *, limit_s: float = 5.0) -> Any:
    """Run one command of the machine in `workdir` and return its answer. Waits for the socket of a QEMU that is starting.

    Raise MachineFailed if QEMU refuses, does not answer within `limit_s`, or is gone.
    """
    async with _monitor(workdir, command, limit_s) as client:
        return await client.execute(command, arguments)


async def attach_vnc(workdir: Path, connection: socket.socket, password: str, *, lifetime_s: float, limit_s: float = 5.0) -> None:
    """Let the VNC server of the machine in `workdir` serve a socket, with a password that is good for a login within `lifetime_s`.

    Errors as `execute`.
    """
    async with _monitor(workdir, "add_client", limit_s) as client:
        await client.execute("set_password", {"protocol": "vnc", "password": password})
        await client.execute("expire_password", {"protocol": "vnc", "time": f"+{lifetime_s:.0f}"})
        client.send_fd_scm(connection.fileno())
        await client.execute("getfd", {"fdname": _VIEWER})
        await client.execute("add_client", {"protocol": "vnc", "fdname": _VIEWER})


@contextlib.asynccontextmanager
async def _monitor(workdir: Path, what: str, limit_s: float) -> AsyncIterator[QMPClient]:
    """Give a connection to the monitor of the machine in `workdir`, for at most `limit_s`. Raise MachineFailed if `what` was not done."""
    client = QMPClient("deskgrid")
    try:
        async with asyncio.timeout(limit_s):
            await _meet(client, workdir / SOCKET_NAME)
            yield client
    except (QMPError, OSError, TimeoutError) as error:
        raise MachineFailed(f"QEMU did not do {what}: {str(error) or type(error).__name__}") from error
    finally:
        # A QEMU that ended meanwhile has closed the connection already, which qemu.qmp tells in several ways.
        with contextlib.suppress(QMPError, OSError, EOFError, TimeoutError):
            async with asyncio.timeout(_DISCONNECT_LIMIT_S):
                await client.disconnect()


async def run_job(workdir: Path, command: str, arguments: dict[str, object], *, limit_s: float) -> None:
    """Run a command that QEMU carries out as a job, such as snapshot-save, to its end.

    Raise MachineFailed with QEMU's words if it fails or takes longer than `limit_s`.
    """
    name = f"deskgrid-{command}"
    try:
        async with asyncio.timeout(limit_s):
            await _concluded(workdir, name, limit_s)  # of somebody who did not wait for its end
            await execute(workdir, command, {"job-id": name, **arguments}, limit_s=limit_s)
            error = await _concluded(workdir, name, limit_s)
    except TimeoutError as late:
        raise MachineFailed(f"QEMU did not do {command} within {limit_s:.0f} s") from late
    if error is None:
        raise MachineFailed(f"QEMU forgot {name}")
    if error:
        raise MachineFailed(f"QEMU did not do {command}: {error}")


async def _concluded(workdir: Path, name: str, limit_s: float) -> str | None:
    """Wait for a job's end and dismiss it; return why it failed, empty if it did not, None if QEMU knows no such job."""
    while True:
        jobs = await execute(workdir, "query-jobs", limit_s=limit_s)
        job = next((job for job in jobs if job.get("id") == name), None)
        if job is None:
            return None
        if job.get("status") == "concluded":
            await execute(workdir, "job-dismiss", {"id": name}, limit_s=limit_s)
            return str(job.get("error") or "")
        await asyncio.sleep(_JOB_POLL_S)


async def _meet(client: QMPClient, path: Path) -> None:
    """Connect, once more if an event came before QEMU's greeting, as one may while it starts."""
    while True:
        connection = await connect(path)
        try:
            await client.connect(connection)
            return
        except ConnectError as error:
            connection.close()
            if not isinstance(error.exc, GreetingError):
                raise
            await asyncio.sleep(_CONNECT_RETRY_S)
        except BaseException:
            # Cancelled at the very start qemu.qmp leaves it open, and QEMU, which talks to one at a time, hears nobody else.
            connection.close()
            raise


async def connect(path: Path) -> socket.socket:
    """Return a connection (not blocking) to a local socket; waits for who is to listen there. Raise FileNotFoundError if its folder is gone."""
    while True:
        try:
            return _open_socket(path)
        except (FileNotFoundError, ConnectionRefusedError):
            if not path.parent.exists():
                raise
            await asyncio.sleep(_CONNECT_RETRY_S)


def _open_socket(path: Path) -> socket.socket:
    """Connect to a local socket whose path may be longer than the 108 bytes that an address holds (unix(7))."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        if sys.platform != "linux":
            connection.connect(str(path))
        else:
            folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY)
            try:
                connection.connect(f"/proc/self/fd/{folder}/{path.name}")
            finally:
                os.close(folder)
    except BaseException:
        connection.close()
        raise
    connection.setblocking(False)
    return connection
