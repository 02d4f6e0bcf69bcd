"""Who may call what: every route of the contract against every kind of caller, from the contract's own table."""

from __future__ import annotations

from pathlib import Path

import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deskgrid.client.grid import Grid
from deskgrid.client.transport import Credentials, Transport
from deskgrid.errors import DeskgridError, Forbidden, Unauthenticated
from deskgrid.link import hash_secret, make_secret
from deskgrid.model import wire
from deskgrid.model.ids import Sha256
from deskgrid.model.machines import Network
from deskgrid.model.overlay import API_SERVICE, Reach
from deskgrid.model.users import Role
from deskgrid.testing.grids import TestGrid, play_job, running_grid

_PATH = {
    "user": "nobody",
    "token": 0,
    "group": "none",
    "upload": 0,
    "sha256": "0" * 64,
    "reference": "none",
    "job": 0,
    "peer": 0,
    "hub": 0,
    "array": 0,
    "set": 0,
}


@pytest.fixture
async def grid(tmp_path: Path):
    async with running_grid(tmp_path / "server") as running:
        yield running


async def credentials(grid: TestGrid) -> dict[Role, Credentials]:
    admin = await grid.admin()
    async with Grid(admin) as transport:
        await transport.add_user("ann")
    worker = await grid.worker()
    return {
        Role.ADMIN: admin,
        Role.USER: await grid.user("ann"),
        Role.JOB: await job_credentials(admin, worker),
        Role.HUB: await grid.hub(),
        Role.WORKER: worker,
    }


async def job_credentials(owner: Credentials, worker: Credentials) -> Credentials:
    """Return what a running job of an admin's has, whose spec reaches the grid itself."""
    token, key = make_secret(), ec.generate_private_key(ec.SECP256R1())
    pem = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    async with Transport(worker) as transport:
        job = await play_job(owner, transport, network=Network.OVERLAY, reach=(Reach("grid", API_SERVICE, 8470),))
        request = wire.RegisterPeer(
            key=pem.decode(), attempt_id=job.assignment.attempt_id, job_token_hash=Sha256(hash_secret(token))
        )
        await transport.call(wire.REGISTER_PEER, request)
    return Credentials(address=owner.address, authority_pem=owner.authority_pem, token=token)


async def refusal(transport: Transport, route: wire.Route) -> type[DeskgridError] | None:
    """Return Unauthenticated or Forbidden if the door is shut; a call that fails behind the door was let in."""
    try:
        await transport.call(route, path=_PATH)
    except (Unauthenticated, Forbidden) as error:
        return type(error)
    except DeskgridError:
        return None
    return None


async def test_every_route_lets_in_exactly_the_roles_of_its_table(grid: TestGrid):
    people = await credentials(grid)
    assert set(people) == set(Role)
    last = ("sync", "leave")  # end the job's and the worker's token
    routes = sorted(wire.ROUTES.values(), key=lambda route: route.name in last)
    for role, holder in people.items():
        async with Transport(holder) as transport:
            for route in routes:
                allowed = not route.roles or role in route.roles
                found = await refusal(transport, route)
                if route in (wire.JOIN, wire.LOGIN, wire.JOIN_HUB):
                    continue  # the secret is the key, not the token
                assert (found is Forbidden) == (not allowed), f"{role} {route.name}: {found}"


async def test_without_a_token_only_the_open_routes_answer(grid: TestGrid):
    admin = await grid.admin()
    nobody = Credentials(address=admin.address, authority_pem=admin.authority_pem)
    wrong = Credentials(address=admin.address, authority_pem=admin.authority_pem, token="x" * 43)
    for holder in (nobody, wrong):
        async with Transport(holder) as transport:
            for route in wire.ROUTES.values():
                found = await refusal(transport, route)
                assert (found is Unauthenticated) == bool(route.roles), route.name


async def test_server_of_another_grid_is_not_believed(grid: TestGrid, tmp_path: Path):
    async with running_grid(tmp_path / "other") as other:
        mine, theirs = await grid.admin(), await other.admin()
        mixed = Credentials(address=theirs.address, authority_pem=mine.authority_pem, token=mine.token)
        async with Transport(mixed, tries=1) as transport:
            with pytest.raises(DeskgridError, match="not this grid's"):
                await transport.call(wire.WHO)
        link = await other.join_link()
        from deskgrid.client.grid import join
        from deskgrid.link import Link

        forged = Link(purpose="join", address=mine.address, authority=link.authority, secret=link.secret)
        with pytest.raises(DeskgridError, match="not the one of this link"):
            await join(forged, "pc")
