"""A user's own programs on the grid: the login that is kept, and his part in the overlay."""

from __future__ import annotations

import asyncio
import contextlib
import os
import random
import socket
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from deskgrid.settings import PeerSettings, client_home, load_settings

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid
    from deskgrid.client.transport import Credentials
    from deskgrid.model.wire import PeerOffer
    from deskgrid.overlay.peer import Dial, Peer

__all__ = ["connected_to", "credentials_file", "open_login", "peer_of"]


def credentials_file() -> Path:
    """Return where this user's login is kept. DESKGRID_CLIENT_HOME names another folder, for a second grid or user."""
    return client_home() / "credentials.json"


def open_login() -> Credentials:
    """Return the login that is kept, with the token in $DESKGRID_TOKEN if there is one. Raise InvalidInput if there is none."""
    from deskgrid.client.transport import load_credentials  # takes long to load

    known = load_credentials(credentials_file())
    if os.environ.get("DESKGRID_TOKEN"):
        known = msgspec.structs.replace(known, token=os.environ["DESKGRID_TOKEN"])
    return known


@asynccontextmanager
async def peer_of(grid: Grid, offers: Mapping[str, Dial] | None = None, shares: tuple[PeerOffer, ...] = ()) -> AsyncIterator[Peer]:
    """Be a peer of the user's own while the block lasts."""
    from deskgrid.client.peers import ServerCalls
    from deskgrid.clock import SystemClock
    from deskgrid.overlay.endpoint import Endpoint
    from deskgrid.overlay.peer import Peer

    settings = load_settings(PeerSettings, client_home() / "peer.toml", "DESKGRID_PEER")
    authority = grid.transport.credentials.authority_pem
    rng = random.Random()  # noqa: S311 - jitter
    async with (
        Endpoint(settings, clock=SystemClock(), rng=rng, authority_pem=authority) as endpoint,
        Peer(endpoint, ServerCalls(grid.transport), offers=offers or {}, shares=shares) as peer,
    ):
        yield peer


@asynccontextmanager
async def connected_to(grid: Grid, service: str, *, wait_s: float) -> AsyncIterator[tuple[str, int]]:
    """Let a service be reached at a port of this PC's while the block lasts; yield host and port. Raise InvalidInput for no service."""
    from deskgrid.model.overlay import parse_service
    from deskgrid.overlay.proxy import serve_port

    parse_service(service, "service")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.setblocking(False)
        async with peer_of(grid) as peer:
            serving = asyncio.create_task(serve_port(peer, service, listener, wait_s=wait_s))
            try:
                yield listener.getsockname()[:2]
            finally:
                serving.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await serving
