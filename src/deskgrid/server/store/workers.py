"""Workers as the store knows them."""

from __future__ import annotations

import hashlib
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa

from deskgrid.errors import Conflict, InvalidInput, NotFound, Unauthenticated
from deskgrid.model.ids import AttemptId, Sha256, UserId, WorkerId, is_sha256
from deskgrid.model.users import Role
from deskgrid.model.wire import Sync
from deskgrid.model.workers import Capacity, Profile, Worker, WorkerState
from deskgrid.server.store import placement
from deskgrid.server.store.accounts import Caller, check_shares, groups_of
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import IS_LIVE, account, attempt, worker
from deskgrid.server.store.statement import Statement

__all__ = ["Known", "add_worker", "how_many", "leave", "list_workers", "note_call", "owner_of", "reserve", "seen", "totals"]


def add_worker(
    tx: Transaction,
    name: str,
    *,
    owner: UserId | None = None,
    max_per_user: int = 0,
    pilot_of: UserId | None = None,
    attempt_id: AttemptId | None = None,
    ends_at: float | None = None,
) -> WorkerId:
    """Add a worker under a name for people; or a pilot of a user's, in an attempt or until a time.

    Raise Conflict if its owner has `max_per_user` (0: no bound) already.
    """
    if owner is not None and max_per_user:
        mine = sa.select(sa.func.count()).select_from(worker).where(worker.c.owner_id == owner, worker.c.left_at.is_(None))
        mine = mine.where(worker.c.pilot_of.is_(None) if pilot_of is None else worker.c.pilot_of == owner)
        if int(tx.value(mine)) >= max_per_user:
            raise Conflict(f"{max_per_user} PCs of this user have joined already", hint="remove one: deskgrid worker remove")
    shown = "".join(letter for letter in name if letter.isprintable())[:128] or "worker"
    values = {"owner_id": owner, "pilot_of": pilot_of, "pilot_attempt_id": attempt_id, "ends_at": ends_at}
    added = tx.run(sa.insert(worker).values(name=shown, joined_at=tx.now, seen_at=0.0, **values))
    return WorkerId(int(added.inserted_primary_key[0]))  # type: ignore[index]


class Known(NamedTuple):
    """What the store knows of a worker that matching needs."""

    told: str
    """Hash of its profile."""
    call: str
    """Key of its last call that leased something."""
    owner_id: UserId | None
    owner_groups: frozenset[str]
    reserved_for: str
    pilot_of: UserId | None
    pilot_groups: frozenset[str]


_LOOK = Statement(
    sa.select(
        worker.c.told,
        worker.c.call,
        worker.c.owner_id,
        worker.c.reserved_for,
        worker.c.reserved_until,
        worker.c.pilot_of,
        worker.c.left_at,
    )
    .where(worker.c.id == sa.bindparam("worker_id"))
    .with_for_update(key_share=True)  # a call that it repeats at another process waits for the first, and finds what that leased
)
_SEEN = Statement(
    sa.update(worker)
    .where(worker.c.id == sa.bindparam("worker_id"))
    .values(seen_at=sa.bindparam("at"), paused=sa.bindparam("is_paused", type_=sa.Boolean()))
)


def seen(tx: Transaction, worker_id: WorkerId, sync: Sync) -> Known:
    """Note what a worker said of itself, and return what is known of it. What it says again is not written again."""
    contents = [one for one in (*sync.cached[:1000], *sync.held[:1000]) if is_sha256(one)]
    profile, cached = msgspec.json.encode(sync.profile), msgspec.json.encode(contents)
    told = hashlib.sha256(profile).hexdigest()[:32] + hashlib.sha256(cached).hexdigest()[:32]
    [(before, call, owner_id, reserved_for, reserved_until, pilot_of, left_at)] = tx.fast(_LOOK, worker_id=worker_id)
    if left_at is not None:  # since its token was looked at
        raise Unauthenticated("this worker has left the grid")
    tx.change(_SEEN, worker_id=worker_id, at=tx.now, is_paused=sync.paused)
    if told != before:
        disks = [one for one in sync.cached[:1000] if is_sha256(one)]
        values = {"told": told, "profile": profile.decode(), "cached": msgspec.json.encode(disks).decode()}
        tx.run(sa.update(worker).where(worker.c.id == worker_id).values(**values))
        placement.note_copies(tx, worker_id, contents)
    reserved = reserved_for if reserved_until is None or reserved_until > tx.now else ""
    groups, of_pilot = (groups_of(tx, one) if one is not None else frozenset() for one in (owner_id, pilot_of))
    return Known(told[:32], call, owner_id, groups, reserved, pilot_of, of_pilot)


_COUNTED_S = 10.0


def how_many(tx: Transaction, interval_s: float) -> tuple[int, int]:
    """Return how many workers call (within the longest interval), and how many of them hold attempts; as of a few seconds ago."""
    kept: tuple[float, int, int] | None = tx.memo.get("workers")
    if kept is None or not kept[0] <= tx.now < kept[0] + _COUNTED_S:
        calling = sa.select(sa.func.count()).where(worker.c.left_at.is_(None), worker.c.seen_at > tx.now - 1.2 * interval_s)
        busy = sa.select(sa.func.count(sa.distinct(attempt.c.worker_id))).where(IS_LIVE)
        kept = tx.memo["workers"] = (tx.now, int(tx.value(calling)), int(tx.value(busy)))
    return kept[1], kept[2]


_NOTE_CALL = Statement(sa.update(worker).where(worker.c.id == sa.bindparam("worker_id")).values(call=sa.bindparam("key")))


def note_call(tx: Transaction, worker_id: WorkerId, key: str) -> None:
    """Note the key of a call that leased something."""
    tx.change(_NOTE_CALL, worker_id=worker_id, key=key[:64])


def leave(tx: Transaction, worker_id: WorkerId) -> None:
    """Note that a worker has left; its token is not valid any more."""
    tx.run(sa.update(worker).where(worker.c.id == worker_id).values(left_at=tx.now))
    placement.forget_worker(tx, worker_id)


def reserve(tx: Transaction, worker_id: WorkerId, reserved_for: str, lifetime_s: float) -> None:
    """Keep a worker for user:NAME or group:NAME for a time (0: until cleared), or for nobody (""). Raise NotFound, InvalidInput."""
    if reserved_for and not reserved_for.startswith(("user:", "group:")):
        raise InvalidInput(f"{reserved_for[:80]!r} is nobody", where="reserved_for", hint="user:NAME or group:NAME")
    check_shares(tx, (reserved_for,) if reserved_for else (), "reserved_for")
    if not 0 <= lifetime_s <= _LONGEST_RESERVATION_S:
        raise InvalidInput("it can be reserved for some time, or until that is cleared", where="lifetime_s")
    until = tx.now + lifetime_s if reserved_for and lifetime_s else None
    values = {"reserved_for": reserved_for, "reserved_until": until}
    if not tx.run(sa.update(worker).where(worker.c.id == worker_id, worker.c.left_at.is_(None)).values(**values)).rowcount:
        raise NotFound(f"there is no worker {worker_id}", hint="deskgrid worker list")
    tx.memo.pop("board", None)


_LONGEST_RESERVATION_S = 3660 * 86400.0


def owner_of(tx: Transaction, worker_id: WorkerId) -> UserId | None:
    """Return the user whose PC it is, or whose pilot; None if nobody said. Raise NotFound."""
    whose = sa.func.coalesce(worker.c.pilot_of, worker.c.owner_id).label("whose")
    row = tx.row(sa.select(whose).where(worker.c.id == worker_id, worker.c.left_at.is_(None)))
    if row is None:
        raise NotFound(f"there is no worker {worker_id}", hint="deskgrid worker list")
    return UserId(row.whose) if row.whose is not None else None


def list_workers(
    tx: Transaction, offline_after_s: float, only: WorkerId | None = None, *, viewer: Caller | None = None
) -> tuple[Worker, ...]:
    """Return the workers that have not left, or one of them, by number. What disks they have is told to their owner and to admins: whose
    those are, others need not know."""
    live = sa.select(sa.func.count()).where(attempt.c.worker_id == worker.c.id, IS_LIVE).scalar_subquery()
    pilots = account.alias("pilots")
    joined = worker.outerjoin(account, account.c.id == worker.c.owner_id).outerjoin(pilots, pilots.c.id == worker.c.pilot_of)
    joined = joined.outerjoin(hosts := attempt.alias("hosts"), hosts.c.id == worker.c.pilot_attempt_id)
    names = (account.c.name.label("owner"), pilots.c.name.label("pilot_owner"), hosts.c.job_id.label("pilot_job_id"))
    query = sa.select(worker, live.label("running"), *names).select_from(joined)
    query = query.where(worker.c.left_at.is_(None)).order_by(worker.c.id)
    rows = tx.rows(query if only is None else query.where(worker.c.id == only))
    return tuple(
        Worker(
            id=WorkerId(row.id),
            name=row.name,
            state=_state(row, tx.now - offline_after_s),
            joined_at=row.joined_at,
            seen_at=row.seen_at,
            running=row.running,
            profile=msgspec.json.decode(row.profile, type=Profile) if row.profile else None,
            cached=msgspec.json.decode(row.cached, type=tuple[Sha256, ...]) if _may_see_disks(viewer, row.owner_id) else (),
            owner=row.owner or "",
            pilot_of=row.pilot_owner or "",
            pilot_job_id=row.pilot_job_id,
            ends_at=row.ends_at,
            reserved_for=row.reserved_for if (row.reserved_until or tx.now + 1) > tx.now else "",
            reserved_until=row.reserved_until,
        )
        for row in rows
    )


def _may_see_disks(viewer: Caller | None, owner_id: int | None) -> bool:
    return viewer is None or viewer.role is Role.ADMIN or (owner_id is not None and owner_id == viewer.user_id)


def totals(tx: Transaction, offline_after_s: float) -> tuple[dict[WorkerState, int], Capacity]:
    """Return how many workers there are in each state, and what those online lend; summed up by the database: there may be very many."""
    silent, there = worker.c.seen_at < tx.now - offline_after_s, worker.c.left_at.is_(None)
    state = sa.case(
        (silent, WorkerState.OFFLINE.value), (worker.c.paused, WorkerState.PAUSED.value), else_=WorkerState.ONLINE.value
    )
    each = sa.select(state.label("state")).where(there).subquery()
    found = {WorkerState(row[0]): int(row[1]) for row in tx.rows(sa.select(each.c.state, sa.func.count()).group_by(each.c.state))}
    # What workers say may sum up to more than an integer takes.
    lent = (sa.cast(_lent(tx, name), sa.Float()) for name in ("cpus", "memory_bytes", "disk_bytes"))
    sums = [sa.func.coalesce(sa.func.sum(amount), 0.0) for amount in lent]
    online = sa.select(*sums).where(there, ~silent, worker.c.paused.is_(False), worker.c.profile.is_not(None))
    cpus, memory_bytes, disk_bytes = tx.rows(online)[0]
    counted = {one: found.get(one, 0) for one in WorkerState}
    return counted, Capacity(cpus=int(cpus), memory_bytes=int(memory_bytes), disk_bytes=int(disk_bytes))


def _lent(tx: Transaction, name: str) -> Any:
    if tx.connection.dialect.name == "postgresql":
        return sa.cast(worker.c.profile, sa.JSON())[("lent", name)].as_string()
    return sa.func.json_extract(worker.c.profile, f"$.lent.{name}")


def _state(row: sa.Row[tuple[object, ...]], silent_since: float) -> WorkerState:
    if row.seen_at < silent_since:
        return WorkerState.OFFLINE
    return WorkerState.PAUSED if row.paused else WorkerState.ONLINE
