"""A crowd at a store: users and workers at several server processes at once, at random, and what must be true afterwards.

Each `Store` given stands for a server process. Calls may fail with StoreUnavailable, as when a process or its connection is killed: then nobody
knows whether they were done, and they are made again, as the programs outside do.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import sqlalchemy as sa

from deskgrid.clock import FakeClock
from deskgrid.core.lifecycle import FINAL_JOB_STATES, LIVE_STATES, AttemptEvent
from deskgrid.errors import DeskgridError, StoreUnavailable
from deskgrid.model.ids import ArrayId, AttemptId, JobId, WorkerId
from deskgrid.model.jobs import AttemptState, JobSpec, JobState, Limits, Machine
from deskgrid.model.machines import MachineKind
from deskgrid.model.users import Role
from deskgrid.server.store import accounts, attempts, jobs, queues, submissions, workers
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.attempts import Outcome
from deskgrid.server.store.engine import Store, Transaction
from deskgrid.server.store.schema import attempt, dependency, job, queue, submission
from deskgrid.server.store.submissions import NewSubmission

__all__ = ["Crowd"]

T = TypeVar("T")
_LEASE_S = 30.0
_FINAL = {state.value for state in FINAL_JOB_STATES}
_LIVE = {state.value for state in LIVE_STATES}


class Crowd:
    """Users and workers who call one of several stores at random."""

    def __init__(self, stores: Callable[[], list[Store]], clock: FakeClock, seed: int) -> None:
        self._stores = stores
        self._clock = clock
        self._rng = random.Random(seed)  # noqa: S311 - a replayable history, as far as the processes' race allows
        self._leased: Counter[AttemptId] = Counter()
        self._submitted: list[str] = []
        self._callers: list[Caller] = []

    async def live(self, *, users: int, calls: int, pcs: int) -> None:
        """Play `users` users with so many calls each, and `pcs` workers, until every job has ended. Then check what must be true."""
        self._callers = [await self._add_user(f"user{number}") for number in range(users)]
        ids = [await self._call(lambda tx: workers.add_worker(tx, "pc")) for _ in range(pcs)]
        working = [asyncio.create_task(self._work(worker_id)) for worker_id in ids]
        keeping = [asyncio.create_task(self._keep_house()) for _ in range(2)]
        try:
            await asyncio.gather(*(self._use(caller, calls) for caller in self._callers))
            await self._until_all_ended()
        finally:
            for task in (*working, *keeping):
                task.cancel()
            ended = await asyncio.gather(*working, *keeping, return_exceptions=True)
        assert [error for error in ended if isinstance(error, Exception)] == []
        await self._call(self._check)

    async def _add_user(self, name: str) -> Caller:
        user = await self._call(lambda tx: accounts.add_account(tx, name, admin=False))
        return Caller(Role.USER, name, user_id=user.id)

    async def _call(self, function: Callable[[Transaction], T]) -> T:
        """Call one of the stores, again if it is not available."""
        for _ in range(50):
            try:
                return await self._rng.choice(self._stores()).write(function)
            except StoreUnavailable:
                await asyncio.sleep(0.01)
        raise AssertionError("no store could be used")

    # Users

    async def _use(self, caller: Caller, calls: int) -> None:
        for _ in range(calls):
            action = self._rng.choices((self._submit, self._submit_array, self._cancel), (6, 2, 2))[0]
            with contextlib.suppress(DeskgridError):  # as what comes after a job of somebody else's
                await action(caller)
            await asyncio.sleep(0)

    def _spec(self) -> JobSpec:
        after = tuple(self._rng.sample(self._submitted, min(len(self._submitted), self._rng.choice((0, 0, 1, 2)))))
        limits = Limits(attempts=2, max_lost=4)
        machine = Machine(kind=MachineKind.PROCESS, cpus=self._rng.choice((1, 2)))
        return JobSpec(machine=machine, limits=limits, after=after[:1], after_end=after[1:])

    async def _submit(self, caller: Caller) -> None:
        new = NewSubmission(spec=self._spec())
        self._submitted.append(f"job-{await self._call(lambda tx: submissions.submit_job(tx, caller, new))}")

    async def _submit_array(self, caller: Caller) -> None:
        new, size = NewSubmission(spec=self._spec()), self._rng.randrange(1, 12)
        self._submitted.append(f"array-{await self._call(lambda tx: submissions.submit_array(tx, caller, new, size))}")

    async def _cancel(self, caller: Caller) -> None:
        if not self._submitted:
            return
        kind, _, number = self._rng.choice(self._submitted).partition("-")
        if kind == "job":
            await self._call(lambda tx: jobs.cancel_job(tx, caller, JobId(int(number)), "not wanted"))
        else:
            await self._call(lambda tx: submissions.cancel_array(tx, caller, ArrayId(int(number)), "not wanted"))

    # Workers

    async def _work(self, worker_id: WorkerId) -> None:
        while True:
            found = await self._call(lambda tx: self._lease(tx, worker_id))
            self._leased.update(found)
            for attempt_id in found:
                await self._run(attempt_id)
            await asyncio.sleep(0 if found else 0.005)

    def _lease(self, tx: Transaction, worker_id: WorkerId) -> list[AttemptId]:
        board = queues.board(tx)
        waiting = board.queues()
        if not waiting:
            return []
        chosen = self._rng.choice(waiting)
        found = attempts.lease(tx, worker_id, chosen.id, self._rng.randrange(1, 4), _LEASE_S, head=chosen.head)
        board.took(chosen.id, found)
        return [one.attempt_id for one in found]

    async def _run(self, attempt_id: AttemptId) -> None:
        events = self._rng.choices(
            (
                (AttemptEvent.STARTED, AttemptEvent.SUCCEEDED),
                (AttemptEvent.STARTED, AttemptEvent.SUSPENDED, AttemptEvent.STARTED, AttemptEvent.SUCCEEDED),
                (AttemptEvent.STARTED, AttemptEvent.FAILED),
                (AttemptEvent.RETURNED,),
                (AttemptEvent.STARTED,),  # then nothing is heard of it
                (),
            ),
            (60, 10, 10, 8, 6, 6),
        )[0]
        for event in events:
            await self._call(partial(attempts.apply_event, attempt_id=attempt_id, event=event, outcome=Outcome(exit_code=0)))

    # What the servers do by themselves

    async def _keep_house(self) -> None:
        while True:
            await self._clock.advance(self._rng.random() * 5)
            await self._call(attempts.expire_leases)
            for chore in await self._call(submissions.chores):
                if chore.state is submissions.SubmissionState.FILLING:
                    await self._call(partial(submissions.fill, array_id=chore.array_id, limit=self._rng.randrange(1, 6)))
                else:
                    await self._call(partial(jobs.cancel_array_jobs, array_id=chore.array_id, limit=self._rng.randrange(1, 6)))
            await asyncio.sleep(0.01)

    async def _until_all_ended(self) -> None:
        async with asyncio.timeout(90):
            while await self._call(_unfinished):  # noqa: ASYNC110 - it is the store that knows
                await asyncio.sleep(0.05)

    # What must be true

    def _check(self, tx: Transaction) -> None:
        assert max(self._leased.values(), default=1) == 1, "an attempt was given to two workers"
        _check_counts(tx)
        tally: dict[int, Counter[str]] = {}
        for row in tx.rows(sa.select(attempt.c.job_id, attempt.c.state)):
            tally.setdefault(row.job_id, Counter())[row.state] += 1
        for row in tx.rows(sa.select(job)):
            mine = tally.get(row.id, Counter())
            assert row.state in _FINAL, f"job {row.id} is {row.state}"
            assert not mine.keys() & _LIVE, f"job {row.id} has ended and runs"
            wins = mine[AttemptState.SUCCEEDED.value]
            assert wins == (1 if row.state == JobState.COMPLETED.value else 0), f"job {row.id} is {row.state} with {wins} successes"
        made = {row[0]: row[1] for row in tx.rows(sa.select(job.c.submission_id, sa.func.count()).group_by(job.c.submission_id))}
        for row in tx.rows(sa.select(submission).where(submission.c.size.is_not(None))):
            assert made.get(row.id, 0) == row.filled, f"array {row.id} has lost jobs"
            assert row.state in ("ended", "cancelled"), f"array {row.id} is {row.state}"
            assert row.state == "cancelled" or row.filled == row.size
        assert tx.rows(sa.select(dependency)) == []


def _unfinished(tx: Transaction) -> int:
    """Return how many submissions have not ended."""
    open_jobs = sa.select(sa.func.count()).select_from(job).where(job.c.state.not_in(_FINAL))
    open_arrays = sa.select(sa.func.count()).where(
        submission.c.size.is_not(None), submission.c.state.not_in(("ended", "cancelled"))
    )
    return int(tx.value(open_jobs)) + int(tx.value(open_arrays))


def _check_counts(tx: Transaction) -> None:
    """Check each queue's counts against its jobs."""
    real: dict[int, dict[str, int]] = {}
    for row in tx.rows(sa.select(job.c.queue_id, job.c.state, sa.func.count()).group_by(job.c.queue_id, job.c.state)):
        real.setdefault(row[0], {})[row[1]] = row[2]
    for row in tx.rows(sa.select(queue)):
        counted: dict[str, Any] = {state.value: getattr(row, state.value) for state in JobState}
        found = {state.value: real.get(row.id, {}).get(state.value, 0) for state in JobState}
        assert counted == found, f"queue {row.id} counts {counted}, has {found}"
