"""`deskgrid worker doctor` and the probes of a worker, with a QEMU that hangs as one does where /dev/kvm is there and does not work."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.system.harness import System, until

HANGING = '#!/bin/sh\n[ "$1" = --version ] && { echo "QEMU emulator version 7.2.0"; exit; }\nexec sleep 600\n'


def hanging_qemu(folder: Path) -> str:
    """Return a PATH on which QEMU starts and never comes to anything."""
    folder.mkdir()
    (folder / "qemu-system-x86_64").write_text(HANGING)
    (folder / "qemu-system-x86_64").chmod(0o755)
    return f"{folder}:{os.environ['PATH']}"


def sleepers(home: Path) -> list[psutil.Process]:
    """Return the processes of probes."""
    below = str(home / "probes")
    return [process for process in psutil.process_iter(["cwd"]) if str(process.info["cwd"] or "").startswith(below)]


def test_probe_of_a_killed_worker_does_not_outlive_the_next_start(system: System, tmp_path: Path) -> None:
    worker = system.add_worker(DESKGRID_WORKER_DRIVERS="qemu", PATH=hanging_qemu(tmp_path / "bin"))
    home = system.folder / "pc"
    [first] = until(lambda: sleepers(home), what="a probe hangs")
    worker.kill()
    assert first.is_running()
    worker.start()
    until(lambda: first not in sleepers(home), what="it is gone")
    worker.kill()
    for process in sleepers(home):
        process.kill()


def test_doctor_says_what_runs_here_and_what_would_change_it(system: System) -> None:
    system.add_worker(start=False)
    home = system.folder / "pc"
    (home / "worker.toml").write_text('drivers = ["qemu"]\naccelerator = "tcg"\nidle_s = 60\noverlay = false\n')
    environment = {"DESKGRID_WORKER_DRIVERS": "qemu", "DISPLAY": ""}
    said = system.cli("worker", "doctor", "--home", home, **environment).stdout.splitlines()
    about = {line[8:].partition(":")[0]: line for line in said}
    assert about["virtual machines (qemu)"].startswith("limited ") and "tcg" in about["virtual machines (qemu)"]
    assert about["programs in a sandbox (process)"].startswith("off ")
    assert '"process"] in worker.toml' in about["programs in a sandbox (process)"]
    assert "overlay = true" in about["services of jobs over the network"]
    assert "CPUs" in about["lent"]
    assert not list((home / "probes").glob("deskgrid-probe-*"))


def test_doctor_says_that_a_broken_qemu_is_not_usable(system: System, tmp_path: Path) -> None:
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "qemu-system-x86_64").write_text("#!/bin/sh\nexit 1\n")
    (broken / "qemu-system-x86_64").chmod(0o755)
    system.add_worker(start=False)
    found = system.cli("worker", "doctor", "--home", system.folder / "pc", "--json", PATH=f"{broken}:{os.environ['PATH']}")
    assert '"state": "no"' in found.stdout and "does not run" in found.stdout


def test_top_shows_the_worker_again_and_again(system: System) -> None:
    system.add_worker()
    home = system.folder / "pc"
    command = [sys.executable, "-m", "deskgrid", "worker", "top", "--home", str(home), "--interval", "0.1s", "--json"]
    process = subprocess.Popen(command, env=system.environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        decoder, text, seen = json.JSONDecoder(), "", 0
        while seen < 3:
            text = (text + process.stdout.readline()).lstrip()
            with contextlib.suppress(json.JSONDecodeError):
                status, end = decoder.raw_decode(text)
                text, seen = text[end:], seen + 1
                assert status["name"] == "pc"
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=20) in (0, 130, -2)
    finally:
        process.kill()
        process.wait()
