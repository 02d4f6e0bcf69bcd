"""Programs that the demo starts: none outlives it, whatever happens."""

from __future__ import annotations

import signal
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from deskgrid.cli.programs import Program, Programs
from deskgrid.errors import OperatorError


@pytest.fixture
def home(tmp_path: Path) -> Path:
    (tmp_path / "demo").mkdir()
    return tmp_path / "demo"


def init_server(home: Path) -> None:
    command = [sys.executable, "-m", "deskgrid", "server", "init", "--home", home / "server"]
    subprocess.run(command, check=True, capture_output=True)


def start_server(programs: Programs, home: Path) -> Program:
    return programs.start("server", "server", "run", "--home", str(home / "server"), "--listen", "127.0.0.1:0")


def test_an_error_ends_the_programs_and_removes_their_folder(home: Path):
    with pytest.raises(RuntimeError), Programs(home) as programs:
        init_server(home)
        server = start_server(programs, home)
        assert server.first_line().startswith(b"listening on 127.0.0.1:")
        raise RuntimeError
    assert server.process.returncode is not None
    assert not home.exists()


def test_what_a_program_left_running_is_ended_too_but_nobody_elses(home: Path):
    init_server(home)
    sleep = [sys.executable, "-c", "import time; time.sleep(600)", str(home / "machine")]
    with ExitStack() as started, Programs(home) as programs:
        shell_of_the_user = subprocess.Popen(sleep, cwd=home)
        started.callback(end, shell_of_the_user)
        server = start_server(programs, home)
        # Before it says something, its environment may not be there yet: a program has none for a moment of its exec.
        server.first_line()
        environment = psutil.Process(server.process.pid).environ()
        stray = subprocess.Popen(sleep, start_new_session=True, env=environment)
        started.callback(end, stray)
        programs.end()
        assert stray.wait(10) == -signal.SIGKILL
        assert shell_of_the_user.poll() is None


def end(process: subprocess.Popen[bytes]) -> None:
    process.kill()
    process.wait()


def test_kept_programs_go_on(home: Path):
    with Programs(home) as programs:
        init_server(home)
        server = start_server(programs, home)
        server.first_line()
        programs.kept = True
    (number,) = programs.process_ids
    assert psutil.pid_exists(number)
    assert home.exists()
    server.process.terminate()
    server.process.wait(20)


def test_program_that_ends_at_once_tells_its_last_words(home: Path):
    with Programs(home) as programs:
        program = programs.start("server", "server", "run", "--home", str(home / "empty"))
        with pytest.raises(OperatorError, match=r"the server ended with exit code 2: .*there is no grid in"):
            program.first_line()


def test_settings_of_another_grid_do_not_reach_the_programs(home: Path, monkeypatch: pytest.MonkeyPatch):
    init_server(home)
    monkeypatch.setenv("DESKGRID_SERVER_DATABASE", "sqlite:////nowhere/at/all")
    with Programs(home) as programs:
        assert start_server(programs, home).first_line()
