"""Queues: how many jobs of which class, user, group and priority are in which state; and the board that asks are matched with.

The counts change in the same transaction as the jobs. They are summed up over a batch and written once, so that many workers that end
jobs of one array do not all write the same row. The board is a copy of what waits, kept for a moment by the process that matches; it may be
a little behind when other processes write, so what it promises is looked for in the table (attempts.lease), and may not be found.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import msgspec
import sqlalchemy as sa

from deskgrid.core.matching import Ask, Person, Queue, Requirement, suiting
from deskgrid.core.shares import Standings, Use, faded
from deskgrid.model.ids import Sha256, UserId
from deskgrid.model.jobs import JobState
from deskgrid.model.manifests import Revocation
from deskgrid.model.workers import Assignment
from deskgrid.server.store import manifests
from deskgrid.server.store.engine import BEFORE_COMMIT, Transaction
from deskgrid.server.store.schema import account, job, membership, queue, requirement, team, use
from deskgrid.server.store.statement import Statement

__all__ = [
    "ARRAY_RAN_OUT",
    "Board",
    "Counted",
    "Used",
    "board",
    "come_back",
    "count",
    "count_states",
    "find_queue",
    "note_use",
    "nothing_waits",
    "open_queue",
    "people_of",
    "queue_counts",
    "read_requirement",
    "revoked_queues",
    "waiting_of",
    "waiting_queues",
]

_BOARD_S = 1.0
_STATES = tuple(state.value for state in JobState)


class Counted(NamedTuple):
    """Key of a delta: jobs of a queue in a state."""

    queue_id: int
    state: str


class Used(NamedTuple):
    """Key of a delta: CPU seconds of a user for a group."""

    owner_id: int
    team: str


ARRAY_RAN_OUT: list[Any] = []
"""Called with (tx, array_id) when the last job of an array that is there has ended."""


def count(tx: Transaction, queue_id: int, old: JobState | None, new: JobState | None, by: int = 1) -> None:
    """Move `by` jobs of a queue from one state to another; None: they come, or go for good."""
    if old is not None:
        tx.add(Counted(queue_id, old.value), -by)
    if new is not None:
        tx.add(Counted(queue_id, new.value), by)
    known = _kept_board(tx)
    if known is not None:
        known.note(queue_id, (by if new is JobState.WAITING else 0) - (by if old is JobState.WAITING else 0))


def come_back(tx: Transaction, queue_id: int, job_id: int) -> None:
    """Note that a job waits which may be older than those leased last; `count` is told besides."""
    known = _kept_board(tx)
    if known is not None:
        known.look_from(queue_id, job_id)


def note_use(tx: Transaction, owner_id: int, group: str, cpu_s: float) -> None:
    """Charge CPU seconds to a user; below 0: take them off again."""
    tx.add(Used(owner_id, group), cpu_s)


_ADD = Statement(
    sa.update(queue)
    .where(queue.c.id == sa.bindparam("queue_id"))
    .values(**{state: queue.c[state] + sa.bindparam(f"add_{state}", type_=sa.BigInteger()) for state in _STATES})
    .returning(queue.c.array_id, queue.c.blocked + queue.c.waiting + queue.c.active)
)


def _write_counts(tx: Transaction, deltas: Mapping[Hashable, float]) -> None:
    """Add up what a batch has counted. In the order of the queues, so that two processes never wait for each other."""
    by_queue: dict[int, dict[str, int]] = {}
    for key, amount in deltas.items():
        if isinstance(key, Counted) and amount:
            by_queue.setdefault(key.queue_id, dict.fromkeys((f"add_{state}" for state in _STATES), 0))[f"add_{key.state}"] += int(
                amount
            )
    ended = []
    for queue_id in sorted(by_queue):
        for array_id, left in tx.fast(_ADD, queue_id=queue_id, **by_queue[queue_id]):
            if array_id and not left:
                ended.append(array_id)
    for array_id in ended:
        for react in ARRAY_RAN_OUT:
            react(tx, array_id)


_USED = Statement(
    sa.select(use.c.cpu_s, use.c.at).where(use.c.account_id == sa.bindparam("of"), use.c.team == sa.bindparam("for_team"))
)
HALF_LIFE_S = 86400.0 * 7


def _write_uses(tx: Transaction, deltas: Mapping[Hashable, float]) -> None:
    for key, cpu_s in sorted((key, amount) for key, amount in deltas.items() if isinstance(key, Used)):
        mine = (use.c.account_id == key.owner_id, use.c.team == key.team)
        row = tx.row(sa.select(use.c.cpu_s, use.c.at).where(*mine).with_for_update())
        if row is None:
            tx.run(sa.insert(use).values(account_id=key.owner_id, team=key.team, cpu_s=max(0.0, cpu_s), at=tx.now))
        else:
            total = faded(row.cpu_s, row.at, now=tx.now, half_life_s=HALF_LIFE_S) + cpu_s
            tx.run(sa.update(use).where(*mine).values(cpu_s=max(0.0, total), at=max(tx.now, row.at)))


BEFORE_COMMIT.extend([_write_counts, _write_uses])


# The board


class Board:
    """What waits in the whole grid, and who is next."""

    def __init__(
        self,
        queues: Iterable[Queue],
        standings: Standings,
        people: dict[UserId, Person],
        until: float,
    ) -> None:
        self._queues = {one.id: one for one in queues}
        self._changed: dict[int, int] = {}
        self._suiting: dict[Hashable, tuple[int, ...]] = {}
        self.standings = standings
        self.people = people
        self.until = until
        self.names_workers = any(one.requirement.on.startswith("worker:") for one in self._queues.values())

    def queues(self) -> list[Queue]:
        """Return the queues in which jobs wait."""
        self._update()
        return [one for one in self._queues.values() if one.waiting > 0]

    def suiting(self, ask: Ask, alike: Hashable) -> list[Queue]:
        """Return the queues in which jobs wait that suit a worker. `alike` is the same for workers that the same queues suit."""
        found = self._suiting.get(alike)
        if found is None:
            found = self._suiting[alike] = tuple(one.id for one in suiting(ask, self._queues.values(), self.people))
        self._update()
        queues = self._queues
        return [queues[queue_id] for queue_id in found if queues[queue_id].waiting > 0]

    def _update(self) -> None:
        for queue_id, by in self._changed.items():
            known = self._queues[queue_id]
            self._queues[queue_id] = msgspec.structs.replace(known, waiting=max(0, known.waiting + by))
        self._changed.clear()

    def note(self, queue_id: int, by: int) -> None:
        """Note that more or fewer jobs of a queue wait."""
        if by and queue_id in self._queues:
            self._changed[queue_id] = self._changed.get(queue_id, 0) + by
        elif by > 0:
            self.until = 0.0  # a queue that it does not know: look again

    def queue(self, queue_id: int) -> Queue:
        """Return one of the queues that `queues` gave."""
        return self._queues[queue_id]

    def look_from(self, queue_id: int, job_id: int) -> None:
        """Look for jobs of a queue from this one on, if not from an older one."""
        known = self._queues.get(queue_id)
        if known is not None and job_id < known.head:
            self._queues[queue_id] = msgspec.structs.replace(known, head=job_id)

    def took(self, queue_id: int, found: Sequence[Assignment]) -> None:
        """Note which jobs of a queue were leased: the next are looked for after them, and count against their user's quota."""
        if not found:
            return
        known = self._queues[queue_id]
        self._queues[queue_id] = msgspec.structs.replace(known, head=max(one.job_id for one in found) + 1)
        person = self.people.get(known.owner_id)
        if person is not None:
            self.people[known.owner_id] = msgspec.structs.replace(person, may_run=person.may_run - len(found))


def _kept_board(tx: Transaction) -> Board | None:
    found = tx.memo.get("board")
    return found if isinstance(found, Board) else None


def board(tx: Transaction) -> Board:
    """Return the board, at most a second old."""
    found = _kept_board(tx)
    if found is None or found.until <= tx.now or found.until > tx.now + _BOARD_S:
        tx.settle()
        found = _read_board(tx)
        tx.memo["board"] = found
    return found


def nothing_waits(tx: Transaction) -> bool:
    """Tell whether no job waits, as far as this process knows without looking."""
    known = _kept_board(tx)
    return known is not None and known.until > tx.now and not known.queues()


def _read_board(tx: Transaction) -> Board:
    queues = waiting_queues(tx)
    if not queues:
        return Board((), Standings((), {}, now=tx.now, half_life_s=HALF_LIFE_S), {}, tx.now + _BOARD_S)
    people = people_of(tx, {one.owner_id for one in queues})
    return Board(queues, _standings(tx), people, tx.now + _BOARD_S)


def waiting_queues(tx: Transaction, *those: sa.ColumnElement[bool]) -> list[Queue]:
    """Return the queues in which jobs wait, those whose disk is revoked aside."""
    head = sa.select(sa.func.min(job.c.id)).where(job.c.queue_id == queue.c.id, job.c.state == JobState.WAITING.value)
    columns = (queue, requirement.c.key, requirement.c.body, head.scalar_subquery().label("head"))
    rows = tx.rows(sa.select(*columns).join(requirement).where(queue.c.open.is_(True), queue.c.waiting > 0, *those))
    if not rows:
        return []
    wanted = [read_requirement(tx, row) for row in rows]
    vouching = manifests.endorsers(tx, {one.disk for one in wanted if one.disk})
    revoked = manifests.revocations(tx, {_disk_of(one) for one in wanted})
    return [
        Queue(
            id=row.id,
            class_id=row.class_id,
            owner_id=UserId(row.owner_id),
            requirement=of_class,
            waiting=row.waiting,
            head=row.head or 0,
            team=row.team,
            priority=row.priority,
            endorsers=vouching.get(of_class.disk, frozenset()),
        )
        for row, of_class in zip(rows, wanted, strict=True)
        if _disk_of(of_class) not in revoked
    ]


def revoked_queues(tx: Transaction) -> dict[Revocation, list[int]]:
    """Return the queues with jobs that wait or are active with a disk which must not be started any more, by what was said of it."""
    tx.settle()
    busy = sa.or_(queue.c.waiting > 0, queue.c.active > 0)
    rows = tx.rows(sa.select(queue.c.id, requirement.c.key, requirement.c.body).join(requirement).where(busy))
    disks = {row.id: _disk_of(read_requirement(tx, row)) for row in rows}
    revoked = manifests.revocations(tx, disks.values())
    found: dict[Revocation, list[int]] = {}
    for queue_id, disk in disks.items():
        if disk in revoked:
            found.setdefault(revoked[disk], []).append(queue_id)
    return found


def _disk_of(wanted: Requirement) -> tuple[Sha256, int]:
    return wanted.disk, wanted.disk_owner


def read_requirement(tx: Transaction, row: Any) -> Requirement:
    """Return the class of a row with `key` and `body`."""
    known: dict[str, Requirement] = tx.memo.setdefault("requirements", {})
    found = known.get(row.key)
    if found is None:
        while len(known) >= _MOST_KNOWN:
            known.pop(next(iter(known)))
        found = known[row.key] = msgspec.json.decode(row.body or row.key, type=Requirement)
    return found


_MOST_KNOWN = 10_000


def _standings(tx: Transaction) -> Standings:
    running: dict[tuple[str, UserId], int] = {}
    active = (
        sa.select(queue.c.team, queue.c.owner_id, queue.c.active, requirement.c.key, requirement.c.body)
        .join(requirement)
        .where(queue.c.active > 0)
    )
    for row in tx.rows(active):
        cpus = read_requirement(tx, row).cpus
        key = (row.team, UserId(row.owner_id))
        running[key] = running.get(key, 0) + row.active * cpus
    return Standings(
        (Use(UserId(row.account_id), row.team, row.cpu_s, row.at) for row in tx.rows(sa.select(use))),
        running,
        now=tx.now,
        half_life_s=HALF_LIFE_S,
        users={
            UserId(row.id): row.weight for row in tx.rows(sa.select(account.c.id, account.c.weight).where(account.c.weight != 1))
        },
        teams={row.name: row.weight for row in tx.rows(sa.select(team.c.name, team.c.weight).where(team.c.weight != 1))},
    )


def people_of(tx: Transaction, ids: set[UserId]) -> dict[UserId, Person]:
    groups: dict[int, set[str]] = {}
    for row in tx.rows(sa.select(membership).where(membership.c.account_id.in_(ids))):
        groups.setdefault(row.account_id, set()).add(row.team)
    active = sa.select(queue.c.owner_id, sa.func.sum(queue.c.active)).group_by(queue.c.owner_id)
    running = {row[0]: int(row[1]) for row in tx.rows(active)}
    default = tx.memo.get("max_running")
    people = {}
    for row in tx.rows(sa.select(account.c.id, account.c.name, account.c.max_running).where(account.c.id.in_(ids))):
        most = row.max_running if row.max_running is not None else default
        may_run = max(0, most - running.get(row.id, 0)) if most else 1 << 62
        people[UserId(row.id)] = Person(name=row.name, groups=frozenset(groups.get(row.id, ())), may_run=may_run)
    return people


# Rows


def find_queue(
    tx: Transaction, wanted: Requirement, owner_id: UserId, group: str, priority: int, *, array_id: int = 0, is_open: bool = True
) -> int:
    """Return the number of the queue for such jobs, made if there is none."""
    class_id = _class_of(tx, wanted)
    values = {"class_id": class_id, "owner_id": owner_id, "team": group, "priority": priority, "array_id": array_id}
    same = sa.select(queue.c.id).where(*(queue.c[name] == value for name, value in values.items()))
    found: int | None = tx.value(same)
    if found is None:
        tx.insert_if_new(queue, [*values], **values, open=is_open)
        found = tx.value(same)
    assert found is not None
    return found


def _class_of(tx: Transaction, wanted: Requirement) -> int:
    text = msgspec.json.encode(wanted).decode()
    is_long = len(text.encode()) > _LONGEST_KEY_BYTES
    key = hashlib.sha256(text.encode()).hexdigest() if is_long else text
    same = sa.select(requirement.c.id).where(requirement.c.key == key)
    found: int | None = tx.value(same)
    if found is None:
        tx.insert_if_new(requirement, ["key"], key=key, body=text if is_long else None)
        found = tx.value(same)
    assert found is not None
    return found


_LONGEST_KEY_BYTES = 1000
"""PostgreSQL has indexes of values up to 2704 bytes."""


def open_queue(tx: Transaction, queue_id: int, is_open: bool) -> None:
    """Let the jobs of a queue go, or hold them back."""
    tx.run(sa.update(queue).where(queue.c.id == queue_id).values(open=is_open))
    tx.memo.pop("board", None)


def queue_counts(tx: Transaction, queue_id: int) -> dict[JobState, int]:
    """Return how many jobs of a queue are in each state."""
    tx.settle()
    row = tx.row(sa.select(*(queue.c[state] for state in _STATES)).where(queue.c.id == queue_id))
    return {state: int(row[index]) for index, state in enumerate(JobState)} if row is not None else dict.fromkeys(JobState, 0)


def waiting_of(tx: Transaction, owner_id: UserId) -> int:
    """Return how many jobs of a user wait or are blocked."""
    tx.settle()
    mine = sa.select(sa.func.coalesce(sa.func.sum(queue.c.waiting + queue.c.blocked), 0)).where(queue.c.owner_id == owner_id)
    return int(tx.value(mine))


def count_states(tx: Transaction) -> dict[JobState, int]:
    """Return how many jobs of the grid are in each state."""
    row = tx.row(sa.select(*(sa.func.coalesce(sa.func.sum(queue.c[state]), 0) for state in _STATES)))
    return {state: int(row[index]) for index, state in enumerate(JobState)} if row is not None else dict.fromkeys(JobState, 0)
