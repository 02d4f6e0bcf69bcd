"""Who fetches which blob together, and the hashes of its pieces. What is decided: core/transfer.py.

One turn at a time for each blob: its torrent's row is locked, so two workers are never sent for the same piece.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from random import Random

import msgspec
import sqlalchemy as sa
from msgspec import Struct

from deskgrid.core.torrents import LEAST_BYTES, piece_count
from deskgrid.core.transfer import (
    LONGEST_LIFETIME_S,
    Member,
    all_pieces,
    hand_out,
    interval_s,
    lifetime_s,
    neighbours,
    private_addresses,
    set_from,
    set_to,
)
from deskgrid.errors import Conflict, InvalidInput, NotFound
from deskgrid.model.data import Blob
from deskgrid.model.ids import Sha256, WorkerId
from deskgrid.model.overlay import worker_name
from deskgrid.model.swarm import Turn, TurnAnswer
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.data import may_read_blob
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import blob, data, swarm_member, torrent

__all__ = ["Taken", "fetched_now", "forget_member", "forget_members", "keep_layer", "share_a_swarm", "take_turn", "without_torrent"]

_FORGET_S = 7 * 86400.0
"""A worker that has a blob may come back to its swarm for so long, without a job that needs it."""


class Taken(Struct, frozen=True):
    """What a turn came to."""

    answer: TurnAnswer
    blob: Blob
    layer: bytes
    """Of the torrent, if it is wanted."""


def without_torrent(tx: Transaction) -> Blob | None:
    """Return a blob that is worth a torrent and has none: one of named data that is large enough."""
    known = sa.exists().where(torrent.c.sha256 == data.c.sha256)
    wanted = (
        sa.select(blob.c.sha256, blob.c.size_bytes)
        .join(data, data.c.sha256 == blob.c.sha256)
        .where(blob.c.size_bytes >= LEAST_BYTES, blob.c.removing.is_(False), ~known)
        .order_by(data.c.id)
        .limit(1)
    )
    row = tx.row(wanted)
    return None if row is None else Blob(sha256=Sha256(row.sha256), size_bytes=row.size_bytes)


def keep_layer(tx: Transaction, of: Blob, layer: bytes) -> None:
    """Keep the hashes of a blob's pieces. Idempotent."""
    tx.insert_if_new(torrent, ["sha256"], sha256=of.sha256, layer=layer)


def take_turn(tx: Transaction, caller: Caller, sha256: Sha256, turn: Turn, *, public: str, rng: Random) -> Taken:
    """Note what a worker says of a blob, and tell it what to do. `public` is where it calls from.

    Raise NotFound if the blob is not for it; Conflict if it has no torrent and will have none.
    """
    size = tx.value(sa.select(blob.c.size_bytes).where(blob.c.sha256 == sha256, blob.c.removing.is_(False)))
    # A worker that took part once has seen its bytes, and may give them to others when its job has ended.
    took_part = sa.select(swarm_member.c.member).where(swarm_member.c.sha256 == sha256, swarm_member.c.member == caller.principal)
    if size is None or not (may_read_blob(tx, caller, sha256) or tx.row(took_part) is not None):
        raise NotFound(f"there is no blob {sha256[:12]} for you")
    member = _name_of(caller, turn)
    mine = (swarm_member.c.sha256 == sha256, swarm_member.c.member == member)
    own = tx.row(sa.select(swarm_member.c.member).where(*mine))
    of = Blob(sha256=sha256, size_bytes=size)
    count = piece_count(size)
    layer = tx.value(sa.select(torrent.c.layer).where(torrent.c.sha256 == sha256).with_for_update())
    if layer is None:
        if size < LEAST_BYTES or tx.row(sa.select(data.c.id).where(data.c.sha256 == sha256).limit(1)) is None:
            raise Conflict(f"no torrent is made of {sha256[:12]}: it is too small, or no data any more")
        return Taken(TurnAnswer(ready=False), of, b"")
    if turn.leaving:
        tx.run(sa.delete(swarm_member).where(*mine))
        return Taken(TurnAnswer(ready=True), of, b"")
    me, others = _member(tx, caller, turn, count, public), _others(tx, sha256, member, count)
    take = hand_out(count, me, others, wanted=min(turn.wanted, count), stuck=turn.stuck, now=tx.now)
    _keep(tx, sha256, member, me, own is not None, take, count)
    answer = TurnAnswer(
        ready=True,
        interval_s=interval_s(len(others) + 1),
        take=set_to(take, count),
        neighbours=neighbours(me, others, count=count, rng=rng),
        lacking=sum(other.have != all_pieces(count) for other in others),
    )
    return Taken(answer, of, layer if turn.torrent else b"")


def _name_of(caller: Caller, turn: Turn) -> str:
    """Return by what name a member is known: a user may have several programs."""
    if caller.worker_id is not None:
        return caller.principal
    if not _PROGRAM.fullmatch(turn.member):
        raise InvalidInput("a program says which of its user's it is", where="member", hint="1 to 32 letters and digits")
    return f"{caller.principal}:{turn.member}"


_PROGRAM = re.compile(r"[A-Za-z0-9]{1,32}")


def _member(tx: Transaction, caller: Caller, turn: Turn, count: int, public: str) -> Member:
    have = set_from(turn.have, count)
    addresses = turn.addresses[:_MOST_ADDRESSES]
    return Member(
        have=have,
        taken=set_from(turn.fetching, count) & ~have,
        seen_at=tx.now,
        public=public,
        private=private_addresses(addresses),
        reachable=public in addresses,
        port=turn.port if 0 < turn.port < 1 << 16 else 0,
        peer=worker_name(caller.worker_id) if turn.joined and caller.worker_id is not None else "",
    )


_MOST_ADDRESSES = 8


def _others(tx: Transaction, sha256: Sha256, member: str, count: int) -> list[Member]:
    """Return the other members that were heard of lately."""
    lately = swarm_member.c.seen_at > tx.now - LONGEST_LIFETIME_S
    rows = tx.rows(sa.select(swarm_member).where(swarm_member.c.sha256 == sha256, swarm_member.c.member != member, lately))
    return [
        Member(
            have=all_pieces(count) if row.complete else set_from(row.have, count),
            taken=set_from(row.taken, count),
            seen_at=row.seen_at,
            public=row.public,
            private=msgspec.json.decode(row.private, type=tuple[str, ...]),
            reachable=row.reachable,
            port=row.port,
            peer=row.peer,
        )
        for row in rows
        if row.seen_at > tx.now - lifetime_s(len(rows) + 1, complete=row.complete)
    ]


def _keep(tx: Transaction, sha256: Sha256, member: str, me: Member, known: bool, take: int, count: int) -> None:
    complete = me.have == all_pieces(count)
    values = {
        "seen_at": tx.now,
        "have": b"" if complete else set_to(me.have, count),
        "complete": complete,
        "taken": set_to(me.taken | take, count),
        "public": me.public[:64],
        "private": msgspec.json.encode(me.private).decode(),
        "reachable": me.reachable,
        "port": me.port,
        "peer": me.peer,
    }
    if known:
        mine = (swarm_member.c.sha256 == sha256, swarm_member.c.member == member)
        tx.run(sa.update(swarm_member).where(*mine).values(**values))
    else:
        tx.run(sa.insert(swarm_member).values(sha256=sha256, member=member, **values))


def fetched_now(tx: Transaction, blobs: Iterable[Sha256]) -> tuple[Sha256, ...]:
    """Return which of these blobs others fetch now, as of some seconds ago."""
    known: tuple[float, frozenset[str]] | None = tx.memo.get(_MEMO)
    if known is None or not tx.now < known[0] <= tx.now + _LOOK_S:
        fetching = sa.select(swarm_member.c.sha256).where(
            swarm_member.c.complete.is_(False), swarm_member.c.port > 0, swarm_member.c.seen_at > tx.now - _FETCHING_S
        )
        known = tx.memo[_MEMO] = (tx.now + _LOOK_S, frozenset(row.sha256 for row in tx.rows(fetching.distinct())))
    return tuple(one for one in blobs if one in known[1])


_MEMO = "fetched now"
_LOOK_S = 2.0
_FETCHING_S = 60.0


def share_a_swarm(tx: Transaction, caller: Caller, other: WorkerId) -> bool:
    """Tell whether a worker has lately been told of another, or may be, that is reached through the overlay: both are in one swarm."""
    theirs = swarm_member.alias("theirs")
    lately = tx.now - LONGEST_LIFETIME_S
    same = swarm_member.join(theirs, swarm_member.c.sha256 == theirs.c.sha256)
    both = (swarm_member.c.member == caller.principal, theirs.c.peer == worker_name(other))
    query = sa.select(theirs.c.member).select_from(same).where(*both, swarm_member.c.seen_at > lately, theirs.c.seen_at > lately)
    return tx.row(query.limit(1)) is not None


def forget_member(tx: Transaction, principal: str) -> None:
    """Forget a worker that has left."""
    tx.run(sa.delete(swarm_member).where(swarm_member.c.member == principal))


def forget_members(tx: Transaction) -> None:
    """Forget who was not heard of for long, and the torrents and members of blobs that are gone."""
    tx.run(sa.delete(swarm_member).where(swarm_member.c.seen_at < tx.now - _FORGET_S))
    for table in (torrent, swarm_member):
        tx.run(sa.delete(table).where(~sa.exists().where(blob.c.sha256 == table.c.sha256)))
