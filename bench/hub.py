"""Ten thousand idle peers on one hub: what each costs, and what happens when the hub is killed under them.

The hub is the real one in a process of its own. This process plays the peers, each with a key, a certificate and an address (127.x.y.z) of its
own: real TLS and frames on plain asyncio protocols, since ten thousand whole peers would need more than this machine has. They wait and try
again as real peers do (overlay/hubs.py). The yardstick is what asyncio offers by itself, `start_server` with TLS and certificates on both
sides, holding as many connections.

    registering     200 at a time: seconds, and CPU of the hub for each
    memory          resident, for each registered peer
    idle            CPU of the hub, as part of one core, with a sign of life from each peer every minute (measured with one every 10 s)
    storm           the hub is killed (SIGKILL) and another takes its port after a second: until the last peer is registered again
"""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import json
import os
import random
import resource
import ssl
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

sys.path.insert(0, str(Path(__file__).parent))
from report import Figure, arguments, publish

from deskgrid.core import frames
from deskgrid.core.backoff import delay_s
from deskgrid.model.overlay import hub_peer
from deskgrid.server.authority import Authority, make_authority, read_peer_key

_COUNT, _QUICK_COUNT = 10_000, 500
_AT_ONCE = 200
_PING_S = 10.0
_IDLE_S = 30.0
_OPEN_S, _STAGGER_S, _FIRST_BACKOFF_S, _MAX_BACKOFF_S = 10.0, 2.0, 1.0, 60.0
"""As in overlay/registration.py and overlay/hubs.py."""
_STORM_LIMIT_S = 300.0
_LIFETIME_S = 86_400.0
_HUB_NAME = hub_peer(1)
_HUB = """
import asyncio, json, socket, sys
from deskgrid.clock import SystemClock
from deskgrid.overlay.hub import HubServer
from deskgrid.settings import HubSettings
async def main():
    keys = json.load(open(sys.argv[1]))
    settings = HubSettings(ping_s=float(sys.argv[3]), max_peers_per_name=100_000)
    hub = HubServer(settings, clock=SystemClock(), grant_key_pem=keys["grant"], authority_pem=keys["authority"],
                    certificate_pem=keys["certificate"], key_pem=keys["key"])
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", int(sys.argv[2])))
    await hub.start(listener)
    print(listener.getsockname()[1], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
_BARE = """
import asyncio, json, ssl, sys, tempfile
from deskgrid.overlay.files import raise_file_limit
async def serve(reader, writer):
    while data := await reader.read(4096):
        writer.write(data)
async def main():
    raise_file_limit()
    keys = json.load(open(sys.argv[1]))
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cadata=keys["authority"])
    context.minimum_version, context.verify_mode = ssl.TLSVersion.TLSv1_3, ssl.CERT_REQUIRED
    with tempfile.NamedTemporaryFile("w") as file:
        file.write(keys["key"] + keys["certificate"])
        file.flush()
        context.load_cert_chain(file.name)
    server = await asyncio.start_server(serve, "127.0.0.1", 0, ssl=context, backlog=4096)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


class Keys:
    """An authority with the certificates of one hub and many peers."""

    def __init__(self, folder: Path, count: int) -> None:
        make_authority(folder / "authority", "bench", datetime.datetime.now(datetime.UTC))
        self._authority = Authority(folder / "authority")
        self._folder = folder
        self.file = folder / "keys.json"
        now = time.time()
        key, public = _key_pair()
        certificate = self._authority.sign_hub(1, read_peer_key(public), now=now, lifetime_s=_LIFETIME_S)
        authority = self._authority.pem.decode()
        written = {"grant": self._authority.grant_key_pem, "authority": authority, "certificate": certificate, "key": key}
        self.file.write_text(json.dumps(written))
        self.contexts = [self._context(f"user-{number + 1}.deskgrid") for number in range(count)]

    def _context(self, name: str) -> ssl.SSLContext:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=self._authority.pem.decode())
        key, public = _key_pair()
        file = self._folder / "peer.pem"
        file.write_text(key + self._authority.sign_peer(name, read_peer_key(public), now=time.time(), lifetime_s=_LIFETIME_S))
        context.load_cert_chain(file)
        return context


def _key_pair() -> tuple[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return secret.decode(), public.decode()


class Served:
    """A server in a process of its own, and what it used."""

    def __init__(self, script: str, *arguments: str) -> None:
        command = [sys.executable, "-c", script, *arguments]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE)
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline() or b"0")
        if not self.port:
            self.kill()
            raise RuntimeError("the server did not start")
        self._seen = psutil.Process(self._process.pid)
        self.first_bytes = self.rss_bytes()

    def cpu_s(self) -> float:
        """Return the CPU time used since its start."""
        times = self._seen.cpu_times()
        return float(times.user + times.system)

    def rss_bytes(self) -> int:
        """Return its resident memory."""
        return int(self._seen.memory_info().rss)

    def kill(self) -> None:
        """End it, as a power cut would."""
        self._process.kill()
        self._process.wait()
        if self._process.stdout is not None:
            self._process.stdout.close()


class Connection(asyncio.Protocol):
    """A peer's end of a registration; without `registers` just TLS, there once the handshake is done."""

    def __init__(self, context: ssl.SSLContext, *, registers: bool) -> None:
        self.there: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        """When it is registered: how often it is to say that it lives, in seconds."""
        self.lost = asyncio.Event()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=_HUB_NAME)
        self._registers = registers
        self._reader = frames.FrameReader()
        self._is_shaken = False
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport
        self._go_on()

    def data_received(self, data: bytes) -> None:
        self._incoming.write(data)
        self._go_on()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set()
        if not self.there.done():
            self.there.set_exception(error or ConnectionResetError("closed"))
            self.there.exception()

    def ping(self, number: int) -> None:
        """Say that it lives."""
        self._tls.write(frames.encode(frames.Ping(number)))
        self._flush()

    def _go_on(self) -> None:
        try:
            if not self._is_shaken:
                self._shake()
            while data := self._tls.read(16384):
                for message in self._reader.feed(data):
                    if isinstance(message, frames.Registered) and not self.there.done():
                        self.there.set_result(message.ping_s)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            assert self.transport is not None
            self.transport.abort()
        self._flush()

    def _shake(self) -> None:
        self._tls.do_handshake()
        self._is_shaken = True
        if self._registers:
            self._tls.write(frames.encode(frames.Register()))
        else:
            self._tls.write(b"x")  # the server has verified us when it answers
            self.there.set_result(0.0)

    def _flush(self) -> None:
        if self._outgoing.pending and self.transport is not None:
            self.transport.write(self._outgoing.read())


class Crowd:
    """All peers."""

    def __init__(self, keys: Keys, rng: random.Random) -> None:
        self._contexts, self._rng = keys.contexts, rng
        self.registered = 0
        self.losses = 0
        self.failures = 0
        self._lost_at: dict[int, float] = {}
        self.waits_s: list[float] = []
        """How long each peer was without a hub in the storm."""

    async def connect(self, number: int, port: int, *, registers: bool = True) -> Connection:
        """Connect from the peer's own address; TimeoutError or OSError if that fails."""
        source = (f"127.{1 + number // 62_500}.{number // 250 % 250}.{1 + number % 250}", 0)
        loop = asyncio.get_running_loop()
        context = self._contexts[number]
        async with asyncio.timeout(_OPEN_S):
            _, connection = await loop.create_connection(
                lambda: Connection(context, registers=registers), "127.0.0.1", port, local_addr=source
            )
            try:
                await connection.there
            except BaseException:
                if connection.transport is not None:
                    connection.transport.abort()
                raise
        return connection

    async def live(self, number: int, port: int, first: asyncio.Semaphore) -> None:
        """Be a peer: register, say that one lives, come back when the hub is lost."""
        failures = 0
        while True:
            try:
                async with first if number not in self._lost_at else contextlib.nullcontext():
                    connection = await self.connect(number, port)
            except (OSError, TimeoutError):
                self.failures += 1
                failures += 1
                await asyncio.sleep(delay_s(failures, first_s=_FIRST_BACKOFF_S, max_s=_MAX_BACKOFF_S, rng=self._rng))
                continue
            failures = 0
            self.registered += 1
            if number in self._lost_at:
                self.waits_s.append(time.perf_counter() - self._lost_at[number])
            await self._stay(connection)
            self.registered -= 1
            self.losses += 1
            self._lost_at[number] = time.perf_counter()
            await asyncio.sleep(self._rng.uniform(0.0, _STAGGER_S))

    async def _stay(self, connection: Connection) -> None:
        ping_s = connection.there.result()
        beat = 0
        while not connection.lost.is_set():
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(ping_s * (0.75 + 0.25 * self._rng.random())):
                    await connection.lost.wait()
            if not connection.lost.is_set():
                connection.ping(beat := beat + 1)


async def _until_registered(crowd: Crowd, count: int, limit_s: float) -> float:
    """Return how long it took."""
    began = time.perf_counter()
    while crowd.registered < count:
        if time.perf_counter() - began > limit_s:
            raise RuntimeError(f"{crowd.registered} of {count} peers are registered after {limit_s:.0f} s")
        await asyncio.sleep(0.02)
    return time.perf_counter() - began


async def _bare(keys: Keys, crowd: Crowd, count: int) -> tuple[float, float, float]:
    """Return seconds, CPU seconds and bytes for each connection of the yardstick."""
    server = Served(_BARE, str(keys.file))
    connections: list[Connection] = []
    try:
        room = asyncio.Semaphore(_AT_ONCE)

        async def one(number: int) -> None:
            async with room:
                connections.append(await crowd.connect(number, server.port, registers=False))

        began, before = time.perf_counter(), server.cpu_s()
        await asyncio.gather(*(one(number) for number in range(count)))
        took_s = time.perf_counter() - began
        await asyncio.sleep(1.0)
        return took_s, (server.cpu_s() - before) / count, (server.rss_bytes() - server.first_bytes) / count
    finally:
        for connection in connections:
            if connection.transport is not None:
                connection.transport.abort()
        server.kill()


async def measure(count: int, folder: Path, idle_s: float) -> list[Figure]:
    """Run everything and return the figures."""
    keys = Keys(folder, count)
    crowd = Crowd(keys, random.Random(1))
    bare_s, bare_cpu_s, bare_bytes = await _bare(keys, crowd, count)
    hub = Served(_HUB, str(keys.file), "0", str(_PING_S))
    peers: list[asyncio.Task[None]] = []
    try:
        before_s = hub.cpu_s()
        first = asyncio.Semaphore(_AT_ONCE)
        peers = [asyncio.create_task(crowd.live(number, hub.port, first)) for number in range(count)]
        register_s = await _until_registered(crowd, count, _STORM_LIMIT_S)
        register_cpu_s = (hub.cpu_s() - before_s) / count
        each_bytes = (hub.rss_bytes() - hub.first_bytes) / count
        before_s = hub.cpu_s()
        await asyncio.sleep(idle_s)
        idle_cpu = (hub.cpu_s() - before_s) / idle_s * _PING_S / 60.0
        dropped = crowd.losses
        own_before_s, crowd.failures = time.process_time(), 0
        hub.kill()
        while crowd.registered:
            await asyncio.sleep(0.01)
        began = time.perf_counter()
        await asyncio.sleep(1.0)
        hub = Served(_HUB, str(keys.file), str(hub.port), str(_PING_S))
        before_s = hub.cpu_s()
        await _until_registered(crowd, count, _STORM_LIMIT_S)
        storm_s = time.perf_counter() - began
        storm_cpu_s, own_cpu_s = hub.cpu_s() - before_s, time.process_time() - own_before_s
        waits_s = sorted(crowd.waits_s)
        words = f"{count} peers"
        return [
            Figure(
                f"memory of the hub for each of {words}", each_bytes / 1e3, "kB", bare_bytes / 1e3, each_bytes / bare_bytes, None
            ),
            Figure(
                "CPU of the hub for each registration",
                register_cpu_s * 1e3,
                "ms",
                bare_cpu_s * 1e3,
                register_cpu_s / bare_cpu_s,
                None,
            ),
            Figure(f"registering {words}, {_AT_ONCE} at a time", register_s, "s", bare_s, register_s / bare_s, None),
            Figure(f"CPU of the hub for {words} that are idle", idle_cpu * 100, "% of a core", None, None, None),
            Figure("peers dropped while idle", dropped, "peers", None, None, 0),
            Figure("storm: until all are registered again", storm_s, "s", None, None, None),
            Figure("storm: median peer without hub", waits_s[len(waits_s) // 2], "s", None, None, None),
            Figure("storm: CPU of the new hub", storm_cpu_s, "s", None, None, None),
            Figure("storm: CPU of the process that plays the peers", own_cpu_s, "s", None, None, None),
            Figure("storm: tries that failed, for each peer", crowd.failures / count, "tries", None, None, None),
            Figure("storm: peers that did not come back", count - crowd.registered, "peers", None, None, 0),
        ]
    finally:
        hub.kill()
        for peer in peers:
            peer.cancel()
        await asyncio.gather(*peers, return_exceptions=True)


@contextlib.contextmanager
def _many_files(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(f"{wanted} open files are needed, {hard} are allowed: ulimit -n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def main() -> None:
    """Run all and publish."""
    options = arguments(__doc__)
    count = _QUICK_COUNT if options.quick else _COUNT
    with tempfile.TemporaryDirectory(prefix="deskgrid-bench-") as folder, _many_files(count):
        os.chmod(folder, 0o700)
        figures = asyncio.run(measure(count, Path(folder), _PING_S if options.quick else _IDLE_S))
    publish("hub", figures, options)


if __name__ == "__main__":
    main()
