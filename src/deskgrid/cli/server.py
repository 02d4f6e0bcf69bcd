"""deskgrid server: make and run the grid's server."""

from __future__ import annotations

import asyncio
import gc
import json as json_format
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
from cyclopts import App, Parameter

from deskgrid.cli.logs import LogFormat, LogLevel, configure_logs
from deskgrid.cli.output import NO_NEGATIVES, Json, print_json, print_lines, warn
from deskgrid.cli.user import lifetime_of
from deskgrid.errors import InvalidInput
from deskgrid.settings import ServerSettings, load_settings, server_home
from deskgrid.units import format_size

if TYPE_CHECKING:
    from deskgrid.link import Link
    from deskgrid.server.backup import BackupReport

__all__ = ["app", "load_server_settings"]

app = App(default_parameter=NO_NEGATIVES, name="server", help="Make and run a grid's server.")

Home = Annotated[
    Path | None, Parameter(help="Folder of the server. By default $DESKGRID_SERVER_HOME or one in the user's data folder.")
]
Listen = Annotated[str | None, Parameter(help="HOST:PORT to listen on; 0.0.0.0 for all interfaces, port 0 for a free one.")]
Address = Annotated[str | None, Parameter(help="HOST:PORT that workers and users dial, if it is another one.")]
HubListen = Annotated[
    str | None,
    Parameter(help='HOST:PORT of the hub inside the server; by default the next port; "off" for no hub in this process.'),
]
HubAddress = Annotated[str | None, Parameter(help="HOST:PORT that peers dial for the hub, if it is another one.")]
Blobs = Annotated[str | None, Parameter(help="s3://BUCKET/PREFIX?endpoint=URL for blobs at an S3 store; by default in the folder.")]
Database = Annotated[
    str | None, Parameter(help="postgresql://USER:PASSWORD@HOST/NAME, for one or several servers; by default SQLite in the folder.")
]
MetricsListen = Annotated[
    str | None, Parameter(help="HOST:PORT for /metrics, /health and /ready without token and TLS, as in 127.0.0.1:9470.")
]
Verbose = Annotated[bool, Parameter(name=["--verbose", "-v"], show_default=False, help="Log every call.")]


def load_server_settings(home: Path, **options: str | None) -> ServerSettings:
    """Return HOME/server.toml and the environment, with options of the command line over both."""
    settings = load_settings(ServerSettings, home / "server.toml", "DESKGRID_SERVER")
    return msgspec.structs.replace(settings, **{name: value for name, value in options.items() if value is not None})


@app.command
async def init(
    *,
    home: Home = None,
    listen: Listen = None,
    address: Address = None,
    hub_listen: HubListen = None,
    hub_address: HubAddress = None,
    database: Database = None,
    blobs: Blobs = None,
    name: str | None = None,
    admin: str = "admin",
    json: Json = False,
) -> None:
    """Make a grid: its keys, its database and its first admin. What is there already stays.

    Options are kept in HOME/server.toml, where all other settings go too.

    For example:

        deskgrid server init
        deskgrid server init --listen 0.0.0.0:8470 --address grid.example.org:8470 --name physics

    Parameters
    ----------
    name
        Name of the grid, for people.
    admin
        Name of the first user, who is an admin.
    """
    from deskgrid.server.setup import init_server, make_login_link

    configure_logs(json=json, verbose=False)
    folder = home or server_home()
    given = {"name": name, "listen": listen, "address": address, "hub_listen": hub_listen, "hub_address": hub_address}
    given["database"] = database
    given["blobs"] = blobs
    settings = load_server_settings(folder, **given)
    _require_same_settings(folder, settings)
    user = await init_server(folder, settings, admin=admin)
    _keep_settings(folder, given)
    link = await make_login_link(folder, settings, user.name)
    if json:
        print_json({"home": str(folder), "user": user, "login_link": str(link)})
        return
    flag = f" --home {folder}" if home else ""
    print_lines(
        f"The grid {settings.name!r} is in {folder}. Next:",
        "",
        f"  deskgrid server run{flag}",
        f"  deskgrid login '{link}'",
        f"  deskgrid server join-link{flag}        for each PC that lends itself",
    )


def _require_same_settings(home: Path, wanted: ServerSettings) -> None:
    """Raise InvalidInput if the file says something else than the options: which of the two counts would be a guess."""
    file = home / "server.toml"
    if file.exists() and load_server_settings(home) != wanted:
        raise InvalidInput("the settings there differ from the options", where=str(file), hint="edit the file instead")


def _keep_settings(home: Path, given: dict[str, str | None]) -> None:
    file = home / "server.toml"
    # JSON's quoting is also TOML's.
    lines = [f"{name} = {json_format.dumps(value)}\n" for name, value in given.items() if value is not None]
    if lines and not file.exists():
        file.write_text("".join(lines), encoding="utf-8")


@app.command
def run(
    *,
    home: Home = None,
    listen: Listen = None,
    address: Address = None,
    hub_listen: HubListen = None,
    hub_address: HubAddress = None,
    database: Database = None,
    blobs: Blobs = None,
    metrics_listen: MetricsListen = None,
    log_format: Annotated[LogFormat | None, Parameter(help="json or text; by default text, and json with --json.")] = None,
    log_level: Annotated[
        LogLevel | None, Parameter(help="Least that is logged; by default info, and debug with --verbose.")
    ] = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Run the server, with a hub, until Ctrl-C or SIGTERM. Prints where it listens once it answers; logs go to stderr.

    Over PostgreSQL any number of servers may run, on one machine or several: all do the same, and one that ends is not missed.

    For example:

        deskgrid server run
        deskgrid server run --listen 127.0.0.1:0 --json
        deskgrid server run --listen 0.0.0.0:8480 --database postgresql://grid@db.example.org/grid
    """
    from deskgrid.server.setup import run_server

    configure_logs(json=json, verbose=verbose, log_format=log_format, log_level=log_level)
    folder = home or server_home()

    def ready(where: str, hub: str) -> None:
        if json:
            print_json({"address": where, "hub": hub or None, "home": str(folder)}, indent=0)  # a line: programs wait for it
        else:
            print_lines(f"listening on {where}" + (f"; its hub is {hub}" if hub else ""))

    given = {"listen": listen, "address": address, "hub_listen": hub_listen, "hub_address": hub_address, "database": database}
    given |= {"blobs": blobs, "metrics_listen": metrics_listen}
    _collect_rarely()
    with asyncio.Runner(loop_factory=_quick_loop()) as runner:
        runner.run(run_server(folder, load_server_settings(folder, **given), ready=ready))


def _quick_loop() -> Callable[[], asyncio.AbstractEventLoop] | None:
    """Return what makes an event loop whose TLS takes a fifth of the memory and less time; None (asyncio's own) where that is not to be had."""
    try:
        import uvloop
    except ImportError:  # Windows
        return None
    return uvloop.new_event_loop


def _collect_rarely() -> None:
    """Let Python look for cycles of garbage less often: calls leave few, and with thousands of them open each look costs as much as many calls."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)


@app.command
def migrate(*, home: Home = None, database: Database = None, json: Json = False) -> None:
    """Bring the database to the tables of this version. `run` does it, too; servers of the older version must have ended.

    For example:

        deskgrid server migrate
    """
    from deskgrid.server.setup import database_url
    from deskgrid.server.store.migrate import migrate as bring_up_to_date

    configure_logs(json=json, verbose=False)
    folder = home or server_home()
    before, after = bring_up_to_date(database_url(folder, load_server_settings(folder, database=database)))
    if json:
        print_json({"before": before, "after": after})
        return
    print_lines(
        f"the tables were up to date ({after})" if before == after else f"the tables are those of {after} now, after {before}"
    )


@app.command
def backup(
    file: Path, /, *, blobs: bool = False, keys: bool = False, home: Home = None, database: Database = None, json: Json = False
) -> None:
    """Write a backup of the grid, which may run meanwhile, to a new file that only you can read.

    For example:

        deskgrid server backup grid.backup --blobs --keys

    Parameters
    ----------
    file
        Where to write it. It must not exist.
    blobs
        With the bytes of data, contexts and results. Not those in an S3 store.
    keys
        With the keys of the grid, without which no worker or user would know it again.
    """
    from deskgrid.server.backup import back_up
    from deskgrid.server.setup import database_url

    configure_logs(json=json, verbose=False)
    folder = home or server_home()
    settings = load_server_settings(folder, database=database)
    if blobs and settings.blobs:
        raise InvalidInput("the blobs are in an S3 store", where="--blobs", hint="copy its bucket with its own tools")
    _say(back_up(database_url(folder, settings), folder, file, blobs=blobs, keys=keys), json=json)


@app.command
def restore(file: Path, /, *, home: Home = None, database: Database = None, json: Json = False) -> None:
    """Make a grid from a backup, in an empty database. Also moves a grid from SQLite to PostgreSQL.

    Bytes and keys in the backup go to the folder, where others must not be. Then run the server: workers come back, and jobs that ran go on.

    For example:

        deskgrid server restore grid.backup
        deskgrid server restore grid.backup --database postgresql://grid@db.example.org/grid
    """
    from deskgrid.server.backup import restore as make_from
    from deskgrid.server.setup import claimed, database_url

    configure_logs(json=json, verbose=False)
    folder = home or server_home()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with claimed(folder):
        report = make_from(database_url(folder, load_server_settings(folder, database=database)), folder, file)
    _say(report, json=json)
    if not (folder / "authority" / "authority.pem").exists():
        warn(f"there are no keys in the backup: copy authority/ of the grid to {folder} before you run it")


def _say(report: BackupReport, *, json: bool) -> None:
    if json:
        print_json(report)
        return
    rows = sum(report.rows.values())
    print_lines(f"{rows} rows, {report.blobs} blobs ({format_size(report.blob_bytes)}), {report.keys} keys")
    if report.missing:
        warn(f"{len(report.missing)} blobs are not in it: their bytes had been removed")


@app.command(name="join-link")
async def join_link(*, uses: int = 1, lifetime: str = "7d", home: Home = None, json: Json = False) -> None:
    """Print a link by which PCs become workers. Works on the server's machine, beside the running server.

    For example:

        deskgrid server join-link
        deskgrid server join-link --uses 50 --lifetime 30d

    Parameters
    ----------
    uses
        How many PCs may use it.
    lifetime
        How long it may be used.
    """
    from deskgrid.server.setup import make_join_link

    await _print_link(make_join_link, "PC", "deskgrid worker join LINK", uses, lifetime, home, json=json)


@app.command(name="hub-link")
async def hub_link(*, uses: int = 1, lifetime: str = "7d", home: Home = None, json: Json = False) -> None:
    """Print a link by which machines become hubs. Works on the server's machine, beside the running server.

    The server has a hub of its own; more of them bring peers nearer to each other, and take load off the server.

    For example:

        deskgrid server hub-link

    Parameters
    ----------
    uses
        How many machines may use it.
    lifetime
        How long it may be used.
    """
    from deskgrid.server.setup import make_hub_link

    await _print_link(make_hub_link, "hub", "deskgrid hub join LINK", uses, lifetime, home, json=json)


async def _print_link(
    make: Callable[..., Awaitable[Link]], what: str, command: str, uses: int, lifetime: str, home: Path | None, *, json: bool
) -> None:
    """Make a link for so many of what is to be added, and print it with the command that takes it. Raise InvalidInput."""
    if uses < 1:
        raise InvalidInput(f"{uses} is too few", where="--uses", hint="1 or more")
    configure_logs(json=json, verbose=False)
    folder = home or server_home()
    lifetime_s = lifetime_of(lifetime)
    link = await make(folder, load_server_settings(folder), uses=uses, lifetime_s=lifetime_s)
    if json:
        print_json({"link": str(link), "uses": uses, "lifetime_s": lifetime_s})
        return
    warn(f"for {uses} {what}{'s' if uses > 1 else ''}, within {lifetime}: {command}, where LINK is")
    print_lines(str(link))
