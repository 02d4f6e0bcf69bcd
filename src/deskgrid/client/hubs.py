"""A hub on a machine of its own: it serves peers, and keeps telling the server that it is there.

HOME/credentials.json    where the grid is, and the hub's token
HOME/hub.key             the hub's key: made here, it never leaves
HOME/hub.toml            settings (may be missing)

While the server is away the hub goes on; only its certificate ages, at whose dates peers do not look.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
import socket
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deskgrid.client.grid import join_hub
from deskgrid.client.transport import Credentials, Transport, load_credentials, save_credentials
from deskgrid.clock import Clock, SystemClock
from deskgrid.core.backoff import delay_s
from deskgrid.errors import Conflict, DeskgridError, InvalidInput, OperatorError, Unauthenticated
from deskgrid.files import write_durably
from deskgrid.link import Link
from deskgrid.model import wire
from deskgrid.overlay.hub import HubServer
from deskgrid.settings import HubSettings

__all__ = ["HubProgram", "join_here", "run_hub"]

A = TypeVar("A")
_LEAVE_S = 3.0
_FIRST_RETRY_S, _LAST_RETRY_S = 1.0, 60.0
_log = structlog.get_logger("deskgrid.hub")


class Caller(Protocol):
    """The way to the server; client.transport.Transport is one."""

    async def call(self, route: wire.Route[Any, A], body: Any = None) -> A:
        """Make one call and return its answer. Raise DeskgridError."""
        ...


async def join_here(home: Path, link: Link, name: str) -> Path:
    """Make this machine a hub and keep its credentials; return their file. Raise Conflict if this folder is a hub's already."""
    file = home / "credentials.json"
    if file.exists():
        raise Conflict(f"{home} is a hub already", hint="use another --home")
    save_credentials(file, await join_hub(link, name))
    return file


async def run_hub(home: Path, settings: HubSettings, *, ready: Callable[[str], None] | None = None) -> None:
    """Be a hub until SIGTERM or SIGINT. `ready` is called with the HOST:PORT that peers dial once they can register.

    Raise InvalidInput if this folder is no hub's, OperatorError if the address cannot be had, Unauthenticated if the hub was removed.
    """
    file = home / "credentials.json"
    if not file.exists():
        raise InvalidInput(f"there is no hub in {home}", hint="deskgrid hub join LINK")
    credentials = load_credentials(file)
    clock = SystemClock()
    with _listening(settings.listen) as listener:
        address = settings.address or _address_of(listener, settings.listen)
        async with Transport(credentials) as transport, _stopped_by_signals() as stop:
            program = HubProgram(
                settings, credentials, _ensure_key(home / "hub.key"), transport, clock=clock, rng=random.SystemRandom()
            )
            work = asyncio.create_task(program.run(listener, address, ready=ready))
            waiting = asyncio.create_task(stop.wait())
            try:
                await asyncio.wait((work, waiting), return_when=asyncio.FIRST_COMPLETED)
            finally:
                work.cancel()
                waiting.cancel()
                await asyncio.wait((work, waiting))
            if not work.cancelled():
                work.result()


class HubProgram:
    """One hub and its calls to the server. `run` it once."""

    def __init__(
        self, settings: HubSettings, credentials: Credentials, key_pem: str, server: Caller, *, clock: Clock, rng: random.Random
    ) -> None:
        self._settings = settings
        self._authority_pem = credentials.authority_pem
        self._key_pem = key_pem
        self._public_pem = _public_pem(key_pem)
        self._server, self._clock, self._rng = server, clock, rng
        self._hub: HubServer | None = None
        self._certificate = ""
        self._lifetime_s = 0.0
        self._address = ""

    async def run(self, listener: socket.socket, address: str, *, ready: Callable[[str], None] | None = None) -> None:
        """Serve and renew until cancelled. Waits for the server first, then goes on without it. Raise Unauthenticated."""
        self._address = address
        failures = 0
        try:
            while True:
                first = self._hub is None
                failures = 0 if await self._renew(listener) else failures + 1
                if first and self._hub is not None and ready is not None:
                    ready(address)
                await self._clock.sleep(self._pause_s(failures))
        finally:
            if self._hub is not None:
                await self._leave()
                await self._hub.close()

    def _pause_s(self, failures: int) -> float:
        if not failures:
            return self._lifetime_s / 3
        longest_s = min(_LAST_RETRY_S, self._lifetime_s / 3) if self._lifetime_s else _LAST_RETRY_S
        return delay_s(failures, first_s=min(_FIRST_RETRY_S, longest_s), max_s=longest_s, rng=self._rng)

    async def _renew(self, listener: socket.socket) -> bool:
        """Tell the server that the hub is there, and use what it answers. Return whether that worked."""
        try:
            await self._use(await self._tell(), listener)
        except Unauthenticated:
            raise
        except DeskgridError as error:
            _log.warning("the hub was not renewed", error=str(error))
            return False
        return True

    async def _leave(self) -> None:
        """Have nobody sent here any more."""
        with contextlib.suppress(DeskgridError, TimeoutError):
            async with asyncio.timeout(_LEAVE_S):
                await self._tell(leaving=True)

    async def _tell(self, *, leaving: bool = False) -> wire.HubAnswer:
        peers = self._hub.peers if self._hub is not None else 0
        request = wire.RenewHub(key=self._public_pem, address=self._address, peers=peers, leaving=leaving)
        return await self._server.call(wire.RENEW_HUB, request)

    async def _use(self, answer: wire.HubAnswer, listener: socket.socket) -> None:
        if answer.lifetime_s <= 0:
            raise InvalidInput("the server gives this hub no time")
        if self._hub is None:
            hub = HubServer(
                self._settings,
                clock=self._clock,
                grant_key_pem=answer.grant_key,
                authority_pem=self._authority_pem,
                certificate_pem=answer.certificate,
                key_pem=self._key_pem,
                now_offset_s=answer.now - self._clock.now(),
            )
            await hub.start(listener)
            self._hub = hub
        else:
            self._hub.follow_server(grant_key_pem=answer.grant_key, now=answer.now)
            if answer.certificate != self._certificate:
                self._hub.replace_certificate(answer.certificate, self._key_pem)
        self._certificate, self._lifetime_s = answer.certificate, answer.lifetime_s


def _ensure_key(file: Path) -> str:
    """Return the hub's key in PEM; make it if it is not there. Raise InvalidInput if the file holds something else."""
    if not file.exists():
        key = ec.generate_private_key(ec.SECP256R1())
        pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
        write_durably(file, pem)
    try:
        text = file.read_bytes().decode("ascii")
        _public_pem(text)
    except ValueError as error:
        raise InvalidInput("this is not a key", where=str(file), hint="remove it to have another one made") from error
    return text


def _public_pem(key_pem: str) -> str:
    public = serialization.load_pem_private_key(key_pem.encode(), password=None).public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


@contextlib.contextmanager
def _listening(text: str) -> Iterator[socket.socket]:
    host, _, port = text.rpartition(":")
    if not host or not port.isdecimal() or int(port) > 65535:
        raise InvalidInput(f"{text!r} is not HOST:PORT", where="listen", hint="as in 0.0.0.0:8471")
    host = host.strip("[]")
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, int(port)))
    except OSError as error:
        listener.close()
        raise OperatorError(f"cannot listen on {text}: {error.strerror}", hint="choose another port with --listen") from error
    with listener:  # the hub closes it, too
        yield listener


def _address_of(listener: socket.socket, text: str) -> str:
    """Return the HOST:PORT that peers dial: where the hub listens, or this machine's name if that is everywhere."""
    host = text.rpartition(":")[0]
    if host.strip("[]") in ("0.0.0.0", "::"):  # noqa: S104 - compared, not bound
        host = socket.getfqdn()
    return f"{host}:{listener.getsockname()[1]}"


@contextlib.asynccontextmanager
async def _stopped_by_signals() -> AsyncIterator[asyncio.Event]:
    """Yield what SIGTERM and SIGINT set while the block lasts."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGTERM, signal.SIGINT)
    with contextlib.suppress(NotImplementedError):  # Windows: Ctrl-C arrives as KeyboardInterrupt
        for number in numbers:
            loop.add_signal_handler(number, stop.set)
    try:
        yield stop
    finally:
        with contextlib.suppress(NotImplementedError):
            for number in numbers:
                loop.remove_signal_handler(number)
