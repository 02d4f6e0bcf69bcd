"""deskgrid data: named, immutable files in the grid's repository."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from cyclopts import App, Parameter

from deskgrid.cli.connection import connected
from deskgrid.cli.output import NO_NEGATIVES, Json, age, make_reporter, print_json, print_lines, print_table
from deskgrid.errors import InvalidInput
from deskgrid.model.data import Data, DataKind, Visibility
from deskgrid.model.machines import ContextLabel
from deskgrid.units import format_size

__all__ = ["app", "label_of", "print_data", "reference_of", "require_file"]

app = App(default_parameter=NO_NEGATIVES, name="data", help="Keep files in the grid's repository.")
Reference = Annotated[str, Parameter(help="NAME, NAME@VERSION or sha256.")]


@app.command
async def put(file: Path, /, *, name: str | None = None, public: bool = False, group: str = "", json: Json = False) -> None:
    """Upload a file and name it; a name that exists gets a new version. An interrupted upload is continued.

    For example:

        deskgrid data put events.root
        deskgrid data put events.root --name events --public

    Parameters
    ----------
    file
        The file.
    name
        Its name on the grid; by default the file's.
    public
        Everybody on the grid may read it.
    group
        The members of this group may read it.
    """
    require_file(file)
    async with connected() as grid:
        with make_reporter(json) as reporter:
            phase = reporter.begin(f"upload {file.name}", file.stat().st_size)
            visibility = Visibility.PUBLIC if public else Visibility.GROUP if group else Visibility.PRIVATE
            data = await grid.put(file, name or file.name, visibility=visibility, group=group, progress=phase.done)
    if json:
        print_json(data)
    else:
        print_lines(reference_of(data))


def require_file(file: Path) -> None:
    """Raise InvalidInput if there is no such file."""
    if not file.is_file():
        raise InvalidInput("there is no such file", where=str(file), hint="check its name")


def label_of(*, agent: bool, cernvm: bool) -> ContextLabel:
    """Return for whom in the guest a context disk is made. Raise InvalidInput for both."""
    if agent and cernvm:
        raise InvalidInput("a disk has our agent or is a CernVM", where="--cernvm", hint="one of --agent and --cernvm")
    return ContextLabel.CONTEXT if agent else ContextLabel.CERNVM if cernvm else ContextLabel.CIDATA


def reference_of(data: Data) -> str:
    """Return the name by which exactly this version is found again."""
    return f"{data.name}@{data.version}"


@app.command
async def get(
    reference: Reference,
    /,
    *,
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    json: Json = False,
) -> None:
    """Fetch data into a file and check it. An interrupted download is continued.

    For example:

        deskgrid data get events
        deskgrid data get events@2 -o old.root

    Parameters
    ----------
    output
        File to write, replaced if it exists; by default ./NAME, which must not exist.
    """
    async with connected() as grid:
        data = await grid.data(reference)
        file = output or _file_for(data)
        with make_reporter(json) as reporter:
            phase = reporter.begin(f"download {reference_of(data)}", data.blob.size_bytes)
            data = await grid.get(reference_of(data) if reference != data.blob.sha256 else reference, file, phase.done)
    if json:
        print_json({"data": data, "file": str(file)})
    else:
        print_lines(str(file))


def _file_for(data: Data) -> Path:
    """Return a file here for data that others named: never one that exists, and never outside this folder."""
    name = data.name.replace("/", "_").replace("\\", "_").replace("\0", "_").lstrip(".") or "data"
    if Path(name).exists():
        raise InvalidInput(f"{name} exists already", where="--output", hint="choose a file with --output FILE")
    return Path(name)


@app.command(name="list")
async def list_(*, kind: DataKind | None = None, json: Json = False) -> None:
    """List the data that you may use.

    For example:

        deskgrid data list
        deskgrid data list --kind disk --json

    Parameters
    ----------
    kind
        Only data of this kind.
    """
    async with connected() as grid:
        found = await grid.list_data(kind)
    if json:
        print_json(found)
    else:
        print_data(found)


def print_data(found: tuple[Data, ...]) -> None:
    """Print data as a table."""
    rows = [
        (reference_of(d), d.kind.value, format_size(d.blob.size_bytes), d.owner, d.visibility.value, age(d.created_at))
        for d in found
    ]
    print_table(("data", "kind", "size", "owner", "who", "added"), rows, empty="no data")


@app.command
async def show(reference: Reference, /, *, json: Json = False) -> None:
    """Show one piece of data.

    For example:

        deskgrid data show events
        deskgrid data show events@2 --json
    """
    async with connected() as grid:
        data = await grid.data(reference)
    if json:
        print_json(data)
        return
    print_lines(
        f"{reference_of(data)}: {data.kind.value} of {data.owner}, {data.visibility.value}, added {age(data.created_at)}",
        f"size    {format_size(data.blob.size_bytes)}",
        f"sha256  {data.blob.sha256}",
    )
    if data.disk is not None:
        print_lines(
            f"disk    {data.disk.format.value}, {format_size(data.disk.size_bytes)} unpacked, "
            f"{format_size(data.disk.virtual_bytes)} in the guest, context label {data.disk.context_label.value}",
            f"        sha256 {data.disk.sha256}",
        )


@app.command
async def remove(reference: Reference, /, *, json: Json = False) -> None:
    """Remove one version of data (the newest by default). Jobs that were submitted with it keep it.

    For example:

        deskgrid data remove events@1
    """
    async with connected() as grid:
        data = await grid.data(reference)
        exact = reference if reference == data.blob.sha256 else reference_of(data)
        await grid.remove_data(exact)
    if json:
        print_json({"removed": data})
    else:
        print_lines(f"removed {reference_of(data)}")
