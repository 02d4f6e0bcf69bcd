"""What is kept and what goes: never a blob that somebody refers to or is just sending, whoever cleans up meanwhile; and all else, in time."""

from __future__ import annotations

import asyncio
import hashlib
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import given, settings
from hypothesis import strategies as st

from deskgrid.client.grid import Grid
from deskgrid.client.transport import Transport
from deskgrid.clock import FakeClock
from deskgrid.errors import Conflict, DeskgridError, Forbidden, NotFound
from deskgrid.model import wire
from deskgrid.model.data import Blob, DataKind
from deskgrid.model.ids import AttemptId, JobId, Sha256
from deskgrid.model.jobs import AttemptState, JobSpec, JobState, Limits, Machine
from deskgrid.model.machines import MachineKind
from deskgrid.model.users import Role
from deskgrid.model.wire import RegisterData
from deskgrid.model.workers import AttemptReport
from deskgrid.server import retention as cleaning
from deskgrid.server.repository_local import LocalRepository
from deskgrid.server.store import accounts, data, retention, submissions
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import SqlStore, Transaction, sqlite_url
from deskgrid.server.store.schema import attempt, blob, idempotency, job, log_chunk, queue, submission, upload
from deskgrid.server.store.schema import data as data_table
from deskgrid.server.store.submissions import NewSubmission
from deskgrid.settings import ServerSettings
from deskgrid.testing.databases import make_empty_database
from deskgrid.testing.grids import play_job, played_sync, running_grid

CONTENTS = [b"one", b"two"]
BLOBS = [Blob(sha256=Sha256(hashlib.sha256(content).hexdigest()), size_bytes=len(content)) for content in CONTENTS]
SPEC = JobSpec(machine=Machine(kind=MachineKind.PROCESS), command=("true",), limits=Limits(attempts=1))


class Process:
    """A server process as far as it stores and removes: what it has in hand is gone when it is killed."""

    def __init__(self, home: Path, clock: FakeClock) -> None:
        self.home, self.clock = home, clock
        self.store = SqlStore(sqlite_url(home / "grid.sqlite"), clock)
        self.restart()

    def restart(self) -> None:
        self.repository = LocalRepository(self.home, reserve_bytes=0, max_bytes=1 << 20)
        self.sending: dict[tuple[int, int], tuple[int, bool]] = {}
        """Uploads by user and blob: their number, and whether their bytes are at their place."""
        self.claimed: list[tuple[Sha256, float]] = []
        self.removed: list[Sha256] = []


class History:
    """Two users, two processes, one folder and one database; every step is one that a kill or another process may come between."""

    def __init__(self, home: Path) -> None:
        self.clock = FakeClock()
        self.processes = [Process(home, self.clock), Process(home, self.clock)]
        self.users: list[Caller] = []

    async def begin(self) -> None:
        for name in ("ann", "bob"):
            user = await self.processes[0].store.write(lambda tx, name=name: accounts.add_account(tx, name, admin=False))
            self.users.append(Caller(Role.USER, name, user_id=user.id))

    async def step(self, what: str, process: Process, user: int, number: int) -> None:
        try:
            await getattr(self, f"do_{what}")(process, user, number)
        except DeskgridError:
            return  # refused: as good

    async def do_begin(self, process: Process, user: int, number: int) -> None:
        begun, _ = await process.store.write(lambda tx: data.begin_upload(tx, self.users[user], BLOBS[number]))
        if not begun.complete:
            process.sending[user, number] = (begun.id, False)

    async def do_settle(self, process: Process, user: int, number: int) -> None:
        if (user, number) in process.sending:
            upload_id, _ = process.sending[user, number]
            have = process.repository.received_bytes(upload_id)
            await process.repository.receive(upload_id, BLOBS[number], have, pieces(CONTENTS[number][have:]))
            await process.repository.finish(upload_id, BLOBS[number])
            process.sending[user, number] = (upload_id, True)

    async def do_acknowledge(self, process: Process, user: int, number: int) -> None:
        upload_id, settled = process.sending.get((user, number), (0, False))
        if settled:
            del process.sending[user, number]
            await process.store.write(lambda tx: data.finish_upload(tx, upload_id, BLOBS[number]))

    async def do_register(self, process: Process, user: int, number: int) -> None:
        request = RegisterData(name=f"data{number}", kind=DataKind.FILE, blob=BLOBS[number])
        await process.store.write(lambda tx: data.register_data(tx, self.users[user], request))

    async def do_remove_data(self, process: Process, user: int, number: int) -> None:
        await process.store.write(lambda tx: data.remove_data(tx, self.users[user], f"data{number}"))

    async def do_submit(self, process: Process, user: int, number: int) -> None:
        def submit(tx: Transaction) -> None:
            data.require_upload(tx, self.users[user], BLOBS[number])
            submissions.submit_job(tx, self.users[user], NewSubmission(spec=SPEC, context=BLOBS[number]))

        await process.store.write(submit)

    async def do_end_jobs(self, process: Process, user: int, _number: int) -> None:
        from deskgrid.server.store.jobs import cancel_job

        def end(tx: Transaction) -> None:
            for row in tx.rows(sa.select(job.c.id).where(job.c.owner_id == self.users[user].user_id)):
                cancel_job(tx, self.users[user], JobId(row.id), "over")
                retention.remove_job(tx, self.users[user], JobId(row.id))

        await process.store.write(end)

    async def do_forget(self, process: Process, _user: int, _number: int) -> None:
        before = self.clock.now() - 3000
        await process.store.write(lambda tx: data.forget_uploads(tx, before, 100))
        found = await process.repository.upload_ids()
        live = await process.store.read(lambda tx: data.live_uploads(tx, found))
        await process.repository.forget_uploads(found - live)

    async def do_mark(self, process: Process, _user: int, _number: int) -> None:
        await process.store.write(lambda tx: data.mark_unused(tx, "", 100))

    async def do_claim(self, process: Process, _user: int, _number: int) -> None:
        found = await process.store.write(lambda tx: data.claim_unused(tx, 100))
        process.claimed += [(sha256, self.clock.now()) for sha256 in found]

    async def do_unlink(self, process: Process, _user: int, _number: int) -> None:
        if process.claimed:
            sha256, at = process.claimed.pop(0)
            if self.clock.now() < at + data.CLAIM_S:
                await process.repository.remove(sha256)
                process.removed.append(sha256)

    async def do_note(self, process: Process, _user: int, _number: int) -> None:
        gone, process.removed = process.removed, []
        await process.store.write(lambda tx: data.note_removed(tx, gone))

    async def do_adopt(self, process: Process, _user: int, _number: int) -> None:
        async for found in process.repository.blobs():
            await process.store.write(lambda tx, found=found: data.adopt(tx, found))

    async def do_kill(self, process: Process, _user: int, _number: int) -> None:
        process.restart()

    async def do_wait(self, _process: Process, _user: int, number: int) -> None:
        await self.clock.advance((5, 300)[number])

    # What belongs together, since steps that fit each other are seldom drawn in a row

    async def do_send(self, process: Process, user: int, number: int) -> None:
        for what in ("begin", "settle", "acknowledge"):
            await self.step(what, process, user, number)

    async def do_collect(self, process: Process, user: int, number: int) -> None:
        """All up to the claim: what is not referred to is the process's to remove."""
        await self.clock.advance(3200)
        for what in ("forget", "mark"):
            await self.step(what, process, user, number)
        await self.clock.advance(700)
        await self.step("claim", process, user, number)

    async def do_sweep(self, process: Process, user: int, number: int) -> None:
        """A whole round, soon after what was sent."""
        await self.step("mark", process, user, number)
        await self.clock.advance(700)
        for what in ("claim", "unlink", "unlink", "note"):
            await self.step(what, process, user, number)

    async def do_purge(self, process: Process, user: int, number: int) -> None:
        for what in ("unlink", "unlink", "note"):
            await self.step(what, process, user, number)

    async def check(self) -> None:
        """All that is referred to is there, and so is what a user was told to be complete."""

        def wanted(tx: Transaction) -> set[str]:
            sent = sa.select(upload.c.sha256).where(upload.c.complete.is_(True))
            kept = [sa.select(data_table.c.sha256), sa.select(submission.c.context).where(submission.c.context.is_not(None)), sent]
            return {row[0] for query in kept for row in tx.rows(query)}

        for sha256 in await self.processes[0].store.read(wanted):
            assert await self.processes[0].repository.holds(next(each for each in BLOBS if each.sha256 == sha256)), sha256[:6]

    async def end(self) -> None:
        """Once nobody needs anything all of it goes."""
        first = self.processes[0]
        for process in self.processes:
            process.restart()
        for user in (0, 1):
            await self.step("end_jobs", first, user, 0)
            for number in range(len(BLOBS)):
                for _ in range(9):
                    await self.step("remove_data", first, user, number)
        await self.clock.advance(4000)
        for _ in range(4):
            for what in ("forget", "adopt", "mark", "claim", *["unlink"] * 3, "note"):
                await self.step(what, first, 0, 0)
            await self.clock.advance(700)
        assert await first.store.read(lambda tx: tx.rows(sa.select(blob))) == []
        assert [one for found in [found async for found in first.repository.blobs()] for one in found] == []
        assert await first.repository.upload_ids() == set()


async def pieces(content: bytes) -> AsyncIterator[bytes]:
    yield content


_STEPS = [name.removeprefix("do_") for name in vars(History) if name.startswith("do_")]
_LIKELY = ["send", "send", "sweep", "collect", "purge", "claim", "unlink", "mark"]


@settings(max_examples=80, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(_STEPS + _LIKELY * 4), st.integers(0, 1), st.integers(0, 1), st.integers(0, 1)),
        min_size=10,
        max_size=80,
    )
)
def test_blob_that_is_needed_or_being_sent_is_never_removed_and_others_are(steps: list[tuple[str, int, int, int]]):
    async def run(home: Path) -> None:
        make_empty_database(home / "grid.sqlite")
        history = History(home)
        try:
            await history.begin()
            for what, process, user, number in steps:
                await history.step(what, history.processes[process], user, number)
                await history.check()
            await history.end()
        finally:
            for each in history.processes:
                await each.store.close()

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(run(Path(folder)))


async def test_upload_that_begins_while_its_old_bytes_are_removed_waits_until_they_are_gone(tmp_path: Path):
    make_empty_database(tmp_path / "grid.sqlite")
    history = History(tmp_path)
    await history.begin()
    here, there = history.processes
    for what in ("begin", "settle", "acknowledge"):
        await history.step(what, here, 0, 0)
    await history.clock.advance(4000)
    await history.do_forget(here, 0, 0)
    await history.do_mark(here, 0, 0)
    await history.clock.advance(data.REMOVAL_WAIT_S)
    await history.do_claim(here, 0, 0)
    with pytest.raises(Conflict, match="being removed"):
        await history.do_begin(there, 1, 0)
    await history.do_unlink(here, 0, 0)
    await history.do_note(here, 0, 0)
    for what in ("begin", "settle", "acknowledge"):
        await history.step(what, there, 1, 0)
    assert await there.repository.holds(BLOBS[0])
    for each in history.processes:
        await each.store.close()


async def test_claim_is_taken_over_only_when_its_first_holder_must_not_remove_any_more(tmp_path: Path):
    assert data.TAKE_OVER_S >= data.CLAIM_S + 60  # a removal that was begun has ended by then (server/s3.py)
    make_empty_database(tmp_path / "grid.sqlite")
    history = History(tmp_path)
    await history.begin()
    here, there = history.processes
    await history.do_send(here, 0, 0)
    await history.do_collect(here, 0, 0)
    assert here.claimed
    await history.clock.advance(data.CLAIM_S)
    await history.do_claim(there, 0, 0)
    assert not there.claimed
    await history.clock.advance(data.TAKE_OVER_S - data.CLAIM_S)
    await history.do_claim(there, 0, 0)
    assert there.claimed
    await history.do_purge(there, 0, 0)
    await history.do_send(there, 1, 0)
    await history.do_unlink(here, 0, 0)
    await history.check()
    assert await there.repository.holds(BLOBS[0])
    for each in history.processes:
        await each.store.close()


# Lifetimes, over a real server


def recount(tx: Transaction) -> bool:
    """Tell whether the queues' counts are those of the jobs there are."""
    tx.settle()
    for row in tx.rows(sa.select(queue)):
        for state in JobState:
            real = tx.value(sa.select(sa.func.count()).where(job.c.queue_id == row.id, job.c.state == state.value))
            if getattr(row, state.value) != real:
                return False
    return True


async def ended_job(grid: Any, folder: Path, **spec: Any) -> tuple[JobId, Blob]:
    """Run a job, played by hand, that brings a result."""
    async with Transport(await grid.worker()) as worker:
        played = await play_job(await grid.admin(), worker)
        (folder / "result").write_bytes(b"result of %d" % played.id)
        from deskgrid.client.grid import describe_file

        result = describe_file(folder / "result")
        await worker.upload(folder / "result", result)
        report = AttemptReport(attempt_id=played.assignment.attempt_id, state=AttemptState.SUCCEEDED, exit_code=0, result=result)
        log = wire.AppendLog(attempt_id=AttemptId(played.assignment.attempt_id), stream="stdout", offset=0, data=b"said")
        await worker.call(wire.APPEND_LOG, log)
        await worker.call(wire.SYNC, played_sync(report))
    return played.id, result


async def test_result_goes_after_its_time_and_the_job_stays(tmp_path: Path):
    clock = FakeClock()
    chosen = ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, retain_s=5000, upload_lifetime_s=100)
    async with running_grid(tmp_path / "server", chosen, clock) as grid, Grid(await grid.admin()) as user:
        job_id, result = await ended_job(grid, tmp_path)
        await clock.advance(4900)
        await cleaning.clean(grid.services)
        assert (await user.job(job_id)).job.result == result.sha256
        await clock.advance(200)
        await cleaning.clean(grid.services)
        await clock.advance(data.REMOVAL_WAIT_S)
        await cleaning.clean(grid.services)
        detail = await user.job(job_id)
        assert (detail.job.state, detail.job.result) == (JobState.COMPLETED, None)
        with pytest.raises(NotFound):
            grid.services.repository.file(result.sha256)
        assert not await grid.services.store.read(lambda tx: tx.rows(sa.select(log_chunk)))


async def test_jobs_are_forgotten_in_time_and_counts_add_up(tmp_path: Path):
    clock = FakeClock()
    chosen = ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, forget_s=1000)
    async with running_grid(tmp_path / "server", chosen, clock) as grid, Grid(await grid.admin()) as user:
        job_id, _ = await ended_job(grid, tmp_path)
        waiting = await user.submit(JobSpec(machine=Machine(disk="played")))
        await clock.advance(900)
        await cleaning.clean(grid.services)
        assert (await user.job(job_id)).job.state is JobState.COMPLETED
        await clock.advance(200)
        await cleaning.clean(grid.services)
        with pytest.raises(NotFound):
            await user.job(job_id)
        assert (await user.job(waiting.id)).job.state is JobState.WAITING
        assert not await grid.services.store.read(lambda tx: tx.rows(sa.select(attempt)))
        assert await grid.services.store.write(recount)


async def test_ended_job_can_be_removed_and_frees_its_result(tmp_path: Path):
    async with running_grid(tmp_path / "server") as grid, Grid(await grid.admin()) as user:
        job_id, result = await ended_job(grid, tmp_path)
        waiting = await user.submit(JobSpec(machine=Machine(disk="played")))
        with pytest.raises(Conflict, match="waiting"):
            await user.remove_job(waiting.id)
        await user.remove_job(job_id)
        with pytest.raises(NotFound):
            await user.remove_job(job_id)
        assert await grid.services.store.write(recount)
        await grid.services.store.write(lambda tx: data.give_up_upload(tx, "worker:1", result.sha256))
        await cleaning.remove_unused(grid.services, wait_s=0)
        with pytest.raises(NotFound):
            grid.services.repository.file(result.sha256)


async def test_array_is_removed_as_a_whole_and_only_after_its_end(tmp_path: Path):
    from deskgrid.server.chores import do_chores

    async with running_grid(tmp_path / "server") as grid, Grid(await grid.admin()) as user:
        array = await user.transport.call(wire.SUBMIT_ARRAY, wire.SubmitArray(spec=SPEC, count=5000))
        while await do_chores(grid.services):
            pass
        with pytest.raises(Conflict):
            await user.transport.call(wire.REMOVE_ARRAY, path={"array": array.id})
        await user.transport.call(wire.CANCEL_ARRAY, path={"array": array.id})
        while await do_chores(grid.services):
            pass
        await user.transport.call(wire.REMOVE_ARRAY, path={"array": array.id})
        for table in (job, submission, queue):
            assert not await grid.services.store.read(lambda tx, table=table: tx.rows(sa.select(table)))


async def test_user_without_room_is_told_so_and_has_room_again_after_removing(tmp_path: Path):
    clock = FakeClock()
    chosen = ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, max_bytes=1500)
    async with running_grid(tmp_path / "server", chosen, clock) as grid, Grid(await grid.admin()) as user:
        for name in ("one", "two"):
            (tmp_path / name).write_bytes(name.encode() * 333)
        await user.put(tmp_path / "one", "one")
        with pytest.raises(Forbidden, match="no room"):
            await user.put(tmp_path / "two", "two")
        await user.remove_data("one")
        await clock.advance(20)
        await user.put(tmp_path / "two", "two")


async def test_status_tells_what_is_stored_for_whom_and_counts_workers_in_the_database(tmp_path: Path):
    async with running_grid(tmp_path / "server") as grid, Grid(await grid.admin()) as user:
        _, result = await ended_job(grid, tmp_path)
        (tmp_path / "other").write_bytes(b"other")
        await user.put(tmp_path / "other", "other")
        found = await user.status()
        assert found.storage == {"disks": 4, "contexts": 0, "results": result.size_bytes, "other": 5}
        assert found.storage_users == {"admin": 9 + result.size_bytes}
        assert found.storage_bytes == 9 + result.size_bytes
        assert (found.workers_online, found.lent.cpus) == (1, 64)


async def test_old_answers_are_forgotten_a_few_at_a_time(tmp_path: Path):
    async with running_grid(tmp_path / "server") as grid:
        rows = [{"principal": "user:1", "key": f"{n}", "answer": b"", "created_at": 1.0} for n in range(7)]
        store = grid.services.store
        await store.write(lambda tx: tx.run(sa.insert(idempotency), rows))
        assert await store.write(lambda tx: retention.forget_idempotency(tx, 2.0, 5)) == 5
        assert await store.write(lambda tx: retention.forget_idempotency(tx, 2.0, 5)) == 2
