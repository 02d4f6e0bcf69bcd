"""Peers: who takes part in the overlay, and the grants by which they reach each other."""

from __future__ import annotations

import secrets
from functools import partial

import msgspec
from starlette.requests import Request as HttpRequest

from deskgrid.core.console import WANTED_S
from deskgrid.core.lifecycle import LIVE_STATES
from deskgrid.core.rights import Right
from deskgrid.core.submission import MOST_SERVICES, check_shares
from deskgrid.errors import Conflict, Forbidden, InvalidInput
from deskgrid.model import wire
from deskgrid.model.ids import AttemptId, JobId, Sha256, UserId
from deskgrid.model.machines import Network
from deskgrid.model.overlay import API_SERVICE, Hub, PeerKind, attempt_peer, parse_service, user_peer, worker_peer
from deskgrid.model.users import Role
from deskgrid.server.authority import read_peer_key
from deskgrid.server.grants import Waiting, Way, find_way
from deskgrid.server.routes.handler import Call, Services, reads, serves, writes
from deskgrid.server.store import accounts, attempts, hubs, peers
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import Transaction
from deskgrid.server.store.peers import NewPeer
from deskgrid.settings import ServerSettings

_LONGEST_HOLD_S = 60.0


@serves(wire.REGISTER_PEER)
async def register_peer(services: Services, call: Call[wire.RegisterPeer], _http: HttpRequest) -> wire.PeerAnswer:
    """Renewals come all the time and may be repeated without harm, so they leave no idempotency key in the store."""
    key = read_peer_key(call.body.key)

    def keep(tx: Transaction) -> tuple[int, NewPeer, tuple[Hub, ...]]:
        wanted = _wanted(tx, call.caller, call.body, key.hash)
        return _register(tx, wanted, services.settings), wanted, hubs.alive_hubs(tx)

    peer_id, wanted, alive = await services.store.write(keep)
    now, lifetime_s = services.clock.now(), services.settings.peer_s
    return wire.PeerAnswer(
        peer_id=peer_id,
        name=wanted.name,
        certificate=services.authority.sign_peer(wanted.name, key, now=now, lifetime_s=lifetime_s),
        grant_key=services.authority.grant_key_pem,
        hubs=alive,
        now=now,
        lifetime_s=lifetime_s,
    )


def _register(tx: Transaction, wanted: NewPeer, settings: ServerSettings) -> int:
    return peers.register(tx, wanted, lifetime_s=settings.peer_s, max_per_user=settings.max_peers_per_user)


def _wanted(tx: Transaction, caller: Caller, request: wire.RegisterPeer, key: Sha256) -> NewPeer:
    """Return what is to be registered. Raise InvalidInput, Forbidden or Conflict if the caller may not be that peer."""
    if caller.role is Role.WORKER:
        wanted = _worker(caller, key) if request.attempt_id is None else _attempt(tx, caller, request, request.attempt_id, key)
    else:
        wanted = _program(tx, caller, request, key)
    hub_id = hubs.find_hub(tx, request.hub) if request.hub else None
    return msgspec.structs.replace(wanted, hub_id=hub_id, connections=request.connections)


def _program(tx: Transaction, caller: Caller, request: wire.RegisterPeer, key: Sha256) -> NewPeer:
    if request.attempt_id is not None or request.job_token_hash is not None:
        raise Forbidden("only a worker acts for a job")
    user_id = UserId(caller.user_id or 0)
    _check_offers(tx, request.offers)
    return NewPeer(kind=PeerKind.USER, name=user_peer(user_id), key=key, user_id=user_id, offers=request.offers)


def _check_offers(tx: Transaction, offers: tuple[wire.PeerOffer, ...]) -> None:
    names = {offer.name for offer in offers}
    if len(offers) > MOST_SERVICES or len(names) < len(offers):
        raise InvalidInput("services have names of their own", where="offers", hint=f"at most {MOST_SERVICES}")
    for offer in offers:
        parse_service(f"{offer.name}.user", "offers")
        check_shares(offer.share, "offers")
        accounts.check_shares(tx, offer.share, "offers")


def _worker(caller: Caller, key: Sha256) -> NewPeer:
    if caller.worker_id is None:
        raise ValueError("a worker's token names its worker")
    return NewPeer(kind=PeerKind.WORKER, name=worker_peer(caller.worker_id), key=key, worker_id=caller.worker_id)


def _attempt(tx: Transaction, caller: Caller, request: wire.RegisterPeer, attempt_id: AttemptId, key: Sha256) -> NewPeer:
    row = attempts.attempt_row(tx, attempt_id, caller.worker_id) if caller.worker_id is not None else None
    if row is None:
        raise Forbidden(f"attempt {attempt_id} is not this worker's")
    if row.state not in LIVE_STATES:
        raise Conflict(f"attempt {row.number} of job {row.job.id} is {row.state}")
    machine = attempts.common(tx, row.job.submission_id).spec.machine
    if (
        machine.network is Network.NONE and row.console_until is None
    ):  # for its screen it is a peer: of a wish that is over, no harm comes
        raise Forbidden(f"job {row.job.id} has no network")
    if request.job_token_hash is not None:
        if all(reach.service != API_SERVICE for reach in machine.reach):
            raise Forbidden(f"job {row.job.id} does not reach {API_SERVICE}")
        spec = attempts.common(tx, row.job.submission_id).spec
        rights = frozenset({Right.PILOT}) if spec.pilot else None
        accounts.add_token_of_attempt(tx, request.job_token_hash, attempt_id, rights)
    return NewPeer(
        kind=PeerKind.JOB,
        name=attempt_peer(JobId(row.job.id), row.number),
        key=key,
        user_id=row.job.owner_id,
        worker_id=caller.worker_id,
        job_id=JobId(row.job.id),
        attempt_id=attempt_id,
    )


@reads(wire.LIST_PEERS)
def list_peers(tx: Transaction, call: Call[wire.Nothing]) -> wire.PeerList:
    everyone = call.query.get("all", False) and call.caller.role is Role.ADMIN
    return wire.PeerList(peers.list_peers(tx, None if everyone else call.caller.user_id))


@writes(wire.REMOVE_PEER)
def remove_peer(tx: Transaction, call: Call[wire.Nothing]) -> wire.Nothing:
    peers.remove(tx, call.caller, call.number("peer"))
    return wire.Nothing()


@serves(wire.ASK_GRANT)
async def ask_grant(services: Services, call: Call[wire.AskGrant], _http: HttpRequest) -> wire.GrantAnswer:
    """A read and a signature; for a console, sometimes a note for its worker. While there is nothing to grant yet, the topics of what is missing are waited for."""
    deadline = services.clock.monotonic() + min(call.query.get("wait_s", 0.0), _LONGEST_HOLD_S)
    grant_s, max_peers = services.settings.grant_s, services.settings.max_peers_per_user
    watched: tuple[str, ...] = ()
    while True:
        marks = {topic: services.live.mark(topic) for topic in watched}
        found = await services.store.read(
            lambda tx: find_way(tx, call.caller, call.body, grant_s=grant_s, max_peers=max_peers, nonce=secrets.token_hex(16))
        )
        if found.console is not None:
            await services.store.write(partial(_want_console, found.console))
        remaining_s = deadline - services.clock.monotonic()
        if isinstance(found, Way) or remaining_s <= 0:
            return _answer(services, found)
        if found.topics == watched:
            await services.live.wait(marks, remaining_s)
        else:
            watched = found.topics  # and look again: it may have come before we watched


def _want_console(attempt_id: AttemptId, tx: Transaction) -> None:
    attempts.want_console(tx, attempt_id, tx.now + WANTED_S)


def _answer(services: Services, found: Way | Waiting) -> wire.GrantAnswer:
    if isinstance(found, Waiting):
        return wire.GrantAnswer(waiting_for=found.what)
    return wire.GrantAnswer(
        grant=services.authority.sign_grant(found.grant),
        target=found.grant.target,
        hub=found.hub,
        lifetime_s=services.settings.grant_s,
    )
