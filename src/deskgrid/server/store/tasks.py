"""Tasks of GA4GH TES: what is kept of them beside their jobs. They go with these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import msgspec
import sqlalchemy as sa
from msgspec import Struct

from deskgrid.core.tes import KeptTask, Printed, told_of
from deskgrid.errors import NotFound
from deskgrid.model.ids import JobId, UserId
from deskgrid.model.jobs import Attempt
from deskgrid.model.wire import JobDetail
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.jobs import get_job, jobs_by_id, read_log_end
from deskgrid.server.store.schema import task

__all__ = ["FoundTask", "add_task", "get_task", "printed_of", "tasks_before"]

_AT_ONCE = 64
_READ_BYTES = 1 << 16
"""Of each of an attempt's streams."""


class FoundTask(Struct, frozen=True):
    kept: KeptTask
    detail: JobDetail


def add_task(tx: Transaction, job_id: JobId, owner_id: UserId, kept: KeptTask) -> None:
    """Keep what a task is of which the job was submitted."""
    tx.run(sa.insert(task).values(job_id=job_id, owner_id=owner_id, kept=msgspec.json.encode(kept).decode()))


def get_task(tx: Transaction, caller: Caller, job_id: JobId, action: str = "get_job") -> FoundTask:
    """Return a task, if the caller may see its job. Raise NotFound; Forbidden if he may, but not do this (a route's name)."""
    detail = get_job(tx, caller, job_id, action)
    kept = tx.value(sa.select(task.c.kept).where(task.c.job_id == job_id))
    if kept is None:
        raise NotFound(f"job {job_id} is not a task", hint=f"deskgrid job show {job_id}")
    return FoundTask(msgspec.json.decode(kept, type=KeptTask), detail)


def tasks_before(tx: Transaction, owner_id: UserId, before: int | None) -> Iterator[FoundTask]:
    """Yield a user's tasks, newest first, those older than a number only."""
    while True:
        query = sa.select(task.c.job_id, task.c.kept).where(task.c.owner_id == owner_id)
        query = query.where(task.c.job_id < before) if before is not None else query
        rows = tx.rows(query.order_by(task.c.job_id.desc()).limit(_AT_ONCE))
        details = jobs_by_id(tx, [JobId(row.job_id) for row in rows])
        for row in rows:
            yield FoundTask(msgspec.json.decode(row.kept, type=KeptTask), details[JobId(row.job_id)])
        if len(rows) < _AT_ONCE:
            return
        before = rows[-1].job_id


def printed_of(tx: Transaction, attempts: Sequence[Attempt], *, whole: bool) -> dict[int, Printed]:
    """Return the end of what the attempts that are told of printed, by their numbers; if not `whole`, on stderr only."""
    streams = ("stdout", "stderr") if whole else ("stderr",)
    return {
        one.number: Printed(**{stream: read_log_end(tx, one.id, stream, _READ_BYTES) for stream in streams})
        for one in told_of(attempts)
    }
