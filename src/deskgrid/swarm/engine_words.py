"""What the worker and the process in which BitTorrent runs say to each other. Frames: the length in 4 bytes, the highest first, then MessagePack."""

from __future__ import annotations

from typing import TypeAlias

from msgspec import Struct

__all__ = [
    "Add",
    "Certify",
    "Command",
    "Connect",
    "Done",
    "Event",
    "Flush",
    "Limit",
    "Listening",
    "Piece",
    "Remove",
    "Rename",
    "Start",
    "State",
]

# What is said to the child.


class Start(Struct, frozen=True, tag=True):
    folder: str
    port: int


class Limit(Struct, frozen=True, tag=True):
    """0: no bound."""

    up_bytes_per_s: int
    down_bytes_per_s: int
    paused: bool = False


class Add(Struct, frozen=True, tag=True, kw_only=True):
    """Begin to fetch, or with `complete` only to give."""

    name: str
    file: str
    """In the folder."""
    torrent: bytes
    certificate: str
    key: str
    complete: bool


class Certify(Struct, frozen=True, tag=True):
    name: str
    certificate: str
    key: str


class Connect(Struct, frozen=True, tag=True):
    name: str
    to: tuple[tuple[str, int], ...]


class Piece(Struct, frozen=True, tag=True):
    """A piece that came another way; it is checked like all others."""

    name: str
    index: int
    data: bytes


class Rename(Struct, frozen=True, tag=True):
    """Give the file another name in the folder."""

    name: str
    file: str


class Flush(Struct, frozen=True, tag=True):
    """Write all that has come to the file."""

    name: str


class Remove(Struct, frozen=True, tag=True):
    """Leave the file."""

    name: str


Command: TypeAlias = Start | Limit | Add | Certify | Connect | Piece | Flush | Rename | Remove

# What it says.


class Listening(Struct, frozen=True, tag=True):
    port: int
    """0: that failed."""


class Done(Struct, frozen=True, tag=True):
    """Flush or Rename, one at a time for each name."""

    name: str
    done: bool


class State(Struct, frozen=True, tag=True, kw_only=True):
    name: str
    checked: bool = False
    """What was in the file has been looked at; `have` says what that is."""
    have: bytes = b""
    """See core/transfer.py."""
    peers: int = 0
    down_bytes: int = 0
    """From others, in all."""
    up_bytes: int = 0
    error: str = ""


Event: TypeAlias = Listening | Done | State
