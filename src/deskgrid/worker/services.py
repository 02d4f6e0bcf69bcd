"""What one attempt's machine reaches and offers, while it runs: its cage on one side, the overlay on the other.

In the cage (machines/cage.py) each service of the job's `reach` has an address of its own, DOORWAYS.1, DOORWAYS.2 ..., where we listen; what
connects there is joined with the service. What the job offers is dialled at 127.0.0.1 in the cage once something listens there.
GATEWAY has two more listeners: SOCKS5 for the same services by name and, with `network = "internet"`, an HTTP proxy.

    guest -- 10.64.1.1:5432 -- our listener -- Peer -- TLS -- the other peer
    the other peer -- TLS -- Peer -- 127.0.0.1:8080 -- guest

The guest gives names and ports only; which service stands behind each is decided by the spec that the server sent, and again by
the server when it is asked for a grant.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import structlog

from deskgrid.client.transport import Credentials, load_credentials, save_credentials
from deskgrid.core.backoff import delay_s
from deskgrid.core.console import CONSOLE
from deskgrid.core.internet import near_networks
from deskgrid.errors import Conflict, DeskgridError, Forbidden, MachineFailed, Unreachable
from deskgrid.link import hash_secret, make_secret
from deskgrid.machines.cage import GATEWAY, HTTP_PROXY_PORT, SOCKS_PORT
from deskgrid.machines.driver import Caged, Doorway, MachineHandle
from deskgrid.model.ids import Sha256
from deskgrid.model.jobs import Machine
from deskgrid.model.machines import MachineKind, Network
from deskgrid.model.overlay import API_SERVICE, CACHE_SERVICE, Reach, ServiceRef
from deskgrid.model.workers import Assignment
from deskgrid.overlay.background import Background
from deskgrid.overlay.http_proxy import dial_public, serve_http_proxy
from deskgrid.overlay.peer import Dial, Peer
from deskgrid.overlay.proxy import reset, serve, serve_port
from deskgrid.overlay.relay import Relay
from deskgrid.overlay.socks import Join, serve_socks
from deskgrid.worker.console import console_dialler
from deskgrid.worker.kit import Kit, Overlay

__all__ = ["Services", "doorways", "job_credentials", "make_services"]

DOORWAYS = "10.64.1"
_BACKLOG = 128
_MOST_RELAYS = 1024
"""Connections of one machine to the server and, through SOCKS5, to the internet."""
_MOST_THREADS = 4
"""That look names up and dial the server for one machine: one that is slow must not take the worker's own."""
_IDLE_S = 86_400.0
_FINISH_S = 5.0
"""For what a program sent last to reach the other end, after it has ended."""
_log = structlog.get_logger()


def doorways(machine: Machine) -> tuple[Doorway, ...]:
    """Return where in its cage a machine finds the services that it may reach."""
    return tuple(
        Doorway(name=reach.name, host=f"{DOORWAYS}.{number}", port=reach.port, service=str(reach.service))
        for number, reach in enumerate(machine.reach, start=1)
    )


def job_credentials(file: Path, machine: Machine, worker: Credentials, name: str) -> Path | None:
    """Make the file by which a job reaches the server, with a new token; None if its spec does not say so."""
    reach = next((reach for reach in machine.reach if reach.service == API_SERVICE), None)
    if reach is None:
        return None
    address = f"{reach.name}:{reach.port}"
    save_credentials(file, Credentials(address=address, authority_pem=worker.authority_pem, token=make_secret(), name=name))
    return file


def make_services(kit: Kit, assignment: Assignment, credentials: Path) -> Services | None:
    """Return the services of an attempt; None if its machine has no network."""
    if kit.overlay is None or assignment.spec.machine.network is Network.NONE:
        return None
    return Services(kit, kit.overlay, assignment, credentials)


class Services:
    """The services of one attempt. `run` beside its machine; `listening` when the driver tells that a port is open."""

    def __init__(self, kit: Kit, overlay: Overlay, assignment: Assignment, credentials: Path) -> None:
        self._kit = kit
        self._overlay = overlay
        self._assignment = assignment
        self._machine = assignment.spec.machine
        self._credentials = credentials
        self._relays = Background(0)
        self._peer: Peer | None = None
        self._threads: ThreadPoolExecutor | None = None
        self._outside = ""
        """The address by which this PC was last seen from outside."""
        self._open = {offer.port: asyncio.Event() for offer in self._machine.offer}

    def listening(self, port: int) -> None:
        """Note that something in the machine listens on a port."""
        if port in self._open:
            self._open[port].set()

    async def finish(self) -> None:
        """Let what a machine sent before it ended reach the other ends, for some seconds at most."""
        if self._peer is not None:
            await self._peer.finish_streams(_FINISH_S)

    async def run(self, driver: Caged, handle: MachineHandle) -> None:
        """Serve until cancelled. What fails here is begun again after a pause: it never ends the attempt."""
        failures = 0
        while True:
            try:
                await self._run(driver, handle)
            except MachineFailed as error:  # it may be off
                _log.info("no_services", attempt_id=self._assignment.attempt_id, error=str(error))
            except Exception:
                _log.exception("services_broke", attempt_id=self._assignment.attempt_id)
            failures += 1
            await self._pause(failures)

    async def _run(self, driver: Caged, handle: MachineHandle) -> None:
        peer = Peer(
            self._overlay.endpoint,
            self._overlay.calls,
            attempt_id=self._assignment.attempt_id,
            offers=self._offers(driver, handle),
            job_token_hash=self._token_hash(),
        )
        serving: list[Coroutine[Any, Any, None]] = []
        self._relays = Background(_MOST_RELAYS)
        threads = self._threads = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="services")
        with contextlib.ExitStack() as held:
            held.callback(threads.shutdown, wait=False, cancel_futures=True)
            try:
                async for work in self._listeners(driver, handle, peer, held):
                    serving.append(work)  # noqa: PERF401 - those before one that fails must be closed
                await self._enter(peer)
            except BaseException:
                for work in serving:
                    work.close()
                raise
            self._peer = peer
            try:
                await self._serve(peer, serving)
            finally:
                self._peer = None

    def _offers(self, driver: Caged, handle: MachineHandle) -> dict[str, Dial]:
        own = {offer.name: self._dialler(driver, handle, offer.port) for offer in self._machine.offer}
        if self._machine.kind is not MachineKind.VM:
            return own
        return {**own, CONSOLE: console_dialler(self._kit, driver, handle)}

    async def _serve(self, peer: Peer, serving: list[Coroutine[Any, Any, None]]) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                for work in serving:
                    tasks.create_task(work)
                await asyncio.Event().wait()
        finally:
            try:
                await self._relays.close()
            finally:
                await peer.__aexit__(None, None, None)

    async def _enter(self, peer: Peer) -> None:
        """Become known to the server; what connects meanwhile waits in the listeners' queues."""
        failures = 0
        while True:
            try:
                await peer.__aenter__()
                return
            except DeskgridError as error:
                failures += 1
                _log.warning("peer_not_registered", attempt_id=self._assignment.attempt_id, error=str(error))
            await self._pause(failures)

    async def _pause(self, failures: int) -> None:
        settings = self._kit.settings
        pause_s = delay_s(failures, first_s=settings.backoff_s, max_s=settings.max_backoff_s, rng=self._kit.rng)
        await self._kit.clock.sleep(pause_s)

    async def _listeners(
        self, driver: Caged, handle: MachineHandle, peer: Peer, sockets: contextlib.ExitStack
    ) -> AsyncIterator[Coroutine[Any, Any, None]]:
        """Yield what serves each listener in the cage."""

        async def listen(host: str, port: int) -> socket.socket:
            return sockets.enter_context(await _listen(driver, handle, host, port))

        for reach, doorway in zip(self._machine.reach, doorways(self._machine), strict=True):
            listener = await listen(doorway.host, doorway.port)
            if not reach.service.is_of_peer:
                yield self._serve_given(reach.service, listener)
            else:
                yield serve_port(peer, str(reach.service), listener, wait_s=self._machine.reach_wait_s)
        yield serve_socks(self._joiner(peer), await listen(GATEWAY, SOCKS_PORT))
        if self._machine.network is Network.INTERNET:
            yield serve_http_proxy(
                self._public_dialler(peer), await listen(GATEWAY, HTTP_PROXY_PORT), pumps=self._overlay.endpoint.pumps
            )

    def _joiner(self, peer: Peer) -> Join:
        """Return what joins a SOCKS5 client with what it asked for: a service of the spec, or the internet where that is allowed."""

        dial_outside = self._public_dialler(peer)

        async def join(host: str, port: int, local: socket.socket, connected: Callable[[], None]) -> None:
            reach = self._find(host)
            if reach is not None and reach.service.is_of_peer:
                await peer.connect(str(reach.service), local, wait_s=self._machine.reach_wait_s, connected=connected)
                return
            if reach is not None:
                remote = await self._dial_given(reach.service)
            elif self._machine.network is Network.INTERNET:
                self._check_room()
                remote = await dial_outside(host, port)
            else:
                raise Forbidden(f"{host[:100]} is not among the services of this job")
            connected()
            self._relay(local, remote)

        return join

    def _find(self, host: str) -> Reach | None:
        """Return the service that a name or an address in the cage stands for."""
        wanted = host.lower().rstrip(".").removesuffix(".grid")
        for reach, doorway in zip(self._machine.reach, doorways(self._machine), strict=True):
            if wanted in (reach.name, str(reach.service), doorway.host):
                return reach
        return None

    async def _serve_given(self, service: ServiceRef, listener: socket.socket) -> None:
        """Carry connections to what no peer offers. The other end sees TLS of the job's own program."""

        async def join(local: socket.socket) -> None:
            try:
                self._relay(local, await self._dial_given(service))
            except DeskgridError as error:
                _log.info("not_reached_for_job", service=str(service), attempt_id=self._assignment.attempt_id, error=str(error))
                reset(local)

        await serve(listener, join)

    def _public_dialler(self, peer: Peer) -> Callable[[str, int], Awaitable[socket.socket]]:
        """Return what dials the internet, but never this PC's router by the address that it has there."""

        async def dial(host: str, port: int) -> socket.socket:
            self._outside = peer.observed or self._outside
            return await dial_public(host, port, near=near_networks([(self._outside, None)]), resolver=self._threads)

        return dial

    def _check_room(self) -> None:
        if len(self._relays) >= _MOST_RELAYS:
            raise Conflict(f"this job has {_MOST_RELAYS} connections already")

    def _relay(self, local: socket.socket, remote: socket.socket) -> None:
        """Carry bytes while the services last."""
        relay = Relay(self._overlay.endpoint.pumps, local, remote, idle_s=_IDLE_S)
        if self._relays.start(_follow(relay)) is None:
            relay.abort("too many connections")

    async def _dial_given(self, service: ServiceRef) -> socket.socket:
        self._check_room()
        return await (self._kit.sharing.dial() if service == CACHE_SERVICE else self._dial_server())

    async def _dial_server(self) -> socket.socket:
        host, _, port = self._overlay.credentials.address.rpartition(":")
        try:
            address = (host.strip("[]"), int(port))
            return await asyncio.get_running_loop().run_in_executor(self._threads, socket.create_connection, address, 10.0)
        except OSError as error:
            raise Unreachable(f"the server does not answer: {error}") from error

    def _dialler(self, driver: Caged, handle: MachineHandle, port: int) -> Callable[[], Awaitable[socket.socket]]:
        async def dial() -> socket.socket:
            # The hypervisor accepts for the guest whether anything listens there or not, so only the agent's word counts.
            await self._open[port].wait()
            local = await driver.open_socket(handle)
            try:
                local.setblocking(False)
                await asyncio.get_running_loop().sock_connect(local, ("127.0.0.1", port))
            except OSError as error:
                local.close()
                raise Unreachable(f"nothing answers on port {port} of the machine: {error.strerror}") from error
            except BaseException:
                local.close()
                raise
            return local

        return dial

    def _token_hash(self) -> Sha256 | None:
        try:
            return Sha256(hash_secret(load_credentials(self._credentials).token))
        except DeskgridError:
            return None


async def _follow(relay: Relay) -> None:
    try:
        await relay.wait_closed()
    finally:
        relay.abort("the services ended")


async def _listen(driver: Caged, handle: MachineHandle, host: str, port: int) -> socket.socket:
    listener = await driver.open_socket(handle)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(_BACKLOG)
        listener.setblocking(False)
    except OSError as error:
        listener.close()
        raise MachineFailed(f"cannot listen on {host}:{port} in the cage: {error.strerror}") from error
    return listener
