"""The messages between a peer and a hub, and how they travel: a length of four bytes (big-endian), then a JSON object.

    peer -> hub   Register             once, first
                  Connect -> Accepted | Rejected        reach a service of another peer, with a grant
                  Accept | Reject      in answer to an Invite
                  Ping -> Pong
    hub -> peer   Registered           in answer to Register
                  Invite               another peer wants to connect
                  Goodbye              the hub ends the connection, and says why

Nothing here does IO. What comes is hostile: a frame is at most MAX_FRAME_BYTES long and must be one of these messages with
values of the right kinds; a reader that once refused stays refused.

A hub's port also takes plain connections that begin with one of these words (a TLS connection begins with byte 22):

    PROBE                        the hub answers "HOST PORT\\n", the address that it sees, and waits until the peer closes
    RELAY, then 32 bytes         one end of a relayed stream; when both ends of this token are there, the hub carries what follows
"""

from __future__ import annotations

from typing import Annotated, NoReturn

import msgspec
from msgspec import Meta, Struct

from deskgrid.errors import ProtocolError
from deskgrid.model.overlay import Address

__all__ = [
    "MAX_FRAME_BYTES",
    "PROBE",
    "RELAY",
    "TLS_FIRST_BYTE",
    "TOKEN_BYTES",
    "Accept",
    "Accepted",
    "Candidates",
    "Connect",
    "FrameReader",
    "Goodbye",
    "Invite",
    "Message",
    "Ping",
    "Pong",
    "Register",
    "Registered",
    "Reject",
    "Rejected",
    "encode",
]

MAX_FRAME_BYTES = 16 << 10
PROBE = b"DGP1"
RELAY = b"DGR1"
TOKEN_BYTES = 32
TLS_FIRST_BYTE = 0x16
_LENGTH_BYTES = 4
Number = Annotated[int, Meta(ge=0, lt=1 << 53)]
"""What every JSON library can write as well as read."""


class Candidates(Struct, frozen=True, kw_only=True):
    """Where a peer may be dialled. `observed` is filled in by the hub, whatever the peer said."""

    observed: str = ""
    """The peer's IP address as its hub sees it."""
    port: int = 0
    """TCP port that it listens on; 0: none."""
    private: tuple[str, ...] = ()
    """Its own addresses; dialled only if both peers have the same `observed` and the owner of the dialling PC allows it."""
    punch: Address | None = None
    """The outside of a hole in its NAT, from a PROBE; the hub drops one whose host is not `observed`."""
    relay_only: bool = False
    """Its owner wants its address hidden: the hub passes none of the above on."""


class Register(Struct, frozen=True, tag="register"):
    """Who it is, the hub knows from the certificate."""

    version: int = 1


class Registered(Struct, frozen=True, tag="registered", kw_only=True):
    observed: Address
    ping_s: float
    """The peer sends a Ping this often; the hub ends a connection that was silent for three times as long."""


class Connect(Struct, frozen=True, tag="connect", kw_only=True):
    id: str
    """32 hexadecimal digits, chosen at random by the caller; names this connection at both peers."""
    grant: str
    candidates: Candidates


class Invite(Struct, frozen=True, tag="invite", kw_only=True):
    id: str
    grant: str
    candidates: Candidates
    """The caller's."""
    relay: str
    """Token of the relay, TOKEN_BYTES in hexadecimal; for this connection only."""


class Accept(Struct, frozen=True, tag="accept", kw_only=True):
    id: str
    candidates: Candidates


class Accepted(Struct, frozen=True, tag="accepted", kw_only=True):
    id: str
    candidates: Candidates
    """The called peer's."""
    relay: str


class Reject(Struct, frozen=True, tag="reject", kw_only=True):
    id: str
    reason: str


class Rejected(Struct, frozen=True, tag="rejected", kw_only=True):
    id: str
    reason: str
    """For people."""
    absent: bool = False
    """The called peer is not registered here (any more): ask for a new grant."""


class Ping(Struct, frozen=True, tag="ping"):
    number: Number = 0


class Pong(Struct, frozen=True, tag="pong"):
    number: Number = 0


class Goodbye(Struct, frozen=True, tag="goodbye"):
    reason: str


Message = (
    Register | Registered | Connect | Invite | Accept | Accepted | Reject | Rejected | Ping | Pong | Goodbye
)  # fmt: skip
_decoder = msgspec.json.Decoder(Message)


def encode(message: Message) -> bytes:
    """Return a message as it travels. Raise ValueError if it is longer than a reader takes."""
    body = msgspec.json.encode(message)
    if len(body) > MAX_FRAME_BYTES:
        raise ValueError(f"a message of {len(body)} bytes")
    return len(body).to_bytes(_LENGTH_BYTES, "big") + body


class FrameReader:
    """Bytes in, messages out; holds at most one frame. Cost is linear in what came, however it was cut."""

    __slots__ = ("_refused", "_rest")

    def __init__(self) -> None:
        self._rest = bytearray()
        self._refused = ""

    def feed(self, data: bytes) -> list[Message]:
        """Return the messages that are whole now. Raise ProtocolError for what is none; then for ever."""
        if self._refused:
            raise ProtocolError(self._refused)
        self._rest += data
        found: list[Message] = []
        start = 0
        while (end := self._end_of_frame(start)) is not None:
            found.append(self._decode(start + _LENGTH_BYTES, end))
            start = end
        self._rest = self._rest[start:]  # a copy, so that a burst's memory is not kept
        return found

    def _end_of_frame(self, start: int) -> int | None:
        """Return where the frame at `start` ends, or None if it is not whole yet."""
        head = self._rest[start : start + _LENGTH_BYTES]
        if len(head) < _LENGTH_BYTES:
            return None
        size = int.from_bytes(head, "big")
        if size > MAX_FRAME_BYTES:
            self._refuse(f"a frame of {size} bytes; at most {MAX_FRAME_BYTES} are allowed")
        end = start + _LENGTH_BYTES + size
        return end if end <= len(self._rest) else None

    def _decode(self, start: int, end: int) -> Message:
        try:
            message: Message = _decoder.decode(self._rest[start:end])
        except (msgspec.DecodeError, ValueError, RecursionError) as error:
            self._refuse(f"a frame that is no message: {error}")
        return message

    def _refuse(self, reason: str) -> NoReturn:
        self._refused, self._rest = reason, bytearray()
        raise ProtocolError(reason)
