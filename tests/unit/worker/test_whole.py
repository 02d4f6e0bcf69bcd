"""The worker with everything real but the server and the hypervisor: processes, ext4, archives, kill -9."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from deskgrid.archive import pack_folder, unpack
from deskgrid.client.grid import Grid
from deskgrid.client.transport import save_credentials
from deskgrid.clock import SystemClock
from deskgrid.machines.fake import FakeDriver
from deskgrid.machines.processes import find_by_token
from deskgrid.model.ids import AttemptId
from deskgrid.model.jobs import AttemptState, Limits
from deskgrid.model.workers import AttemptReport
from deskgrid.testing.grids import running_grid
from deskgrid.units import MIB
from deskgrid.worker.agent import Agent
from deskgrid.worker.control import ask
from deskgrid.worker.home import Home
from deskgrid.worker.journal import Journal
from tests.unit.worker.play import SETTINGS, PlayServer, publish_iso


class Place:
    """A home with the fake driver and a server in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.home = Home(folder / "home")
        self.server = PlayServer()
        self.disk = publish_iso(self.server)

    def submit(self, plan: str, **job: object) -> AttemptId:
        context = self.folder / f"context-{len(self.server.blobs)}"
        context.mkdir()
        (context / "fake.toml").write_text(plan)
        packed = self.folder / f"{context.name}.tar.zst"
        pack_folder(context, packed)
        return self.server.submit(context=packed.read_bytes(), disk=self.disk, scratch_bytes=16 * MIB, **job)  # type: ignore[arg-type]

    @asynccontextmanager
    async def working(self, *, keep: bool = False) -> AsyncIterator[Agent]:
        clock = SystemClock()
        agent = Agent(self.home, SETTINGS, self.server, [FakeDriver(clock)], clock=clock, rng=random.Random(1))
        task = asyncio.create_task(agent.run())
        try:
            yield agent
        finally:
            agent.stop(keep=keep)
            await task

    async def ended(self, attempt_id: AttemptId) -> AttemptReport:
        await eventually(lambda: attempt_id in self.server.final and not list(self.home.journal.glob("*.json")))
        return self.server.final[attempt_id]

    def token(self) -> str:
        """The mark of the only machine."""
        [entry] = Journal(self.home.journal).read()
        assert entry.handle is not None
        return entry.handle.token

    def nothing_left(self) -> bool:
        return not list(self.home.attempts.iterdir()) and not list(self.home.journal.iterdir())


async def eventually(condition: Callable[[], object], limit_s: float = 20.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not come to that"
        await asyncio.sleep(0.01)


@pytest.fixture
async def place(tmp_path: Path) -> Place:
    return Place(tmp_path)


async def test_result_of_a_real_scratch_disk_comes_back(place: Place, tmp_path: Path) -> None:
    async with place.working():
        attempt = place.submit('stdout = "hello\\n"\nstderr = "oh\\n"\n[files]\n"a/b" = "x"\n')
        report = await place.ended(attempt)
        assert (report.state, report.exit_code, report.reason) == (AttemptState.SUCCEEDED, 0, "")
        assert report.result is not None
        (tmp_path / "result").write_bytes(place.server.uploads[report.result.sha256])
        unpack(tmp_path / "result", tmp_path / "out")
        assert (tmp_path / "out" / "a" / "b").read_text() == "x"
        assert place.server.logs[attempt, "stdout"] == b"hello\n"
        assert place.server.logs[attempt, "stderr"] == b"oh\n"
        assert place.nothing_left()


@pytest.mark.parametrize(
    ("plan", "state", "words"),
    [
        ("exit_code = 3", AttemptState.FAILED, "context.sh ended with 3"),
        ("reboots = true", AttemptState.FAILED, "the guest reset or panicked"),
        ("crashes = true", AttemptState.REFUSED, "the machine was killed"),
        ("io_error = true", AttemptState.REFUSED, "the disk of the PC"),
        ("refuses = true", AttemptState.REFUSED, "could not be started"),
        ("never_boots = true", AttemptState.FAILED, "the guest did not boot within 0.5s"),
        ("hangs = true", AttemptState.FAILED, "wall time of 1.0s exceeded"),
        ("nonsense = true", AttemptState.FAILED, "the machine cannot be made: fake.toml"),
    ],
)
async def test_each_fault_ends_in_a_clear_state_and_leaves_nothing(
    place: Place, plan: str, state: AttemptState, words: str
) -> None:
    async with place.working():
        report = await place.ended(place.submit(plan, limits=Limits(boot_time_s=0.5, wall_time_s=1.0)))
        assert report.state is state
        assert words in report.reason
        assert place.nothing_left()


async def test_machine_killed_from_outside_is_not_the_jobs_fault(place: Place) -> None:
    async with place.working():
        attempt = place.submit("hangs = true")
        await eventually(lambda: place.server.state(attempt) is AttemptState.RUNNING)
        process = find_by_token(place.token())
        assert process is not None
        os.kill(process.pid, signal.SIGKILL)
        report = await place.ended(attempt)
        assert report.state is AttemptState.REFUSED
        assert place.nothing_left()


async def test_restarted_worker_takes_up_the_process_of_the_one_before(place: Place) -> None:
    async with place.working(keep=True):
        attempt = place.submit('stdout = "hello\\n"\nduration_s = 1.0')
        await eventually(lambda: place.server.state(attempt) is AttemptState.RUNNING)
    assert find_by_token(place.token()) is not None
    async with place.working():
        assert (await place.ended(attempt)).state is AttemptState.SUCCEEDED
        assert place.server.logs[attempt, "stdout"] == b"hello\n"
        assert place.nothing_left()


async def test_stopped_worker_leaves_no_process(place: Place) -> None:
    async with place.working():
        attempt = place.submit("hangs = true")
        await eventually(lambda: place.server.state(attempt) is AttemptState.RUNNING)
        token = place.token()
    assert find_by_token(token) is None
    assert place.nothing_left()
    assert place.server.final[attempt].state is AttemptState.REFUSED


async def test_paused_machine_does_nothing(place: Place) -> None:
    async with place.working() as agent:
        attempt = place.submit("tick_s = 0.01")
        await eventually(lambda: place.server.logs[attempt, "stdout"])
        await agent.pause()
        await eventually(lambda: place.server.state(attempt) is AttemptState.SUSPENDED)
        log = place.home.attempt(attempt) / "machine" / "channel.log"
        size = log.stat().st_size
        await asyncio.sleep(0.2)
        assert log.stat().st_size == size
        await agent.resume()
        await eventually(lambda: log.stat().st_size > size)


async def test_leave_without_a_running_worker_destroys_what_it_left_and_tells_the_server(tmp_path: Path) -> None:
    home = Home(tmp_path / "pc")
    async with running_grid(tmp_path / "server") as grid:
        save_credentials(home.credentials, await grid.worker())
        place = Place(tmp_path / "pc")
        place.home = home
        async with place.working(keep=True):
            attempt = place.submit("hangs = true")
            await eventually(lambda: place.server.state(attempt) is AttemptState.RUNNING)
        token = place.token()
        assert find_by_token(token) is not None
        # A folder that no entry names, as after a damaged journal.
        (home.attempts / "99").mkdir()
        answer = await ask(home.folder, "leave")
        assert answer.message == "left the grid"
        assert find_by_token(token) is None
        assert not home.attempts.exists() and not home.credentials.exists()
        async with Grid(await grid.admin()) as admin:
            assert await admin.workers() == ()
