"""Pilots: workers that users start, in a job of theirs or on another system. They end with that attempt, or at a time.

What a pilot's jobs used is charged to who submitted them; a pilot in a job of the grid is charged to its user for the rest of its time.
"""

from __future__ import annotations

import sqlalchemy as sa

from deskgrid.core.lifecycle import AttemptEvent
from deskgrid.core.rights import Right
from deskgrid.errors import Conflict, Forbidden
from deskgrid.model.ids import AttemptId, UserId, WorkerId
from deskgrid.server.store import attempts, swarm, workers
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import attempt, worker

__all__ = ["end_pilots", "join_in_attempt", "let_go"]

_AT_ONCE = 200


def join_in_attempt(tx: Transaction, caller: Caller, name: str) -> WorkerId:
    """Add the worker that a job of the grid is. Raise Forbidden if the job is no pilot, Conflict if it has joined in this attempt already."""
    if caller.attempt_id is None or caller.user_id is None or Right.PILOT not in (caller.rights or ()):
        raise Forbidden("only a job that is a pilot joins so")
    host = tx.row(
        sa.select(worker.c.owner_id).join(attempt, attempt.c.worker_id == worker.c.id).where(attempt.c.id == caller.attempt_id)
    )
    if tx.value(sa.select(worker.c.id).where(worker.c.pilot_attempt_id == caller.attempt_id)) is not None:
        raise Conflict("this pilot has joined already", hint="a pilot joins once in an attempt")
    owner = UserId(host.owner_id) if host is not None and host.owner_id is not None else None
    return workers.add_worker(tx, name, owner=owner, pilot_of=caller.user_id, attempt_id=caller.attempt_id)


def let_go(tx: Transaction, worker_id: WorkerId) -> None:
    """Give back all that a worker holds and let it go. Idempotent."""
    for held in attempts.held_by(tx, worker_id).values():
        attempts.apply_event(tx, held, AttemptEvent.RETURNED)
    workers.leave(tx, worker_id)
    swarm.forget_member(tx, f"worker:{worker_id}")


def end_pilots(tx: Transaction) -> None:
    """Let those go whose time is over."""
    over = sa.select(worker.c.id).where(worker.c.pilot_of.is_not(None), worker.c.left_at.is_(None), worker.c.ends_at <= tx.now)
    for row in tx.rows(over.limit(_AT_ONCE)):
        let_go(tx, WorkerId(row.id))


def _end_of_attempt(tx: Transaction, attempt_id: AttemptId) -> float:
    """Let the pilot of an attempt go that has ended, and return the CPU seconds that its jobs were charged for."""
    row = tx.row(sa.select(worker.c.id, worker.c.left_at).where(worker.c.pilot_attempt_id == attempt_id))
    if row is None:
        return 0.0
    if row.left_at is None:
        let_go(tx, WorkerId(row.id))
    return float(tx.value(sa.select(worker.c.served_s).where(worker.c.id == row.id)))


attempts.PILOT_ENDS.append(_end_of_attempt)
