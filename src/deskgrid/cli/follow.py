"""Watching one job: its phases as progress, its output as it comes."""

from __future__ import annotations

import asyncio
import codecs
from collections.abc import AsyncIterator
from typing import TYPE_CHECKING

from deskgrid.cli.output import Phase, Reporter
from deskgrid.core.lifecycle import FINAL_JOB_STATES, LIVE_STATES
from deskgrid.model.jobs import Attempt, AttemptState, JobState
from deskgrid.model.wire import JobDetail, LogChunk

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid
    from deskgrid.model.ids import JobId

__all__ = ["attempt_summary", "follow_job", "stream_log"]

_LOOK_S = 0.5
"""Between looks for new output. The server tells changes of state at once, but not output."""

_TITLES = {
    AttemptState.LEASED: "download and prepare on {worker}",
    AttemptState.RUNNING: "boot on {worker}",
    AttemptState.SUSPENDED: "suspended by the owner of {worker}",
}
_RUNNING_TITLE = "run on {worker}"


async def follow_job(grid: Grid, job_id: JobId, reporter: Reporter) -> JobDetail:
    """Show a job's phases (wait, prepare, boot, run) until it is final; return how it ended."""
    follower = _Follower(reporter)
    async with asyncio.TaskGroup() as tasks:
        tail = tasks.create_task(_watch_output(grid, job_id, follower))
        async for detail in grid.changes(job_id):
            follower.show(detail)
        tail.cancel()
    return detail


class _Follower:
    """What is shown of a job: begins a phase whenever what is being waited for has another name."""

    def __init__(self, reporter: Reporter) -> None:
        self._reporter = reporter
        self._title = ""
        self._phase: Phase | None = None
        self._attempt: Attempt | None = None
        self._speaking: set[int] = set()

    @property
    def live(self) -> Attempt | None:
        """The attempt whose output is worth reading."""
        return self._attempt

    def show(self, detail: JobDetail) -> None:
        before, self._attempt = self._attempt, _newest_live(detail)
        ended = next((a for a in detail.attempts if before and a.id == before.id and a.state not in LIVE_STATES), None)
        if ended is not None and ended.state is not AttemptState.SUCCEEDED:
            self._reporter.end(attempt_summary(ended))
            self._title = ""
        if detail.job.state in FINAL_JOB_STATES:
            self._reporter.end()
        else:
            self._begin(_title(self._attempt, self._speaking))

    def said(self, number: int, line: str) -> None:
        """Show a line of output; the first one means that the machine has booted."""
        self._speaking.add(number)
        if self._attempt is not None and self._attempt.number == number:
            self._begin(_title(self._attempt, self._speaking))
            if self._phase is not None:
                self._phase.note(line)

    def _begin(self, title: str) -> None:
        if title != self._title:
            self._title = title
            self._phase = self._reporter.begin(title)


def _newest_live(detail: JobDetail) -> Attempt | None:
    live = [attempt for attempt in detail.attempts if attempt.state in LIVE_STATES]
    return live[-1] if live else None


def _title(attempt: Attempt | None, speaking: set[int]) -> str:
    if attempt is None:
        return "wait for a worker"
    running = attempt.state is AttemptState.RUNNING and attempt.number in speaking
    return (_RUNNING_TITLE if running else _TITLES[attempt.state]).format(worker=attempt.worker)


def attempt_summary(attempt: Attempt) -> str:
    """Return how an attempt ended, in one line."""
    parts = [attempt.state.value]
    if attempt.exit_code is not None:
        parts.append(f"exit code {attempt.exit_code}")
    if attempt.reason:
        parts.append(attempt.reason)
    return ", ".join(parts)


async def _watch_output(grid: Grid, job_id: JobId, follower: _Follower) -> None:
    """Read the live attempt's stdout and pass its last line on."""
    number, offset = 0, 0
    while True:
        attempt = follower.live
        if attempt is not None and attempt.state is AttemptState.RUNNING:
            number, offset = (number, offset) if attempt.number == number else (attempt.number, 0)
            chunk = await grid.read_log(job_id, attempt=number, offset=offset)
            offset = chunk.offset + len(chunk.data)
            lines = chunk.data.decode(errors="replace").split("\n")
            last = next((line for line in reversed(lines) if line.strip()), "")
            if last:
                follower.said(number, last)
        await asyncio.sleep(_LOOK_S)


async def stream_log(grid: Grid, job_id: JobId, *, stream: str, attempt: int | None, follow: bool) -> AsyncIterator[LogChunk]:
    """Yield the output of an attempt, the newest by default. With `follow`, until it ends; without an attempt named, until
    the job is final, through all attempts to come."""
    number, offset = attempt, 0
    while True:
        chunk = await grid.read_log(job_id, stream=stream, attempt=number, offset=offset)
        if chunk.attempt_id is not None:
            number, offset = chunk.number, chunk.offset + len(chunk.data)
        if chunk.data:
            yield chunk
            continue
        if not follow or (chunk.ended and attempt is not None):
            return
        detail = await grid.job(job_id)
        if chunk.ended:
            later = [known.number for known in detail.attempts if known.number > (number or 0)]
            if later:
                number, offset = later[0], 0
                continue
        if detail.job.state in FINAL_JOB_STATES and (chunk.ended or chunk.attempt_id is None):
            return
        await asyncio.sleep(_LOOK_S)


def decoder() -> codecs.IncrementalDecoder:
    """Return what makes text of output that is cut anywhere."""
    return codecs.getincrementaldecoder("utf-8")(errors="replace")


def job_summary(detail: JobDetail) -> str:
    """Return how a job stands, in one line."""
    job = detail.job
    code = f", exit code {job.exit_code}" if job.exit_code is not None else ""
    message = f": {job.message}" if job.message else ""
    return f"job {job.id} {'is ' if job.state in (JobState.WAITING, JobState.ACTIVE) else ''}{job.state.value}{code}{message}"
