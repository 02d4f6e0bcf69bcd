"""Blobs, uploads and named data. Rights belong to references: knowing a sha256 grants nothing."""

from __future__ import annotations

import re

import msgspec
import sqlalchemy as sa

from deskgrid.errors import Conflict, Forbidden, InvalidInput, NotFound
from deskgrid.model.data import Blob, Data, DataKind, DataRef, Disk, Visibility
from deskgrid.model.ids import DataId, Sha256, UserId
from deskgrid.model.users import Role
from deskgrid.model.wire import RegisterData, Upload
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import account, attempt, blob, data, job, upload

__all__ = [
    "begin_upload",
    "drop_unreferenced",
    "find_data",
    "find_disk",
    "finish_upload",
    "list_data",
    "may_read_blob",
    "register_data",
    "remove_data",
    "require_upload",
    "storage_bytes",
    "stored_size",
    "upload_of",
]

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


def check_sha256(text: str) -> Sha256:
    """Return `text` if it is a sha256. Raise InvalidInput otherwise."""
    if not _SHA256.fullmatch(text):
        raise InvalidInput(f"{text[:80]!r} is not a sha256", hint="64 digits 0-9 and a-f")
    return Sha256(text)


# Uploads


def begin_upload(tx: Transaction, caller: Caller, wanted: Blob) -> Upload:
    """Return the caller's upload of these bytes, new or begun earlier. `received_bytes` is the repository's to fill in."""
    check_sha256(wanted.sha256)
    row = tx.row(sa.select(upload).where(upload.c.holder == caller.principal, upload.c.sha256 == wanted.sha256))
    if row is not None and row.size_bytes != wanted.size_bytes:
        raise InvalidInput(f"the upload of {wanted.sha256[:12]} was begun with {row.size_bytes} bytes, not {wanted.size_bytes}")
    if row is not None:
        complete = row.complete and stored_size(tx, wanted.sha256) is not None
        tx.run(sa.update(upload).where(upload.c.id == row.id).values(touched_at=tx.now, complete=complete))
        return Upload(id=row.id, received_bytes=wanted.size_bytes if complete else 0, complete=complete)
    added = tx.run(
        sa.insert(upload).values(
            holder=caller.principal, sha256=wanted.sha256, size_bytes=wanted.size_bytes, complete=False, touched_at=tx.now
        )
    )
    return Upload(id=int(added.inserted_primary_key[0]), received_bytes=0, complete=False)  # type: ignore[index]


def upload_of(tx: Transaction, caller: Caller, upload_id: int) -> tuple[Blob, bool]:
    """Return what an upload of the caller's is for and whether it is complete. Raise NotFound."""
    row = tx.row(sa.select(upload).where(upload.c.id == upload_id, upload.c.holder == caller.principal))
    if row is None:
        raise NotFound(f"you have no upload {upload_id}")
    return Blob(sha256=Sha256(row.sha256), size_bytes=row.size_bytes), row.complete


def finish_upload(tx: Transaction, upload_id: int, sent: Blob) -> None:
    """Note that an upload's bytes are in the repository. Idempotent."""
    tx.run(sa.update(upload).where(upload.c.id == upload_id).values(complete=True, touched_at=tx.now))
    if stored_size(tx, sent.sha256) is None:
        tx.run(sa.insert(blob).values(sha256=sent.sha256, size_bytes=sent.size_bytes, created_at=tx.now))


def require_upload(tx: Transaction, caller: Caller, wanted: Blob) -> None:
    """Check that the caller has sent these bytes. Raise Conflict otherwise."""
    sent = sa.select(upload.c.id).where(
        upload.c.holder == caller.principal,
        upload.c.sha256 == wanted.sha256,
        upload.c.size_bytes == wanted.size_bytes,
        upload.c.complete.is_(True),
    )
    if tx.row(sent) is None:
        raise Conflict(f"the bytes of {wanted.sha256[:12]} are not here", hint="upload them first")


def stored_size(tx: Transaction, sha256: str) -> int | None:
    """Return the size of a blob in the repository, or None."""
    size: int | None = tx.value(sa.select(blob.c.size_bytes).where(blob.c.sha256 == sha256))
    return size


def storage_bytes(tx: Transaction) -> int:
    """Return the bytes of all blobs."""
    return int(tx.value(sa.select(sa.func.coalesce(sa.func.sum(blob.c.size_bytes), 0))))


def may_read_blob(tx: Transaction, caller: Caller, sha256: str) -> bool:
    """Say whether the caller holds a reference: visible data, an own job, or (worker) a job that it was leased."""
    if caller.role is Role.WORKER:
        leased = attempt.join(job, job.c.id == attempt.c.job_id)
        query = (
            sa.select(attempt.c.id)
            .select_from(leased)
            .where(
                attempt.c.worker_id == caller.worker_id,
                attempt.c.state.in_(("leased", "running", "suspended", "lost")),
                job.c.state.in_(("waiting", "active")),
                sa.or_(job.c.disk_blob == sha256, job.c.context == sha256),
            )
        )
        return tx.row(query.limit(1)) is not None
    if caller.role is Role.ADMIN:
        return True
    named = sa.select(data.c.id).where(data.c.sha256 == sha256, _visible(caller))
    used = sa.select(job.c.id).where(job.c.owner_id == caller.user_id, sa.or_(job.c.result == sha256, job.c.context == sha256))
    return tx.row(named.limit(1)) is not None or tx.row(used.limit(1)) is not None


def drop_unreferenced(
    tx: Transaction, touched_before: float, *, only: str | None = None, holder: str = "", limit: int = 100
) -> list[Sha256]:
    """Forget old uploads and blobs that nothing refers to; return the blobs whose bytes can be removed now.

    With `only` and `holder`: forget just that holder's upload of that blob.
    """
    if only is None:
        tx.run(sa.delete(upload).where(upload.c.touched_at < touched_before))
    else:
        tx.run(sa.delete(upload).where(upload.c.sha256 == only, upload.c.holder == holder))
    column = blob.c.sha256
    free = sa.select(column).where(
        ~sa.exists().where(upload.c.sha256 == column),
        ~sa.exists().where(data.c.sha256 == column),
        ~sa.exists().where(job.c.disk_blob == column),
        ~sa.exists().where(job.c.context == column),
        ~sa.exists().where(job.c.result == column),
        ~sa.exists().where(attempt.c.result == column),
    )
    if only is not None:
        free = free.where(column == only)
    found = [Sha256(row.sha256) for row in tx.rows(free.limit(limit))]
    if found:
        tx.run(sa.delete(blob).where(column.in_(found)))
    return found


# Named data


def register_data(tx: Transaction, caller: Caller, request: RegisterData) -> Data:
    """Name an uploaded blob; a name of the caller's that exists gets a new version, unless its newest is the same blob."""
    if not _NAME.fullmatch(request.name) or _SHA256.fullmatch(request.name):
        raise InvalidInput(f"{request.name!r} is not a data name", hint="letters, digits, _ . + -, at most 200, not a sha256")
    if (request.disk is not None) != (request.kind is DataKind.DISK):
        raise InvalidInput("a disk needs its attributes, and only a disk has them")
    if request.disk is not None:
        check_sha256(request.disk.sha256)
    require_upload(tx, caller, request.blob)
    newest = tx.row(
        _with_owner().where(data.c.owner_id == caller.user_id, data.c.name == request.name).order_by(data.c.version.desc())
    )
    if newest is not None and newest.kind != request.kind:
        raise Conflict(f"{request.name} is a {newest.kind}, not a {request.kind}", hint="choose another name")
    if newest is not None and _same(_data(newest), request):
        return _data(newest)
    version = newest.version + 1 if newest is not None else 1
    tx.run(
        sa.insert(data).values(
            name=request.name,
            version=version,
            kind=request.kind.value,
            sha256=request.blob.sha256,
            size_bytes=request.blob.size_bytes,
            owner_id=caller.user_id,
            visibility=request.visibility.value,
            created_at=tx.now,
            disk=msgspec.json.encode(request.disk).decode() if request.disk else None,
            disk_sha256=request.disk.sha256 if request.disk else None,
        )
    )
    mine = _with_owner().where(data.c.owner_id == caller.user_id, data.c.name == request.name, data.c.version == version)
    return _data(tx.row(mine))


def find_data(tx: Transaction, caller: Caller, reference: str) -> Data:
    """Find visible data by name (the newest version), name@version or sha256. Raise NotFound.

    Where several users have such data: one's own first, then an admin's, then of who had the name first, so that nobody can put
    his data in the place of what others use.
    """
    older = data.alias("older")
    since = sa.select(sa.func.min(older.c.id)).where(older.c.owner_id == data.c.owner_id, older.c.name == data.c.name)
    order = ((data.c.owner_id == caller.user_id).desc(), account.c.admin.desc(), since.scalar_subquery(), data.c.version.desc())
    row = tx.row(_matching(reference).where(_visible(caller)).order_by(*order))
    if row is None:
        raise NotFound(f"there is no data {reference!r}", hint="deskgrid data list")
    return _data(row)


def find_disk(tx: Transaction, caller: Caller, reference: str) -> DataRef:
    """Find a disk by reference. Raise NotFound, or InvalidInput if the data is no disk."""
    try:
        found = find_data(tx, caller, reference)
    except NotFound as error:
        raise NotFound(f"there is no disk {reference!r}", hint="deskgrid disk list shows those you may use") from error
    if found.disk is None:
        raise InvalidInput(f"{reference} is a {found.kind}, not a disk", hint="deskgrid disk publish FILE --name NAME")
    return DataRef(blob=found.blob, disk=found.disk)


def list_data(tx: Transaction, caller: Caller, kind: str | None) -> tuple[Data, ...]:
    """Return visible data by name and version."""
    query = _with_owner().where(_visible(caller)).order_by(data.c.name, data.c.owner_id, data.c.version)
    if kind is not None:
        query = query.where(data.c.kind == kind)
    return tuple(_data(row) for row in tx.rows(query))


def remove_data(tx: Transaction, caller: Caller, reference: str) -> None:
    """Remove one version of data (the newest if only a name is given). Jobs keep what they refer to. Raise NotFound, Forbidden."""
    found = find_data(tx, caller, reference)
    if found.owner_id != caller.user_id and caller.role is not Role.ADMIN:
        raise Forbidden(f"{reference} belongs to {found.owner}")
    tx.run(sa.delete(data).where(data.c.id == found.id))


def _same(newest: Data, request: RegisterData) -> bool:
    return (newest.blob, newest.disk, newest.visibility) == (request.blob, request.disk, request.visibility)


def _with_owner() -> sa.Select[tuple[object, ...]]:
    return sa.select(data, account.c.name.label("owner")).join(account, account.c.id == data.c.owner_id)


def _visible(caller: Caller) -> sa.ColumnElement[bool]:
    if caller.role is Role.ADMIN:
        return sa.true()
    return sa.or_(data.c.owner_id == caller.user_id, data.c.visibility == Visibility.PUBLIC.value)


def _matching(reference: str) -> sa.Select[tuple[object, ...]]:
    if _SHA256.fullmatch(reference):
        return _with_owner().where(sa.or_(data.c.sha256 == reference, data.c.disk_sha256 == reference))
    name, _, version = reference.partition("@")
    query = _with_owner().where(data.c.name == name)
    if not version:
        return query
    if not version.isdigit():
        raise InvalidInput(f"{reference!r} is not a reference", hint="name, name@version (a number) or sha256")
    return query.where(data.c.version == min(int(version), 2**31 - 1))


def _data(row: sa.Row[tuple[object, ...]] | None) -> Data:
    if row is None:
        raise NotFound("there is no such data")
    return Data(
        id=DataId(row.id),
        name=row.name,
        version=row.version,
        kind=DataKind(row.kind),
        blob=Blob(sha256=Sha256(row.sha256), size_bytes=row.size_bytes),
        owner_id=UserId(row.owner_id),
        owner=row.owner,
        visibility=Visibility(row.visibility),
        created_at=row.created_at,
        disk=msgspec.json.decode(row.disk, type=Disk) if row.disk else None,
    )
