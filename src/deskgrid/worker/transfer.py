"""How bytes come to this PC: from other workers if its owner shares, otherwise from the server, going on after interruptions; a new version of a
disk as a delta to the old one, if that is here.
"""

from __future__ import annotations

from pathlib import Path

import structlog

from deskgrid.core.backoff import delay_s
from deskgrid.errors import BadImage, NotFound, ProtocolError, StoreUnavailable, Unreachable
from deskgrid.model.data import Blob, DataRef, Delta, Disk
from deskgrid.model.placement import Protocol
from deskgrid.worker.kit import Kit

__all__ = ["Transfer"]

_log = structlog.get_logger()
_DOWNLOAD_TRIES = 8
"""Failures in a row without a byte of progress after which a download is given up."""


class Transfer:
    """Fetches one thing after the other."""

    def __init__(self, kit: Kit, protocol: Protocol = Protocol.AUTO) -> None:
        self._kit, self._protocol = kit, protocol
        self.fetched_bytes = 0
        """Of what is fetched now."""

    async def fetch_disk(self, ref: DataRef, partial: Path, output: Path) -> None:
        """Make a disk appear at `output`, verified: the `fetch` of swarm.cache. Raise BadImage, or as download does."""
        if ref.disk is None:
            raise BadImage("this data is not a disk")
        if ref.delta is not None and await self._fetch_delta(ref, ref.delta, ref.disk, partial, output):
            return
        packed = await self.fetch(ref.blob, partial)
        try:
            await self._unpack(packed, output, ref.disk)
        except ProtocolError as error:
            # What came is what was published (its sha256 is right), so nobody else's copy is better.
            raise BadImage(error.message, hint=error.hint) from error

    async def fetch(self, blob: Blob, partial: Path) -> Path:
        """Return a file with a blob, verified: `partial`, or one that is kept for others. Raise as download does."""
        if self._protocol is not Protocol.HTTPS:
            together = await self._kit.sharing.fetch(blob, self._note_progress)
            if together is not None:
                return together
        await self.download(blob, partial)
        return partial

    async def download(self, blob: Blob, file: Path) -> None:
        """Fetch a blob from the server, going on after interruptions. Raise Unreachable once tries without progress are used up."""
        failures, have = 0, _size(file)
        while True:
            try:
                await self._kit.connection.download(blob, file, self._note_progress)
                return
            except (Unreachable, StoreUnavailable):
                failures = 1 if _size(file) > have else failures + 1
                have = _size(file)
                if failures >= _DOWNLOAD_TRIES:
                    raise
                settings = self._kit.settings
                pause_s = delay_s(failures, first_s=settings.backoff_s, max_s=settings.max_backoff_s, rng=self._kit.rng)
                await self._kit.clock.sleep(pause_s)

    async def _fetch_delta(self, ref: DataRef, delta: Delta, disk: Disk, partial: Path, output: Path) -> bool:
        """Make a disk from an older one in the cache; return False if there is none, or nothing comes of it: then the whole is fetched."""
        with self._kit.cache.borrow(delta.base, delta.base_blob) as base:
            if base is None or delta.blob.size_bytes > ref.blob.size_bytes:  # it has no other room than that of the whole
                return False
            file = partial.with_name(f"{partial.name}.delta")
            try:
                await self.download(delta.blob, file)
                await self._unpack(file, output, disk, base=base)
            except (NotFound, BadImage, ProtocolError) as error:
                _log.warning("delta_not_used", disk=disk.sha256, error=str(error))
                return False
            finally:
                file.unlink(missing_ok=True)
        return True

    async def _unpack(self, packed: Path, output: Path, disk: Disk, *, base: Path | None = None) -> None:
        await self._kit.unpack(packed, output, sha256=disk.sha256, size_bytes=disk.size_bytes, format=disk.format, base=base)

    def _note_progress(self, have_bytes: int) -> None:
        self.fetched_bytes = have_bytes


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0
