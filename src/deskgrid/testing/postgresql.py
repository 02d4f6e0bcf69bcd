"""A PostgreSQL server of one's own for tests: in a temporary folder, on a Unix socket only, gone afterwards."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import sqlalchemy as sa

from deskgrid.testing.reaper import follow

__all__ = ["emptied", "running_postgresql"]

_START_LIMIT_S = 60.0


@contextlib.contextmanager
def running_postgresql() -> Iterator[str]:
    """Run a server and yield the SQLAlchemy URL of its empty database. Raise FileNotFoundError if PostgreSQL is not installed."""
    programs = _programs()
    # PostgreSQL does not run as root; then it gets the user that Debian's package made for it.
    user = "postgres" if os.geteuid() == 0 else None
    with tempfile.TemporaryDirectory(prefix="deskgrid-pg-") as name:
        folder = Path(name)
        if user is not None:
            shutil.chown(folder, user)
        data = folder / "data"
        initdb: list[str | Path] = [programs / "initdb", "-D", data, "-U", "grid", "-A", "trust", "-E", "UTF8", "--no-instructions"]
        subprocess.run(initdb, check=True, user=user, stdout=subprocess.DEVNULL, cwd=folder)
        options: list[str | Path] = ["-D", data, "-k", folder, "-c", "listen_addresses=", "-c", "max_connections=40"]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen([programs / "postgres", *options], user=user, stdout=log, stderr=log, cwd=folder)
        follow(server.pid)
        try:
            _wait(programs, folder, server)
            yield f"postgresql+psycopg://grid@/postgres?host={folder}"
        finally:
            server.terminate()
            server.wait(_START_LIMIT_S)


def _programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        raise FileNotFoundError("PostgreSQL is not installed: apt-get install postgresql")
    return found[-1].parent


def _wait(programs: Path, folder: Path, server: subprocess.Popen[bytes]) -> None:
    end = time.monotonic() + _START_LIMIT_S
    ready: list[str | Path] = [programs / "pg_isready", "-q", "-h", folder, "-U", "grid", "-d", "postgres"]
    while subprocess.run(ready, check=False).returncode != 0:
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"PostgreSQL did not start: {(folder / 'log').read_text()}")
        time.sleep(0.05)


def emptied(url: str, name: str) -> str:
    """Return the URL of a new, empty database on the server at `url`; one of that name is removed before."""
    admin = sa.create_engine(url, isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        connection.execute(sa.text(f'DROP DATABASE IF EXISTS "{name}" WITH (FORCE)'))
        connection.execute(sa.text(f'CREATE DATABASE "{name}"'))
    admin.dispose()
    return sa.make_url(url).set(database=name).render_as_string(hide_password=False)
