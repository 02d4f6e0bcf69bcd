"""deskgrid login and user: who may use the grid, and how much of it."""

from __future__ import annotations

import platform
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import Annotated

import msgspec
from cyclopts import App, Parameter

from deskgrid.cli.connection import connected
from deskgrid.cli.output import NO_NEGATIVES, Json, age, print_json, print_lines, print_table, warn
from deskgrid.client.connecting import credentials_file
from deskgrid.errors import DeskgridError, InvalidInput
from deskgrid.model.users import Token, User
from deskgrid.units import format_size, parse_duration, parse_size

__all__ = ["app", "lifetime_of", "login", "read_link"]

app = App(default_parameter=NO_NEGATIVES, name="user", help="Add users and let them log in.")
Name = Annotated[str, Parameter(help="Name of the user.")]
LinkText = Annotated[
    str,
    Parameter(allow_leading_hyphen=True, help="The link, or - to read it from stdin (so that others on this PC do not see it)."),
]


def read_link(text: str) -> str:
    """Return a link given as argument, or for "-" the first line of stdin."""
    return sys.stdin.readline() if text == "-" else text


async def login(link: LinkText, /, *, lifetime: str | None = None, json: Json = False) -> None:
    """Log in to a grid with a link from its admin. The link works once.

    The login is kept in the configuration folder of this user, or in $DESKGRID_CLIENT_HOME. It ends after a time that the server sets, if it
    is not renewed: deskgrid user renew. A token in $DESKGRID_TOKEN is used in its place.

    For example:

        deskgrid login 'deskgrid://grid.example.org:8470/login?authority=...&secret=...'
        deskgrid login -
        deskgrid login LINK --lifetime 1d

    Parameters
    ----------
    lifetime
        For how long; by default as long as the server lets it be.
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
    credentials = await client.login(parsed, platform.node(), lifetime_s=lifetime_of(lifetime) if lifetime else 0.0)
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
        rows = [
            (user.name, "admin" if user.admin else "user", f"{user.weight:g}", _bounds(user), age(user.created_at))
            for user in users
        ]
        print_table(("user", "role", "weight", "bounds", "added"), rows, empty="no users")


def _bounds(user: User) -> str:
    bounds = [
        f"{word} {shown(most) if most else 'unbounded'}"
        for word, most, shown in (
            ("waiting", user.max_waiting, str),
            ("running", user.max_running, str),
            ("keeps", user.max_bytes, format_size),
        )
        if most is not None
    ]
    return ", ".join(bounds) or "-"


@app.command(name="set")
async def set_(
    name: Name,
    /,
    *,
    weight: float | None = None,
    max_waiting: int | None = None,
    max_running: int | None = None,
    max_bytes: str | None = None,
    json: Json = False,
) -> None:
    """Change a user's part of the grid, and how much of it he may use (admins). What is not named stays.

    For example:

        deskgrid user set ann --weight 2 --max-running 500 --max-bytes 10GiB
        deskgrid user set ann --max-waiting=-1         as the server says for all

    Parameters
    ----------
    weight
        His part against others, of whom each has 1.
    max_waiting
        Jobs that may wait; 0: no bound, -1: what the server says.
    max_running
        Jobs that may run at the same time, likewise.
    max_bytes
        Data, contexts and results that are kept, as in 10GiB, likewise.
    """
    async with connected() as grid:
        user = await grid.set_user(
            name, weight=weight, max_waiting=max_waiting, max_running=max_running, max_bytes=_bound_of(max_bytes)
        )
    if json:
        print_json(user)
    else:
        print_lines(f"{user.name}: weight {user.weight:g}; bounds: {_bounds(user)}")


def _bound_of(text: str | None) -> int | None:
    if text is None or text.lstrip("-").isdecimal():
        return int(text) if text is not None else None
    try:
        return parse_size(text)
    except InvalidInput as error:
        raise InvalidInput(error.message, where="--max-bytes", hint=error.hint) from error


@app.command
async def token(
    name: Annotated[str | None, Parameter(help="Name of the user who is to log in (admins).")] = None,
    /,
    *,
    right: tuple[str, ...] = (),
    lifetime: str | None = None,
    label: str = "",
    file: Path | None = None,
    json: Json = False,
) -> None:
    """Print a link by which a user logs in on one more PC or program (admins), or with --right a token of your own that may do only that.

    The link works once. The token is printed once: give it to a program in $DESKGRID_TOKEN (beside a login), or with --file as a login.

    For example:

        deskgrid user token ann
        deskgrid user token ann --lifetime 1h
        deskgrid user token --right jobs:read --right data --lifetime 1d --label ci
        deskgrid user token --right jobs --file ci/credentials.json

    Parameters
    ----------
    right
        What the token may do, may be repeated: jobs:read, jobs, data:read, data, overlay, workers, account, admin, metrics.
    lifetime
        How long the link may wait to be used (by default 7d), or the token is valid (1d).
    label
        What the token is for, for `deskgrid user tokens`.
    file
        Write a login with the token, for a program with $DESKGRID_CLIENT_HOME set to this file's folder.
    """
    if bool(right) == (name is not None):
        raise InvalidInput("either a user, or rights for a token of your own", hint="deskgrid user token --help")
    if name is None:
        await _narrowed_token(right, lifetime_of(lifetime or "1d"), label, file, json=json)
        return
    async with connected() as grid:
        link = await grid.login_link(name, lifetime_s=lifetime_of(lifetime or "7d"))
    if json:
        print_json({"link": str(link)})
    else:
        print_lines(str(link))


async def _narrowed_token(rights: tuple[str, ...], lifetime_s: float, label: str, file: Path | None, *, json: bool) -> None:
    from deskgrid.client.transport import save_credentials

    if file is not None and file.exists():
        raise InvalidInput(f"{file} exists", where="--file", hint="remove it, or name another")
    async with connected() as grid:
        secret, made = await grid.add_token(rights, lifetime_s=lifetime_s, label=label)
        known = grid.transport.credentials
    if file is not None:
        save_credentials(file, msgspec.structs.replace(known, token=secret))
    shown = {"token": secret} if file is None else {"file": str(file)}
    if json:
        print_json({**shown, "number": made.id, "rights": made.rights, "expires_at": made.expires_at})
    else:
        print_lines(*shown.values())


@app.command
async def renew(*, json: Json = False) -> None:
    """Let this login live on, as if you had just logged in. Narrowed tokens are not renewed.

    For example:

        deskgrid user renew
    """
    async with connected() as grid:
        found = await grid.renew()
    if json:
        print_json(found)
    else:
        print_lines(f"{found.name} is logged in {_until(found.expires_at)}")


def _until(ends_at: float | None) -> str:
    return "without an end" if ends_at is None else f"until {datetime.fromtimestamp(ends_at).astimezone():%Y-%m-%d %H:%M}"


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
    rows = [(one.id, one.label, ", ".join(one.rights) or "all", age(one.created_at), _state(one)) for one in found]
    print_table(("token", "for", "may", "made", "state"), rows, empty="no tokens")


def _state(one: Token) -> str:
    if one.revoked:
        return "revoked"
    if one.expires_at is not None and one.expires_at <= time.time():
        return "ended"
    return f"valid {_until(one.expires_at)}" if one.expires_at is not None else "valid"


def lifetime_of(text: str, option: str = "--lifetime") -> float:
    """Return the seconds of a duration. Raise InvalidInput naming the option."""
    try:
        return parse_duration(text)
    except (InvalidInput, OverflowError) as error:
        hint = error.hint if isinstance(error, InvalidInput) else "a shorter one"
        raise InvalidInput(f"{text[:40]!r} is not a duration", where=option, hint=hint) from error
