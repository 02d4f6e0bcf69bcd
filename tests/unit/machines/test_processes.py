"""Processes are found again, ended, and never mistaken for others."""

from __future__ import annotations

import os
import secrets
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from deskgrid.clock import SystemClock
from deskgrid.errors import MachineFailed
from deskgrid.machines import processes
from deskgrid.machines.processes import ProcessIdentity

SLEEPER = "import time; time.sleep(600)"


@pytest.fixture
def token() -> str:
    return secrets.token_hex(16)


async def test_process_is_found_by_its_token_and_ended(tmp_path: Path, token: str) -> None:
    identity = processes.spawn([sys.executable, "-c", SLEEPER, token], cwd=tmp_path, log=tmp_path / "log")
    assert processes.is_alive(identity)
    assert processes.find_by_token(token) == identity
    await processes.kill(identity, SystemClock())
    await processes.kill(identity, SystemClock())
    assert not processes.is_alive(identity)
    assert processes.find_by_token(token) is None


async def test_process_runs_in_a_session_of_its_own(tmp_path: Path, token: str) -> None:
    identity = processes.spawn([sys.executable, "-c", SLEEPER, token], cwd=tmp_path, log=tmp_path / "log")
    assert os.getsid(identity.pid) == identity.pid != os.getsid(0)
    await processes.kill(identity, SystemClock())


async def test_process_survives_the_one_that_started_it_and_is_known_to_the_next(tmp_path: Path, token: str) -> None:
    script = (
        "import sys, pathlib; from deskgrid.machines import processes as p; here = pathlib.Path(sys.argv[1]);"
        f"p.write_identity(here, p.spawn([sys.executable, '-c', {SLEEPER!r}, {token!r}], cwd=here, log=here / 'log'))"
    )
    subprocess.run([sys.executable, "-c", script, tmp_path], check=True)
    identity = processes.read_identity(tmp_path)
    assert identity is not None
    assert processes.is_alive(identity)
    await processes.kill(identity, SystemClock())
    assert not processes.is_alive(identity)


async def test_process_that_ended_but_was_not_reaped_is_not_alive(tmp_path: Path) -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPER]) as child:
        identity = ProcessIdentity(child.pid, processes._began(child.pid) or "")
        assert processes.is_alive(identity)
        child.send_signal(signal.SIGKILL)
        assert await processes.wait_gone(identity, SystemClock(), limit_s=10)


async def test_same_number_of_another_time_is_not_touched() -> None:
    with subprocess.Popen([sys.executable, "-c", SLEEPER]) as child:
        stranger = ProcessIdentity(child.pid, "another boot:1")
        assert not processes.is_alive(stranger)
        processes.send_signal(stranger, signal.SIGKILL)
        await processes.kill(stranger, SystemClock())
        assert child.poll() is None
        child.kill()


def test_gentle_start_keeps_the_process_and_lowers_its_priority(tmp_path: Path) -> None:
    limits = "*resource.getrlimit(resource.RLIMIT_CPU), *resource.getrlimit(resource.RLIMIT_NOFILE)"
    script = f"import os, resource; print(os.getpid(), os.nice(0), {limits})"
    command = processes.gently([sys.executable, "-c", script], nice=7, cpu_time_s=2.5)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as child:
        pid, nice, soft, hard, *files = map(int, child.communicate()[0].split())
    assert pid == child.pid
    assert nice == min(os.nice(0) + 7, 19)
    assert (soft, hard) == (3, 3)
    assert 0 < files[0] == files[1] <= processes.MOST_FILES


def test_programs_that_this_pc_lacks_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "find_program", lambda name: "/bin/nice" if name == "nice" else None)
    assert processes.gently(["program"], nice=5, cpu_time_s=9) == ["/bin/nice", "-n", "5", "program"]


def test_missing_program_is_told_as_machine_failed(tmp_path: Path) -> None:
    with pytest.raises(MachineFailed, match="no-such-program"):
        processes.spawn(["no-such-program"], cwd=tmp_path, log=tmp_path / "log")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"pid": "x", "began": "y"}'])
def test_damaged_identity_counts_as_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "process.json").write_text(content)
    assert processes.read_identity(tmp_path) is None
