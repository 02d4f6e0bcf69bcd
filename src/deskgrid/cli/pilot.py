"""deskgrid pilot: workers in virtual machines of the grid and on other systems, for jobs that no worker could take otherwise."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from deskgrid.cli.connection import connected
from deskgrid.cli.output import NO_NEGATIVES, Json, age, make_reporter, print_json, print_lines, print_table
from deskgrid.cli.user import lifetime_of
from deskgrid.errors import Conflict, InvalidInput, OperatorError
from deskgrid.files import locked
from deskgrid.units import parse_size

__all__ = ["app"]

app = App(
    default_parameter=NO_NEGATIVES,
    name="pilot",
    help="Start workers in virtual machines of the grid, for jobs that need what PCs do not have.",
)


@app.command
async def submit(
    *,
    disk: str,
    packages: Annotated[tuple[str, ...], Parameter(negative=())] = (),
    count: int = 1,
    cpus: int = 1,
    memory: str = "2GiB",
    scratch: str = "16GiB",
    lifetime: str = "4h",
    idle: str = "10m",
    accepts: Annotated[tuple[str, ...], Parameter(negative=())] = ("everyone",),
    group: str = "",
    name: str = "",
    json: Json = False,
) -> None:
    """Submit pilots: each boots a disk with deskgrid in it on a PC of the grid, and is a worker there that runs jobs as processes.

    It gets the jobs that you may see: your own, and those done for your groups. Secrets of jobs go to it only if the owner of the PC is trusted with them.

    For example:

        deskgrid pilot submit --disk root --packages root
        deskgrid pilot submit --disk root --packages root --count 5 --lifetime 8h --accepts mine

    Parameters
    ----------
    disk
        A disk with deskgrid in it: of the templates worker or root, or of a recipe that begins with one.
    packages
        What is installed on it, for jobs that need it.
    count
        How many.
    cpus
        CPUs of each; its jobs share them.
    memory
        Memory of each. Some 400 MiB are for its system.
    scratch
        Disk of each.
    lifetime
        For how long it works; then jobs that still run go back.
    idle
        For how long it waits while there are no jobs.
    accepts
        Of the jobs that you may see, whose: mine, group:NAME, user:NAME or everyone.
    group
        Group that they are done for: its share of the grid counts for their own time; that of their jobs is charged to who submitted these.
    name
        By default pilot-DISK.
    """
    from deskgrid.client.pilots import Pilot

    pilot = Pilot(
        disk=disk,
        name=name or f"pilot-{disk}",
        packages=packages,
        accepts=accepts,
        group=group,
        cpus=cpus,
        memory_bytes=parse_size(memory),
        scratch_bytes=parse_size(scratch),
        lifetime_s=lifetime_of(lifetime),
        idle_s=lifetime_of(idle, "--idle"),
    )
    jobs = []
    async with connected() as grid:
        for _ in range(count):
            jobs.append(await grid.submit_pilot(pilot))
            if not json:
                print_lines(f"job {jobs[-1].id}")
    if json:
        print_json(jobs)


@app.command
async def link(*, lifetime: str = "4h", within: str = "1d", count: int = 1, json: Json = False) -> None:
    """Print a link by which a pilot of yours joins from another system, such as a batch job: `deskgrid worker run --once --join FILE`.

    For example:

        deskgrid pilot link --lifetime 8h

    Parameters
    ----------
    lifetime
        For how long it may work; then the grid knows it no more.
    within
        How long the link may be used.
    count
        How many may use it.
    """
    pilot_s, lifetime_s = lifetime_of(lifetime), lifetime_of(within, "--within")
    async with connected() as grid:
        made = await grid.pilot_link(pilot_s=pilot_s, lifetime_s=lifetime_s, uses=count)
    if json:
        print_json({"link": str(made), "uses": count, "lifetime_s": pilot_s})
    else:
        print_lines(str(made))


@app.command
async def program(
    *,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("deskgrid.pyz"),
    python: str = "3.11",
    json: Json = False,
) -> None:
    """Write deskgrid as one file, for machines that have Python but not deskgrid: python3 deskgrid.pyz worker run ...

    For example:

        deskgrid pilot program
        deskgrid pilot program --python 3.12 --output deskgrid-3.12.pyz

    Parameters
    ----------
    output
        The file.
    python
        Version of Python there: 3.11, 3.12 or 3.13. It is for Linux on x86-64.
    """
    from deskgrid.cli.disk import cache_folder
    from deskgrid.templates.one_file import write_program

    if output.is_dir() or not output.absolute().parent.is_dir():
        raise InvalidInput(f"{output} is no file that can be written", where="--output", hint="name a file in a folder that exists")
    with make_reporter(json) as reporter:
        reporter.begin("fetch and pack deskgrid with what it needs")
        await asyncio.to_thread(write_program, output, cache_folder() / "templates" / "debian", python=python)
    if json:
        print_json({"file": str(output), "size_bytes": output.stat().st_size})
    else:
        print_lines(str(output))


@app.command
async def factory(
    file: Path,
    /,
    *,
    home: Annotated[Path | None, Parameter(help="Folder that keeps which pilots are out; by default beside your login.")] = None,
    once: Annotated[bool, Parameter(show_default=False, negative=())] = False,
    stop: Annotated[bool, Parameter(show_default=False, negative=())] = False,
    verbose: Annotated[bool, Parameter(name=["--verbose", "-v"], show_default=False, negative=())] = False,
    json: Json = False,
) -> None:
    """Send pilots while jobs wait that no worker could run, on the systems that a file names, until Ctrl-C or SIGTERM. Logs go to stderr.

    Which are out is kept: started again, it goes on.

    For example:

        deskgrid pilot factory factory.toml
        deskgrid pilot factory factory.toml --stop        to call back all that are out

    Parameters
    ----------
    file
        The systems: [[system]] parts with kind = "grid", "slurm", "htcondor", "ssh" or "command".
    once
        Look once, and end.
    stop
        Send none, call back all that are out, and end.
    """
    import random

    from deskgrid.cli.logs import configure_logs
    from deskgrid.clock import SystemClock
    from deskgrid.pilots.factory import Factory
    from deskgrid.pilots.file import make_system, read_factory
    from deskgrid.settings import client_home
    from deskgrid.units import parse_duration

    configure_logs(json=json, verbose=verbose)
    wanted, folder = read_factory(file), home or client_home() / "factory"
    async with connected() as grid:
        systems = [make_system(part, grid) for part in wanted.system]
        with _alone(folder):
            made = Factory(grid, systems, folder, clock=SystemClock(), rng=random.Random())  # noqa: S311 - jitter
            if stop:
                await made.call_all_back()
                if made.out:
                    raise OperatorError(
                        f"{len(made.out)} pilots are not called back: {', '.join(made.out)}", hint="try again later"
                    )
            elif once:
                await made.look()
            else:
                await made.run(parse_duration(wanted.poll))


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Be the only factory with a folder. Raise Conflict if another one runs."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(folder / "lock", wait=False))
        except OSError as error:
            raise Conflict(f"a factory runs with {folder}", hint="use another --home") from error
        yield


@app.command(name="list")
async def list_(*, json: Json = False) -> None:
    """List the pilots that have joined.

    For example:

        deskgrid pilot list
    """
    async with connected() as grid:
        pilots = [one for one in await grid.workers() if one.pilot_of]
    if json:
        print_json(pilots)
        return
    rows = [
        (
            one.id,
            one.name,
            one.pilot_of,
            f"job-{one.pilot_job_id}" if one.pilot_job_id is not None else "elsewhere",
            one.state.value,
            age(one.seen_at or None),
            one.running,
            ", ".join(one.profile.packages) if one.profile is not None else "-",
        )
        for one in pilots
    ]
    print_table(("worker", "name", "of", "in", "state", "seen", "running", "packages"), rows, empty="no pilots")
