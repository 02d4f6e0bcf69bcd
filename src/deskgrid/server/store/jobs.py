"""Jobs, attempts and the queues they wait in. The only place where a state changes; the guards come from core/lifecycle.py."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import sqlalchemy as sa

from deskgrid.core.lifecycle import FINAL_JOB_STATES, LIVE_STATES, AttemptEvent, Tally, applies, job_state, sources
from deskgrid.core.matching import Queue, Requirement, Share, requirement_of
from deskgrid.errors import NotFound
from deskgrid.model.data import Blob, DataRef
from deskgrid.model.ids import AttemptId, JobId, Sha256, UserId, WorkerId
from deskgrid.model.jobs import Attempt, AttemptState, Job, JobSpec, JobState
from deskgrid.model.users import Role
from deskgrid.model.wire import JobDetail
from deskgrid.model.workers import Assignment
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import account, attempt, job, log_chunk, queue, requirement, worker

__all__ = [
    "WORK",
    "add_job",
    "append_log",
    "apply_event",
    "attempt_row",
    "cancel_job",
    "completed_since",
    "count_states",
    "expire_leases",
    "get_job",
    "job_topic",
    "lease_jobs",
    "list_jobs",
    "live_attempts",
    "live_by_owner",
    "read_log",
    "renew_lease",
    "waiting_queues",
    "worker_topic",
]

WORK = "work"
"""Topic: a job waits that did not before."""
_LIVE = tuple(state.value for state in LIVE_STATES)
_ENDED = (AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.LOST, AttemptState.REFUSED, AttemptState.CANCELLED)
_REFUSAL_MEMORY_S = 600.0


def job_topic(job_id: int) -> str:
    """Topic: a job or one of its attempts changed."""
    return f"job:{job_id}"


def worker_topic(worker_id: int) -> str:
    """Topic: something of a worker's was decided elsewhere."""
    return f"worker:{worker_id}"


# Jobs


def add_job(tx: Transaction, caller: Caller, spec: JobSpec, disk: DataRef, context: Blob | None) -> Job:
    """Add a waiting job. `disk` is resolved already."""
    if disk.disk is None or caller.user_id is None:
        raise ValueError("a job needs a disk and a user")
    wanted = requirement_of(spec, disk.disk.sha256)
    added = tx.run(
        sa.insert(job).values(
            owner_id=caller.user_id,
            class_id=_class_of(tx, wanted),
            state=JobState.WAITING.value,
            spec=msgspec.json.encode(spec).decode(),
            disk=msgspec.json.encode(disk).decode(),
            disk_blob=disk.blob.sha256,
            disk_sha256=disk.disk.sha256,
            context=context.sha256 if context else None,
            context_bytes=context.size_bytes if context else None,
            created_at=tx.now,
        )
    )
    job_id = int(added.inserted_primary_key[0])  # type: ignore[index]
    row = _job_row(tx, job_id)
    _count(tx, row, +1)
    tx.topics += [WORK, job_topic(job_id)]
    return _job(row)


def get_job(tx: Transaction, caller: Caller, job_id: JobId) -> JobDetail:
    """Return a job with its attempts, if the caller may see it. Raise NotFound."""
    row = tx.row(_jobs().where(job.c.id == job_id))
    if row is None or (row.owner_id != caller.user_id and caller.role is not Role.ADMIN):
        raise NotFound(f"you have no job {job_id}", hint="deskgrid job list")
    return JobDetail(job=_job(row), attempts=_attempts(tx, job_id))


def list_jobs(
    tx: Transaction, *, owner: UserId | None, state: JobState | None, before: int | None, limit: int
) -> tuple[tuple[Job, ...], bool]:
    """Return at most `limit` jobs, newest first, and whether there are older ones."""
    query = _jobs().order_by(job.c.id.desc()).limit(limit + 1)
    if owner is not None:
        query = query.where(job.c.owner_id == owner)
    if state is not None:
        query = query.where(job.c.state == state.value)
    if before is not None:
        query = query.where(job.c.id < before)
    rows = tx.rows(query)
    return tuple(_job(row) for row in rows[:limit]), len(rows) > limit


def cancel_job(tx: Transaction, caller: Caller, job_id: JobId, message: str) -> Job:
    """Cancel a job and its attempts; a final job stays as it is. Raise NotFound."""
    detail = get_job(tx, caller, job_id)
    if detail.job.state not in FINAL_JOB_STATES:
        _move_job(tx, _job_row(tx, job_id), JobState.CANCELLED, message=message)
        _cancel_others(tx, job_id, message)
    return _job(_job_row(tx, job_id))


def count_states(tx: Transaction) -> dict[JobState, int]:
    """Return how many jobs are in each state."""
    rows = tx.rows(sa.select(job.c.state, sa.func.count()).group_by(job.c.state))
    return dict.fromkeys(JobState, 0) | {JobState(row[0]): row[1] for row in rows}


def completed_since(tx: Transaction, since: float) -> int:
    """Return how many jobs completed after `since`."""
    done = sa.select(sa.func.count()).where(job.c.state == JobState.COMPLETED.value, job.c.finished_at > since)
    return int(tx.value(done))


# Matching


def waiting_queues(tx: Transaction) -> list[Queue]:
    """Return all queues with waiting jobs. Their number depends on how different jobs are, not on how many wait."""
    oldest = (
        sa.select(sa.func.min(job.c.id))
        .where(job.c.state == JobState.WAITING.value, job.c.class_id == queue.c.class_id, job.c.owner_id == queue.c.owner_id)
        .scalar_subquery()
    )
    rows = tx.rows(
        sa.select(queue, requirement.c.key, oldest.label("oldest"))
        .join(requirement, requirement.c.id == queue.c.class_id)
        .where(queue.c.waiting > 0)
    )
    return [
        Queue(
            class_id=row.class_id,
            owner_id=UserId(row.owner_id),
            requirement=msgspec.json.decode(row.key, type=Requirement),
            waiting=row.waiting,
            oldest=row.oldest or 0,
        )
        for row in rows
    ]


def live_by_owner(tx: Transaction) -> dict[UserId, int]:
    """Return how many live attempts each user has."""
    query = (
        sa.select(job.c.owner_id, sa.func.count())
        .select_from(attempt.join(job, job.c.id == attempt.c.job_id))
        .where(attempt.c.state.in_(_LIVE))
        .group_by(job.c.owner_id)
    )
    return {UserId(row[0]): row[1] for row in tx.rows(query)}


def lease_jobs(tx: Transaction, worker_id: WorkerId, shares: Iterable[Share], lease_s: float) -> list[Assignment]:
    """Lease the oldest jobs of each share to a worker, except those that it refused a moment ago."""
    leased: list[Assignment] = []
    for share in shares:
        refused = sa.exists().where(
            attempt.c.job_id == job.c.id,
            attempt.c.worker_id == worker_id,
            attempt.c.state == AttemptState.REFUSED.value,
            attempt.c.ended_at > tx.now - _REFUSAL_MEMORY_S,
            attempt.c.reason != "",
        )
        waiting = _jobs().where(
            job.c.state == JobState.WAITING.value, job.c.class_id == share.class_id, job.c.owner_id == share.owner_id, ~refused
        )
        leased += [_lease(tx, row, worker_id, lease_s) for row in tx.rows(waiting.order_by(job.c.id).limit(share.count))]
    return leased


def _lease(tx: Transaction, row: Any, worker_id: WorkerId, lease_s: float) -> Assignment:
    last: int | None = tx.value(sa.select(sa.func.max(attempt.c.number)).where(attempt.c.job_id == row.id))
    number = (last or 0) + 1
    added = tx.run(
        sa.insert(attempt).values(
            job_id=row.id,
            number=number,
            worker_id=worker_id,
            state=AttemptState.LEASED.value,
            leased_at=tx.now,
            lease_expires_at=tx.now + lease_s,
        )
    )
    _move_job(tx, row, JobState.ACTIVE)
    found = _job(row)
    return Assignment(
        attempt_id=AttemptId(int(added.inserted_primary_key[0])),  # type: ignore[index]
        job_id=found.id,
        number=number,
        spec=found.spec,
        disk=msgspec.json.decode(row.disk, type=DataRef),
        context=Blob(sha256=found.context, size_bytes=row.context_bytes) if found.context else None,
    )


# Attempts


def attempt_row(tx: Transaction, attempt_id: AttemptId, worker_id: WorkerId) -> Any | None:
    """Return an attempt of a worker's with its job's state, spec and owner, or None."""
    if not 0 < attempt_id < 1 << 63:  # what databases take for a number
        return None
    joined = attempt.join(job, job.c.id == attempt.c.job_id)
    of_job = (job.c.state.label("job_state"), job.c.spec.label("job_spec"), job.c.owner_id.label("job_owner_id"))
    query = sa.select(attempt, *of_job).select_from(joined)
    return tx.row(query.where(attempt.c.id == attempt_id, attempt.c.worker_id == worker_id))


def live_attempts(tx: Transaction, worker_id: WorkerId) -> list[Any]:
    """Return the live attempts of a worker."""
    return tx.rows(sa.select(attempt).where(attempt.c.worker_id == worker_id, attempt.c.state.in_(_LIVE)))


def renew_lease(tx: Transaction, attempt_id: AttemptId, expires_at: float) -> None:
    """Let a live attempt's lease run until `expires_at`."""
    tx.run(sa.update(attempt).where(attempt.c.id == attempt_id, attempt.c.state.in_(_LIVE)).values(lease_expires_at=expires_at))


def apply_event(
    tx: Transaction,
    attempt_id: AttemptId,
    event: AttemptEvent,
    *,
    exit_code: int | None = None,
    reason: str = "",
    result: Blob | None = None,
) -> bool:
    """Apply an event to an attempt and all that follows for its job. Return False if it does not apply in its state.

    The statement that changes the state is guarded by the transition table, so two events never both win.
    """
    joined = sa.select(attempt, job.c.state.label("job_state")).join(job, job.c.id == attempt.c.job_id)
    row = tx.row(joined.where(attempt.c.id == attempt_id).with_for_update())
    if row is None:
        return False
    old = AttemptState(row.state)
    new = applies(old, event, JobState(row.job_state))
    if new is None:
        return False
    values: dict[str, Any] = {"state": new.value}
    if new is AttemptState.RUNNING and row.started_at is None:
        values["started_at"] = tx.now
    if new is AttemptState.RUNNING:
        values["suspended_at"] = None
    if new is AttemptState.SUSPENDED and row.suspended_at is None:
        values["suspended_at"] = tx.now
    if new in _ENDED and old is not new:
        values |= {"ended_at": tx.now, "reason": reason[:2000], "exit_code": exit_code}
        values["result"] = result.sha256 if result else None
    elif old is AttemptState.LOST and new in LIVE_STATES:
        values |= {"ended_at": None, "reason": ""}
    guard = (attempt.c.id == attempt_id, attempt.c.state.in_([state.value for state in sources(event)]))
    if not tx.run(sa.update(attempt).where(*guard).values(**values)).rowcount:
        return False
    if new is not old:
        _after_attempt(tx, row.job_id, new, exit_code=exit_code, reason=reason, result=result)
    return True


def _after_attempt(
    tx: Transaction, job_id: JobId, ended: AttemptState, *, exit_code: int | None, reason: str, result: Blob | None
) -> None:
    """Move the job to where its attempts put it."""
    row = _job_row(tx, job_id)
    spec = msgspec.json.decode(row.spec, type=JobSpec)
    counts = dict(_tally(tx, job_id))
    tally = Tally(
        live=sum(counts.get(state, 0) for state in LIVE_STATES),
        succeeded=counts.get(AttemptState.SUCCEEDED, 0),
        failed=counts.get(AttemptState.FAILED, 0),
        lost=counts.get(AttemptState.LOST, 0),
        max_failed=spec.limits.attempts,
        max_lost=spec.limits.max_lost,
    )
    old = JobState(row.state)
    new = job_state(old, tally)
    tx.topics.append(job_topic(job_id))
    if new is old:
        return
    values: dict[str, Any] = {}
    if new in FINAL_JOB_STATES:
        values |= {"exit_code": exit_code, "result": result.sha256 if result else None}
        values["result_bytes"] = result.size_bytes if result else None
    if new is JobState.FAILED:
        values["message"] = _why_failed(tally, ended, reason)
    _move_job(tx, row, new, **values)
    if new in FINAL_JOB_STATES:
        _cancel_others(tx, job_id, f"the job is {new.value}")


def _why_failed(tally: Tally, ended: AttemptState, reason: str) -> str:
    count, word = (tally.failed, "failed") if ended is AttemptState.FAILED else (tally.lost, "were lost")
    return f"{count} attempts {word}, the last because {reason}" if count > 1 else reason


def _tally(tx: Transaction, job_id: JobId) -> list[tuple[AttemptState, int]]:
    rows = tx.rows(sa.select(attempt.c.state, sa.func.count()).where(attempt.c.job_id == job_id).group_by(attempt.c.state))
    return [(AttemptState(row[0]), row[1]) for row in rows]


def _cancel_others(tx: Transaction, job_id: JobId, reason: str) -> None:
    """Cancel what is still live of a job that is over, and tell the workers, those of lost attempts too: they may still run."""
    rows = tx.rows(sa.select(attempt).where(attempt.c.job_id == job_id, attempt.c.state.in_([*_LIVE, AttemptState.LOST.value])))
    for row in rows:
        tx.topics.append(worker_topic(row.worker_id))
    ends = [state.value for state in sources(AttemptEvent.CANCELLED)]
    over = sa.update(attempt).where(attempt.c.job_id == job_id, attempt.c.state.in_(ends))
    tx.run(over.values(state=AttemptState.CANCELLED.value, ended_at=tx.now, reason=reason))


def expire_leases(tx: Transaction, limit: int = 500) -> int:
    """Make attempts whose lease has run out lost; return how many."""
    over = sa.select(attempt.c.id, worker.c.name).join(worker, worker.c.id == attempt.c.worker_id)
    rows = tx.rows(over.where(attempt.c.state.in_(_LIVE), attempt.c.lease_expires_at < tx.now).limit(limit))
    for row in rows:
        apply_event(tx, row.id, AttemptEvent.EXPIRED, reason=f"nothing was heard of worker {row.name}")
    return len(rows)


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


# Rows


def _class_of(tx: Transaction, wanted: Requirement) -> int:
    key = msgspec.json.encode(wanted).decode()
    found: int | None = tx.value(sa.select(requirement.c.id).where(requirement.c.key == key))
    if found is not None:
        return found
    return int(tx.run(sa.insert(requirement).values(key=key)).inserted_primary_key[0])  # type: ignore[index]


def _move_job(tx: Transaction, row: Any, new: JobState, **values: Any) -> None:
    """Change a job's state and the queue's count with it."""
    if new in FINAL_JOB_STATES:
        values["finished_at"] = tx.now
    moved = tx.run(sa.update(job).where(job.c.id == row.id, job.c.state == row.state).values(state=new.value, **values))
    if not moved.rowcount:
        return
    was_waiting, waits = row.state == JobState.WAITING.value, new is JobState.WAITING
    if was_waiting != waits:
        _count(tx, row, +1 if waits else -1)
    if waits:
        tx.topics.append(WORK)
    tx.topics.append(job_topic(row.id))


def _count(tx: Transaction, row: Any, by: int) -> None:
    of = (queue.c.class_id == row.class_id, queue.c.owner_id == row.owner_id)
    if not tx.run(sa.update(queue).where(*of).values(waiting=queue.c.waiting + by)).rowcount:
        tx.run(sa.insert(queue).values(class_id=row.class_id, owner_id=row.owner_id, waiting=by))


def _jobs() -> sa.Select[tuple[Any, ...]]:
    return sa.select(job, account.c.name.label("owner")).join(account, account.c.id == job.c.owner_id)


def _job_row(tx: Transaction, job_id: int) -> Any:
    return tx.row(_jobs().where(job.c.id == job_id))


def _job(row: Any) -> Job:
    return Job(
        id=JobId(row.id),
        owner_id=UserId(row.owner_id),
        owner=row.owner,
        spec=msgspec.json.decode(row.spec, type=JobSpec),
        state=JobState(row.state),
        created_at=row.created_at,
        finished_at=row.finished_at,
        disk_sha256=Sha256(row.disk_sha256),
        context=Sha256(row.context) if row.context else None,
        result=Sha256(row.result) if row.result else None,
        result_bytes=row.result_bytes,
        exit_code=row.exit_code,
        message=row.message,
    )


def _attempts(tx: Transaction, job_id: JobId) -> tuple[Attempt, ...]:
    joined = sa.select(attempt, worker.c.name.label("worker")).join(worker, worker.c.id == attempt.c.worker_id)
    return tuple(
        Attempt(
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
        for row in tx.rows(joined.where(attempt.c.job_id == job_id).order_by(attempt.c.number))
    )
