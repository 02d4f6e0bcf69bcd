"""Live output of one attempt on its way to the server: in batches, in order, bounded, and harmless if it does not get there.

A stream is forwarded without gaps up to a bound, counted in its own bytes, which are the offsets that the server knows; so bytes sent
twice (a lost answer, a restart of the worker) do no harm. What the agent did not tell live is completed at the
end from the report that it left on scratch.
"""

from __future__ import annotations

import asyncio
import random

import structlog

from deskgrid.clock import Clock
from deskgrid.core.backoff import delay_s
from deskgrid.errors import DeskgridError, StoreUnavailable, Unreachable
from deskgrid.machines.driver import Stream
from deskgrid.model import wire
from deskgrid.model.ids import AttemptId
from deskgrid.worker.connection import Connection

__all__ = ["LiveOutput"]

_log = structlog.get_logger()

_BATCH_S = 1.0
"""At most one call in this time, while output comes."""
_CHUNK_BYTES = 256 << 10
_PENDING_BYTES = 1 << 20
"""Kept in memory per stream until the server has it."""
_STREAM_BYTES = 8 << 20
"""Forwarded of one stream in all: a guest may write for ever."""
_MAX_BACKOFF_S = 30.0


class _Lane:
    """One stream: `pending` begins at `offset`."""

    def __init__(self) -> None:
        self.offset = 0
        self.pending = bytearray()
        self.cut = False

    def feed(self, data: bytes) -> None:
        if self.cut or len(self.pending) + len(data) > _PENDING_BYTES or self.offset >= _STREAM_BYTES:
            # From here on nothing, rather than a gap that could not be filled at the end.
            self.cut = True
            return
        self.pending += data

    def complete(self, whole: bytes) -> None:
        if len(whole) >= self.offset:
            self.pending = bytearray(whole[self.offset :])

    def sent(self, count: int) -> None:
        self.offset += count
        del self.pending[:count]


class LiveOutput:
    """The streams of one attempt. `feed` never waits; `run` forwards until it is cancelled; `drain` until all is there."""

    def __init__(self, attempt_id: AttemptId, connection: Connection, clock: Clock, rng: random.Random) -> None:
        self._attempt_id = attempt_id
        self._connection = connection
        self._clock = clock
        self._rng = rng
        self._lanes = {stream: _Lane() for stream in Stream}
        self._news = asyncio.Event()
        self._refused = False

    def feed(self, stream: Stream, data: bytes) -> None:
        """Take output as it came."""
        self._lanes[stream].feed(data)
        self._news.set()

    def complete(self, stream: Stream, whole: bytes) -> None:
        """Take a stream from its beginning to its end; what was sent already is not sent again."""
        self._lanes[stream].complete(whole)
        self._news.set()

    def close(self) -> None:
        """Send nothing more."""
        self._refused = True

    async def run(self) -> None:
        """Forward until cancelled."""
        while True:
            await self._news.wait()
            await self.drain()
            await self._clock.sleep(_BATCH_S)

    async def drain(self) -> None:
        """Return once the server has all that came so far, or does not want it. Waits for a server that is away."""
        failures = 0
        self._news.clear()
        while (lane := self._next()) is not None and not self._refused:
            stream, chunk = lane, bytes(self._lanes[lane].pending[:_CHUNK_BYTES])
            try:
                await self._send(stream, chunk)
                failures = 0
            except (Unreachable, StoreUnavailable):
                failures += 1
                await self._clock.sleep(delay_s(failures, first_s=_BATCH_S, max_s=_MAX_BACKOFF_S, rng=self._rng))
            except DeskgridError as error:
                # The attempt may be over for the server; its output is not worth more than a line here.
                _log.info("output_not_wanted", attempt_id=self._attempt_id, error=str(error))
                self._refused = True

    async def _send(self, stream: Stream, chunk: bytes) -> None:
        lane = self._lanes[stream]
        call = wire.AppendLog(attempt_id=self._attempt_id, stream=stream.value, offset=lane.offset, data=chunk)
        await self._connection.call(wire.APPEND_LOG, call)
        lane.sent(len(chunk))

    def _next(self) -> Stream | None:
        return next((stream for stream, lane in self._lanes.items() if lane.pending), None)
