"""Ways into a grid: somebody makes a link, which is exchanged, as often as it says, for credentials."""

from __future__ import annotations

from typing import Any

from deskgrid.client.transport import Credentials, Transport, fetch_authority
from deskgrid.link import Link, hash_secret, make_secret
from deskgrid.model import wire
from deskgrid.model.ids import Sha256

__all__ = ["join", "join_hub", "login", "make_link"]


async def login(link: Link, label: str = "", *, lifetime_s: float = 0.0) -> Credentials:
    """Exchange a login link for credentials that are valid for `lifetime_s` (0: as long as the server lets them be). Raise Unauthenticated if its secret was used or has expired."""
    found = await fetch_authority(link)
    async with Transport(found) as transport:
        token = make_secret()
        hashed = Sha256(hash_secret(token))
        request = wire.LoginRequest(secret=link.secret, token_hash=hashed, label=label, lifetime_s=lifetime_s)
        answer = await transport.call(wire.LOGIN, request)
    return Credentials(address=found.address, authority_pem=found.authority_pem, token=token, name=answer.user.name)


async def join(link: Link, name: str, token: str = "") -> Credentials:
    """Exchange a join link for a worker's credentials. Raise Unauthenticated if its secret is used up or has expired.

    `token`: the worker's, if it was made before; then an answer that was lost may be asked for again.
    """
    found = await fetch_authority(link)
    async with Transport(found) as transport:
        token = token or make_secret()
        request = wire.JoinRequest(secret=link.secret, name=name, token_hash=Sha256(hash_secret(token)))
        await transport.call(wire.JOIN, request, key=hash_secret(token)[:32])
    return Credentials(address=found.address, authority_pem=found.authority_pem, token=token, name=name)


async def join_as_pilot(job: Credentials, name: str, token: str = "") -> Credentials:
    """Exchange the own token of a job that is a pilot for a worker's credentials. Raise Conflict if that was done before in its attempt.

    `token`: see `join`.
    """
    async with Transport(job) as transport:
        token = token or make_secret()
        request = wire.JoinPilot(name=name, token_hash=Sha256(hash_secret(token)))
        await transport.call(wire.JOIN_PILOT, request, key=hash_secret(token)[:32])
    return Credentials(address=job.address, authority_pem=job.authority_pem, token=token, name=name)


async def join_hub(link: Link, name: str) -> Credentials:
    """Exchange a hub link for a hub's credentials. Raise Unauthenticated if its secret is used up or has expired."""
    found = await fetch_authority(link)
    async with Transport(found) as transport:
        token = make_secret()
        await transport.call(wire.JOIN_HUB, wire.JoinHub(secret=link.secret, name=name, token_hash=Sha256(hash_secret(token))))
    return Credentials(address=found.address, authority_pem=found.authority_pem, token=token, name=name)


async def make_link(
    transport: Transport,
    purpose: str,
    route: wire.Route[wire.SecretRequest, wire.SecretAnswer],
    *,
    lifetime_s: float,
    uses: int = 1,
    owner: str = "",
    pilot_s: float = 0.0,
    path: dict[str, Any] | None = None,
) -> Link:
    """Make a secret, make its hash known to the server, and return the link with the secret."""
    secret = make_secret()
    request = wire.SecretRequest(
        secret_hash=Sha256(hash_secret(secret)), lifetime_s=lifetime_s, uses=uses, owner=owner, pilot_s=pilot_s
    )
    await transport.call(route, request, path=path)
    known = transport.credentials
    return Link(purpose=purpose, address=known.address, authority=known.authority, secret=secret)
