"""What is kept in the repository: for whom, for what, until when."""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from deskgrid.model.data import DataKind
from deskgrid.model.wire import Leaving
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import account, app, app_file, blob, data, job, submission, upload

__all__ = ["bytes_by_kind", "bytes_by_user", "kept_bytes", "leaving"]

_SPANS_S = (3600.0, 86400.0, 7 * 86400.0)


def kept_bytes(tx: Transaction, user_id: int) -> int:
    """Return the bytes that are kept for a user: his data, apps, contexts and results, each blob once."""
    return _by_user(tx, user_id).get(user_id, 0)


def bytes_by_user(tx: Transaction) -> dict[str, int]:
    """Return the bytes that each user keeps, by name."""
    names = {row.id: row.name for row in tx.rows(sa.select(account.c.id, account.c.name))}
    return {names[user_id]: kept for user_id, kept in sorted(_by_user(tx, None).items())}


def _by_user(tx: Transaction, user_id: int | None) -> dict[int, int]:
    files = sa.select(app.c.owner_id, app_file.c.sha256, app_file.c.size_bytes).join(app, app.c.id == app_file.c.app_id)
    # What he has sent counts from its beginning, whether something refers to it already or not.
    is_his = upload.c.holder == sa.literal("user:") + sa.cast(account.c.id, sa.String())
    sent = sa.select(account.c.id, upload.c.sha256, upload.c.size_bytes).join(upload, is_his)
    owned = [
        (data.c.owner_id, sa.select(data.c.owner_id, data.c.sha256, data.c.size_bytes)),
        (data.c.owner_id, _deltas()),
        (app.c.owner_id, files),
        *(
            (submission.c.owner_id, sa.select(submission.c.owner_id, sha256, size).where(sha256.is_not(None)))
            for sha256, size in (
                (submission.c.context, submission.c.context_bytes),
                (submission.c.parameters, submission.c.parameters_bytes),
            )
        ),
        (account.c.id, sent),
        (job.c.owner_id, sa.select(job.c.owner_id, job.c.result, job.c.result_bytes).where(job.c.result.is_not(None))),
    ]
    mine = [query if user_id is None else query.where(owner == user_id) for owner, query in owned]
    each: Any = sa.union(*mine).subquery()
    owner, _, size = each.c
    total = sa.cast(sa.func.sum(size), sa.BigInteger())
    return {row[0]: int(row[1] or 0) for row in tx.rows(sa.select(owner, total).group_by(owner))}


def _deltas() -> Any:
    return sa.select(data.c.owner_id, data.c.delta_sha256, blob.c.size_bytes).join(blob, blob.c.sha256 == data.c.delta_sha256)


def bytes_by_kind(tx: Transaction) -> dict[str, int]:
    """Return the bytes of all blobs by what they are kept for: disks, contexts, results, other; the first that fits."""
    sha256 = blob.c.sha256
    kind = sa.case(
        (
            sa.or_(
                sa.exists().where(data.c.sha256 == sha256, data.c.kind == DataKind.DISK.value),
                sa.exists().where(data.c.delta_sha256 == sha256),
                sa.exists().where(submission.c.disk_blob == sha256),
            ),
            "disks",
        ),
        (
            sa.or_(sa.exists().where(submission.c.context == sha256), sa.exists().where(submission.c.parameters == sha256)),
            "contexts",
        ),
        (sa.exists().where(job.c.result == sha256), "results"),
        else_="other",
    ).label("kind")
    each = sa.select(kind, blob.c.size_bytes).subquery()
    total = sa.cast(sa.func.sum(each.c.size_bytes), sa.BigInteger())
    found = {row[0]: int(row[1]) for row in tx.rows(sa.select(each.c.kind, total).group_by(each.c.kind))}
    return {name: found.get(name, 0) for name in ("disks", "contexts", "results", "other")}


def leaving(tx: Transaction, wait_s: float) -> tuple[Leaving, ...]:
    """Return how much is removed within an hour, a day and a week. `wait_s`: from when it is unused until it goes."""
    found, since = [], -1e300
    for span_s in _SPANS_S:
        until = tx.now + span_s
        results = sa.select(sa.func.sum(job.c.result_bytes)).where(job.c.result_until > since, job.c.result_until <= until)
        unused = sa.select(sa.func.sum(blob.c.size_bytes)).where(
            blob.c.unused_since > since - wait_s, blob.c.unused_since <= until - wait_s
        )
        found.append(Leaving(within_s=span_s, size_bytes=int(tx.value(results) or 0) + int(tx.value(unused) or 0)))
        since = until
    return tuple(found)
