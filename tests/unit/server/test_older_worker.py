"""A worker of wire version 1.0, as recorded: it is served as before, and never sent a job with a network."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from deskgrid.client.grid import Grid
from deskgrid.client.transport import Transport
from deskgrid.model import wire
from deskgrid.model.jobs import JobSpec, Machine
from deskgrid.model.machines import Network
from deskgrid.model.overlay import Offer
from deskgrid.testing.grids import TestGrid, play_job, running_grid

SYNC_1_0 = """{"profile":{"os":"linux","arch":"x86_64","drivers":[{"driver":"qemu","kinds":["vm"],"usable":true,"reason":"",
"version":"7.2.15","accelerator":"tcg","networks":["none"]}],"lent":{"cpus":3,"memory_bytes":8363253760,"disk_bytes":21474836480},
"version":"0.1.0"},"paused":false,"attempts":[%s],"free":{"cpus":3,"memory_bytes":8363253760,"disk_bytes":21474836480},"cached":[]}"""
REPORT_1_0 = '{"attempt_id":%d,"state":"failed","exit_code":3,"reason":"context.sh ended with 3","result":null}'
ASSIGNMENT_1_0 = {"attempt_id", "job_id", "number", "spec", "disk", "context"}
MACHINE_1_0 = {"disk", "kind", "scratch_bytes", "memory_bytes", "cpus", "network"}


@pytest.fixture
async def grid(tmp_path: Path):
    async with running_grid(tmp_path / "server") as running:
        yield running


async def sync(worker: Transport, body: str) -> dict:
    headers = {wire.WIRE_VERSION_HEADER: "1.0", wire.IDEMPOTENCY_HEADER: "k" + str(hash(body))}
    async with worker._session.post(wire.SYNC.path, data=body, headers=headers, server_hostname=wire.SERVER_NAME) as answer:
        assert answer.status == 200, await answer.text()
        return json.loads(await answer.read())


async def test_worker_of_version_1_0_gets_the_jobs_without_a_network_and_only_these(grid: TestGrid):
    user = await grid.admin()
    async with Transport(await grid.worker("new")) as newer, Transport(await grid.worker("old")) as older, Grid(user) as owner:
        played = await play_job(user, newer)  # its disk is there now
        networked = [
            Machine(disk="played", network=network, offer=(Offer("web", 80),)) for network in (Network.OVERLAY, Network.INTERNET)
        ]
        for machine in networked:
            await owner.submit(JobSpec(machine=machine))
        plain = await owner.submit(JobSpec(machine=Machine(disk="played")))
        answer = await sync(older, SYNC_1_0 % "")
        [assignment] = answer["assignments"]
        assert assignment["job_id"] == plain.id
        assert set(assignment) >= ASSIGNMENT_1_0
        assert set(assignment["spec"]["machine"]) >= MACHINE_1_0
        assert assignment["spec"]["machine"]["network"] == "none"
        answer = await sync(older, SYNC_1_0 % (REPORT_1_0 % assignment["attempt_id"]))
        assert answer["acknowledged"] == [assignment["attempt_id"]]
        assert [one["job_id"] for one in answer["assignments"]] == [plain.id]
        assert played.id != plain.id
