"""Peers as the store knows them: who is there, at which hub, with what.

A peer is there while it has not expired and, of an attempt, while that attempt is live: so a peer goes with its attempt whatever ended it.
"""

from __future__ import annotations

from typing import Any

import msgspec
import sqlalchemy as sa
from msgspec import Struct

from deskgrid.core.console import CONSOLE
from deskgrid.errors import Conflict, NotFound
from deskgrid.model.ids import AttemptId, JobId, Sha256, UserId, WorkerId
from deskgrid.model.jobs import JobSpec
from deskgrid.model.machines import MachineKind
from deskgrid.model.overlay import Connection, Peer, PeerKind, hub_peer
from deskgrid.model.users import Role
from deskgrid.model.wire import PeerOffer
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.schema import IS_LIVE, account, attempt, hub, job, peer, submission, worker

__all__ = [
    "NewPeer",
    "find_own",
    "how_many",
    "job_peers_topic",
    "list_peers",
    "peer_of_attempt",
    "peer_of_worker",
    "programs_that_offer",
    "register",
    "remove",
    "sweep_peers",
    "user_peers_topic",
]

_MOST_CONNECTIONS, _LONGEST_NAME, _MOST_BYTES = 256, 100, (1 << 63) - 1


class NewPeer(Struct, frozen=True, kw_only=True):
    """A peer that registers or renews."""

    kind: PeerKind
    name: str
    key: Sha256
    user_id: UserId | None = None
    """The user whom it acts for."""
    worker_id: WorkerId | None = None
    """The worker that holds it."""
    job_id: JobId | None = None
    attempt_id: AttemptId | None = None
    offers: tuple[PeerOffer, ...] = ()
    hub_id: int | None = None
    connections: tuple[Connection, ...] = ()


def job_peers_topic(job_id: int) -> str:
    """Topic: a peer of a job came or moved."""
    return f"peers:job:{job_id}"


def user_peers_topic(user_id: int) -> str:
    """Topic: a program of a user's came, moved, or offers something else."""
    return f"peers:user:{user_id}"


def register(tx: Transaction, wanted: NewPeer, *, lifetime_s: float, max_per_user: int) -> int:
    """Make a peer known, or renew it; return its number.

    An attempt and a worker have one peer each: a new key takes the place of the old one. Raise Conflict if its user has too many.
    """
    row = tx.row(sa.select(peer).where(peer.c.name == wanted.name, peer.c.key == wanted.key))
    values = {
        "offers": msgspec.json.encode(wanted.offers).decode(),
        "hub_id": wanted.hub_id,
        "connections": msgspec.json.encode(_bounded(wanted.connections)).decode(),
        "expires_at": tx.now + lifetime_s,
    }
    if row is not None and row.expires_at > tx.now:
        tx.run(sa.update(peer).where(peer.c.id == row.id).values(**values))
        changed = (row.hub_id, row.offers) != (values["hub_id"], values["offers"])
        peer_id = int(row.id)
    else:
        _make_room(tx, wanted, max_per_user)
        peer_id, changed = _insert(tx, wanted, values), True
    if changed:
        tx.topics.append(job_peers_topic(wanted.job_id) if wanted.job_id is not None else user_peers_topic(wanted.user_id or 0))
    return peer_id


def _make_room(tx: Transaction, wanted: NewPeer, max_per_user: int) -> None:
    """Remove what the new peer replaces, and check that its user may have one more."""
    same = sa.and_(peer.c.name == wanted.name, peer.c.key == wanted.key)
    if wanted.kind is PeerKind.JOB:
        same = peer.c.attempt_id == wanted.attempt_id
    elif wanted.kind is PeerKind.WORKER:
        same = sa.and_(peer.c.kind == PeerKind.WORKER.value, peer.c.worker_id == wanted.worker_id)
    tx.run(sa.delete(peer).where(same))
    if wanted.user_id is None:
        return
    if how_many(tx, wanted.user_id) >= max_per_user:
        raise Conflict(f"{max_per_user} programs and jobs of this user take part already", hint="end some of them")


def how_many(tx: Transaction, user_id: UserId) -> int:
    """Return how many programs and jobs of a user are peers now."""
    return int(tx.value(sa.select(sa.func.count()).select_from(_joined()).where(peer.c.account_id == user_id, _is_there(tx))))


def _insert(tx: Transaction, wanted: NewPeer, values: dict[str, Any]) -> int:
    added = tx.run(
        sa.insert(peer).values(
            kind=wanted.kind.value,
            name=wanted.name,
            key=wanted.key,
            account_id=wanted.user_id,
            worker_id=wanted.worker_id,
            attempt_id=wanted.attempt_id,
            registered_at=tx.now,
            **values,
        )
    )
    return int(added.inserted_primary_key[0])  # type: ignore[index]


def _bounded(connections: tuple[Connection, ...]) -> tuple[Connection, ...]:
    """Return what is kept of a report: it is for people, and one peer must not make everybody's list long."""
    return tuple(
        msgspec.structs.replace(
            one,
            service=one.service[:_LONGEST_NAME],
            peer=one.peer[:_LONGEST_NAME],
            sent_bytes=min(max(one.sent_bytes, 0), _MOST_BYTES),
            received_bytes=min(max(one.received_bytes, 0), _MOST_BYTES),
        )
        for one in connections[:_MOST_CONNECTIONS]
    )


def find_own(tx: Transaction, caller: Caller, peer_id: int) -> Any:
    """Return a peer of the caller's with its job's spec. Raise NotFound."""
    known = 0 < peer_id < 1 << 63  # what databases take for a number
    row = tx.row(_peers(tx).where(peer.c.id == peer_id, _is_own(caller))) if known else None
    if row is None:
        raise NotFound(f"you have no peer {peer_id} (any more)", hint="register it again")
    return row


def remove(tx: Transaction, caller: Caller, peer_id: int) -> None:
    """Forget a peer of the caller's. Raise NotFound."""
    if not tx.run(sa.delete(peer).where(peer.c.id == peer_id, _is_own(caller))).rowcount:
        raise NotFound(f"you have no peer {peer_id} (any more)")


def peer_of_attempt(tx: Transaction, attempt_id: AttemptId) -> Any | None:
    """Return the peer of a live attempt, with its hub."""
    return tx.row(_peers(tx).where(peer.c.attempt_id == attempt_id))


def peer_of_worker(tx: Transaction, worker_id: WorkerId | None) -> Any | None:
    """Return the peer that a worker is for itself, with its hub."""
    return tx.row(_peers(tx).where(peer.c.worker_id == worker_id, peer.c.kind == PeerKind.WORKER.value))


def programs_that_offer(tx: Transaction, user_id: UserId, service: str) -> list[tuple[Any, tuple[str, ...]]]:
    """Return a user's programs that offer a service, the newest first, each with whom it is shared with."""
    mine = (peer.c.account_id == user_id, peer.c.kind == PeerKind.USER.value, peer.c.offers != "[]")
    rows = tx.rows(_peers(tx).where(*mine).order_by(peer.c.registered_at.desc(), peer.c.id.desc()))
    return [(row, offer.share) for row in rows for offer in _offers(row) if offer.name == service]


def list_peers(tx: Transaction, owner: UserId | None) -> tuple[Peer, ...]:
    """Return the peers of a user's programs and jobs, or of everybody and of the workers, by number."""
    query = _peers(tx).order_by(peer.c.id)
    if owner is not None:
        query = query.where(peer.c.account_id == owner)
    return tuple(_peer(row) for row in tx.rows(query))


def sweep_peers(tx: Transaction) -> None:
    """Forget the peers that were not heard of."""
    tx.run(sa.delete(peer).where(peer.c.expires_at <= tx.now))


# Rows


def _is_own(caller: Caller) -> sa.ColumnElement[bool]:
    if caller.role is Role.WORKER:
        return peer.c.worker_id == caller.worker_id
    return sa.and_(peer.c.account_id == caller.user_id, peer.c.kind == PeerKind.USER.value)


def _is_there(tx: Transaction) -> sa.ColumnElement[bool]:
    return sa.and_(peer.c.expires_at > tx.now, sa.or_(peer.c.attempt_id.is_(None), IS_LIVE))


def _joined() -> sa.Join:
    return peer.outerjoin(attempt, attempt.c.id == peer.c.attempt_id)


def _peers(tx: Transaction) -> sa.Select[tuple[Any, ...]]:
    """Return a query of the peers that are there, with their job and hub; `hub_address` is "" without a hub that is alive."""
    joined = (
        _joined()
        .outerjoin(job, job.c.id == attempt.c.job_id)
        .outerjoin(submission, submission.c.id == job.c.submission_id)
        .outerjoin(account, account.c.id == peer.c.account_id)
        .outerjoin(worker, worker.c.id == peer.c.worker_id)
        .outerjoin(hub, sa.and_(hub.c.id == peer.c.hub_id, hub.c.expires_at > tx.now))
    )
    columns = (
        attempt.c.job_id,
        submission.c.spec,
        account.c.name.label("owner"),
        worker.c.name.label("worker"),
        hub.c.address.label("hub_address"),
    )
    return sa.select(peer, *columns).select_from(joined).where(_is_there(tx))


def _offers(row: Any) -> tuple[PeerOffer, ...]:
    return msgspec.json.decode(row.offers, type=tuple[PeerOffer, ...])


def _services(row: Any) -> tuple[str, ...]:
    if row.spec is not None:
        machine = msgspec.json.decode(row.spec, type=JobSpec).machine
        return (*(offer.name for offer in machine.offer), *((CONSOLE,) if machine.kind is MachineKind.VM else ()))
    return tuple(offer.name for offer in _offers(row))


def _peer(row: Any) -> Peer:
    return Peer(
        id=row.id,
        kind=PeerKind(row.kind),
        name=row.name,
        owner=row.owner or row.worker or "",
        job_id=JobId(row.job_id) if row.job_id is not None else None,
        services=_services(row),
        hub=hub_peer(row.hub_id) if row.hub_address else "",
        registered_at=row.registered_at,
        connections=msgspec.json.decode(row.connections, type=tuple[Connection, ...]),
    )
