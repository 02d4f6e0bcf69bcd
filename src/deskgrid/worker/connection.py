"""What a worker needs of the way to the server: four calls, so that a test can be a server in twenty lines."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Any, Protocol, TypeVar

from deskgrid.client.transport import Credentials
from deskgrid.model import wire
from deskgrid.model.data import Blob

__all__ = ["Connect", "Connection"]

A = TypeVar("A")


class Connection(Protocol):
    """See client.transport.Transport, which is one."""

    async def call(
        self,
        route: wire.Route[Any, A],
        body: Any = None,
        *,
        path: dict[str, object] | None = None,
        query: dict[str, object] | None = None,
        wait_s: float = 0.0,
        key: str | None = None,
    ) -> A:
        """Make one call and return its answer. Raise DeskgridError."""
        ...

    async def upload(self, file: Path, blob: Blob, progress: Callable[[int], None] | None = None) -> None:
        """Send a file, going on where an earlier try stopped. Raise DeskgridError."""
        ...

    async def download(self, blob: Blob, file: Path, progress: Callable[[int], None] | None = None) -> None:
        """Fetch into a file, going on after the bytes that it has, and check it. Raise DeskgridError."""
        ...

    def read(self, blob: Blob, first: int, size_bytes: int) -> AsyncIterator[bytes]:
        """Yield `size_bytes` from byte `first` on; nobody has checked them. Raise DeskgridError."""
        ...


Connect = Callable[[Credentials], AbstractAsyncContextManager[Connection]]
"""Makes a connection with the worker's credentials."""
