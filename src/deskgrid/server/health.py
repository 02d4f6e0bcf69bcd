"""How a server process does, for those who watch it: /health (it lives), /ready (it can work), /metrics (how much it does)."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator

import structlog
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route as HttpRoute

from deskgrid.errors import DeskgridError
from deskgrid.model.data import Blob
from deskgrid.model.ids import Sha256
from deskgrid.server.metrics import CONTENT_TYPE, read_figures
from deskgrid.server.routes.handler import Services
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.migrate import newest_revision, revision_of

__all__ = ["health_routes", "metrics_response", "serving_figures", "why_not_ready"]

_log = structlog.get_logger("deskgrid.server")
_READY_WITHIN_S = 10.0
_KEPT_S = 1.0
"""Anybody may ask /ready: how often it looks does not depend on how often they do."""
_NO_BLOB = Blob(sha256=Sha256("0" * 64), size_bytes=0)


async def why_not_ready(services: Services) -> str:
    """Return what keeps this process from working, for people; "" if nothing does."""
    try:
        async with asyncio.timeout(_READY_WITHIN_S):
            found = await services.store.read(_revision)
            if found != newest_revision():
                return f"the tables are of revision {found}, not {newest_revision()}"
            services.repository.free_bytes()
            await services.repository.holds(_NO_BLOB)  # at an S3 store: a call
    except TimeoutError:
        return f"no answer within {_READY_WITHIN_S:.0f} s"
    except (DeskgridError, OSError) as error:
        _log.error("not ready", error=str(error))  # where the database is, and as whom we call it, is not everybody's business
        return "the database or the repository does not work; the server's log says why"
    return ""


def _revision(tx: Transaction) -> str | None:
    return revision_of(tx.connection)


def health_routes(services: Services) -> list[HttpRoute]:
    """Return /health and /ready."""
    lock = asyncio.Lock()
    known: tuple[float, str] | None = None

    async def health(_http: HttpRequest) -> Response:
        return Response(b"ok\n", media_type="text/plain")

    async def ready(_http: HttpRequest) -> Response:
        nonlocal known
        async with lock:
            now = services.clock.monotonic()
            if known is None or now >= known[0] + _KEPT_S:
                known = now, await why_not_ready(services)
            reason = known[1]
        return Response(f"{reason or 'ok'}\n", status_code=503 if reason else 200, media_type="text/plain")

    return [HttpRoute("/health", health), HttpRoute("/ready", ready)]


async def metrics_response(services: Services) -> Response:
    """Return what Prometheus is told."""
    online_s = services.settings.max_interval_s
    figures = await services.store.read(lambda tx: read_figures(tx, online_s))
    free_bytes = services.repository.free_bytes()
    text = services.metrics.render(figures, waiting_writes=services.store.waiting, free_bytes=free_bytes)
    return Response(text, headers={"Content-Type": CONTENT_TYPE})


@contextlib.asynccontextmanager
async def serving_figures(services: Services, listener: socket.socket) -> AsyncIterator[None]:
    """Serve /metrics, /health and /ready on a socket without TLS and without tokens until the block ends."""

    async def metrics(_http: HttpRequest) -> Response:
        return await metrics_response(services)

    app = Starlette(routes=[*health_routes(services), HttpRoute("/metrics", metrics)])
    config = uvicorn.Config(app, loop="none", http="httptools", log_config=None, access_log=False, lifespan="off")
    server = uvicorn.Server(config)
    server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]
    task = asyncio.create_task(server.serve(sockets=[listener]))
    try:
        yield
    finally:
        server.should_exit = True
        await task
