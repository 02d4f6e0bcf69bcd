"""Following a job: the phases that are shown, and output through all attempts; on a grid that plays a script."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from deskgrid.cli import follow
from deskgrid.cli.output import Phase
from deskgrid.errors import Unreachable
from deskgrid.model.ids import AttemptId, JobId, Sha256, UserId, WorkerId
from deskgrid.model.jobs import Attempt, AttemptState, Job, JobSpec, JobState, Machine
from deskgrid.model.wire import JobDetail, LogChunk

JOB = JobId(7)
S = AttemptState


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(follow, "_LOOK_S", 0)


def attempt(number: int, state: AttemptState, *, reason: str = "", exit_code: int | None = None) -> Attempt:
    return Attempt(
        id=AttemptId(number),
        job_id=JOB,
        number=number,
        worker_id=WorkerId(1),
        worker=f"pc-{number}",
        state=state,
        leased_at=0.0,
        reason=reason,
        exit_code=exit_code,
    )


def detail(state: JobState, *attempts: Attempt) -> JobDetail:
    spec = JobSpec(machine=Machine(disk="tiny"))
    job = Job(id=JOB, owner_id=UserId(1), owner="ann", spec=spec, state=state, created_at=0.0, disk_sha256=Sha256("0" * 64))
    return JobDetail(job=job, attempts=attempts)


class ScriptedGrid:
    """Tells one state of the job after the other: at each look at the changes, or else whenever all output has been read."""

    def __init__(self, *script: tuple[JobDetail, dict[int, bytes]]) -> None:
        self._script = list(script)
        self._now: JobDetail = script[0][0]
        self._output: dict[int, bytes] = {}
        self._changes_asked = False

    def step(self) -> None:
        if self._script:
            self._now, written = self._script.pop(0)
            for number, text in written.items():
                self._output[number] = self._output.get(number, b"") + text

    async def changes(self, _job: JobId) -> AsyncIterator[JobDetail]:
        self._changes_asked = True
        while self._script:
            self.step()
            yield self._now
            for _ in range(10):
                await asyncio.sleep(0)

    def _all_read(self) -> None:
        if not self._changes_asked:
            self.step()

    async def job(self, _job: JobId) -> JobDetail:
        return self._now

    async def read_log(self, _job: JobId, *, stream: str = "stdout", attempt: int | None = None, offset: int = 0) -> LogChunk:
        known = [found for found in self._now.attempts if attempt in (None, found.number)]
        if not known:
            self._all_read()
            return LogChunk(attempt_id=None, number=0, offset=offset, data=b"", ended=False)
        found = known[-1]
        data = self._output.get(found.number, b"")[offset : offset + 4]
        ended = not data and found.state in (S.SUCCEEDED, S.FAILED)
        if not data:
            self._all_read()
        return LogChunk(attempt_id=found.id, number=found.number, offset=offset, data=data, ended=ended)


class Recorder:
    """A reporter that remembers."""

    def __init__(self) -> None:
        self.told: list[str] = []

    def begin(self, title: str, total_bytes: int | None = None) -> Phase:
        self.told.append(title)
        return self

    def end(self, outcome: str = "done") -> None:
        self.told.append(f"= {outcome}")

    def say(self, line: str) -> None: ...

    def done(self, amount: int, total_bytes: int | None = None) -> None: ...

    def note(self, text: str) -> None:
        self.told.append(f"> {text}")


async def test_phases_of_a_job_that_succeeds_at_the_second_try():
    grid: Any = ScriptedGrid(
        (detail(JobState.WAITING), {}),
        (detail(JobState.ACTIVE, attempt(1, S.LEASED)), {}),
        (detail(JobState.ACTIVE, attempt(1, S.RUNNING)), {}),
        (detail(JobState.WAITING, attempt(1, S.FAILED, reason="no beer", exit_code=3)), {}),
        (detail(JobState.ACTIVE, attempt(1, S.FAILED), attempt(2, S.RUNNING)), {2: b"hi\n"}),
        (detail(JobState.ACTIVE, attempt(1, S.FAILED), attempt(2, S.SUSPENDED)), {}),
        (detail(JobState.COMPLETED, attempt(1, S.FAILED), attempt(2, S.SUCCEEDED)), {}),
    )
    recorder = Recorder()
    end = await follow.follow_job(grid, JOB, recorder)
    assert end.job.state is JobState.COMPLETED
    assert recorder.told == [
        "wait for a worker",
        "download and prepare on pc-1",
        "boot on pc-1",
        "= failed, exit code 3, no beer",
        "wait for a worker",
        "boot on pc-2",
        "run on pc-2",
        "> hi",
        "suspended by the owner of pc-2",
        "= done",
    ]


async def test_an_error_while_following_is_raised_and_leaves_no_task():
    class Gone(ScriptedGrid):
        async def read_log(self, *_: Any, **__: Any) -> LogChunk:
            raise Unreachable("gone")

    grid: Any = Gone(*[(detail(JobState.ACTIVE, attempt(1, S.RUNNING)), {})] * 5)
    with pytest.raises(ExceptionGroup) as raised:
        await follow.follow_job(grid, JOB, Recorder())
    assert raised.group_contains(Unreachable)
    assert len(asyncio.all_tasks()) == 1


async def read(grid: Any, **options: Any) -> list[tuple[int, bytes]]:
    found = follow.stream_log(grid, JOB, **{"stream": "stdout", "attempt": None, "follow": True, **options})
    return [(chunk.number, chunk.data) async for chunk in found]


def two_attempts() -> Any:
    return ScriptedGrid(
        (detail(JobState.ACTIVE, attempt(1, S.RUNNING)), {1: b"first\n"}),
        (detail(JobState.WAITING, attempt(1, S.FAILED)), {1: b"more\n"}),
        (detail(JobState.ACTIVE, attempt(1, S.FAILED), attempt(2, S.RUNNING)), {2: b"second\n"}),
        (detail(JobState.COMPLETED, attempt(1, S.FAILED), attempt(2, S.SUCCEEDED)), {}),
    )


async def test_following_output_goes_on_through_later_attempts():
    pieces = await read(two_attempts())
    assert b"".join(data for number, data in pieces if number == 1) == b"first\nmore\n"
    assert b"".join(data for number, data in pieces if number == 2) == b"second\n"


async def test_following_one_attempt_ends_with_it():
    pieces = await read(two_attempts(), attempt=1)
    assert b"".join(data for _, data in pieces) == b"first\nmore\n"


async def test_output_so_far_does_not_wait():
    grid = two_attempts()
    grid.step()
    assert b"".join(data for _, data in await read(grid, follow=False)) == b"first\n"


async def test_following_a_job_that_never_started_ends_when_it_is_cancelled():
    grid: Any = ScriptedGrid((detail(JobState.WAITING), {}), (detail(JobState.CANCELLED), {}))
    assert await read(grid) == []
