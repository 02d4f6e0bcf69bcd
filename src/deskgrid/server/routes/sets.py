"""Sets: several jobs and arrays that belong together."""

from __future__ import annotations

import re

from starlette.requests import Request as HttpRequest

from deskgrid.core.submission import check_array
from deskgrid.errors import InvalidInput
from deskgrid.model import wire
from deskgrid.model.ids import SetId
from deskgrid.model.users import Role
from deskgrid.server.routes.handler import Call, Services, reads, serves, writes
from deskgrid.server.routes.jobs import changed, resolved
from deskgrid.server.store import data, sets
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.submissions import NewSubmission

_MEMBER = re.compile(r"[a-z][a-z0-9-]{0,30}")
_LONGEST_NAME = 200


@writes(wire.SUBMIT_SET)
def submit_set(tx: Transaction, call: Call[wire.SubmitSet]) -> wire.JobSet:
    wanted = call.body
    if not wanted.name or len(wanted.name) > _LONGEST_NAME or not wanted.name.isprintable():
        raise InvalidInput(f"a name has 1 to {_LONGEST_NAME} printable characters", where="set.name")
    if not 1 <= len(wanted.members) <= sets.MOST_MEMBERS:
        raise InvalidInput(
            f"a set of {len(wanted.members)} jobs", where="set", hint=f"1 to {sets.MOST_MEMBERS}; use arrays for more"
        )
    members = [(member, _member(tx, call, member)) for member in wanted.members]
    set_id = sets.submit_set(tx, call.caller, wanted.name, members, together=wanted.together, max_waiting=call.settings.max_waiting)
    return sets.get_set(tx, call.caller, set_id)


def _member(tx: Transaction, call: Call[wire.SubmitSet], member: wire.SetMember) -> NewSubmission:
    if not _MEMBER.fullmatch(member.name):
        raise InvalidInput(
            f"{member.name[:40]!r} is not a member's name", where="set", hint="a letter, then letters, digits and -, all small"
        )
    try:
        if member.count:
            check_array(member.count, member.names, has_table=member.table is not None)
        if member.table is not None:
            data.require_upload(tx, call.caller, member.table)
        return resolved(tx, call, member, in_set=True)
    except InvalidInput as error:
        raise InvalidInput(error.message, where=f"job.{member.name}.{error.where}".rstrip("."), hint=error.hint) from error


@reads(wire.LIST_SETS)
def list_sets(tx: Transaction, call: Call[wire.Nothing]) -> wire.SetList:
    everyone = call.query.get("all", False) and call.caller.role is Role.ADMIN
    limit = min(max(call.query.get("limit", 100), 1), 1000)
    found, more = sets.list_sets(tx, call.caller, everyone=everyone, before=call.query.get("before"), limit=limit)
    return wire.SetList(sets=found, more=more)


@serves(wire.GET_SET)
async def get_set(services: Services, call: Call[wire.Nothing], _http: HttpRequest) -> wire.JobSet:
    set_id = SetId(call.number("set"))
    found = await services.store.read(lambda tx: sets.get_set(tx, call.caller, set_id))
    return await changed(services, call, sets.topics_of(found), lambda tx: sets.get_set(tx, call.caller, set_id), wire.set_mark)


@writes(wire.CANCEL_SET)
def cancel_set(tx: Transaction, call: Call[wire.Nothing]) -> wire.JobSet:
    return sets.cancel_set(tx, call.caller, SetId(call.number("set")), f"cancelled by {call.caller.name}")
