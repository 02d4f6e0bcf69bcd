"""A VNC viewer without a window (RFB 3.8, RFC 6143): it logs in, looks, types."""

from __future__ import annotations

import socket

from deskgrid.machines.fake import vnc_answer

__all__ = ["Viewer"]

_LIMIT_S = 60.0


class Viewer:
    """One connection with a VNC server, which it takes over; its calls block. As a context manager it ends it."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        connection.settimeout(_LIMIT_S)
        self._said = connection.makefile("rb")
        self.width = self.height = 0
        self._pixel_bytes = 4

    def __enter__(self) -> Viewer:
        return self

    def __exit__(self, *_: object) -> None:
        self._said.close()
        self._connection.close()

    def log_in(self, password: str) -> bool:
        """Say whether the server took the password; then the size of the screen is known."""
        if self._take(12) != b"RFB 003.008\n":
            raise OSError("not a VNC server")
        self._connection.sendall(b"RFB 003.008\n")
        kinds = self._take(self._take(1)[0])
        if kinds != b"\2":  # nothing but a password will do
            raise OSError(f"security types {kinds!r}")
        self._connection.sendall(b"\2")
        self._connection.sendall(vnc_answer(password, self._take(16)))
        if self._take(4) != bytes(4):
            return False
        self._connection.sendall(b"\1")
        init = self._take(24)
        self.width, self.height = int.from_bytes(init[:2], "big"), int.from_bytes(init[2:4], "big")
        self._pixel_bytes = init[4] // 8
        self._take(int.from_bytes(init[20:], "big"))
        return True

    def look(self) -> bytes:
        """Return the pixels of one update: of the whole screen, if it comes in one rectangle."""
        size = self.width.to_bytes(2, "big") + self.height.to_bytes(2, "big")
        self._connection.sendall(b"\2\0\0\1" + bytes(4))  # raw pixels only
        self._connection.sendall(b"\3\0" + bytes(4) + size)
        head = self._take(4)
        if head[0] != 0:
            raise OSError(f"message {head[0]} in the place of an update")
        pixels = b""
        for _ in range(int.from_bytes(head[2:], "big")):
            rectangle = self._take(12)
            width, height = int.from_bytes(rectangle[4:6], "big"), int.from_bytes(rectangle[6:8], "big")
            pixels += self._take(width * height * self._pixel_bytes)
        return pixels

    def type(self, text: str) -> None:
        """Press and let go a key for each letter (ASCII)."""
        for letter in text:
            for down in (1, 0):
                self._connection.sendall(bytes((4, down, 0, 0)) + ord(letter).to_bytes(4, "big"))

    def until_ended(self) -> bytes:
        """Return what comes until the server ends the connection."""
        try:
            return self._said.read()
        except ConnectionError:
            return b""

    def _take(self, size: int) -> bytes:
        data = self._said.read(size)
        if len(data) < size:
            raise OSError("the connection ended")
        return data
