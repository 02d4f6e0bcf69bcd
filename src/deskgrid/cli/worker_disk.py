"""deskgrid worker disk: the disks that are on this PC already."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter

from deskgrid.cli.data import label_of, require_file
from deskgrid.cli.output import NO_NEGATIVES, Json, print_json, print_lines, print_table
from deskgrid.settings import worker_home
from deskgrid.units import format_size

if TYPE_CHECKING:
    from deskgrid.worker.installed import InstalledDisks

__all__ = ["Home", "app"]

app = App(default_parameter=NO_NEGATIVES, name="disk", help="Declare disks that are on this PC already.")

Home = Annotated[
    Path | None, Parameter(help="Folder of the worker. By default $DESKGRID_WORKER_HOME or one in the user's data folder.")
]


@app.command
async def add(
    file: Path, /, *, name: str, agent: bool = False, cernvm: bool = False, home: Home = None, json: Json = False
) -> None:
    """Let jobs boot a disk that is on this PC already: those with `disk = "installed:NAME"` come here, and nothing is downloaded.

    A plain qcow2 or an ISO. It stays where it is and is never written; once it is changed it is not offered any more, until it is added
    again. A worker that runs takes it up by itself.

    For example:

        deskgrid worker disk add /srv/images/cernvm4.qcow2 --name cernvm
        deskgrid worker disk add tiny.iso --name tiny --agent

    Parameters
    ----------
    file
        The image. The user that the worker runs as must be able to read it.
    name
        What jobs call it: letters, digits and _ . + -
    agent
        Its system mounts a disk labelled CONTEXT and runs the agent from it, as built templates do.
        Otherwise the context disk is made for cloud-init (NoCloud, label CIDATA).
    cernvm
        It is a CernVM: the context disk has user-data in its format.
    """
    require_file(file)
    folder = home or worker_home()
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    disk = _declared(folder).add(file, name, label_of(agent=agent, cernvm=cernvm))
    if json:
        print_json(disk)
    else:
        print_lines(f"installed:{disk.name}")


@app.command(name="list")
async def list_(*, home: Home = None, json: Json = False) -> None:
    """List the disks that this PC has already.

    For example:

        deskgrid worker disk list
    """
    disks = _declared(home or worker_home()).all()
    if json:
        print_json([{"usable": disk.unchanged, "disk": disk} for disk in disks])
        return
    rows = [
        (disk.name, disk.format, format_size(disk.virtual_bytes), "yes" if disk.unchanged else "no, it was changed", disk.path)
        for disk in disks
    ]
    print_table(("name", "format", "size", "offered", "file"), rows, empty="no disk is declared")


@app.command
async def remove(name: str, /, *, home: Home = None, json: Json = False) -> None:
    """Offer a disk no more. Its file stays.

    For example:

        deskgrid worker disk remove cernvm

    Parameters
    ----------
    name
        As in `deskgrid worker disk list`.
    """
    _declared(home or worker_home()).remove(name)
    if json:
        print_json({"removed": name})
    else:
        print_lines(f"removed {name}")


def _declared(home: Path) -> InstalledDisks:
    from deskgrid.worker.home import Home as Folder
    from deskgrid.worker.installed import InstalledDisks

    return InstalledDisks(Folder(home).disks)
