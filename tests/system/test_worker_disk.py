"""The worker disk: a job boots it in a real virtual machine, and the deskgrid in it joins the grid as a worker and runs another job. What both
read, the worker in the machine fetches from the PC's cache."""

from __future__ import annotations

import random
import re
from pathlib import Path

import msgspec
import pytest

from deskgrid import Grid
from tests.system.harness import System, until, wait
from tests.system.test_debian import LIMIT_S, build

pytestmark = [pytest.mark.full, pytest.mark.timeout(1800)]
EVENTS_BYTES = 24 << 20
LONG_S = 900.0
"""Each deskgrid command in the machine takes half a minute in software emulation."""

SCRIPT = """
export HOME=/scratch DESKGRID_CLIENT_HOME=/context/grid
deskgrid --version
deskgrid worker join "$(cat /context/link)" --name inner --home /scratch/pc
export DESKGRID_WORKER_SHARE=true DESKGRID_WORKER_SHARE_NEAR=cache:8475
DESKGRID_WORKER_DRIVERS=process DESKGRID_WORKER_OVERLAY=false deskgrid worker run --home /scratch/pc --verbose &
deskgrid job wait 2
deskgrid worker leave --home /scratch/pc
wait
"""


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = tmp_path_factory.mktemp("recipe") / "lab.toml"
    recipe.write_text('template = "worker"\npackages = ["bc"]\n')
    return build(recipe, recipe.with_suffix(".qcow2"))


def test_machine_of_the_worker_disk_is_a_worker_that_runs_jobs(system: System, disk: Path) -> None:
    system.add_worker(DESKGRID_WORKER_DRIVERS="qemu", DESKGRID_WORKER_ACCELERATOR="tcg", DESKGRID_WORKER_SHARE="true")
    system.cli("disk", "import", disk, "--name", "lab", "--agent")
    events = system.folder / "events"
    events.write_bytes(random.Random(1).randbytes(EVENTS_BYTES))
    system.cli("data", "put", events, "--name", "events")
    pilot = system.job_file(
        disk='"lab"',
        scratch='"4GiB"',
        memory='"1GiB"',
        network='"overlay"',
        reach='{ grid = "api.server", cache = "cache.worker" }',
        limits="attempts = 1",
    )
    (pilot.parent / "context" / "context.sh").write_text(SCRIPT)
    (pilot.parent / "context" / "link").write_text(str(msgspec.structs.replace(wait(_link(system)), address="grid:8470")))
    system.cli("job", "submit", pilot, "--data", "events=events")
    inner = system.folder / "inner.toml"
    inner.write_text(
        'command = ["sh", "-c", "echo \'6 * 7\' | bc >answer; wc -c </context/data/events >size"]\ndata = { events = "events" }\n[machine]\nkind = "process"\nscratch = "64MiB"\n'
    )
    system.cli("job", "submit", inner)
    system.wait_for(2, "completed", limit_s=LONG_S)
    system.cli("job", "results", "2", "-o", system.folder / "out")
    assert (system.folder / "out" / "answer").read_text() == "42\n"
    assert int((system.folder / "out" / "size").read_text()) == EVENTS_BYTES
    (attempt,) = system.job(2)["attempts"]
    assert attempt["worker"] == "inner"
    system.wait_for(1, "completed", limit_s=LONG_S)
    said = system.cli("job", "logs", "1", "--stderr").stdout
    [of_server_bytes] = re.findall(r"fetched_from_others .*of_server_bytes=(\d+)", said)
    assert int(of_server_bytes) < EVENTS_BYTES // 2
    until(lambda: "inner" not in system.cli("worker", "list").stdout, what="the worker in the machine has left")
    system.nothing_left(limit_s=LIMIT_S)


def test_functions_run_in_machines_of_a_named_disk(system: System, disk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    system.add_worker(DESKGRID_WORKER_DRIVERS="qemu", DESKGRID_WORKER_ACCELERATOR="tcg")
    system.cli("disk", "import", disk, "--name", "lab", "--agent")
    monkeypatch.setenv("DESKGRID_CLIENT_HOME", str(system.folder / "client"))

    def inside(number: int) -> tuple[int, str]:
        return 2 * number, Path("/etc/hostname").read_text().strip()

    with Grid() as grid:
        found = grid.map(inside, [20, 21], chunksize=2, disk="lab", memory="1GiB", scratch="64MiB", boot_time="15m", timeout=LONG_S)
    assert [number for number, _ in found] == [40, 42]
    assert all(host != Path("/etc/hostname").read_text().strip() for _, host in found)
    system.nothing_left(limit_s=LIMIT_S)


async def _link(system: System):
    async with system.grid() as grid:
        return await grid.join_link()
