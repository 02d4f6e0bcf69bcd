"""127.0.0.1:PORT in a cage led to a service of the job, for programs that know no other place for their server. Standard library only.

A port that is taken is left alone. Each direction ends when its own end has come; an idle connection may stay.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Sequence

__all__ = ["Forwards"]

_CHUNK_BYTES = 64 << 10
_MOST_CONNECTIONS = 256


class Forwards:
    """Listeners for (host, port) pairs, served by threads that end with the process."""

    def __init__(self, services: Sequence[tuple[str, int]]) -> None:
        self._room = threading.BoundedSemaphore(_MOST_CONNECTIONS)
        for host, port in services:
            with contextlib.suppress(OSError):
                listener = socket.create_server(("127.0.0.1", port), backlog=64)
                threading.Thread(target=self._accept, args=(listener, host, port), daemon=True).start()

    def _accept(self, listener: socket.socket, host: str, port: int) -> None:
        while True:
            try:
                local, _ = listener.accept()
            except OSError:
                continue
            self._room.acquire()
            threading.Thread(target=self._join, args=(local, host, port), daemon=True).start()

    def _join(self, local: socket.socket, host: str, port: int) -> None:
        try:
            with local, contextlib.suppress(OSError), socket.create_connection((host, port)) as remote:
                back = threading.Thread(target=_carry, args=(remote, local), daemon=True)
                back.start()
                _carry(local, remote)
                back.join()
        finally:
            self._room.release()


def _carry(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(_CHUNK_BYTES):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)
