"""How a route of model/wire.py gets its handler: one of three kinds, so that each handler holds only its own logic.

@reads(route)   def f(tx, call)          runs in a snapshot
@writes(route)  def f(tx, call)          runs in a durable transaction, once per idempotency key
@serves(route)  async def f(services, call, http)    everything else: bytes, waiting
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from enum import Enum
from typing import Any, Generic, TypeVar

import msgspec
import sqlalchemy as sa
from msgspec import Struct
from starlette.requests import Request as HttpRequest

from deskgrid.clock import Clock
from deskgrid.core.rights import ROLES, covers
from deskgrid.errors import DeskgridError, Forbidden, InvalidInput, Unauthenticated
from deskgrid.model import wire
from deskgrid.server.authority import Authority
from deskgrid.server.live import Live
from deskgrid.server.metrics import Metrics
from deskgrid.server.repository import Repository
from deskgrid.server.store import accounts
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import DoneElsewhere, Store, Transaction
from deskgrid.server.store.schema import idempotency
from deskgrid.settings import ServerSettings

__all__ = ["HANDLERS", "Call", "Handler", "Kind", "Services", "caller_of", "once", "reads", "serves", "writes"]

Body = TypeVar("Body")


class Services(Struct, frozen=True):
    """What handlers work with; one per server process."""

    settings: ServerSettings
    store: Store
    repository: Repository
    live: Live
    clock: Clock
    authority: Authority
    metrics: Metrics = msgspec.field(default_factory=Metrics)


class Call(Struct, Generic[Body], frozen=True):
    """One call, already authenticated, authorised and decoded."""

    caller: Caller
    body: Body
    path: dict[str, str]
    query: dict[str, Any]
    key: str
    settings: ServerSettings
    authority: Authority
    token: str = ""
    """Only where the handler itself finds out whose it is (`serves(..., knows_callers=True)`)."""

    request: str = ""
    """By which logs, errors and the audit log know the call."""

    def number(self, name: str) -> int:
        """Return a path parameter that is a number. Raise InvalidInput otherwise."""
        text = self.path[name]
        if not text.isdecimal() or len(text) > 18:
            raise InvalidInput(f"{text[:40]!r} is not a {name} number")
        return int(text)


class Kind(Enum):
    READ = "read"
    WRITE = "write"
    SERVE = "serve"


class Handler(Struct, frozen=True):
    """A route with the function that answers it."""

    kind: Kind
    route: wire.Route[Any, Any]
    function: Callable[..., Any]
    knows_callers: bool = False
    """It authenticates its caller itself, with `caller_of`, in the transaction that it needs anyway."""


HANDLERS: dict[str, Handler] = {}

ReadOrWrite = Callable[[Transaction, Call[Any]], Any]
Serve = Callable[[Services, Call[Any], HttpRequest], Awaitable[Any]]


def reads(route: wire.Route[Any, Any]) -> Callable[[ReadOrWrite], ReadOrWrite]:
    """Let a function answer a route from a snapshot of the store."""
    return _register(Kind.READ, route)


def writes(route: wire.Route[Any, Any]) -> Callable[[ReadOrWrite], ReadOrWrite]:
    """Let a function answer a route in a durable transaction, once per idempotency key."""
    return _register(Kind.WRITE, route)


def serves(route: wire.Route[Any, Any], *, knows_callers: bool = False) -> Callable[[Serve], Serve]:
    """Let an async function answer a route. With `knows_callers` it must call `caller_of` before it does anything."""
    return _register(Kind.SERVE, route, knows_callers=knows_callers)


def _register(kind: Kind, route: wire.Route[Any, Any], *, knows_callers: bool = False) -> Callable[[Any], Any]:
    def keep(function: Any) -> Any:
        HANDLERS[route.name] = Handler(kind, route, function, knows_callers)
        return function

    return keep


def caller_of(tx: Transaction, route: wire.Route[Any, Any], token: str) -> Caller:
    """Return whose token it is. Raise Unauthenticated, or Forbidden if he may not call the route."""
    if not token:
        raise Unauthenticated("this call needs a token", hint="deskgrid login LINK")
    caller = accounts.authenticate(tx, token)
    if caller.rights is not None and not covers(caller.rights, route.name):
        raise Forbidden(f"this token may not call {route.name}", hint=f"it has the rights {', '.join(sorted(caller.rights))}")
    if caller.role not in ROLES[route.name]:
        raise Forbidden(f"{caller.role.value} {caller.name} may not call {route.name}")
    return caller


def once(tx: Transaction, principal: str, key: str, function: Callable[[], Any]) -> bytes:
    """Return the encoded answer of `function`, or the stored one if this principal used the key before."""
    query = sa.select(idempotency.c.answer).where(idempotency.c.principal == principal, idempotency.c.key == key)
    stored: bytes | None = tx.value(query)
    if stored is not None:
        return stored
    try:
        answer = msgspec.json.encode(function())
    except DeskgridError as error:
        if tx.value(query) is not None:  # the same call, at another process: its own doing is in its way
            raise DoneElsewhere from error
        raise
    tx.run(sa.insert(idempotency).values(principal=principal, key=key, answer=answer, created_at=tx.now))
    return answer
