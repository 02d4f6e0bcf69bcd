"""deskgrid login, user and group: who may use the grid."""

from __future__ import annotations

import platform
import sys
from typing import Annotated

from cyclopts import App, Parameter

from deskgrid.cli.connection import connected, credentials_file
from deskgrid.cli.output import NO_NEGATIVES, Json, age, print_json, print_lines, print_table, warn
from deskgrid.errors import DeskgridError, InvalidInput
from deskgrid.units import parse_duration

__all__ = ["app", "group_app", "login", "read_link"]

app = App(default_parameter=NO_NEGATIVES, name="user", help="Add users and let them log in.")
group_app = App(default_parameter=NO_NEGATIVES, name="group", help="Group users.")
Name = Annotated[str, Parameter(help="Name of the user.")]
GroupName = Annotated[str, Parameter(help="Name of the group.")]
LinkText = Annotated[
    str,
    Parameter(allow_leading_hyphen=True, help="The link, or - to read it from stdin (so that others on this PC do not see it)."),
]


def read_link(text: str) -> str:
    """Return a link given as argument, or for "-" the first line of stdin."""
    return sys.stdin.readline() if text == "-" else text


async def login(link: LinkText, /, *, json: Json = False) -> None:
    """Log in to a grid with a link from its admin. The link works once.

    The login is kept in the configuration folder of this user, or in $DESKGRID_CLIENT_HOME.

    For example:

        deskgrid login 'deskgrid://grid.example.org:8470/login?authority=...&secret=...'
        deskgrid login -
    """
    from deskgrid.client import grid as client
    from deskgrid.client.transport import load_credentials, save_credentials
    from deskgrid.link import parse_link

    parsed = parse_link(read_link(link), "login")
    file = credentials_file()
    try:
        before = load_credentials(file)
    except DeskgridError:
        before = None
    credentials = await client.login(parsed, platform.node())
    save_credentials(file, credentials)
    if json:
        print_json({"name": credentials.name, "address": credentials.address, "file": str(file)})
        return
    print_lines(f"logged in to {credentials.address} as {credentials.name}")
    if before is not None and (before.address, before.name) != (credentials.address, credentials.name):
        warn(f"this replaces the login to {before.address} as {before.name}")


@app.command
async def add(name: Name, /, *, admin: bool = False, json: Json = False) -> None:
    """Add a user, and print the link by which they log in (admins).

    For example:

        deskgrid user add ann
        deskgrid user add bob --admin

    Parameters
    ----------
    admin
        May add users and workers, and see everyone's jobs.
    """
    async with connected() as grid:
        user = await grid.add_user(name, admin=admin)
        link = await grid.login_link(name)
    if json:
        print_json({"user": user, "link": str(link)})
    else:
        warn(f"added {user.name}; they log in with: deskgrid login LINK, where LINK is")
        print_lines(str(link))


@app.command(name="list")
async def list_(*, json: Json = False) -> None:
    """List users.

    For example:

        deskgrid user list
    """
    async with connected() as grid:
        users = await grid.users()
    if json:
        print_json(users)
    else:
        rows = [(user.name, "admin" if user.admin else "user", age(user.created_at)) for user in users]
        print_table(("user", "role", "added"), rows, empty="no users")


@app.command
async def token(name: Name, /, *, lifetime: str = "7d", json: Json = False) -> None:
    """Print a link by which a user logs in on one more PC or program (admins). It works once.

    For example:

        deskgrid user token ann
        deskgrid user token ann --lifetime 1h

    Parameters
    ----------
    lifetime
        How long the link may wait to be used.
    """
    lifetime_s = lifetime_of(lifetime)
    async with connected() as grid:
        link = await grid.login_link(name, lifetime_s=lifetime_s)
    if json:
        print_json({"link": str(link)})
    else:
        print_lines(str(link))


@app.command
async def tokens(*, revoke: int | None = None, json: Json = False) -> None:
    """Show your tokens: which PCs and programs are logged in as you. With --revoke, end one first.

    For example:

        deskgrid user tokens
        deskgrid user tokens --revoke 3

    Parameters
    ----------
    revoke
        Number of a token that shall not be valid any more, as of a PC that was lost.
    """
    async with connected() as grid:
        if revoke is not None:
            await grid.revoke_token(revoke)
        found = await grid.tokens()
    if json:
        print_json(found)
        return
    rows = [(one.id, one.label, age(one.created_at), "revoked" if one.revoked else "valid") for one in found]
    print_table(("token", "for", "made", "state"), rows, empty="no tokens")


def lifetime_of(text: str) -> float:
    """Return the seconds of --lifetime. Raise InvalidInput naming the option."""
    try:
        return parse_duration(text)
    except (InvalidInput, OverflowError) as error:
        hint = error.hint if isinstance(error, InvalidInput) else "a shorter one"
        raise InvalidInput(f"{text[:40]!r} is not a duration", where="--lifetime", hint=hint) from error


@group_app.command(name="add")
async def add_group(name: GroupName, /, *, json: Json = False) -> None:
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


@group_app.command(name="list")
async def list_groups(*, json: Json = False) -> None:
    """List groups with their members.

    For example:

        deskgrid group list
    """
    async with connected() as grid:
        groups = await grid.groups()
    if json:
        print_json(groups)
    else:
        print_table(("group", "members"), [(group.name, ", ".join(group.members)) for group in groups], empty="no groups")


@group_app.command
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
