"""What is kept for how long: results, logs and contexts for `retain_s` after their job's end, jobs themselves until they are forgotten.

Everything here is done in small pieces that say how much they did, guards itself by the state it needs, and may be done by several processes
at once. Nothing of a job or array that has not ended is ever touched. Bytes are not removed here: what is not referred to any more goes by
`data.mark_unused` and what follows it.
"""

from __future__ import annotations

from typing import Any

import sqlalchemy as sa

from deskgrid.core.lifecycle import FINAL_JOB_STATES
from deskgrid.errors import Conflict
from deskgrid.model.ids import ArrayId, JobId
from deskgrid.model.jobs import Array, ArrayState, JobState
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.data import give_up_upload
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.jobs import get_job
from deskgrid.server.store.queues import count
from deskgrid.server.store.schema import attempt, dependency, idempotency, job, job_set, log_chunk, queue, submission
from deskgrid.server.store.submissions import SubmissionState, get_array

__all__ = [
    "expire_results",
    "forget_attempt_results",
    "forget_idempotency",
    "forgettable",
    "free_submissions",
    "remove_array_jobs",
    "remove_job",
    "remove_submission",
]

_FINAL = tuple(state.value for state in FINAL_JOB_STATES)
_OVER = (SubmissionState.ENDED.value, SubmissionState.CANCELLED.value)
_ENDED_ARRAY = sa.and_(submission.c.size.is_not(None), submission.c.state.in_(_OVER))


def expire_results(tx: Transaction, limit: int) -> int:
    """Drop results, output and contexts of jobs whose time is over; what they said stays. Return how many jobs."""
    due = sa.select(job.c.id, job.c.submission_id, job.c.position).where(job.c.result_until <= tx.now, job.c.state.in_(_FINAL))
    found = tx.rows(due.order_by(job.c.result_until).limit(limit).with_for_update(skip_locked=True))
    jobs = [row.id for row in found]
    if jobs:
        attempts = sa.select(attempt.c.id).where(attempt.c.job_id.in_(jobs)).scalar_subquery()
        tx.run(sa.delete(log_chunk).where(log_chunk.c.attempt_id.in_(attempts)))
        tx.run(sa.update(attempt).where(attempt.c.job_id.in_(jobs)).values(result=None))
        tx.run(sa.update(job).where(job.c.id.in_(jobs)).values(result=None, result_bytes=None, result_until=None))
        singles = [row.submission_id for row in found if row.position is None]
        tx.run(sa.update(submission).where(submission.c.id.in_(singles)).values(context=None, context_bytes=None))
    return len(jobs)


def free_submissions(tx: Transaction, after: int, limit: int) -> int | None:
    """Let go of what the next ended submissions after an id needed to run; return where to go on, None at the end.

    Their disk and their table go at once, an array's context with the last of its results that expire.
    """
    held = sa.or_(submission.c.disk_blob.is_not(None), submission.c.parameters.is_not(None), submission.c.context.is_not(None))
    window = sa.select(submission.c.id).where(submission.c.id > after, held).order_by(submission.c.id).limit(limit)
    found = [row.id for row in tx.rows(window)]
    if not found:
        return None
    unfinished = sa.exists().where(job.c.submission_id == submission.c.id, job.c.state.not_in(_FINAL))
    over = sa.or_(_ENDED_ARRAY, sa.and_(submission.c.size.is_(None), ~unfinished))
    these = submission.c.id.in_(found)
    tx.run(sa.update(submission).where(these, over).values(disk_blob=None, parameters=None, parameters_bytes=None))
    retained = sa.cast(_spec_retain_s(tx), sa.Float())
    expired = sa.and_(_ENDED_ARRAY, retained > 0, submission.c.finished_at + retained <= tx.now)
    tx.run(sa.update(submission).where(these, expired).values(context=None, context_bytes=None))
    return int(found[-1]) if len(found) == limit else None


def _spec_retain_s(tx: Transaction) -> Any:
    if tx.connection.dialect.name == "postgresql":
        return sa.func.coalesce(sa.cast(submission.c.spec, sa.JSON())["retain_s"].as_string(), "0")
    return sa.func.coalesce(sa.func.json_extract(submission.c.spec, "$.retain_s"), 0)


def forget_attempt_results(tx: Transaction, after: int, limit: int, ended_before: float) -> int | None:
    """Let go of results of the next attempts after an id that are not their ended job's; return where to go on, None at the end."""
    window = sa.select(attempt.c.id).where(attempt.c.id > after, attempt.c.result.is_not(None)).order_by(attempt.c.id).limit(limit)
    found = [row.id for row in tx.rows(window)]
    if not found:
        return None
    other = sa.or_(job.c.result.is_(None), job.c.result != attempt.c.result)
    idle = sa.exists().where(job.c.id == attempt.c.job_id, job.c.state.in_(_FINAL), other)
    tx.run(sa.update(attempt).where(attempt.c.id.in_(found), attempt.c.ended_at < ended_before, idle).values(result=None))
    return int(found[-1]) if len(found) == limit else None


def forget_idempotency(tx: Transaction, before: float, limit: int) -> int:
    """Forget answers to calls made before a time; return how many."""
    key = sa.tuple_(idempotency.c.principal, idempotency.c.key)
    old = sa.select(idempotency.c.principal, idempotency.c.key).where(idempotency.c.created_at < before).limit(limit)
    return int(tx.run(sa.delete(idempotency).where(key.in_(old))).rowcount)


# Jobs and arrays


def forgettable(tx: Transaction, before: float, after: int, limit: int) -> tuple[list[int], int | None]:
    """Return which of the next submissions after an id ended before a time, with all of their set, and where to go on."""
    window = sa.select(submission.c.id).where(submission.c.id > after, submission.c.created_at < before)
    found = [row.id for row in tx.rows(window.order_by(submission.c.id).limit(limit))]
    if not found:
        return [], None
    other = submission.alias("other")
    kin = sa.or_(other.c.id == submission.c.id, other.c.set_id == submission.c.set_id)
    open_job = sa.exists().where(
        job.c.submission_id == other.c.id, sa.or_(job.c.finished_at.is_(None), job.c.finished_at >= before)
    )
    open_array = sa.and_(other.c.size.is_not(None), other.c.state.not_in(_OVER))
    alive = sa.exists().where(kin, sa.or_(open_array, open_job))
    over = sa.select(submission.c.id).where(submission.c.id.in_(found), ~alive).order_by(submission.c.id)
    return [row.id for row in tx.rows(over)], int(found[-1]) if len(found) == limit else None


def remove_job(tx: Transaction, caller: Caller, job_id: JobId) -> None:
    """Remove a job that has ended, with its result. Raise NotFound, Conflict."""
    found = get_job(tx, caller, job_id, "remove_job").job
    if found.array_id is not None:
        raise Conflict(f"job {job_id} is one of array {found.array_id}", hint="the whole array can be removed")
    if found.state not in FINAL_JOB_STATES:
        raise Conflict(f"job {job_id} is {found.state}", hint=f"deskgrid job cancel {job_id}")
    submission_id = tx.value(sa.select(job.c.submission_id).where(job.c.id == job_id))
    if found.context is not None:
        give_up_upload(tx, f"user:{found.owner_id}", found.context)
    while remove_submission(tx, submission_id, 1000):
        pass


def remove_array_jobs(tx: Transaction, caller: Caller, array_id: ArrayId, limit: int) -> bool:
    """Remove some jobs of an array that has ended, and at last the array; return whether some are left. Raise NotFound, Conflict."""
    found: Array = get_array(tx, caller, array_id, "remove_array")
    state = tx.value(sa.select(submission.c.state).where(submission.c.id == array_id))
    if state not in _OVER:
        name = "being cancelled" if found.state is ArrayState.CANCELLED else found.state.value
        raise Conflict(f"array {array_id} is {name}", hint=f"deskgrid array cancel {array_id}, and wait for its end")
    return remove_submission(tx, array_id, limit)


def remove_submission(tx: Transaction, submission_id: int, limit: int) -> bool:
    """Remove some jobs of an ended submission, and with the last of them the submission; return whether some are left. Idempotent."""
    tx.settle()  # the counts that are looked at below are to be whole
    row = tx.row(sa.select(submission).where(submission.c.id == submission_id).with_for_update())
    if row is None or (row.size is not None and row.state not in _OVER):
        return False
    window = sa.select(job.c.id, job.c.queue_id, job.c.state).where(job.c.submission_id == submission_id).order_by(job.c.position)
    found = tx.rows(window.limit(limit).with_for_update())
    if any(each.state not in _FINAL for each in found):
        return False
    if found:
        _remove_jobs(tx, found)
        if len(found) == limit:
            return True
    _remove_rest(tx, row)
    return False


def _remove_jobs(tx: Transaction, found: list[Any]) -> None:
    jobs = [each.id for each in found]
    attempts = sa.select(attempt.c.id).where(attempt.c.job_id.in_(jobs)).scalar_subquery()
    tx.run(sa.delete(log_chunk).where(log_chunk.c.attempt_id.in_(attempts)))
    tx.run(sa.delete(attempt).where(attempt.c.job_id.in_(jobs)))
    tx.run(sa.delete(job).where(job.c.id.in_(jobs)))
    for each in found:
        count(tx, each.queue_id, JobState(each.state), None)
    tx.settle()


def _remove_rest(tx: Transaction, row: Any) -> None:
    """Remove a submission without jobs, its own queue, and its set once that is empty."""
    tx.run(sa.delete(dependency).where(sa.or_(dependency.c.submission_id == row.id, dependency.c.on_submission_id == row.id)))
    tx.run(sa.update(submission).where(submission.c.id == row.id).values(queue_id=None))
    tx.run(sa.delete(queue).where(queue.c.array_id == row.id))
    tx.run(sa.delete(submission).where(submission.c.id == row.id))
    if row.set_id is not None:
        empty = ~sa.exists().where(submission.c.set_id == job_set.c.id)
        tx.run(sa.delete(job_set).where(job_set.c.id == row.set_id, empty))
    tx.memo.pop("board", None)
    tx.memo.get("common", {}).pop(row.id, None)
