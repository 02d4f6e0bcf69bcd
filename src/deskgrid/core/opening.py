"""The first two records of a stream between two peers: what the caller wants, and whether it gets it. JSON, inside TLS.

    caller -> called   Opening      the grant, the id of the connection, and what the program has said already
    called -> caller   Answer       at most one that asks to wait, then ok, once the service is there; or an error

What comes is hostile. No IO; times are the server's, in seconds since 1970.
"""

from __future__ import annotations

import re
from collections.abc import Container

import msgspec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Struct

from deskgrid import errors
from deskgrid.core.trust import Grant, verify_grant
from deskgrid.errors import Conflict, DeskgridError, Forbidden, NotFound, ProtocolError, Unreachable
from deskgrid.model.ids import Sha256

__all__ = [
    "MAX_RECORD_BYTES",
    "MOST_DATA_BYTES",
    "Answer",
    "Opening",
    "SeenIds",
    "check_grant",
    "decode_answer",
    "decode_opening",
    "encode_record",
    "is_id",
    "plain_text",
    "refusal",
]

MOST_DATA_BYTES = 8 << 10
"""Of a program that may come with the opening, which saves a round trip."""
MAX_RECORD_BYTES = 32 << 10
_ID = re.compile(r"[0-9a-f]{32}")
_MOST_TEXT = 300
_MOST_IDS = 65_536
_TOLD = (Conflict, Forbidden, NotFound, Unreachable)
"""What a called peer may say went wrong; the rest becomes Unreachable."""


class Opening(Struct, frozen=True, kw_only=True):
    """What the caller wants."""

    grant: str
    id: str
    """Of the connection, as in frames.Connect; a fresh one if no hub was asked."""
    data: bytes = b""
    """The first bytes of the calling program, for the service once it is there; at most MOST_DATA_BYTES."""


class Answer(Struct, frozen=True, kw_only=True):
    """Whether bytes of the service follow."""

    ok: bool = False
    waiting: bool = False
    """The service is not there yet; the opening's data was thrown away, and is to be sent again as a part of the stream."""
    error: str = ""
    """Name of a class in errors.py."""
    message: str = ""


def encode_record(record: Opening | Answer) -> bytes:
    """Return a record as it travels."""
    return msgspec.json.encode(record)


def decode_opening(data: bytes) -> Opening:
    """Return what a caller sent. Raise ProtocolError for anything else."""
    try:
        opening = msgspec.json.decode(data, type=Opening)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError("the caller's first record cannot be read") from error
    if not is_id(opening.id):
        raise ProtocolError("the caller's first record has no id")
    if len(opening.data) > MOST_DATA_BYTES:
        raise ProtocolError(
            f"the caller's first record has {len(opening.data)} bytes of data; at most {MOST_DATA_BYTES} are allowed"
        )
    return opening


def decode_answer(data: bytes) -> bool:
    """Return True if a called peer said yes, False if its service is waited for.

    Raise what it said went wrong, or ProtocolError if it cannot be read.
    """
    try:
        answer = msgspec.json.decode(data, type=Answer)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ProtocolError("the called peer's answer cannot be read") from error
    if answer.ok or answer.waiting:
        return answer.ok
    kind = getattr(errors, answer.error, None) if answer.error in {one.__name__ for one in _TOLD} else None
    raise (kind or Unreachable)(plain_text(answer.message) or "the called peer refused")


def refusal(error: DeskgridError) -> Answer:
    """Return how a called peer says what went wrong."""
    kind = next((one for one in _TOLD if isinstance(error, one)), Unreachable)
    return Answer(error=kind.__name__, message=plain_text(str(error)))


def check_grant(
    text: str, key: Ed25519PublicKey, *, now: float, target: str, target_key: Sha256, services: Container[str]
) -> Grant:
    """Return a grant for a service of ours. Raise Forbidden if it is not one, NotFound if we do not offer that service."""
    grant = verify_grant(text, key, now=now)
    if grant.target != target or grant.target_key != target_key:
        raise Forbidden("this grant is for another peer")
    if grant.service not in services:
        raise NotFound(f"there is no service {plain_text(grant.service)!r} here")
    return grant


def is_id(text: str) -> bool:
    """Tell whether this names a connection: 32 hexadecimal digits."""
    return _ID.fullmatch(text) is not None


def plain_text(text: str) -> str:
    """Return another peer's words as they may be shown: short, one line."""
    return "".join(c if c.isprintable() else " " for c in text[:_MOST_TEXT]).strip()


class SeenIds:
    """The ids of connections that were opened, so that none is opened twice. Kept until their grants have expired; bounded."""

    def __init__(self) -> None:
        self._until: dict[tuple[Sha256, str], float] = {}

    def add(self, source_key: Sha256, connection_id: str, *, until: float, now: float) -> bool:
        """Note one; False if it was there."""
        key = (source_key, connection_id)
        if key in self._until:
            return False
        while self._until and (len(self._until) >= _MOST_IDS or self._until[next(iter(self._until))] <= now):
            del self._until[next(iter(self._until))]
        self._until[key] = until
        return True
