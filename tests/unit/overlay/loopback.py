"""Sockets for tests of what carries bytes: pairs of TCP connections on loopback, and what a program does with its end."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import struct
import time
from collections.abc import AsyncIterator, Callable

from deskgrid.overlay.pump import Pumps

__all__ = ["eventually", "nothing_left", "raise_fd_limit", "receive", "reset", "tcp_pair", "unread", "write_until_full"]


def tcp_pair(buffer_bytes: int = 0) -> tuple[socket.socket, socket.socket]:
    """Return both ends of a TCP connection, not blocking; `buffer_bytes` makes the system's buffers small."""
    with socket.socket() as listener:
        if buffer_bytes:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        listener.bind(("127.0.0.1", 0))
        listener.listen(1)
        near = socket.socket()
        if buffer_bytes:
            near.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
            near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer_bytes)
        near.connect(listener.getsockname())
        far, _ = listener.accept()
        if buffer_bytes:
            far.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, buffer_bytes)
    near.setblocking(False)
    far.setblocking(False)
    return near, far


async def receive(sock: socket.socket, size: int | None = None) -> bytes:
    """Return `size` bytes, or all until the end. A reset raises ConnectionResetError."""
    loop, data = asyncio.get_running_loop(), bytearray()
    async with asyncio.timeout(20):
        while size is None or len(data) < size:
            part = await loop.sock_recv(sock, 256 << 10 if size is None else size - len(data))
            if not part:
                break
            data += part
    return bytes(data)


def reset(sock: socket.socket) -> None:
    """Close with a reset, as a program that died does."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    sock.close()


async def write_until_full(sock: socket.socket, quiet_s: float = 0.3) -> int:
    """Write until nothing was taken for `quiet_s`; return how much was."""
    sent, last = 0, time.monotonic()
    part = bytes(64 << 10)
    while time.monotonic() - last < quiet_s:
        try:
            sent += sock.send(part)
            last = time.monotonic()
        except BlockingIOError:
            await asyncio.sleep(0.01)
    return sent


async def eventually(condition: Callable[[], object], limit_s: float = 10.0) -> None:
    """Wait until a condition holds. Raise TimeoutError if it does not in time."""
    async with asyncio.timeout(limit_s):
        while not condition():
            await asyncio.sleep(0.005)


@contextlib.asynccontextmanager
async def nothing_left(*, portable: bool = False, threads: int = 2) -> AsyncIterator[Pumps]:
    """Lend pumps; afterwards the process has as many open files and threads as before, and no task was forgotten."""
    import threading

    before, threads_before = _open_files(), threading.active_count()
    pumps = Pumps(threads, portable=portable)
    try:
        yield pumps
        await eventually(lambda: not len(pumps))
    finally:
        pumps.close()
    await eventually(lambda: threading.active_count() == threads_before)
    await eventually(lambda: _open_files() <= before)


def unread(sock: socket.socket) -> int:
    """Return how many bytes wait to be read."""
    try:
        return len(sock.recv(1 << 24, socket.MSG_PEEK))
    except BlockingIOError:
        return 0


def raise_fd_limit(wanted: int) -> int:
    """Return how many files may be open, after asking for more."""
    import resource

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft < wanted:
        soft = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    return soft


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))
