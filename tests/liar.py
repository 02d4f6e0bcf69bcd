"""A worker that takes part in a swarm with the right certificate and sends other bytes than those of the blob.

    python -m tests.liar HOME        as the worker that joined there: lease a job, lie about its disk until standard input ends, say how much

Prints "lies" once it does, and at the end how many bytes it gave.
"""

from __future__ import annotations

import asyncio
import random
import socket
import sys
from pathlib import Path
from typing import Any

import libtorrent

from deskgrid.client.together import make_identity
from deskgrid.client.transport import Transport, load_credentials
from deskgrid.core.torrents import torrent_name
from deskgrid.model import wire
from deskgrid.model.data import Blob
from deskgrid.model.swarm import Turn
from deskgrid.testing.grids import played_sync

_OFF = dict.fromkeys(("enable_dht", "enable_lsd", "enable_upnp", "enable_natpmp"), False)


class Liar:
    """One that may read the blob."""

    def __init__(self, transport: Transport, folder: Path) -> None:
        self._transport, self._folder = transport, folder
        with socket.create_server(("0.0.0.0", 0)) as probe:  # left to itself, libtorrent takes another port for each network
            self._port = probe.getsockname()[1]
        settings = {"listen_interfaces": f"0.0.0.0:{self._port}s", "disable_hash_checks": True, **_OFF}
        self._session = libtorrent.session(settings)
        self._handle: Any = None

    async def begin(self, blob: Blob) -> None:
        """Take part: say to have all."""
        self._folder.mkdir()
        (self._folder / torrent_name(blob.sha256)).write_bytes(random.Random(0).randbytes(blob.size_bytes))
        identity = make_identity()
        turn = Turn(have=b"\xff" * 1000, port=self._port, addresses=identity.addresses(), key=identity.public_pem, torrent=True)
        answer = await self._transport.call(wire.TAKE_TURN, turn, path={"sha256": blob.sha256})
        parameters = libtorrent.add_torrent_params()
        parameters.ti = libtorrent.torrent_info(libtorrent.bdecode(answer.torrent))
        parameters.save_path = str(self._folder)
        parameters.flags = libtorrent.torrent_flags.seed_mode
        self._handle = self._session.add_torrent(parameters)
        self._handle.set_ssl_certificate_buffer(answer.certificate, identity.key_pem, "")

    def given_bytes(self) -> int:
        return int(self._handle.status().total_payload_upload)

    def end(self) -> None:
        self._session.pause()


async def main(home: Path) -> None:
    async with Transport(load_credentials(home / "credentials.json")) as transport:
        [assignment] = (await transport.call(wire.SYNC, played_sync(room=True))).assignments
        assert assignment.disk is not None
        liar = Liar(transport, home / "liar")
        await liar.begin(assignment.disk.blob)
        print("lies", flush=True)
        await asyncio.to_thread(sys.stdin.read)
        print(liar.given_bytes())


if __name__ == "__main__":
    asyncio.run(main(Path(sys.argv[1])))
