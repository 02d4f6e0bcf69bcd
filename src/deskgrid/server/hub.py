"""The hub inside a server's process: a hub like any other, but for its way to the store.

Its key is HOME/hub/hub.key, so that it stays the same hub over restarts.
"""

from __future__ import annotations

import socket
from pathlib import Path
from typing import TYPE_CHECKING

import structlog
from cryptography.hazmat.primitives import serialization

from deskgrid.errors import DeskgridError
from deskgrid.server.authority import ensure_key, read_peer_key
from deskgrid.server.routes.handler import Services
from deskgrid.server.store import hubs
from deskgrid.settings import HubSettings, load_settings

if TYPE_CHECKING:
    from deskgrid.overlay.hub import HubServer

__all__ = ["OwnHub"]

_log = structlog.get_logger("deskgrid.server")


class OwnHub:
    """The hub that a server runs. `start`, keep `renew_forever` running, `close`."""

    def __init__(self, home: Path, services: Services, address: str, *, key_file: Path | None = None) -> None:
        self.address = address
        """HOST:PORT that peers dial."""
        self._services = services
        self._key_pem = ensure_key(key_file or home / "hub" / "hub.key").decode()
        self._key = read_peer_key(_public_pem(self._key_pem))
        self._settings = load_settings(HubSettings, home / "hub.toml", "DESKGRID_HUB")
        self._hub: HubServer | None = None
        self._id = 0

    async def start(self, listener: socket.socket) -> None:
        """Serve peers on `listener`, and let the grid know."""
        from deskgrid.overlay.hub import HubServer

        services = self._services
        self._id = await services.store.write(lambda tx: hubs.add_own_hub(tx, self._key.hash))
        self._hub = HubServer(
            self._settings,
            clock=services.clock,
            grant_key_pem=services.authority.grant_key_pem,
            authority_pem=services.authority.pem.decode(),
            certificate_pem=self._certificate(),
            key_pem=self._key_pem,
        )
        await self._hub.start(listener)
        services.metrics.watch_hub(self._hub)
        await self._renew(self._hub)

    async def renew_forever(self) -> None:
        """Say that the hub is there, as every hub does, until cancelled or closed."""
        while True:
            await self._services.clock.sleep(self._services.settings.peer_s / 3)
            if self._hub is None:
                return
            try:
                await self._renew(self._hub)
            except DeskgridError as error:
                _log.error("the hub was not renewed", error=str(error))

    async def _renew(self, hub: HubServer) -> None:
        lifetime_s = self._services.settings.peer_s
        await self._services.store.write(
            lambda tx: hubs.renew_hub(
                tx, self._id, key=self._key.hash, address=self.address, peers=hub.peers, lifetime_s=lifetime_s
            )
        )
        hub.replace_certificate(self._certificate(), self._key_pem)

    def _certificate(self) -> str:
        services = self._services
        return services.authority.sign_hub(self._id, self._key, now=services.clock.now(), lifetime_s=services.settings.peer_s)

    async def close(self) -> None:
        """End the hub; no more peers are sent there. Idempotent."""
        hub, self._hub = self._hub, None
        self._services.metrics.watch_hub(None)
        if hub is None:
            return
        try:
            await self._services.store.write(lambda tx: hubs.end_hub(tx, self._id))
        finally:
            await hub.close()


def _public_pem(key_pem: str) -> str:
    public = serialization.load_pem_private_key(key_pem.encode(), password=None).public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
