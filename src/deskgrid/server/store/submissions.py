"""Submissions: a job or an array, what its jobs have in common, what it comes after, and how an array is filled, opened and cancelled.

    filling -> blocked -> open -> ended
    any of the first three -> cancelling -> cancelled

An array has a queue of its own, which is closed until it is filled and all that it comes after has ended: so a million jobs begin to wait, and
are cancelled, by changing one row. The jobs themselves are written (and, of a cancelled array, moved) some thousands at a time, so that no
other call waits long; `chores` says what is left to do, also after a restart.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import StrEnum
from typing import Any

import msgspec
import sqlalchemy as sa
from msgspec import Struct

from deskgrid.core.lifecycle import FINAL_JOB_STATES
from deskgrid.core.matching import requirement_of
from deskgrid.core.rights import thing_of_job
from deskgrid.errors import Conflict, InvalidInput, NotFound
from deskgrid.model.apps import ANY_PLATFORM
from deskgrid.model.data import Blob, DataFile, DataRef
from deskgrid.model.ids import ArrayId, JobId, UserId
from deskgrid.model.jobs import Array, ArrayState, JobSpec, JobState
from deskgrid.server.store.accounts import Caller, require
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.queues import ARRAY_RAN_OUT, come_back, count, find_queue, open_queue, queue_counts, waiting_of
from deskgrid.server.store.schema import WITHOUT_SECRETS, account, dependency, job, job_set, queue, submission, submission_data
from deskgrid.server.store.statement import Statement

__all__ = [
    "CHORES",
    "WORK",
    "Chore",
    "NewSubmission",
    "SubmissionState",
    "active_of_array",
    "app_is_used",
    "array_topic",
    "cancel_array",
    "chores",
    "fail_filling",
    "fill",
    "fill_table",
    "forget_secrets",
    "get_array",
    "held_until_started",
    "job_topic",
    "list_arrays",
    "submit_array",
    "submit_job",
    "sweep_cancelled",
    "tell_dependants",
]

WORK = "work"
"""Topic: a job waits that did not before."""
_MOST_AFTER = 1000
_COUNTED_EXACTLY = 1_000_000
"""Bounds of jobs waiting below this are kept to the job, above it about so, if a user submits at several server processes at once."""


class SubmissionState(StrEnum):
    """Where a submission stands. A job by itself is open or blocked; its own state says the rest."""

    FILLING = "filling"
    BLOCKED = "blocked"
    OPEN = "open"
    CANCELLING = "cancelling"
    CANCELLED = "cancelled"
    ENDED = "ended"


class NewSubmission(Struct, frozen=True, kw_only=True):
    """What is submitted, with all references resolved already."""

    spec: JobSpec
    disk: DataRef | None = None
    disk_owner: int = 0
    context: Blob | None = None
    data: tuple[DataFile, ...] = ()
    app_id: int | None = None
    programs: dict[str, Blob] = {}
    """The files of its app by platform."""
    secrets: bytes = b""
    """Sealed to the server for the submitter."""
    trust: tuple[str, ...] = ()
    """Of its spec, with users by number."""
    set_id: int | None = None
    member: str = ""
    together: bool = False
    """Its set starts together: it has a queue of its own, which is opened when the set has its turn (sets.py)."""


class Chore(Struct, frozen=True):
    """An array that something is left to be done for."""

    array_id: int
    state: SubmissionState
    filled: int
    size: int
    table: Blob | None
    reads_at: int
    names: tuple[str, ...]


def job_topic(job_id: int) -> str:
    """Topic: a job or one of its attempts changed."""
    return f"job:{job_id}"


def array_topic(array_id: int) -> str:
    """Topic: jobs of an array changed."""
    return f"array:{array_id}"


# Submitting


def submit_job(tx: Transaction, caller: Caller, new: NewSubmission, *, max_waiting: int = 0) -> JobId:
    """Add a job; it waits, or is blocked by what it comes after. Raise InvalidInput, Conflict (the user's quota)."""
    owner_id = _owner(caller)
    _check_quota(tx, owner_id, 1, max_waiting)
    submission_id = _insert(tx, owner_id, None, new, state=SubmissionState.OPEN, filled=1)
    queue_id = _add_queue(tx, owner_id, new, submission_id if new.together else 0, is_open=not new.together)
    tx.run(sa.update(submission).where(submission.c.id == submission_id).values(queue_id=queue_id))
    fate = _add_dependencies(tx, owner_id, submission_id, new.spec)
    state = JobState.BLOCKED if fate.open_left else JobState.WAITING
    added = tx.run(
        sa.insert(job).values(submission_id=submission_id, queue_id=queue_id, owner_id=owner_id, state=state.value, message="")
    )
    job_id = JobId(int(added.inserted_primary_key[0]))  # type: ignore[index]
    count(tx, queue_id, None, state)
    if state is JobState.WAITING:
        tx.topics.append(WORK)
    else:
        _set_state(tx, submission_id, SubmissionState.BLOCKED)
    if fate.failed:
        _cancel_submission(tx, submission_id, fate.failed)
    tx.topics.append(job_topic(job_id))
    return job_id


def submit_array(
    tx: Transaction,
    caller: Caller,
    new: NewSubmission,
    size: int,
    *,
    table: Blob | None = None,
    names: Sequence[str] = (),
    max_waiting: int = 0,
) -> ArrayId:
    """Add an array of `size` jobs, to be filled by chores. Raise InvalidInput, Conflict (the user's quota).

    `table`: a blob of `size` lines, each a JSON list of texts, one per name.
    """
    owner_id = _owner(caller)
    _check_quota(tx, owner_id, size, max_waiting)
    array_id = _insert(
        tx,
        owner_id,
        None,
        new,
        state=SubmissionState.FILLING,
        size=size,
        parameters=table.sha256 if table else None,
        parameters_bytes=table.size_bytes if table else None,
        names=msgspec.json.encode(tuple(names)).decode() if names else None,
    )
    own = _add_queue(tx, owner_id, new, array_id, is_open=False)
    tx.run(sa.update(submission).where(submission.c.id == array_id).values(queue_id=own))
    fate = _add_dependencies(tx, owner_id, array_id, new.spec)
    if fate.failed:
        _cancel_submission(tx, array_id, fate.failed)
    tx.topics += [CHORES, array_topic(array_id)]
    return ArrayId(array_id)


CHORES = "chores"
"""Topic: there is an array to fill or to clear away."""


def _owner(caller: Caller) -> UserId:
    if caller.user_id is None:
        raise ValueError("only users submit jobs")
    return caller.user_id


def _add_queue(tx: Transaction, owner_id: UserId, new: NewSubmission, array_id: int, *, is_open: bool) -> int:
    disk = new.disk.disk.sha256 if new.disk is not None and new.disk.disk is not None else None
    platforms = () if ANY_PLATFORM in new.programs else tuple(new.programs)
    blobs = [one.blob for one in new.data]
    wanted = requirement_of(new.spec, disk, platforms, new.trust, disk_owner=new.disk_owner, data=blobs)
    return find_queue(tx, wanted, owner_id, new.spec.group, new.spec.priority, array_id=array_id, is_open=is_open)


def _check_quota(tx: Transaction, owner_id: UserId, size: int, default: int) -> None:
    row = tx.row(sa.select(account.c.max_waiting).where(account.c.id == owner_id))
    most = row.max_waiting if row is not None and row.max_waiting is not None else default
    if not most:
        return
    if most < _COUNTED_EXACTLY:  # else a user's calls at several processes wait for each other for nothing
        tx.row(sa.select(account.c.id).where(account.c.id == owner_id).with_for_update(key_share=True))
    have = waiting_of(tx, owner_id)
    if have + size > most:
        raise Conflict(
            f"you may have {most} jobs waiting, and have {have}", hint="wait until some have ended, or ask the admin for more"
        )


def _insert(tx: Transaction, owner_id: UserId, queue_id: int | None, new: NewSubmission, **values: Any) -> int:
    disk = new.disk
    added = tx.run(
        sa.insert(submission).values(
            owner_id=owner_id,
            queue_id=queue_id,
            spec=msgspec.json.encode(new.spec).decode(),
            disk=msgspec.json.encode(disk).decode() if disk else None,
            disk_blob=disk.blob.sha256 if disk else None,
            disk_sha256=disk.disk.sha256 if disk and disk.disk else None,
            context=new.context.sha256 if new.context else None,
            context_bytes=new.context.size_bytes if new.context else None,
            app_id=new.app_id,
            programs=msgspec.json.encode(new.programs).decode() if new.programs else None,
            secrets=new.secrets or None,
            set_id=new.set_id,
            member=new.member,
            created_at=tx.now,
            **values,
        )
    )
    submission_id = int(added.inserted_primary_key[0])  # type: ignore[index]
    for one in new.data:
        values = {"name": one.name, "sha256": one.blob.sha256, "size_bytes": one.blob.size_bytes}
        tx.run(sa.insert(submission_data).values(submission_id=submission_id, **values))
    return submission_id


# What comes after what


class _Fate(Struct):
    """What became of the jobs that a submission comes after."""

    open_left: int = 0
    failed: str = ""
    """Why it cannot start any more."""


def _add_dependencies(tx: Transaction, owner_id: UserId, submission_id: int, spec: JobSpec) -> _Fate:
    """Note what a submission waits for. Raise InvalidInput for what is not there or not the user's."""
    fate = _Fate()
    wanted = dict.fromkeys(spec.after, False) | dict.fromkeys(spec.after_end, True)
    if len(wanted) > _MOST_AFTER:
        raise InvalidInput(
            f"{len(wanted)} are too many jobs to come after", where="after", hint=f"at most {_MOST_AFTER}; make them an array"
        )
    for name, any_end in wanted.items():
        on, ended, well = _look_up(tx, owner_id, name)
        if on == submission_id:
            raise InvalidInput("a job cannot come after itself", where="after")
        if not ended:
            both = {"submission_id": submission_id, "on_submission_id": on}
            tx.insert_if_new(dependency, [*both], **both, any_end=any_end)
            fate.open_left += 1
        elif not well and not any_end:
            fate.failed = f"{name}, which it comes after, did not complete"
            fate.open_left += 1
    return fate


def _look_up(tx: Transaction, owner_id: UserId, name: str) -> tuple[int, bool, bool]:
    """Return the submission of job-N or array-N of a user's, whether it has ended, and whether well. Raise InvalidInput."""
    kind, _, number = name.partition("-")
    if kind not in ("job", "array") or not number.isdecimal() or len(number) > 18:
        raise InvalidInput(f"{name[:40]!r} is neither a job nor an array", where="after", hint="as in job-41 or array-3")
    if kind == "job":
        row = tx.row(sa.select(job).where(job.c.id == int(number), job.c.owner_id == owner_id).with_for_update())
        if row is None:
            raise InvalidInput(f"you have no job {number}", where="after")
        if row.position is not None:
            raise InvalidInput(
                f"{name} is one of array-{row.submission_id}", where="after", hint=f"array-{row.submission_id}: all of it"
            )
        return row.submission_id, JobState(row.state) in FINAL_JOB_STATES, row.state == JobState.COMPLETED.value
    array = submission.c.size.is_not(None)
    row = tx.row(
        sa.select(submission).where(submission.c.id == int(number), submission.c.owner_id == owner_id, array).with_for_update()
    )
    if row is None:
        raise InvalidInput(f"you have no array {number}", where="after")
    ended = row.state in (SubmissionState.ENDED, SubmissionState.CANCELLED, SubmissionState.CANCELLING)
    return row.id, ended, row.state == SubmissionState.ENDED and _all_completed(tx, row.queue_id)


def _all_completed(tx: Transaction, queue_id: int) -> bool:
    counts = queue_counts(tx, queue_id)
    return not counts[JobState.FAILED] and not counts[JobState.CANCELLED]


_DEPENDANTS = Statement(
    sa.select(dependency.c.submission_id, dependency.c.any_end).where(dependency.c.on_submission_id == sa.bindparam("on"))
)


def tell_dependants(tx: Transaction, submission_id: int, name: str, *, well: bool) -> None:
    """Let those that come after a submission, which has ended, go or end."""
    for waiting_id, any_end in tx.fast(_DEPENDANTS, on=submission_id):
        # Locked first: two that it waits for may end in two processes at once, and neither would see that the other is gone.
        tx.row(sa.select(submission.c.id).where(submission.c.id == waiting_id).with_for_update())
        mine = (dependency.c.submission_id == waiting_id, dependency.c.on_submission_id == submission_id)
        tx.run(sa.delete(dependency).where(*mine))
        if not well and not any_end:
            _cancel_submission(tx, waiting_id, f"{name}, which it comes after, did not complete")
        elif tx.row(sa.select(dependency.c.any_end).where(dependency.c.submission_id == waiting_id)) is None:
            _release(tx, waiting_id)


def _release(tx: Transaction, submission_id: int) -> None:
    """Let a blocked submission go. One that is still being filled goes when that is done."""
    row = tx.row(sa.select(submission).where(submission.c.id == submission_id).with_for_update())
    if row is None or row.state != SubmissionState.BLOCKED:
        return
    _set_state(tx, submission_id, SubmissionState.OPEN)
    if row.size is not None:
        _open_array(tx, row)
        return
    for job_id in _move_blocked(tx, row, JobState.WAITING):
        come_back(tx, row.queue_id, job_id)
        tx.topics.append(WORK)


def _move_blocked(tx: Transaction, row: Any, new: JobState, **values: Any) -> list[int]:
    """Move the job of a submission if it is blocked, and return its number. Asked in one statement: another process may just have moved or removed it."""
    those = (job.c.submission_id == row.id, job.c.state == JobState.BLOCKED.value)
    moved = [found.id for found in tx.rows(sa.update(job).where(*those).values(state=new.value, **values).returning(job.c.id))]
    for job_id in moved:
        count(tx, row.queue_id, JobState.BLOCKED, new)
        tx.topics.append(job_topic(job_id))
    return moved


def _cancel_submission(tx: Transaction, submission_id: int, message: str) -> None:
    """Cancel what cannot start any more, and what comes after that."""
    row = tx.row(sa.select(submission).where(submission.c.id == submission_id).with_for_update())
    if row is None:
        return
    tx.run(sa.delete(dependency).where(dependency.c.submission_id == submission_id))
    if row.size is not None:
        _begin_cancelling(tx, row, message)
        return
    for job_id in _move_blocked(tx, row, JobState.CANCELLED, message=message, finished_at=tx.now):
        tell_dependants(tx, submission_id, f"job-{job_id}", well=False)
    forget_secrets(tx, submission_id)


def _set_state(tx: Transaction, submission_id: int, state: SubmissionState, **values: Any) -> None:
    if state in (SubmissionState.CANCELLED, SubmissionState.ENDED):
        values["secrets"] = None
    tx.run(sa.update(submission).where(submission.c.id == submission_id).values(state=state.value, **values))


def forget_secrets(tx: Transaction, submission_id: int) -> None:
    """Remove the sealed secrets of jobs that have ended: nobody needs them any more. Idempotent."""
    tx.run(sa.update(submission).where(submission.c.id == submission_id).values(secrets=None))


# Arrays


def chores(tx: Transaction) -> list[Chore]:
    """Return the arrays that are to be filled or cleared away, oldest first."""
    found = submission.c.state.in_((SubmissionState.FILLING.value, SubmissionState.CANCELLING.value))
    return [
        Chore(
            array_id=row.id,
            state=SubmissionState(row.state),
            filled=row.filled,
            size=row.size,
            table=Blob(sha256=row.parameters, size_bytes=row.parameters_bytes) if row.parameters else None,
            reads_at=row.reads_at,
            names=msgspec.json.decode(row.names, type=tuple[str, ...]) if row.names else (),
        )
        for row in tx.rows(sa.select(*WITHOUT_SECRETS).where(found).order_by(submission.c.id).limit(100))
    ]


def fill(tx: Transaction, array_id: int, limit: int) -> int:
    """Make at most `limit` more jobs of an array without a table; return how many are missing still."""
    row = _filling(tx, array_id)
    if row is None:
        return 0
    size = min(limit, row.size - row.filled)
    if size:
        numbers = sa.select(sa.literal(row.filled, sa.BigInteger()).label("i")).cte("numbers", recursive=True)
        numbers = numbers.union_all(sa.select(numbers.c.i + 1).where(numbers.c.i < row.filled + size - 1))
        made = sa.select(
            sa.literal(array_id, sa.BigInteger()),
            sa.literal(row.queue_id, sa.BigInteger()),
            sa.literal(row.owner_id, sa.BigInteger()),
            sa.literal(JobState.WAITING.value, sa.String()),
            numbers.c.i,
            sa.literal("", sa.Text()),
        )
        columns = ["submission_id", "queue_id", "owner_id", "state", "position", "message"]
        tx.run(sa.insert(job).from_select(columns, made, include_defaults=False))
    return _note_filled(tx, row, size, row.reads_at)


_ADD_WITH_PARAMETERS = Statement(
    sa.insert(job).values(
        submission_id=sa.bindparam("submission_id"),
        queue_id=sa.bindparam("queue_id"),
        owner_id=sa.bindparam("owner_id"),
        state=JobState.WAITING.value,
        position=sa.bindparam("position"),
        parameters=sa.bindparam("parameters"),
        message="",
    )
)


def fill_table(tx: Transaction, array_id: int, filled: int, lines: Sequence[str], reads_at: int) -> int:
    """Make the jobs of the next lines of an array's table; return how many are missing still.

    `filled` is how many there were when the lines were read: if that has changed, nothing is done.
    """
    row = _filling(tx, array_id)
    if row is None or row.filled != filled:
        return 0 if row is None else int(row.size - row.filled)
    lines = lines[: row.size - row.filled]
    shared = {"submission_id": array_id, "queue_id": row.queue_id, "owner_id": row.owner_id}
    tx.change_many(
        _ADD_WITH_PARAMETERS,
        [{**shared, "position": filled + index, "parameters": line} for index, line in enumerate(lines)],
    )
    return _note_filled(tx, row, len(lines), reads_at)


def _filling(tx: Transaction, array_id: int) -> Any:
    states = submission.c.state == SubmissionState.FILLING.value
    return tx.row(sa.select(submission).where(submission.c.id == array_id, states).with_for_update())


def _note_filled(tx: Transaction, row: Any, size: int, reads_at: int) -> int:
    filled = row.filled + size
    if size:
        count(tx, row.queue_id, None, JobState.WAITING, size)
    tx.run(sa.update(submission).where(submission.c.id == row.id).values(filled=filled, reads_at=reads_at))
    tx.topics.append(array_topic(row.id))
    if filled < row.size:
        return int(row.size - filled)
    blocked = tx.row(sa.select(dependency.c.any_end).where(dependency.c.submission_id == row.id)) is not None
    _set_state(tx, row.id, SubmissionState.BLOCKED if blocked else SubmissionState.OPEN)
    if not blocked:
        _open_array(tx, row)
    return 0


def _open_array(tx: Transaction, row: Any) -> None:
    if held_until_started(tx, row.set_id):
        tx.topics.append(CHORES)  # its set has to have its turn
    else:
        open_queue(tx, row.queue_id, True)
    tx.topics += [WORK, array_topic(row.id)]


def held_until_started(tx: Transaction, set_id: int | None) -> bool:
    """Tell whether attempts of a set are to be held: it starts together, and has not started."""
    if set_id is None:
        return False
    row = tx.row(sa.select(job_set.c.together, job_set.c.started_at).where(job_set.c.id == set_id))
    return row is not None and row.together and row.started_at is None


def app_is_used(tx: Transaction, app_id: int) -> bool:
    """Tell whether jobs that have not ended run an app."""
    open_states = [state.value for state in JobState if state not in FINAL_JOB_STATES]
    joined = sa.select(job.c.id).join(submission).where(submission.c.app_id == app_id, job.c.state.in_(open_states))
    return tx.row(joined.limit(1)) is not None


def fail_filling(tx: Transaction, array_id: int, message: str) -> None:
    """Give up an array that cannot be filled; what there is of it is cleared away."""
    row = _filling(tx, array_id)
    if row is not None:
        _begin_cancelling(tx, row, message)


def cancel_array(tx: Transaction, caller: Caller, array_id: ArrayId, message: str) -> Array:
    """Cancel what has not ended of an array: no job of it starts from now on. Raise NotFound."""
    found = get_array(tx, caller, array_id, "cancel_array")
    if found.state in (ArrayState.FILLING, ArrayState.BLOCKED, ArrayState.OPEN):
        row = tx.row(sa.select(submission).where(submission.c.id == array_id).with_for_update())
        tx.run(sa.delete(dependency).where(dependency.c.submission_id == array_id))
        _begin_cancelling(tx, row, message)
    return get_array(tx, caller, array_id)


def _begin_cancelling(tx: Transaction, row: Any, message: str) -> None:
    if row.state in (SubmissionState.CANCELLING, SubmissionState.CANCELLED, SubmissionState.ENDED):
        return
    open_queue(tx, row.queue_id, False)
    _set_state(tx, row.id, SubmissionState.CANCELLING, message=message[:2000], finished_at=tx.now)
    tx.topics += [CHORES, array_topic(row.id)]
    tell_dependants(tx, row.id, f"array-{row.id}", well=False)


def sweep_cancelled(tx: Transaction, array_id: int, limit: int) -> int:
    """Move at most `limit` waiting jobs of a cancelled array to their end; return how many were moved.

    Those that run are the caller's affair. Once none is left the array is cancelled for good.
    """
    row = tx.row(sa.select(submission).where(submission.c.id == array_id, submission.c.state == SubmissionState.CANCELLING.value))
    if row is None:
        return 0
    waiting = (
        sa.select(job.c.id)
        .where(job.c.queue_id == row.queue_id, job.c.state == JobState.WAITING.value)
        .order_by(job.c.id)
        .limit(limit)
    )
    values = {"state": JobState.CANCELLED.value, "finished_at": tx.now, "message": row.message}
    # The state is asked for once more: of those found, some may just be leased by another process that has an older board.
    still = (job.c.id.in_(waiting.scalar_subquery()), job.c.state == JobState.WAITING.value)
    moved = tx.run(sa.update(job).where(*still).values(**values)).rowcount
    if moved:
        count(tx, row.queue_id, JobState.WAITING, JobState.CANCELLED, moved)
    else:
        left = queue_counts(tx, row.queue_id)
        if not left[JobState.ACTIVE] and not left[JobState.WAITING]:
            _set_state(tx, array_id, SubmissionState.CANCELLED)
    tx.topics.append(array_topic(array_id))
    return int(moved)


def active_of_array(tx: Transaction, array_id: int, limit: int) -> list[int]:
    """Return jobs of an array that run."""
    active = sa.select(job.c.id).where(job.c.submission_id == array_id, job.c.state == JobState.ACTIVE.value)
    return [row.id for row in tx.rows(active.limit(limit))]


def _end_array(tx: Transaction, array_id: int) -> None:
    """Note that an array has no job left that could run, if all that it should have were made."""
    row = tx.row(sa.select(submission).where(submission.c.id == array_id).with_for_update())
    if row is None or row.size is None or row.state != SubmissionState.OPEN or row.filled < row.size:
        return
    _set_state(tx, array_id, SubmissionState.ENDED, finished_at=tx.now)
    tx.topics.append(array_topic(array_id))
    tell_dependants(tx, array_id, f"array-{array_id}", well=_all_completed(tx, row.queue_id))


ARRAY_RAN_OUT.append(_end_array)


def get_array(tx: Transaction, caller: Caller, array_id: ArrayId, action: str = "get_array") -> Array:
    """Return an array, if the caller may see it. Raise NotFound; Forbidden if he may, but not do this (a route's name)."""
    row = tx.row(_arrays().where(submission.c.id == array_id))
    missing = NotFound(f"you have no array {array_id}", hint="deskgrid array list")
    if row is None:
        raise missing
    found = _array(row)
    require(tx, caller, action, thing_of_job(found.owner_id, found.spec.group), see="get_array", missing=missing)
    return found


def list_arrays(
    tx: Transaction, *, owner: UserId | None, before: int | None, limit: int, group: str = ""
) -> tuple[tuple[Array, ...], bool]:
    """Return at most `limit` arrays, newest first, and whether there are older ones."""
    query = _arrays().order_by(submission.c.id.desc()).limit(limit + 1)
    if group:
        query = query.where(queue.c.team == group)
    if owner is not None:
        query = query.where(submission.c.owner_id == owner)
    if before is not None:
        query = query.where(submission.c.id < before)
    rows = tx.rows(query)
    return tuple(_array(row) for row in rows[:limit]), len(rows) > limit


def _arrays() -> sa.Select[tuple[Any, ...]]:
    counts = [queue.c[state.value] for state in JobState]
    joined = submission.join(account, account.c.id == submission.c.owner_id).join(queue, queue.c.id == submission.c.queue_id)
    columns = (*WITHOUT_SECRETS, account.c.name.label("owner"), *counts)
    return sa.select(*columns).select_from(joined).where(submission.c.size.is_not(None))


_SHOWN = {state.value: ArrayState(state.value) for state in SubmissionState if state is not SubmissionState.CANCELLING} | {
    SubmissionState.CANCELLING.value: ArrayState.CANCELLED
}


def _array(row: Any) -> Array:
    state = _SHOWN[row.state]
    jobs = {one: int(getattr(row, one.value)) for one in JobState}
    moved = {ArrayState.FILLING: JobState.BLOCKED, ArrayState.BLOCKED: JobState.BLOCKED, ArrayState.CANCELLED: JobState.CANCELLED}
    if state in moved:  # its rows are moved little by little, or not at all while it waits to be opened
        jobs[moved[state]] += jobs[JobState.WAITING]
        jobs[JobState.WAITING] = 0
    return Array(
        id=ArrayId(row.id),
        owner_id=UserId(row.owner_id),
        owner=row.owner,
        spec=msgspec.json.decode(row.spec, type=JobSpec),
        state=state,
        count=row.size,
        jobs=jobs,
        created_at=row.created_at,
        finished_at=row.finished_at,
        message=row.message,
    )
