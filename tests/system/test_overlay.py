"""Programs in jobs and programs of users talk to each other: real processes, real cages, fake machines. All on this PC, so that every
stream takes the relay (loopback addresses are never dialled); the other paths are in test_paths.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys

import pytest

from deskgrid.client.grid import Grid
from deskgrid.client.transport import load_credentials
from tests.system.cage import inside
from tests.system.harness import Program, System, until
from tests.system.talk import answered, dial, echo_server, started


@pytest.fixture
def grid(system: System) -> System:
    """A grid with a disk and a worker."""
    system.publish()
    system.add_worker()
    return system


def serving(grid: System, name: str = "server", **machine: str) -> int:
    """Submit a job with an echo server that it offers as `echo`."""
    fields = {"network": '"overlay"', "offer": '["echo:7000"]', **machine}
    return grid.submit("serve = [7000]\nhangs = true\n", name=name, **fields)


async def reported(grid: Grid) -> bool:
    return any(peer.connections for peer in await grid.peers())


def test_user_reaches_the_service_of_a_job(grid: System):
    job = serving(grid)
    _, ready = started(grid, "connect", f"echo.job-{job}")
    said = os.urandom(300_000)
    assert answered(ready["address"], said) == said, grid.logs()


def test_connection_waits_for_a_job_that_has_not_started(grid: System):
    grid.workers["pc"].stop()
    job = serving(grid)
    _, ready = started(grid, "connect", f"echo.job-{job}", "--wait", "1m")
    with dial(ready["address"]) as connection:
        connection.sendall(b"early")
        grid.workers["pc"].start()
        assert connection.recv(100) == b"early", grid.logs()


def test_job_reaches_a_service_on_its_users_pc(grid: System):
    with echo_server() as port:
        started(grid, "offer", "web", str(port))
        job = grid.submit('fetch = ["site:8000"]\n', name="client", network='"overlay"', reach='{ site = "web.user:8000" }')
        grid.wait_for(job, "completed", ["succeeded"])
    grid.cli("job", "results", str(job), "-o", grid.folder / "out")
    assert (grid.folder / "out" / "fetched" / "site").read_text() == "hello from site\n"
    grid.nothing_left()


def test_job_reaches_a_service_of_another_job(grid: System):
    server = serving(grid)
    client = grid.submit('fetch = ["db:5432"]\n', name="client", network='"overlay"', reach=f'{{ db = "echo.job-{server}:5432" }}')
    grid.wait_for(client, "completed", ["succeeded"])
    grid.cli("job", "results", str(client), "-o", grid.folder / "out")
    assert (grid.folder / "out" / "fetched" / "db").read_text() == "hello from db\n"
    grid.cli("job", "cancel", str(server))
    grid.nothing_left()


def test_service_outlives_the_worker_that_joined_it(grid: System):
    """kill -9 of the worker: its machine runs on in its cage, and the next worker joins it with the overlay again."""
    job = serving(grid)
    _, ready = started(grid, "connect", f"echo.job-{job}")
    assert answered(ready["address"], b"before") == b"before"
    grid.workers["pc"].kill()
    grid.workers["pc"].start()
    assert answered(ready["address"], b"after") == b"after", grid.logs()
    assert grid.states(job) == ("active", ["running"])


def test_other_users_reach_a_service_only_if_it_is_shared(grid: System):
    grid.cli("user", "add", "bob")
    secret, shared = serving(grid, "secret"), serving(grid, "shared", share='["user:bob"]')
    link = grid.json("user", "token", "bob")["link"]
    bob = {"DESKGRID_CLIENT_HOME": str(grid.folder / "bob")}
    grid.cli("login", link, **bob)
    as_admin, grid.environment = grid.environment, {**grid.environment, **bob}
    try:
        _, allowed = started(grid, "connect", f"echo.job-{shared}", "--wait", "30s", name="allowed")
        assert answered(allowed["address"], b"bob") == b"bob"
        refused = grid.cli("connect", f"echo.job-{secret}", expect=None)
        assert refused.returncode != 0
        assert f"there is no job {secret} that bob may reach" in refused.stderr
    finally:
        grid.environment = as_admin


def test_proxy_knows_services_by_name(grid: System):
    job = serving(grid)
    _, ready = started(grid, "proxy", "--listen", "0", "--wait", "1m")
    name = f"echo.job-{job}.grid".encode()
    with dial(ready["address"]) as connection:
        connection.sendall(b"\5\1\0")
        assert connection.recv(2) == b"\5\0"
        connection.sendall(b"\5\1\0\3" + bytes([len(name)]) + name + b"\0\7")
        assert connection.recv(10)[:2] == b"\5\0", grid.logs()
        connection.sendall(b"by name")
        assert connection.recv(100) == b"by name"


def test_peers_and_connections_are_listed(grid: System):
    job = serving(grid)
    _, ready = started(grid, "connect", f"echo.job-{job}")
    with dial(ready["address"]) as connection:
        connection.sendall(b"x" * 1000)
        assert connection.recv(1000)
        grid.until(reported, what="a connection is reported", limit_s=40)
        found = until(lambda: grid.json("connection", "list"), what="it is listed")
        assert {one["connection"]["service"] for one in found} <= {
            f"echo.job-{job}",
            "echo",
        }  # as the caller and as the called peer names it
        assert {one["connection"]["path"] for one in found} == {"relayed"}

        def services() -> list[str]:
            return [service for peer in grid.json("peers") if peer["name"].startswith("attempt-1.") for service in peer["services"]]

        # On a busy PC the lease may have just ended, and with it the peer's name; the worker's next call renews both.
        assert until(services, what="the job's peer is listed") == ["echo", "console"]
        assert "echo" in grid.cli("peers").stdout
        assert "relayed" in grid.cli("connection", "list").stdout


def test_job_reaches_the_server_with_a_token_of_its_own(grid: System):
    """The job's credentials are on its context disk only; they act for its owner on jobs, and end with the attempt."""
    job = grid.submit("hangs = true\n", network='"overlay"', reach='{ grid = "api.server" }')
    grid.wait_for(job, "active", ["running"])
    file = until(lambda: list((grid.folder / "pc" / "attempts").glob("*/credentials.json")), what="credentials are made")[0]
    credentials = load_credentials(file)
    assert credentials.address == "grid:8470"
    assert oct(file.stat().st_mode & 0o777) == "0o600"
    # Inside the cage the name leads to the server; here the same token is used at the server's own address.
    home = grid.folder / "job-home"
    home.mkdir()
    (home / "credentials.json").write_text(json.dumps({**json.loads(file.read_text()), "address": grid.address}))
    as_job = {"DESKGRID_CLIENT_HOME": str(home)}
    until(lambda: grid.cli("job", "list", expect=None, **as_job).returncode == 0, what="the token is known")
    assert [found["id"] for found in json.loads(grid.cli("job", "list", "--json", **as_job).stdout)] == [job]
    assert grid.cli("user", "add", "mallory", expect=1, **as_job).stderr
    grid.cli("job", "cancel", str(job))
    until(lambda: grid.cli("job", "list", expect=None, **as_job).returncode == 1, what="the token has ended")


def test_job_dials_the_server_through_its_cage(grid: System):
    """TLS of the server itself, seen from inside the cage at the address of the doorway."""
    job = grid.submit("hangs = true\n", network='"overlay"', reach='{ grid = "api.server" }')
    grid.wait_for(job, "active", ["running"])
    script = (
        "import socket, ssl; c = ssl.create_default_context(); c.check_hostname = False; c.verify_mode = ssl.CERT_NONE;"
        "s = c.wrap_socket(socket.create_connection(('10.64.1.1', 8470), 30), server_hostname='server.deskgrid');"
        "s.sendall(b'GET /v1/grid HTTP/1.1\\r\\nHost: grid\\r\\nConnection: close\\r\\n\\r\\n');"
        "print(b''.join(iter(lambda: s.recv(65536), b'')).decode())"
    )
    command = [*inside(grid), sys.executable, "-c", script]

    def asked() -> bool:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        return '"wire"' in done.stdout

    until(asked, what="the server answers inside the cage")
    outside = script.replace("10.64.1.1", "127.0.0.1").replace("8470", grid.address.rpartition(":")[2])
    done = subprocess.run([*command[:-1], outside], capture_output=True, text=True, timeout=60, check=False)
    assert "refused" in done.stderr


def add_hub(system: System, name: str) -> Program:
    """Make and run a hub of its own process; it is ended with the grid."""
    home = str(system.folder / name)
    link = system.json("server", "hub-link")["link"]
    system.cli("hub", "join", link, "--name", name, "--home", home)
    program, _ = started(system, "hub", "run", "--home", home, "--listen", "127.0.0.1:0", name=name)
    return program


def test_peers_of_a_killed_hub_register_with_another(system: System):
    system.environment["DESKGRID_SERVER_HUB_LISTEN"] = "off"
    assert system.server is not None
    system.server.kill()
    system.server.environment = system.environment
    system.restart_server()
    programs = {label: add_hub(system, label) for label in ("h1", "h2")}
    known = {hub["label"]: hub["hub"]["name"].split(".")[0] for hub in system.json("hub", "list")}
    hubs = {known[label]: program for label, program in programs.items()}  # the server's own is still listed, and passed over
    assert len(hubs) == 2
    system.publish()
    system.add_worker()
    job = serving(system)
    _, ready = started(system, "connect", f"echo.job-{job}", "--wait", "1m")
    assert answered(ready["address"], b"before") == b"before", system.logs()

    async def hub_of_the_job(grid: Grid) -> str:
        found = [peer.hub for peer in await grid.peers() if peer.name.startswith("attempt")]
        return found[0].split(".")[0] if found else ""

    async def is_elsewhere(grid: Grid) -> bool:
        return await hub_of_the_job(grid) not in ("", first)

    first = system.until(hub_of_the_job, what="the job's peer is at a hub")
    hubs[first].kill()
    system.until(is_elsewhere, what="the job's peer is at the other hub")
    assert answered(ready["address"], b"after") == b"after", system.logs()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_shell_that_is_interrupted_cancels_its_job(grid: System, number: signal.Signals):
    """As a terminal does it: the signal goes to ssh, too, which waits for the machine by then, or is about to start."""
    grid.workers["pc"].stop()
    log = grid.folder / "shell.log"
    with log.open("wb") as file:
        command = [sys.executable, "-m", "deskgrid", "shell", "--disk", "tiny"]
        shell = subprocess.Popen(command, env=grid.environment, stdin=subprocess.DEVNULL, stderr=file, start_new_session=True)
    until(lambda: "on its way" in log.read_text(), what="it waits for the machine")
    os.killpg(shell.pid, number)
    assert shell.wait(30) != 0
    grid.wait_for(1, "cancelled", limit_s=5)
