"""The store contract on SQLite."""

from __future__ import annotations

import sqlite3
from importlib import resources
from pathlib import Path

import pytest

from deskgrid.clock import FakeClock
from deskgrid.errors import OperatorError, StoreUnavailable
from deskgrid.server.store.engine import SqlStore, sqlite_url
from deskgrid.server.store.migrate import migrate
from deskgrid.server.store.schema import metadata
from deskgrid.testing.store_contract import StoreContract


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def store(tmp_path: Path, clock: FakeClock):
    url = sqlite_url(tmp_path / "grid.sqlite")
    migrate(url)
    opened = SqlStore(url, clock)
    yield opened
    await opened.close()


class TestSqlite(StoreContract):
    """All claims of the contract."""


def test_migrations_make_exactly_the_tables_of_the_schema(tmp_path: Path):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    from deskgrid.server.store.engine import open_engine

    url = sqlite_url(tmp_path / "grid.sqlite")
    migrate(url)
    engine = open_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_database_of_the_first_version_keeps_what_is_in_it(tmp_path: Path):
    from alembic import command
    from alembic.config import Config

    from deskgrid.server.store.engine import open_engine

    url = sqlite_url(tmp_path / "grid.sqlite")
    config = Config()
    config.set_main_option("script_location", str(resources.files("deskgrid.server.store") / "migrations"))
    engine = open_engine(url)
    with engine.connect() as connection:
        config.attributes["connection"] = connection
        command.upgrade(config, "0001")
        connection.exec_driver_sql("insert into account (id, name, admin, created_at) values (3, 'ann', 0, 1.0)")
        for number in (1, 2):
            connection.exec_driver_sql(
                "insert into token (hash, role, account_id, label, created_at) values (?, 'user', 3, '', 1.0)", (f"h{number}",)
            )
        connection.exec_driver_sql("commit")
    migrate(url)
    with engine.connect() as connection:
        found = connection.exec_driver_sql("select id, hash, account_id, attempt_id, hub_id from token order by id").all()
        assert [tuple(row) for row in found] == [(1, "h1", 3, None, None), (2, "h2", 3, None, None)]
        connection.exec_driver_sql("delete from token where id = 2")
        connection.exec_driver_sql(
            "insert into token (hash, role, account_id, label, created_at) values ('h3', 'user', 3, '', 1.0)"
        )
        assert connection.exec_driver_sql("select max(id) from token").scalar() == 3
    engine.dispose()


def test_database_of_a_newer_deskgrid_is_refused(tmp_path: Path):
    url = sqlite_url(tmp_path / "grid.sqlite")
    migrate(url)
    with sqlite3.connect(tmp_path / "grid.sqlite") as connection:
        connection.execute("update alembic_version set version_num = '9999'")
    with pytest.raises(OperatorError, match="newer"):
        migrate(url)


def test_file_that_is_no_database_is_refused(tmp_path: Path):
    (tmp_path / "grid.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StoreUnavailable):
        migrate(sqlite_url(tmp_path / "grid.sqlite"))


async def test_acknowledged_writes_are_synced_to_disk(store: SqlStore):
    values = await store.read(
        lambda tx: [tx.connection.exec_driver_sql(f"PRAGMA {name}").scalar() for name in ("journal_mode", "synchronous")]
    )
    assert values == ["wal", 2]
