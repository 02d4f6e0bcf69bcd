"""The store: transactions over a database, with group commit.

`write` runs a function in a transaction that is durable when `write` returns. One thread writes: it takes all functions that
wait, runs each inside a savepoint of one transaction and commits once, so that many small changes share one fsync. A function
that raises undoes its own part only. `read` runs a function in a snapshot beside the writer.

Functions get a `Transaction`; all SQL stands in the modules beside this one and must run on SQLite and PostgreSQL alike.
"""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import sqlalchemy as sa
from sqlalchemy import Connection, Engine, event

from deskgrid.clock import Clock
from deskgrid.errors import DeskgridError, StoreUnavailable

__all__ = ["SqlStore", "Store", "Transaction", "sqlite_url"]

T = TypeVar("T")
_READERS = 4
_BATCH = 256


class Transaction:
    """What a function of the store works with."""

    def __init__(self, connection: Connection, now: float) -> None:
        self.connection = connection
        self.now = now
        """The store's clock: seconds since 1970."""
        self.topics: list[str] = []
        """What changed, told to those who wait for it once the transaction is durable."""

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


class Store(Protocol):
    """Where the grid's state is. Every store passes testing/store_contract.py."""

    async def write(self, function: Callable[[Transaction], T]) -> T:
        """Run `function` in a transaction; what it did is durable when this returns, and undone if it raised."""
        ...

    async def read(self, function: Callable[[Transaction], T]) -> T:
        """Run `function`, which changes nothing, on a consistent snapshot that holds all acknowledged writes."""
        ...

    async def close(self) -> None:
        """Finish what was accepted and close the database. Idempotent."""
        ...


def sqlite_url(file: Path) -> str:
    """Return the URL of an SQLite database in a file."""
    return f"sqlite:///{file}"


def open_engine(url: str) -> Engine:
    """Return an engine; SQLite in WAL mode with synchronous=FULL, so that an acknowledged write survives a power cut."""
    engine = sa.create_engine(url, pool_size=_READERS + 2, max_overflow=4)
    if engine.dialect.name == "sqlite":
        event.listen(engine, "connect", _prepare_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def _prepare_sqlite(connection: Any, _record: Any) -> None:
    connection.isolation_level = None  # we say BEGIN ourselves; the driver would skip it before savepoints
    cursor = connection.cursor()
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "busy_timeout=30000", "cache_size=-65536"):
        cursor.execute(f"PRAGMA {pragma}")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    writes = connection.get_execution_options().get("deskgrid_write")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


class _Write:
    def __init__(self, function: Callable[[Transaction], Any], loop: asyncio.AbstractEventLoop) -> None:
        self.function = function
        self.loop = loop
        self.future: asyncio.Future[Any] = loop.create_future()


class SqlStore:
    """A store over SQLAlchemy. `notify` is called in the event loop with the topics of each committed write."""

    def __init__(self, url: str, clock: Clock, notify: Callable[[list[str]], None] | None = None) -> None:
        self._engine = open_engine(url)
        self._clock = clock
        self._notify = notify or (lambda topics: None)
        self._queue: queue.SimpleQueue[_Write | None] = queue.SimpleQueue()
        self._readers = ThreadPoolExecutor(_READERS, thread_name_prefix="store-read")
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
        return await asyncio.get_running_loop().run_in_executor(self._readers, self._read, function)

    def _read(self, function: Callable[[Transaction], T]) -> T:
        try:
            with self._engine.connect() as connection, connection.begin():
                return function(Transaction(connection, self._clock.now()))
        except sa.exc.SQLAlchemyError as error:
            raise _unavailable(error) from error

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
        outcomes: list[tuple[_Write, Any, BaseException | None, list[str]]] = []
        try:
            with self._engine.connect().execution_options(deskgrid_write=True) as connection, connection.begin():
                outcomes.extend(self._run(write, connection) for write in batch)
        except BaseException as error:
            failure = _unavailable(error)
            outcomes = [(write, None, failure, []) for write in batch]
        for write, value, failed, topics in outcomes:
            _call_in(write.loop, partial(self._deliver, write, value, failed, topics))

    def _run(self, write: _Write, connection: Connection) -> tuple[_Write, Any, BaseException | None, list[str]]:
        transaction = Transaction(connection, self._clock.now())
        try:
            with connection.begin_nested():
                value = write.function(transaction)
        except sa.exc.OperationalError:
            raise  # the database itself failed: nothing of this batch may be acknowledged
        except sa.exc.SQLAlchemyError as error:
            return write, None, _unavailable(error), []
        except BaseException as error:
            return write, None, error, []
        return write, value, None, transaction.topics

    def _deliver(self, write: _Write, value: Any, failure: BaseException | None, topics: list[str]) -> None:
        if topics:
            self._notify(topics)
        if write.future.done():
            return
        if failure is not None:
            write.future.set_exception(failure)
        else:
            write.future.set_result(value)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[], None]) -> None:
    if not loop.is_closed():
        loop.call_soon_threadsafe(function)


def _unavailable(error: BaseException) -> BaseException:
    if isinstance(error, DeskgridError):
        return error
    if isinstance(error, sa.exc.SQLAlchemyError):
        cause = getattr(error, "orig", None) or error
        return StoreUnavailable(f"the database failed: {cause}", hint="see the server's log and its disk's free space")
    return error
