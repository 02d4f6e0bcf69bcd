"""The owner comes back, for real: QEMU's memory is given back, machines go on after kills and after the PC was switched off."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from deskgrid.testing.tiny_template import tiny_template
from tests.system.harness import System, until
from tests.system.test_real_vm import LIMIT_S, vm_job

COUNTING = "i=0; while [ $i -lt {count} ]; do i=$((i + 1)); echo $i; echo $i >>lines; sleep 0.2; done"


def counting_job(system: System, count: int) -> int:
    return system.json("job", "submit", vm_job(system, COUNTING.format(count=count)))["id"]


def told(system: System, job: int) -> list[str]:
    return system.cli("job", "logs", str(job)).stdout.split()


def finish(system: System, job: int, count: int) -> None:
    """Hold a job that has counted to having done each step once, in one attempt."""
    detail = system.wait_for(job, "completed", ["succeeded"], limit_s=LIMIT_S)
    assert len(detail["attempts"]) == 1
    out = system.folder / "out"
    system.cli("job", "results", str(job), "-o", out)
    wanted = [str(number) for number in range(1, count + 1)]
    assert (out / "lines").read_text().split() == wanted
    assert told(system, job) == wanted
    system.nothing_left()


@pytest.mark.full
def test_memory_is_given_back_to_the_owner_and_the_job_goes_on_after_a_reboot(system: System, vm_worker: dict[str, str]) -> None:
    system.publish_template(tiny_template().qcow2, "tiny")
    worker = system.add_worker(**vm_worker, DESKGRID_WORKER_RELEASE_S="0.5")
    job = counting_job(system, 60)
    until(lambda: len(told(system, job)) > 5, what="the job counts", limit_s=LIMIT_S)
    home = ("--home", str(system.folder / "pc"))
    system.cli("worker", "pause", *home)
    until(lambda: not system.machines(), what="the machine's memory is free", limit_s=LIMIT_S)
    system.wait_for(job, "active", ["suspended"])
    # As if the PC were switched off: nothing of ours runs, and nobody was asked.
    worker.kill()
    worker.start()
    system.cli("worker", "resume", *home)
    finish(system, job, 60)


def test_worker_and_machine_that_are_killed_lose_one_interval_at_most(system: System, vm_worker: dict[str, str]) -> None:
    system.publish_template(tiny_template().qcow2, "tiny")
    worker = system.add_worker(**vm_worker, DESKGRID_WORKER_CHECKPOINT_S="4")
    job = counting_job(system, 60)
    pc = system.folder / "pc"
    for count in (1, 2):
        until(lambda count=count: worker.said().count("checkpoint ") > count, what="a checkpoint", limit_s=LIMIT_S)
        [machine] = system.machines()
        worker.kill()
        machine.kill()
        worker.start()
        until(lambda count=count: worker.said().count("machine_restored") == count, what="it goes on", limit_s=LIMIT_S)
    assert list(pc.glob("attempts/*/machine/checkpoint.json"))
    finish(system, job, 60)


def test_rules_in_the_settings_pause_a_worker_and_say_why(system: System) -> None:
    system.publish()
    # An hour of the day that is not now, whatever the time is.
    hour = (time.localtime().tm_hour + 12) % 24
    system.add_worker(DESKGRID_WORKER_HOURS=f"{hour:02}:00-{(hour + 1) % 24:02}:00")
    job = system.submit()
    home = ("--home", str(system.folder / "pc"))
    until(lambda: "outside of the hours" in system.cli("worker", "status", *home).stdout, what="the worker says why")
    assert system.json("worker", "list")[0]["state"] == "paused"
    assert system.states(job)[0] == "waiting"
    assert "outside of the hours" in system.cli("worker", "resume", *home).stdout


# ---- a screen


@pytest.fixture
def display(tmp_path: Path) -> Iterator[str]:
    """A real X server without a screen; its name."""
    reading, writing = os.pipe()
    server = subprocess.Popen(
        ["Xvfb", "-displayfd", str(writing), "-nolisten", "tcp", "-screen", "0", "640x480x24"],
        pass_fds=[writing],
        stderr=subprocess.DEVNULL,
    )
    os.close(writing)
    try:
        with os.fdopen(reading) as told_by:
            yield f":{told_by.readline().strip()}"
    finally:
        server.terminate()
        server.wait()


@pytest.mark.full
def test_machine_stands_still_within_two_seconds_of_the_first_touch_of_the_mouse(system: System, display: str) -> None:
    from Xlib import X
    from Xlib.display import Display
    from Xlib.ext import xtest

    system.publish()
    system.add_worker(DISPLAY=display, DESKGRID_WORKER_IDLE_S="3")
    job = system.submit("tick_s = 0.05")
    [machine] = until(lambda: system.machines(), what="nobody is at the PC, so the machine runs")
    system.wait_for(job, "active", ["running"])
    screen = Display(display)
    xtest.fake_input(screen, X.MotionNotify, x=10, y=10)
    screen.sync()
    touched = time.monotonic()
    until(lambda: machine.status() == psutil.STATUS_STOPPED, what="the machine stands still")
    assert time.monotonic() - touched <= 2.0
    system.wait_for(job, "active", ["suspended"])
    system.wait_for(job, "active", ["running"])
    screen.close()
    system.cli("job", "cancel", str(job))
    system.nothing_left()


@pytest.mark.full
def test_x_server_tells_of_full_screen_and_may_end_and_come_back(display: str) -> None:
    from Xlib import X, Xatom
    from Xlib.display import Display

    from deskgrid.worker.desktop_x11 import XServer

    server = XServer(display)
    seen = server.look()
    assert seen is not None and seen.idle_s is not None and not seen.full_screen
    screen = Display(display)
    root = screen.screen().root
    window = root.create_window(0, 0, 640, 480, 0, screen.screen().root_depth)
    atom = screen.intern_atom
    window.change_property(atom("_NET_WM_STATE"), Xatom.ATOM, 32, [atom("_NET_WM_STATE_FULLSCREEN")])
    root.change_property(atom("_NET_ACTIVE_WINDOW"), Xatom.WINDOW, 32, [window.id])
    screen.sync()
    seen = server.look()
    assert seen is not None and seen.full_screen
    window.destroy()
    screen.sync()
    seen = server.look()
    assert seen is not None and not seen.full_screen
    assert X.NONE == 0
    screen.close()
    [process] = [one for one in psutil.process_iter(["name", "cmdline"]) if one.info["name"] == "Xvfb" and _shows(one, display)]
    process.send_signal(signal.SIGKILL)
    until(lambda: server.look() is None, what="it is gone")
    server.close()


def _shows(process: psutil.Process, display: str) -> bool:
    """Tell whether an Xvfb is ours: of its own children the test has one."""
    return process.ppid() == os.getpid() and bool(display)
