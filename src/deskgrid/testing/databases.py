"""Databases for tests: with all tables and nothing in them. Making the tables takes longer than most tests, so it is done once per process."""

from __future__ import annotations

import functools
import tempfile
from pathlib import Path

from deskgrid.server.store.engine import sqlite_url
from deskgrid.server.store.migrate import migrate

__all__ = ["make_empty_database"]


def make_empty_database(file: Path) -> str:
    """Write an empty SQLite database that is ready for a store; return its URL."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    file.write_bytes(_content())
    return sqlite_url(file)


@functools.cache
def _content() -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "grid.sqlite"
        migrate(sqlite_url(file))
        return file.read_bytes()
