"""Streams: bytes between a local program's TCP connection and a TLS connection with another peer.

Inside TLS each direction is a row of frames; a length of four bytes (big-endian), then

    1 ... 262144      so many bytes of data
    0                 end of data in this direction (the program's half-close); nothing but a reset may follow
    0xFFFFFFFF        reset of both directions

Anything else is a broken peer. A connection that ends before both ends of data was cut, and cut is passed on to the program as a
reset: whoever carries the bytes cannot make a part look whole.

Before that a few records may be exchanged (stream_start.py).
"""

from __future__ import annotations

import contextlib
import socket
import ssl
import struct
import sys

from deskgrid.overlay.pump import BUFFER_BYTES, ERROR, HANGUP, READ, WRITE, Buffer, Outcome, Pump, Pumps, Timer
from deskgrid.overlay.stream_start import hurry, receive_record, secure, send_record

__all__ = ["MAX_FRAME_BYTES", "Stream", "Unframer", "receive_record", "secure", "send_record"]

MAX_FRAME_BYTES = 256 << 10
_LENGTH = struct.Struct(">I")
_RESET = 0xFFFFFFFF
_END_FRAME, _RESET_FRAME = _LENGTH.pack(0), _LENGTH.pack(_RESET)
_RECORD_BYTES = 16 << 10
"""Of TLS: one read returns at most that."""
_SMALL_BYTES = 16 << 10
"""A rest up to this long is copied; for a longer one the buffer is kept."""
_MANY_PARTS = 64
_FAREWELL_S = 5.0
_CHECK_S = 30.0
_SILENT_CHECKS = 4
_ABORTIVE = struct.pack("hh" if sys.platform == "win32" else "ii", 1, 0)
_LOCAL_RESET = "the local program reset its connection"


class _Broken(Exception):
    """This stream must be reset."""


class Unframer:
    """Takes frames apart; no IO."""

    __slots__ = ("_head", "_left", "ended", "reset", "wrong")

    def __init__(self) -> None:
        self._head = b""
        self._left = 0
        self.ended = False
        """End of data came."""
        self.reset = False
        """A reset came."""
        self.wrong = ""
        """What came that is no frame."""

    def feed(self, data: memoryview) -> list[memoryview]:
        """Return the payload in `data`, as views of it. After a reset or something wrong, nothing is returned any more."""
        found: list[memoryview] = []
        at, size = 0, len(data)
        while at < size and not (self.reset or self.wrong):
            if self._left:
                part = data[at : at + self._left]
                found.append(part)
                self._left -= len(part)
                at += len(part)
            else:
                at += self._feed_head(data[at : at + _LENGTH.size - len(self._head)])
        return found

    def _feed_head(self, part: memoryview) -> int:
        self._head += part
        if len(self._head) == _LENGTH.size:
            (length,) = _LENGTH.unpack(self._head)
            self._head = b""
            self._begin(length)
        return len(part)

    def _begin(self, length: int) -> None:
        if length == _RESET:
            self.reset = True
        elif self.ended:
            self.wrong = "data after the end of data"
        elif length > MAX_FRAME_BYTES:
            self.wrong = f"a frame of {length} bytes"
        elif length:
            self._left = length
        else:
            self.ended = True


class _Held:
    """What could not be written yet, and the buffer it lies in, if it is long."""

    __slots__ = ("_buffer", "parts")

    def __init__(self) -> None:
        self.parts: list[memoryview] = []
        self._buffer: Buffer | None = None

    def __bool__(self) -> bool:
        return bool(self.parts)

    def keep(self, pump: Pump, rest: list[memoryview]) -> None:
        """Hold `rest` and nothing else: it is part of what was held, or lies in the pump's scratch, or is empty."""
        if not rest:
            self.drop(pump)
        elif self._buffer is None and _lies_in(pump.buffer, rest[0]):
            if sum(map(len, rest)) <= _SMALL_BYTES or len(rest) > _MANY_PARTS:
                rest = [memoryview(b"".join(rest))]
            else:
                self._buffer = pump.keep_buffer()
        self.parts = rest

    def drop(self, pump: Pump) -> None:
        """Hold nothing."""
        self.parts = []
        if self._buffer is not None:
            pump.return_buffer(self._buffer)
            self._buffer = None


class Stream:
    """Carries bytes between a TLS socket and a plain one until both directions ended or one side was reset.

    At most a buffer (256 KiB) per direction is held beyond what the system holds; then the faster side is no longer read.
    """

    __slots__ = (
        "_ended",
        "_farewell",
        "_frames",
        "_in",
        "_in_shut",
        "_local",
        "_local_fd",
        "_local_hung",
        "_out",
        "_out_ended",
        "_peer_gone",
        "_pump",
        "_read_needs",
        "_silent_checks",
        "_timer",
        "_tls",
        "_tls_fd",
        "_tls_hung",
        "_write_needs",
        "received_bytes",
        "sent_bytes",
    )

    def __init__(
        self, pumps: Pumps, tls: ssl.SSLSocket, local: socket.socket, *, sent_bytes: int = 0, received: bytes = b""
    ) -> None:
        """Take over both sockets and start. `sent_bytes` of the program are at the peer already; `received` comes first for it."""
        self._tls, self._local = tls, local
        self._tls_fd, self._local_fd = tls.fileno(), local.fileno()
        self._ended: Outcome[str] = Outcome()
        self._pump: Pump | None = None
        self._timer: Timer | None = None
        self._silent_checks = 0
        self._out, self._in = _Held(), _Held()  # local -> TLS, TLS -> local
        if received:
            self._in.parts = [memoryview(received)]
        self._frames = Unframer()
        self._read_needs, self._write_needs = READ, WRITE
        self._out_ended = False  # the program's end of data was read
        self._in_shut = False  # the peer's was given to the program
        self._local_hung = self._tls_hung = self._peer_gone = self._farewell = False
        self.sent_bytes = sent_bytes
        """What the local program sent."""
        self.received_bytes = 0
        """What came for it."""
        for sock in (tls, local):
            sock.setblocking(False)
            hurry(sock)
        _keep_alive(tls)
        self._pump = pumps.carry(self)

    async def wait_closed(self) -> str:
        """Return how it ended, once it has: "finished", or the reason of the reset. Both sockets are closed then."""
        return await self._ended.wait()

    @property
    def is_closed(self) -> bool:
        """Tell whether it has ended, and `wait_closed` returns at once."""
        return self._ended.is_set

    def abort(self, reason: str = "aborted") -> None:
        """Reset both sides soon. Thread-safe, idempotent."""
        pump = self._pump
        if pump is not None:
            pump.post(lambda: self._reset(reason))

    def rtt_s(self) -> float | None:
        """Return the round-trip time of the TCP connection under TLS; None if the system does not tell."""
        info = _tcp_info(self._tls)
        return info.rtt_us / 1e6 if info else None

    # what the pump calls

    def start(self, pump: Pump) -> None:
        """Begin with TLS: bytes may wait inside it that no poller sees."""
        self._pump = pump
        self._timer = pump.after(_CHECK_S, self._check)
        self.ready(self._tls_fd, READ)

    def ready(self, fd: int, mask: int) -> None:
        """Move about one buffer."""
        pump = self._pump
        if pump is None or self._ended.is_set:
            return
        try:
            if self._farewell:
                self._await_end(pump)
                return
            if fd == self._local_fd:
                self._local_ready(pump, mask)
            else:
                self._tls_ready(pump, mask if fd >= 0 else self._read_needs)
            self._go_on(pump)
        except _Broken as broken:
            self._reset(str(broken))

    def abandon(self, reason: str) -> None:
        """Reset both sides at once."""
        self._reset(reason)

    def _local_ready(self, pump: Pump, mask: int) -> None:
        if mask & ERROR:
            raise _Broken(_LOCAL_RESET)
        if mask & HANGUP:
            self._local_hung = True
        if mask & WRITE and self._in:
            self._push_local(pump, self._in.parts)
        if mask & (READ | HANGUP) and not self._out and not self._out_ended:
            self._pull_local(pump)

    def _tls_ready(self, pump: Pump, mask: int) -> None:
        if mask & (ERROR | HANGUP):
            if self._in and not self._has_said_all():
                raise _Broken("the peer's connection broke")
            self._tls_hung = True  # a peer that had everything may be gone; the program still takes what is here
            mask |= READ | WRITE
        if mask & self._write_needs and self._out:
            self._push_tls(pump, self._out.parts[0])
        if mask & self._read_needs and not self._in and not self._peer_gone:
            self._pull_tls(pump)

    def _go_on(self, pump: Pump) -> None:
        """Say what to wait for."""
        sending, receiving = bool(self._out), bool(self._in)
        if self._in_shut and self._has_said_all():
            self._say_farewell(pump)
            return
        local: int | None = (0 if sending or self._out_ended else READ) | (WRITE if receiving else 0)
        if self._local_hung and not local:
            local = None  # it would be told again and again
        tls: int | None = (0 if receiving or self._peer_gone else self._read_needs) | (self._write_needs if sending else 0)
        if (self._tls_hung or self._peer_gone) and not tls:
            tls = None
        pump.watch(self._local_fd, local, self)
        pump.watch(self._tls_fd, tls, self)
        if not receiving and self._tls.pending():
            pump.soon(self)

    def _has_said_all(self) -> bool:
        return self._out_ended and not self._out

    # local -> TLS

    def _pull_local(self, pump: Pump) -> None:
        buffer = pump.buffer
        try:
            size = self._local.recv_into(buffer.body)
        except (BlockingIOError, InterruptedError):
            return
        except OSError as error:
            raise _Broken(_LOCAL_RESET) from error
        if size:
            _LENGTH.pack_into(buffer.view, 0, size)
            self.sent_bytes += size
            self._push_tls(pump, buffer.view[: _LENGTH.size + size])
        else:
            self._out_ended = True
            self._push_tls(pump, memoryview(_END_FRAME))

    def _push_tls(self, pump: Pump, frame: memoryview) -> None:
        sent = 0
        try:
            sent = self._tls.write(frame)
            self._write_needs = WRITE
        except ssl.SSLWantWriteError:
            self._write_needs = WRITE
        except ssl.SSLWantReadError:
            self._write_needs = READ
        except OSError as error:
            raise _Broken(_loss(error)) from error
        pump.count(sent)
        # What is left must be offered to OpenSSL again unchanged; where it lies does not matter.
        self._out.keep(pump, [frame[sent:]] if sent < len(frame) else [])

    # TLS -> local

    def _pull_tls(self, pump: Pump) -> None:
        view, filled = pump.buffer.view, 0
        read = self._tls.read
        self._read_needs = READ
        try:
            while filled <= BUFFER_BYTES - _RECORD_BYTES:  # several records, then one send
                size: int = read(_RECORD_BYTES, view[filled:])  # type: ignore[assignment]  # into a buffer: the number
                if not size:
                    self._peer_gone = True
                    break
                filled += size
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLWantWriteError:
            self._read_needs = WRITE
        except OSError as error:
            raise _Broken(_loss(error)) from error
        if filled:
            pump.count(filled)
            self._take(pump, view[:filled])
        if self._peer_gone and not (self._frames.ended and self._has_said_all()):
            raise _Broken("the peer's connection was cut")

    def _take(self, pump: Pump, data: memoryview) -> None:
        parts = self._frames.feed(data)
        if self._frames.reset:
            raise _Broken("reset by the peer")
        if self._frames.wrong:
            raise _Broken(f"the peer is broken: {self._frames.wrong}")
        self._push_local(pump, parts)

    def _push_local(self, pump: Pump, parts: list[memoryview]) -> None:
        sent = 0
        try:
            if parts:
                sent = _send(self._local, parts)
        except (BlockingIOError, InterruptedError):
            pass
        except OSError as error:
            raise _Broken(_LOCAL_RESET) from error
        self.received_bytes += sent
        self._in.keep(pump, _after(parts, sent))
        if self._frames.ended and not self._in and not self._in_shut:
            self._in_shut = True
            with contextlib.suppress(OSError):  # gone already: reading tells
                self._local.shutdown(socket.SHUT_WR)

    # the end

    def _say_farewell(self, pump: Pump) -> None:
        """Both directions have ended: close without a reset, which a peer's last bytes in our receive buffer would make of it."""
        self._farewell = True
        pump.watch(self._local_fd, None, self)
        self._local.close()
        with contextlib.suppress(OSError, ValueError):
            self._tls.unwrap()  # says its part at once; that the peer's is not there yet is an error
        with contextlib.suppress(OSError):
            self._tls.shutdown(socket.SHUT_WR)
        if self._timer is not None:
            self._timer.cancel()
        self._timer = pump.after(_FAREWELL_S, self._stop_waiting)
        pump.watch(self._tls_fd, READ, self)
        self._await_end(pump)

    def _stop_waiting(self) -> None:
        """A peer that has everything and does not close is left. Of a socket that was closed the system gives up the last bytes
        after some minutes, and a program at the other end may be suspended for longer."""
        if self._pump is not None and _is_sending(self._tls):
            self._timer = self._pump.after(_FAREWELL_S, self._stop_waiting)
        else:
            self._finish("finished")

    def _await_end(self, pump: Pump) -> None:
        try:
            if self._tls.recv_into(pump.buffer.view):  # no TLS any more: what comes is thrown away
                return
        except (BlockingIOError, InterruptedError):
            return
        except OSError:
            pass  # everything was delivered before
        self._finish("finished")

    def _reset(self, reason: str) -> None:
        if self._ended.is_set:
            return
        if self._farewell:
            self._finish("finished")
            return
        if not self._tell_reset():
            _make_abortive(self._tls)
        _make_abortive(self._local)
        self._finish(reason)

    def _tell_reset(self) -> bool:
        """Return whether the mark of a reset could be sent; not behind a write that is half done. Unlike TCP's own it cannot get lost."""
        try:
            return not self._out and self._tls.write(_RESET_FRAME) > 0
        except (OSError, ValueError):
            return False

    def _finish(self, reason: str) -> None:
        pump = self._pump
        if pump is not None:
            if self._timer is not None:
                self._timer.cancel()
            for fd in (self._tls_fd, self._local_fd):
                pump.watch(fd, None, self)
            self._out.drop(pump)
            self._in.drop(pump)
            pump.forget(self)
        self._local.close()
        self._tls.close()
        self._ended.set(reason)

    def _check(self) -> None:
        """Now and then: is the peer dead (the system takes a quarter of an hour to tell), or the program, unseen?"""
        pump = self._pump
        if pump is None or self._ended.is_set or self._farewell:
            return
        info = _tcp_info(self._tls)
        self._silent_checks = self._silent_checks + 1 if info and info.is_waiting and info.silent_s > _CHECK_S else 0
        if self._silent_checks >= _SILENT_CHECKS:
            self._reset("the peer no longer answers")
        elif self._local.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
            self._reset(_LOCAL_RESET)
        else:
            self._timer = pump.after(_CHECK_S, self._check)


class _TcpInfo:
    """Some of Linux's struct tcp_info (linux/tcp.h)."""

    __slots__ = ("is_waiting", "rtt_us", "silent_s")

    def __init__(self, data: bytes) -> None:
        (probes,) = struct.unpack_from("=B", data, 3)
        (unacked,) = struct.unpack_from("=I", data, 24)
        last_data_ms, last_ack_ms = struct.unpack_from("=II", data, 52)
        self.is_waiting = bool(unacked or probes)
        """For an acknowledgement."""
        self.silent_s = min(last_data_ms, last_ack_ms) / 1e3
        (self.rtt_us,) = struct.unpack_from("=I", data, 68)


def _tcp_info(sock: socket.socket) -> _TcpInfo | None:
    if sys.platform != "linux":
        return None
    try:
        return _TcpInfo(sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104))
    except (OSError, struct.error):  # closed, or not TCP
        return None


def _is_sending(sock: socket.socket) -> bool:
    """Tell whether the other end has not yet acknowledged everything, where the system tells."""
    if sys.platform != "linux":
        return False
    import fcntl
    import termios

    waiting = bytearray(4)
    try:
        fcntl.ioctl(sock.fileno(), termios.TIOCOUTQ, waiting)
    except OSError:
        return False
    return any(waiting)


def _keep_alive(sock: socket.socket) -> None:
    """Notice within two minutes that an idle peer is dead."""
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 60), ("TCP_KEEPALIVE", 60), ("TCP_KEEPINTVL", 15), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            with contextlib.suppress(OSError):  # not TCP
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _make_abortive(sock: socket.socket) -> None:
    """Have `close` send a reset."""
    with contextlib.suppress(OSError):
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _ABORTIVE)


def _lies_in(buffer: Buffer, part: memoryview) -> bool:
    return part.obj is buffer.view.obj


def _send(sock: socket.socket, parts: list[memoryview]) -> int:
    if len(parts) == 1:
        return sock.send(parts[0])
    if len(parts) > _MANY_PARTS or not hasattr(sock, "sendmsg"):
        return sock.send(b"".join(parts))
    return sock.sendmsg(parts)


def _after(parts: list[memoryview], sent: int) -> list[memoryview]:
    """Return what is left of `parts`."""
    for index, part in enumerate(parts):
        if sent < len(part):
            return [part[sent:] if sent else part, *parts[index + 1 :]]
        sent -= len(part)
    return []


def _loss(error: OSError) -> str:
    if isinstance(error, ssl.SSLError):
        return f"TLS with the peer broke: {error.reason or 'cut'}"
    if isinstance(error, TimeoutError):
        return "the peer no longer answers"
    return "the peer's connection broke"
