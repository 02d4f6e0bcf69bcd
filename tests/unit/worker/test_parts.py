"""The small parts: slots, journal, output, waiting."""

from __future__ import annotations

import asyncio
import os
import random
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.clock import FakeClock
from deskgrid.core.backoff import delay_s
from deskgrid.errors import BadImage, DriverUnusable, NoSpace
from deskgrid.machines.driver import ExitCause, Exited, MachineHandle, MachineSpec, Stream
from deskgrid.machines.results import ResultReport
from deskgrid.model.ids import AttemptId, JobId
from deskgrid.model.jobs import AttemptState, JobSpec, Machine
from deskgrid.model.machines import DriverName, Fingerprint, MachineKind, Network
from deskgrid.model.workers import Assignment, AttemptReport, Capacity
from deskgrid.settings import WorkerSettings
from deskgrid.units import GIB, MIB
from deskgrid.worker import home as home_module
from deskgrid.worker.drivers import Drivers
from deskgrid.worker.journal import Entry, Journal, Phase, Verdict
from deskgrid.worker.judging import judge
from deskgrid.worker.output import LiveOutput
from deskgrid.worker.probe import allocated_bytes, lent_by, profile_of
from deskgrid.worker.slots import NOTHING, Usage, excess_bytes, free_capacity, usage_of
from deskgrid.worker.tasks import beside, finish, within
from tests.unit.worker.play import PlayServer, disk_ref

LENT = Capacity(cpus=4, memory_bytes=4 * GIB, disk_bytes=20 * GIB)


# ---- back-off


@given(st.integers(-3, 10_000), st.floats(0.01, 100), st.floats(0.01, 1000), st.integers())
def test_delay_doubles_within_its_bounds(failures: int, first_s: float, max_s: float, seed: int) -> None:
    found = delay_s(failures, first_s=first_s, max_s=max_s, rng=random.Random(seed))
    assert min(first_s, max_s) / 2 <= found <= max_s
    later = delay_s(failures + 2, first_s=first_s, max_s=max_s, rng=random.Random(seed))
    assert later >= found


# ---- slots


def usage(cpus: int = 1, memory: int = GIB, promised: int = GIB, used: int = 0) -> Usage:
    return Usage(Capacity(cpus=cpus, memory_bytes=memory, disk_bytes=promised), used)


def free(*usages: Usage, disk: int = 100 * GIB, reserve: int = 0) -> Capacity:
    return free_capacity(LENT, usages, disk_free_bytes=disk, reserve_bytes=reserve)


def test_idle_worker_offers_all_that_is_lent() -> None:
    assert free() == LENT


def test_attempt_counts_with_its_promise_or_what_it_wrote() -> None:
    assert free(usage(used=0)) == Capacity(cpus=3, memory_bytes=3 * GIB, disk_bytes=19 * GIB)
    assert free(usage(used=5 * GIB)).disk_bytes == 15 * GIB


def test_promises_not_used_yet_come_out_of_the_real_disk() -> None:
    assert free(usage(used=0), disk=10 * GIB, reserve=GIB).disk_bytes == 8 * GIB
    assert free(usage(used=GIB), disk=9 * GIB, reserve=GIB).disk_bytes == 8 * GIB


@pytest.mark.parametrize("full", [usage(cpus=4), usage(memory=4 * GIB), usage(used=20 * GIB)])
def test_nothing_is_offered_once_one_thing_is_used_up(full: Usage) -> None:
    assert free(full) == NOTHING


def test_attempt_without_machine_needs_no_cpu() -> None:
    spec = JobSpec(machine=Machine(disk="tiny", cpus=2, scratch_bytes=8 * GIB))
    assert usage_of(spec, disk_bytes=7, needs_machine=False) == Usage(NOTHING, 7)
    assert usage_of(spec, disk_bytes=7, needs_machine=True).promised.disk_bytes == GIB


@given(st.lists(st.builds(usage, st.integers(0, 3), st.integers(0, 3 * GIB), st.integers(0, GIB), st.integers(0, 9 * GIB))))
def test_what_is_free_never_passes_the_bounds(usages: list[Usage]) -> None:
    found = free(*usages, disk=10 * GIB, reserve=GIB)
    assert 0 <= found.cpus <= LENT.cpus and 0 <= found.memory_bytes <= LENT.memory_bytes
    assert 0 <= found.disk_bytes <= 9 * GIB
    assert found == NOTHING or found.disk_bytes + sum(one.disk_bytes for one in usages) <= LENT.disk_bytes


def test_excess_is_told_apart_from_a_full_disk() -> None:
    assert excess_bytes(LENT, 21 * GIB, disk_free_bytes=GIB, reserve_bytes=0) == (GIB, 0)
    assert excess_bytes(LENT, 0, disk_free_bytes=0, reserve_bytes=GIB) == (0, GIB)


# ---- this PC


def test_unset_bounds_leave_the_owner_a_cpu_and_half_of_the_memory() -> None:
    lent = lent_by(WorkerSettings())
    assert 1 <= lent.cpus <= max(1, (os.cpu_count() or 1) - 1)
    assert lent.memory_bytes > 0
    assert lent_by(WorkerSettings(cpus=7, memory_bytes=5)).cpus == 7
    assert profile_of(WorkerSettings(), ()).arch in ("x86_64", "aarch64")


def test_sparse_files_count_with_what_they_take(tmp_path: Path) -> None:
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(GIB)
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "full").write_bytes(b"x" * MIB)
    (tmp_path / "link").symlink_to("/")
    assert MIB <= allocated_bytes(tmp_path) < 2 * MIB
    assert allocated_bytes(tmp_path / "missing") == 0


# ---- journal


def entry(number: int) -> Entry:
    handle = MachineHandle(
        "fake", "/w", MachineSpec("job-1/attempt-1", MachineKind.VM, 1, 1, 1, disk=Path("/d"), environment=(("A", "b"),)), "t"
    )
    return Entry(
        assignment=Assignment(
            attempt_id=AttemptId(number),
            job_id=JobId(1),
            number=1,
            spec=JobSpec(machine=Machine(disk="tiny")),
            disk=disk_ref(),
            context=None,
        ),
        phase=Phase.EXITED,
        handle=handle,
        verdict=Verdict(AttemptState.FAILED, "why"),
        exited=Exited(ExitCause.STOPPED, "detail"),
        report=AttemptReport(attempt_id=AttemptId(number), state=AttemptState.FAILED),
    )


def test_entries_come_back_as_they_were_written_in_order(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    journal.write([entry(10), entry(9)])
    assert Journal(tmp_path).read() == [entry(9), entry(10)]
    journal.remove(AttemptId(9))
    journal.remove(AttemptId(9))
    assert Journal(tmp_path).read() == [entry(10)]


@pytest.mark.parametrize("garbage", [b"", b"{", b"\xff\xfe", b"[]", b'{"phase": "dancing"}'])
def test_garbage_is_moved_aside(tmp_path: Path, garbage: bytes) -> None:
    journal = Journal(tmp_path)
    journal.write([entry(1)])
    (tmp_path / "2.json").write_bytes(garbage)
    (tmp_path / "3.json.new").write_bytes(b"half")
    assert journal.read() == [entry(1)]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.json", "2.bad"]


def test_entry_under_another_name_is_not_believed(tmp_path: Path) -> None:
    Journal(tmp_path).write([entry(1)])
    (tmp_path / "1.json").rename(tmp_path / "5.json")
    assert Journal(tmp_path).read() == []


def test_full_disk_leaves_the_entry_as_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    journal = Journal(tmp_path)
    journal.write([entry(1)])

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(home_module.os, "fsync", full)
    with pytest.raises(NoSpace):
        journal.write([Entry(assignment=entry(1).assignment)])
    assert journal.read() == [entry(1)]
    assert len(list(tmp_path.iterdir())) == 1


# ---- output


async def test_output_goes_in_batches_and_what_was_not_told_live_is_completed() -> None:
    server, clock = PlayServer(), FakeClock()
    server.leased[AttemptId(1)] = entry(1).assignment
    output = LiveOutput(AttemptId(1), server, clock, random.Random(1))
    task = asyncio.create_task(output.run())
    output.feed(Stream.STDOUT, b"a")
    await clock.advance(0)
    assert server.logs[AttemptId(1), "stdout"] == b"a"
    output.feed(Stream.STDOUT, b"b")
    await clock.advance(0.5)
    assert server.logs[AttemptId(1), "stdout"] == b"a"
    await clock.advance(0.6)
    assert server.logs[AttemptId(1), "stdout"] == b"ab"
    task.cancel()
    output.complete(Stream.STDOUT, b"abc")
    await output.drain()
    assert server.logs[AttemptId(1), "stdout"] == b"abc"


async def test_output_is_bounded_without_gaps() -> None:
    server = PlayServer()
    server.leased[AttemptId(1)] = entry(1).assignment
    output = LiveOutput(AttemptId(1), server, FakeClock(), random.Random(1))
    for _ in range(40):
        output.feed(Stream.CONSOLE, b"x" * 64 * 1024)
    output.feed(Stream.CONSOLE, b"y")
    await output.drain()
    assert server.logs[AttemptId(1), "console"] == b"x" * MIB


async def test_output_that_is_not_wanted_is_dropped() -> None:
    output = LiveOutput(AttemptId(1), PlayServer(), FakeClock(), random.Random(1))
    output.feed(Stream.STDOUT, b"a")
    await output.drain()  # the server knows no such attempt, and says so


# ---- judging


def found(exit_code: int | None, dropped: int = 0) -> ResultReport:
    return ResultReport(
        exit_code=exit_code,
        stdout=b"",
        stderr=b"",
        files=0,
        bytes=0,
        archive_bytes=0,
        archive_sha256="",
        clean=True,
        dropped_count=dropped,
    )


def test_exit_code_counts_more_than_how_the_machine_ended() -> None:
    late = Verdict(AttemptState.FAILED, "wall time of 1m exceeded")
    assert judge(Exited(ExitCause.STOPPED), found(0), late) == (AttemptState.SUCCEEDED, "")
    assert judge(Exited(ExitCause.STOPPED), found(2), late) == (AttemptState.FAILED, "context.sh ended with 2")
    assert judge(Exited(ExitCause.STOPPED), found(None), late) == (AttemptState.FAILED, "wall time of 1m exceeded")
    assert judge(Exited(ExitCause.POWERED_OFF), found(0, dropped=3), None)[1] == "3 entries of the result were left out"


# ---- waiting


async def test_finish_runs_to_the_end_and_then_tells_of_the_cancellation() -> None:
    gate, done = asyncio.Event(), []

    async def work() -> None:
        await gate.wait()
        done.append(True)

    task = asyncio.create_task(finish(work()))
    await asyncio.sleep(0)
    task.cancel()
    await asyncio.sleep(0)
    assert not task.done()
    gate.set()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert done


async def test_beside_raises_the_error_itself_and_ends_the_others() -> None:
    ended = []

    async def for_ever() -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ended.append(True)

    async def broken() -> None:
        await asyncio.sleep(0)
        raise BadImage("x")

    async def quick() -> int:
        await asyncio.sleep(0)
        return 7

    with pytest.raises(BadImage):
        await beside(asyncio.Event().wait(), broken(), for_ever())
    assert await beside(quick(), for_ever()) == 7
    assert ended == [True, True]


async def test_within_cancels_what_takes_too_long() -> None:
    clock = FakeClock()
    task = asyncio.create_task(within(asyncio.Event().wait(), clock, 5))
    await clock.advance(0)
    await clock.advance(4)
    assert not task.done()
    await clock.advance(2)
    with pytest.raises(TimeoutError):
        await task


# ---- which driver


def fingerprint(
    driver: DriverName, accelerator: str, *, usable: bool = True, networks: tuple[Network, ...] = (Network.NONE,)
) -> Fingerprint:
    return Fingerprint(driver, (MachineKind.VM,), usable, "" if usable else "no", "1", accelerator, networks)


class Found:
    """A driver that found out this."""

    def __init__(self, found: Fingerprint) -> None:
        self.found = found

    async def fingerprint(self) -> Fingerprint:
        return self.found


@pytest.mark.parametrize(
    ("qemu", "virtualbox", "asked", "chosen"),
    [
        ("kvm", True, "", DriverName.QEMU),
        ("tcg", True, "", DriverName.VIRTUALBOX),
        ("tcg", False, "", DriverName.QEMU),
        ("tcg", True, "qemu", DriverName.QEMU),
        ("kvm", True, "virtualbox", DriverName.VIRTUALBOX),
        ("kvm", False, "virtualbox", None),
    ],
)
async def test_hardware_goes_before_software_unless_the_job_asks(
    qemu: str, virtualbox: bool, asked: str, chosen: DriverName | None
) -> None:
    both = (Network.NONE, Network.OVERLAY)
    found = [
        Found(fingerprint(DriverName.QEMU, qemu, networks=both)),
        Found(fingerprint(DriverName.VIRTUALBOX, "hardware", usable=virtualbox)),
    ]
    drivers = Drivers(found, lambda name: None)  # type: ignore[arg-type, return-value]
    await drivers.probe()
    machine = Machine(disk="d", driver=asked)
    if chosen is None:
        with pytest.raises(DriverUnusable, match="virtualbox"):
            drivers.choose(machine)
        return
    driver = drivers.choose(machine)
    assert isinstance(driver, Found) and driver.found.driver is chosen
    # A job with services is for a driver that can confine them, however slow.
    wired = drivers.choose(Machine(disk="d", network=Network.OVERLAY))
    assert isinstance(wired, Found) and wired.found.driver is DriverName.QEMU
