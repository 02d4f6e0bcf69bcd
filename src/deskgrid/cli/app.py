"""deskgrid app: named, versioned things to run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from cyclopts import App, Parameter

from deskgrid.cli.connection import connected
from deskgrid.cli.output import NO_NEGATIVES, Json, age, make_reporter, print_json, print_lines, print_table
from deskgrid.client.jobfile import parse_defaults, read_text_file, read_toml
from deskgrid.errors import InvalidInput
from deskgrid.model.apps import ANY_PLATFORM
from deskgrid.model.data import Visibility

__all__ = ["app"]

app = App(default_parameter=NO_NEGATIVES, name="app", help="Publish programs that jobs run by name.")
AppReference = Annotated[str, Parameter(help="name, or name@version")]


@app.command
async def publish(
    folder: Annotated[Path | None, Parameter(help="Folder with files for every platform.")] = None,
    /,
    *,
    name: str,
    file: tuple[str, ...] = (),
    defaults: Path | None = None,
    visibility: Visibility = Visibility.PRIVATE,
    group: str = "",
    json: Json = False,
) -> None:
    """Publish an app: its files appear as /app in its jobs. A name that exists gets a new version.

    For example:

        deskgrid app publish tool/ --name tool
        deskgrid app publish --name blast --file linux-x86_64=build/linux --file windows-x86_64=build/windows --visibility public
        deskgrid app publish tool/ --name tool --defaults tool.toml

    Parameters
    ----------
    name
        Name of the app.
    file
        PLATFORM=FOLDER: files for one platform, as in linux-x86_64; any for all others.
    defaults
        A job file: what it says holds for the app's jobs where they say nothing.
    visibility
        Who besides you may use it.
    group
        With visibility group: whose members.
    """
    folders = {ANY_PLATFORM: folder} if folder is not None else {}
    for one in file:
        platform, equals, path = one.partition("=")
        if not equals:
            raise InvalidInput(f"{one!r} is not PLATFORM=FOLDER", where="--file", hint="as in linux-x86_64=build/linux")
        folders[platform] = Path(path)
    for place in folders.values():
        if not place.is_dir():
            raise InvalidInput(f"there is no folder {str(place)!r}", where="--file")
    said = _read_defaults(defaults) if defaults is not None else {}
    async with connected() as grid:
        with make_reporter(json) as reporter:
            phase = reporter.begin("send the files")
            found = await grid.publish_app(name, folders, defaults=said, visibility=visibility, group=group, progress=phase.done)
    if json:
        print_json(found)
    else:
        print_lines(f"{found.name}@{found.version}")


def _read_defaults(file: Path) -> dict[str, Any]:
    return parse_defaults(read_toml(read_text_file(file), str(file)), str(file))


@app.command(name="list")
async def list_(*, json: Json = False) -> None:
    """List the apps that you may use.

    For example:

        deskgrid app list
    """
    async with connected() as grid:
        found = await grid.apps()
    if json:
        print_json(found)
        return
    rows = [(one.name, one.version, one.owner, one.visibility.value, ", ".join(one.files), age(one.created_at)) for one in found]
    print_table(("app", "version", "owner", "visible to", "platforms", "published"), rows, empty="no apps")


@app.command
async def show(app: AppReference, /, *, json: Json = False) -> None:
    """Show an app and what it says for its jobs.

    For example:

        deskgrid app show tool
    """
    async with connected() as grid:
        found = await grid.app(app)
    if json:
        print_json(found)
        return
    print_lines(
        f"{found.name}@{found.version}, of {found.owner}, {found.visibility.value}, published {age(found.created_at)}",
        *(f"files      {platform}: {blob.size_bytes} bytes, sha256 {blob.sha256[:12]}" for platform, blob in found.files.items()),
        *(f"default    {path} = {value}" for path, value in found.defaults.items()),
    )


@app.command
async def remove(app: AppReference, /, *, json: Json = False) -> None:
    """Remove one version of an app, the newest if only a name is given.

    For example:

        deskgrid app remove tool@1
    """
    async with connected() as grid:
        await grid.remove_app(app)
    if json:
        print_json({"removed": app})
    else:
        print_lines(f"removed {app}")
