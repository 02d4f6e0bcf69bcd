"""The worker against a server and a hypervisor in memory."""

from __future__ import annotations

import asyncio
import errno
from pathlib import Path

import msgspec
import pytest

from deskgrid.archive import unpack
from deskgrid.errors import BadImage, Conflict, InvalidInput, MachineFailed, NoSpace, StoreUnavailable, Unauthenticated, Unreachable
from deskgrid.machines.driver import Booted, ExitCause, Exited, MachineHandle, Output, Stream
from deskgrid.model.jobs import AttemptState, Limits
from deskgrid.settings import WorkerSettings
from deskgrid.units import GIB, MIB
from deskgrid.worker.agent import Term
from deskgrid.worker.slots import NOTHING
from tests.unit.worker.play import DISK, SETTINGS, PlayDriver, Rig, ScreenDriver, blob_of, disk_ref


async def test_job_runs_and_leaves_nothing_but_the_disk_in_the_cache(rig: Rig) -> None:
    async with rig.working():
        attempt = await rig.running()
        await rig.pc.machine.finish(0, stdout=b"hello\n")
        report = await rig.ended(attempt)
        assert report.state is AttemptState.SUCCEEDED
        assert report.exit_code == 0
        assert report.result is not None and rig.server.uploads[report.result.sha256] == b"packed 1"
        assert rig.server.logs[attempt, "stdout"] == b"hello\n"
        assert rig.nothing_left()
        assert rig.cached_disk().read_bytes() == DISK
    assert rig.server.told[attempt][0] is AttemptState.LEASED


async def test_hint_brings_work_before_the_interval_is_over(rig: Rig) -> None:
    async with rig.working():
        await rig.until(lambda: rig.server.syncs)
        before = rig.clock.now()
        await rig.running()
        assert rig.clock.now() - before < 5


async def test_assignment_is_journalled_before_anything_is_done_for_it(rig: Rig) -> None:
    rig.server.download_gate.clear()
    async with rig.working():
        attempt = rig.server.submit()
        await rig.until(lambda: rig.server.downloads)
        [entry] = rig.journalled()
        assert (entry["assignment"]["attempt_id"], entry["phase"]) == (attempt, "fetching")
        rig.server.download_gate.set()


async def test_failure_comes_back_with_what_was_left_in_scratch(rig: Rig) -> None:
    async with rig.working():
        attempt = await rig.running()
        await rig.pc.machine.finish(3)
        report = await rig.ended(attempt)
    assert (report.state, report.exit_code, report.reason) == (AttemptState.FAILED, 3, "context.sh ended with 3")
    assert report.result is not None and report.result.sha256 in rig.server.uploads


async def test_two_attempts_at_once_share_one_download_of_the_disk(rig: Rig) -> None:
    async with rig.working():
        rig.server.submit()
        rig.server.submit()
        await rig.until(lambda: len(rig.pc.made) == 2)
        assert len(rig.server.downloads) == 1


# ---- the way to the server


async def test_lease_of_a_lost_answer_is_not_run_and_goes_back(rig: Rig) -> None:
    rig.server.answers_to_lose = 1
    lost = rig.server.submit()
    async with rig.working():
        await rig.until(lambda: rig.server.returned)
        assert rig.server.returned == [lost]
        attempt = await rig.running()
        assert len(rig.pc.made) == 1
        await rig.pc.machine.finish()
        await rig.ended(attempt)


async def test_final_report_is_repeated_until_it_is_acknowledged(rig: Rig) -> None:
    async with rig.working():
        attempt = await rig.running()
        rig.server.answers_to_lose = 3
        await rig.pc.machine.finish()
        assert (await rig.ended(attempt)).state is AttemptState.SUCCEEDED
        assert rig.server.told[attempt].count(AttemptState.SUCCEEDED) >= 2


async def test_attempt_goes_on_while_the_server_is_away_and_delivers_later(rig: Rig) -> None:
    async with rig.working():
        attempt = await rig.running()
        rig.server.go_down()
        await rig.pc.machine.finish(stdout=b"done\n")
        await rig.until(lambda: not rig.pc.machines)
        before = rig.server.tries
        await rig.until(lambda: rig.clock.now() > 1_002_000, step_s=5.0)
        # 2000 s with pauses of half a minute to a minute for sync and for output
        assert rig.server.tries - before < 200
        rig.server.down = False
        await rig.until(lambda: attempt in rig.server.final, step_s=1.0)
        assert rig.server.logs[attempt, "stdout"] == b"done\n"


async def test_result_that_a_full_server_refuses_is_tried_again(rig: Rig) -> None:
    async with rig.working():
        attempt = await rig.running()
        rig.server.upload_errors = [StoreUnavailable("full"), Conflict("another offset")]
        await rig.pc.machine.finish()
        assert (await rig.ended(attempt)).state is AttemptState.SUCCEEDED
        attempt = await rig.running()
        rig.server.upload_errors = [InvalidInput("larger than is taken")]
        await rig.pc.machine.finish()
        report = await rig.ended(attempt)
        assert (report.state, report.result) == (AttemptState.FAILED, None)
        assert "larger than is taken" in report.reason


async def test_revoked_token_destroys_everything_and_ends_the_worker(rig: Rig) -> None:
    agent = rig.agent()
    task = asyncio.create_task(agent.run())
    await rig.running()
    rig.server.revoked = True
    rig.server.hint()
    with pytest.raises(Unauthenticated, match="does not know this worker"):
        await rig.through(task)
    assert rig.nothing_left()


async def test_attempts_that_cannot_be_journalled_are_not_held(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    from deskgrid.worker.journal import Journal

    def full(*_: object) -> None:
        raise NoSpace("full")

    async with rig.working() as agent:
        await rig.until(lambda: rig.server.syncs)
        with monkeypatch.context() as patch:
            patch.setattr(Journal, "write", full)
            attempt = rig.server.submit()
            await rig.until(lambda: rig.server.returned == [attempt])
            assert rig.server.syncs[-1].free == NOTHING
            assert "journal" in agent.status().trouble
        await rig.until(lambda: rig.server.syncs[-1].free.cpus == 2, step_s=1.0)


# ---- cancelling


async def test_cancelled_while_fetching_leaves_nothing_but_the_partial_download(rig: Rig) -> None:
    rig.server.download_gate.clear()
    async with rig.working():
        attempt = rig.server.submit()
        await rig.until(lambda: rig.server.downloads)
        rig.server.cancel(attempt)
        await rig.until(rig.nothing_left)
        assert (rig.home.cache / "partial" / blob_of(DISK).sha256).stat().st_size == 100
        rig.server.download_gate.set()
        await rig.running()
        assert rig.cached_disk().read_bytes() == DISK


async def test_cancelled_while_preparing_leaves_nothing(rig: Rig) -> None:
    rig.driver.prepare_gate.clear()
    async with rig.working():
        attempt = rig.server.submit()
        await rig.until(lambda: (rig.home.attempt(attempt) / "machine").exists())
        rig.server.cancel(attempt)
        await rig.until(rig.nothing_left)
        assert attempt not in rig.server.final


async def test_cancelled_while_running_lets_the_guest_power_off_and_leaves_nothing(rig: Rig) -> None:
    async with rig.working():
        attempt = await rig.running()
        machine = rig.pc.machine
        rig.server.cancel(attempt)
        await rig.until(rig.nothing_left)
        assert machine.stops == [5.0]
        await rig.until(lambda: rig.server.syncs[-1].free.cpus == 2)


async def test_cancelled_while_the_upload_waits_frees_its_space(rig: Rig) -> None:
    async with rig.working():
        attempt = await rig.running()
        rig.server.upload_errors = [StoreUnavailable("full")] * 1000
        await rig.pc.machine.finish()
        await rig.until(lambda: not rig.pc.machines)
        rig.server.cancel(attempt)
        await rig.until(rig.nothing_left)


# ---- limits and faults


async def test_guest_that_does_not_boot_fails_with_the_limit_named(rig: Rig) -> None:
    async with rig.working():
        attempt = rig.server.submit(limits=Limits(boot_time_s=300))
        await rig.until(lambda: rig.pc.made and rig.pc.machine.started)
        await rig.clock.advance(290)
        assert not rig.pc.machine.off
        await rig.clock.advance(11)
        report = await rig.ended(attempt)
    assert (report.state, report.reason, report.result) == (AttemptState.FAILED, "the guest did not boot within 5m", None)


async def test_guest_that_does_not_boot_leaves_a_picture_of_its_screen(rig: Rig, tmp_path: Path) -> None:
    rig.driver = ScreenDriver(rig.pc)
    async with rig.working():
        attempt = rig.server.submit(limits=Limits(boot_time_s=300))
        await rig.until(lambda: rig.pc.made and rig.pc.machine.started)
        await rig.clock.advance(301)
        report = await rig.ended(attempt)
        assert (report.state, report.reason) == (AttemptState.FAILED, "the guest did not boot within 5m")
        assert report.result is not None
        (tmp_path / "result").write_bytes(rig.server.uploads[report.result.sha256])
    unpack(tmp_path / "result", tmp_path / "seen")
    assert [(path.name, path.read_bytes()) for path in (tmp_path / "seen").iterdir()] == [("screen.png", b"picture")]
    assert rig.nothing_left()


@pytest.mark.parametrize("error", [MachineFailed("no screen"), OSError(28, "full"), TimeoutError()])
async def test_guest_that_does_not_boot_fails_without_a_picture_too(rig: Rig, error: Exception) -> None:
    rig.driver = ScreenDriver(rig.pc)
    rig.driver.errors["picture"] = error
    async with rig.working():
        attempt = rig.server.submit(limits=Limits(boot_time_s=300))
        await rig.until(lambda: rig.pc.made and rig.pc.machine.started)
        await rig.clock.advance(301)
        report = await rig.ended(attempt)
    assert (report.state, report.reason, report.result) == (AttemptState.FAILED, "the guest did not boot within 5m", None)


async def test_wall_time_ends_a_guest_and_brings_what_it_left(rig: Rig) -> None:
    async with rig.working():
        attempt = await rig.running(limits=Limits(wall_time_s=600))
        machine = rig.pc.machine
        await rig.clock.advance(601)
        report = await rig.ended(attempt)
    assert (report.state, report.reason) == (AttemptState.FAILED, "wall time of 10m exceeded")
    assert report.result is not None
    assert machine.stops == [5.0]


@pytest.mark.parametrize(
    ("cause", "state", "words"),
    [
        (ExitCause.RESET, AttemptState.FAILED, "the guest reset or panicked before context.sh ended"),
        (ExitCause.POWERED_OFF, AttemptState.FAILED, "the guest powered off before context.sh ended"),
        (ExitCause.KILLED, AttemptState.REFUSED, "the machine was killed (out of memory?)"),
        (ExitCause.IO_ERROR, AttemptState.REFUSED, "the disk of the PC could not take what the machine wrote"),
        (ExitCause.STOPPED, AttemptState.REFUSED, "the machine was stopped from outside"),
        (ExitCause.START_FAILED, AttemptState.REFUSED, "the machine could not be started"),
    ],
)
async def test_end_without_exit_code_says_whose_fault_it_is(rig: Rig, cause: ExitCause, state: AttemptState, words: str) -> None:
    async with rig.working():
        attempt = await rig.running()
        await rig.pc.machine.finish(None, cause=cause)
        report = await rig.ended(attempt)
    assert (report.state, report.reason) == (state, words)


async def test_context_that_ended_before_the_guest_panicked_has_succeeded(rig: Rig) -> None:
    async with rig.working():
        attempt = await rig.running()
        await rig.pc.machine.finish(0, cause=ExitCause.RESET)
        assert (await rig.ended(attempt)).state is AttemptState.SUCCEEDED


async def test_damaged_scratch_is_the_jobs_fault(rig: Rig) -> None:
    rig.extract_error = BadImage("an extent tree is damaged")
    async with rig.working():
        attempt = await rig.running()
        await rig.pc.machine.finish(0)
        report = await rig.ended(attempt)
    assert report.state is AttemptState.FAILED
    assert "the scratch file system is damaged" in report.reason and "extent tree" in report.reason


async def test_no_space_for_the_result_is_not_the_jobs_fault(rig: Rig) -> None:
    rig.extract_error = NoSpace("no space left for the result")
    async with rig.working():
        attempt = await rig.running()
        await rig.pc.machine.finish(0)
        assert (await rig.ended(attempt)).state is AttemptState.REFUSED


async def test_bad_disk_image_is_the_jobs_fault(rig: Rig) -> None:
    rig.driver.errors["prepare"] = BadImage("this is not a qcow2 disk")
    async with rig.working():
        attempt = rig.server.submit()
        report = await rig.ended(attempt)
    assert (report.state, report.reason) == (AttemptState.FAILED, "bad disk image: this is not a qcow2 disk")


async def test_bad_context_is_the_jobs_fault(rig: Rig) -> None:
    async with rig.working():
        report = await rig.ended(rig.server.submit(context=b"no archive"))
    assert report.state is AttemptState.FAILED
    assert report.reason.startswith("bad context: ")


async def test_no_space_refuses_and_then_takes_no_work_for_a_while(rig: Rig) -> None:
    rig.driver.errors["prepare"] = NoSpace(f"only 1 MiB are free in {rig.home.folder}/attempts")
    async with rig.working() as agent:
        attempt = rig.server.submit()
        report = await rig.ended(attempt)
        assert report.state is AttemptState.REFUSED
        assert "HOME/attempts" in report.reason and str(rig.home.folder) not in report.reason
        seen = len(rig.server.syncs)
        rig.server.submit()
        await rig.until(lambda: len(rig.server.syncs) > seen)
        assert rig.server.syncs[-1].free == NOTHING
        assert rig.server.waiting and "1 MiB" in agent.status().trouble
        del rig.driver.errors["prepare"]
        await rig.until(lambda: rig.pc.made, step_s=1.0)


async def test_disk_that_does_not_fit_the_cache_is_refused(rig: Rig) -> None:
    async with rig.working(msgspec.structs.replace(SETTINGS, cache_bytes=5000)):
        report = await rig.ended(rig.server.submit())
    assert report.state is AttemptState.REFUSED
    assert "the cache" in report.reason


async def test_pc_without_usable_driver_refuses(rig: Rig) -> None:
    rig.driver.usable = False
    async with rig.working():
        report = await rig.ended(rig.server.submit())
    assert report.state is AttemptState.REFUSED
    assert "no CPU" in report.reason


async def test_download_that_never_moves_is_given_up(rig: Rig) -> None:
    async def broken(*_: object) -> None:
        raise Unreachable("the proxy cuts it")

    rig.server.download = broken  # type: ignore[method-assign]
    async with rig.working():
        attempt = rig.server.submit()
        await rig.until(lambda: attempt in rig.server.final, step_s=1.0)
    assert rig.server.final[attempt].state is AttemptState.REFUSED


# ---- the owner


async def test_pause_freezes_machines_and_resume_lets_them_go_on(rig: Rig) -> None:
    async with rig.working() as agent:
        attempt = await rig.running(limits=Limits(wall_time_s=600))
        machine = rig.pc.machine
        await agent.pause()
        assert machine.frozen
        await rig.until(lambda: rig.server.state(attempt) is AttemptState.SUSPENDED)
        assert rig.server.syncs[-1].paused and rig.server.syncs[-1].free == NOTHING
        await rig.clock.advance(10_000)
        assert not machine.stops, "suspended time does not count"
        await agent.resume()
        assert not machine.frozen
        await rig.until(lambda: rig.server.state(attempt) is AttemptState.RUNNING)
        await rig.clock.advance(601)
        assert (await rig.ended(attempt)).reason == "wall time of 10m exceeded"


async def test_pause_gives_back_what_has_not_started(rig: Rig) -> None:
    rig.server.download_gate.clear()
    async with rig.working() as agent:
        attempt = rig.server.submit()
        await rig.until(lambda: rig.server.downloads)
        await agent.pause()
        report = await rig.ended(attempt)
        assert (report.state, report.reason) == (AttemptState.REFUSED, "")
        assert rig.nothing_left()


async def test_pause_ends_a_machine_that_cannot_be_frozen(rig: Rig) -> None:
    async with rig.working() as agent:
        attempt = await rig.running()
        rig.driver.errors["pause"] = MachineFailed("no answer")
        await agent.pause()
        report = await rig.ended(attempt)
    assert report.state is AttemptState.REFUSED
    assert "could not be frozen" in report.reason


async def test_pause_outlives_the_worker(rig: Rig) -> None:
    async with rig.working(keep=True) as agent:
        attempt = await rig.running()
        await agent.pause()
    async with rig.working() as agent:
        await rig.until(lambda: rig.server.syncs[-1].paused and rig.server.state(attempt) is AttemptState.SUSPENDED)
        assert rig.pc.machine.frozen
        await agent.resume()
        assert not rig.pc.machine.frozen
        await rig.pc.machine.finish()
        assert (await rig.ended(attempt)).state is AttemptState.SUCCEEDED


async def test_largest_attempt_is_ended_when_the_owners_bound_is_passed(rig: Rig) -> None:
    # The server of this test leases without looking at the disk, so the bound can be one that a test can fill.
    async with rig.working(msgspec.structs.replace(SETTINGS, disk_bytes=2 * MIB)) as agent:
        rig.server.ignores_free = True
        small, large = await rig.running(), await rig.running()
        (rig.home.attempt(small) / "machine" / "grown").write_bytes(b"x" * MIB)
        await rig.until(lambda: agent.status().disk_bytes > MIB)
        assert not rig.server.final
        (rig.home.attempt(large) / "machine" / "grown").write_bytes(b"x" * 2 * MIB)
        await rig.until(lambda: large in rig.server.final)
        report = rig.server.final[large]
        assert (report.state, report.reason) == (AttemptState.REFUSED, "disk bound of the owner reached")
        assert small not in rig.server.final


async def test_nearly_full_pc_evicts_the_cache_and_then_ends_work(rig: Rig) -> None:
    async with rig.working(msgspec.structs.replace(SETTINGS, reserve_bytes=GIB)):
        attempt = await rig.running()
        rig.free_bytes = GIB - 1
        report = await rig.ended(attempt)
    assert (report.state, report.reason) == (AttemptState.REFUSED, "the disk of the PC is nearly full")


async def test_machine_that_cannot_be_ended_on_a_full_disk_is_tried_again_and_the_worker_lives(
    rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    stop, failures = PlayDriver.stop, [OSError(errno.ENOSPC, "No space left on device"), MachineFailed("process 7 does not end")]

    async def failing(driver: PlayDriver, handle: MachineHandle, *, grace_s: float) -> None:
        if failures:
            raise failures.pop()
        await stop(driver, handle, grace_s=grace_s)

    monkeypatch.setattr(PlayDriver, "stop", failing)
    async with rig.working(msgspec.structs.replace(SETTINGS, reserve_bytes=GIB)):
        attempt = await rig.running()
        rig.free_bytes = GIB - 1
        report = await rig.ended(attempt)
    assert not failures
    assert (report.state, report.reason) == (AttemptState.REFUSED, "the disk of the PC is nearly full")


async def test_leave_removes_everything_and_tells_the_server(rig: Rig) -> None:
    agent = rig.agent()
    task = asyncio.create_task(agent.run())
    await rig.running()
    rig.home.credentials.write_text("{}")
    leaving = asyncio.create_task(agent.leave())
    await rig.through(task)
    assert (await leaving).message == "left the grid"
    assert rig.server.left and not rig.pc.machines
    assert list(rig.home.folder.iterdir()) == []


@pytest.mark.parametrize("term", [Term(lifetime_s=100.0), Term(lifetime_s=100.0, idle_s=10.0)])
async def test_worker_for_a_time_leaves_when_that_is_over_and_gives_its_job_back(rig: Rig, term: Term) -> None:
    task = asyncio.create_task(rig.agent(term=term).run())
    await rig.running(limits=Limits(wall_time_s=99.0))
    await rig.clock.advance(90.0)
    assert not task.done()
    await rig.through(task, step_s=1.0)
    assert rig.server.left and not rig.pc.machines
    assert list(rig.home.folder.iterdir()) == []


async def test_worker_for_a_time_leaves_when_it_has_had_no_job_for_long(rig: Rig) -> None:
    task = asyncio.create_task(rig.agent(term=Term(idle_s=20.0)).run())
    attempt = await rig.running()
    await rig.clock.advance(50.0)
    assert not task.done()
    await rig.pc.machine.finish()
    await rig.until(lambda: attempt in rig.server.final)
    await rig.clock.advance(10.0)
    assert not task.done()
    await rig.through(task, step_s=1.0)
    assert rig.server.left


async def test_worker_for_a_time_takes_no_job_that_may_take_longer_than_it_is_there(rig: Rig) -> None:
    task = asyncio.create_task(rig.agent(term=Term(lifetime_s=100.0)).run())
    long = rig.server.submit(limits=Limits(wall_time_s=200.0))
    report = await rig.ended(long)
    assert (report.state, report.reason) == (AttemptState.REFUSED, "it may take longer than this worker is there")
    await rig.through(task, step_s=1.0)
    assert rig.server.left


async def test_worker_for_a_time_that_the_grid_ends_first_leaves_nothing(rig: Rig) -> None:
    task = asyncio.create_task(rig.agent(term=Term(lifetime_s=1000.0)).run())
    await rig.running(limits=Limits(wall_time_s=500.0))
    rig.home.credentials.write_text("{}")
    rig.server.revoked = True
    await rig.through(task, step_s=1.0)
    assert list(rig.home.folder.iterdir()) == [] and not rig.pc.machines


async def test_worker_for_a_time_leaves_when_it_is_stopped(rig: Rig) -> None:
    agent = rig.agent(term=Term())
    task = asyncio.create_task(agent.run())
    await rig.running()
    await rig.clock.advance(1000.0)
    assert not task.done()
    agent.stop()
    await rig.through(task)
    assert rig.server.left and not rig.pc.machines


async def test_worker_for_a_time_that_is_stopped_brings_a_result_that_is_on_its_way(rig: Rig) -> None:
    agent = rig.agent(term=Term())
    task = asyncio.create_task(agent.run())
    attempt = await rig.running()
    rig.server.upload_gate.clear()
    await rig.pc.machine.finish()
    await rig.until(lambda: rig.server.uploading)
    agent.stop()
    await rig.clock.advance(10.0)
    assert not task.done() and not rig.server.left
    rig.server.upload_gate.set()
    await rig.through(task, step_s=1.0)
    assert rig.server.final[attempt].state is AttemptState.SUCCEEDED and rig.server.left


# ---- the end and a new start


async def test_stop_destroys_machines_and_gives_attempts_back(rig: Rig) -> None:
    async with rig.working():
        started = await rig.running()
        rig.server.download_gate.clear()
        waiting = rig.server.submit(disk=disk_ref(DISK * 2))
        rig.server.blobs[blob_of(DISK * 2).sha256] = DISK * 2
        await rig.until(lambda: len(rig.server.downloads) == 2)
    assert rig.nothing_left()
    assert rig.server.final[started].reason == "the worker was stopped"
    assert rig.server.final[waiting].reason == ""
    assert {report.state for report in rig.server.final.values()} == {AttemptState.REFUSED}


async def test_stop_without_server_destroys_machines_and_reports_at_the_next_start(rig: Rig) -> None:
    async with rig.working():
        attempt = await rig.running()
        rig.server.go_down()
    assert not rig.pc.machines
    rig.server.down = False
    async with rig.working():
        assert (await rig.ended(attempt)).state is AttemptState.REFUSED


async def test_cancelled_worker_leaves_no_machine(rig: Rig) -> None:
    task = asyncio.create_task(rig.agent().run())
    await rig.running()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await rig.through(task)
    assert rig.nothing_left()


async def test_restarted_worker_finds_its_machine_and_delivers(rig: Rig) -> None:
    async with rig.working(keep=True):
        attempt = await rig.running()
        await rig.pc.machine.tell(Output(Stream.STDOUT, b"one\n"))
        await rig.until(lambda: rig.server.logs[attempt, "stdout"])
    await rig.pc.machine.tell(Output(Stream.STDOUT, b"two\n"))
    async with rig.working():
        await rig.until(lambda: rig.server.logs[attempt, "stdout"] == b"one\ntwo\n")
        assert rig.cached_disk().exists()
        await rig.pc.machine.finish(0)
        assert (await rig.ended(attempt)).state is AttemptState.SUCCEEDED
    assert len(rig.pc.made) == 1


async def test_time_without_a_worker_counts_as_wall_time(rig: Rig) -> None:
    async with rig.working(keep=True):
        attempt = await rig.running(limits=Limits(wall_time_s=600))
    await rig.clock.advance(590)
    async with rig.working():
        await rig.until(lambda: attempt in rig.server.final, step_s=0.5)
        assert rig.server.final[attempt].reason == "wall time of 10m exceeded"


async def test_machine_that_ended_while_no_worker_ran_is_collected_however_long_ago(rig: Rig) -> None:
    async with rig.working(keep=True):
        attempt = await rig.running(limits=Limits(wall_time_s=600))
    await rig.pc.machine.finish(None, cause=ExitCause.RESET)
    await rig.clock.advance(100_000)
    async with rig.working():
        assert (await rig.ended(attempt)).reason == "the guest reset or panicked before context.sh ended"


async def test_machine_that_is_gone_is_reported_and_cleaned_up(rig: Rig) -> None:
    async with rig.working(keep=True):
        attempt = await rig.running()
    rig.pc.machines.clear()
    async with rig.working():
        report = await rig.ended(attempt)
        assert report.state is AttemptState.REFUSED
        assert rig.nothing_left()
        assert rig.server.syncs[-1].free.cpus == 2, "nothing was wrong with this PC"


async def test_machine_that_was_prepared_but_never_started_is_made_again(rig: Rig) -> None:
    rig.driver.errors["start"] = asyncio.CancelledError()  # killed at that very moment
    async with rig.working(keep=True):
        attempt = rig.server.submit()
        await rig.until(lambda: [entry["phase"] for entry in rig.journalled()] == ["prepared"])
    del rig.driver.errors["start"]
    async with rig.working():
        await rig.until(lambda: len(rig.pc.made) == 2 and rig.pc.machine.started)
        await rig.pc.machine.tell(Booted())
        await rig.pc.machine.finish(0)
        assert (await rig.ended(attempt)).state is AttemptState.SUCCEEDED


async def test_result_that_was_packed_before_the_restart_is_sent_after_it(rig: Rig) -> None:
    async with rig.working(keep=True):
        attempt = await rig.running()
        rig.server.go_down()
        await rig.pc.machine.finish(0)
        await rig.until(lambda: [entry["phase"] for entry in rig.journalled()] == ["settled"])
    rig.server.down = False
    async with rig.working():
        report = await rig.ended(attempt)
    assert report.state is AttemptState.SUCCEEDED
    assert report.result is not None and report.result.sha256 in rig.server.uploads


async def test_damaged_journal_entry_is_moved_aside_and_its_machine_removed(rig: Rig) -> None:
    async with rig.working(keep=True):
        attempt = await rig.running()
    file = rig.home.journal / f"{attempt}.json"
    file.write_bytes(file.read_bytes()[:50])
    async with rig.working():
        await rig.until(lambda: attempt in rig.server.returned)
        assert not rig.pc.machines
        assert not list(rig.home.attempts.iterdir())
        assert file.with_suffix(".bad").exists()


async def test_machine_that_cannot_be_removed_is_removed_at_the_next_start(rig: Rig) -> None:
    async with rig.working(keep=True):
        attempt = await rig.running()
        rig.driver.errors["destroy"] = MachineFailed("the process does not end")
        await rig.pc.machine.tell(Exited(ExitCause.POWERED_OFF))
        assert (await rig.ended(attempt)).state is AttemptState.FAILED
        assert rig.pc.machines
    del rig.driver.errors["destroy"]
    async with rig.working():
        await rig.until(rig.nothing_left)


async def test_status_tells_the_owner_what_goes_on(rig: Rig) -> None:
    async with rig.working(WorkerSettings(cpus=2, memory_bytes=GIB, reserve_bytes=0)) as agent:
        await rig.running()
        status = agent.status()
        [attempt] = status.attempts
        assert (attempt.phase, attempt.state, attempt.cpus) == ("started", "running", 1)
        assert status.connected and status.free is not None and status.free.cpus == 1
        assert status.lease_until is not None and status.lease_until <= rig.clock.now() + 60
        assert "attempt 1 of job 1" in str(status)
