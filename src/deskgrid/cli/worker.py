"""deskgrid worker: lend this PC to a grid, and look after those that are lent."""

from __future__ import annotations

import asyncio
import platform
import time
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from deskgrid.cli import worker_disk
from deskgrid.cli.connection import connected
from deskgrid.cli.logs import configure_logs
from deskgrid.cli.output import NO_NEGATIVES, Json, age, print_json, print_lines, print_table
from deskgrid.cli.user import lifetime_of, read_link
from deskgrid.cli.worker_disk import Home
from deskgrid.errors import Conflict, InvalidInput, Unreachable
from deskgrid.link import Link, make_secret, parse_link
from deskgrid.model.workers import Worker
from deskgrid.settings import WorkerSettings, load_settings, worker_home
from deskgrid.units import format_duration

__all__ = ["app", "join_worker"]

app = App(default_parameter=NO_NEGATIVES, name="worker", help="Lend this PC to a grid, and look after those that are lent.")

app.command(worker_disk.app)

LinkText = Annotated[
    str,
    Parameter(allow_leading_hyphen=True, help="The link, or - to read it from stdin (so that others on this PC do not see it)."),
]
Verbose = Annotated[bool, Parameter(name=["--verbose", "-v"], show_default=False, help="Log more.")]


def _settings(home: Path) -> WorkerSettings:
    from deskgrid.worker.owner import rules_of

    settings = load_settings(WorkerSettings, home / "worker.toml", "DESKGRID_WORKER")
    rules_of(settings)
    return settings


@app.command
async def join(link: LinkText, /, *, name: str | None = None, home: Home = None, json: Json = False) -> None:
    """Make this PC a worker of a grid, with a link from its admin.

    What you lend, and for whose jobs, is set in HOME/worker.toml: CPUs, memory, disk, `accepts`. The worker starts with `deskgrid worker run`.

    For example:

        deskgrid worker join 'deskgrid://grid.example.org:8470/join?authority=...&secret=...'
        deskgrid worker join - --name lab-7

    Parameters
    ----------
    name
        Name of this PC on the grid; by default its host name.
    """
    folder = home or worker_home()
    _settings(folder)  # a mistake in the file is told now, not after the link was used up
    file = await join_worker(folder, parse_link(read_link(link), "join"), name or platform.node() or "pc")
    if json:
        print_json({"home": str(folder), "credentials": str(file)})
        return
    print_lines(f"joined. Start it with: deskgrid worker run{f' --home {home}' if home else ''}")
    print_lines(f"What it may use is set in {folder / 'worker.toml'}")


async def join_worker(home: Path, link: Link, name: str) -> Path:
    """Join and keep the credentials; return their file. Raise Conflict if this folder is a worker already."""
    from deskgrid.client.grid import join as join_grid
    from deskgrid.client.transport import save_credentials

    file = home / "credentials.json"
    if file.exists():
        raise Conflict(f"{home} is a worker already", hint="deskgrid worker leave, or use another --home")
    save_credentials(file, await join_grid(link, name))
    return file


async def _join_first(home: Path, file: Path, name: str) -> None:
    """Join with what a file holds, a link or the token of a pilot's job, unless that was done before. Until the server answers, for a while."""
    from deskgrid.client.entering import join_as_pilot
    from deskgrid.client.grid import join as join_grid
    from deskgrid.client.transport import load_credentials, save_credentials

    kept = home / "credentials.json"
    if kept.exists():
        return
    text, token = file.read_text(encoding="utf-8"), make_secret()
    deadline = time.monotonic() + _JOIN_S
    while True:
        try:
            if text.lstrip().startswith("{"):
                found = await join_as_pilot(load_credentials(file), name, token)
            else:
                found = await join_grid(parse_link(text.strip(), "join"), name, token)
            save_credentials(kept, found)
            return
        except Unreachable:
            if time.monotonic() > deadline:
                raise
        await asyncio.sleep(_JOIN_GAP_S)


_JOIN_S, _JOIN_GAP_S = 300.0, 2.0


@app.command
async def run(
    *,
    keep: Annotated[bool, Parameter(show_default=False)] = False,
    once: Annotated[bool, Parameter(show_default=False)] = False,
    lifetime: str | None = None,
    idle: str | None = None,
    join: Path | None = None,
    name: str | None = None,
    home: Home = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Work for the grid until Ctrl-C or SIGTERM. Logs go to stderr.

    For example:

        deskgrid worker run
        deskgrid worker run --home /data/worker --verbose
        deskgrid worker run --keep          to be stopped and started again while jobs go on
        deskgrid worker run --once --join link.txt --lifetime 4h --idle 10m

    Parameters
    ----------
    keep
        When stopped, leave the machines running; the next `deskgrid worker run` takes them up.
    once
        Leave the grid at the end, however that comes: running jobs go back, nothing stays here.
    lifetime
        With --once: how long it works.
    idle
        With --once: for how long it waits for jobs while there are none.
    join
        Join first, unless that was done before, with the link in this file; or as a pilot, with the credentials.json of its job.
    name
        Name of this PC on the grid, when it joins; by default its host name.
    """
    from deskgrid.worker.agent import Term, run_worker

    configure_logs(json=json, verbose=verbose)
    if keep and once:
        raise InvalidInput("--keep and --once exclude each other", hint="deskgrid worker run --help")
    if not once and (lifetime or idle):
        raise InvalidInput("--lifetime and --idle go with --once", hint="deskgrid worker run --once --lifetime 4h")
    lives_s, idle_s = (lifetime_of(text, flag) if text else 0.0 for text, flag in ((lifetime, "--lifetime"), (idle, "--idle")))
    folder = home or worker_home()
    settings = _settings(folder)
    if join is not None:
        await _join_first(folder, join, name or platform.node() or "pc")
    await run_worker(folder, settings, keep=keep, term=Term(lifetime_s=lives_s, idle_s=idle_s) if once else None)


async def _ask(command: str, home: Path | None, json: bool) -> None:
    """Let the worker of a folder (running or not) carry out a command, and print what it answers."""
    from deskgrid.worker.control import ask

    configure_logs(json=json, verbose=False)
    answer = await ask(home or worker_home(), command)
    if json:
        print_json(answer)
    else:
        print_lines(*str(answer).splitlines())


@app.command
async def status(*, home: Home = None, json: Json = False) -> None:
    """Show what the worker on this PC is doing.

    For example:

        deskgrid worker status
        deskgrid worker status --json
    """
    await _ask("status", home, json)


@app.command
async def top(*, home: Home = None, interval: str = "2s", json: Json = False) -> None:
    """Show what the worker on this PC is doing, again and again, until Ctrl-C. With --json, an object each time.

    For example:

        deskgrid worker top

    Parameters
    ----------
    interval
        Between two looks.
    """
    from rich.live import Live

    from deskgrid.cli.worker_page import page
    from deskgrid.units import parse_duration
    from deskgrid.worker.control import ask

    configure_logs(json=json, verbose=False)
    place, pause_s = home or worker_home(), parse_duration(interval)
    if json:
        while True:
            print_json(await ask(place, "status"))
            await asyncio.sleep(pause_s)
    with Live(page(await ask(place, "status")), auto_refresh=False) as live:
        while True:
            await asyncio.sleep(pause_s)
            live.update(page(await ask(place, "status")), refresh=True)


@app.command
async def pause(*, home: Home = None, json: Json = False) -> None:
    """Stop the CPUs of all machines at once and take no new work, until resume.

    For example:

        deskgrid worker pause
    """
    await _ask("pause", home, json)


@app.command
async def resume(*, home: Home = None, json: Json = False) -> None:
    """Go on after a pause.

    For example:

        deskgrid worker resume
    """
    await _ask("resume", home, json)


@app.command
async def leave(*, home: Home = None, json: Json = False) -> None:
    """Leave the grid: work in progress goes back, the worker ends, its files are removed.

    For example:

        deskgrid worker leave
    """
    await _ask("leave", home, json)


@app.command
async def doctor(*, home: Home = None, json: Json = False) -> None:
    """Try out what this PC can run for the grid, and say why not and what would change it.

    Each kind of machine is really started, with a time limit, also those that worker.toml does not allow. Takes some seconds.

    For example:

        deskgrid worker doctor
    """
    from deskgrid.clock import SystemClock
    from deskgrid.worker.doctor import examine

    configure_logs(json=json, verbose=False)
    folder = home or worker_home()
    found = await examine(folder, _settings(folder), SystemClock())
    if json:
        print_json(found)
    else:
        print_lines(*map(str, found))


# Those that are lent

Number = Annotated[int, Parameter(help="Number of the worker, as in `deskgrid worker list`.")]


@app.command
async def link(*, uses: int = 1, lifetime: str = "7d", owner: str = "", json: Json = False) -> None:
    """Print a link by which PCs of yours join as workers. They are yours: `accepts = ["mine"]` in their settings means your jobs.

    For example:

        deskgrid worker link
        deskgrid worker link --uses 3 --lifetime 1d
        deskgrid worker link --owner ann            an admin, for a PC of ann's

    Parameters
    ----------
    uses
        How many PCs may use it.
    lifetime
        How long it may be used.
    owner
        Whose PCs they are (admins); without it an admin's link is for PCs of nobody in particular.
    """
    lifetime_s = lifetime_of(lifetime)
    async with connected() as grid:
        made = await grid.join_link(uses=uses, lifetime_s=lifetime_s, owner=owner)
    if json:
        print_json({"link": str(made), "uses": uses, "lifetime_s": lifetime_s})
    else:
        print_lines(str(made))


@app.command(name="list")
async def list_(*, json: Json = False) -> None:
    """List workers, with their owners and whose jobs they take.

    For example:

        deskgrid worker list
    """
    async with connected() as grid:
        workers = await grid.workers()
    if json:
        print_json(workers)
        return
    rows = [
        (one.id, one.name, one.owner or "-", one.state.value, age(one.seen_at or None), one.running, *_rules(one))
        for one in workers
    ]
    print_table(("worker", "name", "owner", "state", "seen", "running", "takes jobs of", "reserved for"), rows, empty="no workers")


def _rules(worker: Worker) -> tuple[str, str]:
    accepts = ", ".join(worker.profile.accepts) if worker.profile is not None else "-"
    left_s = (worker.reserved_until or 0.0) - time.time()
    reserved = worker.reserved_for + (f", {format_duration(left_s)} more" if left_s > 0 else "") if worker.reserved_for else "-"
    return accepts or "nobody", reserved


@app.command
async def reserve(
    worker: Number,
    /,
    *,
    for_: Annotated[str | None, Parameter(name="--for", help="group:NAME or user:NAME.")] = None,
    until: str | None = None,
    clear: bool = False,
    json: Json = False,
) -> None:
    """Keep a worker for the jobs of a group or user (admins).

    For example:

        deskgrid worker reserve 7 --for group:hep --until 7d
        deskgrid worker reserve 7 --clear

    Parameters
    ----------
    until
        For how long from now; without it until it is cleared.
    clear
        For nobody any more.
    """
    if clear == (for_ is not None):
        raise InvalidInput("either --for somebody, or --clear", hint="deskgrid worker reserve --help")
    lifetime_s = lifetime_of(until, "--until") if until else 0.0
    async with connected() as grid:
        found = await grid.reserve_worker(worker, for_ or "", lifetime_s=lifetime_s)
    if json:
        print_json(found)
    else:
        print_lines(
            f"worker {found.id} is kept for {found.reserved_for}" if found.reserved_for else f"worker {found.id} is for all"
        )


@app.command
async def remove(worker: Number, /, *, json: Json = False) -> None:
    """Forget a worker of yours (admins: any): its token ends, and its jobs go back. As `leave` for a PC that is lost.

    For example:

        deskgrid worker remove 7
    """
    async with connected() as grid:
        await grid.remove_worker(worker)
    if json:
        print_json({"removed": worker})
    else:
        print_lines(f"worker {worker} is not one any more")
