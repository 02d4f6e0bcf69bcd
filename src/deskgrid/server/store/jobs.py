"""Jobs as people see them, and what their attempts printed. What changes them is in submissions.py and attempts.py."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import msgspec
import sqlalchemy as sa

from deskgrid.core.lifecycle import FINAL_JOB_STATES
from deskgrid.core.rights import thing_of_job
from deskgrid.errors import NotFound
from deskgrid.model.ids import ArrayId, AttemptId, JobId, Sha256, UserId, WorkerId
from deskgrid.model.jobs import Attempt, AttemptState, Job, JobSpec, JobState
from deskgrid.model.wire import JobDetail
from deskgrid.server.store import attempts, submissions
from deskgrid.server.store.accounts import Caller, require
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import account, attempt, job, log_chunk, queue, submission, worker
from deskgrid.server.store.submissions import SubmissionState

__all__ = [
    "append_log",
    "cancel_array_jobs",
    "cancel_job",
    "completed_since",
    "get_job",
    "jobs_by_id",
    "list_jobs",
    "read_log",
    "read_log_end",
]


def get_job(tx: Transaction, caller: Caller, job_id: JobId, action: str = "get_job") -> JobDetail:
    """Return a job with its attempts, if the caller may see it. Raise NotFound; Forbidden if he may, but not do this (a route's name)."""
    row = tx.row(_jobs().where(job.c.id == job_id))
    missing = NotFound(f"you have no job {job_id}", hint="deskgrid job list")
    if row is None:
        raise missing
    found = _job(row)
    require(tx, caller, action, thing_of_job(found.owner_id, found.spec.group), see="get_job", missing=missing)
    return JobDetail(job=found, attempts=_attempts(tx, [job_id])[job_id])


def jobs_by_id(tx: Transaction, job_ids: Sequence[JobId]) -> dict[JobId, JobDetail]:
    """Return those of these jobs that are there, whosever they are."""
    attempts_of = _attempts(tx, job_ids)
    found = [_job(row) for row in tx.rows(_jobs().where(job.c.id.in_(job_ids)))]
    return {one.id: JobDetail(job=one, attempts=attempts_of[one.id]) for one in found}


def list_jobs(
    tx: Transaction,
    *,
    owner: UserId | None,
    state: JobState | None,
    before: int | None,
    limit: int,
    array: ArrayId | None = None,
    group: str = "",
) -> tuple[tuple[Job, ...], bool]:
    """Return at most `limit` jobs, newest first, and whether there are older ones: those submitted by themselves, or those of an array."""
    query = _jobs().order_by(job.c.id.desc()).limit(limit + 1)
    query = query.where(job.c.position.is_(None) if array is None else job.c.submission_id == array)
    if owner is not None:
        query = query.where(job.c.owner_id == owner)
    if group:
        query = query.where(job.c.queue_id.in_(sa.select(queue.c.id).where(queue.c.team == group).scalar_subquery()))
    if state is not None:
        query = query.where(job.c.state == state.value)
    if before is not None:
        query = query.where(job.c.id < before)
    rows = tx.rows(query)
    return tuple(_job(row) for row in rows[:limit]), len(rows) > limit


def cancel_job(tx: Transaction, caller: Caller, job_id: JobId, message: str) -> Job:
    """Cancel a job and its attempts; a final job stays as it is. Raise NotFound."""
    get_job(tx, caller, job_id, "cancel_job")
    _cancel(tx, job_id, message)
    return get_job(tx, caller, job_id).job


def _cancel(tx: Transaction, job_id: int, message: str) -> None:
    row = tx.row(sa.select(job).where(job.c.id == job_id).with_for_update())
    if row is None or JobState(row.state) in FINAL_JOB_STATES:
        return
    of_job = attempts.Job(JobId(row.id), JobState(row.state), row.queue_id, row.submission_id, row.owner_id, row.position)
    if attempts.move_job(tx, of_job, JobState.CANCELLED, message=message):
        attempts.cancel_attempts(tx, JobId(row.id), message)


def cancel_array_jobs(tx: Transaction, array_id: int, limit: int) -> int:
    """Do a part of clearing away a cancelled array; return how many jobs were cancelled, 0 when it is done."""
    moved = submissions.sweep_cancelled(tx, array_id, limit)
    if moved:
        return moved
    running = submissions.active_of_array(tx, array_id, limit // 10 + 1)
    for job_id in running:
        _cancel(tx, job_id, "its array was cancelled")
    return len(running)


def completed_since(tx: Transaction, since: float) -> int:
    """Return how many jobs completed after `since`."""
    done = sa.select(sa.func.count()).where(job.c.state == JobState.COMPLETED.value, job.c.finished_at > since)
    return int(tx.value(done))


# Output


def append_log(tx: Transaction, attempt_id: AttemptId, stream: str, start: int, chunk: bytes, max_bytes: int) -> None:
    """Append output at `start`, without what is there already and what is past `max_bytes`."""
    row = tx.row(
        sa.select(log_chunk.c.start, sa.func.length(log_chunk.c.data).label("size"))
        .where(log_chunk.c.attempt_id == attempt_id, log_chunk.c.stream == stream)
        .order_by(log_chunk.c.start.desc())
    )
    end = row.start + row.size if row is not None else 0
    begin = max(start, end)
    kept = chunk[begin - start : max(0, max_bytes - start)]
    if kept:
        tx.run(sa.insert(log_chunk).values(attempt_id=attempt_id, stream=stream, start=begin, data=kept))
        tx.topics.append(f"log:{attempt_id}")


def read_log(tx: Transaction, attempt_id: AttemptId, stream: str, offset: int, limit: int) -> tuple[int, bytes]:
    """Return where output was found (at or after `offset`) and at most about `limit` bytes of it, without gaps."""
    rows = tx.rows(
        sa.select(log_chunk)
        .where(
            log_chunk.c.attempt_id == attempt_id,
            log_chunk.c.stream == stream,
            log_chunk.c.start + sa.func.length(log_chunk.c.data) > offset,
        )
        .order_by(log_chunk.c.start)
        .limit(256)
    )
    if not rows:
        return offset, b""
    begin = max(offset, rows[0].start)
    found = bytearray()
    for row in rows:
        if row.start > begin + len(found) or len(found) >= limit:
            break
        found += row.data[begin + len(found) - row.start :]
    return begin, bytes(found)


def read_log_end(tx: Transaction, attempt_id: AttemptId, stream: str, limit: int) -> bytes:
    """Return the last `limit` bytes of output at most."""
    of_stream = (log_chunk.c.attempt_id == attempt_id, log_chunk.c.stream == stream)
    end = log_chunk.c.start + sa.func.length(log_chunk.c.data)
    last = tx.value(sa.select(sa.func.max(end)).where(*of_stream)) or 0
    rows = tx.rows(sa.select(log_chunk).where(*of_stream, end > last - limit).order_by(log_chunk.c.start))
    return b"".join(row.data for row in rows)[-limit:]


# Rows


_OF_SUBMISSION = (
    submission.c.spec,
    submission.c.disk_sha256,
    submission.c.context,
    submission.c.created_at,
    submission.c.names,
    submission.c.state.label("submission_state"),
    submission.c.message.label("submission_message"),
    submission.c.finished_at.label("submission_finished_at"),
)


def _jobs() -> sa.Select[tuple[Any, ...]]:
    joined = job.join(submission, submission.c.id == job.c.submission_id).join(account, account.c.id == job.c.owner_id)
    return sa.select(job, *_OF_SUBMISSION, account.c.name.label("owner")).select_from(joined)


_WAITS = {
    SubmissionState.FILLING: JobState.BLOCKED,
    SubmissionState.BLOCKED: JobState.BLOCKED,
    SubmissionState.CANCELLING: JobState.CANCELLED,
}
"""What a waiting job of an array is while its array stands so."""


def _job(row: Any) -> Job:
    state = JobState(row.state)
    shown = _WAITS.get(row.submission_state, state) if state is JobState.WAITING else state
    swept = shown is JobState.CANCELLED is not state
    names = msgspec.json.decode(row.names, type=tuple[str, ...]) if row.names else ()
    values = msgspec.json.decode(row.parameters, type=tuple[str, ...]) if row.parameters else ()
    return Job(
        id=JobId(row.id),
        owner_id=UserId(row.owner_id),
        owner=row.owner,
        spec=msgspec.json.decode(row.spec, type=JobSpec),
        state=shown,
        created_at=row.created_at,
        finished_at=row.submission_finished_at if swept else row.finished_at,
        disk_sha256=Sha256(row.disk_sha256) if row.disk_sha256 else None,
        context=Sha256(row.context) if row.context else None,
        result=Sha256(row.result) if row.result else None,
        result_bytes=row.result_bytes,
        exit_code=row.exit_code,
        message=row.submission_message if swept else row.message,
        array_id=ArrayId(row.submission_id) if row.position is not None else None,
        index=row.position or 0,
        parameters=dict(zip(names, values, strict=False)),
        value=row.value,
    )


def _attempts(tx: Transaction, job_ids: Sequence[JobId]) -> defaultdict[JobId, tuple[Attempt, ...]]:
    joined = sa.select(attempt, worker.c.name.label("worker")).join(worker, worker.c.id == attempt.c.worker_id)
    found: defaultdict[JobId, tuple[Attempt, ...]] = defaultdict(tuple)
    for row in tx.rows(joined.where(attempt.c.job_id.in_(job_ids)).order_by(attempt.c.job_id, attempt.c.number)):
        found[JobId(row.job_id)] += (_attempt(row),)
    return found


def _attempt(row: Any) -> Attempt:
    return Attempt(
        id=AttemptId(row.id),
        job_id=JobId(row.job_id),
        number=row.number,
        worker_id=WorkerId(row.worker_id),
        worker=row.worker,
        state=AttemptState(row.state),
        leased_at=row.leased_at,
        started_at=row.started_at,
        ended_at=row.ended_at,
        exit_code=row.exit_code,
        reason=row.reason,
    )
