"""SOCKS5 (RFC 1928) for programs that can name what they connect to: CONNECT without authentication.

    client   5 n METHODS                       proxy   5 0          (5 255: no method that we know)
    client   5 1 0 ADDRESS PORT                proxy   5 CODE 0 1 0.0.0.0 0

ADDRESS is 1 and an IPv4 address, 3 and a name behind its length, or 4 and an IPv6 address. What comes is hostile.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import socket
from collections.abc import Awaitable, Callable

import structlog

from deskgrid.errors import DeskgridError, Forbidden, InvalidInput, NotFound, Unreachable
from deskgrid.overlay.dial import read_exactly, send_all
from deskgrid.overlay.proxy import reset, serve

__all__ = ["Join", "serve_socks"]

Join = Callable[[str, int, socket.socket, Callable[[], None]], Awaitable[None]]
"""join(host, port, local, connected): joins a client's socket with what host and port stand for, and owns it from then on.

Calls `connected` once the other side is there and before the socket is handed on, so that the client hears of it before any data.
Raises DeskgridError, then without having touched the socket.
"""

_VERSION = 5
_NO_AUTHENTICATION, _NO_METHOD = 0, 0xFF
_CONNECT = 1
_IPV4, _NAME, _IPV6 = 1, 3, 4
_SUCCEEDED, _FAILED, _NOT_ALLOWED, _NO_HOST, _BAD_COMMAND, _BAD_ADDRESS = 0, 1, 2, 4, 7, 8
_REQUEST_S = 10.0
_log = structlog.get_logger()


class _Silent(DeskgridError):
    """What came is not answered."""


class _Refused(DeskgridError):
    """A request that is answered with a code of its own."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code


async def serve_socks(join: Join, listener: socket.socket) -> None:
    """Serve SOCKS5 on `listener` until cancelled; streams that were joined go on."""

    async def take(local: socket.socket) -> None:
        host, port = "", 0
        try:
            async with asyncio.timeout(_REQUEST_S):
                host, port = await _request(local)
            await join(host, port, local, lambda: _confirm(local))
        except _Silent as error:
            _log.info("socks_client_refused", reason=str(error))
            reset(local)
        except (DeskgridError, TimeoutError) as error:
            _log.warning("service_not_reached", host=host, port=port, error=str(error)[:300])
            _refuse(local, error)
        except BaseException:
            reset(local)
            raise

    await serve(listener, take)


async def _request(local: socket.socket) -> tuple[str, int]:
    """Read what the client wants."""
    await _greeting(local)
    version, command, _, kind = await _read(local, 4)
    if version != _VERSION:
        raise _Silent("it does not keep to SOCKS5")
    host = await _host(local, kind)
    port = int.from_bytes(await _read(local, 2), "big")
    if command != _CONNECT:
        raise _Refused(_BAD_COMMAND, "only CONNECT is served")
    return host, port


async def _greeting(local: socket.socket) -> None:
    version, count = await _read(local, 2)
    if version != _VERSION:
        raise _Silent("it does not speak SOCKS5")
    if _NO_AUTHENTICATION not in await _read(local, count):
        await send_all(local, bytes([_VERSION, _NO_METHOD]))
        raise _Silent("it wants to authenticate")
    await send_all(local, bytes([_VERSION, _NO_AUTHENTICATION]))


async def _read(local: socket.socket, size: int) -> bytes:
    try:
        return await read_exactly(local, size)
    except Unreachable as error:
        raise _Silent("it left") from error


async def _host(local: socket.socket, kind: int) -> str:
    if kind == _IPV4:
        return str(ipaddress.IPv4Address(await _read(local, 4)))
    if kind == _IPV6:
        return str(ipaddress.IPv6Address(await _read(local, 16)))
    if kind != _NAME:
        raise _Refused(_BAD_ADDRESS, "an address of a kind that SOCKS5 does not know")
    (size,) = await _read(local, 1)
    name = (await _read(local, size)).decode("ascii", "replace")
    if not name or not name.isascii() or not name.isprintable():
        raise _Refused(_FAILED, "a name that is none")
    return name


def _reply(code: int) -> bytes:
    return bytes([_VERSION, code, 0, _IPV4, 0, 0, 0, 0, 0, 0])


def _confirm(local: socket.socket) -> None:
    """Tell the client that it is connected. Ten bytes always fit; whether it has left, whoever takes over will see."""
    with contextlib.suppress(OSError):
        local.send(_reply(_SUCCEEDED))


def _refuse(local: socket.socket, error: Exception) -> None:
    """Tell the client what went wrong, and leave."""
    with contextlib.suppress(OSError):
        local.send(_reply(_code(error)))
    local.close()


def _code(error: Exception) -> int:
    if isinstance(error, _Refused):
        return error.code
    if isinstance(error, Forbidden):
        return _NOT_ALLOWED
    return _NO_HOST if isinstance(error, NotFound | Unreachable | InvalidInput) else _FAILED
