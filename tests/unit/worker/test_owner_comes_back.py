"""The owner comes back: machines stand still, give their memory back, and go on later, also after the PC was switched off."""

from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from deskgrid.errors import InvalidInput, MachineFailed
from deskgrid.machines.driver import Booted, Output, Stream
from deskgrid.model.ids import AttemptId
from deskgrid.model.jobs import AttemptState, Limits
from deskgrid.units import GIB
from deskgrid.worker.owner import rules_of
from tests.unit.worker.play import SETTINGS, MeteredDriver, Rig, SavingDriver

RELEASING = msgspec.structs.replace(SETTINGS, release_s=60.0, checkpoint_s=0.0)
KEEPING = msgspec.structs.replace(SETTINGS, checkpoint_s=600.0)
LONG = Limits(wall_time_s=100_000)


@pytest.fixture
def saving(rig: Rig) -> Rig:
    rig.driver = SavingDriver(rig.pc, rig.clock)
    return rig


# ---- rules


async def test_machines_stand_still_within_two_seconds_of_the_owners_return(rig: Rig) -> None:
    async with rig.working(msgspec.structs.replace(SETTINGS, idle_s=300.0)) as agent:
        attempt = await rig.running(limits=LONG)
        rig.sight.change(idle_s=0.0)
        came = rig.clock.now()
        await rig.until(lambda: rig.pc.machine.frozen)
        assert rig.clock.now() - came <= 2.0
        await rig.until(lambda: rig.server.state(attempt) is AttemptState.SUSPENDED)
        assert "keyboard or mouse" in str(agent.status())
        rig.sight.change(idle_s=300.0)
        await rig.until(lambda: rig.server.state(attempt) is AttemptState.RUNNING)
        assert not rig.pc.machine.frozen


async def test_nothing_is_taken_on_battery(rig: Rig) -> None:
    rig.sight.change(on_battery=True)
    async with rig.working():
        attempt = rig.server.submit()
        await rig.until(lambda: rig.server.syncs and rig.server.syncs[-1].paused)
        await rig.clock.advance(100)
        assert not rig.pc.made
        rig.sight.change(on_battery=False)
        await rig.until(lambda: rig.pc.made)
        assert attempt not in rig.server.final


async def test_pause_by_hand_stays_until_it_is_taken_back_whatever_the_rules_say(rig: Rig) -> None:
    async with rig.working() as agent:
        await rig.running(limits=LONG)
        await agent.pause()
        rig.sight.change(on_battery=True)
        await rig.clock.advance(5)
        rig.sight.change(on_battery=False)
        await rig.clock.advance(5)
        assert rig.pc.machine.frozen
        assert "by hand" in str(agent.status())
        rig.sight.change(on_battery=True)
        await rig.clock.advance(5)
        assert "battery" in (await agent.answer("resume")).message
        assert rig.pc.machine.frozen
        rig.sight.change(on_battery=False)
        await rig.until(lambda: not rig.pc.machine.frozen)


async def test_machine_that_did_not_go_on_is_tried_again(rig: Rig) -> None:
    async with rig.working():
        await rig.running(limits=LONG)
        rig.sight.change(on_battery=True)
        await rig.until(lambda: rig.pc.machine.frozen)
        rig.driver.errors["resume"] = MachineFailed("QEMU does not answer")
        rig.sight.change(on_battery=False)
        await rig.clock.advance(5)
        assert rig.pc.machine.frozen
        del rig.driver.errors["resume"]
        await rig.until(lambda: not rig.pc.machine.frozen)


@pytest.mark.parametrize("changes", [{"hours": ("mon 8-18",)}, {"busy_cpus": 1.0, "nice": 0}])
def test_rules_that_make_no_sense_are_refused_when_the_worker_starts(rig: Rig, changes: dict[str, object]) -> None:
    settings = msgspec.structs.replace(SETTINGS, **changes)
    with pytest.raises(InvalidInput):
        rules_of(settings)
    with pytest.raises(InvalidInput):
        rig.agent(settings)


# ---- memory


async def test_memory_is_given_back_after_a_while_and_the_machine_goes_on_later(saving: Rig) -> None:
    async with saving.working(RELEASING) as agent:
        attempt = await saving.running(limits=Limits(wall_time_s=600))
        machine = saving.pc.machine
        await machine.tell(Output(Stream.STDOUT, b"before\n"))
        await agent.pause()
        await saving.clock.advance(50)
        assert not machine.saved
        await saving.until(lambda: machine.saved)
        await saving.clock.advance(3_000)
        assert saving.server.state(attempt) is AttemptState.SUSPENDED
        assert saving.cached_disk().exists()
        await agent.resume()
        await saving.until(lambda: saving.server.state(attempt) is AttemptState.RUNNING)
        assert not machine.saved
        await machine.finish(0, stdout=b"before\nafter\n")
        assert (await saving.ended(attempt)).state is AttemptState.SUCCEEDED
        assert saving.server.logs[attempt, "stdout"] == b"before\nafter\n"


async def test_machine_that_cannot_be_written_to_the_disk_is_ended_and_the_worker_needs_no_rest(rig: Rig) -> None:
    async with rig.working(RELEASING) as agent:
        attempt = await rig.running()
        await agent.pause()
        await rig.clock.advance(61)
        report = await rig.ended(attempt)
        assert report.state is AttemptState.REFUSED
        assert "memory" in report.reason
        await agent.resume()
        await rig.running()


async def test_machine_that_ends_while_it_is_written_is_not_blamed(saving: Rig) -> None:
    async with saving.working(RELEASING) as agent:
        attempt = await saving.running()
        await agent.pause()
        await saving.pc.machine.finish(0)
        saving.driver.errors["save"] = MachineFailed("the machine is off")
        await saving.clock.advance(61)
        assert (await saving.ended(attempt)).state is AttemptState.SUCCEEDED


async def test_machine_whose_memory_has_no_room_on_the_disk_is_ended(saving: Rig) -> None:
    async with saving.working(RELEASING) as agent:
        attempt = await saving.running()
        saving.free_bytes = 0
        await agent.pause()
        await saving.clock.advance(61)
        assert "memory" in (await saving.ended(attempt)).reason


async def test_job_that_is_cancelled_while_its_machine_is_on_the_disk_leaves_nothing(saving: Rig) -> None:
    async with saving.working(RELEASING) as agent:
        attempt = await saving.running()
        await agent.pause()
        await saving.until(lambda: saving.pc.machine.saved, step_s=1.0)
        saving.server.cancel(attempt)
        await saving.until(saving.nothing_left)


async def test_restore_that_fails_gives_the_job_back(saving: Rig) -> None:
    async with saving.working(RELEASING) as agent:
        attempt = await saving.running()
        await agent.pause()
        await saving.until(lambda: saving.pc.machine.saved, step_s=1.0)
        saving.driver.errors["restore"] = MachineFailed("the state is damaged")
        await agent.resume()
        report = await saving.ended(attempt)
        assert (report.state, "damaged" in report.reason) == (AttemptState.REFUSED, True)
        assert saving.nothing_left()


# ---- checkpoints


async def test_checkpoints_are_made_as_the_machine_runs_and_not_while_it_stands_still(saving: Rig) -> None:
    async with saving.working(KEEPING) as agent:
        await saving.running(limits=LONG)
        began = saving.clock.now()
        machine = saving.pc.machine
        await saving.until(lambda: len(machine.checkpoints) == 2, step_s=5.0)
        assert 1199 <= machine.checkpoints[1] - began < 1230
        await agent.pause()
        await saving.clock.advance(1000)
        assert len(machine.checkpoints) == 2
        await agent.resume()
        await saving.until(lambda: len(machine.checkpoints) == 3, step_s=5.0)


async def test_checkpoint_that_fails_or_has_no_room_costs_the_job_nothing(saving: Rig) -> None:
    async with saving.working(KEEPING):
        attempt = await saving.running(limits=LONG)
        saving.driver.errors["checkpoint"] = MachineFailed("no")
        await saving.clock.advance(700)
        del saving.driver.errors["checkpoint"]
        saving.free_bytes = GIB // 64
        await saving.clock.advance(600)
        assert not saving.pc.machine.checkpoints
        await saving.pc.machine.finish(0)
        assert (await saving.ended(attempt)).state is AttemptState.SUCCEEDED


async def test_machine_that_is_killed_goes_on_from_its_checkpoint_but_not_for_ever(saving: Rig) -> None:
    assert isinstance(saving.driver, SavingDriver)
    driver = saving.driver
    async with saving.working(KEEPING):
        attempt = await saving.running(limits=LONG)
        await saving.until(lambda: saving.pc.machine.checkpoints, step_s=5.0)
        for count in (1, 2, 3):
            await saving.pc.machine.turn_off()
            await saving.until(lambda count=count: driver.restored == count and not saving.pc.machine.saved)
            await saving.clock.advance(1)
        await saving.pc.machine.turn_off()
        report = await saving.ended(attempt)
        assert (report.state, "again and again" in report.reason) == (AttemptState.REFUSED, True)


async def test_lost_time_is_not_counted_twice(saving: Rig) -> None:
    async with saving.working(KEEPING):
        attempt = await saving.running(limits=Limits(wall_time_s=1500))
        await saving.until(lambda: saving.pc.machine.checkpoints, step_s=5.0)
        await saving.clock.advance(500)
        await saving.pc.machine.turn_off()
        await saving.until(lambda: not saving.pc.machine.saved)
        began = saving.clock.now()
        await saving.until(lambda: saving.pc.machine.stops, step_s=1.0)
        assert 880 <= saving.clock.now() - began <= 910
        await saving.ended(attempt)


# ---- the PC is switched off


async def test_stopped_worker_writes_long_machines_to_the_disk_and_the_next_one_goes_on(saving: Rig) -> None:
    async with saving.working(RELEASING):
        long = await saving.running(limits=LONG)
        await saving.clock.advance(400)
        machine = saving.pc.machine
        short = await saving.running(limits=LONG)
    assert machine.saved
    assert saving.server.final[short].reason == "the worker was stopped"
    assert saving.server.state(long) is AttemptState.SUSPENDED
    async with saving.working(RELEASING):
        await saving.until(lambda: not machine.saved)
        await saving.until(lambda: saving.server.state(long) is AttemptState.RUNNING)
        await machine.finish(0)
        assert (await saving.ended(long)).state is AttemptState.SUCCEEDED
    assert saving.nothing_left()


async def goes_on_from_its_checkpoint(saving: Rig, attempt: AttemptId) -> None:
    """See that the next worker lets the machine go on from the checkpoint that it had after ten minutes, to its end."""
    machine = saving.pc.machine
    async with saving.working(KEEPING) as agent:
        await saving.until(lambda: not machine.saved)
        [status] = agent.status().attempts
        assert 600 <= status.ran_s <= 660
        await machine.tell(Booted())
        await machine.finish(0)
        assert (await saving.ended(attempt)).state is AttemptState.SUCCEEDED


@pytest.mark.parametrize("how", ["fails", "hangs"])
async def test_machine_that_cannot_be_written_when_the_worker_stops_goes_on_from_its_last_checkpoint(saving: Rig, how: str) -> None:
    async with saving.working(KEEPING, step_s=1.0):  # a minute passes at the end
        attempt = await saving.running(limits=LONG)
        await saving.until(lambda: saving.pc.machine.checkpoints, step_s=5.0)
        await saving.clock.advance(100)
        machine = saving.pc.machine
        if how == "fails":
            saving.driver.errors["save"] = MachineFailed("the machine is off")  # as when both were told to end
        else:
            saving.driver.save_gate.clear()
    assert machine.saved
    saving.driver.save_gate.set()
    await goes_on_from_its_checkpoint(saving, attempt)


async def test_memory_that_cannot_be_written_is_given_back_by_falling_back_to_the_last_checkpoint(saving: Rig) -> None:
    async with saving.working(msgspec.structs.replace(KEEPING, release_s=60.0)) as agent:
        attempt = await saving.running(limits=LONG)
        await saving.until(lambda: saving.pc.machine.checkpoints, step_s=5.0)
        saving.free_bytes = 0
        await agent.pause()
        await saving.until(lambda: saving.pc.machine.saved, step_s=1.0)
        saving.free_bytes = 1 << 40
        await agent.resume()
        await saving.until(lambda: saving.server.state(attempt) is AttemptState.RUNNING)
        await saving.pc.machine.finish(0)
        assert (await saving.ended(attempt)).state is AttemptState.SUCCEEDED


async def test_power_cut_costs_what_was_done_since_the_last_checkpoint(saving: Rig) -> None:
    async with saving.working(KEEPING, keep=True):
        attempt = await saving.running(limits=LONG)
        await saving.until(lambda: saving.pc.machine.checkpoints, step_s=5.0)
        await saving.clock.advance(100)
    await saving.pc.machine.turn_off()
    await goes_on_from_its_checkpoint(saving, attempt)


async def test_paused_worker_leaves_what_is_on_the_disk_there_when_it_starts(saving: Rig, tmp_path: Path) -> None:
    async with saving.working(RELEASING) as agent:
        attempt = await saving.running(limits=LONG)
        await agent.pause()
        await saving.until(lambda: saving.pc.machine.saved, step_s=1.0)
    async with saving.working(RELEASING) as agent:
        await saving.clock.advance(100)
        assert saving.pc.machine.saved
        assert saving.server.state(attempt) is AttemptState.SUSPENDED
        await agent.resume()
        await saving.until(lambda: not saving.pc.machine.saved)
        await saving.pc.machine.finish(0)
        await saving.ended(attempt)


# ---- a share of the CPUs


async def test_machine_that_uses_more_than_its_share_is_stopped_for_moments_and_never_while_it_is_paused(rig: Rig) -> None:
    rig.driver = MeteredDriver(rig.pc, rig.clock)
    async with rig.working(msgspec.structs.replace(SETTINGS, cpu_share=0.25)) as agent:
        attempt = await rig.running(limits=LONG)
        machine, driver = rig.pc.machine, rig.driver
        driver.busy = machine
        before = driver.used_s
        await rig.clock.advance(20)
        assert 4.5 <= driver.used_s - before <= 5.5
        await rig.until(lambda: not driver.runs)
        await agent.pause()
        assert driver.runs, "QEMU must hear that it is to pause"
        await rig.clock.advance(5)
        assert driver.runs
        await agent.resume()
        driver.busy = None
        await machine.finish(0)
        await rig.ended(attempt)


async def test_worker_that_ends_leaves_no_machine_stopped(rig: Rig) -> None:
    rig.driver = MeteredDriver(rig.pc, rig.clock)
    async with rig.working(msgspec.structs.replace(SETTINGS, cpu_share=0.25), keep=True):
        await rig.running(limits=LONG)
        rig.driver.busy = rig.pc.machine
        await rig.until(lambda: not rig.driver.runs)
    assert rig.driver.runs
