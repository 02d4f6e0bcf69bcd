"""Several server processes over one PostgreSQL, and a grid that comes back from a backup: what users and workers notice of it."""

from __future__ import annotations

import json
import signal
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from deskgrid.client.grid import login
from deskgrid.client.jobfile import read_job
from deskgrid.client.transport import save_credentials
from deskgrid.server.setup import init_server, make_login_link
from deskgrid.settings import ServerSettings
from deskgrid.testing.postgresql import emptied, running_postgresql
from tests.system.harness import Program, System, until, wait


@pytest.fixture(scope="module")
def postgresql() -> Iterator[str]:
    with running_postgresql() as url:
        yield url


@pytest.fixture
def database(postgresql: str) -> str:
    return emptied(postgresql, "grid")


class Servers(System):
    """A grid with several server processes in one folder."""

    def __init__(self, folder: Path, database: str) -> None:
        super().__init__(folder)
        self.settings = ServerSettings(database=database)
        self.environment |= {"DESKGRID_SERVER_DATABASE": database, "DESKGRID_SERVER_LEASE_S": "10"}
        self.servers: list[Program] = []

    @property
    def home(self) -> Path:
        return self.folder / "server"

    def begin(self, count: int) -> None:
        wait(init_server(self.home, self.settings))
        for number in range(count):
            server = Program(
                ["server", "run", "--listen", "127.0.0.1:0", "--json"], self.environment, self.folder / f"server{number}.log"
            )
            server.start()
            self.servers.append(server)
            self.programs.append(server)
        found = [until(lambda server=server: _address(server), what="a server listens") for server in self.servers]
        assert len(set(found)) == count
        link = wait(make_login_link(self.home, self.settings, "admin"))
        assert set(link.address.split(",")) == set(found), "links have the addresses of all"
        self.address = link.address
        save_credentials(self.folder / "client" / "credentials.json", wait(login(link)))

    async def submit_at_once(self, count: int, plan: str) -> list[int]:
        file = self.job_file(plan, memory='"32MiB"')
        wanted = read_job(file)
        async with self.grid() as grid:
            jobs = [await grid.submit(wanted.spec, context=wanted.context) for _ in range(count)]
        return [job.id for job in jobs]


def _address(server: Program) -> str:
    assert server.alive, server.said()
    for line in server.said().splitlines():
        with suppress(ValueError):
            if found := json.loads(line).get("address"):
                return str(found)
    return ""


@pytest.fixture
def servers(tmp_path: Path, database: str) -> Iterator[Servers]:
    grid = Servers(tmp_path, database)
    try:
        grid.begin(2)
        yield grid
    finally:
        grid.stop()


def test_killed_server_process_is_not_noticed(servers: Servers):
    servers.publish()
    for name in ("pc1", "pc2"):
        servers.add_worker(name, DESKGRID_WORKER_CPUS="10", DESKGRID_WORKER_MEMORY_BYTES=str(20 << 30))
    jobs = wait(servers.submit_at_once(20, "duration_s = 15\n"))
    until(lambda: all(servers.states(job) == ("active", ["running"]) for job in jobs), what="all 20 run")
    waits = [
        Program(["job", "wait", *map(str, jobs)], servers.environment, servers.folder / f"wait{number}.log") for number in range(3)
    ]
    for waiting in waits:
        servers.programs.append(waiting)
        waiting.start()
    servers.servers[0].kill(signal.SIGKILL)
    for job in jobs:
        servers.wait_for(job, "completed")
        assert servers.states(job)[1] == ["succeeded"], f"job {job} was run again"
    for waiting in waits:
        assert waiting.process is not None
        assert waiting.process.wait(30) == 0, waiting.said()
    assert servers.cli("status").returncode == 0
    for name in ("pc1", "pc2"):
        servers.nothing_left(name)


def test_killed_process_comes_back_in_its_place_and_hubs_keep_their_keys(servers: Servers):
    hubs = {path.name: path.read_bytes() for path in (servers.home / "hub").iterdir()}
    assert set(hubs) == {"hub.key", "hub-1.key"}
    servers.servers[1].kill(signal.SIGKILL)
    servers.servers[1].log.unlink()
    servers.servers[1].start()
    until(lambda: _address(servers.servers[1]), what="it listens again")
    assert {path.name: path.read_bytes() for path in (servers.home / "hub").iterdir()} == hubs
    assert [hub["alive"] for hub in servers.json("hub", "list")] == [True, True]


def test_second_server_in_a_folder_with_sqlite_is_refused(system: System):
    done = system.cli("server", "run", "--listen", "127.0.0.1:0", expect=None)
    assert done.returncode != 0
    assert "runs in" in done.stderr


def test_grid_restored_from_a_backup_goes_on_with_the_jobs_that_run(system: System, database: str):
    """Made while it runs, from SQLite; restored in another folder, in PostgreSQL."""
    system.publish()
    system.add_worker()
    job = system.submit("duration_s = 8\n", name="a")
    waiting = system.submit(name="b", cpus="2")
    until(lambda: system.states(job) == ("active", ["running"]), what="it runs")
    system.cli("server", "backup", system.folder / "backup", "--blobs", "--keys")
    assert system.server is not None
    system.server.kill()
    system.environment |= {"DESKGRID_SERVER_HOME": str(system.folder / "restored"), "DESKGRID_SERVER_DATABASE": database}
    restored = system.json("server", "restore", system.folder / "backup")
    assert restored["rows"]["job"] == 2
    system.server.environment = system.environment
    system.restart_server()
    system.wait_for(job, "completed", ["succeeded"])
    system.wait_for(waiting, "completed")
    system.nothing_left()
