"""deskgrid worker: lend this PC to a grid."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from deskgrid.cli.logs import configure_logs
from deskgrid.cli.output import NO_NEGATIVES, Json, print_json, print_lines
from deskgrid.cli.user import read_link
from deskgrid.errors import Conflict
from deskgrid.link import Link, parse_link
from deskgrid.settings import WorkerSettings, load_settings, worker_home

__all__ = ["app", "join_worker"]

app = App(default_parameter=NO_NEGATIVES, name="worker", help="Lend this PC to a grid.")

Home = Annotated[
    Path | None, Parameter(help="Folder of the worker. By default $DESKGRID_WORKER_HOME or one in the user's data folder.")
]
LinkText = Annotated[
    str,
    Parameter(allow_leading_hyphen=True, help="The link, or - to read it from stdin (so that others on this PC do not see it)."),
]
Verbose = Annotated[bool, Parameter(name=["--verbose", "-v"], show_default=False, help="Log more.")]


def _settings(home: Path) -> WorkerSettings:
    return load_settings(WorkerSettings, home / "worker.toml", "DESKGRID_WORKER")


@app.command
async def join(link: LinkText, /, *, name: str | None = None, home: Home = None, json: Json = False) -> None:
    """Make this PC a worker of a grid, with a link from its admin.

    What you lend is set in HOME/worker.toml: CPUs, memory, disk. The worker starts with `deskgrid worker run`.

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


@app.command
async def run(
    *,
    keep: Annotated[bool, Parameter(show_default=False)] = False,
    home: Home = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Work for the grid until Ctrl-C or SIGTERM. Logs go to stderr.

    For example:

        deskgrid worker run
        deskgrid worker run --home /data/worker --verbose
        deskgrid worker run --keep          to be stopped and started again while jobs go on

    Parameters
    ----------
    keep
        When stopped, leave the machines running; the next `deskgrid worker run` takes them up.
    """
    from deskgrid.worker.agent import run_worker

    configure_logs(json=json, verbose=verbose)
    folder = home or worker_home()
    await run_worker(folder, _settings(folder), keep=keep)


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
