"""deskgrid set: several jobs of one file that belong together."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from deskgrid.cli.array import array_summary, exit_code, fetch_results
from deskgrid.cli.connection import connected
from deskgrid.cli.output import NO_NEGATIVES, Json, Reporter, age, make_reporter, print_json, print_lines, print_table, warn
from deskgrid.errors import InvalidInput
from deskgrid.model.ids import SetId
from deskgrid.model.jobs import JobState
from deskgrid.model.wire import JobSet, MemberState

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["app", "fetch_set", "follow_set", "print_set", "set_code"]

app = App(default_parameter=NO_NEGATIVES, name="set", help="Follow sets: several jobs of one file (deskgrid job submit).")

SetName = Annotated[str, Parameter(help="Number of the set, as in 3 or set-3.")]
OutputFolder = Annotated[
    Path | None, Parameter(name=["--output", "-o"], help="Folder for the results, one folder a member; ./results-set-N by default.")
]


def set_number(name: str) -> SetId:
    """Return the number in `3` or `set-3`. Raise InvalidInput."""
    number = name.removeprefix("set-")
    if not number.isdecimal() or len(number) > 18:
        raise InvalidInput(f"{name!r} is not a set", hint="as in 3 or set-3; deskgrid set list shows them")
    return SetId(int(number))


def set_code(found: JobSet) -> int:
    """Return 0 if all jobs of a set completed, else 1."""
    return max(_code(member) for member in found.members)


def _code(member: MemberState) -> int:
    if member.array is not None:
        return exit_code(member.array)
    return 0 if member.job is not None and member.job.state is JobState.COMPLETED else 1


def _stands(member: MemberState) -> tuple[str, str, str]:
    if member.array is not None:
        return member.name, f"array-{member.array.id}", array_summary(member.array).partition(" ")[2]
    if member.job is None:
        return member.name, "-", "-"
    message = f": {member.job.message}" if member.job.message else ""
    return member.name, f"job-{member.job.id}", f"{member.job.state.value}{message}"


def print_set(found: JobSet) -> None:
    """Print a set with its members."""
    waits = f", waits for {found.waits_for}" if found.waits_for else ""
    print_lines(f"set-{found.id} {found.name}, of {found.owner}, submitted {age(found.created_at)}{waits}")
    print_table(("member", "is", "state"), [_stands(member) for member in found.members], empty="no members")


async def follow_set(grid: Grid, set_id: SetId, reporter: Reporter) -> JobSet:
    """Tell what changes in a set until all of it has ended."""
    told: dict[str, str] = {}
    phase = reporter.begin("run the set")
    async for found in grid.set_changes(set_id):
        phase.note(f"waits for {found.waits_for}" if found.waits_for else "")
        for name, _, state in map(_stands, found.members):
            if told.get(name) != state:
                told[name] = state
                reporter.say(f"{name}: {state}")
    reporter.end()
    return found


@app.command(name="list")
async def list_(*, everyone: bool = False, limit: int = 100, before: int | None = None, json: Json = False) -> None:
    """List sets, newest first.

    For example:

        deskgrid set list

    Parameters
    ----------
    everyone
        Also the sets of others (admins).
    limit
        At most so many.
    before
        Only sets with a smaller number: the next page.
    """
    async with connected() as grid:
        found = await grid.sets(everyone=everyone, limit=limit, before=SetId(before) if before else None)
    if json:
        print_json(found.sets)
        return
    rows = [(one.id, one.name, one.owner, len(one.members), one.waits_for, age(one.created_at)) for one in found.sets]
    print_table(("set", "name", "owner", "members", "waits for", "submitted"), rows, empty="no sets")
    if found.more:
        warn(f"there are older ones: deskgrid set list --before {found.sets[-1].id}")


@app.command
async def show(number: SetName, /, *, json: Json = False) -> None:
    """Show a set with its members.

    For example:

        deskgrid set show 3
    """
    async with connected() as grid:
        found = await grid.job_set(set_number(number))
    if json:
        print_json(found)
    else:
        print_set(found)


@app.command
async def wait(number: SetName, /, *, json: Json = False) -> int:
    """Wait until all of a set has ended, telling what changes; the exit code is 0 if all completed.

    For example:

        deskgrid set wait 3
    """
    async with connected() as grid:
        with make_reporter(json) as reporter:
            found = await follow_set(grid, set_number(number), reporter)
    if json:
        print_json(found)
    else:
        print_set(found)
    return set_code(found)


@app.command
async def cancel(number: SetName, /, *, json: Json = False) -> None:
    """Cancel all that has not ended of a set.

    For example:

        deskgrid set cancel 3
    """
    async with connected() as grid:
        found = await grid.cancel_set(set_number(number))
    if json:
        print_json(found)
    else:
        print_set(found)


@app.command
async def results(number: SetName, /, *, output: OutputFolder = None, json: Json = False) -> None:
    """Fetch the results of a set's jobs, each into a folder named by its member.

    For example:

        deskgrid set results 3
    """
    set_id = set_number(number)
    folder = output or Path(f"results-set-{set_id}")
    async with connected() as grid:
        with make_reporter(json) as reporter:
            await fetch_set(grid, await grid.job_set(set_id), folder, reporter)
    if json:
        print_json({"set": set_id, "folder": str(folder)})
    else:
        print_lines(str(folder))


async def fetch_set(grid: Grid, found: JobSet, folder: Path, reporter: Reporter) -> None:
    """Fetch what there is of results of a set, each member's into its own folder; what is there already is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for member in found.members:
        place = folder / member.name
        if member.array is not None:
            await fetch_results(grid, member.array.id, place, reporter)
        elif member.job is not None and member.job.result is not None and not place.exists():
            phase = reporter.begin(f"fetch the result of {member.name}", member.job.result_bytes)
            await grid.results(member.job.id, place, phase.done)
    reporter.end()
