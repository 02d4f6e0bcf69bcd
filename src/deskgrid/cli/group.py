"""deskgrid group: users who work together."""

from __future__ import annotations

from typing import Annotated

from cyclopts import App, Parameter

from deskgrid.cli.connection import connected
from deskgrid.cli.output import NO_NEGATIVES, Json, print_json, print_lines, print_table
from deskgrid.errors import InvalidInput

__all__ = ["app"]

app = App(default_parameter=NO_NEGATIVES, name="group", help="Group users.")
GroupName = Annotated[str, Parameter(help="Name of the group.")]


@app.command(name="add")
async def add(name: GroupName, /, *, json: Json = False) -> None:
    """Add a group (admins).

    For example:

        deskgrid group add physics
    """
    async with connected() as grid:
        group = await grid.add_group(name)
    if json:
        print_json(group)
    else:
        print_lines(f"added group {group.name}")


@app.command(name="list")
async def list_(*, json: Json = False) -> None:
    """List groups with their members.

    For example:

        deskgrid group list
    """
    async with connected() as grid:
        groups = await grid.groups()
    if json:
        print_json(groups)
    else:
        rows = [(group.name, f"{group.weight:g}", ", ".join(group.members)) for group in groups]
        print_table(("group", "weight", "members"), rows, empty="no groups")


@app.command
async def members(name: GroupName, /, *, add: tuple[str, ...] = (), remove: tuple[str, ...] = (), json: Json = False) -> None:
    """Show a group's members, or change them (admins).

    For example:

        deskgrid group members physics
        deskgrid group members physics --add ann --add bob --remove eve

    Parameters
    ----------
    add
        User to add; may be repeated.
    remove
        User to remove; may be repeated.
    """
    async with connected() as grid:
        if add or remove:
            group = await grid.set_members(name, add=add, remove=remove)
        else:
            found = [group for group in await grid.groups() if group.name == name]
            if not found:
                raise InvalidInput(f"there is no group {name!r}", hint="deskgrid group list")
            group = found[0]
    if json:
        print_json(group)
    else:
        print_table(("member",), [(member,) for member in group.members], empty="no members")


@app.command(name="set")
async def set_(name: GroupName, /, *, weight: float, json: Json = False) -> None:
    """Change a group's part of the grid (admins).

    For example:

        deskgrid group set physics --weight 3

    Parameters
    ----------
    weight
        Its part against other groups and users, of which each has 1.
    """
    async with connected() as grid:
        group = await grid.set_group(name, weight=weight)
    if json:
        print_json(group)
    else:
        print_lines(f"{group.name} has weight {group.weight:g}")
