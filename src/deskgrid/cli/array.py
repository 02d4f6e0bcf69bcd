"""deskgrid array: many jobs of one file."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from deskgrid.cli.connection import connected
from deskgrid.cli.output import NO_NEGATIVES, Json, Reporter, age, make_reporter, print_json, print_lines, print_table, warn
from deskgrid.errors import InvalidInput
from deskgrid.model.ids import ArrayId
from deskgrid.model.jobs import Array, ArrayState, Job, JobState

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["app", "array_number", "array_summary", "exit_code", "fetch_results", "follow_array"]

app = App(default_parameter=NO_NEGATIVES, name="array", help="Follow arrays: many jobs of one file (deskgrid job submit).")
_AT_ONCE = 4
"""Results that are fetched at the same time."""

ArrayName = Annotated[str, Parameter(help="Number of the array, as in 7 or array-7.")]
OutputFolder = Annotated[
    Path | None, Parameter(name=["--output", "-o"], help="Folder for the results, one folder a job; ./results-array-N by default.")
]


def array_number(name: str) -> ArrayId:
    """Return the number in `7` or `array-7`. Raise InvalidInput."""
    number = name.removeprefix("array-")
    if not number.isdecimal() or len(number) > 18:
        raise InvalidInput(f"{name!r} is not an array", hint="as in 7 or array-7; deskgrid array list shows them")
    return ArrayId(int(number))


def array_summary(array: Array) -> str:
    """Return how an array stands, in one line."""
    counts = ", ".join(f"{number:,} {state.value}" for state, number in array.jobs.items() if number)
    message = f": {array.message}" if array.message else ""
    return f"array-{array.id} {array.state.value}, {array.count:,} jobs ({counts or 'none yet'}){message}"


def exit_code(array: Array) -> int:
    """Return 0 if all jobs of an array completed, else 1."""
    return 0 if array.jobs.get(JobState.COMPLETED) == array.count else 1


async def follow_array(grid: Grid, array_id: ArrayId, reporter: Reporter) -> Array:
    """Show how an array comes along until it has ended."""
    phase, title = None, ""
    async for array in grid.array_changes(array_id):
        over = sum(array.jobs.get(state, 0) for state in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED))
        wanted = "make the jobs" if array.state is ArrayState.FILLING else "run the jobs"
        if wanted != title:
            title, phase = wanted, reporter.begin(wanted)
        done = sum(array.jobs.values()) if array.state is ArrayState.FILLING else over
        if phase is not None:
            phase.note(f"{done:,} of {array.count:,}, {array.jobs.get(JobState.ACTIVE, 0):,} running")
    reporter.end()
    return array


@app.command(name="list")
async def list_(*, everyone: bool = False, limit: int = 100, before: int | None = None, json: Json = False) -> None:
    """List arrays, newest first.

    For example:

        deskgrid array list
        deskgrid array list --limit 5 --json

    Parameters
    ----------
    everyone
        Also the arrays of others (admins).
    limit
        At most so many.
    before
        Only arrays with a smaller number: the next page.
    """
    async with connected() as grid:
        found = await grid.arrays(everyone=everyone, limit=limit, before=ArrayId(before) if before else None)
    if json:
        print_json(found.arrays)
        return
    columns = ("array", "name", "owner", "state", "jobs", "completed", "failed", "submitted")
    rows = [
        (one.id, one.spec.name, one.owner, one.state.value, one.count, one.jobs.get(JobState.COMPLETED, 0), one.jobs.get(JobState.FAILED, 0),
         age(one.created_at))
        for one in found.arrays
    ]  # fmt: skip
    print_table(columns, rows, empty="no arrays")
    if found.more:
        warn(f"there are older ones: deskgrid array list --before {found.arrays[-1].id}")


@app.command
async def show(array: ArrayName, /, *, json: Json = False) -> None:
    """Show how an array stands: how many of its jobs are in which state.

    For example:

        deskgrid array show 7
        deskgrid job list --array 7 --state failed
    """
    async with connected() as grid:
        found = await grid.array(array_number(array))
    if json:
        print_json(found)
    else:
        print_lines(array_summary(found))


@app.command
async def wait(*arrays: ArrayName, json: Json = False) -> int:
    """Wait until arrays have ended; the exit code is 0 if all their jobs completed.

    For example:

        deskgrid array wait 7
    """
    if not arrays:
        raise InvalidInput("no array is named", hint="as in deskgrid array wait 7")
    async with connected() as grid:
        with make_reporter(json) as reporter:
            found = [await follow_array(grid, array_number(array), reporter) for array in arrays]
    if json:
        print_json(found)
    else:
        print_lines(*(array_summary(one) for one in found))
    return max(exit_code(one) for one in found)


@app.command
async def cancel(*arrays: ArrayName, json: Json = False) -> None:
    """Cancel what has not ended of arrays: no job of them starts from now on.

    For example:

        deskgrid array cancel 7
    """
    if not arrays:
        raise InvalidInput("no array is named", hint="as in deskgrid array cancel 7")
    async with connected() as grid:
        found = [await grid.cancel_array(array_number(array)) for array in arrays]
    if json:
        print_json(found)
    else:
        print_lines(*(array_summary(one) for one in found))


@app.command
async def results(array: ArrayName, /, *, output: OutputFolder = None, json: Json = False) -> None:
    """Fetch the results of an array's jobs, each into a folder named by its index; those that are there already are left alone.

    For example:

        deskgrid array results 7
        deskgrid array results 7 -o out
    """
    array_id = array_number(array)
    folder = output or Path(f"results-array-{array_id}")
    async with connected() as grid:
        with make_reporter(json) as reporter:
            fetched = await fetch_results(grid, array_id, folder, reporter)
    if json:
        print_json({"array": array_id, "folder": str(folder), "fetched": fetched})
    else:
        print_lines(str(folder))


async def fetch_results(grid: Grid, array_id: ArrayId, folder: Path, reporter: Reporter) -> int:
    """Fetch the results of an array into folders by index; return how many were fetched."""
    phase = reporter.begin("fetch the results")
    folder.mkdir(parents=True, exist_ok=True)
    fetched, places = 0, asyncio.Semaphore(_AT_ONCE)

    async def fetch(job: Job) -> None:
        nonlocal fetched
        try:
            await grid.results(job.id, folder / str(job.index))
        finally:
            places.release()
        fetched += 1
        phase.note(f"{fetched:,}")

    async with asyncio.TaskGroup() as tasks:
        async for job in grid.jobs_of(array_id):
            if job.result is not None and not (folder / str(job.index)).exists():
                await places.acquire()  # so that a million jobs are not a million tasks
                tasks.create_task(fetch(job))
    reporter.end()
    return fetched
