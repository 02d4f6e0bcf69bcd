"""Readers (sandbox.py) that start fast: forked by a process that has imported what they need (zygote.py).

A new Python takes some 60 ms of CPU for its imports, which is more than all else of a short job. Where forking is not possible (not on Linux; the zygote
is gone, or has no process left for it) a reader is a new Python, also for what had begun.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
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
"""That an end takes at most; then the zygote is ended by force, and its readers with it."""
_MOST_LOST = 3
"""Zygotes, after which we do without: something on this PC is against them."""


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
        self._lost = 0 if hasattr(socket, "send_fds") and hasattr(os, "pidfd_open") else _MOST_LOST
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
                self._kill_zygote()
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
            finished = await self._follow(*asked, wall_s) if asked is not None else None
            if finished is not None:
                return finished
            stdout.seek(0)
            stdout.truncate()
            return await self._run_anew(function, argument, stdin=stdin, stdout=stdout, kept=kept, wall_s=wall_s)
        finally:
            self._running -= 1
            if not self._running:
                self._rest = asyncio.get_running_loop().call_later(self._idle_s, self._end_zygote)

    async def _ask(
        self, function: str, argument: str, stdin: int | None, stdout: BinaryIO, kept: Sequence[int]
    ) -> tuple[socket.socket, socket.socket] | None:
        """Return the sockets on which the reader's end and its words come; None if it was not taken."""
        if self._lost >= _MOST_LOST or len(kept) > MOST_DESCRIPTORS - 4:
            return None
        request = {"function": function, "argument": argument, "numbers": [0, 1, 2, *kept]}
        with contextlib.ExitStack() as ours, contextlib.ExitStack() as theirs:
            try:
                zygote = await self._connect()
                pairs = [socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET), socket.socketpair()]
                (control, reader_control), (words, reader_words) = pairs
                for mine, other in pairs:
                    ours.enter_context(mine)
                    theirs.enter_context(other)
                    mine.setblocking(False)
                nothing = theirs.enter_context(open(os.devnull, "rb"))
                files = [nothing.fileno() if stdin is None else stdin, stdout.fileno(), reader_words.fileno(), *kept]
                control.send(json.dumps(request).encode())
                socket.send_fds(zygote, [b"."], [reader_control.fileno(), *files])
            except ConnectionError as error:
                self._lost += 1
                _log.warning("zygote_lost", module=self._module, error=str(error))
                self._end_zygote()
                return None
            except OSError as error:  # it is only busy, or we are short of something
                _log.info("reader_not_forked", module=self._module, error=str(error))
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

    async def _follow(self, control: socket.socket, words: socket.socket, wall_s: float) -> Finished | None:
        """Return how a reader ends; None if it was lost with its zygote, or never was."""
        loop = asyncio.get_running_loop()
        code = b""
        with control:
            try:
                async with asyncio.timeout(wall_s):
                    stream, writer = await asyncio.open_connection(sock=words)
                    try:
                        told = await read_bounded(stream)
                    finally:
                        writer.close()
                    with contextlib.suppress(ConnectionError):
                        code = await loop.sock_recv(control, CODE.size)
            finally:
                if not code:
                    await self._end_reader(control)
        return Finished(CODE.unpack(code)[0], b"", told) if code else None

    async def _end_reader(self, control: socket.socket) -> None:
        """Return when the reader is gone."""
        with contextlib.suppress(OSError):
            control.shutdown(socket.SHUT_WR)
        try:
            async with asyncio.timeout(_END_S):
                with contextlib.suppress(ConnectionError):
                    await asyncio.get_running_loop().sock_recv(control, CODE.size)
        except TimeoutError:
            self._kill_zygote()

    def _kill_zygote(self) -> None:
        if self._zygote is not None:
            with contextlib.suppress(ProcessLookupError):
                self._zygote.kill()

    def _end_zygote(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None
