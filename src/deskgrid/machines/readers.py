"""Readers (sandbox.py) that start fast: forked by a process that has imported what they need (zygote.py).

A new Python takes some 60 ms of CPU for its imports, which is more than all else of a short job. Where forking is not possible (not Linux, or the
process that forks was lost) a reader is a new Python.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
from collections.abc import Sequence
from typing import BinaryIO, Protocol

import structlog

from deskgrid.machines.sandbox import ENVIRONMENT, Finished, python_command, read_bounded, run_child
from deskgrid.machines.zygote import CODE, MOST_DESCRIPTORS

__all__ = ["Readers", "RunReader", "run_reader"]

_log = structlog.get_logger()

_IDLE_S = 60.0
_END_S = 5.0


class RunReader(Protocol):
    """Runs `function()` of a module in a reader, whose sys.argv[1] is `argument`. The reader has `stdin` (None: nothing to read), `stdout`, and the
    descriptors `kept` under the same numbers; what it says on stderr is returned.

    Raises TimeoutError after `wall_s`. However this ends, also by cancellation, the reader is gone afterwards.
    """

    async def __call__(
        self, function: str, argument: str, *, stdin: int | None, stdout: BinaryIO, kept: Sequence[int] = (), wall_s: float
    ) -> Finished: ...


def run_reader(module: str) -> RunReader:
    """Return what runs each reader as a new Python."""

    async def run(
        function: str, argument: str, *, stdin: int | None, stdout: BinaryIO, kept: Sequence[int] = (), wall_s: float
    ) -> Finished:
        command = python_command(module, function, argument)
        return await run_child(command, stdin=stdin, stdout=stdout, kept=kept, wall_s=wall_s)

    return run


class Readers:
    """Runs the readers of one module. A context manager: at its end nothing is left. `run` is a RunReader."""

    def __init__(self, module: str, *, idle_s: float = _IDLE_S) -> None:
        self._module = module
        self._idle_s = idle_s
        """After which the zygote is ended, until it is needed again."""
        self._run_anew = run_reader(module)
        self._starting = asyncio.Lock()
        self._zygote: asyncio.subprocess.Process | None = None
        self._socket: socket.socket | None = None
        self._lost = not hasattr(socket, "send_fds") or not hasattr(os, "pidfd_open")
        self._running = 0
        self._rest: asyncio.TimerHandle | None = None

    async def __aenter__(self) -> Readers:
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._rest is not None:
            self._rest.cancel()
        self._end_zygote()
        if self._zygote is not None:
            try:
                async with asyncio.timeout(_END_S):
                    await self._zygote.wait()
            except TimeoutError:
                self._zygote.kill()
                await self._zygote.wait()

    async def run(
        self, function: str, argument: str, *, stdin: int | None, stdout: BinaryIO, kept: Sequence[int] = (), wall_s: float
    ) -> Finished:
        """See RunReader."""
        if self._rest is not None:
            self._rest.cancel()
        self._running += 1
        try:
            asked = await self._ask(function, argument, stdin, stdout, kept)
            if asked is None:
                return await self._run_anew(function, argument, stdin=stdin, stdout=stdout, kept=kept, wall_s=wall_s)
            return await self._follow(*asked, wall_s)
        finally:
            self._running -= 1
            if not self._running:
                self._rest = asyncio.get_running_loop().call_later(self._idle_s, self._end_zygote)

    async def _ask(
        self, function: str, argument: str, stdin: int | None, stdout: BinaryIO, kept: Sequence[int]
    ) -> tuple[socket.socket, socket.socket] | None:
        """Return the sockets on which the reader's end and its words come; None if it was not taken."""
        if self._lost or len(kept) > MOST_DESCRIPTORS - 4:
            return None
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            try:
                zygote = await self._connect()
                pairs = [socket.socketpair(), socket.socketpair()]
                (control, reader_control), (words, reader_words) = pairs
                for mine, other in pairs:
                    ours.enter_context(mine)
                    theirs.enter_context(other)
                    mine.setblocking(False)
                nothing = theirs.enter_context(open(os.devnull, "rb"))
                files = [nothing.fileno() if stdin is None else stdin, stdout.fileno(), reader_words.fileno(), *kept]
                request = {"function": function, "argument": argument, "numbers": [0, 1, 2, *kept]}
                socket.send_fds(zygote, [json.dumps(request).encode()], [reader_control.fileno(), *files])
            except OSError as error:  # one that is only busy, or is asked for too much, is asked again the next time
                if not isinstance(error, BlockingIOError) and error.errno != errno.EMSGSIZE:
                    self._lose(error.strerror or str(error))
                return None
            ours.pop_all()
            return control, words

    async def _connect(self) -> socket.socket:
        """Return the socket to the zygote, which is started if it is not there. Raise OSError."""
        async with self._starting:
            if self._socket is None:
                ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
                with contextlib.ExitStack() as stack, theirs:
                    stack.enter_context(ours)
                    ours.setblocking(False)
                    self._zygote = await asyncio.create_subprocess_exec(
                        *python_command("deskgrid.machines.zygote", "main", str(theirs.fileno()), self._module),
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=subprocess.DEVNULL,
                        env=ENVIRONMENT,
                        pass_fds=(theirs.fileno(),),
                        start_new_session=True,  # Ctrl-C is the worker's affair
                    )
                    stack.pop_all()
                self._socket = ours
            return self._socket

    async def _follow(self, control: socket.socket, words: socket.socket, wall_s: float) -> Finished:
        loop = asyncio.get_running_loop()
        told = code = b""
        with control:
            try:
                async with asyncio.timeout(wall_s):
                    stream, writer = await asyncio.open_connection(sock=words)
                    try:
                        told = await read_bounded(stream)
                    finally:
                        writer.close()
                    code = await loop.sock_recv(control, CODE.size)
            finally:
                if not code:
                    with contextlib.suppress(OSError):
                        control.shutdown(socket.SHUT_WR)  # which ends it
                        await loop.sock_recv(control, CODE.size)
        if len(code) == CODE.size:
            return Finished(CODE.unpack(code)[0], b"", told)
        self._lose("it ended")
        return Finished(-signal.SIGKILL, b"", told)

    def _lose(self, why: str) -> None:
        """Do without a zygote from now on: something on this PC is against it."""
        _log.warning("readers_start_anew", module=self._module, error=why)
        self._lost = True
        self._end_zygote()

    def _end_zygote(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
