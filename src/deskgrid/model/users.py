"""Users, groups and the tokens by which programs show who they act for."""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from deskgrid.model.ids import UserId

__all__ = ["Group", "Role", "Token", "User"]


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


class Group(Struct, frozen=True, kw_only=True):
    """A set of users."""

    name: str
    members: tuple[str, ...]


class Token(Struct, frozen=True, kw_only=True):
    """A token as its owner may see it; the secret itself is shown once and stored hashed."""

    id: int
    role: Role
    label: str
    created_at: float
    expires_at: float | None
    revoked: bool
