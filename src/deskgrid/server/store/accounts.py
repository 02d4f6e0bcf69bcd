"""Users, groups, tokens and secrets. Tokens and secrets are kept as sha256 only."""

from __future__ import annotations

import re

import sqlalchemy as sa
from msgspec import Struct

from deskgrid.errors import Conflict, InvalidInput, NotFound, Unauthenticated
from deskgrid.link import hash_secret
from deskgrid.model.ids import UserId, WorkerId
from deskgrid.model.users import Group, Role, Token, User
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import account, membership, secret, team, token, worker

__all__ = [
    "Caller",
    "add_account",
    "add_secret",
    "add_team",
    "add_token",
    "authenticate",
    "find_account",
    "list_accounts",
    "list_teams",
    "list_tokens",
    "revoke_token",
    "set_members",
    "use_secret",
]

_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,62}")
JOIN, LOGIN = "join", "login"


class Caller(Struct, frozen=True):
    """Who makes a call, from its token."""

    role: Role
    name: str
    user_id: UserId | None = None
    worker_id: WorkerId | None = None

    @property
    def principal(self) -> str:
        """A short unique name, for idempotency keys and uploads."""
        return f"worker:{self.worker_id}" if self.role is Role.WORKER else f"user:{self.user_id}"


def check_name(name: str, what: str) -> str:
    """Return `name` if it may be a name. Raise InvalidInput otherwise."""
    if not _NAME.fullmatch(name):
        raise InvalidInput(f"{name!r} is not a {what} name", hint="a letter, then letters, digits, _ . -, all small; at most 63")
    return name


def check_hash(hashed: str) -> str:
    """Return `hashed` if it may be a sha256. Raise InvalidInput otherwise."""
    if not re.fullmatch(r"[0-9a-f]{64}", hashed):
        raise InvalidInput("a token or secret is told by its sha256: 64 digits 0-9 and a-f")
    return hashed


def add_account(tx: Transaction, name: str, *, admin: bool) -> User:
    """Add a user. Raise Conflict if the name is taken."""
    check_name(name, "user")
    if tx.value(sa.select(account.c.id).where(account.c.name == name)) is not None:
        raise Conflict(f"there is a user {name} already")
    added = tx.run(sa.insert(account).values(name=name, admin=admin, created_at=tx.now))
    return User(id=UserId(_new_id(added)), name=name, admin=admin, created_at=tx.now)


def find_account(tx: Transaction, name: str) -> User:
    """Return a user by name. Raise NotFound."""
    row = tx.row(sa.select(account).where(account.c.name == name))
    if row is None:
        raise NotFound(f"there is no user {name!r}")
    return _user(row)


def list_accounts(tx: Transaction) -> tuple[User, ...]:
    """Return all users by name."""
    return tuple(_user(row) for row in tx.rows(sa.select(account).order_by(account.c.name)))


def add_token(
    tx: Transaction, hashed: str, *, role: Role, label: str, user: UserId | None = None, on: WorkerId | None = None
) -> None:
    """Keep a new token's hash."""
    values = {"hash": check_hash(hashed), "role": role.value, "label": label[:128], "created_at": tx.now}
    tx.run(sa.insert(token).values(account_id=user, worker_id=on, **values))


def authenticate(tx: Transaction, text: str) -> Caller:
    """Return who a token stands for. Raise Unauthenticated if it is unknown, expired, revoked, or its worker has left."""
    row = tx.row(
        sa.select(token, account.c.name.label("user_name"), account.c.admin, worker.c.name.label("worker_name"), worker.c.left_at)
        .select_from(
            token.outerjoin(account, account.c.id == token.c.account_id).outerjoin(worker, worker.c.id == token.c.worker_id)
        )
        .where(token.c.hash == hash_secret(text))
    )
    if row is None or row.revoked_at is not None or row.left_at is not None or (row.expires_at or tx.now + 1) <= tx.now:
        raise Unauthenticated("this token is not valid (any more)", hint="deskgrid login LINK, or deskgrid worker join LINK")
    if row.worker_id is not None:
        return Caller(Role.WORKER, row.worker_name, worker_id=WorkerId(row.worker_id))
    return Caller(Role.ADMIN if row.admin else Role.USER, row.user_name, user_id=UserId(row.account_id))


def list_tokens(tx: Transaction, user_id: UserId) -> tuple[Token, ...]:
    """Return a user's tokens, newest first."""
    rows = tx.rows(sa.select(token).where(token.c.account_id == user_id).order_by(token.c.id.desc()))
    return tuple(
        Token(
            id=row.id,
            role=Role(row.role),
            label=row.label,
            created_at=row.created_at,
            expires_at=row.expires_at,
            revoked=row.revoked_at is not None,
        )
        for row in rows
    )


def revoke_token(tx: Transaction, user_id: UserId, token_id: int) -> None:
    """Revoke a token of a user's. Raise NotFound. Idempotent."""
    found = tx.run(
        sa.update(token)
        .where(token.c.id == token_id, token.c.account_id == user_id)
        .values(revoked_at=sa.func.coalesce(token.c.revoked_at, tx.now))
    )
    if not found.rowcount:
        raise NotFound(f"you have no token {token_id}")


def add_secret(tx: Transaction, hashed: str, *, purpose: str, uses: int, lifetime_s: float, user: UserId | None = None) -> float:
    """Keep a secret's hash; return when it expires."""
    if not 1 <= uses <= 100_000 or not 0 < lifetime_s <= 366 * 86400:
        raise InvalidInput("a secret has 1 to 100000 uses and lives at most 366 days")
    expires_at = tx.now + lifetime_s
    tx.run(
        sa.insert(secret).values(hash=check_hash(hashed), purpose=purpose, account_id=user, uses_left=uses, expires_at=expires_at)
    )
    return expires_at


def use_secret(tx: Transaction, text: str, purpose: str) -> UserId | None:
    """Use a secret once; return the user that it is for, if any. Raise Unauthenticated if it is unknown, used up or expired."""
    valid = (secret.c.hash == hash_secret(text), secret.c.purpose == purpose, secret.c.uses_left > 0, secret.c.expires_at > tx.now)
    used = tx.run(sa.update(secret).where(*valid).values(uses_left=secret.c.uses_left - 1))
    if not used.rowcount:
        raise Unauthenticated("this link was used already or has expired", hint="ask the admin for a new one")
    found: UserId | None = tx.value(sa.select(secret.c.account_id).where(secret.c.hash == hash_secret(text)))
    return found


def add_team(tx: Transaction, name: str) -> Group:
    """Add a group. Raise Conflict if the name is taken."""
    check_name(name, "group")
    if tx.value(sa.select(team.c.name).where(team.c.name == name)) is not None:
        raise Conflict(f"there is a group {name} already")
    tx.run(sa.insert(team).values(name=name))
    return Group(name=name, members=())


def list_teams(tx: Transaction) -> tuple[Group, ...]:
    """Return all groups by name."""
    members: dict[str, list[str]] = {row.name: [] for row in tx.rows(sa.select(team).order_by(team.c.name))}
    joined = membership.join(account, account.c.id == membership.c.account_id)
    for row in tx.rows(sa.select(membership.c.team, account.c.name).select_from(joined).order_by(account.c.name)):
        members[row.team].append(row.name)
    return tuple(Group(name=name, members=tuple(names)) for name, names in members.items())


def set_members(tx: Transaction, name: str, *, add: tuple[str, ...], remove: tuple[str, ...]) -> Group:
    """Add and remove members of a group. Raise NotFound for an unknown group or user; then nothing changes."""
    if tx.value(sa.select(team.c.name).where(team.c.name == name)) is None:
        raise NotFound(f"there is no group {name!r}")
    for user in (find_account(tx, user) for user in (*add, *remove)):
        tx.run(sa.delete(membership).where(membership.c.team == name, membership.c.account_id == user.id))
    for user in (find_account(tx, user) for user in dict.fromkeys(add)):
        tx.run(sa.insert(membership).values(team=name, account_id=user.id))
    return next(group for group in list_teams(tx) if group.name == name)


def _user(row: sa.Row[tuple[object, ...]]) -> User:
    return User(id=UserId(row.id), name=row.name, admin=row.admin, created_at=row.created_at)


def _new_id(result: sa.CursorResult[tuple[object, ...]]) -> int:
    """Return the id that the store gave a new row."""
    return int(result.inserted_primary_key[0])  # type: ignore[index]
