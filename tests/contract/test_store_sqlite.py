"""The store contract on SQLite."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from collections.abc import Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from deskgrid.clock import FakeClock
from deskgrid.errors import OperatorError, StoreUnavailable
from deskgrid.link import hash_secret
from deskgrid.model import wire
from deskgrid.model.jobs import AttemptState, JobSpec, Machine, Results
from deskgrid.model.machines import DriverName, Fingerprint, MachineKind, Network
from deskgrid.model.users import Role
from deskgrid.model.workers import AttemptReport, Capacity, Profile
from deskgrid.server import scheduler
from deskgrid.server.store import accounts, attempts, data, submissions, workers
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import SqlStore, Transaction, sqlite_url
from deskgrid.server.store.migrate import migrate
from deskgrid.server.store.schema import metadata
from deskgrid.server.store.statement import Statement
from deskgrid.server.store.submissions import NewSubmission
from deskgrid.settings import ServerSettings
from deskgrid.testing.databases import make_empty_database
from deskgrid.testing.store_contract import StoreContract
from deskgrid.units import GIB, MIB
from deskgrid.worker.slots import NOTHING


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def store(tmp_path: Path, clock: FakeClock):
    opened = SqlStore(make_empty_database(tmp_path / "grid.sqlite"), clock)
    yield opened
    await opened.close()


class TestSqlite(StoreContract):
    """All claims of the contract."""


async def test_no_call_of_a_worker_goes_through_a_whole_table(
    store: SqlStore, clock: FakeClock, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """With a hundred thousand workers one such statement is more than all the others."""
    ran: dict[str, Any] = {}
    bind = Statement.bind

    def noted(self: Statement, dialect: sa.Dialect, parameters: Mapping[str, Any]) -> tuple[str, Any]:
        text, values = bind(self, dialect, parameters)
        ran.setdefault(text, values)
        return text, values

    def note(_connection: Any, _cursor: Any, text: str, values: Any, *_: Any) -> None:
        ran.setdefault(text, values)

    monkeypatch.setattr(Statement, "bind", noted)
    sa.event.listen(sa.Engine, "before_cursor_execute", note)
    try:
        await _work(store, clock)
    finally:
        sa.event.remove(sa.Engine, "before_cursor_execute", note)
    with contextlib.closing(sqlite3.connect(tmp_path / "grid.sqlite")) as connection:
        plans = {text: connection.execute(f"EXPLAIN QUERY PLAN {text}", values).fetchall() for text, values in ran.items()}
    through = re.compile(r"SCAN (attempt|job|submission|token|upload|worker)(?! USING)")
    found = {text for text, plan in plans.items() if any(through.match(step) for *_, step in plan)}
    # Once in ten seconds, of all calls.
    assert {text for text in found if "worker.seen_at >" not in text} == set()
    assert len(plans) > 20


async def _work(store: SqlStore, clock: FakeClock) -> None:
    """Do what workers do all day: ask, run a job, fetch a file, end one job and lose another."""
    spec = JobSpec(machine=Machine(kind=MachineKind.PROCESS, memory_bytes=MIB), command=("true",), results=Results(paths=()))
    lent = Capacity(cpus=2, memory_bytes=GIB, disk_bytes=100 * GIB)
    driver = Fingerprint(DriverName.FAKE, tuple(MachineKind), True, networks=tuple(Network))
    profile = Profile(os="linux", arch="x86_64", drivers=(driver,), lent=lent, version="0")

    def people(tx: Transaction) -> tuple[Caller, Caller]:
        ann = accounts.add_account(tx, "ann", admin=False)
        pc = workers.add_worker(tx, "pc")
        accounts.add_token(tx, hash_secret("token"), role=Role.WORKER, label="", on=pc)
        return Caller(Role.USER, "ann", user_id=ann.id), Caller(Role.WORKER, "pc", worker_id=pc)

    ann, pc = await store.write(people)
    for _ in range(2):
        await store.write(lambda tx: submissions.submit_job(tx, ann, NewSubmission(spec=spec)))

    async def call(*reports: AttemptReport) -> wire.SyncAnswer:
        request = wire.Sync(profile=profile, paused=False, attempts=reports, free=lent if not reports else NOTHING, cached=())

        def decide(tx: Transaction) -> wire.SyncAnswer:
            accounts.authenticate(tx, "token")
            return scheduler.sync(tx, pc, request, ServerSettings(), "key")

        return await store.write(decide)

    first, second = (await call()).assignments
    running = [AttemptReport(attempt_id=one.attempt_id, state=AttemptState.RUNNING) for one in (first, second)]
    assert not (await call(*running)).cancelled
    assert not await store.read(lambda tx: data.may_read_blob(tx, pc, "0" * 64))
    ended = AttemptReport(attempt_id=first.attempt_id, state=AttemptState.SUCCEEDED, exit_code=0)
    assert (await call(ended, running[1])).acknowledged == (first.attempt_id,)
    await clock.advance(1e6)
    assert await store.write(attempts.expire_leases) == 1


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
