"""The store contract on a real PostgreSQL: what our SQL must be able to do from the first day."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import sqlalchemy as sa

from deskgrid.clock import FakeClock
from deskgrid.server.store.engine import SqlStore
from deskgrid.server.store.migrate import migrate
from deskgrid.testing.postgresql import running_postgresql
from deskgrid.testing.store_contract import StoreContract


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_postgresql() as url:
        yield url


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def store(server: str, clock: FakeClock):
    engine = sa.create_engine(server)
    with engine.begin() as connection:
        connection.execute(sa.text("drop schema public cascade"))
        connection.execute(sa.text("create schema public"))
    engine.dispose()
    migrate(server)
    opened = SqlStore(server, clock)
    yield opened
    await opened.close()


class TestPostgresql(StoreContract):
    """All claims of the contract."""
