"""The store contract on a real PostgreSQL, and what is true only where several server processes share it."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random

import pytest
import sqlalchemy as sa

from deskgrid.clock import FakeClock
from deskgrid.errors import Conflict, InvalidInput, StoreUnavailable
from deskgrid.model.jobs import JobSpec, JobState, Limits, Machine
from deskgrid.model.machines import MachineKind
from deskgrid.model.users import Role
from deskgrid.server.hints import Elsewhere, listen_forever
from deskgrid.server.live import Live
from deskgrid.server.routes.handler import once
from deskgrid.server.store import accounts, attempts, jobs, queues, submissions, workers
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import SqlStore, Transaction, driver_url, open_engine
from deskgrid.server.store.migrate import migrate, newest_revision, revision_of
from deskgrid.server.store.schema import account, metadata, queue, team
from deskgrid.server.store.submissions import NewSubmission
from deskgrid.testing.postgresql import emptied, running_postgresql
from deskgrid.testing.store_contract import StoreContract

_SPEC = JobSpec(machine=Machine(kind=MachineKind.PROCESS), limits=Limits(attempts=2, max_lost=3))


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    with running_postgresql() as url:
        yield url


@pytest.fixture
def clock() -> FakeClock:
    return FakeClock()


@pytest.fixture
def url(server: str) -> str:
    found = emptied(server, "grid")
    migrate(found)
    return found


@pytest.fixture
async def store(url: str, clock: FakeClock) -> AsyncIterator[SqlStore]:
    opened = SqlStore(url, clock)
    yield opened
    await opened.close()


@pytest.fixture
async def other(url: str, clock: FakeClock) -> AsyncIterator[SqlStore]:
    opened = SqlStore(url, clock)
    yield opened
    await opened.close()


class TestPostgresql(StoreContract):
    """All claims of the contract."""


# The database


def test_migrations_make_exactly_the_tables_of_the_schema(url: str):
    from alembic.autogenerate import compare_metadata
    from alembic.migration import MigrationContext

    engine = open_engine(url)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), metadata) == []
    engine.dispose()


def test_processes_that_begin_at_once_migrate_once(server: str):
    url = emptied(server, "fresh")
    with ThreadPoolExecutor(4) as threads:
        done = list(threads.map(lambda _: migrate(url), range(4)))
    assert sorted(done, key=repr) == [*[(newest_revision(), newest_revision())] * 3, (None, newest_revision())]
    engine = open_engine(url)
    with engine.connect() as connection:
        assert revision_of(connection) == newest_revision()
    engine.dispose()


def test_plain_urls_get_our_driver_and_others_are_refused_without_their_password():
    assert driver_url("postgresql://u:p@h/d") == driver_url("postgres://u:p@h/d") == "postgresql+psycopg://u:p@h/d"
    for wrong in ("mysql://u:sesame@h/d", "sesame", "postgresql//sesame"):
        with pytest.raises(InvalidInput) as caught:
            driver_url(wrong)
        assert "sesame" not in str(caught.value)


async def test_database_that_does_not_answer_is_unavailable(clock: FakeClock):
    gone = SqlStore("postgresql://grid@/nothing?host=/nonexistent", clock)
    for call in (gone.write, gone.read):
        with pytest.raises(StoreUnavailable):
            await call(lambda tx: tx.value(sa.select(1)))
    await gone.close()


# Collisions


async def test_call_repeated_at_another_process_meanwhile_gets_the_same_answer_and_is_done_once(store: SqlStore, other: SqlStore):
    both = threading.Barrier(2, timeout=10)

    def add(tx: Transaction) -> str:
        _meet(both)
        return accounts.add_team(tx, f"t{tx.value(sa.select(sa.func.count()).select_from(team))}").name

    answers = await asyncio.gather(*(one.write(lambda tx: once(tx, "user:1", "key", lambda: add(tx))) for one in (store, other)))
    assert answers[0] == answers[1]
    assert await store.read(lambda tx: tx.value(sa.select(sa.func.count()).select_from(team))) == 1


async def test_call_whose_other_self_is_in_its_way_gets_the_answer_of_that(store: SqlStore, other: SqlStore):
    """The other process commits after this one has looked for an answer, before it looks whether the name is free."""
    begun, done = threading.Event(), threading.Event()

    def add(tx: Transaction) -> str:
        begun.set()
        assert done.wait(10)
        return accounts.add_team(tx, "hep").name

    late = asyncio.create_task(store.write(lambda tx: once(tx, "user:1", "key", lambda: add(tx))))
    await asyncio.to_thread(begun.wait, 10)
    first = await other.write(lambda tx: once(tx, "user:1", "key", lambda: accounts.add_team(tx, "hep").name))
    done.set()
    assert await late == first


def _meet(both: threading.Barrier) -> None:
    """Go on once both processes are here; whoever runs again finds nobody to wait for."""
    try:
        both.wait()
    except threading.BrokenBarrierError:
        return
    both.abort()


async def test_name_taken_by_another_process_meanwhile_is_a_conflict(store: SqlStore, other: SqlStore):
    both = threading.Barrier(2, timeout=10)

    def add(tx: Transaction) -> None:
        tx.value(sa.select(account.c.id))
        _meet(both)
        accounts.add_account(tx, "ann", admin=False)

    found = await asyncio.gather(store.write(add), other.write(add), return_exceptions=True)
    assert {type(one) for one in found} == {type(None), Conflict}


async def test_deadlock_is_run_again_and_both_are_done(store: SqlStore, other: SqlStore):
    for name in ("a", "b"):
        await store.write(partial(accounts.add_team, name=name))
    both = threading.Barrier(2, timeout=10)

    def change(tx: Transaction, first: str, second: str) -> None:
        tx.run(sa.update(team).where(team.c.name == first).values(weight=team.c.weight + 1))
        _meet(both)
        tx.run(sa.update(team).where(team.c.name == second).values(weight=team.c.weight + 1))

    await asyncio.gather(store.write(partial(change, first="a", second="b")), other.write(partial(change, first="b", second="a")))
    assert await store.read(lambda tx: [row.weight for row in tx.rows(sa.select(team))]) == [3, 3]


async def test_user_at_two_processes_keeps_to_the_bound_of_waiting_jobs(store: SqlStore, other: SqlStore):
    user = await store.write(lambda tx: accounts.add_account(tx, "ann", admin=False))
    ann = Caller(Role.USER, "ann", user_id=user.id)

    def submit(tx: Transaction) -> None:
        submissions.submit_job(tx, ann, NewSubmission(spec=_SPEC), max_waiting=10)

    found = await asyncio.gather(*(one.write(submit) for one in (store, other) * 15), return_exceptions=True)
    assert sum(one is None for one in found) == 10
    assert all(one is None or isinstance(one, Conflict) for one in found)


async def test_job_goes_when_both_that_it_waits_for_end_at_two_processes_at_once(store: SqlStore, other: SqlStore):
    user = await store.write(lambda tx: accounts.add_account(tx, "ann", admin=False))
    ann = Caller(Role.USER, "ann", user_id=user.id)
    for _ in range(5):
        first, second = [await store.write(lambda tx: submissions.submit_job(tx, ann, NewSubmission(spec=_SPEC))) for _ in "ab"]
        after = JobSpec(machine=_SPEC.machine, after_end=(f"job-{first}", f"job-{second}"))
        waiting = await store.write(lambda tx, after=after: submissions.submit_job(tx, ann, NewSubmission(spec=after)))
        both = threading.Barrier(2, timeout=0.3)

        def end(tx: Transaction, job_id: int, both: threading.Barrier = both) -> None:
            jobs.cancel_job(tx, ann, job_id, "")  # type: ignore[arg-type]
            _meet(both)  # neither has committed; where they wait for each other before, one goes on alone

        await asyncio.gather(store.write(partial(end, job_id=first)), other.write(partial(end, job_id=second)))
        detail = await store.read(lambda tx, waiting=waiting: jobs.get_job(tx, ann, waiting))
        assert detail.job.state is JobState.WAITING


async def test_two_processes_fill_one_array_to_its_size(store: SqlStore, other: SqlStore):
    user = await store.write(lambda tx: accounts.add_account(tx, "ann", admin=False))
    ann = Caller(Role.USER, "ann", user_id=user.id)
    array_id = await store.write(lambda tx: submissions.submit_array(tx, ann, NewSubmission(spec=_SPEC), 1000))

    async def fill(one: SqlStore) -> None:
        while await one.write(lambda tx: submissions.fill(tx, array_id, 30)):
            pass

    await asyncio.gather(fill(store), fill(other))
    found = await store.read(lambda tx: submissions.get_array(tx, ann, array_id))
    assert found.jobs[JobState.WAITING] == 1000


async def test_job_leased_elsewhere_is_not_swept_away_as_waiting(store: SqlStore, other: SqlStore):
    """A process with an older board leases from an array that is being cancelled."""
    user = await store.write(lambda tx: accounts.add_account(tx, "ann", admin=False))
    ann = Caller(Role.USER, "ann", user_id=user.id)
    array_id = await store.write(lambda tx: submissions.submit_array(tx, ann, NewSubmission(spec=_SPEC), 4))
    await store.write(lambda tx: submissions.fill(tx, array_id, 10))
    worker_id = await store.write(lambda tx: workers.add_worker(tx, "pc"))
    queue_id = await store.read(lambda tx: tx.value(sa.select(queue.c.id).where(queue.c.array_id == array_id)))
    await other.write(lambda tx: submissions.cancel_array(tx, ann, array_id, "not wanted"))
    leased, swept = threading.Event(), threading.Event()

    def lease(tx: Transaction) -> None:
        attempts.lease(tx, worker_id, queue_id, 2, 60.0)
        leased.set()
        swept.wait(0.5)  # the other waits for our locks by then

    leasing = asyncio.create_task(store.write(lease))
    await asyncio.to_thread(leased.wait, 10)
    while await other.write(lambda tx: jobs.cancel_array_jobs(tx, array_id, 100)):
        pass
    await leasing
    while await other.write(lambda tx: jobs.cancel_array_jobs(tx, array_id, 100)):
        pass
    found = await store.read(lambda tx: submissions.get_array(tx, ann, array_id))
    assert found.jobs == {**dict.fromkeys(JobState, 0), JobState.CANCELLED: 4}


# Lost connections

_CUT = sa.text(
    "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity "
    "WHERE datname = current_database() AND pid <> pg_backend_pid() AND application_name LIKE :name"
)


def _cut(url: str, name: str = "%") -> int:
    engine = open_engine(url)
    with engine.connect() as connection:
        count = connection.execute(_CUT, {"name": name}).scalar()
    engine.dispose()
    return int(count or 0)


async def test_connections_that_were_cut_while_idle_are_not_noticed(store: SqlStore, url: str):
    await store.write(partial(accounts.add_team, name="a"))
    await store.read(lambda tx: tx.value(sa.select(1)))
    assert _cut(url) >= 1
    await store.write(partial(accounts.add_team, name="b"))
    assert await store.read(lambda tx: tx.value(sa.select(sa.func.count()).select_from(team))) == 2


async def test_transaction_cut_before_its_commit_is_run_again_and_done_once(store: SqlStore, url: str):
    runs = 0

    def add(tx: Transaction) -> None:
        nonlocal runs
        runs += 1
        accounts.add_team(tx, "a")
        if runs == 1:
            _cut(url)

    await store.write(add)
    assert runs == 2
    assert await store.read(lambda tx: tx.value(sa.select(sa.func.count()).select_from(team))) == 1


# Hints


class Listener:
    """A server process as far as hints go."""

    def __init__(self, url: str, store: SqlStore) -> None:
        self.live = Live()
        self.store = store
        self.task = asyncio.create_task(listen_forever(url, Elsewhere(store, self.live), Random(1)))

    async def ready(self) -> None:
        await self.wait("ready", {"ready": 0})

    async def wait(self, topic: str, seen: dict[str, int] | None = None) -> None:
        assert await self.live.wait(seen or {topic: self.live.mark(topic)}, 10), f"nothing was heard of {topic}"

    async def close(self) -> None:
        self.task.cancel()
        await asyncio.wait([self.task])


@pytest.fixture
async def listener(url: str, other: SqlStore) -> AsyncIterator[Listener]:
    found = Listener(url, other)
    await found.ready()
    yield found
    await found.close()


def _tell(topics: list[str], tx: Transaction) -> None:
    tx.topics += topics


async def test_who_waits_at_another_process_is_woken(store: SqlStore, listener: Listener):
    waiting = asyncio.create_task(listener.wait("job:7"))
    await asyncio.sleep(0)
    await store.write(partial(_tell, ["job:7"]))
    await waiting


async def test_more_topics_than_can_be_said_wake_everybody(store: SqlStore, listener: Listener):
    waiting = asyncio.create_task(listener.wait("log:1"))
    await asyncio.sleep(0)
    await store.write(partial(_tell, [f"job:{number}" for number in range(5000)]))
    await waiting


async def test_hints_go_on_after_the_listening_connection_was_cut(store: SqlStore, listener: Listener, url: str):
    waiting = asyncio.create_task(listener.wait("job:8"))
    await asyncio.sleep(0)
    assert _cut(url, "deskgrid hints") == 1
    await waiting  # everything seems changed once it listens again
    waiting = asyncio.create_task(listener.wait("job:9"))
    await asyncio.sleep(0)
    await store.write(partial(_tell, ["job:9"]))
    await waiting


async def test_job_submitted_at_one_process_is_on_the_others_board_at_once(store: SqlStore, other: SqlStore, listener: Listener):
    """The clock stands still: the board of the other never gets too old by itself."""
    user = await store.write(lambda tx: accounts.add_account(tx, "ann", admin=False))
    ann = Caller(Role.USER, "ann", user_id=user.id)
    assert await other.write(lambda tx: queues.board(tx).queues()) == []
    waiting = asyncio.create_task(listener.wait(submissions.WORK))
    await asyncio.sleep(0)
    await store.write(lambda tx: submissions.submit_job(tx, ann, NewSubmission(spec=_SPEC)))
    await waiting
    [found] = await other.write(lambda tx: queues.board(tx).queues())
    assert found.waiting == 1
