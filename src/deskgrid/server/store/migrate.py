"""Bringing a database to this version's tables."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from functools import cache
from importlib import resources

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, Engine

from deskgrid.errors import OperatorError, StoreUnavailable
from deskgrid.server.store.engine import open_engine

__all__ = ["check_revision", "migrate", "newest_revision", "revision_of"]

_LOCK = 0x6465736B67726964
"""Number of the advisory lock that one process holds while it migrates: "deskgrid"."""


def migrate(url: str, *, to: str = "head") -> tuple[str | None, str]:
    """Create or upgrade the tables, each migration in a transaction of its own; return the revisions before and after.

    Does nothing if the database is up to date. Several processes may do it at the same time: on PostgreSQL one waits for the other. Raise
    OperatorError if the database was made by a newer deskgrid, StoreUnavailable if it cannot be used.
    """
    config = _config()
    wanted = newest_revision() if to == "head" else to
    engine = open_engine(url, foreign_keys=False)
    try:
        with _alone(engine), engine.connect() as connection:
            found = revision_of(connection)
            connection.rollback()
            check_revision(found)
            if found != wanted:
                config.attributes["connection"] = connection
                command.upgrade(config, to)
            return found, wanted
    except sa.exc.SQLAlchemyError as error:
        raise StoreUnavailable(f"the database cannot be opened or upgraded: {error}") from error
    finally:
        engine.dispose()


def newest_revision() -> str:
    """Return the revision of this version's tables."""
    return str(_scripts().get_current_head())


def revision_of(connection: Connection) -> str | None:
    """Return the revision of a database's tables, None if it has none."""
    return MigrationContext.configure(connection).get_current_revision()


def check_revision(found: str | None) -> None:
    """Raise OperatorError if a revision is not one of ours: it was made by a newer deskgrid."""
    known = {script.revision for script in _scripts().walk_revisions()}
    if found is not None and found not in known:
        raise OperatorError(f"the database is of a newer deskgrid (revision {found})", hint="update this server")


@cache
def _scripts() -> ScriptDirectory:
    """Return the migrations; finding them loads every one as a module."""
    return ScriptDirectory.from_config(_config())


def _config() -> Config:
    config = Config()
    config.set_main_option("script_location", str(resources.files("deskgrid.server.store") / "migrations"))
    return config


@contextlib.contextmanager
def _alone(engine: Engine) -> Iterator[None]:
    """Keep other processes from migrating a PostgreSQL database meanwhile. Its connection's end, too, lets the lock go."""
    if engine.dialect.name != "postgresql":
        yield  # a process has its folder to itself
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as guard:
        guard.execute(sa.select(sa.func.pg_advisory_lock(_LOCK)))
        try:
            yield
        finally:
            guard.execute(sa.select(sa.func.pg_advisory_unlock(_LOCK)))
