"""A peer's grants: asked of the server when a service is wanted, kept while they are valid, asked once for all who want the same."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
from msgspec import Struct

from deskgrid.clock import Clock
from deskgrid.core.trust import Grant, verify_grant
from deskgrid.errors import Unreachable
from deskgrid.model.overlay import Hub
from deskgrid.model.wire import GrantAnswer

__all__ = ["Granted", "Grants"]

_HELD_S = 20.0
"""How long the server is asked to hold its answer."""
_MARGIN_S = 5.0
_PAUSE_S = 0.5
_MOST_KEPT = 1024


class Granted(Struct, frozen=True, kw_only=True):
    """A grant, and where its target is registered."""

    text: str
    grant: Grant
    hub: Hub


class Grants:
    """Asks for grants and keeps them."""

    def __init__(self, ask: Callable[[str, float], Awaitable[GrantAnswer]], *, clock: Clock) -> None:
        """`ask` takes SERVICE.PEER and for how long the server may hold its answer."""
        self._ask, self._clock = ask, clock
        self._key: Ed25519PublicKey | None = None
        self._offset_s = 0.0
        self._kept: dict[str, Granted] = {}
        self._asking: dict[tuple[str, bool], asyncio.Task[Granted | str]] = {}

    def trust(self, grant_key: Ed25519PublicKey, offset_s: float) -> None:
        """Use this key and server time (monotonic time + `offset_s`) to check grants."""
        self._key, self._offset_s = grant_key, offset_s

    def kept(self, service: str) -> Granted | None:
        """Return a grant from before that is valid for some time yet."""
        found = self._kept.get(service)
        if found is not None and found.grant.expires_at > self._now() + _MARGIN_S:
            return found
        return None

    def drop(self, service: str, granted: Granted) -> None:
        """Do not use a grant again: what it says is not so any more."""
        if self._kept.get(service) is granted:
            del self._kept[service]

    async def ask(self, service: str, *, deadline: float) -> Granted:
        """Return a new grant, asking until `deadline` (of the clock) while the service is not there, but once in any case.

        Raise Forbidden, NotFound, Unreachable, or what else the server says.
        """
        found = await self._shared(service, held=False, limit_s=None)
        while isinstance(found, str):
            left_s = deadline - self._clock.monotonic()
            if left_s <= 0:
                raise Unreachable(f"{service} is not there: {found}")
            found = await self._shared(service, held=True, limit_s=left_s) or found
        return found

    async def look_up(self, service: str) -> str:
        """Ask once and keep what comes. Return what a service that is not there waits for, "" if it is there. Raise as `ask` does."""
        found = await self._shared(service, held=False, limit_s=None)
        return found if isinstance(found, str) else ""

    async def close(self) -> None:
        """Stop asking. Idempotent."""
        while self._asking:
            tasks = list(self._asking.values())
            for task in tasks:
                task.cancel()
            await asyncio.wait(tasks)

    async def _shared(self, service: str, *, held: bool, limit_s: float | None) -> Granted | str:
        """Ask, or wait for the answer that another waits for already; "" if it did not come within the limit."""
        key = (service, held)
        task = self._asking.get(key)
        if task is None:
            task = self._asking[key] = asyncio.create_task(self._ask_once(service, held))
            task.add_done_callback(lambda _: self._asking.pop(key, None))
        done, _ = await asyncio.wait({task}, timeout=limit_s)
        if not done:
            return ""
        if task.cancelled():
            raise Unreachable("this peer is leaving")
        return task.result()

    async def _ask_once(self, service: str, held: bool) -> Granted | str:
        began = self._clock.monotonic()
        answer = await self._ask(service, _HELD_S if held else 0.0)
        if answer.grant and answer.hub is not None:
            return self._keep(service, answer, answer.hub)
        if held and self._clock.monotonic() - began < _PAUSE_S:  # that server does not hold
            await self._clock.sleep(_PAUSE_S)
        return answer.waiting_for or "its peer is at no hub"

    def _keep(self, service: str, answer: GrantAnswer, hub: Hub) -> Granted:
        if self._key is None:
            raise Unreachable("not registered at the server")
        granted = Granted(text=answer.grant, grant=verify_grant(answer.grant, self._key, now=self._now()), hub=hub)
        if len(self._kept) >= _MOST_KEPT:
            self._kept.clear()
        self._kept[service] = granted
        return granted

    def _now(self) -> float:
        """Return the server's time."""
        return self._clock.monotonic() + self._offset_s
