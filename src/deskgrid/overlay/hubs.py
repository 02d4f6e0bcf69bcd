"""A peer's hubs: the nearest one, where others find it, and those it visits to call peers that are registered there."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Callable

import structlog

from deskgrid.clock import Clock
from deskgrid.core.backoff import delay_s
from deskgrid.errors import DeskgridError, Unreachable
from deskgrid.model.overlay import Hub
from deskgrid.overlay.background import Background
from deskgrid.overlay.identity import Identity
from deskgrid.overlay.registration import HubConnection, Invited, nearest

__all__ = ["Hubs"]

_IDLE_S = 60.0
_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 1.0, 60.0
_STAGGER_S = 2.0
_MOST_TASKS = 256
_SETTLE_S = 2.0
_log = structlog.get_logger()


class Hubs:
    """The hub connections of one peer."""

    def __init__(
        self, identity: Identity, *, clock: Clock, rng: random.Random, invited: Invited, changed: Callable[[], None]
    ) -> None:
        """`changed` is called when the peer has got a home, or found none: then the server may know of other hubs."""
        self._known: tuple[Hub, ...] = ()
        self.home: HubConnection | None = None
        """At the hub where others find us."""
        self._identity, self._clock, self._rng, self._invited, self._changed = identity, clock, rng, invited, changed
        self._visits: dict[str, asyncio.Future[HubConnection]] = {}
        self._background = Background(_MOST_TASKS)
        self._at_home = asyncio.Event()

    def learn(self, hubs: tuple[Hub, ...]) -> None:
        """Take what the server tells of hubs. A home that it knows no longer, while there are others, is left: nobody is sent there."""
        self._known = hubs
        if self.home is not None and hubs and all(hub.name != self.home.hub.name for hub in hubs):
            self.home.ended.set()

    def start(self) -> None:
        """Begin to look for a home."""
        self._background.start(self._keep_home())

    async def close(self) -> None:
        """Leave all hubs. Idempotent."""
        await self._background.close()

    async def at_home(self, limit_s: float) -> HubConnection:
        """Return the connection to the home hub, as soon as there is one. Raise Unreachable after `limit_s`."""
        try:
            async with asyncio.timeout(limit_s):
                await self._at_home.wait()
        except TimeoutError as error:
            raise Unreachable("no hub answers") from error
        if self.home is None:
            raise Unreachable("no hub answers")
        return self.home

    async def to(self, hub: Hub) -> HubConnection:
        """Return a connection to a hub; a new one is kept for a minute after it was last wanted. Raise Unreachable."""
        if self.home is not None and self.home.hub.name == hub.name and not self.home.ended.is_set():
            return self.home
        if self.home is None and any(hub.name == one.name for one in self._known):
            # It may become our home just now, and two registrations with one key end each other.
            with contextlib.suppress(Unreachable):
                home = await self.at_home(_SETTLE_S)
                if home.hub.name == hub.name:
                    return home
        visit = self._visits.get(hub.name)
        if visit is None:
            visit = self._visits[hub.name] = asyncio.get_running_loop().create_future()
            if self._background.start(self._visit(hub, visit)) is None:
                del self._visits[hub.name]
                raise Unreachable("too many hubs are being visited")
        connection = await asyncio.shield(visit)
        connection.used_at = self._clock.monotonic()
        return connection

    async def _open(self, *hubs: Hub) -> HubConnection:
        return await nearest(hubs, self._identity.client_context, clock=self._clock, rng=self._rng, invited=self._invited)

    async def _keep_home(self) -> None:
        failures = 0
        lost = ""
        while True:
            others = [hub for hub in self._known if hub.name != lost]
            try:
                self.home = await self._open(*(others if lost and others else self._known))
            except DeskgridError as error:
                failures, lost = failures + 1, ""
                _log.warning("no_hub", error=str(error), failures=failures)
                self._changed()
                await self._clock.sleep(delay_s(failures, first_s=_FIRST_BACKOFF_S, max_s=_MAX_BACKOFF_S, rng=self._rng))
                continue
            failures, lost = 0, self.home.hub.name
            await self._be_home(self.home)
            # Thousands of peers lose a hub at the same time.
            await self._clock.sleep(self._rng.uniform(0.0, _STAGGER_S))

    async def _be_home(self, home: HubConnection) -> None:
        self._at_home.set()
        self._changed()
        try:
            await home.ended.wait()
        finally:
            self._at_home.clear()
            self.home = None
            await home.close()

    async def _visit(self, hub: Hub, opened: asyncio.Future[HubConnection]) -> None:
        connection: HubConnection | None = None
        try:
            connection = await self._open(hub)
            opened.set_result(connection)
            await self._until_idle(connection)
        except DeskgridError as error:
            opened.set_exception(error)
            opened.exception()  # it may be that nobody waits any more
        finally:
            self._visits.pop(hub.name, None)
            if not opened.done():
                opened.cancel()
            if connection is not None:
                await connection.close()

    async def _until_idle(self, connection: HubConnection) -> None:
        """Return when nobody has wanted a connection for a minute, or it has ended."""
        connection.used_at = self._clock.monotonic()
        while (left_s := connection.used_at + _IDLE_S - self._clock.monotonic()) > 0:
            try:
                async with asyncio.timeout(left_s):
                    await connection.ended.wait()
                return
            except TimeoutError:
                continue
