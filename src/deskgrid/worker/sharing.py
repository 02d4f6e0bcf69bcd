"""Disks from other workers, and for them, if the owner shares (`share` in his settings).

A blob is fetched from others into the cache's folder for that (swarm/fetch.py), verified by its sha256, and then kept there as long as there is
room, for others. BitTorrent runs in a confined process of its own, which is started when it is first needed and ended when nobody has wanted
anything for IDLE_S. While the worker is paused, nothing goes to or from others.

Whatever goes wrong here, the blob is fetched from the server instead; a job does not notice.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import socket
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import msgspec
import structlog

from deskgrid.client.download import sha256_of
from deskgrid.client.together import can_share, engine_command, make_identity
from deskgrid.clock import Clock
from deskgrid.core.torrents import LEAST_BYTES, torrent_name
from deskgrid.errors import Conflict, DeskgridError, InvalidInput, NotFound, ProtocolError, Unreachable
from deskgrid.model import wire
from deskgrid.model.data import Blob
from deskgrid.model.ids import Sha256
from deskgrid.model.swarm import Turn, TurnAnswer
from deskgrid.settings import WorkerSettings
from deskgrid.swarm.cache import Cache
from deskgrid.swarm.engine import Engine
from deskgrid.swarm.engine_words import Limit, Rename
from deskgrid.swarm.fetch import Identity, Swarm
from deskgrid.worker.connection import Connection
from deskgrid.worker.joining import Joining, connect_engine
from deskgrid.worker.tasks import in_thread, wait_for_event

__all__ = ["Sharing", "engine_bounds", "own_bound"]

_log = structlog.get_logger()

IDLE_S = 900.0
_ASK_GAP_S, _HEAR_S = 3.0, 3.0
_QUIET_INTERVAL_S = 60.0
"""Between the turns of a blob that nobody wants."""


class Sharing:
    """A worker's part in all swarms. `run` it beside the rest."""

    def __init__(
        self,
        settings: WorkerSettings,
        cache: Cache,
        connection: Connection,
        clock: Clock,
        *,
        paused: Callable[[], bool],
        changed: Callable[[], None] = lambda: None,
        joining: Joining | None = None,
    ) -> None:
        """`changed` lets the server be called soon. Raise InvalidInput for settings that make no sense."""
        self._settings, self._cache, self._connection, self._clock = settings, cache, connection, clock
        self._paused, self._changed = paused, changed
        self._joining = joining if not settings.share_near else None
        self._near = _host_port(settings.share_near) if settings.share_near else None
        self._engine: Engine | None = None
        self._starting = asyncio.Lock()
        self._identity: Identity | None = None
        self._shared: dict[Sha256, Swarm] = {}
        self._due: dict[Sha256, float] = {}
        """When the next turn is due for what is given to others."""
        self._fetching: set[Sha256] = set()
        self._wanted: frozenset[Sha256] = frozenset()
        self._wanted_at = 0.0
        self._news = asyncio.Event()
        self._asked_at = -math.inf
        """When the server was last asked what of this is wanted, for a worker on this PC."""
        self._heard = asyncio.Event()
        """What is wanted is given. Take it, then wait for it."""
        cache.dropped = self._dropped

    async def fetch(self, blob: Blob, progress: Callable[[int], None]) -> Path | None:
        """Fetch a blob from others and the server, verified, and return its file; None: it is to be fetched from the server alone.

        The file is there until the caller's part in the cache ends.
        """
        if blob.size_bytes < LEAST_BYTES or not self._settings.share or self._paused():
            return None
        there = self._cache.shared_file(blob.sha256)
        if there is not None and await in_thread(sha256_of, there) == blob.sha256:
            return there
        for is_last in (False, True):
            engine: Engine | None = None
            try:
                engine = await self._started()
                return await self._fetch(engine, blob, progress)
            except (DeskgridError, OSError) as error:
                if engine is not None and not engine.running and not is_last:
                    continue  # with another engine it goes on where this one died
                _log.warning("not_fetched_from_others", blob=blob.sha256, error=str(error))
                break
        self._cache.forget_shared(blob.sha256)
        return None

    async def _fetch(self, engine: Engine, blob: Blob, progress: Callable[[int], None]) -> Path | None:
        part = self._cache.part_file(blob.sha256)
        swarm = self._swarm(engine, blob)
        self._fetching.add(blob.sha256)
        self._wanted_at = self._clock.monotonic()
        try:
            if not await swarm.fetch(part.name, progress):
                return None
            if not await swarm.is_written(partial(_has, part, blob.sha256)):
                raise ProtocolError("what came from others is something else, though each piece was what the torrent says")
            await in_thread(_sync, part)
            if not (self._cache.room_for_others() and await engine.do(Rename(swarm.name, blob.sha256))):
                swarm.leave()
                return part
            self._cache.keep_for_others(blob.sha256)
            self._shared[blob.sha256], self._due[blob.sha256] = swarm, 0.0
            self._news.set()
            _log.info("fetched_from_others", blob=blob.sha256, size_bytes=blob.size_bytes, of_server_bytes=swarm.server_bytes)
            return self._cache.shared_file(blob.sha256)
        except BaseException:
            swarm.leave()
            raise
        finally:
            self._fetching.discard(blob.sha256)

    def _swarm(self, engine: Engine, blob: Blob) -> Swarm:
        if self._identity is None:
            made = make_identity()
            self._identity = made if self._near is None else msgspec.structs.replace(made, addresses=lambda: ())
        turn = partial(self._take_turn, blob.sha256)
        door = self._joining.door if self._joining is not None else None
        return Swarm(
            blob,
            torrent_name(blob.sha256),
            engine,
            self._identity,
            turn,
            self._connection.read,
            self._clock,
            door=door,
            near=self._near,
        )

    async def _take_turn(self, sha256: Sha256, turn: Turn) -> TurnAnswer:
        if self._joining is not None and self._joining.joined:
            turn = msgspec.structs.replace(turn, joined=True)
        return await self._connection.call(wire.TAKE_TURN, turn, path={"sha256": sha256})

    async def _started(self) -> Engine:
        """Return the engine, started if it is not there. Raise Unreachable."""
        async with self._starting:
            if self._engine is not None and not self._engine.running:
                await self._stop_engine()
            if self._engine is None:
                if not can_share():
                    raise Unreachable("libtorrent is not installed", hint="pip install deskgrid[swarm]")
                if self._near is not None:
                    self._near = await _found(self._near)
                engine = Engine(
                    engine_command(self._cache.shared_folder), str(self._cache.shared_folder), port=self._settings.share_port
                )
                await engine.start()
                self._engine = engine
                self.obey()
            if self._joining is not None:
                await self._joining.start(self._port)
            return self._engine

    def cpu_s(self) -> float:
        """Return the CPU seconds that the engine has used."""
        return self._engine.cpu_s() if self._engine is not None else 0.0

    def obey(self) -> None:
        """Do what the owner wants now: nothing goes to or from others while the worker is paused."""
        if self._engine is not None:
            with contextlib.suppress(Unreachable):
                self._engine.tell(Limit(*engine_bounds(self._settings), self._paused()))

    # ---- giving

    def want(self, blobs: Iterable[Sha256]) -> None:
        """Hear what others fetch now, of what is here."""
        wanted = frozenset(blob for blob in blobs if blob not in self._shared)
        if wanted and self._settings.share:
            self._wanted = wanted
            self._news.set()
        else:
            self._pulse()

    def _pulse(self) -> None:
        heard, self._heard = self._heard, asyncio.Event()
        heard.set()

    async def dial(self) -> socket.socket:
        """Connect to the engine, for a worker in a machine on this PC that fetches something. Raise Unreachable.

        What that is, the server tells.
        """
        if not self._settings.share or self._paused():
            raise Unreachable("nothing is shared here")
        if (now := self._clock.monotonic()) - self._asked_at > _ASK_GAP_S:
            self._asked_at, heard = now, self._heard
            self._changed()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(_HEAR_S):
                    await heard.wait()
        return await connect_engine(self._port())

    def _port(self) -> int:
        return self._engine.port if self._engine is not None else 0

    async def run(self) -> None:
        """Give to others what is here, until cancelled."""
        try:
            while True:
                await self._give()
                pause_s = min([_QUIET_INTERVAL_S, *(due - self._clock.monotonic() for due in self._due.values())])
                await wait_for_event(self._news, self._clock, max(pause_s, 0.05))
                self._news.clear()
        finally:
            await self.close()

    async def _begin_to_give(self) -> None:
        wanted, self._wanted = self._wanted, frozenset()
        if not wanted:
            return
        for sha256 in wanted:
            file = self._cache.shared_file(sha256)
            if file is None or sha256 in self._shared or self._paused():
                continue
            try:
                swarm = self._swarm(await self._started(), Blob(sha256=sha256, size_bytes=file.stat().st_size))
                try:
                    is_shared = await swarm.share(file.name)
                except BaseException:
                    swarm.leave()
                    raise
                if is_shared:
                    self._shared[sha256], self._due[sha256] = swarm, 0.0
                    self._wanted_at = self._clock.monotonic()
            except (DeskgridError, OSError) as error:
                _log.warning("not_given_to_others", blob=sha256, error=str(error))
        self._pulse()

    async def _give(self) -> None:
        await self._begin_to_give()
        now = self._clock.monotonic()
        for sha256, swarm in list(self._shared.items()):
            if now < self._due.get(sha256, 0.0) or self._paused():
                continue
            try:
                interval_s = await swarm.keep_sharing()
                if swarm.lacking:
                    self._wanted_at = now
                self._due[sha256] = now + (interval_s if swarm.lacking else _QUIET_INTERVAL_S)
            except (NotFound, Conflict):
                self._cache.forget_shared(sha256)
                self._dropped(sha256)
            except DeskgridError as error:
                _log.debug("turn_failed", blob=sha256, error=str(error))
                self._due[sha256] = now + _QUIET_INTERVAL_S / 4
        if self._engine is not None and not self._fetching and now - self._wanted_at > IDLE_S:
            async with self._starting:
                await self._stop_engine()

    def _dropped(self, sha256: Sha256) -> None:
        """Hear that a blob is not in the cache any more."""
        swarm = self._shared.pop(sha256, None)
        self._due.pop(sha256, None)
        if swarm is not None:
            swarm.leave()

    async def close(self) -> None:
        """End the engine. Idempotent."""
        await self._stop_engine()

    async def _stop_engine(self) -> None:
        engine, self._engine = self._engine, None
        self._shared.clear()
        self._due.clear()
        if engine is not None:
            await engine.close()
        if self._joining is not None:
            await self._joining.close()


def engine_bounds(settings: WorkerSettings) -> tuple[int, int]:
    """Return the bytes that may go to other workers and come from them in a second; 0: no bound."""
    quarter = settings.network_bytes_per_s // 4
    bounds = [bound for bound in (quarter, settings.share_bytes_per_s) if bound]
    return min(bounds, default=0), quarter


def own_bound(settings: WorkerSettings) -> int:
    """Return what of the owner's bound on the network is for all else: with sharing half of it, for BitTorrent counts for itself. 0: no bound."""
    return settings.network_bytes_per_s // 2 if settings.share else settings.network_bytes_per_s


def _host_port(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or not 1 <= int(port) <= 65535:
        raise InvalidInput(f"{text[:100]!r} is no HOST:PORT", where="share_near", hint="as in cache:8475")
    return host, int(port)


async def _found(near: tuple[str, int]) -> tuple[str, int]:
    """Return the address that a name stands for. Raise Unreachable."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(*near, family=socket.AF_INET, type=socket.SOCK_STREAM)
    except OSError as error:
        raise Unreachable(f"{near[0]} is not found: {error.strerror}") from error
    return str(found[0][4][0]), near[1]


async def _has(file: Path, sha256: Sha256) -> bool:
    return await in_thread(sha256_of, file) == sha256


def _sync(file: Path) -> None:
    with file.open("rb+") as opened:
        os.fsync(opened.fileno())
