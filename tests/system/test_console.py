"""`deskgrid console` with real processes and fake machines, which speak VNC, too; a real machine's screen is in test_real_vm.py."""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from typing import Any

import pytest

from deskgrid.client.grid import Grid
from deskgrid.testing.rfb import Viewer
from tests.system.harness import LIMIT_S, Program, System
from tests.system.talk import dial, started

STUCK = "console = true\nnever_boots = true\n"


@pytest.fixture
def grid(system: System) -> System:
    """A grid with a disk and a worker."""
    system.publish()
    system.add_worker()
    return system


def opened(grid: System, job: int, *arguments: str, name: str) -> tuple[Program, dict[str, Any]]:
    return started(grid, "console", f"job-{job}", *arguments, name=name)


def logged_in(ready: dict[str, Any]) -> Viewer:
    viewer = Viewer(dial(ready["address"]))
    assert viewer.log_in(ready["password"])
    return viewer


async def no_connection(grid: Grid) -> bool:
    return all(not peer.connections for peer in await grid.peers())


def exit_code(program: Program) -> int:
    assert program.process is not None
    return program.process.wait(LIMIT_S)


def files_that_tell(grid: System, secret: str) -> list[Path]:
    """Return the files of the server and of the worker in which a secret is."""
    files = [file for part in ("server", "pc") for file in (grid.folder / part).rglob("*") if file.is_file()]
    return [file for file in (*files, grid.folder / "server.log", grid.folder / "pc.log") if secret.encode() in file.read_bytes()]


def test_owner_sees_a_machine_without_a_network_that_never_boots_and_types_on_it(grid: System):
    job = grid.submit(STUCK)
    program, ready = opened(grid, job, name="first")
    assert ready["url"] == f"vnc://{ready['address']}"
    with logged_in(ready) as viewer:
        assert (viewer.width, viewer.height, viewer.look()) == (1, 1, bytes(4))
        viewer.type("q")
        grid.wait_to_print(job, "q")
        with pytest.raises(ConnectionRefusedError):
            dial(ready["address"])
        assert files_that_tell(grid, ready["password"]) == []
    assert exit_code(program) == 0
    program, again = opened(grid, job, name="second")
    assert again["password"] != ready["password"]
    with Viewer(dial(again["address"])) as viewer:
        assert not viewer.log_in(ready["password"])
    assert exit_code(program) == 0
    program, _ = opened(grid, job, name="third")
    assert program.process is not None
    program.process.send_signal(signal.SIGINT)
    assert exit_code(program) == 130
    grid.until(no_connection, what="no connection is left")
    assert grid.states(job) == ("active", ["running"])


def test_console_ends_with_its_machine_and_survives_no_worker_but_can_be_opened_again(grid: System):
    job = grid.submit(STUCK)
    program, ready = opened(grid, job, name="first")
    with logged_in(ready) as viewer:
        grid.workers["pc"].kill()
        viewer.until_ended()
    exit_code(program)
    grid.workers["pc"].start()
    program, ready = opened(grid, job, name="second")
    with logged_in(ready) as viewer:
        assert viewer.look()
        grid.cli("job", "cancel", str(job))
        viewer.until_ended()
    exit_code(program)
    grid.nothing_left()
    refused = grid.cli("console", f"job-{job}", expect=None)
    assert (refused.returncode, "is cancelled" in refused.stderr) == (1, True)


def test_job_in_the_overlay_shows_its_screen_and_other_users_do_not_see_it(grid: System):
    grid.cli("user", "add", "bob")
    job = grid.submit(f"{STUCK}serve = [7000]\n", network='"overlay"', offer='["echo:7000"]', share='["user:bob"]')
    program, ready = opened(grid, job, name="first")
    with logged_in(ready) as viewer:
        assert viewer.look()
    assert exit_code(program) == 0
    bob = {"DESKGRID_CLIENT_HOME": str(grid.folder / "bob")}
    grid.cli("login", grid.json("user", "token", "bob")["link"], **bob)
    refused = grid.cli("console", f"job-{job}", expect=None, **bob)
    assert refused.returncode != 0
    assert "for its owner only" in refused.stderr


VIEWER = """#!{python}
import os, socket, sys
from deskgrid.client.grid import Grid
from deskgrid.testing.rfb import Viewer
told = dict(line.split("=", 1) for line in sys.stdin.read().splitlines() if "=" in line)
password = told.get("password") or os.environ["VNC_PASSWORD"]
port = int(told.get("port") or sys.argv[1].removeprefix("127.0.0.1::"))
assert password not in " ".join(sys.argv)
with Viewer(socket.create_connection(("127.0.0.1", port))) as viewer:
    assert viewer.log_in(password) and viewer.look()
    open("seen-" + os.path.basename(sys.argv[0]), "w").write(str(viewer.width))
"""


def test_viewer_is_started_and_told_the_password_not_by_its_arguments(grid: System):
    job = grid.submit(STUCK)
    for name in ("vncviewer", "remote-viewer"):
        program = grid.folder / name
        program.write_text(VIEWER.format(python=sys.executable))
        program.chmod(0o755)
        shown = grid.cli("console", f"job-{job}", "--viewer", str(program)).stdout
        assert shown.startswith("vnc://127.0.0.1:")
        assert "password" not in shown
        assert (grid.folder / f"seen-{name}").read_text() == "1"
    broken = grid.folder / "broken"
    broken.write_text("#!/bin/sh\nexit 3\n")
    broken.chmod(0o755)
    failed = grid.cli("console", f"job-{job}", "--viewer", str(broken), expect=1)
    assert "exit code 3" in failed.stderr
    assert "is not installed" in grid.cli("console", f"job-{job}", "--viewer", "no-such-viewer", expect=2).stderr
