"""An HTTP proxy (RFC 9110, 9112) for machines that may reach the internet: CONNECT, and requests for http://.

One request per connection: it is sent on with `Connection: close`, and what follows its head is carried as it is. Names are resolved
here, and only public addresses are dialled (core/internet.py): the check is on the address that is really dialled.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import socket
from collections.abc import Awaitable, Callable, Iterable
from concurrent.futures import Executor
from functools import partial
from http import HTTPStatus
from urllib.parse import urlsplit

import psutil
import structlog
from msgspec import Struct

from deskgrid.core.internet import IpNetwork, is_public, near_networks
from deskgrid.errors import DeskgridError, Forbidden, InvalidInput, NotFound, Unreachable
from deskgrid.model.overlay import Address
from deskgrid.overlay.dial import dial, send_all
from deskgrid.overlay.proxy import reset, serve
from deskgrid.overlay.pump import Pumps
from deskgrid.overlay.relay import Relay

__all__ = ["dial_public", "serve_http_proxy"]

_HEAD_S = 10.0
_DIAL_S = 10.0
_RESOLVE_S = 10.0
_MAX_HEAD_BYTES = 64 << 10
_MOST_ADDRESSES = 4
_END = b"\r\n\r\n"
_METHOD = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,32}")
_FIELD = re.compile(rb"[!#$%&'*+.^_`|~0-9A-Za-z-]+:[\t\x20-\x7e\x80-\xff]*")
_HOP_BY_HOP = frozenset({b"connection", b"proxy-connection", b"keep-alive", b"proxy-authorization", b"te", b"upgrade"})
_log = structlog.get_logger()

DialPublic = Callable[[str, int], Awaitable[socket.socket]]


class _Request(Struct, frozen=True):
    """What a client wants: bytes to and from host:port, after `head` was sent there."""

    host: str
    port: int
    head: bytes
    is_tunnel: bool


async def dial_public(host: str, port: int, *, near: Iterable[IpNetwork] = (), resolver: Executor | None = None) -> socket.socket:
    """Connect to a name or address, if it is public: not of this PC's networks, nor of those in `near`.

    `resolver` has the threads that look names up, each for as long as the name's servers like. Raise NotFound if there is no such
    name, Forbidden if none of its addresses is public, Unreachable.
    """
    loop = asyncio.get_running_loop()
    try:
        async with asyncio.timeout(_RESOLVE_S):
            found = await loop.run_in_executor(resolver, partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM))
    except (OSError, UnicodeError, TimeoutError, OverflowError) as error:
        raise NotFound(f"{host[:100]} has no address") from error
    hosts = list(dict.fromkeys(str(info[4][0]) for info in found))
    own = near_networks((one.address, one.netmask) for many in psutil.net_if_addrs().values() for one in many)
    public = [one for one in hosts if _is_public(one, (*own, *near))][:_MOST_ADDRESSES]
    if not public:
        raise Forbidden(f"{host[:100]} is not on the public internet")
    for number, one in enumerate(public, start=1):
        try:
            async with asyncio.timeout(_DIAL_S / len(public)):
                return await dial(Address(one, port))
        except (Unreachable, TimeoutError) as error:
            if number == len(public):
                raise Unreachable(f"{host[:100]}:{port} does not answer") from error
    raise AssertionError


def _is_public(text: str, near: tuple[IpNetwork, ...]) -> bool:
    try:
        return is_public(ipaddress.ip_address(text), near)
    except ValueError:  # with a scope: of one network only
        return False


async def serve_http_proxy(dial: DialPublic, listener: socket.socket, *, pumps: Pumps | None = None) -> None:
    """Serve as an HTTP proxy until cancelled; then its connections are reset. Without `pumps` it has a thread of its own."""
    carrying = Pumps(1, name="http-proxy") if pumps is None else pumps

    async def take(local: socket.socket) -> None:
        try:
            relay = await _connected(dial, local, carrying)
        except (DeskgridError, TimeoutError) as error:
            _log.info("proxy_request_refused", reason=str(error)[:300] or "too slow")
            _refuse(local, error)
            return
        except BaseException:
            reset(local)
            raise
        try:
            await relay.wait_closed()
        finally:
            relay.abort()

    try:
        await serve(listener, take)
    finally:
        if pumps is None:
            await asyncio.to_thread(carrying.close)


async def _connected(dial: DialPublic, local: socket.socket, pumps: Pumps) -> Relay:
    """Read a request, connect to where it goes, and carry from then on."""
    async with asyncio.timeout(_HEAD_S):
        head, rest = await _read_head(local)
    request = _parse(head)
    far = await dial(request.host, request.port)
    try:
        async with asyncio.timeout(_HEAD_S):
            if request.is_tunnel:
                await send_all(local, b"HTTP/1.1 200 Connection established" + _END)
            await send_all(far, request.head + rest)
    except BaseException:
        far.close()
        raise
    return Relay(pumps, local, far)


async def _read_head(local: socket.socket) -> tuple[bytes, bytes]:
    """Return the head of a request, and what came after it already."""
    loop = asyncio.get_running_loop()
    found = b""
    while _END not in found:
        if len(found) > _MAX_HEAD_BYTES:
            raise InvalidInput("the head of this request is too long")
        try:
            data = await loop.sock_recv(local, _MAX_HEAD_BYTES)
        except OSError as error:
            raise Unreachable("the client has left") from error
        if not data:
            raise Unreachable("the client has left")
        found += data
    head, _, rest = found.partition(_END)
    return head, rest


def _parse(head: bytes) -> _Request:
    """Return what a request wants. Raise InvalidInput for what is none."""
    line, *fields = head.split(b"\r\n")
    method, _, tail = line.decode("latin-1").partition(" ")
    target, _, version = tail.rpartition(" ")
    if not _METHOD.fullmatch(method) or version not in ("HTTP/1.1", "HTTP/1.0") or not re.fullmatch(r"[!-~]+", target):
        raise InvalidInput("this is no request of HTTP/1.1")
    if any(not _FIELD.fullmatch(field) for field in fields):
        raise InvalidInput("a field of this request cannot be read")
    if method == "CONNECT":
        host, port = _authority(f"//{target}", None)
        return _Request(host, port, b"", True)
    if not target.lower().startswith("http://"):
        raise InvalidInput("a proxy is asked for http://HOST/PATH, or CONNECT HOST:PORT")
    host, port = _authority(target, 80)
    return _Request(host, port, _rewritten(method, target, fields), False)


def _authority(url: str, default_port: int | None) -> tuple[str, int]:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname, parts.port or default_port
    except ValueError as error:
        raise InvalidInput("this address cannot be read") from error
    if not host or not port:
        raise InvalidInput("this address has no host or port")
    return host, port


def _rewritten(method: str, target: str, fields: list[bytes]) -> bytes:
    """Return the request as its server is to get it: with a path only, and for one time."""
    parts = urlsplit(target)
    path = target[len("http://") + len(parts.netloc) :].partition("#")[0]
    if not path.startswith("/"):
        path = f"/{path}"
    named = [(field.partition(b":")[0].lower(), field) for field in fields]
    dropped = _HOP_BY_HOP | {
        word.strip().lower() for name, field in named if name == b"connection" for word in field.partition(b":")[2].split(b",")
    }
    kept = [field for name, field in named if name not in dropped and name != b"host"]
    host = parts.netloc.rpartition("@")[2].encode("latin-1")
    lines = [f"{method} {path} HTTP/1.1".encode("latin-1"), b"Host: " + host, *kept, b"Connection: close"]
    return b"\r\n".join(lines) + _END


def _refuse(local: socket.socket, error: Exception) -> None:
    """Tell the client what went wrong, and leave."""
    status = next((status for kind, status in _STATUS.items() if isinstance(error, kind)), HTTPStatus.BAD_GATEWAY)
    words = f"{error}\n".encode() if isinstance(error, DeskgridError) else b""
    lines = (
        f"HTTP/1.1 {status.value} {status.phrase}",
        "Content-Type: text/plain; charset=utf-8",
        f"Content-Length: {len(words)}",
        "Connection: close",
    )
    try:
        local.send("\r\n".join(lines).encode() + _END + words)
        local.shutdown(socket.SHUT_WR)
    except OSError:
        pass
    local.close()


_STATUS = {
    InvalidInput: HTTPStatus.BAD_REQUEST,
    Forbidden: HTTPStatus.FORBIDDEN,
    TimeoutError: HTTPStatus.REQUEST_TIMEOUT,
}
