"""Pilots: workers that users start, in a job of theirs or on another system. They end with that attempt, or at a time.

What a pilot's jobs used is charged to who submitted them; a pilot in a job of the grid is charged to its user for the rest of its time.
"""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from deskgrid.core.lifecycle import FINAL_JOB_STATES, AttemptEvent
from deskgrid.core.matching import Ask, Person, Requirement, ask_of, fits, suits
from deskgrid.core.rights import Right
from deskgrid.errors import Conflict, Forbidden, Unauthenticated
from deskgrid.model.ids import AttemptId, UserId, WorkerId
from deskgrid.model.jobs import AttemptState
from deskgrid.model.wire import LIST_WAITING, WaitingClass
from deskgrid.model.workers import Profile
from deskgrid.server.store import accounts, attempts, queues, swarm, workers
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import IS_LIVE, attempt, job, queue, worker

__all__ = ["end_pilots", "join_in_attempt", "let_go", "waiting"]

_AT_ONCE = 200


def join_in_attempt(tx: Transaction, caller: Caller, name: str) -> WorkerId:
    """Add the worker that a job of the grid is. Raise Forbidden if the job is no pilot, Conflict if it has joined in this attempt already."""
    if caller.attempt_id is None or caller.user_id is None or Right.PILOT not in (caller.rights or ()):
        raise Forbidden("only a job that is a pilot joins so")
    host = tx.row(
        sa.select(worker.c.owner_id, worker.c.pilot_of)
        .join(attempt, attempt.c.worker_id == worker.c.id)
        .where(attempt.c.id == caller.attempt_id, IS_LIVE)
        .with_for_update(of=attempt)
    )
    if host is None:
        raise Unauthenticated("this token was valid while its job ran")
    if host.pilot_of is not None:
        raise Forbidden("a pilot in a pilot is none")
    if tx.value(sa.select(worker.c.id).where(worker.c.pilot_attempt_id == caller.attempt_id)) is not None:
        raise Conflict("this pilot has joined already", hint="a pilot joins once in an attempt")
    owner = UserId(host.owner_id) if host.owner_id is not None else None
    return workers.add_worker(tx, name, owner=owner, pilot_of=caller.user_id, attempt_id=caller.attempt_id)


def let_go(tx: Transaction, worker_id: WorkerId) -> None:
    """Give back all that a worker holds and let it go. Idempotent. Its row is locked first, as by its own calls."""
    workers.leave(tx, worker_id)
    for held in attempts.held_by(tx, worker_id).values():
        attempts.apply_event(tx, held, AttemptEvent.RETURNED)
    swarm.forget_member(tx, f"worker:{worker_id}")
    if (attempt_id := tx.value(sa.select(worker.c.pilot_attempt_id).where(worker.c.id == worker_id))) is not None:
        attempts.settle_pilot(tx, attempt_id)


def end_pilots(tx: Transaction) -> None:
    """Let those go whose time is over."""
    # A lost attempt may come back, until its job is over.
    ended = sa.and_(
        ~IS_LIVE, sa.or_(attempt.c.state != AttemptState.LOST.value, job.c.state.in_(_FINAL), attempt.c.ended_at < tx.now - _BACK_S)
    )
    of_attempt = worker.outerjoin(attempt, attempt.c.id == worker.c.pilot_attempt_id).outerjoin(job, job.c.id == attempt.c.job_id)
    over = sa.or_(
        worker.c.ends_at <= tx.now, sa.and_(worker.c.pilot_attempt_id.is_not(None), sa.or_(attempt.c.id.is_(None), ended))
    )
    there = (worker.c.pilot_of.is_not(None), worker.c.left_at.is_(None))
    for row in tx.rows(sa.select(worker.c.id).select_from(of_attempt).where(*there, over).limit(_AT_ONCE)):
        let_go(tx, WorkerId(row.id))


_FINAL = [state.value for state in FINAL_JOB_STATES]
_BACK_S = 86400.0
"""For which a pilot whose attempt was lost is waited for."""


def waiting(tx: Transaction, caller: Caller, offline_after_s: float) -> tuple[WaitingClass, ...]:
    """Return what the caller's waiting jobs need, and those of his groups, with how many workers online could run them.

    Not of those that want certain PCs, owners or drivers, or have secrets: nobody knows whether a pilot that is not there yet will suit them.
    """
    mine = accounts.visible(tx, caller, LIST_WAITING.name, owner=queue.c.owner_id, group=queue.c.team)
    found = [one for one in queues.waiting_queues(tx, mine) if not _is_particular(one.requirement)]
    people = queues.people_of(tx, {one.owner_id for one in found})
    kinds = _kinds_of_workers(tx, offline_after_s) if found else []
    counted: dict[WaitingClass, int] = {}
    for one in found:
        wanted, person = one.requirement, people.get(one.owner_id, Person())
        what = WaitingClass(
            jobs=0,
            kind=wanted.kind,
            network=wanted.network,
            cpus=wanted.cpus,
            memory_bytes=wanted.memory_bytes,
            packages=wanted.packages,
            platforms=wanted.platforms,
            wall_time_s=wanted.wall_time_s,
            workers=sum(count for ask, count in kinds if fits(wanted, ask.free) and suits(ask, one, person)),
        )
        counted[what] = counted.get(what, 0) + one.waiting
    return tuple(msgspec.structs.replace(what, jobs=jobs) for what, jobs in counted.items())


def _is_particular(wanted: Requirement) -> bool:
    return bool(wanted.on or wanted.trust or wanted.driver or wanted.secrets)


_MOST_KINDS = 1000


def _kinds_of_workers(tx: Transaction, offline_after_s: float) -> list[tuple[Ask, int]]:
    """Return the kinds of workers online that are no pilots, with how many there are of each: in a laboratory most are alike."""
    told = sa.func.substr(worker.c.told, 1, 32)
    there = (worker.c.left_at.is_(None), worker.c.pilot_of.is_(None), worker.c.paused.is_(False), worker.c.profile.is_not(None))
    lately = worker.c.seen_at >= tx.now - offline_after_s
    reserved_for = sa.case(
        (sa.or_(worker.c.reserved_until.is_(None), worker.c.reserved_until > tx.now), worker.c.reserved_for), else_=""
    )
    groups = (worker.c.owner_id, reserved_for.label("reserved_for"))
    columns = (sa.func.min(worker.c.profile).label("profile"), sa.func.count().label("many"))
    alike = sa.select(*columns, *groups).where(*there, lately).group_by(told, *groups)
    found = []
    for row in tx.rows(alike.limit(_MOST_KINDS)):
        profile = msgspec.json.decode(row.profile, type=Profile)
        owner_groups = accounts.groups_of(tx, row.owner_id) if row.owner_id is not None else frozenset[str]()
        ask = ask_of(profile, profile.lent, owner_id=row.owner_id, owner_groups=owner_groups, reserved_for=row.reserved_for)
        found.append((ask, row.many))
    return found


def _attempt_ended(tx: Transaction, attempt_id: AttemptId, may_come_back: bool) -> None:
    """Let the pilot of an attempt go, unless that may come back."""
    row = tx.row(sa.select(worker.c.id, worker.c.left_at).where(worker.c.pilot_attempt_id == attempt_id))
    if row is not None and row.left_at is not None:
        attempts.settle_pilot(tx, attempt_id)
    elif row is not None and not may_come_back:
        let_go(tx, WorkerId(row.id))


attempts.PILOT_ENDS.append(_attempt_ended)
