"""Workers as the store knows them."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from deskgrid.core.lifecycle import LIVE_STATES
from deskgrid.model.ids import Sha256, WorkerId
from deskgrid.model.wire import Sync
from deskgrid.model.workers import Profile, Worker, WorkerState
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import attempt, worker

__all__ = ["add_worker", "leave", "list_workers", "seen"]


def add_worker(tx: Transaction, name: str) -> WorkerId:
    """Add a worker under a name for people."""
    shown = "".join(letter for letter in name if letter.isprintable())[:128] or "worker"
    added = tx.run(sa.insert(worker).values(name=shown, joined_at=tx.now, seen_at=0.0))
    return WorkerId(int(added.inserted_primary_key[0]))  # type: ignore[index]


def seen(tx: Transaction, worker_id: WorkerId, sync: Sync) -> None:
    """Note what a worker said of itself."""
    tx.run(
        sa.update(worker)
        .where(worker.c.id == worker_id)
        .values(
            seen_at=tx.now,
            paused=sync.paused,
            profile=msgspec.json.encode(sync.profile).decode(),
            cached=msgspec.json.encode(sync.cached[:1000]).decode(),
        )
    )


def leave(tx: Transaction, worker_id: WorkerId) -> None:
    """Note that a worker has left; its token is not valid any more."""
    tx.run(sa.update(worker).where(worker.c.id == worker_id).values(left_at=tx.now))


def list_workers(tx: Transaction, offline_after_s: float) -> tuple[Worker, ...]:
    """Return the workers that have not left, by number."""
    live = (
        sa.select(sa.func.count())
        .where(attempt.c.worker_id == worker.c.id, attempt.c.state.in_([state.value for state in LIVE_STATES]))
        .scalar_subquery()
    )
    rows = tx.rows(sa.select(worker, live.label("running")).where(worker.c.left_at.is_(None)).order_by(worker.c.id))
    return tuple(
        Worker(
            id=WorkerId(row.id),
            name=row.name,
            state=_state(row, tx.now - offline_after_s),
            joined_at=row.joined_at,
            seen_at=row.seen_at,
            running=row.running,
            profile=msgspec.json.decode(row.profile, type=Profile) if row.profile else None,
            cached=msgspec.json.decode(row.cached, type=tuple[Sha256, ...]),
        )
        for row in rows
    )


def _state(row: sa.Row[tuple[object, ...]], silent_since: float) -> WorkerState:
    if row.seen_at < silent_since:
        return WorkerState.OFFLINE
    return WorkerState.PAUSED if row.paused else WorkerState.ONLINE
