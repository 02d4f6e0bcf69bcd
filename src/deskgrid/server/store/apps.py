"""Apps: named, versioned things to run."""

from __future__ import annotations

import re
from typing import Any

import msgspec
import sqlalchemy as sa

from deskgrid.core.rights import Thing
from deskgrid.core.submission import PLATFORM
from deskgrid.errors import Conflict, InvalidInput, NotFound
from deskgrid.model.apps import ANY_PLATFORM, App
from deskgrid.model.data import Blob, Visibility
from deskgrid.model.ids import AppId, Sha256, UserId
from deskgrid.model.wire import RegisterApp
from deskgrid.server.store import data
from deskgrid.server.store.accounts import Caller, check_group, require, visible
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import account, app, app_file

__all__ = ["find_app", "list_apps", "register_app", "remove_app"]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}")
_MOST_PLATFORMS, _MOST_DEFAULTS_BYTES = 20, 1 << 16


def register_app(tx: Transaction, caller: Caller, request: RegisterApp) -> App:
    """Publish an app; a name of the caller's that exists gets a new version, unless its newest is the same. Raise InvalidInput, Conflict."""
    if not _NAME.fullmatch(request.name):
        raise InvalidInput(f"{request.name[:80]!r} is not an app's name", hint="letters, digits, _ . + -, at most 200")
    defaults = msgspec.json.encode(request.defaults).decode()
    if len(defaults) > _MOST_DEFAULTS_BYTES:
        raise InvalidInput("these defaults are too long", hint=f"at most {_MOST_DEFAULTS_BYTES} bytes")
    _check_files(tx, caller, request)
    if request.visibility is Visibility.GROUP or request.group:
        check_group(tx, caller, request.group)
    mine = sa.select(app).where(app.c.owner_id == caller.user_id, app.c.name == request.name).order_by(app.c.version.desc())
    newest = tx.row(mine)
    if newest is not None and _same(tx, newest, request, defaults):
        return find_app(tx, caller, f"{request.name}@{newest.version}", owner_id=caller.user_id)
    version = newest.version + 1 if newest is not None else 1
    added = tx.run(
        sa.insert(app).values(
            name=request.name,
            version=version,
            owner_id=caller.user_id,
            visibility=request.visibility.value,
            team=request.group,
            created_at=tx.now,
            defaults=defaults,
        )
    )
    app_id = int(added.inserted_primary_key[0])  # type: ignore[index]
    for platform, blob in request.files.items():
        tx.run(sa.insert(app_file).values(app_id=app_id, platform=platform, sha256=blob.sha256, size_bytes=blob.size_bytes))
    return find_app(tx, caller, f"{request.name}@{version}", owner_id=caller.user_id)


def _check_files(tx: Transaction, caller: Caller, request: RegisterApp) -> None:
    if len(request.files) > _MOST_PLATFORMS:
        raise InvalidInput(f"{len(request.files)} platforms are too many", hint=f"at most {_MOST_PLATFORMS}")
    for platform, blob in request.files.items():
        if platform != ANY_PLATFORM and not PLATFORM.fullmatch(platform):
            raise InvalidInput(f"{platform[:40]!r} is not a platform", hint="as in linux-x86_64, or any")
        data.require_upload(tx, caller, blob)


def _same(tx: Transaction, newest: Any, request: RegisterApp, defaults: str) -> bool:
    said = (request.visibility.value, request.group, defaults)
    return (newest.visibility, newest.team, newest.defaults) == said and _files(tx, newest.id) == request.files


def find_app(tx: Transaction, caller: Caller, reference: str, *, owner_id: UserId | None = None) -> App:
    """Find an app that the caller may use by name (the newest version) or name@version. Raise NotFound, InvalidInput.

    Where several users have such an app: one's own first, then an admin's, then of who had the name first, so that nobody can put his
    program in the place of what others run.
    """
    name, _, version = reference.partition("@")
    if version and not data.VERSION.fullmatch(version):
        raise InvalidInput(f"{reference[:80]!r} is not an app", hint="name, or name@version (a number)")
    query = _visible(tx, caller).where(app.c.name == name)
    if version:
        query = query.where(app.c.version == min(int(version), 2**31 - 1))
    if owner_id is not None:
        query = query.where(app.c.owner_id == owner_id)
    older = app.alias("older")
    since = sa.select(sa.func.min(older.c.id)).where(older.c.owner_id == app.c.owner_id, older.c.name == app.c.name)
    order = ((app.c.owner_id == caller.user_id).desc(), account.c.admin.desc(), since.scalar_subquery(), app.c.version.desc())
    row = tx.row(query.order_by(*order))
    if row is None:
        raise NotFound(f"there is no app {reference!r}", hint="deskgrid app list")
    return _app(tx, row)


def list_apps(tx: Transaction, caller: Caller) -> tuple[App, ...]:
    """Return the apps that the caller may use, by name and version."""
    return tuple(_app(tx, row) for row in tx.rows(_visible(tx, caller).order_by(app.c.name, app.c.owner_id, app.c.version)))


def remove_app(tx: Transaction, caller: Caller, reference: str) -> None:
    """Remove one version of an app (the newest if only a name is given); jobs keep what they have of it. Raise NotFound, Forbidden, Conflict."""
    found = find_app(tx, caller, reference)
    thing = Thing(owner_id=found.owner_id, visibility=found.visibility, group=found.group)
    require(tx, caller, "remove_app", thing, see="get_app", missing=NotFound(f"there is no app {reference!r}"))
    from deskgrid.server.store.submissions import app_is_used

    if app_is_used(tx, found.id):
        raise Conflict(f"jobs that have not ended run {found.name}@{found.version}", hint="wait for them, or cancel them")
    tx.run(sa.delete(app).where(app.c.id == found.id))


def _visible(tx: Transaction, caller: Caller) -> sa.Select[tuple[Any, ...]]:
    query = sa.select(app, account.c.name.label("owner")).join(account, account.c.id == app.c.owner_id)
    return query.where(visible(tx, caller, "get_app", owner=app.c.owner_id, group=app.c.team, visibility=app.c.visibility))


def _files(tx: Transaction, app_id: int) -> dict[str, Blob]:
    rows = tx.rows(sa.select(app_file).where(app_file.c.app_id == app_id))
    return {row.platform: Blob(sha256=Sha256(row.sha256), size_bytes=row.size_bytes) for row in rows}


def _app(tx: Transaction, row: Any) -> App:
    return App(
        id=AppId(row.id),
        name=row.name,
        version=row.version,
        owner_id=UserId(row.owner_id),
        owner=row.owner,
        visibility=Visibility(row.visibility),
        group=row.team,
        created_at=row.created_at,
        defaults=msgspec.json.decode(row.defaults, type=dict[str, Any]),
        files=_files(tx, row.id),
    )
