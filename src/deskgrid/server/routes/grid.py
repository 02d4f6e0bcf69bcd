"""The grid itself: who it is and how it does."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

import deskgrid
from deskgrid.core.rights import Right, holds
from deskgrid.model import wire
from deskgrid.model.users import Role
from deskgrid.model.workers import WorkerState
from deskgrid.server.routes.handler import Call, Services, reads, serves
from deskgrid.server.store import data, jobs, queues, storage, workers
from deskgrid.server.store.engine import Transaction


@reads(wire.GRID)
def grid(_tx: Transaction, call: Call[wire.Nothing]) -> wire.GridInfo:
    return wire.GridInfo(name=call.settings.name, version=deskgrid.__version__, wire=wire.WIRE_VERSION)


@serves(wire.AUTHORITY)
async def authority(services: Services, _call: Call[wire.Nothing], _http: HttpRequest) -> Response:
    return Response(services.authority.pem, media_type="application/x-pem-file")


@serves(wire.STATUS)
async def status(services: Services, call: Call[wire.Nothing], _http: HttpRequest) -> wire.GridStatus:
    free_bytes, place = services.repository.free_bytes(), services.repository.place
    return await services.store.read(lambda tx: _status(tx, call, free_bytes, place))


def _status(tx: Transaction, call: Call[wire.Nothing], free_bytes: int, place: str) -> wire.GridStatus:
    is_admin = call.caller.role is Role.ADMIN and holds(call.caller.rights, Right.ADMIN)
    states, lent = workers.totals(tx, call.settings.lease_s)
    kinds = storage.bytes_by_kind(tx)
    return wire.GridStatus(
        workers_online=states[WorkerState.ONLINE],
        workers_paused=states[WorkerState.PAUSED],
        workers_offline=states[WorkerState.OFFLINE],
        lent=lent,
        jobs=queues.count_states(tx),
        completed_last_hour=jobs.completed_since(tx, tx.now - 3600),
        storage_bytes=sum(kinds.values()),
        storage_free_bytes=free_bytes,
        storage_place=place,
        storage=kinds,
        storage_users=storage.bytes_by_user(tx) if is_admin else {},
        leaving=storage.leaving(tx, data.REMOVAL_WAIT_S),
    )
