"""Attempts: leases and what is told of them. The only place where attempts change, and jobs because of them.

The guards come from core/lifecycle.py. These are the statements that run for every job of the grid, so they are compiled once and run by
the database's driver itself (statement.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa
from msgspec import Struct

from deskgrid.core.lifecycle import FINAL_JOB_STATES, LIVE_STATES, AttemptEvent, Tally, applies, job_state, sources
from deskgrid.model.data import Blob, DataFile, DataRef
from deskgrid.model.ids import AttemptId, JobId, Sha256, UserId, WorkerId
from deskgrid.model.jobs import AttemptState, JobSpec, JobState
from deskgrid.model.workers import Assignment
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.queues import come_back, count, note_use, revoked_queues
from deskgrid.server.store.schema import (
    IS_LIVE,
    WITHOUT_SECRETS,
    attempt,
    job,
    pilot_use,
    queue,
    submission,
    submission_data,
    worker,
)
from deskgrid.server.store.statement import Statement, constant
from deskgrid.server.store.submissions import WORK, array_topic, forget_secrets, held_until_started, job_topic, tell_dependants

__all__ = [
    "Held",
    "Job",
    "Outcome",
    "apply_event",
    "assignments",
    "attempt_row",
    "cancel_attempts",
    "common",
    "expire_leases",
    "fail_revoked",
    "held_by",
    "is_console_wanted",
    "lease",
    "max_suspend_s",
    "move_job",
    "renew_leases",
    "sets_of",
    "settle_pilot",
    "want_console",
    "wants_files",
    "worker_topic",
]

_ENDED = frozenset({AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.LOST, AttemptState.REFUSED, AttemptState.CANCELLED})
_REFUSAL_MEMORY_S = 600.0
_LONGEST_REASON = 2000


def worker_topic(worker_id: int) -> str:
    """Topic: something of a worker's was decided elsewhere."""
    return f"worker:{worker_id}"


class Job(NamedTuple):
    """What must be known of a job to move it."""

    id: JobId
    state: JobState
    queue_id: int
    submission_id: int
    owner_id: UserId
    position: int | None


class Held(NamedTuple):
    """An attempt with its job."""

    id: AttemptId
    number: int
    worker_id: WorkerId
    state: AttemptState
    leased_at: float
    started_at: float | None
    suspended_at: float | None
    ended_at: float | None
    console_until: float | None
    job: Job


class Outcome(Struct, frozen=True):
    """What comes with the end of an attempt."""

    exit_code: int | None = None
    reason: str = ""
    result: Blob | None = None
    value: bytes | None = None


# What all jobs of a submission have in common


class Common(Struct, frozen=True):
    """What leasing and ending a job needs of its submission, which never changes."""

    owner_id: UserId
    spec: JobSpec
    disk: DataRef | None
    context: Blob | None
    data: tuple[DataFile, ...]
    programs: dict[str, Blob]
    names: tuple[str, ...]
    set_id: int | None


_MOST_COMMON = 2000


def common(tx: Transaction, submission_id: int) -> Common:
    """Return what the jobs of a submission have in common."""
    known: dict[int, Common] = tx.memo.setdefault("common", {})
    found = known.get(submission_id)
    if found is None:
        row: Any = tx.row(sa.select(*WITHOUT_SECRETS).where(submission.c.id == submission_id))
        spec = msgspec.json.decode(row.spec, type=JobSpec)
        found = Common(
            owner_id=UserId(row.owner_id),
            spec=spec,
            disk=msgspec.json.decode(row.disk, type=DataRef) if row.disk else None,
            context=Blob(sha256=row.context, size_bytes=row.context_bytes) if row.context else None,
            data=_data_of(tx, submission_id) if spec.data else (),
            programs=msgspec.json.decode(row.programs, type=dict[str, Blob]) if row.programs else {},
            names=msgspec.json.decode(row.names, type=tuple[str, ...]) if row.names else (),
            set_id=row.set_id,
        )
        while len(known) >= _MOST_COMMON:
            known.pop(next(iter(known)))
        known[submission_id] = found
    return found


def _data_of(tx: Transaction, submission_id: int) -> tuple[DataFile, ...]:
    mine = submission_data.c.submission_id == submission_id
    rows = tx.rows(sa.select(submission_data).where(mine).order_by(submission_data.c.name))
    return tuple(DataFile(name=row.name, blob=Blob(sha256=Sha256(row.sha256), size_bytes=row.size_bytes)) for row in rows)


# Leasing


_REFUSED = (
    sa.select(attempt.c.id)
    .where(
        attempt.c.job_id == job.c.id,
        attempt.c.worker_id == sa.bindparam("worker_id"),
        attempt.c.state == constant(AttemptState.REFUSED.value),
        attempt.c.ended_at > sa.bindparam("refused_after"),
        attempt.c.reason != "",
    )
    .exists()
)
_CANDIDATES = Statement(
    sa.select(job.c.id, job.c.submission_id, job.c.position, job.c.parameters)
    .where(
        job.c.queue_id == sa.bindparam("queue_id"),
        job.c.state == constant(JobState.WAITING.value),
        job.c.id >= sa.bindparam("head"),
        ~_REFUSED,
    )
    .order_by(job.c.id)
    .limit(sa.bindparam("most"))
    .with_for_update(of=job, skip_locked=True)
)
_NEXT_NUMBER = sa.func.coalesce(sa.func.max(attempt.c.number), 0) + 1
_ADD_ATTEMPT = Statement(
    sa.insert(attempt)
    .from_select(
        ["job_id", "number", "worker_id", "state", "leased_at", "lease_expires_at", "reason"],
        sa.select(
            sa.bindparam("job_id", type_=sa.BigInteger()),
            _NEXT_NUMBER,
            sa.bindparam("worker_id", type_=sa.BigInteger()),
            constant(AttemptState.LEASED.value),
            sa.bindparam("leased_at", type_=sa.Float()),
            sa.bindparam("expires_at", type_=sa.Float()),
            constant(""),
        ).where(attempt.c.job_id == sa.bindparam("of_job", type_=sa.BigInteger())),
        include_defaults=False,
    )
    .returning(attempt.c.id, attempt.c.number)
)
_ACTIVATE = Statement(
    sa.update(job)
    .where(job.c.id == sa.bindparam("job_id"), job.c.state == constant(JobState.WAITING.value))
    .values(state=constant(JobState.ACTIVE.value))
)


def lease(tx: Transaction, worker_id: WorkerId, queue_id: int, most: int, lease_s: float, *, head: int = 0) -> list[Assignment]:
    """Lease the oldest waiting jobs of a queue, with ids from `head` on, except those that this worker refused a moment ago.

    Secrets in them are as they came: sealed to the server (server/secrets.py). What another process leases at this moment is passed over. `Assignment.class_id` is the caller's to fill in, and the program to choose.
    """
    leased = []
    candidates = tx.fast(
        _CANDIDATES, queue_id=queue_id, worker_id=worker_id, refused_after=tx.now - _REFUSAL_MEMORY_S, head=head, most=most
    )
    for job_id, submission_id, position, parameters in candidates:
        if not tx.change(_ACTIVATE, job_id=job_id):
            continue
        [(attempt_id, number)] = tx.fast(
            _ADD_ATTEMPT, job_id=job_id, of_job=job_id, worker_id=worker_id, leased_at=tx.now, expires_at=tx.now + lease_s
        )
        tx.topics.append(job_topic(job_id))
        leased.append(_assignment(tx, attempt_id, job_id, number, submission_id, position, parameters))
    if leased:
        count(tx, queue_id, JobState.WAITING, JobState.ACTIVE, len(leased))
    return leased


def _assignment(
    tx: Transaction, attempt_id: int, job_id: int, number: int, submission_id: int, position: int | None, parameters: str | None
) -> Assignment:
    shared = common(tx, submission_id)
    values = msgspec.json.decode(parameters, type=list[str]) if parameters else ()
    return Assignment(
        attempt_id=AttemptId(attempt_id),
        job_id=JobId(job_id),
        number=number,
        owner_id=shared.owner_id,
        spec=shared.spec,
        disk=shared.disk,
        context=shared.context,
        data=shared.data,
        programs=shared.programs,
        hold=held_until_started(tx, shared.set_id),
        secrets=_sealed(tx, submission_id) if shared.spec.secrets else b"",
        in_array=position is not None,
        index=position or 0,
        parameters=dict(zip(shared.names, values, strict=False)),
    )


_MOST_SEALED = 16


def _sealed(tx: Transaction, submission_id: int) -> bytes:
    """Return the secrets of a submission as the server has them. Few are kept at hand: they are long, and an array's jobs have the same."""
    known: dict[int, bytes] = tx.memo.setdefault("sealed", {})
    if submission_id not in known:
        while len(known) >= _MOST_SEALED:
            known.pop(next(iter(known)))
        known[submission_id] = tx.value(sa.select(submission.c.secrets).where(submission.c.id == submission_id)) or b""
    return known[submission_id]


def assignments(tx: Transaction, held: Iterable[Held]) -> list[Assignment]:
    """Return the assignments of attempts once more, for a worker that did not get them the first time."""
    found = []
    for one in held:
        parameters: str | None = tx.value(sa.select(job.c.parameters).where(job.c.id == one.job.id))
        assignment = _assignment(tx, one.id, one.job.id, one.number, one.job.submission_id, one.job.position, parameters)
        class_id = tx.value(sa.select(queue.c.class_id).where(queue.c.id == one.job.queue_id))
        found.append(msgspec.structs.replace(assignment, class_id=class_id))
    return found


def sets_of(tx: Transaction, leased: Iterable[Assignment]) -> set[int]:
    """Return the sets of which attempts were leased that are held."""
    found = (tx.value(sa.select(submission.c.set_id).join(job).where(job.c.id == one.job_id)) for one in leased if one.hold)
    return {set_id for set_id in found if set_id is not None}


def wants_files(tx: Transaction, held: Held) -> bool:
    """Tell whether a job is to bring files back."""
    return bool(common(tx, held.job.submission_id).spec.results.paths)


def max_suspend_s(tx: Transaction, held: Held) -> float:
    """Return how long a suspended attempt of a job keeps its lease."""
    return common(tx, held.job.submission_id).spec.limits.max_suspend_s


# What is held


_HELD = (
    attempt.c.id,
    attempt.c.number,
    attempt.c.worker_id,
    attempt.c.state,
    attempt.c.leased_at,
    attempt.c.started_at,
    attempt.c.suspended_at,
    attempt.c.ended_at,
    attempt.c.console_until,
    job.c.id.label("job_id"),
    job.c.state.label("job_state"),
    job.c.queue_id,
    job.c.submission_id,
    job.c.owner_id,
    job.c.position,
)
# The job stands first, so that it is locked first, as by those that cancel it: no two processes wait for each other.
_WITH_JOB = sa.select(*_HELD).select_from(job.join(attempt, job.c.id == attempt.c.job_id))
_HELD_BY = Statement(_WITH_JOB.where(attempt.c.worker_id == sa.bindparam("worker_id"), IS_LIVE).with_for_update())
_ONE = Statement(_WITH_JOB.where(attempt.c.id == sa.bindparam("attempt_id")).with_for_update())


def _held(row: tuple[Any, ...]) -> Held:
    attempt_id, number, worker_id, state, leased_at, started_at, suspended_at, ended_at, console_until, job_id, of_job, *rest = row
    moved = Job(job_id, JobState(of_job), *rest)
    times = (leased_at, started_at, suspended_at, ended_at, console_until)
    return Held(attempt_id, number, worker_id, AttemptState(state), *times, moved)


def held_by(tx: Transaction, worker_id: WorkerId) -> dict[AttemptId, Held]:
    """Return the live attempts of a worker."""
    return {row[0]: _held(row) for row in tx.fast(_HELD_BY, worker_id=worker_id)}


def attempt_row(tx: Transaction, attempt_id: AttemptId, worker_id: WorkerId) -> Held | None:
    """Return an attempt of a worker's, or None."""
    found = _find(tx, attempt_id)
    return found if found is not None and found.worker_id == worker_id else None


def _find(tx: Transaction, attempt_id: int) -> Held | None:
    if not 0 < attempt_id < 1 << 63:  # what databases take for a number
        return None
    rows = tx.fast(_ONE, attempt_id=attempt_id)
    return _held(rows[0]) if rows else None


_RENEW = Statement(
    sa.update(attempt)
    .where(attempt.c.id == sa.bindparam("attempt_id"), IS_LIVE)
    .values(lease_expires_at=sa.bindparam("expires_at"))
)


def renew_leases(tx: Transaction, leases: Iterable[tuple[AttemptId, float]]) -> None:
    """Let live attempts' leases run until the times given."""
    tx.change_many(_RENEW, [{"attempt_id": attempt_id, "expires_at": expires_at} for attempt_id, expires_at in leases])


def want_console(tx: Transaction, attempt_id: AttemptId, until: float) -> None:
    """Note that the screen of a live attempt's machine is wanted until then, and tell its worker if it does not know."""
    held = _find(tx, attempt_id)
    if held is None or held.state not in LIVE_STATES:
        return
    tx.run(sa.update(attempt).where(attempt.c.id == held.id).values(console_until=until))
    if not is_console_wanted(tx, held):
        tx.topics.append(worker_topic(held.worker_id))


def is_console_wanted(tx: Transaction, held: Held) -> bool:
    """Tell whether somebody wants to see an attempt's screen now."""
    return held.console_until is not None and held.console_until > tx.now


# What happens


def _change_to(event: AttemptEvent) -> Statement:
    allowed = [constant(state.value) for state in sources(event)]
    return Statement(
        sa.update(attempt)
        .where(attempt.c.id == sa.bindparam("attempt_id"), attempt.c.state.in_(allowed))
        .values(
            state=sa.bindparam("new"),
            started_at=sa.bindparam("begun_at"),
            suspended_at=sa.bindparam("halted_at"),
            ended_at=sa.bindparam("over_at"),
            exit_code=sa.bindparam("code"),
            reason=sa.bindparam("why"),
            result=sa.bindparam("sha256"),
        )
    )


_CHANGES = {event: _change_to(event) for event in AttemptEvent}


def apply_event(tx: Transaction, attempt_id: AttemptId | Held, event: AttemptEvent, outcome: Outcome = Outcome()) -> bool:  # noqa: B008 - frozen
    """Apply an event to an attempt and all that follows for its job. Return False if it does not apply in its state.

    The statement that changes the state is guarded by the transition table, so two events never both win.
    """
    held = attempt_id if isinstance(attempt_id, Held) else _find(tx, attempt_id)
    new = applies(held.state, event, held.job.state) if held is not None else None
    if held is None or new is None:
        return False
    if new is held.state and new in LIVE_STATES:
        return True
    over = new in _ENDED
    changed = tx.change(
        _CHANGES[event],
        attempt_id=held.id,
        new=new.value,
        begun_at=tx.now if new is AttemptState.RUNNING and held.started_at is None else held.started_at,
        halted_at=_halted_at(tx, held, new),
        over_at=tx.now if over else None,
        code=outcome.exit_code if over else None,
        why=outcome.reason[:_LONGEST_REASON] if over else "",
        sha256=outcome.result.sha256 if over and outcome.result else None,
    )
    if not changed:
        return False
    if over and held.state in LIVE_STATES:
        _charge(tx, held, may_come_back=new is AttemptState.LOST)
    elif new in LIVE_STATES and held.ended_at is not None:
        _note_use(tx, held, -_cpu_s(tx, held, held.ended_at))  # it was lost, and is charged for all of its time when it ends
    _after_attempt(tx, held, new, outcome)
    return True


def _halted_at(tx: Transaction, held: Held, new: AttemptState) -> float | None:
    if new is AttemptState.RUNNING:
        return None
    return tx.now if new is AttemptState.SUSPENDED and held.suspended_at is None else held.suspended_at


PILOT_ENDS: list[Callable[[Transaction, AttemptId, bool], None]] = []
"""Called with (tx, attempt_id, whether it may come back) when the attempt of a pilot has ended."""


def _charge(tx: Transaction, held: Held, *, may_come_back: bool = False) -> None:
    """Charge the time of an attempt that has ended to its user. What a pilot's jobs were charged for is his no more when it has ended, too."""
    _note_use(tx, held, _cpu_s(tx, held, tx.now))
    if common(tx, held.job.submission_id).spec.pilot:
        for react in PILOT_ENDS:
            react(tx, held.id, may_come_back)


def _cpu_s(tx: Transaction, held: Held, until: float) -> float:
    since = held.started_at if held.started_at is not None else held.leased_at
    return max(0.0, until - since) * common(tx, held.job.submission_id).spec.machine.cpus


def _note_use(tx: Transaction, held: Held, cpu_s: float) -> None:
    """Charge an attempt's user, or below 0 take it off again; of a job in a pilot that is noted for who has the pilot."""
    note_use(tx, held.job.owner_id, common(tx, held.job.submission_id).spec.group, cpu_s)
    if (pilot := _pilot_of(tx, held.worker_id)) is not None:
        tx.run(sa.insert(pilot_use).values(attempt_id=pilot, cpu_s=cpu_s))


def settle_pilot(tx: Transaction, attempt_id: AttemptId) -> None:
    """Give back to a pilot's user what others were charged for its jobs, once its attempt has ended. Idempotent."""
    held = _find(tx, attempt_id)
    if held is not None and held.state in LIVE_STATES:
        return
    mine = pilot_use.c.attempt_id == attempt_id
    cpu_s = float(tx.value(sa.select(sa.func.coalesce(sa.func.sum(pilot_use.c.cpu_s), 0.0)).where(mine)))
    tx.run(sa.delete(pilot_use).where(mine))
    if held is not None:
        _note_use(tx, held, -cpu_s)


def _pilot_of(tx: Transaction, worker_id: WorkerId) -> AttemptId | None:
    """Return the attempt that a worker is the pilot of, None for other workers. Of one worker that never changes."""
    known: dict[WorkerId, AttemptId | None] = tx.memo.setdefault("in pilots", {})
    if worker_id not in known:
        if len(known) > _MOST_KNOWN:
            known.clear()
        known[worker_id] = tx.value(sa.select(worker.c.pilot_attempt_id).where(worker.c.id == worker_id))
    return known[worker_id]


_MOST_KNOWN = 200_000


_TALLY = Statement(
    sa.select(attempt.c.state, sa.func.count()).where(attempt.c.job_id == sa.bindparam("job_id")).group_by(attempt.c.state)
)


def _after_attempt(tx: Transaction, held: Held, ended: AttemptState, outcome: Outcome) -> None:
    """Move the job to where its attempts put it."""
    of_job = held.job
    tx.topics.append(job_topic(of_job.id))
    limits = common(tx, of_job.submission_id).spec.limits
    counts = {AttemptState(state): number for state, number in tx.fast(_TALLY, job_id=of_job.id)}
    tally = Tally(
        live=sum(counts.get(state, 0) for state in LIVE_STATES),
        succeeded=counts.get(AttemptState.SUCCEEDED, 0),
        failed=counts.get(AttemptState.FAILED, 0),
        lost=counts.get(AttemptState.LOST, 0),
        max_failed=limits.attempts,
        max_lost=limits.max_lost,
    )
    new = job_state(of_job.state, tally)
    if new is of_job.state:
        return
    message = _why_failed(tally, ended, outcome.reason) if new is JobState.FAILED else ""
    if move_job(tx, of_job, new, outcome=outcome, message=message) and new in FINAL_JOB_STATES and _others(counts):
        cancel_attempts(tx, of_job.id, f"the job is {new.value}")


def _others(counts: dict[AttemptState, int]) -> bool:
    return any(counts.get(state) for state in (*LIVE_STATES, AttemptState.LOST))


def _why_failed(tally: Tally, ended: AttemptState, reason: str) -> str:
    number, word = (tally.failed, "failed") if ended is AttemptState.FAILED else (tally.lost, "were lost")
    return f"{number} attempts {word}, the last because {reason}" if number > 1 else reason


_MOVE = Statement(
    sa.update(job)
    .where(job.c.id == sa.bindparam("job_id"), job.c.state == sa.bindparam("old"))
    .values(
        state=sa.bindparam("new"),
        finished_at=sa.bindparam("over_at"),
        exit_code=sa.bindparam("code"),
        result=sa.bindparam("sha256"),
        result_bytes=sa.bindparam("size"),
        result_until=sa.bindparam("until"),
        value=sa.bindparam("answer"),
        message=sa.bindparam("text"),
    )
)


def move_job(tx: Transaction, of_job: Job, new: JobState, *, outcome: Outcome = Outcome(), message: str = "") -> bool:  # noqa: B008 - frozen
    """Change a job's state, its queue's counts with it, and tell who comes after it. Return False if it has moved elsewhere already."""
    final = new in FINAL_JOB_STATES
    spec = common(tx, of_job.submission_id).spec
    result = outcome.result if final else None
    moved = tx.change(
        _MOVE,
        job_id=of_job.id,
        old=of_job.state.value,
        new=new.value,
        over_at=tx.now if final else None,
        code=outcome.exit_code if final else None,
        sha256=result.sha256 if result else None,
        size=result.size_bytes if result else None,
        until=tx.now + spec.retain_s if final and spec.retain_s else None,
        answer=outcome.value if final else None,
        text=message[:_LONGEST_REASON],
    )
    if not moved:
        return False
    count(tx, of_job.queue_id, of_job.state, new)
    tx.topics.append(job_topic(of_job.id) if of_job.position is None else array_topic(of_job.submission_id))
    if new is JobState.WAITING:
        come_back(tx, of_job.queue_id, of_job.id)
        tx.topics.append(WORK)
    if final and spec.secrets and of_job.position is None:
        forget_secrets(tx, of_job.submission_id)
    if final and of_job.position is None:
        tell_dependants(tx, of_job.submission_id, f"job-{of_job.id}", well=new is JobState.COMPLETED)
    return True


def cancel_attempts(tx: Transaction, job_id: JobId, reason: str) -> None:
    """Cancel what is still live of a job that is over, and tell the workers, those of lost attempts too: they may still run."""
    unsettled = sa.or_(IS_LIVE, attempt.c.state == AttemptState.LOST.value)
    rows = tx.rows(_WITH_JOB.where(attempt.c.job_id == job_id, unsettled))
    ends = [state.value for state in sources(AttemptEvent.CANCELLED)]
    over = sa.update(attempt).where(attempt.c.job_id == job_id, attempt.c.state.in_(ends))
    tx.run(over.values(state=AttemptState.CANCELLED.value, ended_at=tx.now, reason=reason))
    for row in rows:
        tx.topics.append(worker_topic(row.worker_id))
        if row.state in LIVE_STATES:
            _charge(tx, _held(tuple(row)))


def fail_revoked(tx: Transaction, limit: int) -> int:
    """Let jobs fail that wait for a revoked disk, are being prepared with one, or were leased after it was: by a process that had not seen it.

    Those that ran before go on. Return how many failed.
    """
    failed = 0
    for said, queue_ids in revoked_queues(tx).items():
        for row in _not_begun(tx, queue_ids, said.at, limit - failed):
            message = f"its disk was revoked by {said.by}: {said.reason}"
            one = Job(row.id, JobState(row.state), *row[2:])
            if move_job(tx, one, JobState.FAILED, message=message):
                cancel_attempts(tx, one.id, message)
                failed += 1
        if failed >= limit:
            break
    return failed


def _not_begun(tx: Transaction, queue_ids: list[int], since: float, limit: int) -> list[Any]:
    """Return jobs of these queues, as `Job` has them, that wait, are being prepared, or were leased since."""
    those = sa.select(job.c.id, job.c.state, job.c.queue_id, job.c.submission_id, job.c.owner_id, job.c.position)
    those = those.where(job.c.queue_id.in_(queue_ids)).limit(limit).with_for_update(of=job, skip_locked=True)
    waiting = those.join(queue, queue.c.id == job.c.queue_id).where(queue.c.open.is_(True), job.c.state == JobState.WAITING.value)
    begun_since = sa.or_(attempt.c.state == constant(AttemptState.LEASED.value), attempt.c.leased_at > since)
    leased = those.join(attempt, attempt.c.job_id == job.c.id).where(IS_LIVE, begun_since, job.c.state == JobState.ACTIVE.value)
    return tx.rows(waiting) + tx.rows(leased)


def expire_leases(tx: Transaction, limit: int = 500) -> int:
    """Make attempts whose lease has run out lost; return how many."""
    over = sa.select(attempt.c.id, worker.c.name).join(worker, worker.c.id == attempt.c.worker_id)
    over = over.join(job, job.c.id == attempt.c.job_id)
    over = over.where(IS_LIVE, attempt.c.lease_expires_at < tx.now).limit(limit)
    rows = tx.rows(over.with_for_update(of=(attempt, job), skip_locked=True))
    for row in rows:
        apply_event(tx, row.id, AttemptEvent.EXPIRED, Outcome(reason=f"nothing was heard of worker {row.name}"))
    return len(rows)
