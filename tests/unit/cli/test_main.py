"""What holds for all commands: help, completion, exit codes, errors."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from cyclopts import App

from deskgrid.cli import main as main_module
from deskgrid.cli import status
from deskgrid.cli.job import JobOptions
from deskgrid.cli.main import app, main
from deskgrid.client.jobfile import KEYS
from deskgrid.errors import Conflict, Forbidden, InvalidInput, NoSpace, NotFound, ProtocolError, Unreachable
from tests.unit.cli.conftest import Deskgrid


def commands(parent: App, path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Return every command of the tree, groups too."""
    for name in parent:
        if not name.startswith("-"):
            yield (*path, name)
            yield from commands(parent[name], (*path, name))


ALL = list(commands(app))
PRINTING = [path for path in ALL if not any(other[: len(path)] == path for other in ALL if other != path)]


HANDING_OVER = {("ssh",), ("scp",)}
"""Those that give the terminal to another program."""


def test_the_commands_are_those_that_the_documentation_promises():
    wanted = """
        demo status run login audit
        connect offer proxy ssh scp shell console peers connection.list
        server.init server.run server.join-link server.hub-link server.migrate server.backup server.restore
        hub.join hub.run hub.list hub.remove
        worker.join worker.run worker.status worker.top worker.doctor worker.pause worker.resume worker.leave
        worker.disk.add worker.disk.list worker.disk.remove
        worker.link worker.list worker.reserve worker.remove
        user.add user.list user.token user.tokens user.set user.renew group.add group.list group.members group.set
        pilot.submit pilot.link pilot.list pilot.program pilot.factory
        disk.build disk.endorse disk.export disk.import disk.list disk.revoke disk.search disk.show
        data.put data.get data.list data.show data.remove data.place data.unplace data.placements data.where
        job.submit job.list job.show job.wait job.logs job.results job.cancel job.remove
        array.list array.show array.wait array.cancel array.remove array.results
        set.submit set.list set.show set.wait set.cancel set.results
        app.publish app.list app.show app.remove
    """
    assert {".".join(path) for path in PRINTING} == set(wanted.split())


@pytest.mark.parametrize("path", [(), *ALL], ids=" ".join)
def test_every_command_has_help(path: tuple[str, ...], deskgrid: Deskgrid):
    ran = deskgrid(*path, "--help")
    assert (ran.code, ran.err) == (0, "")
    assert f"Usage: {' '.join(('deskgrid', *path))}" in ran.out
    if path in PRINTING:
        assert "For example:" in ran.out
        assert f"    deskgrid {' '.join(path)}" in ran.out
        assert ("--json" in ran.out) != (path in HANDING_OVER)
    assert "--no-" not in ran.out


@pytest.mark.parametrize("path", ALL, ids=" ".join)
def test_an_unknown_option_is_a_usage_error(path: tuple[str, ...], deskgrid: Deskgrid):
    ran = deskgrid(*path, "--colour", "blue")
    assert ran.code == 2
    assert ran.err.startswith("deskgrid: ")
    assert f"deskgrid {' '.join(path)}".strip() in ran.err


def test_usage_errors_name_what_was_meant(deskgrid: Deskgrid):
    assert 'Did you mean "job"' in deskgrid("jbo").err
    assert "Did you mean --name" in deskgrid("job", "submit", "--naem", "x").err
    assert deskgrid("job", "show").code == 2
    assert deskgrid("job", "show", "seven").code == 2
    assert deskgrid("job", "list", "--json", "--limit", "many").error["exit_code"] == 2


def test_version_is_printed(deskgrid: Deskgrid):
    assert deskgrid("--version").out == "0.1.0\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_commands_and_options(shell: Any, deskgrid: Deskgrid, tmp_path: Path):
    ran = deskgrid("--install-completion", "--shell", shell, "--output", tmp_path / "completion")
    assert ran.code == 0
    script = (tmp_path / "completion").read_text()
    for word in ("submit", "join-link", "publish", "wall-time", "follow"):
        assert word in script


def test_bash_completes_commands(deskgrid: Deskgrid, tmp_path: Path):
    deskgrid("--install-completion", "--shell", "bash", "--output", tmp_path / "completion")
    ask = f"source {tmp_path}/completion; COMP_WORDS=(deskgrid job s); COMP_CWORD=2; COMP_LINE='deskgrid job s'; COMP_POINT=14; "
    ask += 'f=$(complete -p deskgrid | sed "s/.*-F \\([^ ]*\\).*/\\1/"); "$f" deskgrid s job 2>/dev/null; echo "${COMPREPLY[@]}"'
    done = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=False)
    assert {"submit", "show"} <= set(done.stdout.split()), done.stderr


def test_help_starts_fast_because_nothing_heavy_is_loaded():
    code = (
        "import sys; from deskgrid.cli.main import main; main(['--help']); "
        "print([name for name in ('aiohttp', 'sqlalchemy', 'starlette', 'structlog', 'cryptography') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


@pytest.mark.parametrize(
    ("error", "code", "name"),
    [
        (InvalidInput("x"), 2, "InvalidInput"),
        (NotFound("x"), 2, "NotFound"),
        (Conflict("x"), 1, "Conflict"),
        (Forbidden("x"), 1, "Forbidden"),
        (NoSpace("x"), 1, "NoSpace"),
        (ProtocolError("x"), 1, "ProtocolError"),
        (Unreachable("x"), 3, "Unreachable"),
        (ExceptionGroup("tasks", [ExceptionGroup("inner", [Unreachable("x")])]), 3, "Unreachable"),
        (PermissionError(13, "Permission denied", "/etc/x"), 1, "OSError"),
        (ValueError("x"), 1, "ValueError"),
    ],
)
def test_each_error_has_its_exit_code_in_words_and_in_json(
    error: Exception, code: int, name: str, deskgrid: Deskgrid, monkeypatch: pytest.MonkeyPatch
):
    def fail() -> None:
        raise error

    monkeypatch.setattr(status, "connected", fail)
    words, document = deskgrid("status"), deskgrid("status", "--json")
    assert (words.code, document.code, document.out) == (code, code, "")
    assert document.error["error"] == name
    assert document.error["exit_code"] == code
    assert document.error["message"] in words.err
    assert ("Traceback" in words.err) == (name == "ValueError")


@pytest.mark.parametrize("error", [KeyboardInterrupt(), asyncio.CancelledError()])
def test_interrupted_commands_exit_with_130_and_say_nothing(
    error: BaseException, deskgrid: Deskgrid, monkeypatch: pytest.MonkeyPatch
):
    def fail() -> None:
        raise error

    monkeypatch.setattr(status, "connected", fail)
    assert deskgrid("status") == (130, "", "")


def test_ctrl_c_ends_a_server_at_once(tmp_path: Path):
    environment = {**os.environ, "DESKGRID_SERVER_HOME": str(tmp_path)}
    deskgrid = [sys.executable, "-m", "deskgrid", "server"]
    subprocess.run([*deskgrid, "init"], env=environment, check=True, capture_output=True)
    command = [*deskgrid, "run", "--listen", "127.0.0.1:0"]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline().startswith(b"listening on 127.0.0.1:")
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
    assert process.returncode in (0, 130)
    assert b"Traceback" not in errors
    assert time.monotonic() - began < 10


def test_reader_that_goes_away_is_no_traceback(tmp_path: Path):
    command = [sys.executable, "-m", "deskgrid", "--help"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.close()
        assert process.stderr is not None
        assert b"Traceback" not in process.stderr.read()


def test_options_of_a_job_are_the_keys_of_a_job_file():
    assert set(JobOptions.__dataclass_fields__) == {key.given for key in KEYS}


def test_main_takes_the_arguments_of_the_process(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]):
    monkeypatch.setattr(sys, "argv", ["deskgrid", "--version"])
    assert main() == 0
    assert capfd.readouterr().out == f"{main_module.__version__}\n"
