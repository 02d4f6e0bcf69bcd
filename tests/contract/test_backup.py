"""Backups of real databases: what was there is there again, whichever database it came from, or nothing is."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from deskgrid.archive import zstd
from deskgrid.clock import FakeClock
from deskgrid.core.lifecycle import AttemptEvent
from deskgrid.errors import DeskgridError, InvalidInput, OperatorError
from deskgrid.model.data import Blob
from deskgrid.model.ids import Sha256
from deskgrid.model.jobs import JobSpec, Machine
from deskgrid.model.machines import MachineKind
from deskgrid.model.users import Role
from deskgrid.server.backup import back_up, restore
from deskgrid.server.setup import init_server
from deskgrid.server.store import accounts, attempts, jobs, queues, submissions, workers
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.attempts import Outcome
from deskgrid.server.store.engine import SqlStore, Transaction, open_engine, sqlite_url
from deskgrid.server.store.migrate import newest_revision
from deskgrid.server.store.submissions import NewSubmission
from deskgrid.settings import ServerSettings
from deskgrid.testing.postgresql import emptied, running_postgresql

BYTES = b"bytes of a result \0\xff" * 100
BLOB = Blob(sha256=Sha256(hashlib.sha256(BYTES).hexdigest()), size_bytes=len(BYTES))
SPEC = JobSpec(machine=Machine(kind=MachineKind.PROCESS))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_postgresql() as url:
        yield url


@pytest.fixture(params=["sqlite", "postgresql"])
def source(request: Any, tmp_path: Path, server: str) -> str:
    return sqlite_url(tmp_path / "grid" / "grid.sqlite") if request.param == "sqlite" else emptied(server, "source")


@pytest.fixture(params=["sqlite", "postgresql"])
def target(request: Any, tmp_path: Path, server: str) -> str:
    (tmp_path / "new").mkdir()
    return sqlite_url(tmp_path / "new" / "grid.sqlite") if request.param == "sqlite" else emptied(server, "target")


async def make_grid(home: Path, url: str) -> None:
    """A grid with jobs in all states, output, an array, a result's bytes, and a user who is gone again."""
    await init_server(home, ServerSettings(database=url))
    place = home / "blobs" / BLOB.sha256[:2] / BLOB.sha256
    place.parent.mkdir(parents=True)
    place.write_bytes(BYTES)
    store = SqlStore(url, FakeClock())
    await store.write(_fill)
    await store.close()


def _fill(tx: Transaction) -> None:
    ann = Caller(Role.USER, "ann", user_id=accounts.add_account(tx, "ann", admin=False).id)
    gone = accounts.add_account(tx, "gone", admin=False)
    tx.run(sa.text(f"delete from account where id = {int(gone.id)}"))
    tx.run(sa.text(f"insert into blob (sha256, size_bytes, created_at) values ('{BLOB.sha256}', {BLOB.size_bytes}, 1.5)"))
    pc = workers.add_worker(tx, "pc")
    ids = [submissions.submit_job(tx, ann, NewSubmission(spec=SPEC)) for _ in range(5)]
    array = submissions.submit_array(tx, ann, NewSubmission(spec=SPEC), 7)
    submissions.fill(tx, array, 5)
    tx.settle()
    queue_id = tx.value(sa.text(f"select queue_id from job where id = {int(ids[0])}"))
    held = attempts.lease(tx, pc, queue_id, 4, 60.0)
    events = (AttemptEvent.SUCCEEDED, AttemptEvent.FAILED, AttemptEvent.STARTED)
    for one, event in zip(held, events, strict=False):
        attempts.apply_event(tx, one.attempt_id, event, Outcome(exit_code=0, reason="why", result=BLOB, value=b"\0\xffv"))
    jobs.append_log(tx, held[2].attempt_id, "stdout", 0, b"line\n\0\xfe", 100)
    jobs.cancel_job(tx, ann, ids[4], "not wanted")


def everything(url: str) -> dict[str, list[tuple[Any, ...]]]:
    engine = open_engine(url)
    found = sa.MetaData()
    with engine.connect() as connection:
        found.reflect(connection)
        rows = {
            table.name: sorted(
                map(tuple, connection.execute(sa.select(*sorted(table.columns, key=lambda c: str(c.name))))), key=repr
            )
            for table in found.sorted_tables
        }
    engine.dispose()
    return rows


async def test_restored_grid_has_every_row_key_and_byte(tmp_path: Path, source: str, target: str):
    await make_grid(tmp_path / "grid", source)
    wrote = back_up(source, tmp_path / "grid", tmp_path / "b", blobs=True, keys=True)
    read = restore(target, tmp_path / "new", tmp_path / "b")
    assert everything(target) == everything(source)
    assert (read.rows, read.blobs, read.keys) == (wrote.rows, 1, wrote.keys)
    assert (tmp_path / "new" / "blobs" / BLOB.sha256[:2] / BLOB.sha256).read_bytes() == BYTES
    for key in (tmp_path / "grid" / "authority").glob("*.key"):
        copy = tmp_path / "new" / "authority" / key.name
        assert copy.read_bytes() == key.read_bytes()
        assert copy.stat().st_mode & 0o777 == 0o600


async def test_restored_grid_goes_on_where_it_stopped(tmp_path: Path, source: str, target: str):
    await make_grid(tmp_path / "grid", source)
    back_up(source, tmp_path / "grid", tmp_path / "b")
    restore(target, tmp_path / "new", tmp_path / "b")
    store = SqlStore(target, FakeClock())
    try:
        before, last = await store.read(lambda tx: (queues.count_states(tx), tx.value(sa.text("select max(id) from account"))))
        new = await store.write(lambda tx: accounts.add_account(tx, "new", admin=False))
        assert new.id > last + 1, "the number of the user who is gone is not given out again"
        ann = Caller(Role.USER, "new", user_id=new.id)
        await store.write(lambda tx: submissions.submit_job(tx, ann, NewSubmission(spec=SPEC)))
        live = await store.read(lambda tx: tx.rows(sa.text("select id from attempt where state in ('leased', 'running')")))
        for row in live:
            assert await store.write(
                lambda tx, row=row: attempts.apply_event(tx, row.id, AttemptEvent.SUCCEEDED, Outcome(exit_code=0))
            )
        after = await store.read(queues.count_states)
        assert sum(after.values()) == sum(before.values()) + 1
    finally:
        await store.close()


async def test_backup_is_for_its_owner_only_and_takes_nothings_place(tmp_path: Path):
    url = sqlite_url(tmp_path / "grid" / "grid.sqlite")
    await make_grid(tmp_path / "grid", url)
    back_up(url, tmp_path / "grid", tmp_path / "b")
    assert (tmp_path / "b").stat().st_mode & 0o777 == 0o600
    with pytest.raises(InvalidInput, match="already"):
        back_up(url, tmp_path / "grid", tmp_path / "b")


async def test_backup_that_fails_leaves_nothing(tmp_path: Path):
    url = sqlite_url(tmp_path / "grid" / "grid.sqlite")
    await make_grid(tmp_path / "grid", url)
    (tmp_path / "out").mkdir()
    with pytest.raises(OperatorError, match="keys"):
        back_up(url, tmp_path / "elsewhere", tmp_path / "out" / "b", keys=True)
    assert os.listdir(tmp_path / "out") == []


async def test_database_with_a_grid_in_it_is_left_alone(tmp_path: Path):
    url = sqlite_url(tmp_path / "grid" / "grid.sqlite")
    await make_grid(tmp_path / "grid", url)
    back_up(url, tmp_path / "grid", tmp_path / "b")
    before = everything(url)
    with pytest.raises(InvalidInput, match="not empty"):
        restore(url, tmp_path / "grid", tmp_path / "b")
    assert everything(url) == before


async def test_other_keys_are_left_alone(tmp_path: Path):
    url = sqlite_url(tmp_path / "grid" / "grid.sqlite")
    await make_grid(tmp_path / "grid", url)
    back_up(url, tmp_path / "grid", tmp_path / "b", keys=True)
    (tmp_path / "new" / "authority").mkdir(parents=True)
    (tmp_path / "new" / "authority" / "authority.key").write_bytes(b"another")
    with pytest.raises(OperatorError, match="another key"):
        restore(sqlite_url(tmp_path / "new" / "grid.sqlite"), tmp_path / "new", tmp_path / "b")
    assert (tmp_path / "new" / "authority" / "authority.key").read_bytes() == b"another"


@pytest.mark.parametrize("keep", [0, 10, 0.3, 0.7, 0.999])
async def test_part_of_a_backup_is_refused_and_leaves_nothing(tmp_path: Path, keep: float):
    url = sqlite_url(tmp_path / "grid" / "grid.sqlite")
    await make_grid(tmp_path / "grid", url)
    back_up(url, tmp_path / "grid", tmp_path / "b", blobs=True, keys=True)
    whole = (tmp_path / "b").read_bytes()
    (tmp_path / "b").write_bytes(whole[: int(keep if keep >= 1 else len(whole) * keep)])
    _refused(tmp_path)


@pytest.mark.parametrize("seed", range(8))
async def test_damaged_backup_is_refused_and_leaves_nothing(tmp_path: Path, seed: int):
    url = sqlite_url(tmp_path / "grid" / "grid.sqlite")
    await make_grid(tmp_path / "grid", url)
    back_up(url, tmp_path / "grid", tmp_path / "b", blobs=True, keys=True)
    plain = bytearray(zstd.decompress((tmp_path / "b").read_bytes()))
    names = [b'"revision"', b'"rows"', BLOB.sha256.encode(), b'"waiting"', b"BEGIN", b'"ann"', BYTES[:20], b"process"]
    at = plain.find(names[seed])
    assert at >= 0
    plain[at + 2] ^= 1
    (tmp_path / "b").write_bytes(zstd.compress(bytes(plain)))
    _refused(tmp_path)


def _refused(folder: Path) -> None:
    url = sqlite_url(folder / "new" / "grid.sqlite")
    (folder / "new").mkdir()
    with pytest.raises(DeskgridError):
        restore(url, folder / "new", folder / "b")
    assert [file for file in (folder / "new").rglob("*") if file.is_file() and not file.name.startswith("grid.sqlite")] == []
    assert all(not rows for name, rows in everything(url).items() if name != "alembic_version")


async def test_backup_of_a_newer_deskgrid_is_refused(tmp_path: Path):
    url = sqlite_url(tmp_path / "grid" / "grid.sqlite")
    await make_grid(tmp_path / "grid", url)
    back_up(url, tmp_path / "grid", tmp_path / "b")
    plain = zstd.decompress((tmp_path / "b").read_bytes())
    newer = plain.replace(f'"revision":"{newest_revision()}"'.encode(), b'"revision":"9999"', 1)
    (tmp_path / "b").write_bytes(zstd.compress(newer))
    with pytest.raises(OperatorError, match="newer"):
        restore(sqlite_url(tmp_path / "new.sqlite"), tmp_path / "new", tmp_path / "b")
