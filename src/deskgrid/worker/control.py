"""How other commands of this PC's owner talk to the running worker, and what they do when none runs.

The worker listens on a free port of 127.0.0.1 and writes port and a token of its own into HOME/control.json, mode 0600: who may read
that file may command the worker. Loopback TCP, because it is the same on all systems and has no bound on the length of
HOME's path, as Unix sockets do. One line each way, JSON:

    {"token": .., "command": "status" | "pause" | "resume" | "leave"}
    {"status": {..}}  or  {"error": class, "message": .., "hint": ..}
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
from msgspec import Struct

from deskgrid import errors
from deskgrid.clock import Clock, SystemClock
from deskgrid.errors import Conflict, DeskgridError, InvalidInput, Unreachable
from deskgrid.files import write_durably
from deskgrid.model.ids import AttemptId, JobId
from deskgrid.model.machines import Fingerprint
from deskgrid.model.workers import Capacity
from deskgrid.units import format_size
from deskgrid.worker.home import Home, locked

__all__ = ["COMMANDS", "AttemptStatus", "StatusAnswer", "ask", "control_server"]

COMMANDS = ("status", "pause", "resume", "leave")
_LINE_BYTES = 1 << 20
_REQUEST_S = 2.0
_ANSWER_S = 60.0
_START_S = 5.0
"""How long a worker that has just been started may take until it listens."""
_RETRY_S = 0.1


class AttemptStatus(Struct, frozen=True, kw_only=True):
    """One attempt, as the owner sees it."""

    attempt_id: AttemptId
    job_id: JobId
    number: int
    name: str
    """Of the job."""
    phase: str
    """fetching, prepared, started, exited, settled or done."""
    state: str
    """As the server is told."""
    started_at: float | None
    """Seconds since 1970."""
    ran_s: float
    cpus: int
    memory_bytes: int
    disk_bytes: int
    fetched_bytes: int = 0


class StatusAnswer(Struct, frozen=True, kw_only=True):
    """What the worker of one folder is and does. Without a running worker: what is on the disk."""

    running: bool
    name: str
    address: str
    """Of the server."""
    paused: bool
    why_paused: str = ""
    message: str = ""
    """What the command has done."""
    connected: bool = False
    connected_since: float | None = None
    """Seconds since 1970, as all times here."""
    last_sync_at: float | None = None
    lease_until: float | None = None
    """Until when the attempts are leased, if the server is not heard of again."""
    trouble: str = ""
    """Why the server cannot be reached, or why no work is taken."""
    attempts: tuple[AttemptStatus, ...] = ()
    lent: Capacity | None = None
    free: Capacity | None = None
    disk_bytes: int = 0
    """What attempts take."""
    cache_bytes: int = 0
    cached: int = 0
    """Disks in the cache."""
    drivers: tuple[Fingerprint, ...] = ()
    process_id: int | None = None

    def __str__(self) -> str:
        """Show it to people."""
        return "\n".join(line for line in (self.message, *_lines(self)) if line)


class _Address(Struct, frozen=True):
    port: int
    token: str


class _Command(Struct, frozen=True):
    token: str
    command: str


class _Reply(Struct, frozen=True, omit_defaults=True):
    status: StatusAnswer | None = None
    error: str = ""
    message: str = ""
    hint: str = ""


Answer = Callable[[str], Awaitable[StatusAnswer]]


@asynccontextmanager
async def control_server(home: Home, answer: Answer) -> AsyncIterator[None]:
    """Listen for commands while the block runs; `answer` carries one out and may raise DeskgridError."""
    token = secrets.token_urlsafe(32)
    tasks: set[asyncio.Task[None]] = set()

    def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        tasks.add(task := asyncio.create_task(_serve(reader, writer, token, answer)))
        task.add_done_callback(tasks.discard)

    server = await asyncio.start_server(serve, "127.0.0.1", 0, limit=_LINE_BYTES)
    try:
        port = server.sockets[0].getsockname()[1]
        write_durably(home.control, msgspec.json.encode(_Address(port, token)))
        yield
    finally:
        server.close()
        home.control.unlink(missing_ok=True)
        # Not a TaskGroup, which would wrap what the block raises. Who asked is still answered.
        await asyncio.gather(*tasks, return_exceptions=True)


async def _serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, token: str, answer: Answer) -> None:
    try:
        async with asyncio.timeout(_REQUEST_S):
            line = await reader.readline()
        writer.write(msgspec.json.encode(await _reply(line, token, answer)) + b"\n")
        async with asyncio.timeout(_REQUEST_S):
            await writer.drain()
    except (OSError, TimeoutError, ValueError):
        return  # whoever it was has gone, or is nobody who may ask
    finally:
        writer.close()


async def _reply(line: bytes, token: str, answer: Answer) -> _Reply:
    try:
        command = msgspec.json.decode(line, type=_Command)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return _Reply(error="InvalidInput", message="this is no command")
    if not hmac.compare_digest(command.token.encode(), token.encode()):
        return _Reply(error="Unauthenticated", message="this is another worker's token")
    try:
        return _Reply(status=await answer(command.command))
    except DeskgridError as error:
        return _Reply(error=type(error).__name__, message=error.message, hint=error.hint)


async def ask(home: Path, command: str, *, clock: Clock | None = None) -> StatusAnswer:
    """Let the worker of a folder carry out a command (see COMMANDS), or do it on the files if none runs.

    Raise InvalidInput for another command, Unreachable if the worker runs but does not answer, and what the worker raises.
    """
    if command not in COMMANDS:
        raise InvalidInput(f"there is no command {command!r}", hint=f"allowed: {', '.join(COMMANDS)}")
    clock = clock or SystemClock()
    place = Home(home.absolute())
    deadline = clock.monotonic() + _START_S
    while True:
        with contextlib.suppress(Conflict):
            return await _without_worker(place, command)
        try:
            return await _ask_running(place, command)
        except (OSError, msgspec.DecodeError) as error:
            if clock.monotonic() >= deadline:
                raise Unreachable(f"the worker of {home} does not answer: {error}", hint="it may be about to end") from error
        await clock.sleep(_RETRY_S)


async def _ask_running(home: Home, command: str) -> StatusAnswer:
    address = msgspec.json.decode(home.control.read_bytes(), type=_Address)
    reader, writer = await asyncio.open_connection("127.0.0.1", address.port, limit=_LINE_BYTES)
    try:
        writer.write(msgspec.json.encode(_Command(address.token, command)) + b"\n")
        async with asyncio.timeout(_ANSWER_S):
            reply = msgspec.json.decode(await reader.readline(), type=_Reply)
    finally:
        writer.close()
    if reply.status is not None:
        return reply.status
    kind = getattr(errors, reply.error) if reply.error in errors.__all__ else DeskgridError
    raise kind(reply.message, hint=reply.hint)


async def _without_worker(home: Home, command: str) -> StatusAnswer:
    """Carry out a command on the files. Raise Conflict if a worker runs."""
    from deskgrid.worker.leave import leave_home, status_of_home  # here: it needs drivers, which take time to import

    if not home.folder.is_dir():
        raise InvalidInput(f"there is no worker in {home.folder}", hint="deskgrid worker join LINK")
    with locked(home):
        if command == "leave":
            return await leave_home(home)
        if command == "pause":
            write_durably(home.paused, b"deskgrid worker resume removes this file\n")
        if command == "resume":
            home.paused.unlink(missing_ok=True)
        words = {"pause": "paused; the worker will do nothing when it runs", "resume": "resumed; start it: deskgrid worker run"}
        return status_of_home(home, words.get(command, ""))


def _lines(status: StatusAnswer) -> list[str]:
    if status.message and not status.name:
        return []
    why = f" ({status.why_paused})" if status.why_paused else ""
    state = f"paused{why}" if status.paused else "running" if status.running else "not running"
    lines = [f"worker {status.name} of {status.address}: {state}"]
    if status.running:
        lines.append("connected" if status.connected else f"not connected: {status.trouble or 'not yet'}")
        if status.connected and status.trouble:
            lines.append(f"takes no work: {status.trouble}")
    for driver in status.drivers:
        what = f"{driver.version} {driver.accelerator}".strip() or "usable" if driver.usable else "not usable"
        lines.append(f"driver {driver.driver}: {what}{f' ({driver.reason})' if driver.reason else ''}")
    if status.lent is not None and status.free is not None:
        lines.append(f"lent: {_amount(status.lent)}; free: {_amount(status.free)}")
    lines.append(f"cache: {status.cached} disks, {format_size(status.cache_bytes)}")
    lines += [
        f"attempt {one.number} of job {one.job_id} ({one.name}): {one.phase}, {one.cpus} CPUs, {format_size(one.memory_bytes)}"
        for one in status.attempts
    ]
    return lines


def _amount(amount: Capacity) -> str:
    return f"{amount.cpus} CPUs, {format_size(amount.memory_bytes)} memory, {format_size(amount.disk_bytes)} disk"
