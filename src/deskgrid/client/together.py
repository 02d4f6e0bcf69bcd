"""Fetching a blob from workers that have it, besides from the server (swarm/fetch.py), in a confined process that lasts as long as the transfer."""

from __future__ import annotations

import asyncio
import importlib.util
import secrets
import shutil
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import msgspec
import psutil
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deskgrid.client.download import sha256_of
from deskgrid.client.transport import Transport
from deskgrid.clock import SystemClock
from deskgrid.core.torrents import LEAST_BYTES, torrent_name
from deskgrid.errors import DeskgridError
from deskgrid.machines.sandbox import Confinement, confined_command, python_command, python_folders
from deskgrid.model import wire
from deskgrid.model.data import Blob
from deskgrid.model.swarm import Turn, TurnAnswer
from deskgrid.swarm.engine import Engine
from deskgrid.swarm.fetch import Identity, Swarm

__all__ = ["can_share", "engine_command", "fetch_together", "make_identity"]


async def fetch_together(transport: Transport, blob: Blob, file: Path, progress: Callable[[int], None]) -> bool:
    """Fetch a blob from workers and the server, verified; return False, with nothing left, if it must be fetched from the server alone.

    What has come stays beside the file, in a folder FILE.d, if this is interrupted, and is gone on with. Nobody connects to this PC for it: it connects to workers. What it has while it fetches it gives to them.
    """
    if blob.size_bytes < LEAST_BYTES or not can_share():
        return False
    member = secrets.token_hex(8)

    async def take_turn(turn: Turn) -> TurnAnswer:
        mine = msgspec.structs.replace(turn, member=member, port=0)
        return await transport.call(wire.TAKE_TURN, mine, path={"sha256": blob.sha256})

    folder = file.with_name(f"{file.name}.d")
    folder.mkdir(mode=0o700, exist_ok=True)
    part = folder / blob.sha256
    engine = Engine(engine_command(folder), str(folder))
    swarm = Swarm(blob, torrent_name(blob.sha256), engine, make_identity(), take_turn, transport.read, SystemClock())
    try:
        await engine.start()
        is_right = await swarm.fetch(part.name, progress) and await swarm.is_written(partial(_has, part, blob.sha256))
    except (DeskgridError, OSError):
        is_right = False
    finally:
        await engine.close()
    if is_right:
        part.replace(file)
    shutil.rmtree(folder, ignore_errors=True)
    return is_right


async def _has(file: Path, sha256: str) -> bool:
    return await asyncio.to_thread(sha256_of, file) == sha256


def can_share() -> bool:
    """Tell whether libtorrent is installed."""
    return importlib.util.find_spec("libtorrent") is not None


def engine_command(folder: Path) -> list[str]:
    """Return the command of the engine's process, confined to a folder and the network."""
    command = python_command("deskgrid.swarm.engine_child", "main")
    if sys.platform != "linux":
        return command
    bounds = Confinement(
        memory_bytes=1 << 46,  # files are mapped
        cpu_s=1 << 40,
        readable=python_folders(),
        writable=(str(folder),),
        network=True,
        most_open=512,
    )
    return confined_command(command, bounds)


def make_identity() -> Identity:
    """Return a new key, and how this PC's addresses are found."""
    key = ec.generate_private_key(ec.SECP256R1())
    private = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return Identity(private.decode(), public.decode(), _own_addresses)


def _own_addresses() -> tuple[str, ...]:
    """Return the addresses of this PC's network cards, loopback too."""
    found = (
        one.address.partition("%")[0] for many in psutil.net_if_addrs().values() for one in many if one.family.name in _INTERNET
    )
    return tuple(dict.fromkeys(found))[:8]


_INTERNET = ("AF_INET", "AF_INET6")
