"""Databases of older versions are brought to this one's tables with all that is in them, on SQLite and on a real PostgreSQL."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from deskgrid.clock import FakeClock
from deskgrid.core.lifecycle import AttemptEvent
from deskgrid.model.ids import AttemptId, JobId, UserId, WorkerId
from deskgrid.model.jobs import AttemptState, JobState
from deskgrid.model.users import Role
from deskgrid.server.store import accounts, attempts, jobs, queues
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.attempts import Outcome
from deskgrid.server.store.engine import SqlStore, open_engine, sqlite_url
from deskgrid.server.store.migrate import migrate
from deskgrid.testing.postgresql import emptied, running_postgresql

SPEC = '{"machine":{"disk":"tiny","network":"none"},"name":"%s","limits":{"attempts":3}}'
SHA = "d" * 64
DISK = f'{{"blob":{{"sha256":"{SHA}","size_bytes":5}},"disk":{{"sha256":"{SHA}","size_bytes":5,"virtual_bytes":5,"format":"iso"}}}}'
KEY = '{"kind":"vm","network":"none","cpus":%d,"memory_bytes":268435456,"disk_bytes":1073741824,"disk":"' + "d" * 64 + '"}'

JOBS = {
    # number: (owner, class, state, attempts)
    4: (2, 1, "waiting", []),
    5: (2, 1, "waiting", ["lost", "refused"]),
    6: (2, 1, "active", ["failed", "running"]),
    7: (2, 2, "active", ["leased"]),
    8: (3, 1, "active", ["suspended"]),
    9: (3, 1, "completed", ["lost", "succeeded"]),
    10: (3, 2, "failed", ["failed", "failed", "failed"]),
    12: (2, 2, "cancelled", ["cancelled"]),
    13: (2, 2, "cancelled", []),
}


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_postgresql() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def url(request: Any, tmp_path: Path, server: str) -> str:
    """A database of the version before arrays, with jobs in all states."""
    found = sqlite_url(tmp_path / "grid.sqlite") if request.param == "sqlite" else emptied(server, "old")
    migrate(found, to="0002")
    engine = open_engine(found)
    tables = sa.MetaData()
    with engine.connect().execution_options(deskgrid_write=True) as connection, connection.begin():
        tables.reflect(connection)
        for name, rows in _old_rows().items():
            connection.execute(sa.insert(tables.tables[name]), rows)
            if engine.dialect.name == "postgresql" and "id" in tables.tables[name].columns:
                top = max(row["id"] for row in rows)
                connection.execute(sa.select(sa.func.setval(sa.func.pg_get_serial_sequence(name, "id"), top)))
    engine.dispose()
    return found


def _old_rows() -> dict[str, list[dict[str, Any]]]:
    listed = [(job_id, number, state) for job_id, job in JOBS.items() for number, state in enumerate(job[3], 1)]
    live = ("leased", "running", "suspended")
    return {
        "account": [
            {"id": number, "name": name, "admin": number == 1, "created_at": 1.0}
            for number, name in ((1, "admin"), (2, "ann"), (3, "bob"))
        ],
        "worker": [{"id": 7, "name": "pc", "joined_at": 1.0, "seen_at": 2.0, "paused": False, "cached": "[]", "profile": "{}"}],
        "token": [{"id": 3, "hash": "a" * 64, "role": "worker", "worker_id": 7, "label": "", "created_at": 1.0}],
        "requirement": [{"id": 1, "key": KEY % 1}, {"id": 2, "key": KEY % 2}],
        "queue": [{"class_id": 1, "owner_id": 2, "waiting": 2}],
        "job": [
            {
                "id": number,
                "owner_id": owner,
                "class_id": of,
                "state": state,
                "spec": SPEC % f"job{number}",
                "disk": DISK,
                "disk_blob": "d" * 64,
                "disk_sha256": "d" * 64,
                "context": "c" * 64 if number % 2 else None,
                "context_bytes": 9 if number % 2 else None,
                "result": "e" * 64 if state == "completed" else None,
                "result_bytes": 11 if state == "completed" else None,
                "exit_code": 0 if state == "completed" else None,
                "message": f"said {number}",
                "created_at": 100.0 + number,
                "finished_at": 200.0 + number if state in ("completed", "failed", "cancelled") else None,
            }
            for number, (owner, of, state, _) in JOBS.items()
        ],
        "attempt": [
            {
                "id": index,
                "job_id": job_id,
                "number": number,
                "worker_id": 7,
                "state": state,
                "leased_at": 50.0,
                "lease_expires_at": 1e12,
                "started_at": 51.0 if state != "leased" else None,
                "ended_at": None if state in live else 60.0,
                "reason": "",
            }
            for index, (job_id, number, state) in enumerate(listed, 20)
        ],
        "log_chunk": [{"attempt_id": 20, "stream": "stdout", "start": 0, "data": b"line\0\xff"}],
        "data": [
            {
                "id": 2,
                "name": "tiny",
                "version": 1,
                "kind": "disk",
                "sha256": "d" * 64,
                "size_bytes": 5,
                "owner_id": 1,
                "visibility": "public",
                "created_at": 1.0,
            }
        ],
        "blob": [{"sha256": "d" * 64, "size_bytes": 5, "created_at": 1.0}],
        "upload": [{"id": 5, "holder": "user:2", "sha256": "d" * 64, "size_bytes": 5, "complete": True, "touched_at": 1.0}],
        "idempotency": [{"principal": "user:2", "key": "k", "answer": b"{}", "created_at": 1.0}],
    }


async def test_every_job_attempt_and_line_is_there_after_the_upgrade(url: str):
    before, after = migrate(url)
    assert before == "0002" != after
    store = SqlStore(url, FakeClock())
    try:
        for number, (owner, _, state, tries) in JOBS.items():
            caller = Caller(Role.USER, "", user_id=UserId(owner))
            detail = await store.read(lambda tx, caller=caller, number=number: jobs.get_job(tx, caller, JobId(number)))
            assert (detail.job.state, [one.state for one in detail.attempts]) == (state, tries), f"job {number}"
            assert (detail.job.spec.name, detail.job.message, detail.job.created_at) == (
                f"job{number}",
                f"said {number}",
                100.0 + number,
            )
            assert detail.job.context == ("c" * 64 if number % 2 else None)
            assert detail.job.result == ("e" * 64 if state == "completed" else None)
            assert detail.job.finished_at == (200.0 + number if state in ("completed", "failed", "cancelled") else None)
        counts = await store.read(queues.count_states)
        states = [JobState(job[2]) for job in JOBS.values()]
        assert counts == {state: states.count(state) for state in JobState}
        assert await store.read(lambda tx: jobs.read_log(tx, AttemptId(20), "stdout", 0, 100)) == (0, b"line\0\xff")
        listed, more = await store.read(lambda tx: jobs.list_jobs(tx, owner=None, state=None, before=None, limit=100))
        assert (sorted(one.id for one in listed), more) == (sorted(JOBS), False)
    finally:
        await store.close()


async def test_old_jobs_go_on_after_the_upgrade_and_new_numbers_are_new(url: str):
    migrate(url)
    store = SqlStore(url, FakeClock())
    try:
        live = await store.read(
            lambda tx: [row.id for row in tx.rows(sa.text("select id from attempt where state in ('running','leased')"))]
        )
        for held in live:
            outcome = Outcome(exit_code=0)
            assert await store.write(
                lambda tx, held=held, outcome=outcome: attempts.apply_event(tx, held, AttemptEvent.SUCCEEDED, outcome)
            )
        [waiting] = await store.write(lambda tx: queues.board(tx).queues())
        assert (waiting.waiting, waiting.owner_id, waiting.requirement.cpus) == (2, 2, 1)
        leased = await store.write(lambda tx: attempts.lease(tx, WorkerId(7), waiting.id, 5, 60.0))
        assert [(one.job_id, one.number) for one in leased] == [(4, 1), (5, 3)]
        assert leased[0].disk is not None
        counts = await store.read(queues.count_states)
        assert (counts[JobState.WAITING], counts[JobState.ACTIVE], counts[JobState.COMPLETED]) == (0, 3, 3)
        user = await store.write(lambda tx: accounts.add_account(tx, "new", admin=False))
        assert user.id == 4
        assert {row[0] for row in await store.read(lambda tx: tx.rows(sa.text("select max(id) from attempt")))} == {
            20 + sum(len(job[3]) for job in JOBS.values()) + 1
        }
        assert AttemptState.LOST in [one.state for one in (await store.read(_job_5)).attempts]
    finally:
        await store.close()


def _job_5(tx: Any) -> Any:
    return jobs.get_job(tx, Caller(Role.USER, "", user_id=UserId(2)), JobId(5))
