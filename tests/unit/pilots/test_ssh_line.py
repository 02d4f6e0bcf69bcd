"""What is run on a host by ssh, in the shells that a login may have: the very lines, without the ssh."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from deskgrid.pilots.commands import ssh_commands

COMMANDS = ssh_commands("desk", [])
LINES = {"submit": COMMANDS.submit[-1], "alive": COMMANDS.alive[-1], "cancel": COMMANDS.cancel[0][-1]}
SCRIPT = "{\ntrap 'echo told >told; exit' TERM\necho $$ >begun\nwhile :; do sleep 0.05; done\n}\n"


@pytest.fixture(params=["sh", "bash"])
def run(request: pytest.FixtureRequest, tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a line for a pilot, in tmp_path. Temporary folders are in tmp_path/tmp."""
    (tmp_path / "tmp").mkdir()

    def run(line: str, said: str = "", *, name: str = f"desk-{os.getpid()}") -> subprocess.CompletedProcess[str]:
        command = [request.param, "-c", LINES[line].replace("{name}", name)]
        environment = {**os.environ, "TMPDIR": str(tmp_path / "tmp")}
        return subprocess.run(
            command, input=said, cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=60, check=False
        )

    return run


def until(condition: Callable[[], object]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def number(folder: Path) -> int:
    """Return the process of the pilot, when it has begun."""
    until(lambda: (folder / "begun").exists() and (folder / "begun").read_text())
    return int((folder / "begun").read_text())


def is_empty(folder: Path) -> bool:
    return not list(folder.iterdir())


def test_pilot_is_there_until_it_is_told_to_end(run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    sent = run("submit", SCRIPT)
    assert (sent.returncode, sent.stdout.strip()) == (0, f"desk-{os.getpid()}")
    pid = number(tmp_path)
    assert os.getsid(pid) == os.getpgid(pid) == pid, "it does not end with the connection"
    assert len(list((tmp_path / "tmp").iterdir())) == 1
    there, other = run("alive"), run("alive", name=f"desk-{os.getpid()}0")
    assert there.returncode == 0 and there.stdout.strip()
    assert (other.returncode, other.stdout) == (0, "")
    assert run("cancel").returncode == 0
    until(lambda: is_empty(tmp_path / "tmp"))
    assert (tmp_path / "told").exists()
    gone = run("alive")
    assert (gone.returncode, gone.stdout, gone.stderr) == (0, "", "")
    assert run("cancel").returncode == 0, "what is gone already is no error"


def test_folder_goes_with_a_pilot_that_is_killed(run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    run("submit", SCRIPT)
    os.kill(number(tmp_path), signal.SIGKILL)
    until(lambda: is_empty(tmp_path / "tmp"))


def test_folder_goes_with_a_pilot_that_ends_by_itself(run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path) -> None:
    run("submit", '{\necho "$TMPDIR" >begun\n}\n')
    until(lambda: is_empty(tmp_path / "tmp"))
    assert (tmp_path / "begun").read_text().startswith(str(tmp_path / "tmp"))


def test_script_that_was_cut_off_is_refused_and_leaves_nothing(
    run: Callable[..., subprocess.CompletedProcess[str]], tmp_path: Path
) -> None:
    sent = run("submit", SCRIPT[:-2])
    assert sent.returncode != 0
    assert is_empty(tmp_path / "tmp") and not (tmp_path / "begun").exists()
