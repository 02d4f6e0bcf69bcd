"""Hints between server processes over one PostgreSQL: each listens for what the others' commits changed.

    NOTIFY deskgrid, 'ID TOPIC TOPIC ...'     ID: of the store that wrote (engine.py); "*" in the place of topics: everything

A notification goes with its commit, so there is none for what was undone and none is lost while the listener is connected. After it was not,
everything seems to have changed.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from random import Random

import sqlalchemy as sa
import structlog

from deskgrid.core.backoff import delay_s
from deskgrid.server.live import Live
from deskgrid.server.store.engine import CHANNEL, EVERYTHING, SqlStore, driver_url
from deskgrid.server.store.submissions import CHORES, WORK

__all__ = ["Elsewhere", "listen_forever"]

_log = structlog.get_logger("deskgrid.server")
_ASK_S = 15.0
"""Seconds of silence after which the connection is tried: an ended one need not say so."""
_LOOK_AGAIN_S = 0.05
"""Seconds at least between two new looks at what waits: others may submit hundreds of times a second."""
_MOST_SKEW_S = 2.0


class Elsewhere:
    """Passes on what other processes have changed: the board is looked at anew, then who waits is woken."""

    def __init__(self, store: SqlStore, live: Live) -> None:
        self._store = store
        self._live = live
        self._later: dict[str, None] = {}
        self._next_look = 0.0

    def hear(self, payload: str) -> None:
        """Take a notification, our own ones too."""
        sender, *topics = payload.split()
        if sender == self._store.id:
            return
        if EVERYTHING in topics:
            self.hear_all()
            return
        changes_board = [topic for topic in topics if topic in (WORK, CHORES)]
        self._live.notify([topic for topic in topics if topic not in (WORK, CHORES)])
        if not changes_board:
            return
        loop = asyncio.get_running_loop()
        if not self._later:
            loop.call_at(max(loop.time(), self._next_look), self._look_anew)
        self._later.update(dict.fromkeys(changes_board))

    def hear_all(self) -> None:
        """Treat everything as changed."""
        self._store.forget()
        self._live.notify_all()

    def _look_anew(self) -> None:
        topics, self._later = list(self._later), {}
        self._next_look = asyncio.get_running_loop().time() + _LOOK_AGAIN_S
        self._store.forget()
        self._live.notify(topics)


async def listen_forever(url: str, elsewhere: Elsewhere, rng: Random) -> None:
    """Listen to the other processes over a connection of its own, a new one whenever it is lost, until cancelled."""
    import psycopg

    address = sa.make_url(driver_url(url)).set(drivername="postgresql").render_as_string(hide_password=False)
    failures = 0
    while True:
        try:
            async with aclosing(_payloads(address)) as payloads:
                async for payload in payloads:
                    failures = 0
                    if payload is None:
                        elsewhere.hear_all()
                    else:
                        elsewhere.hear(payload)
        except (psycopg.Error, OSError) as error:
            failures += 1
            _log.warning("the connection that hears of other servers was lost", error=str(error).strip().partition("\n")[0])
        except Exception as error:
            failures += 1  # without hints a process still works, only later; its end would be worse
            _log.error("hearing of other servers failed", error=repr(error), exc_info=error)
        await asyncio.sleep(delay_s(max(1, failures), first_s=0.2, max_s=5.0, rng=rng))


async def _payloads(address: str) -> AsyncGenerator[str | None, None]:
    """Yield None once listening has begun, then what is heard. Raise psycopg.Error when the connection is lost."""
    import psycopg

    connection = await psycopg.AsyncConnection.connect(
        address, autocommit=True, connect_timeout=10, application_name="deskgrid hints"
    )
    async with connection:
        await connection.execute(f"LISTEN {CHANNEL}")
        yield None
        await _check_clock(connection)
        while True:
            async for heard in connection.notifies(timeout=_ASK_S):
                yield heard.payload
            async with asyncio.timeout(_ASK_S):
                await connection.execute("SELECT 1")


async def _check_clock(connection: object) -> None:
    """Say when this machine's clock is far from the database's: leases are counted with the clocks of all server processes."""
    before = time.time()
    cursor = await connection.execute("SELECT extract(epoch FROM clock_timestamp())")  # type: ignore[attr-defined]
    row = await cursor.fetchone()
    skew_s = float(row[0]) - (before + time.time()) / 2
    if abs(skew_s) > _MOST_SKEW_S:
        _log.error("this clock is not the database's", skew_s=round(skew_s, 1), hint="set the clocks by NTP")
