"""One blob fetched together with others, or given to them: turns with the server, pieces from the server and from neighbours.

What is decided stands in core/transfer.py; here it is done. A piece that comes from the server goes into the engine like one of a neighbour, and is
checked there. The blob's own sha256 is for the caller to check, at the end.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Protocol

import structlog
from msgspec import Struct

from deskgrid.clock import Clock
from deskgrid.core.torrents import piece_bytes, piece_count
from deskgrid.core.transfer import STUCK_S, all_pieces, pieces_of, set_from, set_to
from deskgrid.errors import Conflict, DeskgridError, NotFound, ProtocolError, Unreachable
from deskgrid.model.data import Blob
from deskgrid.model.swarm import Turn, TurnAnswer
from deskgrid.swarm.engine import Engine
from deskgrid.swarm.engine_words import Add, Certify, Connect, Flush, Piece, Remove, State

__all__ = ["Identity", "Source", "Swarm", "TakeTurn"]

_log = structlog.get_logger()

TakeTurn = Callable[[Turn], Awaitable[TurnAnswer]]
"""Asks the server about one blob."""

_READY_S = 30.0
"""For which the torrent is waited for: of large data it is made when it has been uploaded."""
_READY_GAP_S = 0.5
_FEEDERS = 2
"""Requests to the server at a time, so that it need not wait for us between two."""
_FEED_S = 1.0
"""Of the server's bytes that are asked for in one turn."""
_FIRST_FEED_BYTES, _MOST_FEED_BYTES = 1 << 20, 32 << 20
_CHECKED_S = 3.0
"""In which the engine has checked a piece that it was given."""
_RENEW_PART = 0.5
"""Of its lifetime, after which a certificate is renewed."""
_WRITTEN_AFTER_S = (0.2, 0.5, 1.0, 2.0, 0.0)
_NEAR_S = 3.0
"""Until who is near has heard what is fetched, and gives it if it is there."""
_PATIENCE_S = 120.0
"""In which nothing at all came, from nobody, after which it is given up."""


class Identity(Struct, frozen=True):
    """A key of this PC's and where it is in the network."""

    key_pem: str
    public_pem: str
    addresses: Callable[[], tuple[str, ...]]


class Source(Protocol):
    """Reads a range of a blob from the server."""

    def __call__(self, blob: Blob, first: int, size_bytes: int) -> AsyncIterator[bytes]: ...


class Swarm:
    """This PC's part in the swarm of one blob. `file` is its file's name in the engine's folder."""

    def __init__(
        self,
        blob: Blob,
        name: str,
        engine: Engine,
        identity: Identity,
        take_turn: TakeTurn,
        source: Source,
        clock: Clock,
        *,
        door: Callable[[str], int] | None = None,
        near: tuple[str, int] | None = None,
    ) -> None:
        """`door` returns the port on loopback that leads to a worker through the overlay, 0 if none does. `near` is the only neighbour, if given."""
        self.blob = blob
        self.name = name
        self._engine, self._identity = engine, identity
        self._take_turn, self._source, self._clock = take_turn, source, clock
        self._door, self._near = door, near
        self._count = piece_count(blob.size_bytes)
        self._piece_bytes = piece_bytes(blob.size_bytes)
        self._whole = all_pieces(self._count)
        self._feed_bytes = float(_FIRST_FEED_BYTES)
        self._asking = asyncio.Lock()
        self._asked_at, self._interval_s = -math.inf, 1.0
        self._nothing_until = -math.inf
        """The server had nothing to hand out: when it is asked again."""
        self._fed = 0
        """Pieces that come from the server just now."""
        self._given: dict[int, float] = {}
        """Those that the engine was given a moment ago and has not said to have."""
        self._gained_at = self._came_at = clock.monotonic()
        self._down_bytes = 0
        self._renew_at = 0.0
        self.lacking = 0
        """Other members that lack something, as of the last turn."""
        self.server_bytes = 0
        """Of pieces that the server sent."""

    # ---- fetching

    async def fetch(self, file: str, progress: Callable[[int], None]) -> bool:
        """Fetch all pieces into a file, going on with what is in it. Return False if the server has no torrent of the blob.

        Raise Unreachable if the engine is gone, or nothing comes at all; NotFound if the blob is not for this PC; Conflict if it will have no
        torrent; DeskgridError.
        """
        if not await self._enter(file, complete=False):
            return False
        tasks: list[asyncio.Task[None]] = []
        try:
            await self._until_checked()
            tasks += [asyncio.create_task(work()) for work in (self._keep_turning, *([self._feed] * _FEEDERS))]
            while self._have() != self._whole:
                changed = self._engine.changed
                self._note(self._engine.state(self.name), progress)
                for task in tasks:
                    if task.done():
                        task.result()
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(1.0):
                        await changed.wait()
            progress(self.blob.size_bytes)
        except BaseException:
            self.leave()
            raise
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        return True

    async def is_written(self, is_right: Callable[[], Awaitable[bool]]) -> bool:
        """Let all that was fetched be written to the file, and return whether that is right; what is not is asked for some times, for the last
        pieces may still be on their way to the file. Raise Unreachable if the engine is gone."""
        for pause_s in _WRITTEN_AFTER_S:
            await self._engine.do(Flush(self.name))
            if await is_right():
                return True
            await self._clock.sleep(pause_s)
        return False

    async def _enter(self, file: str, *, complete: bool) -> bool:
        deadline = self._clock.monotonic() + _READY_S
        have = set_to(self._whole, self._count) if complete else b""
        while True:
            asked_at = self._clock.monotonic()
            answer = await self._take_turn(self._turn(have=have, key=self._identity.public_pem, torrent=True))
            if answer.ready:
                break
            if self._clock.monotonic() >= deadline:
                return False
            await self._clock.sleep(_READY_GAP_S)
        self._renew_at = asked_at + answer.certificate_s * _RENEW_PART
        self._engine.tell(
            Add(
                name=self.name,
                file=file,
                torrent=answer.torrent,
                certificate=answer.certificate,
                key=self._identity.key_pem,
                complete=complete,
            )
        )
        self._follow(answer)
        return True

    async def _until_checked(self) -> None:
        while True:
            changed, state = self._engine.changed, self._engine.state(self.name)
            if state.error:
                raise ProtocolError(f"the file cannot be shared: {state.error}")
            if state.checked:
                return
            await changed.wait()

    def _note(self, state: State, progress: Callable[[int], None]) -> None:
        """Look at how it stands. Raise ProtocolError for what cannot go on, Unreachable if nothing comes for long."""
        now = self._clock.monotonic()
        if state.error:
            raise ProtocolError(f"fetching together failed: {state.error}")
        if state.down_bytes > self._down_bytes:
            self._down_bytes, self._gained_at = state.down_bytes, now
        if now - max(self._gained_at, self._came_at) > _PATIENCE_S:
            raise Unreachable("nothing comes, neither from the server nor from neighbours")
        have = set_from(state.have, self._count).bit_count()
        progress(min(have * self._piece_bytes, self.blob.size_bytes))

    def _have(self) -> int:
        return set_from(self._engine.state(self.name).have, self._count)

    def _turn(self, *, have: bytes | None = None, wanted: int = 0, key: str = "", torrent: bool = False) -> Turn:
        stuck = self._clock.monotonic() - self._gained_at > STUCK_S
        return Turn(
            have=self._engine.state(self.name).have if have is None else have,
            fetching=set_to(self._fed | self._on_the_way(), self._count),
            wanted=wanted,
            stuck=stuck,
            port=self._engine.port,
            addresses=self._identity.addresses(),
            key=key,
            torrent=torrent,
        )

    def _on_the_way(self) -> int:
        """Return the pieces that the engine is just checking."""
        now, pieces = self._clock.monotonic(), 0
        self._given = {piece: at for piece, at in self._given.items() if now < at + _CHECKED_S}
        for piece in self._given:
            pieces |= 1 << piece
        return pieces

    async def _ask(self, wanted: int = 0) -> int:
        """Take a turn, one at a time: what is being fetched must be known to the next. Return the pieces that the server hands out, none without
        asking if it had none a moment ago. Renews the certificate when it is time."""
        async with self._asking:
            now = self._clock.monotonic()
            if wanted and now < self._nothing_until:
                return 0
            self._asked_at, renews = now, now >= self._renew_at
            answer = await self._take_turn(self._turn(wanted=wanted, key=self._identity.public_pem if renews else ""))
            if answer.certificate:
                self._engine.tell(Certify(self.name, answer.certificate, self._identity.key_pem))
                self._renew_at = now + answer.certificate_s * _RENEW_PART
            self._follow(answer)
            self._asked_at = self._clock.monotonic()
            take = set_from(answer.take, self._count)
            self._fed |= take
            if wanted and not take:
                self._nothing_until = self._clock.monotonic() + self._interval_s
            return take

    def _follow(self, answer: TurnAnswer) -> None:
        self.lacking, self._interval_s = answer.lacking, answer.interval_s
        if self._near is not None:
            self._engine.tell(Connect(self.name, (self._near,)))
            return
        found = [(one.address, one.port) for one in answer.neighbours if not one.peer]
        if self._door is not None:
            found += [("127.0.0.1", self._door(one.peer)) for one in answer.neighbours if one.peer]
        if reached := tuple((address, port) for address, port in found if port):
            self._engine.tell(Connect(self.name, reached))

    async def _keep_turning(self) -> None:
        """Tell the server what is here, also while nothing is fetched from it."""
        while True:
            pause_s = self._asked_at + self._interval_s - self._clock.monotonic()
            if pause_s > 0:
                await self._clock.sleep(pause_s)
                continue
            try:
                await self._ask()
            except (NotFound, Conflict):
                raise
            except DeskgridError:
                pass  # neighbours go on giving while the server is away

    async def _feed(self) -> None:
        """Fetch from the server what it hands out, again and again."""
        if self._near is not None:
            await self._clock.sleep(_NEAR_S)
        while True:
            pause_s = self._nothing_until - self._clock.monotonic()
            try:
                if pause_s <= 0:
                    take = await self._ask(max(1, round(self._feed_bytes / self._piece_bytes)))
                    if take:
                        await self._fetch_pieces(take)
            except (NotFound, Conflict):
                raise
            except DeskgridError as error:
                _log.debug("feed_failed", blob=self.blob.sha256, error=str(error))
                pause_s = 2.0
            if pause_s > 0:
                await self._clock.sleep(pause_s)

    async def _fetch_pieces(self, take: int) -> None:
        started, before = self._clock.monotonic(), self.server_bytes
        try:
            for first, last in _runs(pieces_of(take)):
                await self._fetch_run(first, last)
        finally:
            self._fed &= ~take
        seconds = self._clock.monotonic() - started
        if seconds > 0:
            rate = (self.server_bytes - before) / seconds
            self._feed_bytes = min(max(rate * _FEED_S, self._piece_bytes), _MOST_FEED_BYTES)

    async def _fetch_run(self, first: int, last: int) -> None:
        """Fetch neighbouring pieces in one request; each goes into the engine when it is there."""
        start = first * self._piece_bytes
        size = min((last + 1) * self._piece_bytes, self.blob.size_bytes) - start
        piece, kept = first, bytearray()
        async for chunk in self._source(self.blob, start, size):
            kept += chunk
            while len(kept) >= self._piece_bytes or (piece == last and len(kept) == size - (piece - first) * self._piece_bytes):
                data = bytes(kept[: self._piece_bytes])
                del kept[: self._piece_bytes]
                await self._engine.give(Piece(self.name, piece, data))
                self.server_bytes += len(data)
                self._came_at = self._given[piece] = self._clock.monotonic()
                piece += 1
                if piece > last:
                    return
        raise Unreachable("the server sent less than was asked for")

    # ---- giving

    async def share(self, file: str) -> bool:
        """Give a file, which is complete and verified, to others from now on; return False if the server has no torrent of it. Then call
        `keep_sharing`. Raise as `fetch` does."""
        if not await self._enter(file, complete=True):
            return False
        await self._until_checked()
        return True

    async def keep_sharing(self) -> float:
        """Take a turn as one who has all; return the seconds until the next. Raise NotFound or Conflict if it is not shared any more."""
        await self._ask()
        return self._interval_s

    def leave(self) -> None:
        """Take no part any more. The file stays."""
        with contextlib.suppress(Unreachable):
            self._engine.tell(Remove(self.name))


def _runs(pieces: list[int]) -> list[tuple[int, int]]:
    """Return the first and last of each run of neighbouring numbers."""
    runs: list[tuple[int, int]] = []
    for piece in pieces:
        if runs and runs[-1][1] + 1 == piece:
            runs[-1] = (runs[-1][0], piece)
        else:
            runs.append((piece, piece))
    return runs
