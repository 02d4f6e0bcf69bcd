"""Making TCP connections: to an address, back to a caller, to the relay of a hub. For those through two NATs see holes.py.

All sockets are non-blocking. All functions close what they made when they fail or are cancelled, and raise Unreachable; their
callers bound the time.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import socket
from collections.abc import AsyncIterator

from deskgrid.core import frames
from deskgrid.errors import Unreachable
from deskgrid.model.overlay import Address

__all__ = [
    "DIAL_BACK",
    "ID_BYTES",
    "connect_to",
    "dial",
    "dial_back",
    "dial_relay",
    "enter_relay",
    "new_socket",
    "read_exactly",
    "send_all",
    "wait_readable",
]

DIAL_BACK = b"DGC1"
"""A called peer that dials back says this, then the id of the connection."""
ID_BYTES = 16


async def dial(address: Address) -> socket.socket:
    """Connect to an address."""
    async with new_socket(address) as sock:
        await connect_to(sock, address)
        return sock


async def dial_back(address: Address, connection_id: str) -> socket.socket:
    """Connect to a caller's listener and say for which connection."""
    async with new_socket(address) as sock:
        await connect_to(sock, address)
        await send_all(sock, DIAL_BACK + bytes.fromhex(connection_id))
        return sock


async def dial_relay(hub: Address, token: str) -> socket.socket:
    """Connect to a hub's relay. What is sent waits there for the other end."""
    sock = await dial(hub)
    return await enter_relay(sock, token)


async def enter_relay(sock: socket.socket, token: str) -> socket.socket:
    """Make a connection with a hub one end of a relayed stream."""
    try:
        await send_all(sock, frames.RELAY + bytes.fromhex(token))
    except BaseException:
        sock.close()
        raise
    return sock


@contextlib.asynccontextmanager
async def new_socket(remote: Address, *, port: int | None = None) -> AsyncIterator[socket.socket]:
    """Make a socket for a connection to `remote`; it is closed if the block fails.

    `port`: bind it to that local port (0: any) in a way that lets other sockets have the same one.
    """
    family = socket.AF_INET6 if ":" in remote.host else socket.AF_INET
    sock = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        if port is not None:
            _bind(sock, port)
        yield sock
    except BaseException:
        sock.close()
        raise


def _bind(sock: socket.socket, port: int) -> None:
    try:
        for option in ("SO_REUSEADDR", "SO_REUSEPORT"):
            if hasattr(socket, option):
                sock.setsockopt(socket.SOL_SOCKET, getattr(socket, option), 1)
        sock.bind(("", port))
    except OSError as error:
        raise _unreachable(error) from error


async def connect_to(sock: socket.socket, address: Address) -> None:
    """Connect a socket."""
    try:
        await asyncio.get_running_loop().sock_connect(sock, (address.host, address.port))
        if sock.getsockname()[:2] == sock.getpeername()[:2]:
            raise OSError(errno.ECONNREFUSED, "connected to itself")
    except (OSError, OverflowError) as error:
        raise _unreachable(error, address) from error


async def send_all(sock: socket.socket, data: bytes) -> None:
    """Send all of `data`."""
    try:
        await asyncio.get_running_loop().sock_sendall(sock, data)
    except OSError as error:
        raise _unreachable(error) from error


async def read_exactly(sock: socket.socket, size: int) -> bytes:
    """Read `size` bytes; a connection that ends before is an error."""
    loop = asyncio.get_running_loop()
    found = b""
    while len(found) < size:
        try:
            data = await loop.sock_recv(sock, size - len(found))
        except OSError as error:
            raise _unreachable(error) from error
        if not data:
            raise Unreachable("the connection was closed")
        found += data
    return found


async def wait_readable(sock: socket.socket) -> None:
    """Return when there is something to read, or the connection has ended."""
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    number = sock.fileno()
    loop.add_reader(number, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(number)


def _unreachable(error: Exception, address: Address | None = None) -> Unreachable:
    reason = getattr(error, "strerror", None) or str(error)
    return Unreachable(f"{address} does not answer: {reason}" if address is not None else f"the connection broke: {reason}")
