"""Relays: what a hub carries between two peers that cannot reach each other. It sees ciphertext and lets it pass.

Bytes go from socket to pipe to socket inside the kernel (splice(2)) where the system can, else through a buffer. The end of data and
a reset of each side are passed on to the other. A pipe is borrowed from the thread only while bytes are inside.
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import sys
import time

from deskgrid.overlay.pump import BUFFER_BYTES, ERROR, HANGUP, READ, WRITE, Buffer, Outcome, Pipe, Pump, Pumps, Timer
from deskgrid.overlay.stream_start import hurry

__all__ = ["Relay"]

_CAN_SPLICE = hasattr(os, "splice")
_FLAGS = os.SPLICE_F_MOVE | os.SPLICE_F_NONBLOCK if hasattr(os, "SPLICE_F_MOVE") else 0
_ABORTIVE = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
_TURN_BYTES = 1 << 20
_BURST_S = 0.25
_REST_S = 0.02
"""A stream over its rate rests at least that long, so that it moves more than crumbs afterwards."""


class _SpliceWay:
    """One direction, through a pipe."""

    __slots__ = ("_pipe", "_source", "_target", "ended", "held", "shut")

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self._source, self._target = source.fileno(), target.fileno()
        self._pipe: Pipe | None = None
        self.held = 0
        self.ended = self.shut = False

    def fill(self, pump: Pump, limit: int) -> int:
        """Take up to `limit` bytes from the source; 0: nothing there now, or the end."""
        pipe = self._pipe
        if pipe is None:
            pipe = self._pipe = pump.borrow_pipe()
        try:
            size = os.splice(self._source, pipe.write_fd, min(limit, pipe.size_bytes), flags=_FLAGS)
        except BlockingIOError:
            size = 0
        else:
            self.ended = not size
        self.held += size
        if not self.held:
            self.drop(pump)
        return size

    def flush(self, pump: Pump) -> None:
        """Give the target what it takes."""
        if self._pipe is not None:
            with contextlib.suppress(BlockingIOError):
                self.held -= os.splice(self._pipe.read_fd, self._target, self.held, flags=_FLAGS)
            if not self.held:
                self.drop(pump)

    def drop(self, pump: Pump) -> None:
        """Hold nothing."""
        if self._pipe is not None:
            pump.return_pipe(self._pipe, is_empty=not self.held)
            self._pipe = None


class _CopyWay:
    """One direction, through a buffer."""

    __slots__ = ("_buffer", "_rest", "_source", "_target", "ended", "shut")

    def __init__(self, source: socket.socket, target: socket.socket) -> None:
        self._source, self._target = source, target
        self._buffer: Buffer | None = None
        self._rest = memoryview(b"")
        self.ended = self.shut = False

    @property
    def held(self) -> int:
        """Bytes that the target did not take yet."""
        return len(self._rest)

    def fill(self, pump: Pump, limit: int) -> int:
        """Take up to `limit` bytes from the source; 0: nothing there now, or the end."""
        try:
            size = self._source.recv_into(pump.buffer.view, min(limit, BUFFER_BYTES))
        except (BlockingIOError, InterruptedError):
            return 0
        self.ended = not size
        self._rest = pump.buffer.view[:size]
        return size

    def flush(self, pump: Pump) -> None:
        """Give the target what it takes; keep the buffer if that is not all."""
        with contextlib.suppress(BlockingIOError, InterruptedError):
            self._rest = self._rest[self._target.send(self._rest) :]
        if not self._rest:
            self.drop(pump)
        elif self._buffer is None:
            self._buffer = pump.keep_buffer()

    def drop(self, pump: Pump) -> None:
        """Hold nothing."""
        self._rest = memoryview(b"")
        if self._buffer is not None:
            pump.return_buffer(self._buffer)
            self._buffer = None


class Relay:
    """Carries bytes between two sockets until both directions ended, one side was reset, or nothing moved for `idle_s`."""

    __slots__ = (
        "_a",
        "_b",
        "_ended",
        "_fds",
        "_hung",
        "_idle_s",
        "_moved_at",
        "_pump",
        "_rate",
        "_refilled_at",
        "_rest",
        "_timer",
        "_tokens",
        "_ways",
        "carried_bytes",
    )

    def __init__(
        self,
        pumps: Pumps,
        a: socket.socket,
        b: socket.socket,
        *,
        max_bytes_per_s: int = 0,
        idle_s: float = 0.0,
        splice: bool = _CAN_SPLICE,
    ) -> None:
        """Take over both sockets and start. `max_bytes_per_s` is for both directions together; 0: no limit, of either kind."""
        self._a, self._b = a, b
        self._fds = (a.fileno(), b.fileno())
        way = _SpliceWay if splice else _CopyWay
        self._ways = (way(a, b), way(b, a))
        self._hung = [False, False]
        self._ended: Outcome[str] = Outcome()
        self._pump: Pump | None = None
        self._timer: Timer | None = None
        self._idle_s, self._rate = idle_s, max_bytes_per_s
        self._tokens = max_bytes_per_s * _BURST_S
        self._rest: Timer | None = None
        self._moved_at = self._refilled_at = time.monotonic()
        self.carried_bytes = 0
        """In both directions together."""
        for sock in (a, b):
            sock.setblocking(False)
            hurry(sock)
        self._pump = pumps.carry(self)

    async def wait_closed(self) -> str:
        """Return how it ended, once it has: "finished", or the reason of the reset. Both sockets are closed then."""
        return await self._ended.wait()

    def abort(self, reason: str = "aborted") -> None:
        """Reset both sides soon. Thread-safe, idempotent."""
        pump = self._pump
        if pump is not None:
            pump.post(lambda: self._reset(reason))

    # what the pump calls

    def start(self, pump: Pump) -> None:
        """Say what to wait for."""
        self._pump = pump
        if self._idle_s:
            self._timer = pump.after(self._idle_s, self._check)
        self._go_on(pump)

    def ready(self, fd: int, mask: int) -> None:
        """Move about one pipe."""
        pump = self._pump
        if pump is None or self._ended.is_set:
            return
        side = 0 if fd == self._fds[0] else 1
        try:
            if mask & (ERROR | HANGUP):
                self._hangup(side, mask)
            if mask & WRITE:
                self._move(pump, self._ways[1 - side])
            if mask & READ:
                self._move(pump, self._ways[side])
            self._go_on(pump)
        except ConnectionError:
            self._reset("reset")
        except OSError as error:  # also: no file number left for a pipe
            self._reset(f"broken: {error.strerror or error}")

    def abandon(self, reason: str) -> None:
        """Reset both sides at once."""
        self._reset(reason)

    def _hangup(self, side: int, mask: int) -> None:
        if mask & ERROR:
            raise ConnectionResetError
        self._hung[side] = True

    def _move(self, pump: Pump, way: _SpliceWay | _CopyWay) -> None:
        if not way.held and not way.ended and self._rest is None:
            size = way.fill(pump, self._allowance() if self._rate else _TURN_BYTES)
            if size:
                self._count(pump, size)
        if way.held:
            way.flush(pump)

    def _count(self, pump: Pump, size: int) -> None:
        self.carried_bytes += size
        pump.count(size)
        if self._idle_s:
            self._moved_at = time.monotonic()
        if self._rate:
            self._tokens -= size
            if self._tokens < 1:
                self._rest = pump.after(_REST_S - self._tokens / self._rate, lambda: self._go_on_after_rest(pump))

    def _allowance(self) -> int:
        """Fill the bucket and return what is in it."""
        now = time.monotonic()
        self._tokens = min(self._rate * _BURST_S, self._tokens + (now - self._refilled_at) * self._rate)
        self._refilled_at = now
        return max(1, min(_TURN_BYTES, int(self._tokens)))

    def _go_on_after_rest(self, pump: Pump) -> None:
        self._rest = None
        if not self._ended.is_set:
            self._go_on(pump)

    def _go_on(self, pump: Pump) -> None:
        for way, target in zip(self._ways, (self._b, self._a), strict=True):
            if way.ended and not way.held and not way.shut:
                way.shut = True
                target.shutdown(socket.SHUT_WR)
        there, back = self._ways
        if there.shut and back.shut:
            self._finish("finished")
            return
        self._watch(pump, 0, there, back)
        self._watch(pump, 1, back, there)

    def _watch(self, pump: Pump, side: int, outward: _SpliceWay | _CopyWay, inward: _SpliceWay | _CopyWay) -> None:
        mask: int | None = (0 if outward.held or outward.ended or self._rest else READ) | (WRITE if inward.held else 0)
        if self._hung[side] and not mask:
            mask = None  # it would be told again and again
        pump.watch(self._fds[side], mask, self)

    def _check(self) -> None:
        pump = self._pump
        if pump is None or self._ended.is_set:
            return
        left_s = self._moved_at + self._idle_s - time.monotonic()
        if left_s <= 0:
            self._reset(f"idle for {self._idle_s:g} s")
        else:
            self._timer = pump.after(left_s, self._check)

    def _reset(self, reason: str) -> None:
        if self._ended.is_set:
            return
        for sock in (self._a, self._b):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTIVE)
        self._finish(reason)

    def _finish(self, reason: str) -> None:
        pump = self._pump
        if pump is not None:
            for timer in (self._timer, self._rest):
                if timer is not None:
                    timer.cancel()
            for fd, way in zip(self._fds, self._ways, strict=True):
                pump.watch(fd, None, self)
                way.drop(pump)
            pump.forget(self)
        self._a.close()
        self._b.close()
        self._ended.set(reason)
