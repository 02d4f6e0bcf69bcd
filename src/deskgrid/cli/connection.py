"""The grid that the commands of this user talk to."""

from __future__ import annotations

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import msgspec

from deskgrid.settings import client_home

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["connected", "credentials_file"]


def credentials_file() -> Path:
    """Return where this user's login is kept. DESKGRID_CLIENT_HOME names another folder, for a second grid or user."""
    return client_home() / "credentials.json"


@asynccontextmanager
async def connected() -> AsyncIterator[Grid]:
    """Open the grid that this user is logged in to, with the token in $DESKGRID_TOKEN if there is one. Raise InvalidInput if there is none."""
    # Imported here: the transport takes longer to load than the help of all commands to print.
    from deskgrid.client.grid import Grid
    from deskgrid.client.transport import load_credentials

    known = load_credentials(credentials_file())
    if os.environ.get("DESKGRID_TOKEN"):
        known = msgspec.structs.replace(known, token=os.environ["DESKGRID_TOKEN"])
    async with Grid(known) as grid:
        yield grid
