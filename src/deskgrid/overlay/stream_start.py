"""The start of a stream: the TLS handshake and the few records before bytes flow, done by a pump.

A pump does it because event loops differ (Windows' has no add_reader) and because asyncio's own TLS would keep the socket.
A record is a length of four bytes (big-endian), then the bytes.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import struct
from collections.abc import Callable
from typing import Generic, TypeVar

from deskgrid.core.opening import MAX_RECORD_BYTES
from deskgrid.errors import DeskgridError, ProtocolError, Unreachable
from deskgrid.overlay.pump import READ, WRITE, Outcome, Pump, Pumps, Timer

__all__ = ["hurry", "receive_record", "secure", "send_record"]

_LENGTH = struct.Struct(">I")
_LOST = (ssl.SSLEOFError, ssl.SSLZeroReturnError, ssl.SSLSyscallError)

T = TypeVar("T")


async def secure(
    pumps: Pumps,
    sock: socket.socket,
    context: ssl.SSLContext,
    *,
    server_side: bool = False,
    server_hostname: str | None = None,
    limit_s: float = 10.0,
) -> ssl.SSLSocket:
    """Return `sock` with TLS, after the handshake. Closes it on failure and on cancellation.

    Raise Unreachable (the connection broke, the time is up) or ProtocolError (a certificate, or TLS itself, was refused). With
    TLS 1.3 a client learns that its own certificate was refused only when it reads: from `receive_record`.
    """
    try:
        sock.setblocking(False)
        hurry(sock)
        sock.getpeername()  # raises if it was reset already: wrap_socket would lose the descriptor then
        tls = context.wrap_socket(sock, server_side=server_side, server_hostname=server_hostname, do_handshake_on_connect=False)
    except OSError as error:
        sock.close()
        raise _translated(error) from error
    except BaseException:
        sock.close()
        raise
    await _run(pumps, tls, tls.do_handshake, limit_s)
    return tls


async def send_record(pumps: Pumps, tls: ssl.SSLSocket, data: bytes, *, limit_s: float) -> None:
    """Send a record. Closes `tls` on failure and on cancellation. Raise as `secure` does."""
    frame = _LENGTH.pack(len(data)) + data

    def write() -> None:
        nonlocal frame
        while frame:
            frame = frame[tls.write(frame) :]

    await _run(pumps, tls, write, limit_s)


async def receive_record(pumps: Pumps, tls: ssl.SSLSocket, *, limit_s: float, max_bytes: int = MAX_RECORD_BYTES) -> bytes:
    """Return the next record. Closes `tls` on failure and on cancellation.

    Raise as `secure` does; ProtocolError also for a record that is longer than `max_bytes`.
    """
    data = bytearray()

    def read() -> bytes:
        _read_until(tls, data, _LENGTH.size)
        (size,) = _LENGTH.unpack_from(data)
        if size > max_bytes:
            raise ProtocolError(f"a record of {size} bytes; at most {max_bytes} are allowed")
        _read_until(tls, data, _LENGTH.size + size)
        return bytes(data[_LENGTH.size :])

    return await _run(pumps, tls, read, limit_s)


def hurry(sock: socket.socket) -> None:
    """Send small messages at once."""
    with contextlib.suppress(OSError):  # not TCP
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)


class _Operation(Generic[T]):
    """Tries something again and again, as the socket becomes ready, until it is done or its time is up."""

    def __init__(self, tls: ssl.SSLSocket, attempt: Callable[[], T], limit_s: float) -> None:
        self.outcome: Outcome[T] = Outcome()
        self._tls, self._fd, self._attempt, self._limit_s = tls, tls.fileno(), attempt, limit_s
        self._pump: Pump | None = None
        self._timer: Timer | None = None

    def start(self, pump: Pump) -> None:
        self._pump = pump
        self._timer = pump.after(self._limit_s, lambda: self._fail(Unreachable(f"no answer within {self._limit_s:g} s")))
        self.ready(self._fd, READ)

    def ready(self, fd: int, mask: int) -> None:
        if self._pump is None or self.outcome.is_set:
            return
        try:
            value = self._attempt()
        except ssl.SSLWantReadError:
            self._pump.watch(self._fd, READ, self)
        except ssl.SSLWantWriteError:
            self._pump.watch(self._fd, WRITE, self)
        except Exception as error:
            self._fail(_translated(error))
        else:
            self._leave(self._pump)
            self.outcome.set(value)

    def abandon(self, reason: str) -> None:
        self._fail(Unreachable(reason))

    def _fail(self, error: BaseException) -> None:
        if self.outcome.is_set:
            return
        if self._pump is not None:
            self._leave(self._pump)
        self._tls.close()
        self.outcome.set(error=error)

    def _leave(self, pump: Pump) -> None:
        if self._timer is not None:
            self._timer.cancel()
        pump.watch(self._fd, None, self)
        pump.forget(self)


async def _run(pumps: Pumps, tls: ssl.SSLSocket, attempt: Callable[[], T], limit_s: float) -> T:
    operation = _Operation(tls, attempt, limit_s)
    pump = pumps.carry(operation)
    try:
        return await operation.outcome.wait()
    except asyncio.CancelledError:
        # The thread may be using the socket now: it closes it, else its number could be another socket's in the middle of a read.
        if pump is not None:
            pump.post(lambda: operation.abandon("cancelled"))
        while not operation.outcome.is_set:  # however often we are cancelled
            with contextlib.suppress(DeskgridError, asyncio.CancelledError):
                await operation.outcome.wait()
        tls.close()  # it had just succeeded
        raise


def _read_until(tls: ssl.SSLSocket, data: bytearray, size: int) -> None:
    while len(data) < size:
        piece = tls.read(size - len(data))
        if not piece:
            raise Unreachable("the other end closed the connection")
        data += piece


def _translated(error: Exception) -> Exception:
    if isinstance(error, ssl.SSLCertVerificationError):
        return ProtocolError(f"the other end's certificate is refused: {error.verify_message}")
    if isinstance(error, ssl.SSLError) and not isinstance(error, _LOST):
        return ProtocolError(f"TLS was refused: {error.reason or error}")
    if isinstance(error, OSError):
        return Unreachable(f"the connection broke: {error.strerror or error}")
    return error
