"""The results of an array: many small downloads side by side, into a folder a job, which go on where they stopped."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import msgspec
from msgspec import Struct

from deskgrid.errors import Conflict, DeskgridError, InvalidInput, NotFound
from deskgrid.model.ids import ArrayId
from deskgrid.model.jobs import ArrayState, Job, JobState

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["VALUES", "ArrayResults", "fetch_results"]

VALUES = "values.jsonl"
"""What jobs answered: an object a line, with index, job, parameters and value; in no order."""
_AT_ONCE = 4
_LONGEST_NAME = 100


class ArrayResults(Struct, frozen=True, kw_only=True):
    """What became of the results of an array's jobs."""

    fetched: int
    there: int
    """In the folder already."""
    without: int
    """Jobs that have ended without files, or whose files are not kept any more."""
    values: int
    """Written to values.jsonl."""


async def fetch_results(
    grid: Grid,
    array_id: ArrayId,
    folder: Path,
    *,
    failed_too: bool = False,
    by: str = "",
    progress: Callable[[int, int], None] | None = None,
) -> ArrayResults:
    """Fetch what there is of an array's results. See Grid.array_results.

    Raise Conflict while the array is being made, InvalidInput if it has no column `by`. If a result cannot be fetched the others that were
    begun are completed before the error is raised, so that the next call has less to do.
    """
    array = await grid.array(array_id)
    if array.state is ArrayState.FILLING:
        raise Conflict(f"array-{array_id} is being made", hint=f"deskgrid array wait {array_id}")
    states = (JobState.COMPLETED, JobState.FAILED) if failed_too else (JobState.COMPLETED,)
    name_of = await _names(grid, array_id, by) if by else _by_index
    folder.mkdir(parents=True, exist_ok=True)
    work = _Fetching(grid, folder, name_of, sum(array.jobs.get(state, 0) for state in states), progress)
    return await work.run(_jobs(grid, array_id, states))


async def _jobs(grid: Grid, array_id: ArrayId, states: tuple[JobState, ...]) -> AsyncIterator[Job]:
    for state in states:
        async for job in grid.jobs_of(array_id, state=state):
            yield job


class _Fetching:
    """One call of fetch_results."""

    def __init__(
        self, grid: Grid, folder: Path, name_of: Callable[[Job], str], total: int, progress: Callable[[int, int], None] | None
    ) -> None:
        self._grid, self._folder, self._name_of, self._total, self._progress = grid, folder, name_of, total, progress
        self._places = asyncio.Semaphore(_AT_ONCE)
        self._fetched = self._there = self._without = self._values = 0
        self._error: DeskgridError | None = None

    async def run(self, jobs: AsyncIterator[Job]) -> ArrayResults:
        partial = self._folder / f"{VALUES}.part"
        try:
            with partial.open("wb") as values:
                await self._fetch_all(jobs, values)
            if self._error is not None:
                raise self._error
            if self._values:
                partial.replace(self._folder / VALUES)
        finally:
            partial.unlink(missing_ok=True)
        return ArrayResults(fetched=self._fetched, there=self._there, without=self._without, values=self._values)

    async def _fetch_all(self, jobs: AsyncIterator[Job], values: IO[bytes]) -> None:
        async with asyncio.TaskGroup() as tasks:
            async for job in jobs:
                self._keep_value(values, job)
                place = self._folder / self._name_of(job)
                if job.result is None:
                    self._without += 1
                elif place.exists():
                    self._there += 1
                else:
                    await self._places.acquire()  # so that a million jobs are not a million tasks
                    tasks.create_task(self._fetch(job, place))
                if self._error is not None:
                    return
                self._tell()

    def _keep_value(self, values: IO[bytes], job: Job) -> None:
        if job.value is not None:
            line = {"index": job.index, "job": job.id, "parameters": job.parameters, "value": _read_value(job.value)}
            values.write(msgspec.json.encode(line) + b"\n")
            self._values += 1

    async def _fetch(self, job: Job, place: Path) -> None:
        try:
            await self._grid.results_of(job, place)
            self._fetched += 1
        except NotFound:  # its time to be kept ended meanwhile
            self._without += 1
        except DeskgridError as error:
            self._error = self._error or error
        finally:
            self._places.release()
        self._tell()

    def _tell(self) -> None:
        if self._progress:
            self._progress(self._fetched + self._there + self._without, self._total)


def _read_value(value: bytes) -> Any:
    try:
        return msgspec.json.decode(value)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return value.decode(errors="replace")


# ---- names of folders


def _by_index(job: Job) -> str:
    return str(job.index)


async def _names(grid: Grid, array_id: ArrayId, column: str) -> Callable[[Job], str]:
    """Return what names a job by its value in a column, with the index behind it if that alone would not tell all jobs apart.

    All jobs are asked for, ended or not, so that a later call gives the same names.
    """
    seen = {VALUES, f"{VALUES}.part"}
    unique = True
    async for job in grid.jobs_of(array_id):
        if column not in job.parameters:
            hint = f"one of {', '.join(job.parameters)[:200]}" if job.parameters else "it has no table"
            raise InvalidInput(f"array-{array_id} has no column {column[:40]!r}", where="by", hint=hint)
        name = _safe(job.parameters[column]).casefold()  # some file systems take A and a for the same
        unique = unique and name not in seen
        seen.add(name)
    if unique:
        return lambda job: _safe(job.parameters[column])
    return lambda job: f"{_safe(job.parameters[column])}-{job.index}"


def _safe(value: str) -> str:
    """Return a value as the name of one folder, wherever it comes from."""
    name = "".join(one if one.isascii() and (one.isalnum() or one in "_.+=-") else "_" for one in value[:_LONGEST_NAME])
    return "_" + name[1:] if name.startswith((".", "-")) else name or "_"
