"""Workers: the one call that carries everything, the hint that wakes an idle one, and live output."""

from __future__ import annotations

import msgspec
from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deskgrid.core.rights import Thing
from deskgrid.errors import Forbidden, InvalidInput, NotFound
from deskgrid.model import wire
from deskgrid.model.data import Visibility
from deskgrid.model.ids import WorkerId
from deskgrid.model.users import Role
from deskgrid.model.workers import Worker
from deskgrid.server import scheduler
from deskgrid.server.routes.handler import Call, Services, caller_of, reads, serves, writes
from deskgrid.server.secrets import sealed_to_worker
from deskgrid.server.store import attempts, jobs, pilots, queues, workers
from deskgrid.server.store.accounts import Caller, require
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.submissions import WORK

_LONGEST_HOLD_S = 60.0
_STREAMS = ("stdout", "stderr", "console")


@serves(wire.SYNC, knows_callers=True)
async def sync(services: Services, call: Call[wire.Sync], _http: HttpRequest) -> Response:
    """The most frequent call: its caller is looked up in the transaction that it needs anyway."""
    seen = services.live.count

    def decide(tx: Transaction) -> tuple[Caller, wire.SyncAnswer, bool]:
        caller = caller_of(tx, wire.SYNC, call.token)
        answer = scheduler.sync(tx, caller, call.body, services.settings, f"sync:{call.key}"[:64])
        return caller, answer, queues.nothing_waits(tx)

    caller, answer, is_settled = await services.store.write(decide)
    if is_settled:
        services.live.settle(WORK, seen)
    services.live.remember(caller.principal, dict.fromkeys(_topics(caller), seen))
    answer = await sealed_to_worker(answer, services.authority, call.body.profile.secrets_key)
    return Response(msgspec.json.encode(answer), media_type="application/json")


@serves(wire.WAKE)
async def wake(services: Services, call: Call[wire.Nothing], _http: HttpRequest) -> wire.Wake:
    hold_s = min(max(call.query.get("wait_s", 0.0), 0.0), _LONGEST_HOLD_S)
    live, principal = services.live, call.caller.principal
    seen = live.remembered(principal)
    # Not known: it last called another process, or before a restart. Whether something changed since is not known here.
    changed = seen is None or await live.wait(seen, hold_s)
    if changed:
        live.remember(principal, {topic: live.mark(topic) for topic in _topics(call.caller)})
    return wire.Wake(changed=changed)


def _topics(caller: Caller) -> tuple[str, str]:
    return WORK, attempts.worker_topic(caller.worker_id or 0)


@writes(wire.APPEND_LOG)
def append_log(tx: Transaction, call: Call[wire.AppendLog]) -> wire.Nothing:
    chunk = call.body
    if chunk.stream not in _STREAMS or chunk.offset < 0:
        raise InvalidInput(f"there is no stream {chunk.stream[:20]!r} at {chunk.offset}")
    if call.caller.worker_id is None or attempts.attempt_row(tx, chunk.attempt_id, call.caller.worker_id) is None:
        raise Forbidden(f"attempt {chunk.attempt_id} is not this worker's")
    jobs.append_log(tx, chunk.attempt_id, chunk.stream, chunk.offset, chunk.data, call.settings.max_log_bytes)
    return wire.Nothing()


@writes(wire.LEAVE)
def leave(tx: Transaction, call: Call[wire.Nothing]) -> wire.Nothing:
    scheduler.leave(tx, call.caller)
    return wire.Nothing()


@writes(wire.RESERVE_WORKER)
def reserve_worker(tx: Transaction, call: Call[wire.ReserveWorker]) -> Worker:
    worker_id = WorkerId(call.number("worker"))
    workers.reserve(tx, worker_id, call.body.reserved_for, call.body.lifetime_s)
    tx.topics.append(attempts.worker_topic(worker_id))
    return workers.list_workers(tx, call.settings.lease_s, worker_id)[0]


@writes(wire.REMOVE_WORKER)
def remove_worker(tx: Transaction, call: Call[wire.Nothing]) -> wire.Nothing:
    worker_id = WorkerId(call.number("worker"))
    thing = Thing(owner_id=workers.owner_of(tx, worker_id), visibility=Visibility.PUBLIC)
    missing = NotFound(f"there is no worker {worker_id}", hint="deskgrid worker list")
    require(tx, call.caller, wire.REMOVE_WORKER.name, thing, see=wire.LIST_WORKERS.name, missing=missing)
    scheduler.leave(tx, Caller(Role.WORKER, "", worker_id=worker_id))
    return wire.Nothing()


@reads(wire.LIST_WAITING)
def list_waiting(tx: Transaction, call: Call[wire.Nothing]) -> wire.WaitingList:
    return wire.WaitingList(pilots.waiting(tx, call.caller, call.settings.lease_s))


@reads(wire.LIST_WORKERS)
def list_workers(tx: Transaction, call: Call[wire.Nothing]) -> wire.WorkerList:
    return wire.WorkerList(workers.list_workers(tx, call.settings.lease_s, viewer=call.caller))
