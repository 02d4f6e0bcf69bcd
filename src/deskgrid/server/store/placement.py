"""Placements, which worker is to hold which data, and what workers have. What is decided: core/placement.py.

What is to be placed is a list that each process reads again every few seconds; how many hold a piece of data is read in the transaction that
lets another hold it.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from typing import Any

import msgspec
import sqlalchemy as sa
from msgspec import Struct

from deskgrid.core.lifecycle import FINAL_JOB_STATES
from deskgrid.core.matching import Ask, Person, Queue, suits
from deskgrid.core.placement import ORDER_S, Hold, Host, Wanted, decide, is_over, may_hold
from deskgrid.errors import InvalidInput, NotFound
from deskgrid.model.data import Blob, Data, DataRef
from deskgrid.model.ids import DataId, Sha256, UserId, WorkerId
from deskgrid.model.jobs import JobState
from deskgrid.model.placement import ALL, Attributes, CopyState, Holder, Keep, Placement
from deskgrid.server.store import data as store_data
from deskgrid.server.store.accounts import Caller, groups_of
from deskgrid.server.store.data import VERSION
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.queues import read_requirement
from deskgrid.server.store.schema import (
    IS_UNSTARTED,
    account,
    copy,
    data,
    holding,
    job,
    placement,
    queue,
    requirement,
    submission,
    submission_data,
    worker,
)
from deskgrid.server.store.submissions import SubmissionState

__all__ = [
    "Orders",
    "copies_topic",
    "find_orders",
    "forget_worker",
    "holders",
    "list_placements",
    "note_copies",
    "place",
    "remove_placement",
]

GONE_S = 900.0
"""After which a silent worker does not count any more for fault tolerant data."""
_BOARD_S = 5.0
_MOST_PLACEMENTS = 1000
"""Of one user."""
_PATTERN = re.compile(r"[A-Za-z0-9_.+*?-]{1,200}(@[0-9]{1,18})?")
_JOB = re.compile(r"(job|array)-[0-9]{1,18}")
_WORD = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.+-]{0,199}")


class Orders(Struct, frozen=True):
    """What a worker is told: what it is to hold, all of it, and what to remove."""

    keep: tuple[Keep, ...] = ()
    remove: tuple[Sha256, ...] = ()
    fetch: tuple[Keep, ...] = ()
    """Disks that jobs wait for: to be fetched before one comes, and not held."""
    guard: tuple[Sha256, ...] = ()
    """Of what it has, what is wanted and nobody else has."""


class _Placed(Struct, frozen=True):
    wanted: Wanted
    keep: Keep


class _Board(Struct):
    until: float
    placed: list[_Placed]


def copies_topic(data_id: int) -> str:
    """Return the topic of the copies of data."""
    return f"copies:{data_id}"


# What users want


def place(tx: Transaction, caller: Caller, pattern: str, attributes: Attributes) -> Placement:
    """Keep what a user wants of his data of some names; the same names again: instead of before. Raise InvalidInput."""
    if not _PATTERN.fullmatch(pattern):
        raise InvalidInput(f"{pattern[:80]!r} is no name of data", where="data", hint="NAME, NAME@VERSION, or a name with * and ?")
    _check(attributes)
    owner_id = caller.user_id or 0
    mine = (placement.c.owner_id == owner_id, placement.c.pattern == pattern)
    text = msgspec.json.encode(attributes).decode()
    if tx.row(sa.select(placement.c.id).where(*mine)) is not None:
        tx.run(sa.update(placement).where(*mine).values(attributes=text))
    else:
        if (
            int(tx.value(sa.select(sa.func.count()).select_from(placement).where(placement.c.owner_id == owner_id)))
            >= _MOST_PLACEMENTS
        ):
            raise InvalidInput(f"you have {_MOST_PLACEMENTS} placements", hint="remove some, or place many names with one pattern")
        tx.insert_if_new(placement, ["owner_id", "pattern"], owner_id=owner_id, pattern=pattern, attributes=text, created_at=tx.now)
    tx.memo.pop(store_data.PLACED, None)
    return next(one for one in list_placements(tx, caller) if one.pattern == pattern)


def _check(attributes: Attributes) -> None:
    """Raise InvalidInput for attributes that mean nothing."""
    if not (attributes.replicas == ALL or 0 <= attributes.replicas <= 1 << 20):
        raise InvalidInput(f"{attributes.replicas} is no number of replicas", where="replicas", hint="a number, or all")
    if not attributes.replicas and not attributes.affinity:
        raise InvalidInput("say how many replicas, or by an affinity where they go", where="replicas")
    if attributes.max_per_worker < 0:
        raise InvalidInput("a number of data is 0 or more", where="max_per_worker")
    kind, _, name = attributes.affinity.partition(":")
    if attributes.affinity and not _JOB.fullmatch(attributes.affinity) and not (kind in ("data", "tag") and _WORD.fullmatch(name)):
        raise InvalidInput(
            f"{attributes.affinity[:80]!r} is no affinity", where="affinity", hint="data:NAME, job-N, array-N or tag:NAME"
        )
    kind, _, name = attributes.lives_with.partition(":")
    if attributes.lives_with and not _JOB.fullmatch(attributes.lives_with) and not (kind == "data" and _WORD.fullmatch(name)):
        raise InvalidInput(
            f"{attributes.lives_with[:80]!r} is nothing that ends", where="lives_with", hint="job-N, array-N or data:NAME"
        )
    for one in attributes.where:
        kind, _, name = one.partition(":")
        if kind not in ("tag", "group", "worker") or not _WORD.fullmatch(name) or (kind == "worker" and not name.isdecimal()):
            raise InvalidInput(f"{one[:80]!r} is no place", where="where", hint="tag:NAME, group:NAME or worker:NUMBER")


def list_placements(tx: Transaction, caller: Caller) -> tuple[Placement, ...]:
    """Return the caller's placements, with what they are for now."""
    query = sa.select(placement, account.c.name.label("owner")).join(account).where(placement.c.owner_id == caller.user_id)
    rows = tx.rows(query.order_by(placement.c.id))
    of = {row.id: [one.wanted.data_id for one in _board(tx).placed if one.wanted.placement_id == row.id] for row in rows}
    held = {data_id for found in of.values() for data_id in found}
    counts: dict[int, int] = {}
    for data_id in held:
        counts[data_id] = int(
            tx.value(sa.select(sa.func.count()).select_from(holding).where(holding.c.data_id == data_id, holding.c.held.is_(True)))
        )
    return tuple(
        Placement(
            id=row.id,
            owner_id=UserId(row.owner_id),
            owner=row.owner,
            pattern=row.pattern,
            attributes=msgspec.json.decode(row.attributes, type=Attributes),
            created_at=row.created_at,
            data=len(of[row.id]),
            holders=sum(counts[data_id] for data_id in of[row.id]),
        )
        for row in rows
    )


def remove_placement(tx: Transaction, caller: Caller, placement_id: int) -> None:
    """Let workers hold nothing any more for a placement of the caller's; what they have stays until its room is needed. Raise NotFound."""
    mine = (placement.c.id == placement_id, placement.c.owner_id == caller.user_id)
    if not tx.run(sa.delete(placement).where(*mine)).rowcount:
        raise NotFound(f"you have no placement {placement_id}", hint="deskgrid data placements")
    tx.memo.pop(store_data.PLACED, None)


def holders(tx: Transaction, found: Data, offline_after_s: float) -> tuple[Holder, ...]:
    """Return the workers that have data, or are to have it."""
    content = content_of(found)
    query = (
        sa.select(worker.c.id, worker.c.name, worker.c.seen_at, holding.c.since, holding.c.held, copy.c.since.label("has_since"))
        .select_from(
            worker.outerjoin(holding, sa.and_(holding.c.worker_id == worker.c.id, holding.c.data_id == found.id)).outerjoin(
                copy, sa.and_(copy.c.worker_id == worker.c.id, copy.c.content == content, copy.c.there.is_(True))
            )
        )
        .where(worker.c.left_at.is_(None), sa.or_(holding.c.data_id.is_not(None), copy.c.content.is_not(None)))
        .order_by(worker.c.id)
    )
    return tuple(
        Holder(
            worker_id=WorkerId(row.id),
            worker=row.name,
            state=CopyState.CACHED if row.held is None else CopyState.HELD if row.held else CopyState.ORDERED,
            since=row.has_since if row.held is None else row.since,
            online=row.seen_at > tx.now - offline_after_s,
        )
        for row in tx.rows(query)
    )


def content_of(found: Data) -> Sha256:
    """Return by what data is known in workers' caches."""
    return found.disk.sha256 if found.disk is not None else found.blob.sha256


# What is to be placed


def _board(tx: Transaction) -> _Board:
    """Return what is to be placed, at most some seconds old."""
    found: _Board | None = tx.memo.get(store_data.PLACED)
    if found is None or not tx.now < found.until <= tx.now + _BOARD_S:
        found = tx.memo[store_data.PLACED] = _Board(tx.now + _BOARD_S, _read_placed(tx))
    return found


def _read_placed(tx: Transaction) -> list[_Placed]:
    rows = tx.rows(sa.select(placement).order_by(placement.c.id))
    by_owner: dict[int, list[sa.Row[tuple[object, ...]]]] = {}
    for row in rows:
        by_owner.setdefault(row.owner_id, []).append(row)
    placed = []
    for owner_id, own in by_owner.items():
        versions = store_data.versions_of(tx, owner_id)
        newest = {one.name: one for one in versions}
        groups = groups_of(tx, UserId(owner_id))
        taken: set[DataId] = set()
        # A name goes before a pattern, the newer placement before the older: each piece of data is of one.
        for row in sorted(own, key=lambda row: ("*" in row.pattern or "?" in row.pattern, -row.id)):
            attributes = msgspec.json.decode(row.attributes, type=Attributes)
            for one in _meant(row.pattern, newest, versions):
                if one.id not in taken:
                    taken.add(one.id)
                    placed.append(_placed(tx, one, row.id, attributes, groups, newest))
    return placed


def _meant(pattern: str, newest: dict[str, Data], versions: Sequence[Data]) -> list[Data]:
    name, _, version = pattern.partition("@")
    if version and VERSION.fullmatch(version):
        return [one for one in versions if one.version == int(version) and fnmatch.fnmatchcase(one.name, name)]
    return [one for one in newest.values() if fnmatch.fnmatchcase(one.name, name)]


def _placed(
    tx: Transaction, one: Data, placement_id: int, attributes: Attributes, groups: frozenset[str], newest: dict[str, Data]
) -> _Placed:
    kind, _, name = attributes.affinity.partition(":")
    beside = newest.get(name) if kind == "data" else None
    wanted = Wanted(
        data_id=one.id,
        placement_id=placement_id,
        content=content_of(one),
        size_bytes=one.disk.size_bytes if one.disk is not None else one.blob.size_bytes,
        owner_id=one.owner_id,
        owner=one.owner,
        owner_groups=groups,
        attributes=attributes,
        companion_is_gone=_has_ended(tx, attributes.lives_with, one.owner_id, newest),
        affinity_content=content_of(beside) if beside is not None else None,
    )
    ref = DataRef(blob=one.blob, disk=one.disk, delta=one.delta)
    return _Placed(wanted, Keep(data_id=one.id, content=wanted.content, name=one.name, ref=ref, protocol=attributes.protocol))


def _has_ended(tx: Transaction, companion: str, owner_id: int, newest: dict[str, Data]) -> bool:
    if not companion:
        return False
    kind, _, name = companion.partition(":")
    if kind == "data":
        return name not in newest
    noun, _, number = companion.partition("-")
    if noun == "job":
        state = tx.value(sa.select(job.c.state).where(job.c.id == int(number), job.c.owner_id == owner_id))
        return state is None or JobState(state) in FINAL_JOB_STATES
    state = tx.value(sa.select(submission.c.state).where(submission.c.id == int(number), submission.c.owner_id == owner_id))
    return state is None or state in (SubmissionState.ENDED, SubmissionState.CANCELLED, SubmissionState.CANCELLING)


# What a worker is told


def find_orders(tx: Transaction, host: Host, ask: Ask) -> Orders:
    """Decide what a worker that calls is to hold and to fetch, note it, and return it. `host.holds` is filled in here."""
    placed = _board(tx).placed
    demand = _demand(tx)
    orders = _held(tx, host, placed)
    wanted = {*demand, *(one.wanted.content for one in placed)} & host.has - {*orders.remove}
    return msgspec.structs.replace(orders, fetch=_fetched_ahead(tx, host, ask, demand), guard=_guarded(tx, host, wanted))


def _held(tx: Transaction, host: Host, placed: Sequence[_Placed]) -> Orders:
    known = tx.memo.get(_NOBODY_HOLDS)
    if not placed and known is not None and tx.now < known <= tx.now + _BOARD_S:
        return Orders()
    rows = tx.rows(sa.select(holding).where(holding.c.worker_id == host.worker_id))
    if not placed and not rows:
        if tx.row(sa.select(holding.c.data_id).limit(1)) is None:
            tx.memo[_NOBODY_HOLDS] = tx.now + _BOARD_S
        return Orders()
    mine = {DataId(row.data_id): row for row in rows}
    failed = _failed_orders(tx, host, mine, placed)
    host = msgspec.structs.replace(host, holds={data_id: row.since for data_id, row in mine.items() if data_id not in failed})
    wanted = [one.wanted for one in placed if one.wanted.data_id not in failed]
    counted = [one for one in wanted if one.attributes.replicas > 0 and not one.attributes.affinity]
    counted = [one for one in counted if one.data_id in mine or (not is_over(one, now=tx.now) and may_hold(host, one))]
    others = _others(tx, host.worker_id, counted)
    decision = decide(host, wanted, others, now=tx.now)
    hold = _note(tx, host, {data_id: row for data_id, row in mine.items() if data_id not in failed}, decision.hold)
    keeps = {one.keep.data_id: one.keep for one in placed}
    held = {one.content for one in hold}
    return Orders(
        tuple(keeps[one.data_id] for one in hold), tuple({one.content for one in decision.remove if one.content not in held})
    )


_NOBODY_HOLDS = "nobody holds"


def _failed_orders(tx: Transaction, host: Host, mine: dict[DataId, Any], placed: Sequence[_Placed]) -> set[DataId]:
    """Return what a worker was to hold and has not fetched in ORDER_S. For as long again it is not told to: others may try."""
    contents = {one.wanted.data_id: one.wanted.content for one in placed}
    late = {data_id: row.since for data_id, row in mine.items() if not row.held and row.since <= tx.now - ORDER_S}
    late = {data_id: since for data_id, since in late.items() if contents.get(data_id) not in host.has}
    over = [data_id for data_id, since in late.items() if since <= tx.now - 2 * ORDER_S or data_id not in contents]
    if over:
        tx.run(sa.delete(holding).where(holding.c.worker_id == host.worker_id, holding.c.data_id.in_(over)))
    return set(late)


def _others(tx: Transaction, worker_id: WorkerId, counted: Sequence[Wanted]) -> dict[DataId, Sequence[Hold]]:
    """Return the other workers that hold data, or are about to, and count."""
    if not counted:
        return {}
    tolerant = {one.data_id: one.attributes.fault_tolerant for one in counted}
    found: dict[DataId, list[Hold]] = {}
    query = sa.select(holding, worker.c.seen_at).join(worker).where(worker.c.left_at.is_(None), holding.c.worker_id != worker_id)
    ids = sorted(tolerant)
    for start in range(0, len(ids), 500):
        for row in tx.rows(query.where(holding.c.data_id.in_(ids[start : start + 500]))):
            is_gone = tolerant[row.data_id] and row.seen_at <= tx.now - GONE_S
            if not is_gone and (row.held or row.since > tx.now - ORDER_S):
                found.setdefault(DataId(row.data_id), []).append(Hold(row.since, WorkerId(row.worker_id)))
    return dict(found)


def _note(tx: Transaction, host: Host, mine: dict[DataId, Any], hold: Iterable[Wanted]) -> list[Wanted]:
    """Note what a worker is to hold and has; return what of it has been noted."""
    noted = []
    wanted = {one.data_id: one for one in hold}
    gone = [data_id for data_id in mine if data_id not in wanted]
    if gone:
        tx.run(sa.delete(holding).where(holding.c.worker_id == host.worker_id, holding.c.data_id.in_(gone)))
    for data_id, one in wanted.items():
        has = one.content in host.has
        row = mine.get(data_id)
        if row is None:
            if not _take_place(tx, host.worker_id, one):
                continue
            tx.run(sa.insert(holding).values(data_id=data_id, worker_id=host.worker_id, since=tx.now, held=has))
        elif row.held != has:
            tx.run(sa.update(holding).where(holding.c.data_id == data_id, holding.c.worker_id == host.worker_id).values(held=has))
        noted.append(one)
        if row is None or row.held != has:
            tx.topics.append(copies_topic(data_id))
    tx.topics += [copies_topic(data_id) for data_id in gone if data_id not in wanted]
    return noted


def _take_place(tx: Transaction, worker_id: WorkerId, one: Wanted) -> bool:
    """Let a worker be one of those that hold data, in the place of those that do not count any more; return False if there is none left."""
    if tx.row(sa.select(data.c.id).where(data.c.id == one.data_id).with_for_update()) is None:
        return False  # removed a moment ago
    if one.attributes.affinity or one.attributes.replicas == ALL:
        return True
    if len(_others(tx, worker_id, [one]).get(one.data_id, ())) >= one.attributes.replicas:
        return False
    gone = sa.select(worker.c.id).where(sa.or_(worker.c.left_at.is_not(None), worker.c.seen_at <= tx.now - GONE_S))
    late = sa.and_(holding.c.held.is_(False), holding.c.since <= tx.now - ORDER_S)
    left = sa.select(worker.c.id).where(worker.c.left_at.is_not(None))
    away = holding.c.worker_id.in_(gone.scalar_subquery() if one.attributes.fault_tolerant else left.scalar_subquery())
    tx.run(sa.delete(holding).where(holding.c.data_id == one.data_id, sa.or_(away, late)))
    return True


# What jobs wait for


class _Demand(Struct, frozen=True):
    """A disk or a file that the jobs of arrays wait for."""

    queues: tuple[tuple[Queue, Person], ...]
    keep: Keep


def _demand(tx: Transaction) -> dict[Sha256, _Demand]:
    """Return the disks and files that jobs of arrays wait for, also of those that come after others, by what they are; at most some seconds old."""
    known: tuple[float, dict[Sha256, _Demand]] | None = tx.memo.get(_DEMAND)
    if known is None or not tx.now < known[0] <= tx.now + _BOARD_S:
        known = tx.memo[_DEMAND] = (tx.now + _BOARD_S, _read_demand(tx))
    return known[1]


_DEMAND = "what jobs wait for"


def _read_demand(tx: Transaction) -> dict[Sha256, _Demand]:
    has_files = sa.exists().where(submission_data.c.submission_id == submission.c.id)
    rows = tx.rows(
        sa.select(
            queue,
            requirement.c.key,
            requirement.c.body,
            submission.c.disk,
            submission.c.id.label("of"),
            (queue.c.blocked + queue.c.waiting).label("jobs"),
        )
        .select_from(queue.join(requirement).join(submission, submission.c.id == queue.c.array_id))
        .where(IS_UNSTARTED, sa.or_(submission.c.disk.is_not(None), has_files))
        .limit(_MOST_QUEUES)
    )
    files: dict[int, list[DataRef]] = {}
    of_these = submission_data.c.submission_id.in_([row.of for row in rows])
    for row in tx.rows(sa.select(submission_data).where(of_these)) if rows else ():
        blob = Blob(sha256=Sha256(row.sha256), size_bytes=row.size_bytes)
        files.setdefault(row.submission_id, []).append(DataRef(blob=blob))
    found: dict[Sha256, _Demand] = {}
    people = {owner_id: _person(tx, owner_id) for owner_id in {UserId(row.owner_id) for row in rows}}
    for row in rows:
        disk = (msgspec.json.decode(row.disk, type=DataRef),) if row.disk else ()
        wanted = read_requirement(tx, row)
        one = Queue(id=row.id, class_id=row.class_id, owner_id=UserId(row.owner_id), requirement=wanted, waiting=row.jobs)
        for ref in (*disk, *files.get(row.of, ())):
            content = ref.disk.sha256 if ref.disk is not None else ref.blob.sha256
            before = found.get(content)
            keep = Keep(data_id=DataId(0), content=content, name=content[:12], ref=ref)
            found[content] = _Demand((*(before.queues if before is not None else ()), (one, people[one.owner_id])), keep)
    return found


_MOST_QUEUES = 1000


def _fetched_ahead(tx: Transaction, host: Host, ask: Ask, demand: dict[Sha256, _Demand]) -> tuple[Keep, ...]:
    """Return what a worker is to fetch before it is leased a job with it: as many workers as jobs wait are to have it."""
    found: list[Keep] = []
    for content, one in demand.items():
        ref = one.keep.ref
        if len(found) >= _MOST_AHEAD:
            break
        size_bytes = ref.disk.size_bytes if ref.disk is not None else ref.blob.size_bytes
        if content in host.has or size_bytes > host.lends_bytes:
            continue
        jobs = sum(each.waiting for each, person in one.queues if suits(ask, each, person))
        if not jobs:
            continue
        mine = (copy.c.content == content, copy.c.worker_id == host.worker_id)
        told = tx.row(sa.select(copy.c.since).where(*mine))
        if told is None:
            tx.run(sa.delete(copy).where(copy.c.content == content, copy.c.there.is_(False), copy.c.since <= tx.now - ORDER_S))
            if len(tx.rows(_others_with(tx, host, content).limit(jobs))) >= jobs:
                continue
            tx.run(sa.insert(copy).values(content=content, worker_id=host.worker_id, since=tx.now, there=False))
        found.append(one.keep)
    return tuple(found)


_MOST_AHEAD = 2


def _person(tx: Transaction, user_id: UserId) -> Person:
    name = tx.value(sa.select(account.c.name).where(account.c.id == user_id))
    return Person(name=name or "", groups=groups_of(tx, user_id))


def _guarded(tx: Transaction, host: Host, wanted: Iterable[Sha256]) -> tuple[Sha256, ...]:
    """Return what a worker has that is wanted and that no other has who was heard of lately."""
    if not host.lends_bytes:
        return ()
    there = copy.c.there.is_(True)
    return tuple(one for one in sorted(wanted) if tx.row(_others_with(tx, host, one).where(there).limit(1)) is None)


def _others_with(tx: Transaction, host: Host, content: Sha256) -> sa.Select[tuple[int]]:
    """Return a query for the other workers, heard of lately, that have a content or were told to fetch it."""
    lately = (worker.c.left_at.is_(None), worker.c.seen_at > tx.now - GONE_S, worker.c.pilot_of.is_(None))
    return sa.select(copy.c.worker_id).join(worker).where(copy.c.content == content, copy.c.worker_id != host.worker_id, *lately)


# What workers have


def note_copies(tx: Transaction, worker_id: WorkerId, contents: Iterable[Sha256]) -> None:
    """Note what a worker has in its cache, all of it."""
    now = set(contents)
    mine = tx.rows(sa.select(copy.c.content, copy.c.there).where(copy.c.worker_id == worker_id))
    before = {row.content for row in mine if row.there}
    told = {row.content for row in mine if not row.there}
    if told & now:
        tx.run(sa.delete(copy).where(copy.c.worker_id == worker_id, copy.c.content.in_(told & now)))
    if gone := before - now:
        tx.run(sa.delete(copy).where(copy.c.worker_id == worker_id, copy.c.content.in_(gone)))
    for content in sorted(now - before):
        tx.run(sa.insert(copy).values(content=content, worker_id=worker_id, since=tx.now, there=True))
    changed = before ^ now
    if changed:
        named = sa.select(data.c.id).where(sa.or_(data.c.disk_sha256.in_(changed), data.c.sha256.in_(changed)))
        tx.topics += [copies_topic(row.id) for row in tx.rows(named.limit(1000))]


def forget_worker(tx: Transaction, worker_id: WorkerId) -> None:
    """Forget what a worker has and holds: it has left."""
    for row in tx.rows(sa.select(holding.c.data_id).where(holding.c.worker_id == worker_id)):
        tx.topics.append(copies_topic(row.data_id))
    for table in (holding, copy):
        tx.run(sa.delete(table).where(table.c.worker_id == worker_id))
