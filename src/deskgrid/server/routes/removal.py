"""Removing jobs and arrays that have ended."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest

from deskgrid.model import wire
from deskgrid.model.ids import ArrayId, JobId
from deskgrid.server.routes.handler import Call, Services, serves, writes
from deskgrid.server.store import audit, retention
from deskgrid.server.store.engine import Transaction

_AT_ONCE = 2000


@writes(wire.REMOVE_JOB)
def remove_job(tx: Transaction, call: Call[wire.Nothing]) -> wire.Nothing:
    retention.remove_job(tx, call.caller, JobId(call.number("job")))
    return wire.Nothing()


@serves(wire.REMOVE_ARRAY)
async def remove_array(services: Services, call: Call[wire.Nothing], _http: HttpRequest) -> wire.Nothing:
    """Remove in pieces, so that no other call waits long; what a broken call leaves goes with the next."""
    array_id = ArrayId(call.number("array"))

    def begin(tx: Transaction) -> bool:
        audit.note_call(tx, call.caller, wire.REMOVE_ARRAY.name, call.path, call.body, wire.Nothing(), call.request)
        return retention.remove_array_jobs(tx, call.caller, array_id, _AT_ONCE)

    left = await services.store.write(begin)
    while left:
        left = await services.store.write(lambda tx: retention.remove_array_jobs(tx, call.caller, array_id, _AT_ONCE))
    return wire.Nothing()
