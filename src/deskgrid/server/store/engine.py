"""The store: transactions over a database, with group commit.

`write` runs a function in a transaction that is durable when `write` returns. One thread writes: it takes all functions that
wait, runs each inside a savepoint of one transaction and commits once, so that many small changes share one fsync. A function
that raises undoes its own part only. `read` runs a function in a snapshot beside the writer.

Over PostgreSQL several processes do so at the same time, each at READ COMMITTED: what a function decides on it must lock, or guard in the
statement that changes it. Where two processes collide nevertheless (a deadlock, the same new row), the functions run again, so **a function
may run more than once** and must change nothing but the database. With the commit goes a NOTIFY of what changed (server/hints.py).

Functions get a `Transaction`; all SQL stands in the modules beside this one and must run on SQLite and PostgreSQL alike.
"""

from __future__ import annotations

import asyncio
import importlib.util
import queue
import threading
import time
import uuid
from collections.abc import Callable, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event
from sqlalchemy.dialects import postgresql, sqlite

from deskgrid.clock import Clock
from deskgrid.core.backoff import delay_s
from deskgrid.errors import Conflict, DeskgridError, InvalidInput, OperatorError, StoreUnavailable
from deskgrid.server.store.statement import Statement

__all__ = [
    "CHANNEL",
    "EVERYTHING",
    "DoneElsewhere",
    "SqlStore",
    "Store",
    "Transaction",
    "driver_url",
    "is_shared",
    "open_engine",
    "sqlite_url",
]

T = TypeVar("T")
_READERS = 4
_BATCH = 256
CHANNEL = "deskgrid"
"""What server processes tell each other on: the store's `id` and the topics that changed, with blanks between."""
EVERYTHING = "*"
"""In the place of topics: more has changed than can be said."""
_MOST_SAID_BYTES = 7900
"""PostgreSQL takes payloads below 8000 bytes."""
_MOST_COLLISIONS, _MOST_CUTS, _MOST_REPEATS = 10, 4, 3
_COLLISIONS = frozenset({"40001", "40P01", "55P03"})
"""serialization_failure, deadlock_detected, lock_not_available."""
_SAME_ROW = frozenset({"23505", "23503"})
"""unique_violation, foreign_key_violation: another process has just made the same row, or removed one that is referred to."""
_CUTS = ("08", "57P0")
"""Beginnings of the codes that say that the connection is gone, or the server on its way down or up."""


class DoneElsewhere(Exception):
    """Another process has done meanwhile what this function is about: it is undone and run again, and finds that."""


class Transaction:
    """What a function of the store works with."""

    def __init__(
        self,
        connection: Connection,
        now: float,
        memo: dict[str, Any] | None = None,
        before: dict[Hashable, float] | None = None,
    ) -> None:
        self.connection = connection
        self.now = now
        """The store's clock: seconds since 1970."""
        self.memo: dict[str, Any] = {} if memo is None else memo
        """What functions found out and keep up to date for those that follow; emptied when one of them fails, or by `Store.forget`."""
        self.deltas: dict[Hashable, float] = {}
        """What is to be added to counts. It is summed up over the batch and written once, before the commit, by `BEFORE_COMMIT`."""
        self._before = {} if before is None else before
        """Deltas of functions before this one in the batch, not written yet."""
        self.taken: dict[Hashable, float] = {}
        """Those of them that this one has written: if it fails, they are to be written again."""
        self.topics: list[str] = []
        """What changed, told to those who wait for it once the transaction is durable."""
        self._driver_cursor: Any = None

    def run(self, statement: sa.Executable, parameters: Any = None) -> sa.CursorResult[Any]:
        """Execute a statement."""
        return self.connection.execute(statement, parameters)

    def rows(self, statement: sa.Executable) -> list[Any]:
        """Return all rows of a query."""
        return list(self.connection.execute(statement).all())

    def row(self, statement: sa.Executable) -> Any | None:
        """Return the first row of a query, or None."""
        return self.connection.execute(statement).first()

    def value(self, statement: sa.Executable) -> Any:
        """Return the first column of the first row, or None."""
        return self.connection.execute(statement).scalar()

    def insert_if_new(self, table: sa.Table, unique: Sequence[str], **values: Any) -> None:
        """Insert a row unless there is one with the same values in the columns `unique`, perhaps of another process a moment ago."""
        dialect: Any = postgresql if self.connection.dialect.name == "postgresql" else sqlite
        self.run(dialect.insert(table).on_conflict_do_nothing(index_elements=unique).values(**values))

    def fast(self, statement: Statement, **parameters: Any) -> list[tuple[Any, ...]]:
        """Run a hot statement; return its rows, none if it has none."""
        cursor = self._cursor()
        cursor.execute(*statement.bind(self.connection.dialect, parameters))
        return list(cursor.fetchall()) if cursor.description is not None else []

    def change(self, statement: Statement, **parameters: Any) -> int:
        """Run a hot statement that changes rows; return how many it changed."""
        cursor = self._cursor()
        cursor.execute(*statement.bind(self.connection.dialect, parameters))
        return int(cursor.rowcount)

    def change_many(self, statement: Statement, parameters: Sequence[Mapping[str, Any]]) -> None:
        """Run a hot statement for each set of parameters."""
        bound = [statement.bind(self.connection.dialect, each) for each in parameters]
        if bound:
            self._cursor().executemany(bound[0][0], [values for _, values in bound])

    def add(self, key: Hashable, amount: float) -> None:
        """Add to a count, once the function is done."""
        self.deltas[key] = self.deltas.get(key, 0) + amount

    def settle(self) -> None:
        """Write the deltas now, those of the batch's functions before this one, too: for functions that read counts."""
        for key, amount in self._before.items():
            self.add(key, amount)
            self.taken[key] = self.taken.get(key, 0) + amount
        self._before.clear()
        while self.deltas:
            deltas, self.deltas = self.deltas, {}
            for write in BEFORE_COMMIT:
                write(self, deltas)

    def execute(self, text: str) -> None:
        """Run a command without parameters."""
        self._cursor().execute(text)

    def _cursor(self) -> Any:
        if self._driver_cursor is None:
            driver: Any = self.connection.connection.dbapi_connection
            self._driver_cursor = driver.cursor()
        return self._driver_cursor


BEFORE_COMMIT: list[Callable[[Transaction, Mapping[Hashable, float]], None]] = []
"""What writes the deltas of a batch; the modules beside this one that keep counts put themselves here."""


class Store(Protocol):
    """Where the grid's state is. Every store passes testing/store_contract.py."""

    async def write(self, function: Callable[[Transaction], T]) -> T:
        """Run `function` in a transaction; what it did is durable when this returns, and undone if it raised."""
        ...

    async def read(self, function: Callable[[Transaction], T]) -> T:
        """Run `function`, which changes nothing, on a consistent snapshot that holds all acknowledged writes."""
        ...

    def forget(self) -> None:
        """Look at what waits anew: another process has changed it. Functions that begin after this see it."""
        ...

    @property
    def waiting(self) -> int:
        """How many writes wait for their turn."""
        ...

    async def close(self) -> None:
        """Finish what was accepted and close the database. Idempotent."""
        ...


def sqlite_url(file: Path) -> str:
    """Return the URL of an SQLite database in a file."""
    return f"sqlite:///{file}"


def is_shared(url: str) -> bool:
    """Tell whether several server processes may use a database: whether it is PostgreSQL."""
    return sa.make_url(driver_url(url)).get_backend_name() == "postgresql"


def driver_url(url: str) -> str:
    """Return the URL with the driver that we use. Raise InvalidInput if it is none of ours, OperatorError if the driver is missing."""
    try:
        found = sa.make_url(url)
        backend = found.get_backend_name()
    except sa.exc.ArgumentError as error:  # its text has the URL, and that the password
        raise InvalidInput("this is not a database URL", where="database", hint="postgresql://USER@HOST/NAME") from error
    if backend == "sqlite":
        return url
    if backend not in ("postgresql", "postgres"):
        raise InvalidInput(
            f"{backend[:40]!r} is not a database that deskgrid runs on", where="database", hint="sqlite or postgresql"
        )
    if importlib.util.find_spec("psycopg") is None:
        raise OperatorError("the driver for PostgreSQL is not installed", hint="pip install 'deskgrid[postgresql]'")
    return found.set(drivername="postgresql+psycopg").render_as_string(hide_password=False)


def open_engine(url: str, *, foreign_keys: bool = True) -> Engine:
    """Return an engine; SQLite in WAL mode with synchronous=FULL, so that an acknowledged write survives a power cut.

    Without `foreign_keys` SQLite lets tables be made anew that others refer to, as migrations must. Raise as `driver_url` does.
    """
    url = driver_url(url)
    if not url.startswith("sqlite"):
        # Silence is noticed within about half a minute: a machine that lost its power does not say goodbye.
        alive = {"connect_timeout": 10, "keepalives_idle": 10, "keepalives_interval": 5, "keepalives_count": 4}
        given = sa.make_url(url).query
        arguments = {"application_name": "deskgrid", **alive, "tcp_user_timeout": 30_000}
        arguments = {name: value for name, value in arguments.items() if name not in given}
        return sa.create_engine(
            url, pool_size=_READERS + 2, max_overflow=4, isolation_level="READ COMMITTED", connect_args=arguments
        )
    engine = sa.create_engine(url, pool_size=_READERS + 2, max_overflow=4)
    event.listen(engine, "connect", partial(_prepare_sqlite, foreign_keys))
    event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(foreign_keys: bool, connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves; the driver would skip it before savepoints
    cursor = connection.cursor()
    keys = f"foreign_keys={'ON' if foreign_keys else 'OFF'}"
    for pragma in ("journal_mode=WAL", "synchronous=FULL", keys, "busy_timeout=30000", "cache_size=-65536"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("deskgrid_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class _Batch:
    """What the functions of one transaction add up to."""

    def __init__(self) -> None:
        self.deltas: dict[Hashable, float] = {}
        self.topics: list[str] = []
        """Those that came with the counts; the others are each function's own."""
        self.committing = False
        """The commit was asked for: whether it was done is not known if its answer does not come."""

    def add(self, deltas: Mapping[Hashable, float]) -> None:
        """Add to what is to be written."""
        for key, amount in deltas.items():
            self.deltas[key] = self.deltas.get(key, 0) + amount


class _Write:
    def __init__(self, function: Callable[[Transaction], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.function = function
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()


class _Outcome(NamedTuple):
    write: _Write
    value: Any
    failure: BaseException | None
    topics: list[str]


class SqlStore:
    """A store over SQLAlchemy. `notify` is called in the event loop with the topics of each committed write, `measure` in the writer's thread
    with each batch's size and seconds."""

    def __init__(
        self,
        url: str,
        clock: Clock,
        notify: Callable[[list[str]], None] | None = None,
        *,
        rng: Random | None = None,
        measure: Callable[[int, float], None] | None = None,
    ) -> None:
        self._engine = open_engine(url)
        self._reading = self._engine
        self._is_shared = self._engine.dialect.name == "postgresql"
        if self._is_shared:
            self._reading = self._engine.execution_options(isolation_level="REPEATABLE READ", postgresql_readonly=True)
        self._faults = _Faults(self._engine.dialect)
        self._clock = clock
        self._rng = rng or Random()  # noqa: S311 - pauses
        self._notify = notify or (lambda topics: None)
        self._measure = measure or (lambda writes, seconds: None)
        self.id = uuid.uuid4().hex[:12]
        """By which this process knows its own notifications."""
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")
        self._memo: dict[str, Any] = {}
        self._is_stale = False
        self._closed = False
        self._writer = threading.Thread(target=self._write_loop, name="store-write", daemon=True)
        self._writer.start()

    async def write(self, function: Callable[[Transaction], T]) -> T:
        """See Store."""
        if self._closed:
            raise StoreUnavailable("the store is closed")
        write = _Write(function, asyncio.get_running_loop())
        self._queue.put(write)
        result: T = await write.future
        return result

    async def read(self, function: Callable[[Transaction], T]) -> T:
        """See Store."""
        if self._closed:
            raise StoreUnavailable("the store is closed")
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, function)

    def _read(self, function: Callable[[Transaction], T]) -> T:  # its memo is its own: readers are other threads
        cuts = 0
        while True:
            try:
                with self._reading.connect() as connection, connection.begin():
                    return function(Transaction(connection, self._clock.now()))
            except BaseException as error:
                cuts += 1
                if not self._faults.is_cut(error) or cuts >= _MOST_CUTS:
                    raise self._faults.wrapped(error) from error
                self._wait(cuts)

    def forget(self) -> None:
        """See Store."""
        self._is_stale = True  # the writer's thread looks at this: what it is just reading may be the old state

    @property
    def waiting(self) -> int:
        """See Store."""
        return self._queue.qsize()

    async def close(self) -> None:
        """See Store."""
        if self._closed:
            return
        self._closed = True
        self._queue.put(None)
        await asyncio.to_thread(self._writer.join)
        self._readers.shutdown()
        self._engine.dispose()

    def _write_loop(self) -> None:
        while (first := self._queue.get()) is not None:
            batch = [first]
            last = False
            while len(batch) < _BATCH and not self._queue.empty():
                following = self._queue.get()
                if following is None:
                    last = True
                    break
                batch.append(following)
            self._commit(batch)
            if last:
                return

    def _commit(self, batch: list[_Write]) -> None:
        """Run a batch in one transaction and deliver the outcomes; nobody hears of success before it is durable."""
        began = time.perf_counter()
        outcomes, topics = self._outcomes(batch)
        self._measure(len(batch), time.perf_counter() - began)
        of_loop: dict[asyncio.AbstractEventLoop, list[_Outcome]] = {}
        for outcome in outcomes:
            of_loop.setdefault(outcome.write.loop, []).append(outcome)
        for loop, its_own in of_loop.items():  # one wake-up for all
            _call_in(loop, partial(self._deliver, its_own))
        if topics:
            _call_in(batch[0].loop, partial(self._notify, topics))

    def _outcomes(self, batch: list[_Write]) -> tuple[list[_Outcome], list[str]]:
        """Run a batch, again if it is certain that nothing of it was committed and it may do better."""
        collisions = cuts = 0
        while True:
            whole = _Batch()
            try:
                return self._transact(batch, whole), whole.topics
            except BaseException as error:
                self._memo.clear()
                collisions += self._faults.is_collision(error)
                cuts += self._faults.is_cut(error)
                mended = self._faults.is_collision(error) or (self._faults.is_cut(error) and not whole.committing)
                if not mended or collisions >= _MOST_COLLISIONS or cuts >= _MOST_CUTS:
                    failure = self._faults.wrapped(error)
                    return [_Outcome(write, None, failure, []) for write in batch], []
            self._wait(collisions + cuts)

    def _wait(self, tries: int) -> None:
        time.sleep(delay_s(tries, first_s=0.02, max_s=0.5, rng=self._rng))

    def _transact(self, batch: list[_Write], whole: _Batch) -> list[_Outcome]:
        with self._engine.connect().execution_options(deskgrid_write=True) as connection, connection.begin():
            outcomes = [self._run(write, connection, whole) for write in batch]
            last = Transaction(connection, self._clock.now(), self._memo, whole.deltas)
            last.settle()
            whole.topics = last.topics
            if self._is_shared:
                self._tell(connection, {topic for one in outcomes for topic in one.topics} | set(whole.topics))
            whole.committing = True
        return outcomes

    def _tell(self, connection: Connection, topics: set[str]) -> None:
        """Let the other processes know, with the commit."""
        if not topics:
            return
        said = " ".join((self.id, *sorted(topics)))
        if len(said.encode()) > _MOST_SAID_BYTES:
            said = f"{self.id} {EVERYTHING}"
        connection.exec_driver_sql("SELECT pg_notify(%s, %s)", (CHANNEL, said))

    def _run(self, write: _Write, connection: Connection, whole: _Batch) -> _Outcome:
        repeats = 0
        while True:
            if self._is_stale:
                self._is_stale = False
                self._memo.pop("board", None)
            transaction = Transaction(connection, self._clock.now(), self._memo, whole.deltas)
            try:
                # SQLAlchemy's own savepoint costs as much as all else of an idle worker's call.
                transaction.execute("SAVEPOINT one")
                value = write.function(transaction)
                transaction.execute("RELEASE SAVEPOINT one")
            except BaseException as error:
                self._memo.clear()
                whole.add(transaction.taken)
                if self._faults.is_of_database(error):
                    raise  # nothing of this batch may be acknowledged
                transaction.execute("ROLLBACK TO SAVEPOINT one")
                transaction.execute("RELEASE SAVEPOINT one")
                repeats += 1
                if self._faults.is_same_row(error) and repeats < _MOST_REPEATS:
                    continue  # what the other process did is there now, and the function will find it
                return _Outcome(write, None, self._faults.wrapped(error), [])
            whole.add(transaction.deltas)
            return _Outcome(write, value, None, transaction.topics)

    def _deliver(self, outcomes: list[_Outcome]) -> None:
        for outcome in outcomes:
            if outcome.topics:
                self._notify(outcome.topics)
            future = outcome.write.future
            if future.done():
                continue
            if outcome.failure is not None:
                future.set_exception(outcome.failure)
            else:
                future.set_result(outcome.value)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)


_UNIQUE = frozenset({"23505", "SQLITE_CONSTRAINT_UNIQUE", "SQLITE_CONSTRAINT_PRIMARYKEY"})


class _Faults:
    """What an error of the database's means, whether it comes from SQLAlchemy or from the driver itself."""

    def __init__(self, dialect: sa.Dialect) -> None:
        driver: Any = dialect.dbapi
        self._is_postgresql = dialect.name == "postgresql"
        self._any: Any = driver.Error
        self._operational: Any = (
            (driver.OperationalError, driver.InterfaceError) if self._is_postgresql else driver.OperationalError
        )

    def _cause(self, error: BaseException) -> Any:
        return getattr(error, "orig", None) or error

    def _code(self, error: BaseException) -> str:
        return str(getattr(self._cause(error), "sqlstate", None) or "")

    def is_of_database(self, error: BaseException) -> bool:
        """Tell whether the database itself failed, not a statement."""
        return isinstance(self._cause(error), self._operational)

    def is_collision(self, error: BaseException) -> bool:
        """Tell whether a transaction was undone because of another process, so that it may be run again."""
        return self._is_postgresql and self._code(error) in _COLLISIONS | _SAME_ROW

    def is_same_row(self, error: BaseException) -> bool:
        """Tell whether it failed because another process has just made the same row, or removed one."""
        if isinstance(error, DoneElsewhere):
            return True
        return self._is_postgresql and self._code(error) in _SAME_ROW

    def is_cut(self, error: BaseException) -> bool:
        """Tell whether the connection was lost or could not be made."""
        if not self._is_postgresql or not self.is_of_database(error):
            return False
        code = self._code(error)
        return not code or code.startswith(_CUTS)

    def wrapped(self, error: BaseException) -> BaseException:
        """Return an error as callers get it: foreign ones as StoreUnavailable."""
        cause = self._cause(error)
        if self._code(error) in _UNIQUE or getattr(cause, "sqlite_errorname", "") in _UNIQUE:
            failure: DeskgridError = Conflict(
                "there is such a thing already", hint="look what is there; another call may have been quicker"
            )
            failure.__cause__ = error
            return failure
        if isinstance(error, sa.exc.SQLAlchemyError) or isinstance(cause, self._any):
            first = str(cause).strip().partition("\n")[0]
            hint = "see the database's log" if self._is_postgresql else "see the server's log and its disk's free space"
            failure = StoreUnavailable(f"the database failed: {first}", hint=hint)
            failure.__cause__ = error
            return failure
        return error
