"""Everything that the issue of the main job names as a fault, with real processes and the fake driver's machines."""

from __future__ import annotations

import signal
import time
from pathlib import Path

import pytest

from deskgrid.archive import zstd
from deskgrid.client.grid import describe_file
from deskgrid.client.transport import Transport, load_credentials
from deskgrid.model import wire
from deskgrid.model.data import DataKind, Disk
from deskgrid.model.machines import DiskFormat
from deskgrid.testing.gate import Gate
from tests.system.harness import System, until

FOREVER = "hangs = true\n"


@pytest.mark.parametrize("moment", ["running", "ending", "preparing"])
def test_killed_worker_that_restarts_finishes_its_job_and_leaves_nothing(system: System, moment: str):
    system.publish()
    plan = {"running": "duration_s = 4\n", "ending": "duration_s = 2\n", "preparing": "boot_s = 1\n"}[moment]
    worker = system.add_worker()
    job = system.submit(plan)
    if moment == "preparing":
        until(lambda: list((system.folder / "pc" / "journal").glob("*")), what="the job is in the journal")
    elif moment == "running":
        until(lambda: system.machines(), what="the machine runs")
    else:
        until(lambda: system.machines(), what="the machine runs")
        until(lambda: not system.machines(), what="the machine has ended")
    worker.kill()
    worker.start()
    system.wait_for(job, "completed")
    system.nothing_left()


def test_worker_killed_again_and_again_leaves_nothing_and_the_job_completes(system: System):
    system.publish()
    worker = system.add_worker()
    job = system.submit("duration_s = 2\n", limits="max_lost = 100")
    for pause in (0.3, 0.7, 1.1, 1.6, 2.3):
        time.sleep(pause)  # the moment of the kill is what varies
        worker.kill()
        worker.start()
    system.wait_for(job, "completed")
    system.nothing_left()


def test_job_of_a_dead_worker_is_done_by_another(system: System):
    system.publish()
    dead = system.add_worker("dead")
    job = system.submit("duration_s = 3\n")
    until(lambda: system.machines("dead"), what="the machine runs")
    dead.kill()
    system.add_worker("alive")
    detail = system.wait_for(job, "completed", ["lost", "succeeded"])
    assert "nothing was heard" in detail["attempts"][0]["reason"]
    dead.start()
    system.nothing_left("dead")


def test_killed_server_loses_nothing_that_it_acknowledged(system: System):
    system.publish()
    system.add_worker()
    running = system.submit("duration_s = 3\n", name="a")
    until(lambda: system.machines(), what="the machine runs")
    waiting = [system.submit(name=f"w{number}") for number in range(3)]
    assert system.server is not None
    system.server.kill()
    time.sleep(1)
    system.restart_server()
    for job in (running, *waiting):
        system.wait_for(job, "completed")
    assert system.states(running)[1] == ["succeeded"]
    system.nothing_left()


async def test_cut_network_delivers_the_result_late(system: System):
    import asyncio

    system.publish()
    async with Gate(system.address) as gate:
        await asyncio.to_thread(system.add_worker, address=gate.address)
        job = await asyncio.to_thread(system.submit, "duration_s = 2\n")
        await asyncio.to_thread(until, lambda: system.machines(), what="the machine runs")
        gate.shut()
        await asyncio.to_thread(system.wait_for, job, "waiting", ["lost"])
        await asyncio.to_thread(until, lambda: not system.machines(), what="the machine has ended, unseen")
        gate.open()
        await asyncio.to_thread(system.wait_for, job, "completed", ["succeeded"])
        await asyncio.to_thread(system.nothing_left)


async def test_late_result_of_a_finished_job_is_refused_and_its_space_freed(system: System):
    import asyncio

    system.publish()
    async with Gate(system.address) as gate:
        await asyncio.to_thread(system.add_worker, "late", address=gate.address)
        job = await asyncio.to_thread(system.submit, "duration_s = 1\n")
        await asyncio.to_thread(until, lambda: system.machines("late"), what="the machine runs")
        gate.shut()
        await asyncio.to_thread(system.wait_for, job, "waiting", ["lost"])
        await asyncio.to_thread(system.add_worker, "quick")
        await asyncio.to_thread(system.wait_for, job, "completed", ["lost", "succeeded"])
        gate.open()
        await asyncio.to_thread(system.nothing_left, "late")
        assert (await asyncio.to_thread(system.states, job)) == ("completed", ["lost", "succeeded"])


def test_cancel_while_running_leaves_nothing(system: System):
    system.publish()
    system.add_worker()
    job = system.submit(FOREVER)
    until(lambda: system.machines(), what="the machine runs")
    system.cli("job", "cancel", str(job))
    system.wait_for(job, "cancelled", ["cancelled"])
    system.nothing_left()


def test_picture_of_a_guest_that_does_not_boot_is_what_the_job_brings(system: System):
    system.publish()
    system.add_worker()
    job = system.submit("never_boots = true\n", limits='attempts = 1\nboot_time = "1s"')
    system.wait_for(job, "failed", ["failed"])
    system.cli("job", "results", str(job), "-o", system.folder / "out")
    assert [path.name for path in (system.folder / "out").iterdir()] == ["screen.png"]
    system.nothing_left()


@pytest.mark.parametrize(
    ("plan", "limits", "reason"),
    [
        ("never_boots = true\n", 'boot_time = "1s"', "did not boot"),
        (FOREVER, 'wall_time = "1s"', "wall time"),
        ("reboots = true\n", "", "reset or panicked"),
    ],
)
def test_guest_that_does_not_end_well_is_a_failed_attempt_with_its_reason(system: System, plan: str, limits: str, reason: str):
    system.publish()
    system.add_worker()
    job = system.submit(plan, limits=f"attempts = 1\n{limits}")
    detail = system.wait_for(job, "failed", ["failed"])
    assert reason in detail["attempts"][0]["reason"]
    assert reason in detail["job"]["message"]
    system.nothing_left()


def test_machine_that_is_killed_is_the_fault_of_its_pc(system: System):
    """Out of memory, or somebody's kill: it counts as lost, not as a failure of the job."""
    system.publish()
    system.add_worker()
    job = system.submit("crashes = true\n", limits="max_lost = 1")
    detail = system.wait_for(job, "failed", ["lost"])
    assert "killed" in detail["attempts"][0]["reason"]
    assert "killed" in detail["job"]["message"]
    system.nothing_left()


def test_pause_stops_the_machine_at_once_and_resume_lets_it_finish(system: System):
    system.publish()
    system.add_worker()
    may_end = system.folder / "may-end"
    job = system.submit(f'until = "{may_end}"\n')
    [machine] = until(lambda: system.machines(), what="the machine runs")
    until(lambda: system.states(job)[1] == ["running"], what="the server knows that it runs")
    home = ("--home", str(system.folder / "pc"))
    system.cli("worker", "pause", *home)
    assert machine.status() == "stopped"
    system.wait_for(job, "active", ["suspended"])
    assert system.json("worker", "status", *home)["paused"] is True
    may_end.touch()
    time.sleep(4)  # longer than a lease: a suspended attempt keeps it
    assert system.states(job) == ("active", ["suspended"])
    system.cli("worker", "resume", *home)
    system.wait_for(job, "completed", ["succeeded"])
    system.nothing_left()


def test_worker_that_leaves_gives_its_job_back(system: System):
    system.publish()
    system.add_worker()
    job = system.submit(FOREVER)
    until(lambda: system.machines(), what="the machine runs")
    system.cli("worker", "leave", "--home", str(system.folder / "pc"))
    assert system.states(job)[0] == "waiting"
    until(lambda: not system.workers["pc"].alive, what="the worker has ended")
    system.nothing_left()


async def test_bad_disk_image_fails_the_job_with_a_clear_reason(system: System, tmp_path: Path):
    """A publisher who lies: a qcow2 that points at a file of the host."""
    from asyncio import to_thread
    from subprocess import run

    secret = tmp_path / "secret.raw"
    secret.write_bytes(bytes(1 << 20))
    evil = tmp_path / "evil.qcow2"
    run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", secret, evil], check=True)
    image = describe_file(evil)
    packed = tmp_path / "evil.zst"
    packed.write_bytes(zstd.compress(evil.read_bytes()))
    async with Transport(load_credentials(system.folder / "client" / "credentials.json")) as transport:
        blob = describe_file(packed)
        await transport.upload(packed, blob)
        disk = Disk(sha256=image.sha256, size_bytes=image.size_bytes, virtual_bytes=1 << 20, format=DiskFormat.QCOW2)
        await transport.call(wire.REGISTER_DATA, wire.RegisterData(name="tiny", kind=DataKind.DISK, blob=blob, disk=disk))
    await to_thread(system.add_worker)
    job = await to_thread(system.submit, "", limits="attempts = 1")
    detail = await to_thread(system.wait_for, job, "failed", ["failed"])
    assert "backing" in detail["attempts"][0]["reason"]
    await to_thread(system.nothing_left)


SMALL_DISK = ("unshare", "--user", "--map-root-user", "--mount", "sh", "-c")


def on_small_disk(folder: Path, size: str) -> tuple[str, ...]:
    """Return a prefix that runs a program with `folder` on a file system of its own that is soon full."""
    folder.mkdir(parents=True, exist_ok=True)
    script = 'cp -a "$1" "$1.saved" && mount -t tmpfs -o size="$2" small "$1" && cp -a "$1.saved/." "$1" && shift 2 && exec "$@"'
    return (*SMALL_DISK, script, "sh", str(folder), size)


def test_full_disk_on_the_worker_gives_the_job_to_another(system: System):
    system.publish(content=(bytes(32769) + b"CD001").ljust(200 << 20, b"\0"))  # travels small, needs 200 MiB unpacked
    system.add_worker("full", start=False)
    full = system.workers["full"]
    full.prefix = on_small_disk(system.folder / "full", "120m")
    full.start()
    job = system.submit()
    until(lambda: system.states(job)[1][:1] == ["refused"], what="the full worker refuses")
    assert "more than is free" in system.job(job)["attempts"][0]["reason"]
    system.add_worker("roomy")
    system.wait_for(job, "completed")
    full.kill(signal.SIGTERM)


def test_full_disk_on_the_server_is_told_and_nothing_breaks(tmp_path: Path):
    system = System(tmp_path)
    try:
        system.json("server", "init")
        system.environment["DESKGRID_SERVER_RESERVE_BYTES"] = "2000000"
        system.start_server(prefix=on_small_disk(tmp_path / "server", "8m"), init=False)
        # The small disk is the server's alone, so the link is made inside: by the admin of the saved folder beside it.
        assert system.server is not None
        link = _login_link_inside(system)
        system.cli("login", link.replace(link.split("/")[2], system.address))
        big = tmp_path / "big"
        big.write_bytes(__import__("random").Random(2).randbytes(12 << 20))
        refused = system.cli("data", "put", big, "--name", "big", expect=1)
        assert "full" in refused.stderr
        small = tmp_path / "small"
        small.write_text("fits")
        system.cli("data", "put", small, "--name", "small")
        assert [one["name"] for one in system.json("data", "list")] == ["small"]
    finally:
        system.stop()


def _login_link_inside(system: System) -> str:
    """Make a login link in the server's own mount namespace."""
    import json
    import subprocess
    import sys

    import psutil

    assert system.server is not None
    assert system.server.process is not None
    inside = str(system.server.process.pid)
    assert psutil.pid_exists(int(inside))
    code = (
        "import asyncio, json, os, pathlib\n"
        "from deskgrid.server.setup import make_login_link\n"
        "from deskgrid.settings import ServerSettings\n"
        "home = pathlib.Path(os.environ['DESKGRID_SERVER_HOME'])\n"
        "print(json.dumps(str(asyncio.run(make_login_link(home, ServerSettings(), 'admin')))))\n"
    )
    done = subprocess.run(
        ["nsenter", "--target", inside, "--user", "--preserve-credentials", "--mount", sys.executable, "-c", code],
        env=system.environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return str(json.loads(done.stdout))
