"""Many users and workers at several server processes over one store, at random, with connections and processes killed in between."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path
from random import Random

import pytest
import sqlalchemy as sa

from deskgrid.clock import FakeClock
from deskgrid.server.store.engine import SqlStore, open_engine, sqlite_url
from deskgrid.server.store.migrate import migrate
from deskgrid.testing.crowd import Crowd
from deskgrid.testing.postgresql import emptied, running_postgresql


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_postgresql() as url:
        yield url


@pytest.mark.parametrize("seed", range(2))
async def test_crowd_at_one_process_over_sqlite(tmp_path: Path, seed: int):
    url, clock = sqlite_url(tmp_path / "grid.sqlite"), FakeClock()
    migrate(url)
    store = SqlStore(url, clock)
    try:
        await Crowd(lambda: [store], clock, seed).live(users=3, calls=25, pcs=4)
    finally:
        await store.close()


@pytest.mark.parametrize("seed", range(3))
async def test_crowd_at_three_processes_over_postgresql_of_which_some_are_killed(server: str, seed: int):
    url, clock, rng = emptied(server, "crowd"), FakeClock(), Random(seed)
    migrate(url)
    stores = [SqlStore(url, clock) for _ in range(3)]
    killing = asyncio.create_task(_kill_now_and_then(url, clock, stores, rng))
    try:
        await Crowd(lambda: list(stores), clock, seed).live(users=3, calls=25, pcs=5)
        assert not killing.done()
    finally:
        killing.cancel()
        await asyncio.wait([killing])
        for store in stores:
            await store.close()


async def _kill_now_and_then(url: str, clock: FakeClock, stores: list[SqlStore], rng: Random) -> None:
    """Cut connections in the middle of what they do; and let a process go, whose place a new one takes."""
    engine = open_engine(url)
    cut = sa.text(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = current_database() AND pid <> pg_backend_pid() "
        "AND random() < 0.3"
    )
    try:
        while True:
            await asyncio.sleep(rng.uniform(0.05, 0.3))
            with contextlib.suppress(sa.exc.OperationalError), engine.connect() as connection:
                connection.execute(cut)
            if rng.random() < 0.3:
                old = stores.pop(rng.randrange(len(stores)))
                stores.append(SqlStore(url, clock))
                await old.close()
    finally:
        engine.dispose()
