"""Sets: several jobs and arrays of one file, submitted all or none, which reach each other by the names that they have in the set.

A set that starts together takes its turn: its queues are opened for a while, and what is leased of it is held by the workers, ready but not
started. When no job of it waits any more, all may start. If that does not happen in time, what was leased is given back, the queues are closed and
another set has its turn; so two sets that each hold half of the PCs never wait for each other for ever.

    try_at set, opened_at NULL       waits for its turn
    try_at set, opened_at set        has it
    started_at set, try_at NULL      started
"""

from __future__ import annotations

from typing import Any

import msgspec
import sqlalchemy as sa

from deskgrid.core.backoff import delay_s
from deskgrid.core.lifecycle import FINAL_JOB_STATES, AttemptEvent
from deskgrid.core.rights import thing_of_job
from deskgrid.errors import InvalidInput, NotFound
from deskgrid.model.ids import ArrayId, JobId, SetId, UserId
from deskgrid.model.jobs import AttemptState, JobState
from deskgrid.model.overlay import Reach, ServiceRef
from deskgrid.model.wire import JobSet, MemberState, SetMember
from deskgrid.server.store import attempts, jobs, submissions
from deskgrid.server.store.accounts import Caller, require
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.queues import open_queue
from deskgrid.server.store.schema import IS_LIVE, WITHOUT_SECRETS, account, attempt, job, job_set, queue, submission
from deskgrid.server.store.submissions import NewSubmission

__all__ = [
    "MOST_MEMBERS",
    "cancel_set",
    "get_set",
    "list_sets",
    "may_start",
    "set_topic",
    "start_if_complete",
    "submit_set",
    "take_turns",
    "topics_of",
]

MOST_MEMBERS = 100
_FIRST_PAUSE_S, _MAX_PAUSE_S = 10.0, 600.0


def set_topic(set_id: int) -> str:
    """Topic: a set started, or was given another turn."""
    return f"set:{set_id}"


# Submitting


def submit_set(
    tx: Transaction,
    caller: Caller,
    name: str,
    members: list[tuple[SetMember, NewSubmission]],
    *,
    together: bool,
    max_waiting: int = 0,
) -> SetId:
    """Add a set, all of it. Raise InvalidInput for members that do not fit together."""
    if caller.user_id is None:
        raise ValueError("only users submit sets")
    names = [member.name for member, _ in members]
    if len(set(names)) < len(names):
        raise InvalidInput("two jobs of the set have the same name", where="set")
    added = tx.run(
        sa.insert(job_set).values(
            owner_id=caller.user_id, name=name, together=together, created_at=tx.now, try_at=tx.now if together else None
        )
    )
    set_id = int(added.inserted_primary_key[0])  # type: ignore[index]
    known: dict[str, str] = {}
    for member, new in _in_order(members):
        spec = _resolved(new.spec, known, by_name=False)
        new = msgspec.structs.replace(new, spec=spec, set_id=set_id, member=member.name, together=together)
        if member.count:
            array_id = submissions.submit_array(
                tx, caller, new, member.count, table=member.table, names=member.names, max_waiting=max_waiting
            )
            known[member.name] = f"array-{array_id}"
        else:
            known[member.name] = f"job-{submissions.submit_job(tx, caller, new, max_waiting=max_waiting)}"
    for member, new in members:
        _name_services(tx, set_id, member, _resolved(new.spec, known, by_name=True))
    if together:
        tx.topics.append(submissions.CHORES)
    return SetId(set_id)


def _in_order(members: list[tuple[SetMember, NewSubmission]]) -> list[tuple[SetMember, NewSubmission]]:
    """Return the members so that each comes after those it names in `after`. Raise InvalidInput for a circle."""
    left = {member.name: (member, new) for member, new in members}
    done: list[tuple[SetMember, NewSubmission]] = []
    while left:
        ready = [name for name, (_, new) in left.items() if not left.keys() & {*new.spec.after, *new.spec.after_end}]
        if not ready:
            raise InvalidInput(f"{', '.join(sorted(left))} come after each other", where="after")
        done += [left.pop(name) for name in ready]
    return done


def _resolved(spec: Any, known: dict[str, str], *, by_name: bool) -> Any:
    """Return a spec whose `after` names jobs and arrays instead of members, and, `by_name`, whose `reach` does, too."""
    after = tuple(known.get(one, one) for one in spec.after)
    after_end = tuple(known.get(one, one) for one in spec.after_end)
    reach = tuple(_reached(one, known) for one in spec.machine.reach) if by_name else spec.machine.reach
    return msgspec.structs.replace(
        spec, after=after, after_end=after_end, machine=msgspec.structs.replace(spec.machine, reach=reach)
    )


def _reached(reach: Reach, known: dict[str, str]) -> Reach:
    member = reach.service.member
    if member is None:
        return reach
    found = known.get(member)
    if found is None:
        raise InvalidInput(f"there is no {member} in this set", where="machine.reach", hint=f"one of {', '.join(sorted(known))}")
    if not found.startswith("job-"):
        raise InvalidInput(f"{member} is an array, so it is not clear which of its jobs is meant", where="machine.reach")
    return msgspec.structs.replace(reach, service=ServiceRef(reach.service.service, found))


def _name_services(tx: Transaction, set_id: int, member: SetMember, spec: Any) -> None:
    of = (submission.c.set_id == set_id, submission.c.member == member.name)
    tx.run(sa.update(submission).where(*of).values(spec=msgspec.json.encode(spec).decode()))


# As people see them


def get_set(tx: Transaction, caller: Caller, set_id: SetId, action: str = "get_set") -> JobSet:
    """Return a set with its members, if the caller may see it. Raise NotFound; Forbidden if he may, but not do this (a route's name)."""
    row = tx.row(_sets().where(job_set.c.id == set_id))
    missing = NotFound(f"you have no set {set_id}", hint="deskgrid set list")
    if row is None:
        raise missing
    require(tx, caller, action, thing_of_job(row.owner_id, _group_of(tx, set_id)), see="get_set", missing=missing)
    return _set(tx, caller, row)


def _group_of(tx: Transaction, set_id: int) -> str:
    """Return the group that a whole set is done for; "" if some of it is for another one, or for its owner himself."""
    of_set = sa.select(queue.c.team).join(submission, submission.c.queue_id == queue.c.id).where(submission.c.set_id == set_id)
    groups = [str(row.team) for row in tx.rows(of_set.distinct())]
    return groups[0] if len(groups) == 1 else ""


def list_sets(
    tx: Transaction, caller: Caller, *, everyone: bool, before: int | None, limit: int
) -> tuple[tuple[JobSet, ...], bool]:
    """Return at most `limit` sets, newest first, and whether there are older ones."""
    query = _sets().order_by(job_set.c.id.desc()).limit(limit + 1)
    if not everyone:
        query = query.where(job_set.c.owner_id == caller.user_id)
    if before is not None:
        query = query.where(job_set.c.id < before)
    rows = tx.rows(query)
    return tuple(_set(tx, caller, row) for row in rows[:limit]), len(rows) > limit


def cancel_set(tx: Transaction, caller: Caller, set_id: SetId, message: str) -> JobSet:
    """Cancel all that has not ended of a set. Raise NotFound."""
    found = get_set(tx, caller, set_id, "cancel_set")
    tx.run(sa.update(job_set).where(job_set.c.id == set_id).values(try_at=None))
    for member in found.members:
        if member.job is not None:
            jobs.cancel_job(tx, caller, member.job.id, message)
        elif member.array is not None:
            submissions.cancel_array(tx, caller, member.array.id, message)
    return get_set(tx, caller, set_id)


def _sets() -> sa.Select[tuple[Any, ...]]:
    return sa.select(job_set, account.c.name.label("owner")).join(account, account.c.id == job_set.c.owner_id)


def _set(tx: Transaction, caller: Caller, row: Any) -> JobSet:
    members = tx.rows(sa.select(*WITHOUT_SECRETS).where(submission.c.set_id == row.id).order_by(submission.c.id))
    return JobSet(
        id=SetId(row.id),
        owner_id=UserId(row.owner_id),
        owner=row.owner,
        name=row.name,
        together=row.together,
        created_at=row.created_at,
        members=tuple(_member(tx, caller, one) for one in members),
        waits_for=_waits_for(row),
    )


def _waits_for(row: Any) -> str:
    if row.try_at is None:
        return ""
    if row.opened_at is not None:
        return "a worker for each of its jobs"
    return "its turn" + (f", after {row.tries} tries without enough workers" if row.tries else "")


def _member(tx: Transaction, caller: Caller, row: Any) -> MemberState:
    if row.size is not None:
        return MemberState(name=row.member, array=submissions.get_array(tx, caller, ArrayId(row.id)))
    job_id = tx.value(sa.select(job.c.id).where(job.c.submission_id == row.id))
    return MemberState(name=row.member, job=jobs.get_job(tx, caller, JobId(job_id)).job)


def topics_of(found: JobSet) -> list[str]:
    """Return what changes when a set does."""
    jobs_of = [submissions.job_topic(member.job.id) for member in found.members if member.job]
    arrays_of = [submissions.array_topic(member.array.id) for member in found.members if member.array]
    return [set_topic(found.id), *jobs_of, *arrays_of]


# Starting together


def start_if_complete(tx: Transaction, set_id: int) -> bool:
    """Start a set of which no job waits any more; tell its workers. Return whether it has started, now or before."""
    row = tx.row(sa.select(job_set).where(job_set.c.id == set_id).with_for_update())
    if row is None or row.started_at is not None:
        return True
    if row.try_at is None or row.opened_at is None:
        return False
    tx.settle()
    waiting = (
        sa.select(queue.c.id)
        .join(submission, submission.c.queue_id == queue.c.id)
        .where(submission.c.set_id == set_id, queue.c.waiting + queue.c.blocked > 0)
    )
    unfilled = sa.select(submission.c.id).where(submission.c.set_id == set_id, submission.c.filled < submission.c.size)
    if tx.row(waiting.limit(1)) is not None or tx.row(unfilled.limit(1)) is not None:
        return False
    tx.run(sa.update(job_set).where(job_set.c.id == set_id).values(started_at=tx.now, try_at=None))
    tx.topics += [set_topic(set_id), *{attempts.worker_topic(held.worker_id) for held in _leased(tx, set_id)}]
    return True


def _leased(tx: Transaction, set_id: int) -> list[Any]:
    joined = attempt.join(job, job.c.id == attempt.c.job_id).join(submission, submission.c.id == job.c.submission_id)
    return tx.rows(sa.select(attempt.c.id, attempt.c.worker_id).select_from(joined).where(submission.c.set_id == set_id, IS_LIVE))


def take_turns(tx: Transaction, *, turn_s: float, rng: Any) -> float | None:
    """Let the next set that starts together try, and end a try that took too long; return the seconds until there is something to do.

    One set tries at a time. `rng`: for the pauses between the tries of one set.
    """
    waiting = tx.rows(sa.select(job_set).where(job_set.c.try_at.is_not(None)).order_by(job_set.c.id).with_for_update())
    for row in waiting:
        if row.opened_at is None:
            continue
        if start_if_complete(tx, row.id) or _is_over(tx, row.id):
            continue
        left_s = float(row.opened_at + turn_s - tx.now)
        if left_s > 0:
            return left_s
        _end_turn(tx, row, rng)
    ready = [row for row in waiting if row.opened_at is None and row.try_at <= tx.now and _all_open(tx, row.id)]
    if ready:
        _begin_turn(tx, min(ready, key=lambda row: (row.try_at, row.id)))
        return turn_s
    later = [row.try_at for row in waiting if row.opened_at is None]
    return max(0.0, min(later) - tx.now) if later else None


def _is_over(tx: Transaction, set_id: int) -> bool:
    """Let a set of which nothing can start any more, as when it was cancelled, go out of the way."""
    open_states = [state.value for state in JobState if state not in FINAL_JOB_STATES]
    counts = [queue.c[state] for state in open_states]
    left = sa.select(sa.func.coalesce(sa.func.sum(sum(counts[1:], counts[0])), 0)).join(
        submission, submission.c.queue_id == queue.c.id
    )
    if int(tx.value(left.where(submission.c.set_id == set_id))):
        return False
    tx.run(sa.update(job_set).where(job_set.c.id == set_id).values(try_at=None))
    return True


def _all_open(tx: Transaction, set_id: int) -> bool:
    """Tell whether nothing but the turn holds a set back: its arrays are filled, and what it comes after has ended."""
    closed = submission.c.state != submissions.SubmissionState.OPEN.value
    return tx.row(sa.select(submission.c.id).where(submission.c.set_id == set_id, closed).limit(1)) is None


def _begin_turn(tx: Transaction, row: Any) -> None:
    tx.run(sa.update(job_set).where(job_set.c.id == row.id).values(opened_at=tx.now, tries=row.tries + 1))
    _open(tx, row.id, True)
    tx.topics += [submissions.WORK, set_topic(row.id)]


def _end_turn(tx: Transaction, row: Any, rng: Any) -> None:
    """Close the queues and take back what was leased: not a failure of anybody."""
    _open(tx, row.id, False)
    for held in _leased(tx, row.id):
        if attempts.apply_event(tx, held.id, AttemptEvent.RETURNED):
            tx.topics.append(attempts.worker_topic(held.worker_id))
    pause_s = delay_s(row.tries, first_s=_FIRST_PAUSE_S, max_s=_MAX_PAUSE_S, rng=rng)
    tx.run(sa.update(job_set).where(job_set.c.id == row.id).values(opened_at=None, try_at=tx.now + pause_s))
    tx.topics.append(set_topic(row.id))


def _open(tx: Transaction, set_id: int, is_open: bool) -> None:
    """Open or close the queues of those members that nothing else holds back."""
    members = sa.select(submission.c.queue_id).where(
        submission.c.set_id == set_id, submission.c.state == submissions.SubmissionState.OPEN.value
    )
    for row in tx.rows(members):
        open_queue(tx, row.queue_id, is_open)


def may_start(tx: Transaction, held: attempts.Held) -> bool:
    """Tell whether an attempt that was held may start now."""
    set_id = attempts.common(tx, held.job.submission_id).set_id
    return held.state is AttemptState.LEASED and set_id is not None and not submissions.held_until_started(tx, set_id)
