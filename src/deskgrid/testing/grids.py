"""A real server inside a test's process: real TLS, real store, real repository, on a free loopback port."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
from collections.abc import AsyncIterator
from pathlib import Path

import uvicorn

from deskgrid.client.grid import join, login
from deskgrid.client.transport import Credentials
from deskgrid.clock import Clock, SystemClock
from deskgrid.link import Link
from deskgrid.server.app import make_app
from deskgrid.server.authority import ensure_certificate
from deskgrid.server.routes.handler import Services
from deskgrid.server.setup import init_server, listen, make_join_link, make_login_link, open_services, server_config
from deskgrid.settings import ServerSettings

__all__ = ["TestGrid", "running_grid"]


class TestGrid:
    """A running server with ways in."""

    __test__ = False  # not a test class, whatever its name

    def __init__(self, home: Path, settings: ServerSettings, services: Services) -> None:
        self.home = home
        self.settings = settings
        self.services = services

    async def admin(self) -> Credentials:
        """Return credentials of the admin."""
        return await self.user("admin")

    async def user(self, name: str) -> Credentials:
        """Return new credentials of a user that exists."""
        return await login(await make_login_link(self.home, self.settings, name), "test")

    async def worker(self, name: str = "pc") -> Credentials:
        """Return credentials of a new worker."""
        return await join(await self.join_link(), name)

    async def join_link(self) -> Link:
        """Return a link for one worker."""
        return await make_join_link(self.home, self.settings)


@contextlib.asynccontextmanager
async def running_grid(home: Path, settings: ServerSettings | None = None, clock: Clock | None = None) -> AsyncIterator[TestGrid]:
    """Run a server in this event loop until the block ends. Its lease sweep is left to the test."""
    chosen = settings or ServerSettings(listen="127.0.0.1:0", reserve_bytes=0)
    await init_server(home, chosen)
    with listen(chosen) as listener:
        (home / "address").write_text(f"127.0.0.1:{listener.getsockname()[1]}")
        chain, key = ensure_certificate(home / "authority", [], datetime.datetime.now(datetime.UTC))
        async with open_services(home, chosen, clock or SystemClock()) as services:
            server = uvicorn.Server(server_config(make_app(services), chain, key))
            server.capture_signals = contextlib.nullcontext  # type: ignore[assignment,method-assign]
            task = asyncio.create_task(server.serve(sockets=[listener]))
            try:
                yield TestGrid(home, chosen, services)
            finally:
                server.should_exit = True
                await task
