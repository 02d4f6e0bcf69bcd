"""The error tree, split by who must act.

    DeskgridError
    |-- CallerError            the user or program that asked
    |   |-- InvalidInput       a value is wrong: what, where, what is allowed
    |   |   |-- BadImage       a disk image that is refused
    |   |   `-- BadArchive     an archive that is refused
    |   |-- NotFound
    |   |-- Conflict           the state does not allow it (any more)
    |   |-- Unauthenticated    no token, or one that is not valid
    |   `-- Forbidden          a valid token that may not do this
    |-- PeerError              the other program, or the way to it
    |   |-- Unreachable        no connection; trying again later may help
    |   `-- ProtocolError      an answer that breaks the contract
    |-- OwnerError             the owner of the PC
    |   |-- DriverUnusable     this PC cannot run that kind of machine now
    |   |-- NoSpace            a disk or bound is full
    |   `-- MachineFailed      the hypervisor or the guest broke
    `-- OperatorError          the admin of the server
        `-- StoreUnavailable   the database or the blob folder cannot be used

Every error has a message for people, an optional hint (what to do), and the ids it is about as attributes.
"""

from __future__ import annotations

__all__ = [
    "BadArchive",
    "BadImage",
    "CallerError",
    "Conflict",
    "DeskgridError",
    "DriverUnusable",
    "Forbidden",
    "InvalidInput",
    "MachineFailed",
    "NoSpace",
    "NotFound",
    "OperatorError",
    "OwnerError",
    "PeerError",
    "ProtocolError",
    "StoreUnavailable",
    "Unauthenticated",
    "Unreachable",
]


class DeskgridError(Exception):
    """Base of all errors that deskgrid raises on purpose.

    `message` says what happened; `hint` what to do about it ("" if nothing sensible can be said).
    """

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message} ({self.hint})" if self.hint else self.message


class CallerError(DeskgridError):
    """The user or program that asked must act."""


class InvalidInput(CallerError):
    """A value is wrong. `where` names it: a file and line, a field, an option."""

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.where = where


class BadImage(InvalidInput):
    """A disk image that is refused: damaged, of a kind not taken, or pointing outside itself."""


class BadArchive(InvalidInput):
    """An archive that is refused: damaged, too large, or with members that would leave its folder."""


class NotFound(CallerError):
    """There is no such thing, or the caller may not know that there is."""


class Conflict(CallerError):
    """The state of the thing does not allow this (any more)."""


class Unauthenticated(CallerError):
    """No token, or one that is unknown, expired or revoked."""


class Forbidden(CallerError):
    """A valid token whose holder may not do this."""


class PeerError(DeskgridError):
    """The other program, or the way to it, is at fault."""


class Unreachable(PeerError):
    """No connection, or one that broke. Trying again later may help."""


class ProtocolError(PeerError):
    """An answer that breaks the contract: wrong type, wrong hash, wrong size."""


class OwnerError(DeskgridError):
    """The owner of the PC must act."""


class DriverUnusable(OwnerError):
    """This PC cannot run that kind of machine at present; the message says why."""


class NoSpace(OwnerError):
    """A disk, or a bound that the owner set, is full."""


class MachineFailed(OwnerError):
    """The hypervisor or its guest broke in a way that is not the job's doing."""


class OperatorError(DeskgridError):
    """The admin of the server must act."""


class StoreUnavailable(OperatorError):
    """The database or the blob folder cannot be used (full, missing, damaged)."""
