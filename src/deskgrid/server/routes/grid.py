"""The grid itself: who it is and how it does."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

import deskgrid
from deskgrid.model import wire
from deskgrid.model.workers import Capacity, WorkerState
from deskgrid.server.routes.handler import Call, Services, reads, serves
from deskgrid.server.store import data, jobs, workers
from deskgrid.server.store.engine import Transaction


@reads(wire.GRID)
def grid(_tx: Transaction, call: Call[wire.Nothing]) -> wire.GridInfo:
    return wire.GridInfo(name=call.settings.name, version=deskgrid.__version__, wire=wire.WIRE_VERSION)


@serves(wire.AUTHORITY)
async def authority(services: Services, _call: Call[wire.Nothing], _http: HttpRequest) -> Response:
    return Response(services.authority.pem, media_type="application/x-pem-file")


@serves(wire.STATUS)
async def status(services: Services, call: Call[wire.Nothing], _http: HttpRequest) -> wire.GridStatus:
    free_bytes = services.repository.free_bytes()
    return await services.store.read(lambda tx: _status(tx, call, free_bytes))


def _status(tx: Transaction, call: Call[wire.Nothing], free_bytes: int) -> wire.GridStatus:
    everybody = workers.list_workers(tx, call.settings.lease_s)
    online = [worker.profile.lent for worker in everybody if worker.state is WorkerState.ONLINE and worker.profile]
    states = [worker.state for worker in everybody]
    return wire.GridStatus(
        workers_online=states.count(WorkerState.ONLINE),
        workers_paused=states.count(WorkerState.PAUSED),
        workers_offline=states.count(WorkerState.OFFLINE),
        lent=Capacity(
            cpus=sum(lent.cpus for lent in online),
            memory_bytes=sum(lent.memory_bytes for lent in online),
            disk_bytes=sum(lent.disk_bytes for lent in online),
        ),
        jobs=jobs.count_states(tx),
        completed_last_hour=jobs.completed_since(tx, tx.now - 3600),
        storage_bytes=data.storage_bytes(tx),
        storage_free_bytes=free_bytes,
    )
