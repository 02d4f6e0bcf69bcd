"""Users, groups, tokens and secrets. Tokens and secrets are kept as sha256 only."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa
from msgspec import Struct

from deskgrid.core.rights import RULES, Right, Thing, Viewer, Who, check_given, is_allowed, is_of_admin, parse_rights
from deskgrid.errors import Conflict, Forbidden, InvalidInput, NotFound, Unauthenticated
from deskgrid.link import hash_secret
from deskgrid.model.data import Visibility
from deskgrid.model.ids import AttemptId, JobId, UserId, WorkerId
from deskgrid.model.users import Group, Role, Token, User
from deskgrid.model.wire import AddToken, SetUser
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import IS_LIVE, account, attempt, job, membership, secret, team, token, worker
from deskgrid.server.store.statement import Statement

__all__ = [
    "Caller",
    "add_account",
    "add_narrowed_token",
    "add_secret",
    "add_team",
    "add_token",
    "add_token_of_attempt",
    "authenticate",
    "check_group",
    "check_shares",
    "drop_tokens_of_ended_attempts",
    "find_account",
    "groups_of",
    "list_accounts",
    "list_teams",
    "list_tokens",
    "may",
    "renew_token",
    "require",
    "revoke_token",
    "set_account",
    "set_members",
    "set_team",
    "token_ends",
    "trusted",
    "use_secret",
    "visible",
]

_NAME = re.compile(r"[a-z][a-z0-9_.-]{0,62}")
JOIN, LOGIN, HUB = "join", "login", "hub"
"""What a secret is for."""


class Caller(Struct, frozen=True):
    """Who makes a call, from its token."""

    role: Role
    name: str
    user_id: UserId | None = None
    worker_id: WorkerId | None = None
    job_id: JobId | None = None
    attempt_id: AttemptId | None = None
    """Of a job with a token of its own, which acts for `user_id`."""
    hub_id: int | None = None
    rights: frozenset[Right] | None = None
    """What a user's token is narrowed to; None: all that he may."""
    expires_at: float | None = None
    token_id: int = 0

    @property
    def principal(self) -> str:
        """A short unique name, for idempotency keys and uploads."""
        if self.role is Role.WORKER:
            return f"worker:{self.worker_id}"
        if self.role is Role.JOB:  # of one attempt: another one, on another PC, must not find answers that this one asked for
            return f"job:{self.job_id}:{self.attempt_id}"
        return f"hub:{self.hub_id}" if self.role is Role.HUB else f"user:{self.user_id}"


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
    tx: Transaction,
    hashed: str,
    *,
    role: Role,
    label: str,
    user: UserId | None = None,
    on: WorkerId | None = None,
    hub: int | None = None,
    expires_at: float | None = None,
    rights: frozenset[Right] | None = None,
) -> int:
    """Keep a new token's hash; return its number."""
    shown = "".join(letter for letter in label if letter.isprintable())[:128]
    narrowed = msgspec.json.encode(sorted(rights)).decode() if rights is not None else ""
    values: dict[str, Any] = {"hash": check_hash(hashed), "role": role.value, "label": shown, "created_at": tx.now}
    values |= {"expires_at": expires_at, "rights": narrowed}
    return _new_id(tx.run(sa.insert(token).values(account_id=user, worker_id=on, hub_id=hub, **values)))


def token_ends(tx: Transaction, wanted_s: float, most_s: float) -> float | None:
    """Return when a token ends that shall live for `wanted_s` (0: as long as it may), at most `most_s` (0: for ever)."""
    if wanted_s < 0:
        raise InvalidInput("a token lives for some time", where="lifetime_s")
    lifetime_s = min(wanted_s or most_s, most_s or wanted_s)
    return tx.now + lifetime_s if lifetime_s else None


def add_narrowed_token(tx: Transaction, caller: Caller, wanted: AddToken, most_s: float) -> Token:
    """Keep a token with some rights, made by the holder of another. Raise InvalidInput, Forbidden (it would be wider)."""
    if caller.user_id is None:
        raise Forbidden("only users have such tokens")
    rights = parse_rights(wanted.rights)
    check_given(caller.role, caller.rights, rights)
    if wanted.lifetime_s <= 0:
        raise InvalidInput("such a token lives for some time", where="lifetime_s", hint="as in --lifetime 1d")
    ends = token_ends(tx, wanted.lifetime_s, most_s)
    if caller.rights is not None and caller.expires_at is not None and ends is not None:
        ends = min(ends, caller.expires_at)
    role = Role.ADMIN if caller.role is Role.ADMIN and is_of_admin(rights) else Role.USER
    number = add_token(tx, wanted.token_hash, role=role, label=wanted.label, user=caller.user_id, expires_at=ends, rights=rights)
    return next(one for one in list_tokens(tx, caller.user_id) if one.id == number)


def renew_token(tx: Transaction, caller: Caller, lifetime_s: float) -> float | None:
    """Let the caller's token live on for `lifetime_s` (0: for ever), and return when it ends. Raise Forbidden for a narrowed one."""
    if caller.rights is not None:
        raise Forbidden("a narrowed token ends when it was meant to", hint="make another one: deskgrid user token --right ...")
    ends = token_ends(tx, 0.0, lifetime_s)
    tx.run(sa.update(token).where(token.c.id == caller.token_id).values(expires_at=ends))
    return ends


def add_token_of_attempt(tx: Transaction, hashed: str, attempt_id: AttemptId, rights: frozenset[Right] | None = None) -> None:
    """Let a token act for an attempt's job, in the place of the one that it had, with all rights of a job's or these. Idempotent.

    Raise Conflict if it is another's.
    """
    row = tx.row(sa.select(token.c.attempt_id).where(token.c.hash == check_hash(hashed)))
    if row is not None and row.attempt_id != attempt_id:
        raise Conflict("this token belongs to somebody else", hint="make a new one")
    tx.run(sa.delete(token).where(token.c.attempt_id == attempt_id, token.c.hash != hashed))
    if row is None:
        values: dict[str, Any] = {"hash": hashed, "role": Role.JOB.value, "label": f"attempt {attempt_id}", "created_at": tx.now}
        values["rights"] = msgspec.json.encode(sorted(rights)).decode() if rights is not None else ""
        tx.run(sa.insert(token).values(attempt_id=attempt_id, **values))


def drop_tokens_of_ended_attempts(tx: Transaction, ended_before: float) -> None:
    """Forget the tokens of attempts that ended long ago; one that was lost a moment ago may come back."""
    over = sa.select(attempt.c.id).where(attempt.c.id == token.c.attempt_id, attempt.c.ended_at < ended_before)
    tx.run(sa.delete(token).where(token.c.attempt_id.is_not(None), sa.exists(over)))


class _Known(NamedTuple):
    """What decides whom a token stands for."""

    label: str
    expires_at: float | None
    revoked_at: float | None
    account_id: int | None
    user_name: str | None
    admin: bool | None
    worker_id: int | None
    worker_name: str | None
    left_at: float | None
    attempt_id: int | None
    hub_id: int | None
    rights: str
    id: int


_TOKEN = Statement(
    sa.select(
        token.c.label,
        token.c.expires_at,
        token.c.revoked_at,
        token.c.account_id,
        account.c.name,
        account.c.admin,
        token.c.worker_id,
        worker.c.name,
        worker.c.left_at,
        token.c.attempt_id,
        token.c.hub_id,
        token.c.rights,
        token.c.id,
    )
    .select_from(token.outerjoin(account, account.c.id == token.c.account_id).outerjoin(worker, worker.c.id == token.c.worker_id))
    .where(token.c.hash == sa.bindparam("hashed"))
)


def authenticate(tx: Transaction, text: str) -> Caller:
    """Return who a token stands for. Raise Unauthenticated if it is unknown, expired, revoked, or its worker has left."""
    rows = tx.fast(_TOKEN, hashed=hash_secret(text))
    known = _Known(*rows[0]) if rows else None
    if known is None or known.revoked_at is not None or known.left_at is not None or (known.expires_at or tx.now + 1) <= tx.now:
        raise Unauthenticated("this token is not valid (any more)", hint="deskgrid login LINK, or deskgrid worker join LINK")
    if known.worker_id is not None:
        return Caller(Role.WORKER, known.worker_name or "", worker_id=WorkerId(known.worker_id))
    if known.attempt_id is not None:
        return _job_caller(tx, AttemptId(known.attempt_id), _rights(known.rights))
    if known.hub_id is not None:
        return Caller(Role.HUB, known.label, hub_id=known.hub_id)
    rights = _rights(known.rights)
    return Caller(
        Role.ADMIN if known.admin and is_of_admin(rights) else Role.USER,
        known.user_name or "",
        user_id=UserId(known.account_id or 0),
        rights=rights,
        expires_at=known.expires_at,
        token_id=known.id,
    )


def _rights(text: str) -> frozenset[Right] | None:
    return frozenset(Right(one) for one in msgspec.json.decode(text, type=list[str])) if text else None


def _job_caller(tx: Transaction, attempt_id: AttemptId, rights: frozenset[Right] | None) -> Caller:
    """Return who a job's own token stands for: its owner, with no more rights than a user has. Raise Unauthenticated after its attempt."""
    joined = attempt.join(job, job.c.id == attempt.c.job_id).join(account, account.c.id == job.c.owner_id)
    columns = (attempt.c.job_id, job.c.owner_id, account.c.name)
    row = tx.row(sa.select(*columns).select_from(joined).where(attempt.c.id == attempt_id, IS_LIVE))
    if row is None:
        raise Unauthenticated("this token was valid while its job ran")
    return Caller(Role.JOB, row.name, user_id=UserId(row.owner_id), job_id=JobId(row.job_id), attempt_id=attempt_id, rights=rights)


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
            rights=msgspec.json.decode(row.rights, type=tuple[str, ...]) if row.rights else (),
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


def add_secret(
    tx: Transaction,
    hashed: str,
    *,
    purpose: str,
    uses: int,
    lifetime_s: float,
    user: UserId | None = None,
    pilot_s: float = 0.0,
) -> float:
    """Keep a secret's hash; return when it expires. `pilot_s`: for pilots that live so long."""
    if not 0 <= pilot_s <= _LONGEST_PILOT_S:
        raise InvalidInput("a pilot lives for some time", where="pilot_s", hint="366 days at most")
    if not 1 <= uses <= 100_000 or not 0 < lifetime_s <= 366 * 86400:
        raise InvalidInput("a secret has 1 to 100000 uses and lives at most 366 days")
    expires_at = tx.now + lifetime_s
    values = {"purpose": purpose, "account_id": user, "uses_left": uses, "expires_at": expires_at, "pilot_s": pilot_s}
    tx.run(sa.insert(secret).values(hash=check_hash(hashed), **values))
    return expires_at


_LONGEST_PILOT_S = 366 * 86400.0


class Secret(NamedTuple):
    """What a secret was made for."""

    user_id: UserId | None
    pilot_s: float


def use_secret(tx: Transaction, text: str, purpose: str) -> Secret:
    """Use a secret once; return for whom, if for anybody. Raise Unauthenticated if it is unknown, used up or expired."""
    valid = (secret.c.hash == hash_secret(text), secret.c.purpose == purpose, secret.c.uses_left > 0, secret.c.expires_at > tx.now)
    used = tx.run(sa.update(secret).where(*valid).values(uses_left=secret.c.uses_left - 1))
    if not used.rowcount:
        raise Unauthenticated("this link was used already or has expired", hint="ask the admin for a new one")
    row = tx.row(sa.select(secret.c.account_id, secret.c.pilot_s).where(secret.c.hash == hash_secret(text)))
    return Secret(*row)  # type: ignore[misc]


def add_team(tx: Transaction, name: str) -> Group:
    """Add a group. Raise Conflict if the name is taken."""
    check_name(name, "group")
    if tx.value(sa.select(team.c.name).where(team.c.name == name)) is not None:
        raise Conflict(f"there is a group {name} already")
    tx.run(sa.insert(team).values(name=name))
    return Group(name=name, members=())


def set_team(tx: Transaction, name: str, weight: float | None) -> Group:
    """Change a group's part of the grid. Raise NotFound, InvalidInput."""
    if tx.value(sa.select(team.c.name).where(team.c.name == name)) is None:
        raise NotFound(f"there is no group {name!r}")
    if weight is not None:
        tx.run(sa.update(team).where(team.c.name == name).values(weight=_weight(weight)))
        tx.memo.pop("board", None)
    return next(group for group in list_teams(tx) if group.name == name)


def set_account(tx: Transaction, name: str, wanted: SetUser) -> User:
    """Change a user's part of the grid and bounds. Raise NotFound, InvalidInput."""
    user = find_account(tx, name)
    values: dict[str, Any] = {"weight": _weight(wanted.weight)} if wanted.weight is not None else {}
    for field in ("max_waiting", "max_running", "max_bytes"):
        bound = getattr(wanted, field)
        if bound is not None and bound >= 1 << 63:
            raise InvalidInput(f"{bound} is too many", where=field)
        if bound is not None:
            values[field] = bound if bound >= 0 else None
    if values:
        tx.run(sa.update(account).where(account.c.id == user.id).values(**values))
        tx.memo.pop("board", None)
    return find_account(tx, name)


def _weight(weight: float) -> float:
    if not _LEAST_WEIGHT <= weight <= 1 / _LEAST_WEIGHT:
        raise InvalidInput(f"{weight} is not a weight", where="weight", hint="0.001 to 1000; 2 is twice as much as others")
    return weight


_LEAST_WEIGHT = 0.001


def list_teams(tx: Transaction) -> tuple[Group, ...]:
    """Return all groups by name."""
    weights = {row.name: row.weight for row in tx.rows(sa.select(team).order_by(team.c.name))}
    members: dict[str, list[str]] = {name: [] for name in weights}
    joined = membership.join(account, account.c.id == membership.c.account_id)
    for row in tx.rows(sa.select(membership.c.team, account.c.name).select_from(joined).order_by(account.c.name)):
        members[row.team].append(row.name)
    return tuple(Group(name=name, members=tuple(names), weight=weights[name]) for name, names in members.items())


def set_members(tx: Transaction, name: str, *, add: tuple[str, ...], remove: tuple[str, ...]) -> Group:
    """Add and remove members of a group. Raise NotFound for an unknown group or user; then nothing changes."""
    if tx.value(sa.select(team.c.name).where(team.c.name == name)) is None:
        raise NotFound(f"there is no group {name!r}")
    for user in (find_account(tx, user) for user in (*add, *remove)):
        tx.run(sa.delete(membership).where(membership.c.team == name, membership.c.account_id == user.id))
    for user in (find_account(tx, user) for user in dict.fromkeys(add)):
        tx.run(sa.insert(membership).values(team=name, account_id=user.id))
    return next(group for group in list_teams(tx) if group.name == name)


def groups_of(tx: Transaction, user_id: UserId) -> frozenset[str]:
    """Return the groups that a user is in."""
    return frozenset(row.team for row in tx.rows(sa.select(membership.c.team).where(membership.c.account_id == user_id)))


# What the table of rights (core/rights.py) says of this caller


def may(tx: Transaction, caller: Caller, action: str, thing: Thing) -> bool:
    """Tell whether a user (or his job) may do something to an object. `action`: a route's name."""
    in_question = thing.visibility is Visibility.GROUP and Who.MEMBER in RULES[action].who and caller.user_id is not None
    groups = groups_of(tx, caller.user_id) if in_question and caller.user_id is not None else frozenset()
    return is_allowed(action, Viewer(role=caller.role, user_id=caller.user_id, groups=groups), thing)


def require(tx: Transaction, caller: Caller, action: str, thing: Thing, *, see: str, missing: NotFound) -> None:
    """Raise `missing` if a caller may not `see` an object (a route's name), Forbidden if he may, but not do this to it."""
    if not may(tx, caller, see, thing):
        raise missing
    if action != see and not may(tx, caller, action, thing):
        raise Forbidden(f"{caller.name} may not do this: {action.replace('_', ' ')}", hint="its owner or an admin can")


def visible(
    tx: Transaction,
    caller: Caller,
    action: str,
    *,
    owner: sa.ColumnElement[Any],
    group: sa.ColumnElement[Any],
    visibility: sa.ColumnElement[Any] | None = None,
) -> sa.ColumnElement[bool]:
    """Return the condition under which a user (or his job) may do something to a row. Without `visibility` every group is one to share with."""
    who = RULES[action].who
    if caller.role is Role.ADMIN and Who.ADMIN in who:
        return sa.true()
    found: list[sa.ColumnElement[bool]] = []
    if Who.OWNER in who:
        found.append(owner == caller.user_id)
    if Who.PUBLIC in who and visibility is not None:
        found.append(visibility == Visibility.PUBLIC.value)
    groups = groups_of(tx, caller.user_id) if Who.MEMBER in who and caller.user_id is not None else frozenset()
    if groups:
        shared = group.in_(sorted(groups))
        found.append(shared if visibility is None else sa.and_(visibility == Visibility.GROUP.value, shared))
    return sa.or_(sa.false(), *found)


def check_shares(tx: Transaction, shares: Iterable[str], where: str) -> None:
    """Check that the groups and users exist with whom something is shared. Raise InvalidInput naming the one that does not."""
    for share in shares:
        kind, _, name = share.partition(":")
        table = {"group": team, "user": account}.get(kind)
        if table is not None and tx.row(sa.select(table.c.name).where(table.c.name == name)) is None:
            raise InvalidInput(f"there is no {kind} {name!r}", where=where, hint=f"deskgrid {kind} list")


def trusted(tx: Transaction, caller: Caller, trust: Iterable[str]) -> tuple[str, ...]:
    """Return whose PCs a job trusts with users by number, the caller for `mine`. Raise InvalidInput naming who does not exist."""
    trust = tuple(trust)
    check_shares(tx, trust, "secrets.trust")
    found = []
    for one in trust:
        kind, _, name = one.partition(":")
        if kind == "mine":
            found.append(f"user:{caller.user_id}")
        else:
            found.append(f"user:{find_account(tx, name).id}" if kind == "user" else one)
    return tuple(found)


def check_group(tx: Transaction, caller: Caller, name: str) -> None:
    """Check that a user may have jobs done for a group. Raise InvalidInput if he is not in it."""
    if name and (caller.user_id is None or name not in groups_of(tx, caller.user_id)):
        raise InvalidInput(f"you are not in a group {name!r}", where="group", hint="deskgrid group list")


def _user(row: sa.Row[tuple[object, ...]]) -> User:
    return User(
        id=UserId(row.id),
        name=row.name,
        admin=row.admin,
        created_at=row.created_at,
        weight=row.weight,
        max_waiting=row.max_waiting,
        max_running=row.max_running,
        max_bytes=row.max_bytes,
    )


def _new_id(result: sa.CursorResult[tuple[object, ...]]) -> int:
    """Return the id that the store gave a new row."""
    return int(result.inserted_primary_key[0])  # type: ignore[index]
