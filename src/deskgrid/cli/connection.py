"""The grid that the commands of this user talk to."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from deskgrid.client.connecting import open_login

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["connected"]


@asynccontextmanager
async def connected() -> AsyncIterator[Grid]:
    """Open the grid that this user is logged in to. Raise InvalidInput if there is none."""
    from deskgrid.client.grid import Grid  # here, for it takes longer to load than the help of all commands to print

    async with Grid(open_login()) as grid:
        yield grid
