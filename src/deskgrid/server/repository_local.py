"""The repository in a folder: blobs named by their sha256, and uploads on their way into it.

    HOME/blobs/ab/abcd...      a blob, whole and verified; written once, never changed
    HOME/uploads/17            the bytes that upload 17 has so far

A blob appears by rename after its bytes are on disk and their sha256 is right. Several server processes may share the folder: who writes to
an upload holds a lock on its file, so that two never append to it.
"""

from __future__ import annotations

import asyncio
import errno
import fcntl
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO
from weakref import WeakValueDictionary

from deskgrid.errors import Conflict, InvalidInput, NotFound, StoreUnavailable
from deskgrid.files import sync_folder
from deskgrid.model.data import Blob
from deskgrid.model.ids import Sha256
from deskgrid.server.repository import Reading, Standing, check_size

__all__ = ["LocalRepository"]

_CHUNK = 1 << 20


class LocalRepository:
    """Blobs in a folder; see Repository."""

    place = ""

    def __init__(self, home: Path, *, reserve_bytes: int, max_bytes: int) -> None:
        self._blobs = home / "blobs"
        self._uploads = home / "uploads"
        self._reserve_bytes = reserve_bytes
        self.max_bytes = max_bytes
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        """A lock is here as long as somebody holds it or waits for it."""
        self._digests: dict[int, tuple[tuple[int, ...], Any]] = {}
        """Running sha256 of uploads that this process has received from their beginning, and of what state of which file."""
        for folder in (self._blobs, self._uploads):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def path(self, sha256: str) -> Path:
        """Return where a blob is. Raise NotFound if its bytes are not there."""
        file = self._place(sha256)
        if not file.is_file():
            raise NotFound(f"the bytes of {sha256[:12]} are not in the repository")
        return file

    async def local_path(self, blob: Blob) -> Path:
        """See Repository."""
        return self.path(blob.sha256)

    def link(self, sha256: str) -> str | None:
        """See Repository."""
        return None

    def file(self, sha256: str) -> Path | None:
        """See Repository."""
        return self.path(sha256)

    async def read(self, sha256: str, first: int, last: int | None) -> Reading:
        """See Repository."""
        raise NotImplementedError("a file is sent as it is")

    async def holds(self, blob: Blob) -> bool:
        """See Repository."""
        try:
            return self._place(blob.sha256).stat().st_size == blob.size_bytes
        except FileNotFoundError:
            return False

    def free_bytes(self) -> int:
        """Return what may still be stored: the disk's free space above the reserve."""
        return max(0, shutil.disk_usage(self._blobs).free - self._reserve_bytes)

    def received_bytes(self, upload_id: int) -> int:
        """Return how far an upload is."""
        try:
            return self._part(upload_id).stat().st_size
        except FileNotFoundError:
            return 0

    async def standing(self, upload_id: int, blob: Blob, remote: str | None, *, direct: bool) -> Standing:
        """See Repository."""
        received = self.received_bytes(upload_id)
        if received == 0:
            check_size(blob, self.max_bytes)
            if blob.size_bytes > self.free_bytes():
                raise _full()
        return Standing(received_bytes=received, whole=received == blob.size_bytes)

    async def receive(self, upload_id: int, blob: Blob, offset: int, chunks: AsyncIterator[bytes]) -> int:
        """Append chunks to an upload and return how far it is. What arrived stays, however the stream ends.

        Raise Conflict if `offset` is not where the upload stands, InvalidInput if more bytes come than it has.
        """
        async with self._lock(f"upload:{upload_id}"):
            with self._part(upload_id).open("ab", buffering=0) as output, _locked(output):
                return await self._append_all(upload_id, blob, offset, chunks, output)

    async def _append_all(self, upload_id: int, blob: Blob, offset: int, chunks: AsyncIterator[bytes], output: BinaryIO) -> int:
        have = os.fstat(output.fileno()).st_size
        if offset != have:
            raise Conflict(f"the upload stands at {have}, not {offset}", hint="ask where it stands and go on there")
        of, digest = self._digests.pop(upload_id, ((), None)) if have else (None, hashlib.sha256())
        if have and of != _state(os.fstat(output.fileno())):
            digest = None
        try:
            async for piece in _grouped(chunks):
                if have + len(piece) > blob.size_bytes:
                    raise InvalidInput(f"more bytes came than the {blob.size_bytes} announced")
                if len(piece) > self.free_bytes():
                    raise _full()
                await asyncio.to_thread(_append, output, piece, digest)
                have += len(piece)
        finally:
            if digest is not None:
                self._digests[upload_id] = (_state(os.fstat(output.fileno())), digest)
        return have

    async def finish(self, upload_id: int, blob: Blob) -> bool:
        """See Repository. Here it never needs longer than the call.

        That the blob is here says nothing of what was sent: bytes that are gone were wrong, or another process was quicker and has noted so.
        """
        async with self._lock(f"upload:{upload_id}"):
            try:
                part = await self.verified(upload_id, blob)
                async with self._lock(blob.sha256):
                    await asyncio.to_thread(_settle, part, self._place(blob.sha256))
            except FileNotFoundError as error:
                raise Conflict("the bytes of this upload have gone", hint="ask where it stands and go on there") from error
            return True

    async def verified(self, upload_id: int, blob: Blob) -> Path:
        """Return the file of an upload that has all its bytes, verified. Raise InvalidInput, and forget the bytes, if they are wrong."""
        part = self._part(upload_id)
        if blob.size_bytes == 0:
            part.touch()  # nothing is ever sent of an empty file
        of, digest = self._digests.pop(upload_id, ((), None))
        found = part.stat()
        if of != _state(found) or found.st_size != blob.size_bytes:
            digest = await asyncio.to_thread(_digest_of, part)
        if digest.hexdigest() != blob.sha256:
            part.unlink(missing_ok=True)
            raise InvalidInput(
                f"the bytes that came have the sha256 {digest.hexdigest()[:12]}, not {blob.sha256[:12]}", hint="send them again"
            )
        return part

    async def settled(self, upload_id: int) -> None:
        """See Repository."""

    async def abandon(self, upload_id: int, remote: str) -> None:
        """See Repository."""

    async def remove(self, sha256: str) -> None:
        """See Repository."""
        async with self._lock(sha256):
            self._place(sha256).unlink(missing_ok=True)

    async def upload_ids(self) -> set[int]:
        """See Repository."""
        return {int(part.name) for part in self._uploads.iterdir() if part.name.isdecimal()}

    async def forget_uploads(self, upload_ids: Iterable[int]) -> None:
        """See Repository."""
        for upload_id in upload_ids:
            self._part(upload_id).unlink(missing_ok=True)
            self._digests.pop(upload_id, None)

    async def blobs(self) -> AsyncIterator[list[Blob]]:
        """See Repository."""
        for folder in sorted(self._blobs.iterdir()):
            yield await asyncio.to_thread(_blobs_in, folder)

    async def close(self) -> None:
        """See Repository."""

    def _lock(self, name: str) -> asyncio.Lock:
        lock = self._locks.get(name)
        if lock is None:
            self._locks[name] = lock = asyncio.Lock()
        return lock

    def _place(self, sha256: str) -> Path:
        return self._blobs / sha256[:2] / sha256

    def _part(self, upload_id: int) -> Path:
        return self._uploads / str(upload_id)


@contextmanager
def _locked(file: BinaryIO) -> Iterator[None]:
    """Hold a file against other processes that share the folder. Raise Conflict if one of them has it."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise Conflict("these bytes are coming in elsewhere", hint="ask again in a moment where the upload stands") from error
    try:
        yield
    finally:
        fcntl.flock(file, fcntl.LOCK_UN)


def _blobs_in(folder: Path) -> list[Blob]:
    return [
        Blob(sha256=Sha256(file.name), size_bytes=file.stat().st_size)
        for file in folder.iterdir()
        if len(file.name) == 64 and file.name.startswith(folder.name)
    ]


async def _grouped(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """Join small pieces, so that a thread is not asked for each; what came before an error is still passed on."""
    waiting, size = [], 0
    try:
        async for chunk in chunks:
            waiting.append(chunk)
            size += len(chunk)
            if size >= _CHUNK:
                yield b"".join(waiting)
                waiting, size = [], 0
    except Exception:
        if waiting:
            yield b"".join(waiting)
        raise
    if waiting:
        yield b"".join(waiting)


def _append(output: Any, piece: bytes, digest: Any | None) -> None:
    """Write unbuffered, and hash what was really written: on a full disk that may be a part of the piece."""
    left = memoryview(piece)
    while left:
        try:
            written = output.write(left)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _full() from error
            raise StoreUnavailable(f"the repository cannot be written: {error.strerror}") from error
        if digest is not None:
            digest.update(left[:written])
        left = left[written:]


def _full() -> StoreUnavailable:
    return StoreUnavailable("the server's disk is full", hint="tell the admin; trying again later may help")


def _state(found: os.stat_result) -> tuple[int, ...]:
    """Return what differs if a file was written, or made anew under its number."""
    return found.st_ino, found.st_size, found.st_mtime_ns


def _digest_of(file: Path) -> Any:
    with file.open("rb") as source:
        return hashlib.file_digest(source, "sha256")


def _settle(part: Path, place: Path) -> None:
    """Move verified bytes to their place so that they survive a power cut."""
    with part.open("rb") as source:
        os.fsync(source.fileno())
    place.parent.mkdir(exist_ok=True, mode=0o700)
    part.chmod(0o444)
    part.replace(place)
    for folder in (place.parent, place.parent.parent):
        sync_folder(folder)
