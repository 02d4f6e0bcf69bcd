"""One wish to connect, decided in one look at the store: which peer is meant, whether it may be reached, and where it is."""

from __future__ import annotations

from typing import Any

import msgspec
import sqlalchemy as sa
from msgspec import Struct

from deskgrid.core.console import RENEW_S
from deskgrid.core.lifecycle import FINAL_JOB_STATES
from deskgrid.core.reach import Source, TargetJob, check_job, check_named, is_console, may_use
from deskgrid.core.rights import Right, holds
from deskgrid.core.transfer import SWARM
from deskgrid.core.trust import Grant
from deskgrid.errors import Conflict, Forbidden, InvalidInput
from deskgrid.model.ids import AttemptId, JobId, Sha256, UserId
from deskgrid.model.jobs import JobSpec, JobState
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.overlay import Hub, PeerKind, ServiceRef, hub_peer, parse_service, parse_worker
from deskgrid.model.wire import AskGrant
from deskgrid.model.workers import Profile
from deskgrid.server.store import accounts, peers, swarm
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.hubs import HUBS
from deskgrid.server.store.schema import IS_LIVE, attempt, job, submission, worker
from deskgrid.server.store.submissions import job_topic

__all__ = ["Waiting", "Way", "find_way"]


class Way(Struct, frozen=True):
    """The connection is allowed, and its target is at a hub."""

    grant: Grant
    hub: Hub
    console: AttemptId | None = None
    """See Waiting."""


class Waiting(Struct, frozen=True):
    """The connection is allowed, but `what` is not there yet; a change of one of the topics may bring it."""

    what: str
    topics: tuple[str, ...]
    console: AttemptId | None = None
    """An attempt whose screen this is about, if its worker has to be told (anew) that it is wanted."""


class _Target(Struct, frozen=True):
    """The peer that a service's name stands for now."""

    row: Any
    """None if there is none yet."""
    absent: str
    """What is waited for then, for people."""
    topics: tuple[str, ...]
    console: AttemptId | None = None


def find_way(tx: Transaction, caller: Caller, wish: AskGrant, *, grant_s: float, max_peers: int, nonce: str) -> Way | Waiting:
    """Decide a wish. Raise NotFound, Forbidden, Conflict or InvalidInput if waiting is of no use."""
    own = peers.find_own(tx, caller, wish.peer_id)
    if own.kind == PeerKind.WORKER.value:
        service = _of_swarm(tx, caller, wish.service)
        return _decide(tx, own, service, _engine(tx, service), grant_s=grant_s, nonce=nonce)
    service = parse_service(wish.service, "service")
    if not service.is_of_peer:
        raise InvalidInput(f"{service} is not reached through the overlay", where="service", hint="its worker dials it for a job")
    if is_console(service) and not holds(caller.rights, Right.JOBS):
        raise Forbidden("this token may not see the screens of jobs", hint="it needs the right: jobs")
    source = _source(tx, own)
    check_named(source, service)
    job_id = service.job_id
    target = _program(tx, source, service) if job_id is None else _attempt(tx, source, service, job_id, max_peers)
    return _decide(tx, own, service, target, grant_s=grant_s, nonce=nonce)


def _decide(tx: Transaction, own: Any, service: ServiceRef, target: _Target, *, grant_s: float, nonce: str) -> Way | Waiting:
    """Grant what may be reached, if it is there."""
    if target.row is None:
        return Waiting(target.absent, target.topics, target.console)
    if target.row.id == own.id:
        raise Conflict(f"{service} is offered by this peer itself")
    if not target.row.hub_address:
        return Waiting(f"the peer of {service} to come to a hub", (*target.topics, HUBS), target.console)
    grant = Grant(
        source=own.name,
        source_key=Sha256(own.key),
        target=target.row.name,
        target_key=Sha256(target.row.key),
        service=service.service,
        expires_at=tx.now + grant_s,
        nonce=nonce,
    )
    return Way(grant, Hub(name=hub_peer(target.row.hub_id), address=target.row.hub_address), target.console)


def _source(tx: Transaction, own: Any) -> Source:
    """Return whom a user's peer or a job's acts for."""
    user_id = UserId(own.account_id)
    groups = accounts.groups_of(tx, user_id)
    if own.kind == PeerKind.USER.value:
        return Source(user_id=user_id, user=own.owner, groups=groups)
    spec = msgspec.json.decode(own.spec, type=JobSpec)
    reach = tuple(reach.service for reach in spec.machine.reach)
    return Source(user_id=user_id, user=own.owner, groups=groups, job_id=JobId(own.job_id), reach=reach)


def _of_swarm(tx: Transaction, caller: Caller, wanted: str) -> ServiceRef:
    """Read what a worker wants to reach for itself. Raise Forbidden for anything but the engine of a worker that is in a swarm with it."""
    service, _, name = wanted.partition(".")
    other = parse_worker(name)
    if service != SWARM or other is None or not swarm.share_a_swarm(tx, caller, other):
        raise Forbidden("a worker reaches nothing for itself but who fetches the same data through the overlay")
    return ServiceRef(service, name)


def _engine(tx: Transaction, service: ServiceRef) -> _Target:
    found = peers.peer_of_worker(tx, parse_worker(service.peer))
    return _Target(found, f"{service.peer} to take part in the overlay", (peers.user_peers_topic(0),))


def _attempt(tx: Transaction, source: Source, service: ServiceRef, job_id: JobId, max_peers: int) -> _Target:
    """Return the peer of the newest live attempt of a job. Raise NotFound, or Conflict if the job is over."""
    row = tx.row(sa.select(job.c.owner_id, submission.c.spec, job.c.state).join(submission).where(job.c.id == job_id))
    check_job(source, service, _target_job(row))
    state = JobState(row.state)  # type: ignore[union-attr]
    if state in FINAL_JOB_STATES:
        raise Conflict(f"job {job_id} is {state.value}")
    newest = tx.row(
        sa.select(attempt.c.id, attempt.c.number, attempt.c.console_until, attempt.c.worker_id)
        .where(attempt.c.job_id == job_id, IS_LIVE)
        .order_by(attempt.c.number.desc())
        .limit(1)
    )
    topics = (job_topic(job_id), peers.job_peers_topic(job_id))
    if newest is None:
        return _Target(None, f"job {job_id} to start", topics)
    attempt_id = AttemptId(newest.id)
    found = peers.peer_of_attempt(tx, attempt_id)
    full = found is None and peers.how_many(tx, row.owner_id) >= max_peers  # type: ignore[union-attr]
    why = f"; {max_peers} programs and jobs of its user take part already, and no more may" if full else ""
    if msgspec.json.decode(row.spec, type=JobSpec).machine.network is Network.NONE:  # type: ignore[union-attr]
        asks = (newest.console_until or 0.0) <= tx.now + RENEW_S
        return _Target(found, _why_no_screen(tx, newest, job_id) + why, topics, attempt_id if asks else None)
    return _Target(found, f"attempt {newest.number} of job {job_id} to take part in the overlay{why}", topics)


def _why_no_screen(tx: Transaction, newest: Any, job_id: JobId) -> str:
    """Say what a console of a machine without a network waits for."""
    profile: str | None = tx.value(sa.select(worker.c.profile).where(worker.c.id == newest.worker_id))
    drivers = msgspec.json.decode(profile, type=Profile).drivers if profile else ()
    joins = any(one.networks != (Network.NONE,) for one in drivers)
    return f"attempt {newest.number} of job {job_id} to show its screen" + ("" if joins else ", which its PC's owner may not allow")


def _target_job(row: Any | None) -> TargetJob | None:
    if row is None:
        return None
    machine = msgspec.json.decode(row.spec, type=JobSpec).machine
    return TargetJob(
        owner_id=UserId(row.owner_id),
        offers=tuple(offer.name for offer in machine.offer),
        share=machine.share,
        has_screen=machine.kind is MachineKind.VM,
    )


def _program(tx: Transaction, source: Source, service: ServiceRef) -> _Target:
    """Return the newest program of a user's that offers a service to this source. Raise NotFound for an unknown user.

    A program that does not share it and no program at all are told alike.
    """
    name = service.user or source.user
    user_id = source.user_id if name == source.user else accounts.find_account(tx, name).id
    offered = peers.programs_that_offer(tx, user_id, service.service)
    found = next((row for row, share in offered if may_use(source, user_id, share)), None)
    shared = "" if user_id == source.user_id else f" to {source.user}"
    return _Target(found, f"a program of {name}'s that offers {service.service}{shared}", (peers.user_peers_topic(user_id),))
