"""Starts the process in which BitTorrent runs (engine_child.py) and talks with it. Its torrents are files in one folder.

It is made for being killed: whatever becomes of the process, the worker goes on without it.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
from collections.abc import Sequence
from typing import Any

import msgspec
import structlog

from deskgrid.errors import Unreachable
from deskgrid.swarm.engine_words import Command, Done, Event, Flush, Listening, Piece, Remove, Rename, Start, State

__all__ = ["Engine"]

_log = structlog.get_logger()
_HEAD = struct.Struct(">I")
_MOST_BYTES = 1 << 22
"""Of an event: more the child never says, unless somebody else speaks for it."""
_START_S = 60.0
_DO_S = 30.0
_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C.UTF-8"} if os.name == "posix" else None


class Engine:
    """One child. `start` it once, `close` it at the end; methods that tell it something only put it on its way."""

    def __init__(self, command: Sequence[str], folder: str, *, port: int = 0) -> None:
        """`command` starts a confined engine_child; 0: any free port."""
        self._command, self._folder = command, folder
        self._wanted_port = port
        self._process: asyncio.subprocess.Process | None = None
        self._reading: asyncio.Task[None] | None = None
        self._states: dict[str, State] = {}
        self._doing: dict[str, asyncio.Future[bool]] = {}
        self._changed = asyncio.Event()
        self.port = 0
        """Where it takes connections; 0: nowhere."""
        self._listens = asyncio.Event()
        self.running = False

    async def start(self) -> None:
        """Start the child. Raise Unreachable if it does not come up."""
        port = self._wanted_port or _free_port()
        self._process = await asyncio.create_subprocess_exec(
            *self._command,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.DEVNULL,
            env=_ENVIRONMENT,
        )
        self.running = True
        self._reading = asyncio.create_task(self._read(self._process))
        try:
            self.tell(Start(self._folder, port))
            async with asyncio.timeout(_START_S):
                await self._listens.wait()
            if not self.running:
                raise Unreachable("the process for sharing does not start", hint="is libtorrent installed?")
        except BaseException as error:
            await self.close()
            if isinstance(error, TimeoutError):
                raise Unreachable("the process for sharing does not answer") from error
            raise

    async def close(self) -> None:
        """End the child. Idempotent."""
        self.running = False
        process, self._process = self._process, None
        if process is not None:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    process.kill()
            if self._reading is not None:
                await asyncio.gather(self._reading, return_exceptions=True)
            await process.wait()
            if process.stdin is not None:
                process.stdin.close()

    def cpu_s(self) -> float:
        """Return the CPU seconds that the child has used."""
        import psutil  # not in the child

        if self._process is None:
            return 0.0
        with contextlib.suppress(psutil.Error):
            times = psutil.Process(self._process.pid).cpu_times()
            return float(times.user + times.system)
        return 0.0

    def tell(self, command: Command) -> None:
        """Say something to the child. Raise Unreachable if it is gone."""
        if self._process is None or self._process.stdin is None or not self.running:
            raise Unreachable("the process for sharing has ended")
        data = msgspec.msgpack.encode(command)
        self._process.stdin.write(_HEAD.pack(len(data)) + data)
        if isinstance(command, Remove):
            self._states.pop(command.name, None)

    async def give(self, piece: Piece) -> None:
        """Say a piece, and wait until the child keeps up. Raise Unreachable."""
        self.tell(piece)
        if self._process is not None and self._process.stdin is not None:
            with contextlib.suppress(ConnectionError):
                await self._process.stdin.drain()

    def state(self, name: str) -> State:
        """Return how a torrent stands. Raise Unreachable if the child is gone."""
        if not self.running:
            raise Unreachable("the process for sharing has ended")
        return self._states.get(name) or State(name=name)

    @property
    def changed(self) -> asyncio.Event:
        """Set at the next change. Take it, look, then wait for it."""
        return self._changed

    async def do(self, command: Flush | Rename) -> bool:
        """Let something be done to a torrent's file, while it is shared; return whether it was, in time. Raise Unreachable."""
        done: asyncio.Future[bool] = asyncio.get_running_loop().create_future()
        self._doing[command.name] = done
        self.tell(command)
        try:
            async with asyncio.timeout(_DO_S):
                return await done
        except TimeoutError:
            return False

    async def _read(self, process: asyncio.subprocess.Process) -> None:
        decoder = msgspec.msgpack.Decoder(Event)
        try:
            while process.stdout is not None:
                size = _HEAD.unpack(await process.stdout.readexactly(_HEAD.size))[0]
                if size > _MOST_BYTES:
                    break
                self._hear(decoder.decode(await process.stdout.readexactly(size)))
        except (asyncio.IncompleteReadError, msgspec.DecodeError, ConnectionError):
            pass
        finally:
            if self.running:
                _log.warning("sharing_ended", why="its process is gone")
            self.running = False
            self._listens.set()
            self._pulse()
            for waiting in self._doing.values():
                if not waiting.done():
                    waiting.set_result(False)

    def _hear(self, event: Any) -> None:
        if isinstance(event, Listening):
            self.port = event.port or self.port
            self._listens.set()
        elif isinstance(event, Done):
            waiting = self._doing.pop(event.name, None)
            if waiting is not None and not waiting.done():
                waiting.set_result(event.done)
        else:
            self._states[event.name] = event
        self._pulse()

    def _pulse(self) -> None:
        pulse, self._changed = self._changed, asyncio.Event()
        pulse.set()


def _free_port() -> int:
    """Return a port that is free now, for all addresses."""
    with socket.socket() as probe:
        probe.bind(("0.0.0.0", 0))  # noqa: S104 - to be reached is what it is for
        port: int = probe.getsockname()[1]
        return port
