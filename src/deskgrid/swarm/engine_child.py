"""The process in which BitTorrent runs (libtorrent): it takes bytes from anybody who connects, so it is confined by who starts it, and has nothing
but one folder and the network. It is told what to do on its standard input and tells how it goes on its standard output, and ends with
either (engine_words.py).

All is off by which BitTorrent finds others by itself: it connects only to whom it is told, and to who shows the right certificate.
"""

from __future__ import annotations

import contextlib
import os
import struct
import threading
import time
from typing import Any

import msgspec

from deskgrid.swarm.engine_words import (
    Add,
    Certify,
    Command,
    Connect,
    Done,
    Flush,
    Limit,
    Listening,
    Piece,
    Remove,
    Rename,
    Start,
    State,
)

__all__ = ["main"]

_LOOK_MS = 200
_CACHE_BLOCKS = 256
"""Of 16 KiB, which wait to be written; what is here when the PC goes off is fetched again."""
_FLUSH_S = 5.0
"""Between writes of all that waits."""
_HEAD = struct.Struct(">I")
_FFDHE2048 = """-----BEGIN DH PARAMETERS-----
MIIBCAKCAQEA//////////+t+FRYortKmq/cViAnPTzx2LnFg84tNpWp4TZBFGQz
+8yTnc4kmz75fS/jY2MMddj2gbICrsRhetPfHtXV/WVhJDP1H18GbtCFY2VVPe0a
87VXE15/V8k1mE8McODmi3fipona8+/och3xWKE2rec1MKzKT0g6eXq8CrGCsyT7
YdEIqUuyyOP7uWrat2DX9GgdT0Kj3jlN9K5W7edjcrsZCwenyO4KbXCeAvzhzffi
7MA0BM0oNC9hkXL+nOmFg/+OTxIy7vKBg8P+OxtMb61zO7X8vC7CIAXFjvGDfRaD
ssbzSibBsu/6iGtCOGEoXJf//////////wIBAg==
-----END DH PARAMETERS-----
"""
"""RFC 7919, appendix A.1: libtorrent wants such parameters, and TLS 1.3 has no use for them."""


def main() -> None:
    """Serve until standard input ends: entry point of the child."""
    _Child().run()


class _Child:
    def __init__(self) -> None:
        import libtorrent

        self._lt: Any = libtorrent
        self._session: Any = None
        self._folder = ""
        self._handles: dict[str, Any] = {}
        self._told: dict[str, State] = {}
        self._errors: dict[str, str] = {}
        self._incomplete: set[str] = set()
        self._flushing: set[str] = set()
        """Of which it is told when a flush is done."""
        self._lock = threading.Lock()
        self._decoder = msgspec.msgpack.Decoder(Command)

    def run(self) -> None:
        while self._session is None:
            command = self._read()
            if command is None:
                return
            self._do(command)
        threading.Thread(target=self._obey, daemon=True).start()
        flushed_at = time.monotonic()
        while True:
            self._session.wait_for_alert(_LOOK_MS)
            with self._lock:
                if time.monotonic() - flushed_at > _FLUSH_S:
                    flushed_at = time.monotonic()
                    for name in self._incomplete:
                        self._handles[name].flush_cache()
                for alert in self._session.pop_alerts():
                    self._hear(alert)
                self._tell()

    def _obey(self) -> None:
        """Do what is said, until who says it is gone, or asks for what cannot be done: a process that hears nobody any more must not stay."""
        try:
            while (command := self._read()) is not None:
                with self._lock:
                    self._do(command)
        finally:
            os._exit(0)

    def _read(self) -> Command | None:
        head = _exactly(_HEAD.size)
        data = _exactly(_HEAD.unpack(head)[0]) if head is not None else None
        return None if data is None else self._decoder.decode(data)

    def _do(self, command: Command) -> None:
        if isinstance(command, Start):
            self._folder = command.folder
            self._session = self._lt.session(_settings(self._lt, command.port))
            # Neighbours in a local network would otherwise be free of the limits.
            everyone = self._lt.ip_filter()
            everyone.add_rule("0.0.0.0", "255.255.255.255", 1)  # noqa: S104 - a range
            everyone.add_rule("::", "ffff:ffff:ffff:ffff:ffff:ffff:ffff:ffff", 1)
            self._session.set_peer_class_filter(everyone)
        elif isinstance(command, Limit):
            self._session.apply_settings(
                {"upload_rate_limit": command.up_bytes_per_s, "download_rate_limit": command.down_bytes_per_s}
            )
            (self._session.pause if command.paused else self._session.resume)()
        elif isinstance(command, Add):
            self._add(command)
        elif (handle := self._handles.get(command.name)) is None:
            return
        elif isinstance(command, Connect):
            for address, port in command.to:
                with contextlib.suppress(RuntimeError):  # not an address
                    handle.connect_peer((address, port))
        elif isinstance(command, Piece):
            handle.add_piece(command.index, command.data, 0)
        elif isinstance(command, Certify):
            handle.set_ssl_certificate_buffer(command.certificate, command.key, _FFDHE2048)
        elif isinstance(command, Flush):
            self._flushing.add(command.name)
            handle.flush_cache()
        elif isinstance(command, Rename):
            self._incomplete.discard(command.name)
            handle.rename_file(0, command.file)
        elif isinstance(command, Remove):
            del self._handles[command.name]
            self._incomplete.discard(command.name)
            self._told.pop(command.name, None)
            self._session.remove_torrent(handle)

    def _add(self, command: Add) -> None:
        lt = self._lt
        parameters = lt.add_torrent_params()
        parameters.ti = lt.torrent_info(lt.bdecode(command.torrent))
        parameters.save_path = self._folder
        parameters.renamed_files = {0: command.file}
        parameters.flags = lt.torrent_flags.seed_mode if command.complete else lt.torrent_flags.update_subscribe
        handle = self._session.add_torrent(parameters)
        handle.set_ssl_certificate_buffer(command.certificate, command.key, _FFDHE2048)
        self._handles[command.name] = handle
        if not command.complete:
            self._incomplete.add(command.name)

    def _hear(self, alert: Any) -> None:
        lt = self._lt
        if isinstance(alert, lt.listen_succeeded_alert):
            self._write(Listening(alert.port))
        elif isinstance(alert, lt.listen_failed_alert):
            self._write(Listening(0))
        elif isinstance(alert, (lt.file_renamed_alert, lt.file_rename_failed_alert)):
            name = self._name(alert.handle)
            if name:
                self._write(Done(name, isinstance(alert, lt.file_renamed_alert)))
        elif isinstance(alert, lt.cache_flushed_alert):
            name = self._name(alert.handle)
            # Of which flush it is, libtorrent does not say, and it makes some of its own: who waits looks at the file.
            if name in self._flushing:
                self._flushing.discard(name)
                self._write(Done(name, True))
        elif isinstance(alert, (lt.torrent_error_alert, lt.file_error_alert)):
            name = self._name(alert.handle)
            if name:
                self._errors[name] = alert.message()[:300]

    def _name(self, handle: Any) -> str:
        return next((name for name, known in self._handles.items() if known == handle), "")

    def _tell(self) -> None:
        """Say how torrents stand, where that has changed."""
        for name, handle in self._handles.items():
            status = handle.status(self._lt.torrent_handle.query_pieces)
            states = self._lt.torrent_status
            checking = status.state in (states.checking_files, states.checking_resume_data)
            state = State(
                name=name,
                checked=not checking,
                have=_as_set(status.pieces),
                peers=status.num_peers,
                down_bytes=status.total_payload_download,
                up_bytes=status.total_payload_upload,
                error=self._errors.get(name, "") or (status.errc.message() if status.errc.value() else ""),
            )
            if state != self._told.get(name):
                self._told[name] = state
                self._write(state)

    def _write(self, event: Any) -> None:
        data = msgspec.msgpack.encode(event)
        view = memoryview(_HEAD.pack(len(data)) + data)
        try:
            while view:
                view = view[os.write(1, view) :]
        except OSError:
            os._exit(0)


def _as_set(pieces: list[bool]) -> bytes:
    bits = 0
    for index, is_there in enumerate(pieces):
        bits |= is_there << index
    return bits.to_bytes((len(pieces) + 7) // 8, "little")


def _exactly(size: int) -> bytes | None:
    """Read so many bytes from standard input; None at its end."""
    pieces = []
    while size:
        piece = os.read(0, min(size, 1 << 20))
        if not piece:
            return None
        pieces.append(piece)
        size -= len(piece)
    return b"".join(pieces)


def _settings(lt: Any, port: int) -> dict[str, Any]:
    wanted = lt.alert.category_t
    return {
        "listen_interfaces": f"0.0.0.0:{port}s,[::]:{port}s",
        "user_agent": "deskgrid",
        "handshake_client_version": "deskgrid",
        "peer_fingerprint": b"-DG0001-",
        "alert_mask": wanted.error_notification | wanted.status_notification | wanted.storage_notification,
        **dict.fromkeys(("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp"), False),
        **dict.fromkeys(("enable_outgoing_utp", "enable_incoming_utp", "listen_system_port_fallback"), False),
        "allow_multiple_connections_per_ip": True,
        "connections_limit": 80,
        "unchoke_slots_limit": -1,
        "aio_threads": 2,
        "hashing_threads": 1,
        "cache_size": _CACHE_BLOCKS,
        "active_limit": -1,
        "active_seeds": -1,
        "active_downloads": -1,
        "active_checking": 4,
        "close_redundant_connections": False,
        "min_reconnect_time": 5,
        "peer_connect_timeout": 8,
        "max_peerlist_size": 200,
        "no_atime_storage": True,
    }
