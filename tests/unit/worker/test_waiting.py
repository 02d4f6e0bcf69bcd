"""Jobs that are leased ahead: made ready beside the one that runs, and started when it ends."""

from __future__ import annotations

import msgspec
import pytest

from deskgrid.machines.driver import Booted
from deskgrid.model.ids import AttemptId
from deskgrid.model.jobs import AttemptState, JobSpec, Machine, Results
from deskgrid.model.machines import MachineKind
from deskgrid.units import MIB
from tests.unit.worker.play import SETTINGS, PlayMachine, Rig

ONE = msgspec.structs.replace(SETTINGS, cpus=1)
SPEC = JobSpec(
    machine=Machine(kind=MachineKind.PROCESS, memory_bytes=64 * MIB, scratch_bytes=64 * MIB),
    command=("/bin/true",),
    results=Results(paths=()),
)


def submit(rig: Rig) -> AttemptId:
    return rig.server.submit(spec=SPEC, class_id=7)


def started(rig: Rig) -> list[PlayMachine]:
    return [machine for machine in rig.pc.made if machine.started]


async def run_one(rig: Rig, *, seconds: float = 0.0) -> None:
    """Let the worker see how long such a job takes."""
    attempt = submit(rig)
    await rig.until(lambda: started(rig))
    await rig.pc.machine.tell(Booted())
    began = rig.clock.now()
    await rig.until(lambda: rig.clock.now() - began >= seconds)
    await rig.pc.machine.finish()
    await rig.ended(attempt)


async def two(rig: Rig) -> tuple[AttemptId, AttemptId]:
    """Let one job run and another wait."""
    await run_one(rig)
    first = submit(rig)
    await rig.until(lambda: len(started(rig)) == 2)
    second = submit(rig)
    await rig.until(lambda: len(rig.pc.made) == 3)
    return first, second


async def test_next_quick_job_is_made_ready_and_starts_when_the_one_before_has_ended(rig: Rig) -> None:
    async with rig.working(ONE):
        first, second = await two(rig)
        await rig.until(lambda: [entry["phase"] for entry in rig.journalled()] == ["started", "prepared"])
        assert len(started(rig)) == 2
        calls = len(rig.server.syncs)
        await rig.pc.made[1].finish()
        await rig.until(lambda: len(started(rig)) == 3, step_s=0.0)
        assert [sync for sync in rig.server.syncs[calls:] if sync.free.cpus] == []
        await rig.pc.made[2].finish()
        await rig.ended(first)
        await rig.ended(second)
        assert rig.nothing_left()


async def test_not_more_than_one_waits_for_each_that_runs(rig: Rig) -> None:
    async with rig.working(ONE):
        await two(rig)
        submit(rig)
        calls = len(rig.server.syncs)
        rig.server.hint()
        await rig.until(lambda: len(rig.server.syncs) > calls)
        assert len(rig.pc.made) == 3 and len(rig.server.waiting) == 1


async def test_behind_a_job_that_takes_longer_than_those_before_nothing_more_is_asked_for(rig: Rig) -> None:
    async with rig.working(ONE):
        _, second = await two(rig)
        await rig.until(lambda: second in rig.server.final, step_s=0.2)
        third = submit(rig)
        calls = len(rig.server.syncs)
        await rig.until(lambda: len(rig.server.syncs) > calls + 1)
        assert third not in rig.server.leased and not rig.server.syncs[-1].ahead


async def test_jobs_that_take_longer_are_not_asked_for_ahead(rig: Rig) -> None:
    async with rig.working(ONE):
        await run_one(rig, seconds=2.0)
        submit(rig)
        await rig.until(lambda: len(started(rig)) == 2)
        calls = len(rig.server.syncs)
        submit(rig)
        await rig.until(lambda: len(rig.server.syncs) > calls + 1)
        assert not any(sync.ahead for sync in rig.server.syncs)
        assert len(rig.pc.made) == 2


async def test_job_that_finds_no_place_goes_back_and_nothing_is_held_against_it(rig: Rig) -> None:
    async with rig.working(ONE):
        _, second = await two(rig)
        await rig.until(lambda: second in rig.server.final, step_s=0.2)
        report = rig.server.final[second]
        assert (report.state, report.reason) == (AttemptState.REFUSED, "")
        assert len(started(rig)) == 2 and len(rig.pc.machines) == 1


async def test_cancelled_while_it_waits_leaves_nothing(rig: Rig) -> None:
    async with rig.working(ONE):
        first, second = await two(rig)
        rig.server.cancel(second)
        await rig.until(lambda: len(rig.pc.machines) == 1)
        await rig.pc.made[1].finish()
        await rig.ended(first)
        assert rig.nothing_left() and len(started(rig)) == 2


async def test_pause_gives_back_what_waits(rig: Rig) -> None:
    async with rig.working(ONE) as agent:
        _, second = await two(rig)
        await agent.pause()
        await rig.until(lambda: second in rig.server.final)
        assert rig.server.final[second].state is AttemptState.REFUSED
        assert rig.pc.made[1].frozen and not rig.pc.made[2].started


@pytest.mark.parametrize("ends_meanwhile", [False, True])
async def test_restarted_worker_lets_it_wait_again(rig: Rig, *, ends_meanwhile: bool) -> None:
    async with rig.working(ONE, keep=True):
        first, second = await two(rig)
        await rig.until(lambda: [entry["phase"] for entry in rig.journalled()] == ["started", "prepared"])
    if ends_meanwhile:
        await rig.pc.made[1].finish()
    async with rig.working(ONE):
        if not ends_meanwhile:
            calls = len(rig.server.syncs)
            await rig.until(lambda: len(rig.server.syncs) > calls)
            assert len(started(rig)) == 2
            await rig.pc.made[1].finish()
        await rig.until(lambda: len(started(rig)) == 3)
        await rig.pc.made[-1].finish()
        await rig.until(lambda: first in rig.server.final and second in rig.server.final)
        assert rig.server.final[second].state is AttemptState.SUCCEEDED
