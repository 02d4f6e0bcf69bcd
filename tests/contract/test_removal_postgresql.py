"""What is kept and what goes, on PostgreSQL, where processes really run at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator

import msgspec
import pytest
import sqlalchemy as sa

from deskgrid.clock import FakeClock
from deskgrid.errors import Conflict
from deskgrid.model.data import Blob
from deskgrid.model.ids import Sha256
from deskgrid.model.jobs import JobSpec, Limits, Machine
from deskgrid.model.machines import MachineKind
from deskgrid.model.users import Role
from deskgrid.server.store import accounts, data, jobs, retention, storage, submissions, workers
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import SqlStore, Transaction, driver_url
from deskgrid.server.store.migrate import migrate
from deskgrid.server.store.schema import blob, idempotency, job, queue, submission, upload
from deskgrid.server.store.submissions import NewSubmission
from deskgrid.testing.grids import played_sync
from deskgrid.testing.postgresql import emptied, running_postgresql

SPEC = JobSpec(machine=Machine(kind=MachineKind.PROCESS), command=("true",), limits=Limits(attempts=1), retain_s=1000)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_postgresql() as url:
        yield url


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
async def stores(server: str, clock: FakeClock) -> AsyncIterator[list[SqlStore]]:
    url = emptied(server, "removal")
    migrate(url)
    opened = [SqlStore(driver_url(url), clock) for _ in range(2)]
    yield opened
    for store in opened:
        await store.close()


async def person(store: SqlStore) -> Caller:
    user = await store.write(lambda tx: accounts.add_account(tx, "ann", admin=False))
    return Caller(Role.USER, "ann", user_id=user.id)


def blob_number(number: int) -> Blob:
    return Blob(sha256=Sha256(f"{number:064x}"), size_bytes=number + 1)


def send(tx: Transaction, caller: Caller, wanted: Blob) -> None:
    data.finish_upload(tx, data.begin_upload(tx, caller, wanted)[0].id, wanted)


async def test_upload_and_removal_at_the_same_time_never_both_win(stores: list[SqlStore], clock: FakeClock):
    here, there = stores
    caller = await person(here)
    wanted = [blob_number(number) for number in range(60)]
    await here.write(lambda tx: [data.adopt(tx, wanted)])
    await here.write(lambda tx: data.mark_unused(tx, "", 100))
    await clock.advance(data.REMOVAL_WAIT_S)

    async def begin(one: Blob) -> bool:
        try:
            await there.write(lambda tx: data.begin_upload(tx, caller, one))
        except Conflict:
            return False
        return True

    begun, claimed = await asyncio.gather(
        asyncio.gather(*[begin(one) for one in wanted]),
        asyncio.gather(*[here.write(lambda tx: data.claim_unused(tx, 5)) for _ in range(20)]),
    )
    gone = [sha256 for some in claimed for sha256 in some]
    kept = [one.sha256 for one, won in zip(wanted, begun, strict=True) if won]
    assert len(gone) == len(set(gone))
    assert sorted(gone + kept) == sorted(one.sha256 for one in wanted)


async def test_array_lets_go_of_what_it_needed_and_is_forgotten(stores: list[SqlStore], clock: FakeClock):
    store, caller = stores[0], await person(stores[0])
    context, table = blob_number(1), blob_number(2)

    def submit(tx: Transaction) -> int:
        send(tx, caller, context)
        send(tx, caller, table)
        new = NewSubmission(spec=SPEC, context=context)
        array_id = submissions.submit_array(tx, caller, new, 3, table=table, names=("a",))
        submissions.fill_table(tx, array_id, 0, [msgspec.json.encode([str(n)]).decode() for n in range(3)], 10)
        return array_id

    array_id = await store.write(submit)
    assert await store.read(storage.bytes_by_kind) == {"disks": 0, "contexts": 5, "results": 0, "other": 0}
    assert await store.read(storage.bytes_by_user) == {"ann": 5}
    await store.write(lambda tx: retention.free_submissions(tx, 0, 100))
    assert await store.read(lambda tx: tx.value(sa.select(submission.c.parameters))) == table.sha256
    await store.write(lambda tx: submissions.cancel_array(tx, caller, array_id, "over"))
    for _ in range(3):
        await store.write(lambda tx: jobs.cancel_array_jobs(tx, array_id, 100))
    await store.write(lambda tx: retention.free_submissions(tx, 0, 100))
    [row] = await store.read(lambda tx: tx.rows(sa.select(submission)))
    assert (row.parameters, row.context) == (None, context.sha256)
    await clock.advance(1001)
    await store.write(lambda tx: retention.expire_results(tx, 100))
    await store.write(lambda tx: retention.free_submissions(tx, 0, 100))
    assert await store.read(lambda tx: tx.value(sa.select(submission.c.context))) is None
    found, _ = await store.read(lambda tx: retention.forgettable(tx, tx.now - 500, 0, 100))
    assert found == [array_id]
    while await store.write(lambda tx: retention.remove_submission(tx, array_id, 2)):
        pass
    for emptied_table in (job, queue, submission):
        assert not await store.read(lambda tx, these=emptied_table: tx.rows(sa.select(these)))


async def test_all_other_statements_run(stores: list[SqlStore], clock: FakeClock):
    store, caller = stores[0], await person(stores[0])
    worker_id = await store.write(lambda tx: workers.add_worker(tx, "pc"))
    await store.write(lambda tx: workers.seen(tx, worker_id, played_sync(room=True)))
    states, lent = await store.read(lambda tx: workers.totals(tx, 60.0))
    assert (sum(states.values()), lent.cpus) == (1, 64)
    await store.write(lambda tx: send(tx, caller, blob_number(1)))
    assert len(await store.read(lambda tx: storage.leaving(tx, 600.0))) == 3
    await store.write(lambda tx: retention.forget_attempt_results(tx, 0, 10, tx.now))
    row = {"principal": "p", "key": "k", "answer": b"", "created_at": 1.0}
    await store.write(lambda tx: tx.run(sa.insert(idempotency).values(**row)))
    assert await store.write(lambda tx: retention.forget_idempotency(tx, 2.0, 5)) == 1
    await clock.advance(10)
    assert await store.write(lambda tx: data.forget_uploads(tx, tx.now, 10)) == 1
    assert not await store.read(lambda tx: tx.rows(sa.select(upload)))
    assert len(await store.read(lambda tx: tx.rows(sa.select(blob)))) == 1
