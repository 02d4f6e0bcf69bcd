"""deskgrid console: the screen of a job's virtual machine, for a VNC viewer on this PC."""

from __future__ import annotations

import asyncio
import contextlib
import os
import shutil
import socket
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import PurePath
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from msgspec import Struct

from deskgrid.cli.connection import connected
from deskgrid.cli.logs import configure_logs
from deskgrid.cli.output import Json, print_json, print_lines, warn
from deskgrid.cli.overlay import Verbose, Wait, job_of, listen, wait_of
from deskgrid.cli.signals import terminated_like_interrupted
from deskgrid.client.connecting import peer_of
from deskgrid.core.console import CONSOLE, LOGIN_S, MOST_LINE_BYTES, password_in
from deskgrid.errors import Conflict, InvalidInput, Unreachable
from deskgrid.units import format_duration

if TYPE_CHECKING:
    from deskgrid.overlay.peer import Peer
    from deskgrid.overlay.stream import Stream

__all__ = ["console"]

_FIRST_LINE_S = 60.0


class _Screen(Struct):
    """A stream that has come to a machine's screen."""

    local: socket.socket
    """Our end of it, where VNC begins."""
    password: str
    stream: Stream


async def console(
    job: Annotated[str, Parameter(help="The job, as job-42 or 42.")],
    /,
    *,
    port: Annotated[int, Parameter(show_default=False, help="Port on this PC; by default a free one.")] = 0,
    viewer: Annotated[
        str, Parameter(show_default=False, help="Program to start, which gets address and password: vncviewer or remote-viewer.")
    ] = "",
    wait: Wait = "5m",
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """See the screen of a job's virtual machine, and type on it: prints where a VNC viewer connects, and the password for that.

    For the owner of the job, whatever its network, and before it has booted, too. Carries one viewer and ends with it, or with the machine.
    The password is good for one login within two minutes.

    For example:

        deskgrid console job-42
        deskgrid console job-42 --viewer vncviewer
        deskgrid console job-42 --port 5901 --json
    """
    configure_logs(json=json, verbose=verbose, quiet=True)
    job_id, wait_s, program = job_of(job), wait_of(wait), _program(viewer) if viewer else ""
    with terminated_like_interrupted(), listen(str(port)) as listener:
        async with connected() as grid, peer_of(grid) as peer, _screen(peer, f"{CONSOLE}.job-{job_id}", wait_s) as screen:
            number = listener.getsockname()[1]
            _tell(number, screen.password, json=json, shown=not program)
            async with _started(program, number, screen.password) as started:
                visitor = await _visitor(listener, screen.stream, started)
                listener.close()  # for one alone
                await _carry(peer, screen, visitor)


def _program(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise InvalidInput(
            f"{name[:100]} is not installed", where="--viewer", hint="on Debian: sudo apt-get install tigervnc-viewer"
        )
    return found


def _tell(port: int, password: str, *, json: bool, shown: bool) -> None:
    address = f"127.0.0.1:{port}"
    if json:
        print_json({"address": address, "url": f"vnc://{address}", "password": password}, indent=0)  # a line: programs wait for it
    elif shown:
        print_lines(f"vnc://{address}", f"password {password}  (for one login within {format_duration(LOGIN_S)})")
    else:
        print_lines(f"vnc://{address}")


@asynccontextmanager
async def _screen(peer: Peer, service: str, wait_s: float) -> AsyncIterator[_Screen]:
    """Have a stream to a screen while the block lasts."""
    waiting = await peer.look_up(service)
    if waiting:
        warn(f"waiting for {waiting}")
    local, remote = socket.socketpair()
    with local:
        local.setblocking(False)
        try:
            stream = await peer.connect(service, remote, wait_s=wait_s)
        except BaseException:
            remote.close()
            raise
        try:
            yield _Screen(local, password_in(await _first_line(local)), stream)
        finally:
            stream.abort("the console was closed")


async def _first_line(local: socket.socket) -> bytes:
    """Read up to the end of a line and not a byte more: what follows is for the viewer."""
    line = b""
    try:
        async with asyncio.timeout(_FIRST_LINE_S):
            while not line.endswith(b"\n") and len(line) < MOST_LINE_BYTES:
                byte = await asyncio.get_running_loop().sock_recv(local, 1)
                if not byte:
                    break
                line += byte
    except (OSError, TimeoutError) as error:
        raise Unreachable("the machine's screen does not come") from error
    return line


@asynccontextmanager
async def _started(program: str, port: int, password: str) -> AsyncIterator[Process | None]:
    """Run a viewer, if there is one to be run, and end it with the block. It is told the password in ways that no other user sees."""
    if not program:
        yield None
        return
    settings, environment, arguments = b"", dict(os.environ), [f"127.0.0.1::{port}"]
    if PurePath(program).name.startswith("remote-viewer"):  # reads a connection file from stdin
        settings = f"[virt-viewer]\ntype=vnc\nhost=127.0.0.1\nport={port}\npassword={password}\n".encode()
        arguments = ["-"]
    else:  # TigerVNC's and those like it
        environment["VNC_PASSWORD"] = password
    process = await asyncio.create_subprocess_exec(
        program, *arguments, stdin=PIPE if settings else DEVNULL, stdout=DEVNULL, env=environment
    )
    try:
        if process.stdin is not None:
            with contextlib.suppress(ConnectionError):
                process.stdin.write(settings)
                await process.stdin.drain()
            process.stdin.close()
        yield process
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        await process.wait()


async def _visitor(listener: socket.socket, stream: Stream, started: Process | None) -> socket.socket:
    """Return the first connection of a viewer. Raise Unreachable if there will be none."""
    coming = asyncio.ensure_future(asyncio.get_running_loop().sock_accept(listener))
    ending = asyncio.ensure_future(stream.wait_closed())
    failing = asyncio.ensure_future(_failed(started))
    either: set[asyncio.Future[Any]] = {coming, ending, failing}
    try:
        await asyncio.wait(either, timeout=LOGIN_S, return_when=asyncio.FIRST_COMPLETED)
        if coming.done():
            return coming.result()[0]
        if ending.done():
            raise Unreachable(f"the screen is gone: {ending.result()}", hint="does the job run? deskgrid job show")
        if failing.done():
            raise Conflict(f"the viewer ended with exit code {failing.result()}")
        raise Conflict(f"no viewer came within {format_duration(LOGIN_S)}", hint="the password is void now; begin again")
    finally:
        for future in either:
            future.cancel()
        await asyncio.gather(*either, return_exceptions=True)


async def _failed(started: Process | None) -> int:
    """Return the exit code of a viewer that fails. One that only hands over to another may end well before it connects."""
    while started is None or await started.wait() == 0:
        await asyncio.Event().wait()
    return started.returncode or 0


async def _carry(peer: Peer, screen: _Screen, visitor: socket.socket) -> None:
    """Carry bytes between a viewer and the screen until either ends."""
    from deskgrid.overlay.relay import Relay

    relay = Relay(peer.pumps, screen.local, visitor)
    try:
        await relay.wait_closed()
    finally:
        relay.abort("the console was closed")
