"""The repository: blobs named by their sha256, and uploads on their way into it; in a folder (repository_local.py) or at an S3 store.

An upload goes on where it stopped. A blob is there whole and verified or not at all, and never changes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from pathlib import Path
from typing import Protocol

from msgspec import Struct

from deskgrid.errors import InvalidInput
from deskgrid.model.data import Blob
from deskgrid.model.wire import UploadPart
from deskgrid.settings import ServerSettings

__all__ = ["Reading", "Repository", "Standing", "check_size", "open_repository"]


class Standing(Struct, frozen=True, kw_only=True):
    """How far an upload is."""

    received_bytes: int
    whole: bool
    """All bytes are there; `finish` is next."""
    parts: tuple[UploadPart, ...] = ()
    """What its sender is to put to the blob store by himself."""
    remote: str | None = None
    """Its name at the blob store."""


class Reading(Struct, frozen=True):
    """Bytes `first` to `last` of a blob."""

    first: int
    last: int
    chunks: AsyncIterator[bytes]


class Repository(Protocol):
    """Where blobs are. Methods raise StoreUnavailable if it cannot be used."""

    place: str
    """For people; "" is the server's own disk."""

    async def holds(self, blob: Blob) -> bool:
        """Say whether a blob is there with its size."""
        ...

    async def local_path(self, blob: Blob) -> Path:
        """Return a file with a blob's bytes, to be read soon. Raise NotFound if they are not there."""
        ...

    def link(self, sha256: str) -> str | None:
        """Return a URL by which a blob can be read for a while without the server; None: it comes from the server."""
        ...

    def file(self, sha256: str) -> Path | None:
        """Return the blob's file, None if blobs are not files here. Raise NotFound if its bytes are not there."""
        ...

    async def read(self, sha256: str, first: int, last: int | None) -> Reading:
        """Read a blob through the server, from byte `first` to `last`. Raise NotFound, InvalidInput."""
        ...

    def free_bytes(self) -> int:
        """Return what may still be stored on the server's disk."""
        ...

    async def standing(self, upload_id: int, blob: Blob, remote: str | None, *, direct: bool) -> Standing:
        """Return how far an upload is, and with `direct` what is to be sent next. Raise InvalidInput (too large), StoreUnavailable (no room)."""
        ...

    async def receive(self, upload_id: int, blob: Blob, offset: int, chunks: AsyncIterator[bytes]) -> int:
        """Append chunks to an upload and return how far it is. What arrived stays, however the stream ends.

        Raise Conflict if `offset` is not where the upload stands, InvalidInput if more bytes come than it has.
        """
        ...

    async def finish(self, upload_id: int, blob: Blob) -> bool:
        """Verify an upload that has all its bytes and make it a blob, durably; return False if that needs longer: then call again.

        Raise InvalidInput, and forget the bytes, if their sha256 is not what was announced.
        """
        ...

    async def settled(self, upload_id: int) -> None:
        """Hear that the store knows an upload as complete: what was kept for `finish` to be repeated can go. Idempotent."""
        ...

    async def abandon(self, upload_id: int, remote: str) -> None:
        """Forget what was begun at the blob store for an upload under this name. Idempotent."""
        ...

    async def remove(self, sha256: str) -> None:
        """Remove a blob's bytes, now or never: it does not go on after it raised. Idempotent."""
        ...

    async def upload_ids(self) -> set[int]:
        """Return the uploads of which there are bytes."""
        ...

    async def forget_uploads(self, upload_ids: Iterable[int]) -> None:
        """Remove the bytes of uploads, which are nobody's any more. Idempotent."""
        ...

    def blobs(self) -> AsyncIterator[list[Blob]]:
        """Iterate over all blobs, some at a time."""
        ...

    async def close(self) -> None:
        """End what is under way. Idempotent."""
        ...


def check_size(blob: Blob, max_bytes: int) -> None:
    """Raise InvalidInput if a blob is larger than is taken."""
    if not 0 <= blob.size_bytes <= max_bytes:
        raise InvalidInput(f"{blob.size_bytes} bytes are too many for one upload", hint=f"at most {max_bytes}")


async def open_repository(home: Path, settings: ServerSettings) -> Repository:
    """Open the repository that the settings name. Raise OperatorError, InvalidInput if it cannot be used."""
    from deskgrid.server.repository_local import LocalRepository

    local = LocalRepository(home, reserve_bytes=settings.reserve_bytes, max_bytes=settings.max_upload_bytes)
    if not settings.blobs:
        return local
    from deskgrid.server.repository_s3 import open_s3

    return await open_s3(home, settings.blobs, local)
