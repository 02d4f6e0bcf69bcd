"""Blobs, uploads and named data. Rights belong to references: knowing a sha256 grants nothing.

What nothing refers to is removed in steps, whoever else is at it (server/retention.py does them):
    1. `mark_unused`: nobody refers to it, not even an upload: noted with the time.
    2. `claim_unused`: still so REMOVAL_WAIT_S later: a process claims it. A transaction that referred to it meanwhile has ended by then.
    3. Its bytes are removed, in the first CLAIM_S of the claim; after that this process must not any more.
    4. `note_removed`: its row goes.
Beginning an upload locks the blob's row, so either the upload is there in step 2 and the blob stays, or the upload waits until step 4 is done.
After a kill between 2 and 4 another process claims it again, but only TAKE_OVER_S after the first.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

import msgspec
import sqlalchemy as sa

from deskgrid.core.rights import Right, Thing, covers, holds
from deskgrid.errors import Conflict, Forbidden, InvalidInput, NotFound
from deskgrid.model.data import Blob, Data, DataKind, Delta, Disk, Visibility
from deskgrid.model.ids import DataId, Sha256, UserId, is_sha256
from deskgrid.model.users import Role
from deskgrid.model.wire import RegisterData, Upload
from deskgrid.server.store.accounts import Caller, check_group, require, visible
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import (
    IS_LIVE,
    account,
    app_file,
    attempt,
    blob,
    copy,
    data,
    holding,
    job,
    queue,
    submission,
    submission_data,
    upload,
)
from deskgrid.server.store.storage import kept_bytes
from deskgrid.units import format_size

__all__ = [
    "CLAIM_S",
    "PLACED",
    "REGISTERED",
    "REMOVAL_WAIT_S",
    "TAKE_OVER_S",
    "adopt",
    "begin_upload",
    "check_room",
    "claim_unused",
    "find_all",
    "find_data",
    "find_disk",
    "finish_upload",
    "forget_uploads",
    "give_up_upload",
    "list_data",
    "live_uploads",
    "mark_unused",
    "may_read_blob",
    "note_removed",
    "register_data",
    "remove_data",
    "require_upload",
    "set_remote",
    "stored_size",
    "upload_of",
    "versions_of",
]

REGISTERED = "data"
"""The topic of new named data."""
PLACED = "placed"
"""What each process keeps for some seconds of what is to be placed (placement.py)."""
REMOVAL_WAIT_S = 600.0
"""Seconds for which nothing must have referred to a blob before it is removed: longer than any transaction."""
CLAIM_S = 30.0
TAKE_OVER_S = 180.0

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}")
VERSION = re.compile(r"[0-9]{1,18}")


def check_sha256(text: str) -> Sha256:
    """Return `text` if it is a sha256. Raise InvalidInput otherwise."""
    if not is_sha256(text):
        raise InvalidInput(f"{text[:80]!r} is not a sha256", hint="64 digits 0-9 and a-f")
    return Sha256(text)


# Uploads


def begin_upload(tx: Transaction, caller: Caller, wanted: Blob, *, max_bytes: int = 0) -> tuple[Upload, str | None]:
    """Return the caller's upload of these bytes, new or begun earlier, and its name at the blob store.

    `received_bytes` is the repository's to fill in. Raise Conflict while these bytes are being removed, Forbidden if the user has no room.
    """
    check_sha256(wanted.sha256)
    _hold_blob(tx, wanted.sha256)
    row = tx.row(sa.select(upload).where(upload.c.holder == caller.principal, upload.c.sha256 == wanted.sha256))
    if row is not None and row.size_bytes != wanted.size_bytes:
        raise InvalidInput(f"the upload of {wanted.sha256[:12]} was begun with {row.size_bytes} bytes, not {wanted.size_bytes}")
    if row is not None:
        complete = row.complete and stored_size(tx, wanted.sha256) is not None
        tx.run(sa.update(upload).where(upload.c.id == row.id).values(touched_at=tx.now, complete=complete))
        return Upload(id=row.id, received_bytes=wanted.size_bytes if complete else 0, complete=complete), row.remote
    if caller.user_id is not None:
        check_room(tx, caller.user_id, wanted.size_bytes, max_bytes)
    mine = {"holder": caller.principal, "sha256": wanted.sha256}
    tx.insert_if_new(upload, ["holder", "sha256"], **mine, size_bytes=wanted.size_bytes, complete=False, touched_at=tx.now)
    begun = tx.value(sa.select(upload.c.id).where(upload.c.holder == caller.principal, upload.c.sha256 == wanted.sha256))
    return Upload(id=int(begun), received_bytes=0, complete=False), None


def _hold_blob(tx: Transaction, sha256: str) -> None:
    """Keep a blob that is there from being removed. Raise Conflict if that has begun."""
    row = tx.row(sa.select(blob.c.removing, blob.c.unused_since).where(blob.c.sha256 == sha256).with_for_update())
    if row is not None and row.removing:
        raise Conflict(f"the old bytes of {sha256[:12]} are just being removed", hint="try again in some minutes")
    if row is not None and row.unused_since is not None:
        tx.run(sa.update(blob).where(blob.c.sha256 == sha256).values(unused_since=None))


def upload_of(tx: Transaction, caller: Caller, upload_id: int) -> tuple[Blob, bool]:
    """Return what an upload of the caller's is for and whether it is complete. Raise NotFound."""
    row = tx.row(sa.select(upload).where(upload.c.id == upload_id, upload.c.holder == caller.principal))
    if row is None:
        raise NotFound(f"you have no upload {upload_id}")
    return Blob(sha256=Sha256(row.sha256), size_bytes=row.size_bytes), row.complete


def set_remote(tx: Transaction, upload_id: int, old: str | None, new: str | None) -> str | None:
    """Change an upload's name at the blob store from `old` to `new`; return what it is then: another process may have been quicker."""
    same = upload.c.remote.is_(None) if old is None else upload.c.remote == old
    tx.run(sa.update(upload).where(upload.c.id == upload_id, same).values(remote=new))
    found: str | None = tx.value(sa.select(upload.c.remote).where(upload.c.id == upload_id))
    return found


def finish_upload(tx: Transaction, upload_id: int, sent: Blob) -> None:
    """Note that an upload's bytes are in the repository. Idempotent. Raise Conflict if the upload has been forgotten meanwhile."""
    known = tx.run(sa.update(upload).where(upload.c.id == upload_id).values(complete=True, touched_at=tx.now))
    if not known.rowcount:
        raise Conflict("this upload was forgotten: nothing was heard of it for too long", hint="begin it again")
    _know_blob(tx, sent)


def _know_blob(tx: Transaction, known: Blob) -> None:
    tx.insert_if_new(blob, ["sha256"], sha256=known.sha256, size_bytes=known.size_bytes, created_at=tx.now, removing=False)


def give_up_upload(tx: Transaction, holder: str, sha256: str) -> None:
    """Forget a holder's upload: it will not refer to it."""
    tx.run(sa.delete(upload).where(upload.c.holder == holder, upload.c.sha256 == sha256))


def live_uploads(tx: Transaction, upload_ids: Iterable[int]) -> set[int]:
    """Return which of these uploads are known and not complete yet: the bytes of the others are nobody's any more."""
    wanted = sorted(upload_ids)
    found: set[int] = set()
    for start in range(0, len(wanted), 500):
        known = upload.c.id.in_(wanted[start : start + 500])
        found |= {row.id for row in tx.rows(sa.select(upload.c.id).where(known, upload.c.complete.is_(False)))}
    return found


def forget_uploads(tx: Transaction, touched_before: float, limit: int) -> int:
    """Forget uploads that were not touched since; return how many."""
    old = sa.select(upload.c.id).where(upload.c.touched_at < touched_before).limit(limit)
    return int(tx.run(sa.delete(upload).where(upload.c.id.in_(old.scalar_subquery()))).rowcount)


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


def check_room(tx: Transaction, user_id: UserId, size_bytes: int, default: int) -> None:
    """Raise Forbidden if a user may not keep so many bytes more. What he keeps is looked at every few seconds only."""
    row = tx.row(sa.select(account.c.max_bytes).where(account.c.id == user_id))
    most = row.max_bytes if row is not None and row.max_bytes is not None else default
    if not most:
        return
    known: dict[int, tuple[float, int]] = tx.memo.setdefault("kept_bytes", {})
    counted_at, kept = known.get(user_id, (-_COUNTED_S, 0))
    if not counted_at <= tx.now < counted_at + _COUNTED_S:
        counted_at, kept = tx.now, kept_bytes(tx, user_id)
    if kept + size_bytes > most:
        raise Forbidden(
            f"you may keep {format_size(most)}, and have {format_size(kept)}: there is no room for {format_size(size_bytes)}",
            hint="remove data and jobs that you do not need, or ask the admin for more",
        )
    known[user_id] = (counted_at, kept + size_bytes)


_COUNTED_S = 10.0


def may_read_blob(tx: Transaction, caller: Caller, sha256: str) -> bool:
    """Say whether the caller holds a reference: visible data, a visible job, or (worker) a job that it was leased, or data that it is to hold."""
    if caller.role is Role.WORKER:
        leased = attempt.join(job, job.c.id == attempt.c.job_id).join(submission, submission.c.id == job.c.submission_id)
        query = sa.select(attempt.c.id).select_from(leased).where(attempt.c.worker_id == caller.worker_id, _needs(sha256))
        query = query.where(job.c.state.in_(("waiting", "active"))).limit(1)
        of_live, of_lost = query.where(IS_LIVE), query.where(attempt.c.state == "lost")  # an index for each
        of_placed = sa.select(data.c.id).join(holding).where(holding.c.worker_id == caller.worker_id)
        placed = of_placed.where(sa.or_(data.c.sha256 == sha256, data.c.delta_sha256 == sha256)).limit(1)
        # What it was told to fetch ahead: not what it says to have, which would be a way to get it.
        told = (copy.c.worker_id == caller.worker_id, copy.c.there.is_(False))
        of_disk = sa.exists().where(copy.c.content == submission.c.disk_sha256, *told)
        ahead = sa.select(submission.c.id).where(submission.c.disk_blob == sha256, of_disk).limit(1)
        of_file = sa.exists().where(copy.c.content == sha256, *told)
        ahead_file = sa.select(submission_data.c.submission_id).where(submission_data.c.sha256 == sha256, of_file).limit(1)
        of_new = sa.exists().where(copy.c.content == data.c.disk_sha256, *told)
        delta = sa.select(data.c.id).where(data.c.delta_sha256 == sha256, of_new).limit(1)
        return any(tx.row(found) is not None for found in (of_live, of_lost, placed, ahead, ahead_file, delta))
    if caller.role is Role.ADMIN and caller.rights is None:
        return True
    named = sa.select(data.c.id).where(sa.or_(data.c.sha256 == sha256, data.c.delta_sha256 == sha256), _visible(tx, caller))
    if not holds(caller.rights, Right.DATA_READ):
        named = named.where(data.c.kind == DataKind.DISK.value)  # what jobs refer to
    of_jobs = visible(tx, caller, "get_job", owner=job.c.owner_id, group=queue.c.team)
    brought = sa.select(job.c.id).join(queue, queue.c.id == job.c.queue_id).where(job.c.result == sha256, of_jobs)
    # A context is its owner's alone: his secrets may be in it.
    sent = sa.select(submission.c.id).where(submission.c.owner_id == caller.user_id, submission.c.context == sha256)
    queries = [named] if covers(caller.rights, "get_data") else []
    queries += [brought, sent] if covers(caller.rights, "get_job") else []
    return any(tx.row(query.limit(1)) is not None for query in queries)


def _needs(sha256: str) -> sa.ColumnElement[bool]:
    """Tell whether a worker needs a blob for a job of a submission."""
    program = sa.exists().where(app_file.c.app_id == submission.c.app_id, app_file.c.sha256 == sha256)
    of_disk = sa.exists().where(data.c.sha256 == submission.c.disk_blob, data.c.delta_sha256 == sha256)
    file = sa.exists().where(submission_data.c.submission_id == submission.c.id, submission_data.c.sha256 == sha256)
    return sa.or_(submission.c.disk_blob == sha256, submission.c.context == sha256, program, of_disk, file)


# Removing


def _is_used() -> sa.ColumnElement[bool]:
    """Tell whether anything refers to a blob."""
    column = blob.c.sha256
    return sa.or_(
        sa.exists().where(upload.c.sha256 == column),
        sa.exists().where(data.c.sha256 == column),
        sa.exists().where(data.c.delta_sha256 == column),
        sa.exists().where(submission.c.disk_blob == column),
        sa.exists().where(submission_data.c.sha256 == column),
        sa.exists().where(submission.c.context == column),
        sa.exists().where(submission.c.parameters == column),
        sa.exists().where(app_file.c.sha256 == column),
        sa.exists().where(job.c.result == column),
        sa.exists().where(attempt.c.result == column),
    )


def mark_unused(tx: Transaction, after: str, limit: int) -> str | None:
    """Note of the next blobs after a sha256 whether anything refers to them; return where to go on, None at the end."""
    window = sa.select(blob.c.sha256).where(blob.c.sha256 > after).order_by(blob.c.sha256).limit(limit)
    found = [row.sha256 for row in tx.rows(window)]
    if not found:
        return None
    these = (blob.c.sha256 >= found[0], blob.c.sha256 <= found[-1], blob.c.removing.is_(False))
    used = _is_used()
    tx.run(sa.update(blob).where(*these, blob.c.unused_since.is_(None), ~used).values(unused_since=tx.now))
    tx.run(sa.update(blob).where(*these, blob.c.unused_since.is_not(None), used).values(unused_since=None))
    return str(found[-1]) if len(found) == limit else None


def claim_unused(tx: Transaction, limit: int, *, wait_s: float = REMOVAL_WAIT_S) -> list[Sha256]:
    """Claim blobs that nothing has referred to for `wait_s`, or whose claim was left by a process that is gone; return them."""
    unused = sa.and_(blob.c.removing.is_(False), blob.c.unused_since <= tx.now - wait_s, ~_is_used())
    left = sa.and_(blob.c.removing.is_(True), blob.c.unused_since <= tx.now - TAKE_OVER_S)
    wanted = sa.or_(unused, left)
    due = sa.select(blob.c.sha256).where(wanted).limit(limit).with_for_update(skip_locked=True)
    found = [row.sha256 for row in tx.rows(due)]
    if not found:
        return []
    # Asked once more: what changed while the row was waited for is seen only now.
    claimed = sa.update(blob).where(blob.c.sha256.in_(found), wanted).values(removing=True, unused_since=tx.now)
    return [Sha256(row.sha256) for row in tx.rows(claimed.returning(blob.c.sha256))]


def note_removed(tx: Transaction, removed: Iterable[Sha256]) -> None:
    """Forget claimed blobs whose bytes have gone."""
    tx.run(sa.delete(blob).where(blob.c.sha256.in_(list(removed)), blob.c.removing.is_(True)))


def adopt(tx: Transaction, found: Iterable[Blob]) -> int:
    """Make blobs known whose bytes are there, as after a kill between storing and noting them: unused, they go like others. Return how many."""
    wanted = {one.sha256: one.size_bytes for one in found}
    strays = wanted.keys() - {row.sha256 for row in tx.rows(sa.select(blob.c.sha256).where(blob.c.sha256.in_(list(wanted))))}
    for sha256 in sorted(strays):
        _know_blob(tx, Blob(sha256=sha256, size_bytes=wanted[sha256]))
    return len(strays)


# Named data


def register_data(tx: Transaction, caller: Caller, request: RegisterData) -> Data:
    """Name an uploaded blob; a name of the caller's that exists gets a new version, unless its newest is the same blob."""
    if not _NAME.fullmatch(request.name) or is_sha256(request.name):
        raise InvalidInput(f"{request.name!r} is not a data name", hint="letters, digits, _ . + -, at most 200, not a sha256")
    if (request.disk is not None) != (request.kind is DataKind.DISK):
        raise InvalidInput("a disk needs its attributes, and only a disk has them")
    if request.disk is not None:
        check_sha256(request.disk.sha256)
        _check_words(request.disk)
    if request.visibility is Visibility.GROUP or request.group:
        check_group(tx, caller, request.group)
    if (request.visibility is Visibility.GROUP) != bool(request.group):
        raise InvalidInput("a group goes with the visibility group, and that with a group", where="group")
    require_upload(tx, caller, request.blob)
    if request.delta is not None:
        request = msgspec.structs.replace(request, delta=_checked_delta(tx, caller, request, request.delta))
    newest = tx.row(
        _with_owner().where(data.c.owner_id == caller.user_id, data.c.name == request.name).order_by(data.c.version.desc())
    )
    if newest is not None and newest.kind != request.kind:
        raise Conflict(f"{request.name} is a {newest.kind}, not a {request.kind}", hint="choose another name")
    if newest is not None and _same(_data(newest), request):
        return _data(newest)
    version = newest.version + 1 if newest is not None else 1
    tx.topics.append(REGISTERED)
    tx.memo.pop(PLACED, None)
    tx.run(
        sa.insert(data).values(
            name=request.name,
            version=version,
            kind=request.kind.value,
            sha256=request.blob.sha256,
            size_bytes=request.blob.size_bytes,
            owner_id=caller.user_id,
            visibility=request.visibility.value,
            team=request.group,
            created_at=tx.now,
            disk=msgspec.json.encode(request.disk).decode() if request.disk else None,
            disk_sha256=request.disk.sha256 if request.disk else None,
            delta=msgspec.json.encode(request.delta).decode() if request.delta else None,
            delta_sha256=request.delta.blob.sha256 if request.delta else None,
        )
    )
    mine = _with_owner().where(data.c.owner_id == caller.user_id, data.c.name == request.name, data.c.version == version)
    return _data(tx.row(mine))


def _checked_delta(tx: Transaction, caller: Caller, request: RegisterData, delta: Delta) -> Delta:
    """Return a delta with the blob that it is to be applied to: of a disk that the caller may use, for what it makes must not tell him of others.

    Raise InvalidInput, NotFound or Conflict.
    """
    base = find_data(tx, caller, check_sha256(delta.base))
    if request.disk is None or base.disk is None:
        raise InvalidInput("only disks have deltas, to other disks", where="delta")
    if delta.blob.size_bytes > request.blob.size_bytes:
        raise InvalidInput("a delta that is larger than its disk is of no use", where="delta")
    require_upload(tx, caller, delta.blob)
    return msgspec.structs.replace(delta, base_blob=base.blob.sha256)


def _check_words(disk: Disk) -> None:
    for field, text in (("os", disk.os), ("arch", disk.arch), ("about", disk.about)):
        if len(text) > _LONGEST_WORDS or not text.isprintable():
            raise InvalidInput("a line of text is wanted", where=field, hint=f"at most {_LONGEST_WORDS} characters")


_LONGEST_WORDS = 200


def find_data(tx: Transaction, caller: Caller, reference: str) -> Data:
    """Find visible data by name (the newest version), name@version or sha256: the first of `find_all`. Raise NotFound."""
    found = find_all(tx, caller, reference, limit=1)
    if not found:
        raise NotFound(f"there is no data {reference!r}", hint="deskgrid data list")
    return found[0]


def find_all(tx: Transaction, caller: Caller, reference: str, *, limit: int | None = None) -> list[Data]:
    """Find all visible data with a name, name@version or sha256.

    Where several users have such data: one's own first, then an admin's, then of who had the name first, so that nobody can put
    his data in the place of what others use.
    """
    older = data.alias("older")
    since = sa.select(sa.func.min(older.c.id)).where(older.c.owner_id == data.c.owner_id, older.c.name == data.c.name)
    order = ((data.c.owner_id == caller.user_id).desc(), account.c.admin.desc(), since.scalar_subquery(), data.c.version.desc())
    return [_data(row) for row in tx.rows(_matching(reference).where(_visible(tx, caller)).order_by(*order).limit(limit))]


def find_disk(tx: Transaction, caller: Caller, reference: str) -> Data:
    """Find a disk by reference. Raise NotFound, or InvalidInput if the data is no disk."""
    try:
        found = find_data(tx, caller, reference)
    except NotFound as error:
        raise NotFound(f"there is no disk {reference!r}", hint="deskgrid disk list shows those you may use") from error
    if found.disk is None:
        raise InvalidInput(f"{reference} is a {found.kind}, not a disk", hint="deskgrid disk import FILE --name NAME")
    return found


def list_data(tx: Transaction, caller: Caller, kind: str | None) -> tuple[Data, ...]:
    """Return visible data by name and version."""
    query = _with_owner().where(_visible(tx, caller)).order_by(data.c.name, data.c.owner_id, data.c.version)
    if kind is not None:
        query = query.where(data.c.kind == kind)
    return tuple(_data(row) for row in tx.rows(query))


def versions_of(tx: Transaction, owner_id: int) -> list[Data]:
    """Return all data of a user, the oldest first."""
    return [_data(row) for row in tx.rows(_with_owner().where(data.c.owner_id == owner_id).order_by(data.c.id))]


def remove_data(tx: Transaction, caller: Caller, reference: str) -> None:
    """Remove one version of data (the newest if only a name is given). Jobs keep what they refer to. Raise NotFound, Forbidden."""
    found = find_data(tx, caller, reference)
    thing = Thing(owner_id=found.owner_id, visibility=found.visibility, group=found.group)
    require(tx, caller, "remove_data", thing, see="get_data", missing=NotFound(f"there is no data {reference!r}"))
    tx.run(sa.delete(data).where(data.c.id == found.id))
    tx.memo.pop(PLACED, None)
    for left in (found.blob, *((found.delta.blob,) if found.delta else ())):
        give_up_upload(tx, f"user:{found.owner_id}", left.sha256)  # otherwise it would keep the bytes for its lifetime


def _same(newest: Data, request: RegisterData) -> bool:
    return (newest.blob, newest.disk, newest.visibility, newest.group) == (
        request.blob,
        request.disk,
        request.visibility,
        request.group,
    )


def _with_owner() -> sa.Select[tuple[object, ...]]:
    return sa.select(data, account.c.name.label("owner")).join(account, account.c.id == data.c.owner_id)


def _visible(tx: Transaction, caller: Caller) -> sa.ColumnElement[bool]:
    return visible(tx, caller, "get_data", owner=data.c.owner_id, group=data.c.team, visibility=data.c.visibility)


def _matching(reference: str) -> sa.Select[tuple[object, ...]]:
    if is_sha256(reference):
        return _with_owner().where(sa.or_(data.c.sha256 == reference, data.c.disk_sha256 == reference))
    name, _, version = reference.partition("@")
    query = _with_owner().where(data.c.name == name)
    if not version:
        return query
    if not VERSION.fullmatch(version):
        raise InvalidInput(f"{reference[:80]!r} is not a reference", hint="name, name@version (a number) or sha256")
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
        group=row.team,
        created_at=row.created_at,
        disk=msgspec.json.decode(row.disk, type=Disk) if row.disk else None,
        delta=msgspec.json.decode(row.delta, type=Delta) if row.delta else None,
    )
