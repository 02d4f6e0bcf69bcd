"""Makes the torrents of large data: reads each blob once and keeps the hashes of its pieces. Several processes do no harm to each other."""

from __future__ import annotations

import asyncio
from pathlib import Path

import structlog

from deskgrid.core.torrents import PieceHasher
from deskgrid.errors import DeskgridError
from deskgrid.model.data import Blob
from deskgrid.server.routes.handler import Services
from deskgrid.server.store import data, swarm

__all__ = ["make_torrents", "make_torrents_forever"]

_log = structlog.get_logger("deskgrid.server")
_LOOK_AGAIN_S = 30.0
_CHUNK = 1 << 20


async def make_torrents_forever(services: Services) -> None:
    """Make what is missing, as soon as data is registered."""
    while True:
        mark = services.live.mark(data.REGISTERED)
        try:
            await make_torrents(services)
        except DeskgridError as error:
            _log.error("torrents failed", error=str(error))
        except Exception as error:
            # As a disk that cannot be read: transfers do without, and the server's end would be worse.
            _log.error("torrents failed", error=repr(error), exc_info=error)
        await services.live.wait({data.REGISTERED: mark}, _LOOK_AGAIN_S)


async def make_torrents(services: Services) -> int:
    """Make all torrents that are missing; return how many there were."""
    made = 0
    while (wanted := await services.store.read(swarm.without_torrent)) is not None:
        await _make(services, wanted)
        made += 1
    return made


async def _make(services: Services, of: Blob) -> None:
    file = services.repository.file(of.sha256)
    layer = await asyncio.to_thread(_layer_of, file, of) if file is not None else await _layer_of_remote(services, of)
    await services.store.write(lambda tx: swarm.keep_layer(tx, of, layer))


def _layer_of(file: Path, of: Blob) -> bytes:
    hasher = PieceHasher(of.size_bytes)
    with file.open("rb") as source:
        while chunk := source.read(_CHUNK):
            hasher.update(chunk)
    return hasher.layer()


async def _layer_of_remote(services: Services, of: Blob) -> bytes:
    hasher = PieceHasher(of.size_bytes)
    reading = await services.repository.read(of.sha256, 0, None)
    async for chunk in reading.chunks:
        await asyncio.to_thread(hasher.update, chunk)
    return hasher.layer()
