"""The server's program: every route of model/wire.py mounted over its handler, and the loops that keep the grid going."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import time
import uuid
from typing import Any

import msgspec
import structlog
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HttpRequest
from starlette.responses import HTMLResponse, Response
from starlette.routing import Route as HttpRoute
from starlette.routing import Router
from starlette.types import Receive, Scope, Send

from deskgrid.core.rights import ROLES
from deskgrid.errors import (
    DeskgridError,
    InvalidInput,
    OperatorError,
    ProtocolError,
    Unauthenticated,
)
from deskgrid.link import hash_secret
from deskgrid.model import wire
from deskgrid.model.users import Role
from deskgrid.server import routes
from deskgrid.server.health import health_routes
from deskgrid.server.openapi import openapi_json, openapi_page
from deskgrid.server.routes.handler import HANDLERS, Call, Handler, Kind, Services, caller_of, once
from deskgrid.server.store import attempts, audit, manifests, peers, pilots
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import Transaction

__all__ = ["make_app", "sweep_forever"]

_MOST_BODY_BYTES = 8 << 20
_NOBODY = Caller(Role.USER, "")
_AUDIT_AT_ONCE = 1000
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,64}")
_VERSION = re.compile(r"([0-9]{1,6})\.([0-9]{1,6})")
_MOST_INT = 1 << 62
_CHARACTER_0 = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")
"""As JSON has it in a text: after a backslash that no other stands for."""
_JSON = "application/json"
_log = structlog.get_logger("deskgrid.server")


def make_app(services: Services) -> Router:
    """Return the ASGI application. Every route of the contract has a handler, or this raises."""
    assert routes  # importing it registered the handlers
    endpoints = []
    # Those that workers call all day first: the router tries one after the other.
    for route in sorted(wire.ROUTES.values(), key=lambda route: route not in (wire.SYNC, wire.WAKE)):
        endpoint = _Endpoint(services, HANDLERS[route.name])
        endpoints.append(HttpRoute(route.path, endpoint, methods=[route.method.value], name=route.name))

    async def openapi(_http: HttpRequest) -> Response:
        return Response(openapi_json(), media_type=_JSON)

    async def docs(_http: HttpRequest) -> Response:
        return HTMLResponse(openapi_page())

    endpoints += [HttpRoute("/openapi.json", openapi), HttpRoute("/docs", docs), *health_routes(services)]
    return Router(routes=endpoints)


class _Endpoint:
    """An ASGI application that answers one route."""

    def __init__(self, services: Services, handler: Handler) -> None:
        self._services = services
        self._handler = handler
        self._logged = _log.bind().is_enabled_for(logging.DEBUG)  # asked once: a line not written costs as much as the measurement

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        http = HttpRequest(scope, receive, send)
        started = time.perf_counter()
        request, status = _request_id(http), 500
        structlog.contextvars.bind_contextvars(request=request)
        try:
            response = await _answer(self._services, self._handler, http, request)
            status = response.status_code
        except DeskgridError as error:
            response = _error_response(self._handler.route, error, request)
            status = response.status_code
        except ClientDisconnect:
            response = _error_response(self._handler.route, ProtocolError("the client went away"), request)
            status = 499  # nobody gets it; counted apart, it is not the server's fault
        except Exception as error:
            response = _unexpected(error, request)
        finally:
            seconds = time.perf_counter() - started
            name = self._handler.route.name
            self._services.metrics.measure_call(name, status, seconds)
            if self._logged:
                _log.debug("call", route=name, status=status, milliseconds=round(seconds * 1000, 1))
        response.raw_headers.append((b"x-request-id", request.encode()))
        await response(scope, receive, send)


def _request_id(http: HttpRequest) -> str:
    """Return the caller's own id of a request if it may stand in logs, a new one otherwise."""
    given = http.headers.get("x-request-id")
    return given if given is not None and _REQUEST_ID.fullmatch(given) else os.urandom(8).hex()


async def _answer(services: Services, handler: Handler, http: HttpRequest, request: str) -> Response:
    route = handler.route
    _check_wire_version(http)
    token = _token(http)
    caller = _NOBODY if handler.knows_callers and token else await _authorise(services, route, token)
    _check_texts(http)
    call: Call[Any] = Call(
        caller=caller,
        token=token if handler.knows_callers else "",
        body=None if route.raw else await _body(services, handler, http, token),
        path=dict(http.path_params),
        query=_decode_query(route, http),
        key=http.headers.get(wire.IDEMPOTENCY_HEADER, "")[:64] or uuid.uuid4().hex,
        settings=services.settings,
        authority=services.authority,
        request=request,
    )
    if handler.kind is Kind.READ:
        return _json(msgspec.json.encode(await services.store.read(lambda tx: handler.function(tx, call))))
    if handler.kind is Kind.WRITE:
        return _json(await services.store.write(lambda tx: _write_once(tx, handler, call)))
    found = await handler.function(services, call, http)
    return found if isinstance(found, Response) else _json(msgspec.json.encode(found))


def _write_once(tx: Transaction, handler: Handler, call: Call[Any]) -> bytes:
    principal = call.caller.principal
    if call.caller is _NOBODY:
        principal = f"secret:{hash_secret(call.body.secret)}"  # nobody but the holder of the secret gets the stored answer
    return once(tx, principal, f"{handler.route.name}:{call.key}"[:64], lambda: _write(tx, handler, call))


def _write(tx: Transaction, handler: Handler, call: Call[Any]) -> Any:
    answer = handler.function(tx, call)
    caller = call.caller if call.caller is not _NOBODY else None
    audit.note_call(tx, caller, handler.route.name, call.path, call.body, answer, call.request)
    return answer


def _check_texts(http: HttpRequest) -> None:
    """Refuse what PostgreSQL cannot keep, and nobody needs."""
    if any("\0" in text for text in (*http.path_params.values(), *http.query_params.values())):
        raise InvalidInput("the character 0 is not allowed in a text")


def _check_wire_version(http: HttpRequest) -> None:
    """Refuse what we cannot understand: another major version, a newer minor one, or one more than two minors old."""
    text = http.headers.get(wire.WIRE_VERSION_HEADER)
    if text is None:
        return
    found, ours = _VERSION.fullmatch(text), wire.WIRE_VERSION
    if found is None or int(found[1]) != ours[0] or not ours[1] - 2 <= int(found[2]) <= ours[1]:
        raise InvalidInput(
            f"wire version {text[:20]} is not spoken here", hint="this server speaks {}.{}; update the older side".format(*ours)
        )


def _token(http: HttpRequest) -> str:
    scheme, _, token = http.headers.get("authorization", "").partition(" ")
    return token if scheme.lower() == "bearer" else ""


async def _authorise(services: Services, route: wire.Route[Any, Any], token: str) -> Caller:
    if not ROLES[route.name]:
        return _NOBODY
    if not token:  # not worth a transaction
        raise Unauthenticated("this call needs a token", hint="deskgrid login LINK")
    return await services.store.read(lambda tx: caller_of(tx, route, token))


async def _body(services: Services, handler: Handler, http: HttpRequest, token: str) -> Any:
    """Return the message. Who may not call is told that first, whatever he sent."""
    try:
        return await _decode_body(handler.route, http)
    except InvalidInput:
        if handler.knows_callers:
            await _authorise(services, handler.route, token)
        raise


async def _decode_body(route: wire.Route[Any, Any], http: HttpRequest) -> Any:
    if route.request is wire.Nothing:
        return wire.Nothing()
    body = bytearray()
    async for piece in http.stream():
        body += piece
        if len(body) > _MOST_BODY_BYTES:
            raise InvalidInput(f"the message is larger than {_MOST_BODY_BYTES} bytes")
    if _CHARACTER_0.search(body):
        raise InvalidInput("the character 0 is not allowed in a text")
    try:
        return msgspec.json.decode(body, type=route.request)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise InvalidInput(f"the message is not understood: {error}") from error


def _decode_query(route: wire.Route[Any, Any], http: HttpRequest) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, kind in route.query.items():
        if name in http.query_params:
            if kind == list[str]:
                found[name] = http.query_params.getlist(name)
                continue
            try:
                found[name] = msgspec.convert(http.query_params[name], kind, strict=False)
            except msgspec.ValidationError as error:
                raise InvalidInput(f"{http.query_params[name][:80]!r} is not allowed", where=name, hint=kind.__name__) from error
            if isinstance(found[name], int) and abs(found[name]) > _MOST_INT:
                raise InvalidInput("this number is too large", where=name)  # for databases
            if isinstance(found[name], float) and not math.isfinite(found[name]):
                raise InvalidInput("a finite number is needed", where=name)  # not a number as a delay breaks the loop's timers
    return found


def _json(body: bytes) -> Response:
    return Response(body, media_type=_JSON)


def _error_response(route: wire.Route[Any, Any], error: DeskgridError, request: str) -> Response:
    if isinstance(error, OperatorError):
        _log.error("operator must act", error=error.message)
    return Response(
        msgspec.json.encode(wire.ErrorAnswer(error=type(error).__name__, message=error.message, hint=error.hint, request=request)),
        status_code=route.status_of(error),
        media_type=_JSON,
    )


def _unexpected(error: Exception, request: str) -> Response:
    _log.error("a handler failed", error=repr(error), exc_info=error)
    body = wire.ErrorAnswer(error="OperatorError", message="the server failed on this call; its log says why", request=request)
    return Response(msgspec.json.encode(body), status_code=500, media_type=_JSON)


async def sweep_forever(services: Services) -> None:
    """Make attempts with expired leases lost, forget silent peers and old entries of the audit log.

    Leases are not looked at in the first lease's length after the start: while the server was down nobody could renew.
    """
    settings = services.settings
    await services.clock.sleep(settings.lease_s)
    while True:
        pause_s = settings.lease_s  # after a failure as after the start: while the database was gone nobody could renew
        with _failures_logged("the sweep failed"):
            expired = await services.store.write(lambda tx: _expire(tx, settings.audit_s))
            services.metrics.count_expired(expired)
            pause_s = settings.sweep_s
        await services.clock.sleep(pause_s)


def _expire(tx: Transaction, audit_s: float) -> int:
    expired = attempts.expire_leases(tx)
    pilots.end_pilots(tx)
    peers.sweep_peers(tx)
    manifests.forget_expired(tx)
    audit.forget(tx, tx.now - audit_s, _AUDIT_AT_ONCE)
    return expired


@contextlib.contextmanager
def _failures_logged(message: str) -> Any:
    try:
        yield
    except DeskgridError as error:
        _log.error(message, error=str(error))
    except Exception as error:
        # As a disk that cannot be written: without the sweep no lease ends, and its end would be the server's.
        _log.error(message, error=repr(error), exc_info=error)
