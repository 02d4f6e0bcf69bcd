"""deskgrid set: several jobs of one file that belong together."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from deskgrid.cli.array import array_summary, exit_code, fetch_results
from deskgrid.cli.connection import connected
from deskgrid.cli.output import NO_NEGATIVES, Json, age, clean, make_reporter, print_json, print_lines, print_table, warn
from deskgrid.cli.submission import submit_set
from deskgrid.client.jobfile_set import read_set
from deskgrid.errors import InvalidInput
from deskgrid.model.ids import SetId
from deskgrid.model.jobs import JobState
from deskgrid.model.wire import JobSet, MemberState

if TYPE_CHECKING:
    from rich.table import Table as RichTable

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
    if not (number.isascii() and number.isdecimal()) or len(number) > 18:
        raise InvalidInput(f"{name[:40]!r} is not a set", hint="as in 3 or set-3; deskgrid set list shows them")
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


_COLUMNS = ("member", "is", "state")


def print_set(found: JobSet) -> None:
    """Print a set with its members."""
    print_lines(_title(found))
    print_table(_COLUMNS, [_stands(member) for member in found.members], empty="no members")


def _title(found: JobSet) -> str:
    waits = f", waits for {found.waits_for}" if found.waits_for else ""
    return f"set-{found.id} {found.name}, of {found.owner}, submitted {age(found.created_at)}{waits}"


async def follow_set(grid: Grid, set_id: SetId, *, json: bool) -> JobSet:
    """Show how the members of a set come along until all of it has ended: a table on a terminal, what changes elsewhere."""
    with _watching(json) as show:
        async for found in grid.set_changes(set_id):
            show(found)
    return found


@contextmanager
def _watching(json: bool) -> Iterator[Callable[[JobSet], None]]:
    if json:
        yield lambda found: None
    elif not sys.stderr.isatty():
        yield _Changes().tell
    else:
        from rich.console import Console
        from rich.live import Live

        with Live(console=Console(stderr=True), auto_refresh=False) as live:
            yield lambda found: live.update(_drawn(found), refresh=True)


class _Changes:
    """Tells what changes, a line each."""

    def __init__(self) -> None:
        self._told: dict[str, str] = {}

    def tell(self, found: JobSet) -> None:
        waits = f"waits for {found.waits_for}" if found.waits_for else ""
        for name, state in (("the set", waits), *((name, state) for name, _, state in map(_stands, found.members))):
            if self._told.get(name, "") != state:
                self._told[name] = state
                warn(f"{name}: {state or 'goes on'}")


def _drawn(found: JobSet) -> RichTable:
    from rich.box import SIMPLE_HEAD
    from rich.table import Table
    from rich.text import Text

    table = Table(
        *_COLUMNS, title=Text(clean(_title(found))), title_justify="left", box=SIMPLE_HEAD, header_style="bold", pad_edge=False
    )
    for member in found.members:
        table.add_row(*(Text(clean(cell)) for cell in _stands(member)))  # Text: brackets in a name are no markup
    return table


@app.command
async def submit(
    spec: Annotated[Path, Parameter(help="File with [job.NAME] for each job of the set.")], /, *, json: Json = False
) -> None:
    """Submit the jobs of a file together, all or none, and print the set's number, as in set-3.

    For example:

        deskgrid set submit service.toml
    """
    wanted = read_set(spec)
    async with connected() as grid:
        submitted = await submit_set(grid, wanted, json=json)
    if json:
        print_json(submitted)
    else:
        print_lines(f"set-{submitted.id}")


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
        found = await follow_set(grid, set_number(number), json=json)
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
        await fetch_set(grid, await grid.job_set(set_id), folder, json=json)
    if json:
        print_json({"set": set_id, "folder": str(folder)})
    else:
        print_lines(str(folder))


async def fetch_set(grid: Grid, found: JobSet, folder: Path, *, json: bool) -> None:
    """Fetch what there is of results of a set, each member's into its own folder; what is there already is left alone."""
    folder.mkdir(parents=True, exist_ok=True)
    for member in found.members:
        place = folder / member.name
        if member.array is not None:
            await fetch_results(grid, member.array.id, place, json=json)
        elif member.job is not None and member.job.result is not None and not place.exists():
            with make_reporter(json) as reporter:
                phase = reporter.begin(f"fetch the result of {member.name}", member.job.result_bytes)
                await grid.results_of(member.job, place, phase.done)
