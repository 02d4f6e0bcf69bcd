"""Data that the grid wants this PC to hold, within what its owner lends for that: fetched in the background, and not evicted while it is wanted. What
is in the cache is checked again in the background, one file after the other.

The server says with each call what is to be held, all of it; so a restarted worker need not remember anything. Nothing is fetched while the
owner's rules forbid work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import structlog

from deskgrid.client.download import sha256_of
from deskgrid.core.backoff import delay_s
from deskgrid.errors import BadImage, DeskgridError, NotFound
from deskgrid.model.ids import Sha256
from deskgrid.model.placement import Keep
from deskgrid.worker.kit import Kit
from deskgrid.worker.tasks import in_thread, wait_for_event
from deskgrid.worker.transfer import Transfer

__all__ = ["Keeper"]

_log = structlog.get_logger()
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 10.0, 600.0
_CHECK_S = 600.0
"""Between the checks of two files in the cache."""


class Keeper:
    """What is held here. `run` it beside the rest."""

    def __init__(self, kit: Kit) -> None:
        self._kit = kit
        self._wanted: dict[Sha256, Keep] = {}
        """To be fetched."""
        self._held: dict[Sha256, Callable[[], None]] = {}
        self._failures: dict[Sha256, int] = {}
        self._again_at: dict[Sha256, float] = {}
        self._news = asyncio.Event()
        self._fetching: tuple[Sha256, asyncio.Task[None]] | None = None

    def obey(
        self, keep: Iterable[Keep], remove: Iterable[Sha256], fetch: Iterable[Keep] = (), guard: Iterable[Sha256] = ()
    ) -> None:
        """Do what the server said last: hold all of `keep`, and what is here of `guard`, and nothing else; fetch what is in `fetch`, too; remove
        what is in `remove` unless an attempt uses it."""
        kept = {one.content: one for one in keep}
        self._wanted = {**{one.content: one for one in fetch}, **kept}
        for noted in (self._failures, self._again_at):
            for content in noted.keys() - self._wanted.keys():
                del noted[content]
        held = kept.keys() | set(guard)
        for content in self._held.keys() - held:
            self._held.pop(content)()
        for content in held - self._held.keys():
            self._held[content] = self._kit.cache.hold(content)
        if self._fetching is not None and self._fetching[0] not in self._wanted:
            self._fetching[1].cancel()
        for content in remove:
            if self._kit.cache.discard(content):
                self._kit.changed()
        self._news.set()

    def obey_owner(self) -> None:
        """Stop fetching if the owner does not want any work now."""
        if self._kit.owner.paused and self._fetching is not None:
            self._fetching[1].cancel()
        self._news.set()

    async def run(self) -> None:
        """Fetch what is wanted and not here, one after the other, until cancelled."""
        while True:
            self._news.clear()
            one = self._next()
            if one is None:
                pause_s = min((at - self._kit.clock.monotonic() for at in self._again_at.values()), default=_LONGEST_PAUSE_S)
                await wait_for_event(self._news, self._kit.clock, max(pause_s, 1.0))
                continue
            task = asyncio.create_task(self._fetch(one))
            self._fetching = (one.content, task)
            try:
                await asyncio.wait([task])
            finally:
                self._fetching = None
                task.cancel()
                await asyncio.gather(task, return_exceptions=True)
            if not task.cancelled():
                task.result()

    def _next(self) -> Keep | None:
        """Return what is to be fetched now."""
        if self._kit.owner.paused:
            return None
        now = self._kit.clock.monotonic()
        here = {*self._kit.cache.entries(), *self._kit.cache.shared()}
        for content, one in self._wanted.items():
            if content not in here and self._again_at.get(content, 0.0) <= now:
                return one
        return None

    async def check(self) -> None:
        """Check the files in the cache by their sha256, the one that was checked longest ago first, until cancelled. What is damaged goes."""
        checked: dict[Path, float] = {}
        while True:
            await self._kit.clock.sleep(_CHECK_S)
            files = dict(self._kit.cache.files())
            checked = {path: at for path, at in checked.items() if path in files}
            if self._kit.owner.paused or not files:
                continue
            path = min(files, key=lambda one: checked.get(one, 0.0))
            checked[path] = self._kit.clock.monotonic()
            try:
                is_right = await in_thread(sha256_of, path) == files[path]
            except FileNotFoundError:  # evicted meanwhile
                continue
            except OSError as error:
                _log.error("cache_not_readable", file=path.name, error=str(error))
                is_right = False
            if not is_right and path in dict(self._kit.cache.files()) and self._remove_damaged(path, files[path]):
                _log.error("damaged_in_cache", file=path.name)
                self._kit.changed()
                self._news.set()

    def _remove_damaged(self, path: Path, content: Sha256) -> bool:
        """Remove a file unless an attempt uses it; that it is to be held here is no reason to keep a damaged one."""
        if (release := self._held.pop(content, None)) is not None:
            release()
        try:
            return self._kit.cache.remove_damaged(path)
        finally:
            if release is not None:
                self._held[content] = self._kit.cache.hold(content)

    async def _fetch(self, one: Keep) -> None:
        transfer = Transfer(self._kit, one.protocol)
        try:
            if one.ref.disk is not None:
                async with self._kit.cache.use(one.ref, partial(transfer.fetch_disk, one.ref)):
                    pass
            else:
                await self._kit.cache.bring(one.ref.blob, partial(transfer.fetch, one.ref.blob))
        except (DeskgridError, OSError) as error:
            failures = self._failures[one.content] = self._failures.get(one.content, 0) + 1
            pause_s = delay_s(failures, first_s=_FIRST_PAUSE_S, max_s=_LONGEST_PAUSE_S, rng=self._kit.rng)
            hopeless = isinstance(error, (NotFound, BadImage))
            self._again_at[one.content] = self._kit.clock.monotonic() + (_LONGEST_PAUSE_S if hopeless else pause_s)
            _log.warning("not_held", data=one.name, error=str(error))
            return
        self._failures.pop(one.content, None)
        self._again_at.pop(one.content, None)
        _log.info("held", data=one.name, content=one.content)
        self._kit.changed()
