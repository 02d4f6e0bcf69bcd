"""Users, groups, tokens and the secrets in links."""

from __future__ import annotations

from deskgrid.errors import Forbidden, InvalidInput
from deskgrid.model import wire
from deskgrid.model.ids import UserId
from deskgrid.model.users import Group, Role, Token, User
from deskgrid.server.routes.handler import Call, reads, writes
from deskgrid.server.store import accounts, pilots, workers
from deskgrid.server.store.engine import Transaction


@writes(wire.JOIN)
def join(tx: Transaction, call: Call[wire.JoinRequest]) -> wire.JoinAnswer:
    asked = call.body
    used = accounts.use_secret(tx, asked.secret, accounts.JOIN)
    ends_at = tx.now + used.pilot_s if used.pilot_s else None
    worker_id = workers.add_worker(
        tx,
        asked.name,
        owner=used.user_id,
        max_per_user=call.settings.max_workers_per_user,
        pilot_of=used.user_id if ends_at is not None else None,
        ends_at=ends_at,
    )
    accounts.add_token(tx, asked.token_hash, role=Role.WORKER, label=asked.name, on=worker_id, expires_at=ends_at)
    return wire.JoinAnswer(worker_id=worker_id)


@writes(wire.JOIN_PILOT)
def join_pilot(tx: Transaction, call: Call[wire.JoinPilot]) -> wire.JoinAnswer:
    worker_id = pilots.join_in_attempt(tx, call.caller, call.body.name)
    accounts.add_token(tx, call.body.token_hash, role=Role.WORKER, label=call.body.name, on=worker_id)
    return wire.JoinAnswer(worker_id=worker_id)


@writes(wire.LOGIN)
def login(tx: Transaction, call: Call[wire.LoginRequest]) -> wire.LoginAnswer:
    user_id = accounts.use_secret(tx, call.body.secret, accounts.LOGIN).user_id
    user = next(user for user in accounts.list_accounts(tx) if user.id == user_id)
    role = Role.ADMIN if user.admin else Role.USER
    ends = accounts.token_ends(tx, call.body.lifetime_s, call.settings.token_s)
    accounts.add_token(tx, call.body.token_hash, role=role, label=call.body.label, user=user.id, expires_at=ends)
    return wire.LoginAnswer(user=user, expires_at=ends)


@reads(wire.WHO)
def who(_tx: Transaction, call: Call[wire.Nothing]) -> wire.WhoAmI:
    return _who(call, call.caller.expires_at)


def _who(call: Call[wire.Nothing], expires_at: float | None) -> wire.WhoAmI:
    caller = call.caller
    return wire.WhoAmI(
        role=caller.role,
        name=caller.name,
        expires_at=expires_at,
        rights=tuple(sorted(caller.rights)) if caller.rights is not None else (),
        user_id=caller.user_id,
        secrets_key=call.authority.secrets_key,
    )


@writes(wire.ADD_JOIN_SECRET)
def add_join_secret(tx: Transaction, call: Call[wire.SecretRequest]) -> wire.SecretAnswer:
    wanted = call.body
    is_admin = call.caller.role is Role.ADMIN
    if wanted.owner and not is_admin and wanted.owner != call.caller.name:
        raise Forbidden("your links are for PCs of your own", hint="an admin can make links for others")
    owner = accounts.find_account(tx, wanted.owner).id if wanted.owner else None
    if wanted.pilot_s:
        owner = _pilots_user(call, owner)
    if not is_admin:
        owner = call.caller.user_id
        if wanted.uses > call.settings.max_workers_per_user:
            raise InvalidInput(f"{wanted.uses} are more PCs than you may have", where="uses")
    expires_at = accounts.add_secret(
        tx,
        wanted.secret_hash,
        purpose=accounts.JOIN,
        uses=wanted.uses,
        lifetime_s=wanted.lifetime_s,
        user=owner,
        pilot_s=wanted.pilot_s,
    )
    return wire.SecretAnswer(expires_at=expires_at)


def _pilots_user(call: Call[wire.SecretRequest], owner: UserId | None) -> UserId:
    """Return whose pilots those are that join by a link."""
    if call.caller.user_id is None:
        raise Forbidden("a pilot is a user's")
    if owner not in (None, call.caller.user_id):
        raise InvalidInput("a pilot is of who makes its link", where="owner")
    return call.caller.user_id


@writes(wire.ADD_LOGIN_SECRET)
def add_login_secret(tx: Transaction, call: Call[wire.SecretRequest]) -> wire.SecretAnswer:
    user = accounts.find_account(tx, call.path["user"])
    wanted = call.body
    expires_at = accounts.add_secret(
        tx, wanted.secret_hash, purpose=accounts.LOGIN, uses=wanted.uses, lifetime_s=wanted.lifetime_s, user=user.id
    )
    return wire.SecretAnswer(expires_at=expires_at)


@writes(wire.ADD_USER)
def add_user(tx: Transaction, call: Call[wire.AddUser]) -> User:
    return accounts.add_account(tx, call.body.name, admin=call.body.admin)


@writes(wire.SET_USER)
def set_user(tx: Transaction, call: Call[wire.SetUser]) -> User:
    return accounts.set_account(tx, call.path["user"], call.body)


@writes(wire.ADD_TOKEN)
def add_token(tx: Transaction, call: Call[wire.AddToken]) -> Token:
    return accounts.add_narrowed_token(tx, call.caller, call.body, call.settings.token_s)


@writes(wire.RENEW_TOKEN)
def renew_token(tx: Transaction, call: Call[wire.Nothing]) -> wire.WhoAmI:
    return _who(call, accounts.renew_token(tx, call.caller, call.settings.token_s))


@writes(wire.SET_GROUP)
def set_group(tx: Transaction, call: Call[wire.SetGroup]) -> Group:
    return accounts.set_team(tx, call.path["group"], call.body.weight)


@reads(wire.LIST_USERS)
def list_users(tx: Transaction, _call: Call[wire.Nothing]) -> wire.UserList:
    return wire.UserList(accounts.list_accounts(tx))


@reads(wire.LIST_TOKENS)
def list_tokens(tx: Transaction, call: Call[wire.Nothing]) -> wire.TokenList:
    return wire.TokenList(accounts.list_tokens(tx, call.caller.user_id) if call.caller.user_id is not None else ())


@writes(wire.REVOKE_TOKEN)
def revoke_token(tx: Transaction, call: Call[wire.Nothing]) -> wire.Nothing:
    if call.caller.user_id is not None:
        accounts.revoke_token(tx, call.caller.user_id, call.number("token"))
    return wire.Nothing()


@writes(wire.ADD_GROUP)
def add_group(tx: Transaction, call: Call[wire.AddGroup]) -> Group:
    return accounts.add_team(tx, call.body.name)


@reads(wire.LIST_GROUPS)
def list_groups(tx: Transaction, _call: Call[wire.Nothing]) -> wire.GroupList:
    return wire.GroupList(accounts.list_teams(tx))


@writes(wire.SET_MEMBERS)
def set_members(tx: Transaction, call: Call[wire.SetMembers]) -> Group:
    return accounts.set_members(tx, call.path["group"], add=call.body.add, remove=call.body.remove)
