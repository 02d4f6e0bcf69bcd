"""Bringing a database to this version's tables."""

from __future__ import annotations

from importlib import resources

import sqlalchemy as sa
from alembic import command
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory

from deskgrid.errors import OperatorError, StoreUnavailable
from deskgrid.server.store.engine import open_engine

__all__ = ["migrate"]


def migrate(url: str) -> None:
    """Create or upgrade the tables, each migration in a transaction of its own.

    Does nothing if the database is up to date. Raise OperatorError if it was made by a newer deskgrid.
    """
    config = Config()
    config.set_main_option("script_location", str(resources.files("deskgrid.server.store") / "migrations"))
    scripts = ScriptDirectory.from_config(config)
    engine = open_engine(url)
    try:
        with engine.connect() as connection:
            found = MigrationContext.configure(connection).get_current_revision()
            connection.rollback()
            if found == scripts.get_current_head():
                return
            if found is not None and found not in {script.revision for script in scripts.walk_revisions()}:
                raise OperatorError(f"the database is of a newer deskgrid (revision {found})", hint="update this server")
            config.attributes["connection"] = connection
            command.upgrade(config, "head")
    except sa.exc.SQLAlchemyError as error:
        raise StoreUnavailable(f"the database cannot be opened or upgraded: {error}") from error
    finally:
        engine.dispose()
