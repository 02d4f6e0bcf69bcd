"""Watching something change by held calls: the server answers once it is not as the caller has seen it."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any, TypeVar

from deskgrid.client.transport import Transport
from deskgrid.model import wire

__all__ = ["until_ended"]

_HOLD_S = 20.0
Watched = TypeVar("Watched")


async def until_ended(
    transport: Transport,
    route: wire.Route[Any, Watched],
    path: dict[str, object],
    mark_of: Callable[[Watched], str],
    ended: Callable[[Watched], bool],
) -> AsyncIterator[Watched]:
    """Yield what a call returns, now and whenever its mark is another, until it has ended. No change is waited for by polling."""
    found = await transport.call(route, path=path)
    while True:
        yield found
        if ended(found):
            return
        seen = mark_of(found)
        while mark_of(found) == seen:
            found = await transport.call(route, path=path, query={"seen": seen}, wait_s=_HOLD_S)
