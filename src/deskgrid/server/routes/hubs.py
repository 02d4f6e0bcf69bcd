"""Hubs: how a machine becomes one, and says that it is there."""

from __future__ import annotations

from starlette.requests import Request as HttpRequest

from deskgrid.model import wire
from deskgrid.model.overlay import hub_peer
from deskgrid.model.users import Role
from deskgrid.server.authority import read_peer_key
from deskgrid.server.routes.handler import Call, Services, reads, serves, writes
from deskgrid.server.store import accounts, hubs
from deskgrid.server.store.engine import Transaction


@writes(wire.ADD_HUB_SECRET)
def add_hub_secret(tx: Transaction, call: Call[wire.SecretRequest]) -> wire.SecretAnswer:
    wanted = call.body
    expires_at = accounts.add_secret(tx, wanted.secret_hash, purpose=accounts.HUB, uses=wanted.uses, lifetime_s=wanted.lifetime_s)
    return wire.SecretAnswer(expires_at=expires_at)


@writes(wire.JOIN_HUB)
def join_hub(tx: Transaction, call: Call[wire.JoinHub]) -> wire.JoinHubAnswer:
    accounts.use_secret(tx, call.body.secret, accounts.HUB)
    hub_id = hubs.add_hub(tx, call.body.name)
    accounts.add_token(tx, call.body.token_hash, role=Role.HUB, label=call.body.name, hub=hub_id)
    return wire.JoinHubAnswer(hub_id=hub_id)


@serves(wire.RENEW_HUB)
async def renew_hub(services: Services, call: Call[wire.RenewHub], _http: HttpRequest) -> wire.HubAnswer:
    """Renewals may be repeated without harm, so they leave no idempotency key in the store."""
    if call.caller.hub_id is None:
        raise ValueError("a hub's token names its hub")
    hub_id, wanted, lifetime_s = call.caller.hub_id, call.body, services.settings.peer_s
    key = read_peer_key(wanted.key)

    def renew(tx: Transaction) -> None:
        hubs.renew_hub(tx, hub_id, key=key.hash, address=wanted.address, peers=wanted.peers, lifetime_s=lifetime_s)
        if wanted.leaving:
            hubs.end_hub(tx, hub_id)

    await services.store.write(renew)
    now = services.clock.now()
    return wire.HubAnswer(
        name=hub_peer(hub_id),
        certificate=services.authority.sign_hub(hub_id, key, now=now, lifetime_s=lifetime_s),
        grant_key=services.authority.grant_key_pem,
        now=now,
        lifetime_s=lifetime_s,
    )


@writes(wire.REMOVE_HUB)
def remove_hub(tx: Transaction, call: Call[wire.Nothing]) -> wire.Nothing:
    hubs.remove_hub(tx, call.number("hub"))
    return wire.Nothing()


@reads(wire.LIST_HUBS)
def list_hubs(tx: Transaction, _call: Call[wire.Nothing]) -> wire.HubList:
    return wire.HubList(hubs.list_hubs(tx))
