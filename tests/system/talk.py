"""What tests of the overlay start and ask: commands that run on, and services on the user's PC."""

from __future__ import annotations

import contextlib
import functools
import http.server
import json
import socket
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.system.harness import Program, System, until


def started(system: System, *arguments: str, name: str = "") -> tuple[Program, dict[str, Any]]:
    """Start a command that runs on, and return what it printed when it was ready."""
    program = Program([*arguments, "--json"], system.environment, system.folder / f"{name or arguments[0]}.log", system.prefix)
    system.programs.append(program)
    program.start()

    def ready() -> Any:
        assert program.alive, program.said()
        for line in program.said().splitlines():
            with contextlib.suppress(ValueError):
                if "level" not in (found := json.loads(line)):
                    return found
        return None

    return program, until(ready, what=f"{arguments} is ready")


def dial(address: str) -> socket.socket:
    host, _, port = address.rpartition(":")
    return socket.create_connection(("127.0.0.1" if host == "localhost" else host, int(port)), 60)


def answered(address: str, said: bytes) -> bytes:
    """Say something, end that direction, and return all that comes back."""
    with dial(address) as connection:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        return b"".join(iter(lambda: connection.recv(65536), b""))


@contextlib.contextmanager
def echo_server() -> Iterator[int]:
    """A service on the user's PC: what is sent comes back once the sender has ended; yields its port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=answer, args=(connection,), daemon=True).start()

        def answer(connection: socket.socket) -> None:
            with connection, contextlib.suppress(OSError):
                while data := connection.recv(65536):
                    connection.sendall(data)
                connection.shutdown(socket.SHUT_WR)

        threading.Thread(target=serve, daemon=True).start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)


@contextlib.contextmanager
def serve_folder(folder: Path, host: str = "127.0.0.1") -> Iterator[int]:
    """A web server of a folder on the user's PC; yields its port."""
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(folder))
    with http.server.ThreadingHTTPServer((host, 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server.server_port
        server.shutdown()
