"""The main job and its faults in real virtual machines: QEMU, the tiny template, everything real from submit to result."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from deskgrid.testing.tiny_template import tiny_template
from tests.system.harness import System, until
from tests.system.talk import answered, serve_folder, started

SCRIPT = """
echo "hello from $(uname -s), $1"
echo oops >&2
test -b /dev/hda && test -b /dev/hdb && echo "disks by their names"
df -k /scratch | tail -1
pwd
cat /context/files/input.txt /context/data/events > copied.txt
ln -s copied.txt link
mkdir deep && echo x > deep/executable && chmod 750 deep/executable
dd if=/dev/zero of=sparse bs=1 count=1 seek=50000000 2>/dev/null
ls /sys/class/net
"""
LIMIT_S = 180.0


@pytest.fixture
def vm_system(system: System, vm_worker: dict[str, str]) -> System:
    """A grid with one worker for virtual machines and the published tiny template."""
    template = tiny_template()
    system.publish_template(template.qcow2, "tiny")
    system.add_worker(**vm_worker)
    return system


def vm_job(system: System, script: str, *, name: str = "job", limits: str = "", **machine: str) -> Path:
    file = system.job_file(name=name, limits=limits, **{"scratch": '"8GiB"', "memory": '"256MiB"', **machine})
    context = file.parent / "context"
    (context / "context.sh").write_text(script)
    (context / "files").mkdir()
    (context / "files" / "input.txt").write_text("from the user\n")
    return file


@pytest.mark.parametrize("disk", ["tiny", pytest.param("tiny-iso", marks=pytest.mark.full)])
def test_main_job_in_a_real_virtual_machine(vm_system: System, disk: str):
    if disk == "tiny-iso":
        vm_system.publish_template(tiny_template().iso, disk)
    job = vm_job(vm_system, SCRIPT, disk=f'"{disk}"')
    out = vm_system.folder / "out"
    (vm_system.folder / "events").write_text("from the grid\n")
    vm_system.cli("data", "put", vm_system.folder / "events")
    vm_system.cli("run", job, "--data", "events=events@1", "-o", out)
    assert (out / "copied.txt").read_text() == "from the user\nfrom the grid\n"
    assert os.readlink(out / "link") == "copied.txt"
    assert (out / "deep" / "executable").stat().st_mode & 0o777 == 0o750
    sparse = (out / "sparse").stat()
    assert (sparse.st_size, sparse.st_blocks * 512 < 1_000_000) == (50_000_001, True)
    printed = vm_system.cli("job", "logs", "1").stdout.splitlines()
    assert printed[0].startswith("hello from Linux")
    assert "disks by their names" in printed
    assert "/scratch" in printed
    assert printed[-1] == "lo"  # no network card
    assert int(printed[2].split()[1]) > 8_000_000  # kilobytes: the scratch that was asked for
    assert vm_system.cli("job", "logs", "1", "--stderr").stdout == "oops\n"
    detail = vm_system.job(1)["job"]
    assert detail["result_bytes"] < 100_000
    vm_system.nothing_left()


@pytest.mark.full
def test_disk_that_is_on_the_pc_already_is_booted_where_it_lies(system: System, vm_worker: dict[str, str]):
    system.add_worker(**vm_worker)
    disk = system.folder / "my disk, once.qcow2"
    shutil.copy(tiny_template().qcow2, disk)
    home = ("--home", system.folder / "pc")
    assert system.cli("worker", "disk", "add", disk, "--name", "mine", "--agent", *home).stdout == "installed:mine\n"
    before = (hashlib.sha256(disk.read_bytes()).hexdigest(), disk.stat().st_mtime_ns)
    out = system.folder / "out"
    system.cli("run", vm_job(system, "cat /context/files/input.txt > copied.txt", disk='"installed:mine"'), "-o", out)
    assert (out / "copied.txt").read_text() == "from the user\n"
    assert not list((system.folder / "pc" / "cache").glob("*-*"))  # nothing was fetched
    assert (hashlib.sha256(disk.read_bytes()).hexdigest(), disk.stat().st_mtime_ns) == before
    system.nothing_left()


def test_killed_worker_finds_its_running_virtual_machine_again(vm_system: System):
    job = vm_system.json("job", "submit", vm_job(vm_system, "echo began; sleep 8; echo ended > done"))["id"]
    vm_system.wait_to_print(job, "began", LIMIT_S)
    [machine] = vm_system.machines()
    worker = vm_system.workers["pc"]
    worker.kill()
    assert machine.is_running()
    worker.start()
    detail = vm_system.wait_for(job, "completed", ["succeeded"], limit_s=LIMIT_S)
    assert len(detail["attempts"]) == 1
    vm_system.nothing_left()


@pytest.mark.full
def test_cancelled_and_paused_virtual_machines_obey(vm_system: System):
    job = vm_system.json("job", "submit", vm_job(vm_system, "while :; do echo tick; sleep 1; done"))["id"]
    vm_system.wait_to_print(job, "tick", LIMIT_S)
    [machine] = vm_system.machines()
    home = ("--home", str(vm_system.folder / "pc"))
    vm_system.cli("worker", "pause", *home)
    before = sum(machine.cpu_times()[:2])
    vm_system.wait_for(job, "active", ["suspended"])
    assert sum(machine.cpu_times()[:2]) - before < 0.3
    vm_system.cli("worker", "resume", *home)
    vm_system.wait_for(job, "active", ["running"])
    assert machine.nice() == 19
    vm_system.cli("job", "cancel", str(job))
    vm_system.wait_for(job, "cancelled", ["cancelled"])
    vm_system.nothing_left()


@pytest.mark.full
def test_virtual_machine_that_is_killed_or_hangs_fails_with_its_reason(vm_system: System):
    job = vm_system.json("job", "submit", vm_job(vm_system, "sleep 1000", name="killed", limits="max_lost = 1"))["id"]
    [machine] = until(lambda: vm_system.machines(), what="the machine runs", limit_s=LIMIT_S)
    attempts = vm_system.folder / "pc" / "attempts"
    until(lambda: any(file.stat().st_size for file in attempts.glob("**/journal.out")), what="QEMU has begun")
    machine.kill()
    detail = vm_system.wait_for(job, "failed", ["lost"], limit_s=LIMIT_S)
    assert "killed" in detail["job"]["message"]
    limits = 'attempts = 1\nwall_time = "12s"'
    job = vm_system.json("job", "submit", vm_job(vm_system, "while :; do :; done", name="hangs", limits=limits))["id"]
    assert "wall time" in vm_system.wait_for(job, "failed", ["failed"], limit_s=LIMIT_S)["job"]["message"]
    vm_system.nothing_left()


def test_disk_that_never_boots_ends_at_the_boot_time(vm_system: System):
    empty = vm_system.folder / "empty.qcow2"
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", empty, "64M"], check=True)
    vm_system.cli("disk", "import", empty, "--name", "empty")
    limits = 'attempts = 1\nboot_time = "4s"'
    job = vm_system.json("job", "submit", vm_job(vm_system, "true", disk='"empty"', limits=limits))["id"]
    assert "did not boot" in vm_system.wait_for(job, "failed", ["failed"], limit_s=LIMIT_S)["job"]["message"]
    vm_system.nothing_left()


@pytest.mark.full
def test_killed_server_while_a_virtual_machine_runs(vm_system: System):
    job = vm_system.json("job", "submit", vm_job(vm_system, "echo began; sleep 5; echo ended > done"))["id"]
    vm_system.wait_to_print(job, "began", LIMIT_S)
    assert vm_system.server is not None
    vm_system.server.kill()
    vm_system.restart_server()
    vm_system.wait_for(job, "completed", ["succeeded"], limit_s=LIMIT_S)
    vm_system.cli("job", "results", str(job), "-o", vm_system.folder / "out")
    assert (vm_system.folder / "out" / "done").read_text() == "ended\n"
    vm_system.nothing_left()


@pytest.mark.full
@pytest.mark.parametrize("seed", range(5))
def test_kill_storm_on_a_real_virtual_machine_leaves_nothing(vm_system: System, seed: int):
    """kill -9 of the worker at random moments of a job's life, from the download to the result."""
    import random
    import time

    rng = random.Random(seed)
    shutil.rmtree(vm_system.folder / "pc" / "cache", ignore_errors=True)
    script = "echo began; sleep 2; dd if=/dev/urandom of=big bs=1M count=20 2>/dev/null"
    job = vm_system.json("job", "submit", vm_job(vm_system, script, limits="max_lost = 100"))["id"]
    worker = vm_system.workers["pc"]
    for _ in range(6):
        time.sleep(rng.uniform(0.1, 6.0))  # the moment of the kill is what varies
        worker.kill()
        worker.start()
    vm_system.wait_for(job, "completed", limit_s=2 * LIMIT_S)
    vm_system.cli("job", "results", str(job), "-o", vm_system.folder / "out")
    assert (vm_system.folder / "out" / "big").stat().st_size == 20 << 20
    vm_system.nothing_left()


TALK = """
wget -q -O fetched http://site:8000/ || exit 1
wget -q -O fetched-at-localhost http://localhost:8000/ || exit 2
cp /run/deskgrid/services.json services.json
env | grep DESKGRID_ | sort
mkdir www && echo "page of job $DESKGRID_JOB" > www/index.html
httpd -f -p 8080 -h /scratch/www &
until wget -q -O own-at-localhost http://localhost:8080/; do sleep 1; done
wget -q -O fetched-at-own-port http://taken:8080/ || exit 3
while [ ! -e /scratch/stop ]; do sleep 1; done
"""


@pytest.mark.full
def test_programs_in_a_virtual_machine_talk_to_the_user_and_back(vm_system: System):
    """wget in the machine from the user's PC, by name, and at localhost where the port is free; the machine's web server from the
    user's PC; ssh, scp and rsync into the machine."""
    (vm_system.folder / "site").mkdir()
    (vm_system.folder / "site" / "index.html").write_text("from the user's PC\n")
    with serve_folder(vm_system.folder / "site") as port:
        started(vm_system, "offer", "web", str(port))
        network = {
            "network": '"overlay"',
            "offer": '["web:8080", "ssh:22"]',
            "reach": '{ site = "web.user:8000", taken = "web.user:8080" }',
        }
        vm_system.cli("job", "submit", vm_job(vm_system, TALK, disk='"tiny"', **network))
        _, ready = started(vm_system, "connect", "web.job-1")
        assert b"page of job 1" in answered(ready["address"], b"GET / HTTP/1.0\r\n\r\n"), vm_system.logs()
        (vm_system.folder / "big").write_bytes(os.urandom(1_000_000))
        vm_system.cli("scp", "big", "job-1:/scratch/big")
        vm_system.cli("scp", "job-1:/scratch/big", "back")
        assert (vm_system.folder / "back").read_bytes() == (vm_system.folder / "big").read_bytes()
        shell = f"{sys.executable} -m deskgrid ssh"
        rsync = ["rsync", "-e", shell, "-a", "site/", "job-1:/scratch/synced/"]
        subprocess.run(rsync, cwd=vm_system.folder, env=vm_system.environment, timeout=120, check=True)
        assert vm_system.cli("ssh", "job-1", "cat /scratch/synced/index.html; exit 7", expect=7).stdout == "from the user's PC\n"
        vm_system.cli("ssh", "job-1", "touch", "/scratch/stop")
        vm_system.wait_for(1, "completed", limit_s=LIMIT_S)
    vm_system.cli("job", "results", "1", "-o", vm_system.folder / "out")
    out = vm_system.folder / "out"
    for name in ("fetched", "fetched-at-localhost", "fetched-at-own-port"):
        assert (out / name).read_text() == "from the user's PC\n", name
    assert (out / "own-at-localhost").read_text() == "page of job 1\n"
    reached = json.loads((out / "services.json").read_text())["reach"]
    assert {name: service.get("localhost", False) for name, service in reached.items()} == {"site": True, "taken": False}
    assert "DESKGRID_SITE=site:8000" in vm_system.cli("job", "logs", "1").stdout
    vm_system.nothing_left(limit_s=LIMIT_S)


@pytest.mark.full
def test_shell_starts_a_machine_logs_in_and_cancels_it_at_the_end(vm_system: System):
    command = [sys.executable, "-m", "deskgrid", "shell", "--disk", "tiny", "--memory", "256MiB"]
    typed = "uname; id -un; exit 7\n"
    done = subprocess.run(
        command,
        env=vm_system.environment,
        cwd=vm_system.folder,
        input=typed,
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert (done.returncode, done.stdout.split()) == (7, ["Linux", "root"]), done.stderr
    vm_system.wait_for(1, "cancelled", limit_s=LIMIT_S)
    vm_system.nothing_left(limit_s=LIMIT_S)
