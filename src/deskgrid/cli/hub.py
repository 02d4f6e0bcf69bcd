"""deskgrid hub: a machine where peers register, and which relays what cannot go directly."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from deskgrid.cli.connection import connected
from deskgrid.cli.logs import configure_logs
from deskgrid.cli.output import NO_NEGATIVES, Json, print_json, print_lines, print_table
from deskgrid.cli.user import read_link
from deskgrid.link import parse_link
from deskgrid.settings import HubSettings, hub_home, load_settings

__all__ = ["app"]

app = App(default_parameter=NO_NEGATIVES, name="hub", help="Let the programs of a grid find each other, and relay between them.")

Home = Annotated[Path | None, Parameter(help="Folder of the hub. By default $DESKGRID_HUB_HOME or one in the user's data folder.")]
LinkText = Annotated[
    str,
    Parameter(allow_leading_hyphen=True, help="The link, or - to read it from stdin (so that others on this PC do not see it)."),
]
Listen = Annotated[str | None, Parameter(help="HOST:PORT to listen on; 0.0.0.0 for all interfaces, port 0 for a free one.")]
Address = Annotated[str | None, Parameter(help="HOST:PORT that peers dial, if it is another one.")]
Verbose = Annotated[bool, Parameter(name=["--verbose", "-v"], show_default=False, help="Log more.")]


def _settings(home: Path, **options: str | None) -> HubSettings:
    settings = load_settings(HubSettings, home / "hub.toml", "DESKGRID_HUB")
    return msgspec.structs.replace(settings, **{name: value for name, value in options.items() if value is not None})


@app.command
async def join(link: LinkText, /, *, name: str | None = None, home: Home = None, json: Json = False) -> None:
    """Make this machine a hub of a grid, with a link from its admin (`deskgrid server hub-link`).

    A hub sees who talks to whom and how much, but only ciphertext. Its limits are set in HOME/hub.toml.
    It starts with `deskgrid hub run`. The server has a hub of its own; more are for other sites and for load.

    For example:

        deskgrid hub join 'deskgrid://grid.example.org:8470/hub?authority=...&secret=...'
        deskgrid hub join - --name physics-gateway

    Parameters
    ----------
    name
        Name of this hub for people; by default the machine's host name.
    """
    from deskgrid.client.hubs import join_here

    folder = home or hub_home()
    _settings(folder)  # a mistake in the file is told now, not after the link was used up
    file = await join_here(folder, parse_link(read_link(link), "hub"), name or platform.node() or "hub")
    if json:
        print_json({"home": str(folder), "credentials": str(file)})
        return
    print_lines(f"joined. Start it with: deskgrid hub run{f' --home {home}' if home else ''}")
    print_lines("Its port must be reachable from all PCs of the grid; --address says how, if it is behind a gateway")


@app.command
async def run(
    *,
    listen: Listen = None,
    address: Address = None,
    home: Home = None,
    verbose: Verbose = False,
    json: Json = False,
) -> None:
    """Be a hub until Ctrl-C or SIGTERM. Prints where peers dial once they can register; logs go to stderr.

    For example:

        deskgrid hub run
        deskgrid hub run --listen 0.0.0.0:443 --address hub.example.org:443
        deskgrid hub run --listen 127.0.0.1:0 --json
    """
    from deskgrid.client.hubs import run_hub

    configure_logs(json=json, verbose=verbose)
    folder = home or hub_home()

    def ready(where: str) -> None:
        if json:
            print_json({"address": where, "home": str(folder)}, indent=0)  # a line: programs wait for it
        else:
            print_lines(f"peers register at {where}")

    await run_hub(folder, _settings(folder, listen=listen, address=address), ready=ready)


@app.command(name="list")
async def list_(*, json: Json = False) -> None:
    """List hubs, and how many peers are registered at each.

    For example:

        deskgrid hub list
        deskgrid hub list --json
    """
    async with connected() as grid:
        hubs = await grid.hubs()
    if json:
        print_json(hubs)
        return
    rows = [(detail.label, detail.hub.name, detail.hub.address, detail.peers, "yes" if detail.alive else "no") for detail in hubs]
    print_table(("hub", "name", "address", "peers", "alive"), rows, empty="no hubs")


@app.command
async def remove(hub: Annotated[int, Parameter(help="Number of the hub, as in hub-2.")], /, *, json: Json = False) -> None:
    """Take a hub out of the grid for good (admins): its token ends, and peers are not sent there any more.

    For example:

        deskgrid hub remove 2
    """
    async with connected() as grid:
        await grid.remove_hub(hub)
    if json:
        print_json({"removed": hub})
    else:
        print_lines(f"hub {hub} is removed")
