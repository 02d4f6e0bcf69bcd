"""What admins look at: figures, and who did what."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest
from starlette.responses import Response

from deskgrid.model import wire
from deskgrid.server.routes.handler import Call, Services, reads, serves
from deskgrid.server.store import audit
from deskgrid.server.store.engine import Transaction


@serves(wire.METRICS)
async def metrics(services: Services, _call: Call[wire.Nothing], _http: HttpRequest) -> Response:
    from deskgrid.server.health import metrics_response  # it needs the services, and they this package

    return await metrics_response(services)


@reads(wire.LIST_AUDIT)
def list_audit(tx: Transaction, call: Call[wire.Nothing]) -> wire.AuditLog:
    found, more = audit.list_entries(
        tx,
        user=call.query.get("user", ""),
        since=call.query.get("since"),
        before=call.query.get("before"),
        limit=min(max(call.query.get("limit", 100), 1), 1000),
    )
    return wire.AuditLog(entries=found, more=more)
