"""Who may do what: one table, from which come the door of every call, the visibility in the store's SQL, the reference and the tests.

Rules:

1. A caller stands in relations to an object (`relations`): its owner, a member of its group, an admin, a worker with a lease on it, and so on.
   He may do what the table's row for that call allows to one of them. Whoever may see nothing of an object is told that it is not there.
2. A job's own token stands for the job's owner in all these relations, but opens only the calls whose row names `job`.
3. A user's token may be narrowed to some rights, which are groups of calls. It opens only those, makes no wider token, and is an admin's only if
   `admin` is among them (or `metrics` is the only one). `workers` is worth more than it seems: who lends a PC sees the jobs that run there. So
   is `jobs`: a job reaches the programs that its owner offers. To see the screen of a job takes `jobs` besides `overlay`: who sees it can type.
4. Visibility `group` of data and apps means the members of the group named with it. A job is seen by the members of the group that it is done for.
"""

from __future__ import annotations

from enum import StrEnum

from msgspec import Struct

from deskgrid.errors import Forbidden, InvalidInput
from deskgrid.model import tes, wire
from deskgrid.model.data import Visibility
from deskgrid.model.ids import UserId
from deskgrid.model.users import Role

__all__ = [
    "ROLES",
    "RULES",
    "Kind",
    "Right",
    "Rule",
    "Thing",
    "Viewer",
    "Who",
    "check_given",
    "check_job_token",
    "covers",
    "holds",
    "is_allowed",
    "is_of_admin",
    "parse_rights",
    "relations",
    "thing_of_job",
]


class Kind(StrEnum):
    """What a call is about."""

    GRID = "grid"
    USER = "user"
    GROUP = "group"
    TOKEN = "token"  # noqa: S105 - a word
    WORKER = "worker"
    HUB = "hub"
    PEER = "peer"
    UPLOAD = "upload"
    BLOB = "blob"
    DATA = "data"
    PLACEMENT = "placement"
    APP = "app"
    JOB = "job"
    ARRAY = "array"
    SET = "set"


class Who(StrEnum):
    """In which relation a caller stands to what a call is about."""

    ANYBODY = "anybody"
    """No token is needed; what the call carries decides, as a secret."""
    USER = "user"
    """Any user, admins too."""
    OWNER = "owner"
    """The user (or the worker, of an upload or a peer: whoever sent or registered it) whose it is."""
    MEMBER = "member"
    """A member of the group that it is shared with, or done for."""
    PUBLIC = "public"
    """Any user, if it is public."""
    ADMIN = "admin"
    JOB = "job"
    """A job's own token may make this call, where the job's owner may."""
    WORKER = "worker"
    """Any worker, for itself."""
    LEASE = "lease"
    """A worker that holds a lease on the job that it belongs to."""
    HUB = "hub"


class Right(StrEnum):
    """A group of calls that a token can be narrowed to."""

    JOBS_READ = "jobs:read"
    JOBS = "jobs"
    DATA_READ = "data:read"
    DATA = "data"
    OVERLAY = "overlay"
    WORKERS = "workers"
    ACCOUNT = "account"
    ADMIN = "admin"
    METRICS = "metrics"
    PILOT = "pilot"
    """Of the own token of a job that is a pilot; no user's token has it."""


_INCLUDED = {Right.JOBS: frozenset({Right.JOBS_READ}), Right.DATA: frozenset({Right.DATA_READ})}


class Rule(Struct, frozen=True):
    """A row of the table."""

    kind: Kind
    who: frozenset[Who]
    rights: frozenset[Right] = frozenset()
    """A narrowed token needs one of these; none: every token may."""
    whole: bool = False
    """No narrowed token may: it would get more than it has."""
    audited: bool = False
    """It changes something for a person, and is kept in the audit log."""
    tells: tuple[str, ...] = ()
    """Fields of the message that the audit log has, too: never a secret, nor what users put into their jobs."""


def _rule(kind: Kind, who: str, rights: str = "", *, tells: str | None = None, changes: bool = False) -> Rule:
    return Rule(
        kind,
        frozenset(Who(one) for one in who.split()),
        frozenset(Right(one) for one in rights.split() if one != _WHOLE),
        whole=rights == _WHOLE,
        audited=changes or tells is not None,
        tells=tuple((tells or "").split()),
    )


_WHOLE = "whole"
_SEE, _OWN = "owner member admin job", "owner admin job"
_SHARED = "owner member public admin job"

RULES: dict[str, Rule] = {
    "grid": _rule(Kind.GRID, "anybody"),
    "authority": _rule(Kind.GRID, "anybody"),
    "who": _rule(Kind.GRID, "user job worker hub"),
    "status": _rule(Kind.GRID, "user job"),
    "metrics": _rule(Kind.GRID, "admin", "metrics"),
    "list_audit": _rule(Kind.GRID, "admin", "admin"),
    "login": _rule(Kind.USER, "anybody", tells="label"),
    "add_user": _rule(Kind.USER, "admin", "admin", tells="name admin"),
    "set_user": _rule(Kind.USER, "admin", "admin", tells="weight max_waiting max_running max_bytes"),
    "list_users": _rule(Kind.USER, "user", "account admin"),
    "add_login_secret": _rule(Kind.USER, "admin", _WHOLE, tells="lifetime_s"),
    "list_tokens": _rule(Kind.TOKEN, "user", "account"),
    "add_token": _rule(Kind.TOKEN, "user", "account", tells="rights lifetime_s label"),
    "renew_token": _rule(Kind.TOKEN, "user", _WHOLE, changes=True),
    "revoke_token": _rule(Kind.TOKEN, "owner", "account", changes=True),
    "add_group": _rule(Kind.GROUP, "admin", "admin", tells="name"),
    "set_group": _rule(Kind.GROUP, "admin", "admin", tells="weight"),
    "list_groups": _rule(Kind.GROUP, "user", "account admin"),
    "set_members": _rule(Kind.GROUP, "admin", "admin", tells="add remove"),
    "join": _rule(Kind.WORKER, "anybody", tells="name"),
    "join_pilot": _rule(Kind.WORKER, "job", "pilot", tells="name"),
    "add_join_secret": _rule(Kind.WORKER, "user", "workers admin", tells="uses lifetime_s owner pilot_s"),
    "list_workers": _rule(Kind.WORKER, "user", "workers jobs:read"),
    "reserve_worker": _rule(Kind.WORKER, "admin", "admin", tells="reserved_for lifetime_s"),
    "remove_worker": _rule(Kind.WORKER, "owner admin", "workers admin", changes=True),
    "sync": _rule(Kind.WORKER, "worker"),
    "wake": _rule(Kind.WORKER, "worker"),
    "append_log": _rule(Kind.WORKER, "lease"),
    "leave": _rule(Kind.WORKER, "worker"),
    "begin_upload": _rule(Kind.UPLOAD, "user job worker", "data jobs"),
    "upload_bytes": _rule(Kind.UPLOAD, "owner job worker", "data jobs"),
    "get_blob": _rule(Kind.BLOB, "owner member public admin job lease", "data:read jobs:read"),
    "place_data": _rule(Kind.PLACEMENT, "user", "data", tells="pattern"),
    "list_placements": _rule(Kind.PLACEMENT, "user", "data:read"),
    "remove_placement": _rule(Kind.PLACEMENT, "owner", "data", changes=True),
    "list_holders": _rule(Kind.DATA, "owner admin", "data:read"),
    "take_turn": _rule(Kind.BLOB, "owner member public admin job lease", "data:read jobs:read"),
    "register_data": _rule(Kind.DATA, "user job", "data", tells="name kind visibility group"),
    "list_data": _rule(Kind.DATA, _SHARED, "data:read jobs"),
    "get_data": _rule(Kind.DATA, _SHARED, "data:read jobs"),
    "remove_data": _rule(Kind.DATA, "owner admin", "data", changes=True),
    "list_disks": _rule(Kind.DATA, _SHARED, "data:read jobs"),
    "get_disk": _rule(Kind.DATA, _SHARED, "data:read jobs"),
    "endorse_disk": _rule(Kind.DATA, "owner member public admin", "data", tells="endorser lifetime_s"),
    "withdraw_disk": _rule(Kind.DATA, "owner member public admin", "data", changes=True),
    "revoke_disk": _rule(Kind.DATA, "owner admin", "data", tells="reason"),
    "get_bundle": _rule(Kind.DATA, "owner member public admin", "data:read"),
    "take_bundle": _rule(Kind.DATA, "user", "data", tells="grid"),
    "register_app": _rule(Kind.APP, "user job", "data", tells="name visibility group"),
    "list_apps": _rule(Kind.APP, _SHARED, "data:read jobs"),
    "get_app": _rule(Kind.APP, _SHARED, "data:read jobs"),
    "remove_app": _rule(Kind.APP, "owner admin", "data", changes=True),
    "submit_job": _rule(Kind.JOB, "user job", "jobs", changes=True),
    "list_waiting": _rule(Kind.JOB, "owner member", "jobs:read"),
    "list_jobs": _rule(Kind.JOB, _SEE, "jobs:read"),
    "get_job": _rule(Kind.JOB, _SEE, "jobs:read"),
    "read_log": _rule(Kind.JOB, _SEE, "jobs:read"),
    "cancel_job": _rule(Kind.JOB, _OWN, "jobs", changes=True),
    "remove_job": _rule(Kind.JOB, _OWN, "jobs", changes=True),
    "submit_array": _rule(Kind.ARRAY, "user job", "jobs", tells="count"),
    "list_arrays": _rule(Kind.ARRAY, _SEE, "jobs:read"),
    "get_array": _rule(Kind.ARRAY, _SEE, "jobs:read"),
    "cancel_array": _rule(Kind.ARRAY, _OWN, "jobs", changes=True),
    "remove_array": _rule(Kind.ARRAY, _OWN, "jobs", changes=True),
    "submit_set": _rule(Kind.SET, "user job", "jobs", tells="name"),
    "list_sets": _rule(Kind.SET, _SEE, "jobs:read"),
    "get_set": _rule(Kind.SET, _SEE, "jobs:read"),
    "cancel_set": _rule(Kind.SET, _OWN, "jobs", changes=True),
    "register_peer": _rule(Kind.PEER, "user worker", "overlay"),
    "list_peers": _rule(Kind.PEER, "owner admin", "overlay"),
    "remove_peer": _rule(Kind.PEER, "owner worker", "overlay"),
    "ask_grant": _rule(Kind.PEER, "owner worker", "overlay"),
    "add_hub_secret": _rule(Kind.HUB, "admin", "admin", tells="uses lifetime_s"),
    "join_hub": _rule(Kind.HUB, "anybody", tells="name"),
    "renew_hub": _rule(Kind.HUB, "hub"),
    "list_hubs": _rule(Kind.HUB, "user", "overlay admin"),
    "remove_hub": _rule(Kind.HUB, "admin", "admin", changes=True),
}
"""The table, by the names of the routes."""

_SAME = (
    (tes.SERVICE_INFO, wire.GRID),
    (tes.CREATE_TASK, wire.SUBMIT_JOB),
    (tes.LIST_TASKS, wire.LIST_JOBS),
    (tes.GET_TASK, wire.GET_JOB),
    (tes.CANCEL_TASK, wire.CANCEL_JOB),
)
"""Another protocol's calls, each with one of ours: it lets nobody do what he may not do by that one."""
RULES |= {theirs.name: RULES[ours.name] for theirs, ours in _SAME}

_OF_PEOPLE = frozenset({Role.USER, Role.ADMIN})
_OPENS: dict[Who, frozenset[Role]] = {
    **dict.fromkeys((Who.USER, Who.OWNER, Who.MEMBER, Who.PUBLIC), _OF_PEOPLE),
    **dict.fromkeys((Who.WORKER, Who.LEASE), frozenset({Role.WORKER})),
    Who.ADMIN: frozenset({Role.ADMIN}),
    Who.JOB: frozenset({Role.JOB}),
    Who.HUB: frozenset({Role.HUB}),
    Who.ANYBODY: frozenset(),
}

ROLES: dict[str, frozenset[Role]] = {
    name: frozenset[Role]().union(*(_OPENS[who] for who in rule.who)) for name, rule in RULES.items()
}
"""Whose tokens open a call, by the routes' names; none: no token is needed."""

_MISSING = wire.ROUTES.keys() ^ RULES.keys()
if _MISSING:
    raise AssertionError(f"the table of rights and the routes differ: {sorted(_MISSING)}")


class Thing(Struct, frozen=True, kw_only=True):
    """What matters of an object for its rights."""

    owner_id: int | None = None
    visibility: Visibility = Visibility.PRIVATE
    group: str = ""
    """With visibility `group`."""


def thing_of_job(owner_id: int, group: str) -> Thing:
    """Return what matters of a job, array or set that is done for a group ("": for its owner himself)."""
    return Thing(owner_id=owner_id, visibility=Visibility.GROUP if group else Visibility.PRIVATE, group=group)


class Viewer(Struct, frozen=True, kw_only=True):
    """What matters of a caller."""

    role: Role
    user_id: UserId | None = None
    groups: frozenset[str] = frozenset()


def relations(viewer: Viewer, thing: Thing) -> frozenset[Who]:
    """Return in which relations a caller stands to an object. What a worker leases or registered is known to the store only."""
    if viewer.role is Role.WORKER:
        return frozenset({Who.WORKER})
    if viewer.role is Role.HUB:
        return frozenset({Who.HUB})
    found = {Who.USER}
    if viewer.role is Role.ADMIN:
        found.add(Who.ADMIN)
    if thing.owner_id is not None and thing.owner_id == viewer.user_id:
        found.add(Who.OWNER)
    if thing.visibility is Visibility.GROUP and thing.group in viewer.groups:
        found.add(Who.MEMBER)
    if thing.visibility is Visibility.PUBLIC:
        found.add(Who.PUBLIC)
    return frozenset(found)


def is_allowed(action: str, viewer: Viewer, thing: Thing) -> bool:
    """Tell whether a caller, whom the call's door has let in, may do this to an object. `action`: a route's name."""
    return not RULES[action].who.isdisjoint(relations(viewer, thing))


# Narrowed tokens


def _whole(rights: frozenset[Right]) -> frozenset[Right]:
    return rights.union(*(_INCLUDED.get(right, frozenset()) for right in rights))


def covers(held: frozenset[Right] | None, action: str) -> bool:
    """Tell whether a token with these rights (None: all) opens a call."""
    if held is None:
        return True
    rule = RULES[action]
    return not rule.whole and (not rule.rights or not rule.rights.isdisjoint(_whole(held)))


def holds(held: frozenset[Right] | None, right: Right) -> bool:
    """Tell whether a token with these rights (None: all) has a right."""
    return held is None or right in _whole(held)


def check_job_token(held: frozenset[Right] | None) -> None:
    """Check that a token may submit a job that gets a token of its own. Raise Forbidden for a narrowed one, which that would outlive."""
    if held is not None:
        raise Forbidden("a job that reaches api.server gets a token of its own, and a narrowed token makes none")


def is_of_admin(held: frozenset[Right] | None) -> bool:
    """Tell whether an admin's token with these rights is one of an admin: otherwise it is one of a user."""
    return held is None or Right.ADMIN in held or held == {Right.METRICS}


def parse_rights(names: tuple[str, ...]) -> frozenset[Right]:
    """Return rights by their names. Raise InvalidInput for an unknown one, or none."""
    given = [right.value for right in Right if right is not Right.PILOT]
    unknown = [name for name in names if name not in given]
    if unknown or not names:
        what = f"there is no right {unknown[0][:40]!r}" if unknown else "a token is narrowed to one right at least"
        raise InvalidInput(what, where="rights", hint=f"one of {', '.join(given)}")
    found = frozenset(Right(name) for name in names)
    if Right.METRICS in found and len(found) > 1:
        raise InvalidInput("metrics goes alone: such a token is for a program that reads nothing else", where="rights")
    return found


def check_given(role: Role, held: frozenset[Right] | None, wanted: frozenset[Right]) -> None:
    """Check that the holder of a token may make one with `wanted` rights. Raise Forbidden."""
    if held is not None and not _whole(wanted) <= _whole(held):
        raise Forbidden("a token makes no wider one", hint=f"this one has {', '.join(sorted(held))}")
    if role is not Role.ADMIN and wanted & {Right.ADMIN, Right.METRICS}:
        raise Forbidden("only an admin's token has the rights admin and metrics")
