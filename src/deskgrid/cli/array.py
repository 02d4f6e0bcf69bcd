"""deskgrid array: many jobs of one file."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from deskgrid.cli.connection import connected
from deskgrid.cli.counts import Count, counting
from deskgrid.cli.output import NO_NEGATIVES, Json, age, print_json, print_lines, print_table, warn
from deskgrid.errors import InvalidInput
from deskgrid.model.ids import ArrayId
from deskgrid.model.jobs import Array, ArrayState, JobState

if TYPE_CHECKING:
    from deskgrid.client.arrays import ArrayResults
    from deskgrid.client.grid import Grid

__all__ = ["app", "array_number", "array_summary", "exit_code", "fetch_results", "follow_array", "tell_filling"]

app = App(default_parameter=NO_NEGATIVES, name="array", help="Follow arrays: many jobs of one file (deskgrid job submit).")
_FINAL = (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED)

ArrayName = Annotated[str, Parameter(help="Number of the array, as in 7 or array-7.")]
OutputFolder = Annotated[
    Path | None, Parameter(name=["--output", "-o"], help="Folder for the results, one folder a job; ./results-array-N by default.")
]


def array_number(name: str) -> ArrayId:
    """Return the number in `7` or `array-7`. Raise InvalidInput."""
    number = name.removeprefix("array-")
    if not (number.isascii() and number.isdecimal()) or len(number) > 18:
        raise InvalidInput(f"{name[:40]!r} is not an array", hint="as in 7 or array-7; deskgrid array list shows them")
    return ArrayId(int(number))


def array_summary(array: Array) -> str:
    """Return how an array stands, in one line."""
    counts = ", ".join(f"{number:,} {state.value}" for state, number in array.jobs.items() if number)
    message = f": {array.message}" if array.message else ""
    return f"array-{array.id} {array.state.value}, {array.count:,} jobs ({counts or 'none yet'}){message}"


def exit_code(array: Array) -> int:
    """Return 0 if all jobs of an array completed, else 1."""
    return 0 if array.jobs.get(JobState.COMPLETED) == array.count else 1


async def tell_filling(grid: Grid, array: Array, *, json: bool) -> Array:
    """Show how the jobs of an array are made, until they are; return how it stands then."""
    try:
        with counting("make the jobs", json) as count:
            async for found in grid.array_changes(array.id):
                count.show(sum(found.jobs.values()), found.count)
                array = found
                if found.state is not ArrayState.FILLING:
                    break
    except BaseException:
        warn(f"array-{array.id} goes on: deskgrid array wait {array.id}, or deskgrid array cancel {array.id}")
        raise
    return array


async def follow_array(grid: Grid, array_id: ArrayId, *, json: bool) -> Array:
    """Show how an array comes along until it has ended."""
    with counting(f"run the jobs of array-{array_id}", json) as count:
        async for array in grid.array_changes(array_id):
            _show(count, array)
    return array


def _show(count: Count, array: Array) -> None:
    running, failed = array.jobs.get(JobState.ACTIVE, 0), array.jobs.get(JobState.FAILED, 0)
    note = f"{running:,} running" + (f", {failed:,} failed" if failed else "")
    if array.state in (ArrayState.FILLING, ArrayState.BLOCKED):
        note = "being made" if array.state is ArrayState.FILLING else "comes after jobs that have not ended"
    count.show(sum(array.jobs.get(state, 0) for state in _FINAL), array.count, note)


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
    numbers = [array_number(array) for array in arrays]
    async with connected() as grid:
        found = [await follow_array(grid, number, json=json) for number in numbers]
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
    numbers = [array_number(array) for array in arrays]
    async with connected() as grid:
        found = [await grid.cancel_array(number) for number in numbers]
    if json:
        print_json(found)
    else:
        print_lines(*(array_summary(one) for one in found))


@app.command
async def remove(*arrays: ArrayName, json: Json = False) -> None:
    """Remove arrays that have ended, with all their jobs and results.

    For example:

        deskgrid array remove 7
    """
    if not arrays:
        raise InvalidInput("no array is named", hint="as in deskgrid array remove 7")
    numbers = [array_number(array) for array in arrays]
    async with connected() as grid:
        for number in numbers:
            await grid.remove_array(number)
    if json:
        print_json({"removed": numbers})
    else:
        print_lines(*(f"removed array-{number}" for number in numbers))


@app.command
async def results(
    array: ArrayName,
    /,
    *,
    output: OutputFolder = None,
    failed_too: Annotated[bool, Parameter(show_default=False)] = False,
    by: str = "",
    json: Json = False,
) -> None:
    """Fetch the results of an array's jobs, each into a folder of its own. What is there already is left alone, so that it can be done again.

    What jobs answered with a value goes to values.jsonl.

    For example:

        deskgrid array results 7
        deskgrid array results 7 -o out --by alpha
        deskgrid array results 7 --failed-too

    Parameters
    ----------
    failed_too
        Also what failed jobs left.
    by
        Name the folders by this column of the table, not by index; with the index behind it if values are not all different.
    """
    array_id = array_number(array)
    folder = output or Path(f"results-array-{array_id}")
    async with connected() as grid:
        fetched = await fetch_results(grid, array_id, folder, failed_too=failed_too, by=by, json=json)
    if json:
        print_json({"array": array_id, "folder": str(folder), "results": fetched})
    else:
        print_lines(str(folder))


async def fetch_results(
    grid: Grid, array_id: ArrayId, folder: Path, *, failed_too: bool = False, by: str = "", json: bool
) -> ArrayResults:
    """Fetch the results of an array into folders, showing how many are there."""
    with counting("fetch the results", json) as count:
        found = await grid.array_results(array_id, folder, failed_too=failed_too, by=by, progress=count.show)
    if found.without and found.without != found.values and not json:
        warn(f"{found.without - found.values:,} jobs have no result that could be fetched")
    return found
