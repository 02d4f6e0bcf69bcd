"""What a worker and the server say to each other of a blob that many fetch at once. What it means: core/transfer.py."""

from __future__ import annotations

from msgspec import Struct

__all__ = ["Neighbour", "Turn", "TurnAnswer"]


class Neighbour(Struct, frozen=True, order=True):
    """Where another member of a swarm takes connections."""

    address: str = ""
    port: int = 0
    peer: str = ""
    """Instead: a worker that is reached through the overlay, worker-NUMBER."""


class Turn(Struct, frozen=True, kw_only=True):
    """What a member says, every `interval_s` or when it wants more from the server."""

    have: bytes = b""
    """The pieces that it has, as a set (core/transfer.py)."""
    fetching: bytes = b""
    """Those that it is fetching from the server."""
    wanted: int = 0
    """Pieces that it would fetch from the server besides."""
    stuck: bool = False
    """It got nothing from others for long."""
    port: int = 0
    """Where it takes connections of others; 0: nowhere."""
    addresses: tuple[str, ...] = ()
    """Its own addresses: by them the server sees whether a router is between, and its neighbours reach it."""
    joined: bool = False
    """It takes part in the overlay: it can be reached through it, and reaches others."""
    key: str = ""
    """A public key for which it wants a certificate; empty: none."""
    torrent: bool = False
    """It wants the torrent."""
    member: str = ""
    """Which of a user's programs it is; a worker says nothing."""
    leaving: bool = False
    """It takes no part any more."""


class TurnAnswer(Struct, frozen=True, kw_only=True):
    """What the server answers."""

    ready: bool
    """False: the blob's torrent is not made yet. Ask again, or fetch it without."""
    interval_s: float = 1.0
    take: bytes = b""
    """The pieces that it is to fetch from the server, as a set."""
    neighbours: tuple[Neighbour, ...] = ()
    """Others, to connect to."""
    lacking: int = 0
    """Other members that do not have all pieces."""
    torrent: bytes = b""
    certificate: str = ""
    """PEM; opens this blob's swarm for `certificate_s`."""
    certificate_s: float = 0.0
