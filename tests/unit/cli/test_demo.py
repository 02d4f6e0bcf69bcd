"""The demo, with real programs and a real virtual machine."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deskgrid.cli.programs import _MARK
from tests.unit.cli.conftest import Deskgrid

ROOT = Path(__file__).parents[3]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    # The cache of the working copy: building the disk needs Debian's packages, once.
    (tmp_path / "tmp").mkdir()
    cache = os.environ.get("DESKGRID_CACHE", str(ROOT / ".cache"))
    return {**os.environ, "DESKGRID_CACHE": cache, "TMPDIR": str(tmp_path / "tmp")}


def left_over(folder: Path) -> list[object]:
    """Return files and processes of demos that used this temporary folder."""
    found: list[object] = list((folder / "tmp").iterdir())
    for process in psutil.process_iter():
        try:
            if process.environ().get(_MARK, "").startswith(str(folder)):
                found.append(process)
        except psutil.Error:
            continue
    return found


def test_demo_runs_a_job_in_a_machine_and_leaves_only_its_result(tmp_path: Path, environment: dict[str, str]):
    command = [sys.executable, "-m", "deskgrid", "demo", "--json"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["run"]["job"]["job"]["state"] == "completed"
    assert set(report["files"]) == {"hello.txt", "numbers/1", "numbers/2", "numbers/3"}
    assert (tmp_path / "demo-result" / "hello.txt").read_text().startswith("Hello from a virtual machine")
    assert (tmp_path / "demo-result" / "numbers" / "3").read_text() == "9\n"
    assert left_over(tmp_path) == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_demo_that_is_stopped_leaves_nothing(number: signal.Signals, tmp_path: Path, environment: dict[str, str]):
    command = [sys.executable, "-m", "deskgrid", "demo"]
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as demo:
        deadline = time.monotonic() + 60
        while len(left_over(tmp_path)) < 4 and time.monotonic() < deadline:  # a folder, a server, two workers
            time.sleep(0.05)
        demo.send_signal(number)
        told, _ = demo.communicate(timeout=60)
    assert demo.returncode == 130, told
    assert b"Traceback" not in told
    assert left_over(tmp_path) == []
    assert not (tmp_path / "demo-result").exists()


def test_folder_that_is_not_a_demos_is_not_replaced(deskgrid: Deskgrid):
    Path("demo-result").mkdir()
    Path("demo-result/thesis.tex").write_text("years of work")
    ran = deskgrid("demo")
    assert (ran.code, "not from a demo" in ran.err) == (2, True)
    assert Path("demo-result/thesis.tex").exists()
