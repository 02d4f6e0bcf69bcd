"""Users, groups and the tokens by which programs show who they act for."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from deskgrid.model.ids import UserId

__all__ = ["AuditEntry", "Group", "Role", "Token", "User"]


class Role(StrEnum):
    """What a token lets its holder do. An admin may do all that a user may."""

    USER = "user"
    WORKER = "worker"
    ADMIN = "admin"
    JOB = "job"
    """A job's own token: what its owner may do with jobs and data, while the attempt lives."""
    HUB = "hub"


class User(Struct, frozen=True, kw_only=True):
    """Somebody who submits jobs."""

    id: UserId
    name: str
    admin: bool
    created_at: float
    weight: float = 1.0
    """His part of the grid against others'."""
    max_waiting: int | None = None
    """Jobs that may wait; None: what the server says, 0: no bound. Likewise the other two."""
    max_running: int | None = None
    max_bytes: int | None = None


class Group(Struct, frozen=True, kw_only=True):
    """A set of users."""

    name: str
    members: tuple[str, ...]
    weight: float = 1.0
    """Its part of the grid against other groups and users."""


class Token(Struct, frozen=True, kw_only=True):
    """A token as its owner may see it; the secret itself is shown once and stored hashed."""

    id: int
    role: Role
    label: str
    created_at: float
    expires_at: float | None
    revoked: bool
    rights: tuple[str, ...] = ()
    """What it is narrowed to (core/rights.py); none: all that its holder may."""


class AuditEntry(Struct, frozen=True, kw_only=True):
    """Who did what to which object."""

    id: int
    at: float
    principal: str
    """user:NUMBER, job:NUMBER:NUMBER (by its own token), or worker, hub or operator."""
    name: str
    """Of the user, worker or hub, for people."""
    action: str
    """A route's name, or a command's on the server's machine."""
    object: str
    detail: str = ""
    """JSON of what matters; never a secret."""
    request: str = ""
    """By which the server's logs know the call."""
