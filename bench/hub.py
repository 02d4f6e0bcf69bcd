"""Ten thousand idle peers on one hub: what each costs, and what happens when the hub is killed under them.

The hub is the real one (overlay/hub.py with its default settings) in a process of its own. This process plays the peers, each with a key, a
certificate and an address (127.x.y.z) of its own: real TLS and frames, but on plain asyncio protocols, since ten thousand whole peers
would need more than this machine has. They wait, ping and try again as real ones do (overlay/hubs.py, overlay/registration.py). The yardstick is
what asyncio offers by itself, `start_server` with TLS and certificates on both sides, holding as many connections.

    registering     200 at a time: seconds, and CPU of the hub for each
    memory          resident, for each registered peer, without what the kernel keeps for its socket
    idle            CPU of the hub, as part of one core; dropped: whose connection ended, or whose ping had no answer
    killed          the hub is killed (SIGKILL) and another takes its port after a second: until the last peer is registered again
    cut             all connections are cut, the hub lives on: the same, and whether its memory grows

Times of the last two count from the loss and contain the wait of each peer (up to 2 s, then back-off after each failure). Where the hub's CPU time is
as long as that, the hub is the limit.

What the storms are not: ten thousand PCs. All peers share one process, which needs as much CPU time for a handshake as the hub, so it cannot both
dial for all within 2 s and answer the hub at once. The hub is therefore killed twice. "prompt": who is being answered by the hub comes before who
dials, as if each had a PC of its own, but dialling takes as long as the whole storm. "rushed": everybody dials when its time comes, and answers
late. A grid lies between the two; "last dialled" says how far apart. --plot draws registered peers over time.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import datetime
import json
import random
import resource
import ssl
import subprocess
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import psutil
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec
from msgspec import Struct

sys.path.insert(0, str(Path(__file__).parent))
from report import Figure, arguments, publish

from deskgrid.core import frames
from deskgrid.core.backoff import delay_s
from deskgrid.model.overlay import hub_peer
from deskgrid.server.authority import Authority, make_authority, read_peer_key
from deskgrid.settings import HubSettings

_COUNT, _QUICK_COUNT = 10_000, 1_000
_AT_ONCE = 200
_PING_S, _QUICK_PING_S = HubSettings().ping_s, 5.0
_IDLE_PINGS = 2.5
"""How long the peers are idle, in pings."""
_OPEN_S, _PONG_S, _STAGGER_S, _FIRST_BACKOFF_S, _MAX_BACKOFF_S = 10.0, 15.0, 2.0, 1.0, 60.0
"""As in overlay/registration.py and overlay/hubs.py."""
_DOWN_S = 1.0
_PROMPT, _RUSHED = 16, 1 << 30
"""How many peers may dial in one round of the event loop."""
_LIMIT_S = 300.0
_LIFETIME_S = 86_400.0
_HUB_NAME = hub_peer(1)
_PLOT = Path(__file__).parent.parent / "docs" / "bench" / "hub.svg"
_HUB = """
import asyncio, json, os, socket, sys
import structlog
from deskgrid.clock import SystemClock
from deskgrid.overlay.hub import HubServer
from deskgrid.settings import HubSettings
structlog.configure(processors=[structlog.processors.JSONRenderer()], logger_factory=structlog.WriteLoggerFactory(sys.stderr))
async def main():
    keys = json.load(open(sys.argv[1]))
    hub = HubServer(HubSettings(ping_s=float(sys.argv[3])), clock=SystemClock(), grant_key_pem=keys["grant"],
                    authority_pem=keys["authority"], certificate_pem=keys["certificate"], key_pem=keys["key"])
    listener = socket.socket()
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", int(sys.argv[2])))
    await hub.start(listener)
    asyncio.get_running_loop().add_reader(0, os._exit, 0)  # whoever started it has gone
    print(listener.getsockname()[1], flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
_BARE = """
import asyncio, json, os, ssl, sys, tempfile
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
    asyncio.get_running_loop().add_reader(0, os._exit, 0)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()
asyncio.run(main())
"""


class Keys:
    """An authority with the certificates of one hub and many peers."""

    def __init__(self, folder: Path, count: int) -> None:
        make_authority(folder / "authority", "bench", datetime.datetime.now(datetime.UTC))
        self._authority = Authority(folder / "authority")
        self.folder = folder
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
        # The hub checks its peers in full; they save that work, since they all share one processor.
        context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
        key, public = _key_pair()
        file = self.folder / "peer.pem"
        file.write_text(key + self._authority.sign_peer(name, read_peer_key(public), now=time.time(), lifetime_s=_LIFETIME_S))
        context.load_cert_chain(file)
        return context


def _key_pair() -> tuple[str, str]:
    key = ec.generate_private_key(ec.SECP256R1())
    secret = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    public = key.public_key().public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo)
    return secret.decode(), public.decode()


class Served:
    """A server in a process of its own, and what it used. It ends with us, however we end."""

    def __init__(self, script: str, log: Path, *arguments: str) -> None:
        command = [sys.executable, "-c", script, *arguments]
        with log.open("ab") as errors:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, start_new_session=True
            )
        assert self._process.stdout is not None
        self.port = int(self._process.stdout.readline() or b"0")
        if not self.port:
            self.kill()
            raise RuntimeError(f"the server did not start: {log.read_text()[-2000:]}")
        self._seen = psutil.Process(self._process.pid)
        self.first_bytes, self.first_cpu_s = self.rss_bytes(), self.cpu_s()

    def cpu_s(self) -> float:
        """Return the CPU time used since its start."""
        times = self._seen.cpu_times()
        return float(times.user + times.system)

    def rss_bytes(self) -> int:
        """Return its resident memory."""
        return int(self._seen.memory_info().rss)

    def kill(self) -> None:
        """End it, as a power cut would. Idempotent."""
        self._process.kill()
        self._process.wait()
        for pipe in (self._process.stdin, self._process.stdout):
            if pipe is not None:
                pipe.close()


class Connection(asyncio.Protocol):
    """A peer's end of a registration; without `registers` just TLS, there once the server has said something in it."""

    def __init__(self, context: ssl.SSLContext, *, registers: bool) -> None:
        self.there: asyncio.Future[float] = asyncio.get_running_loop().create_future()
        """When it is registered: how often it is to say that it lives, in seconds."""
        self.lost = asyncio.Event()
        self.answered = asyncio.Event()
        """Set when the last ping was answered, or never will be."""
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=_HUB_NAME)
        self._registers = registers
        self._reader = frames.FrameReader()
        self._is_shaken = False
        self._pinged = 0
        self._transport: asyncio.Transport | None = None
        self._go_on()  # up to the first message, which waits for a connection

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self._transport = transport
        self._flush()

    def data_received(self, data: bytes) -> None:
        self._incoming.write(data)
        self._go_on()

    def connection_lost(self, error: Exception | None) -> None:
        self.lost.set()
        self.answered.set()
        if not self.there.done():
            self.there.set_exception(error or ConnectionResetError("closed"))
            self.there.exception()

    def ping(self) -> None:
        """Say that it lives."""
        self._pinged += 1
        self.answered.clear()
        self._tls.write(frames.encode(frames.Ping(self._pinged)))
        self._flush()

    def abort(self) -> None:
        """Cut the connection."""
        if self._transport is not None:
            self._transport.abort()

    def _go_on(self) -> None:
        try:
            if not self._is_shaken:
                self._shake()
            while data := self._tls.read(16384):
                self._take(data)
        except ssl.SSLWantReadError:
            pass
        except ssl.SSLError:
            self.abort()
        self._flush()

    def _take(self, data: bytes) -> None:
        if not self._registers and not self.there.done():
            self.there.set_result(0.0)
        for message in self._reader.feed(data) if self._registers else ():
            if isinstance(message, frames.Registered) and not self.there.done():
                self.there.set_result(message.ping_s)
            elif isinstance(message, frames.Pong) and message.number == self._pinged:
                self.answered.set()

    def _shake(self) -> None:
        self._tls.do_handshake()
        self._is_shaken = True
        self._tls.write(frames.encode(frames.Register()) if self._registers else b"x")

    def _flush(self) -> None:
        if self._outgoing.pending and self._transport is not None:
            self._transport.write(self._outgoing.read())


class Turns:
    """Who waits to connect, so many in each round of the event loop: those that a server has answered come first."""

    def __init__(self) -> None:
        self.in_a_round = _PROMPT
        self._waiting: deque[asyncio.Future[None]] = deque()

    async def next(self) -> None:
        """Return when it is one's turn."""
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append(future)
        if len(self._waiting) == 1:
            asyncio.get_running_loop().call_soon(self._round)
        await future

    def _round(self) -> None:
        for _ in range(min(self.in_a_round, len(self._waiting))):
            future = self._waiting.popleft()
            if not future.done():
                future.set_result(None)
        if self._waiting:
            asyncio.get_running_loop().call_soon(self._round)


class Crowd:
    """All peers."""

    def __init__(self, keys: Keys, rng: random.Random) -> None:
        self._contexts, self._rng = keys.contexts, rng
        self.connections: dict[int, Connection] = {}
        """Of the peers that are registered."""
        self.losses = 0
        self.failures: Counter[str] = Counter()
        """Of tries to register, by kind of error."""
        self._prepared: dict[int, Connection] = {}
        self.turns = Turns()
        self._lost_at: dict[int, float] = {}
        self.dialled_at: dict[int, float] = {}
        """When each peer dialled for the first time, in perf_counter's seconds."""
        self.waits_s: list[float] = []
        """How long each peer that came back was without a hub."""

    def prepare(self) -> None:
        """Count anew, and make what each peer will say first: in a storm this process stands for many, which would not wait for one another."""
        self.losses = 0
        self.failures.clear()
        self.dialled_at.clear()
        self.waits_s.clear()
        self._prepared = {number: Connection(context, registers=True) for number, context in enumerate(self._contexts)}

    async def connect(self, number: int, port: int, *, registers: bool = True) -> Connection:
        """Connect from the peer's own address; TimeoutError or OSError if that fails."""
        source = (f"127.{1 + number // 62_500}.{number // 250 % 250}.{1 + number % 250}", 0)
        loop = asyncio.get_running_loop()
        await self.turns.next()
        self.dialled_at.setdefault(number, time.perf_counter())
        connection = self._prepared.pop(number, None) or Connection(self._contexts[number], registers=registers)
        try:
            async with asyncio.timeout(_OPEN_S):
                await loop.create_connection(lambda: connection, "127.0.0.1", port, local_addr=source)
                await connection.there
        except BaseException:
            connection.abort()
            raise
        return connection

    async def live(self, number: int, port: int, first: asyncio.Semaphore) -> None:
        """Be a peer: register, say that one lives, come back when the hub is lost."""
        failures = 0
        while True:
            try:
                async with first if number not in self._lost_at else contextlib.nullcontext():
                    connection = await self.connect(number, port)
            except (OSError, TimeoutError) as error:
                self.failures[type(error).__name__] += 1
                failures += 1
                await asyncio.sleep(delay_s(failures, first_s=_FIRST_BACKOFF_S, max_s=_MAX_BACKOFF_S, rng=self._rng))
                continue
            failures = 0
            self.connections[number] = connection
            if number in self._lost_at:
                self.waits_s.append(time.perf_counter() - self._lost_at[number])
            try:
                await self._stay(connection)
            finally:
                connection.abort()
                del self.connections[number]
            self.losses += 1
            self._lost_at[number] = time.perf_counter()
            await asyncio.sleep(self._rng.uniform(0.0, _STAGGER_S))

    async def _stay(self, connection: Connection) -> None:
        """Return when the connection is lost, or a ping is not answered in time."""
        ping_s = connection.there.result()
        while not await _is_set(connection.lost, ping_s * (0.75 + 0.25 * self._rng.random())):
            connection.ping()
            if not await _is_set(connection.answered, _PONG_S):
                return


async def _is_set(event: asyncio.Event, limit_s: float) -> bool:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(limit_s):
            await event.wait()
    return event.is_set()


class Wave(Struct, frozen=True):
    """All peers registering, once."""

    curve: tuple[tuple[float, int], ...]
    """Seconds since the beginning, and how many were registered."""
    hub_cpu_s: float
    own_cpu_s: float
    failures: dict[str, int]
    waits_s: tuple[float, ...]
    """How long each peer was without a hub, shortest first; empty if it had none before."""
    dialled_s: float
    """Until the last had dialled for the first time."""
    each_bytes: float
    """Memory of the hub for each peer afterwards."""

    @property
    def took_s(self) -> float:
        """Until the last was registered."""
        return self.curve[-1][0]


class Stage:
    """A hub and its peers."""

    def __init__(self, keys: Keys, count: int, ping_s: float) -> None:
        self.count, self.ping_s = count, ping_s
        self.crowd = Crowd(keys, random.Random(1))
        self._keys = keys
        self._hub = self._start_hub(0)
        self._peers: list[asyncio.Task[None]] = []

    def _start_hub(self, port: int) -> Served:
        return Served(_HUB, self._keys.folder / "hub.log", str(self._keys.file), str(port), str(self.ping_s))

    async def close(self) -> None:
        """End everything."""
        self._hub.kill()
        for peer in self._peers:
            peer.cancel()
        await asyncio.gather(*self._peers, return_exceptions=True)

    async def register(self) -> Wave:
        """Have all peers come, so many at a time."""
        first = asyncio.Semaphore(_AT_ONCE)
        began, own_s, hub_s = time.perf_counter(), time.process_time(), self._hub.cpu_s()
        self._peers = [asyncio.create_task(self.crowd.live(number, self._hub.port, first)) for number in range(self.count)]
        return await self._wave(began, own_s, hub_s=hub_s, losses=0)

    async def idle(self) -> tuple[float, int]:
        """Return the CPU of the hub as part of a core, and how many peers were dropped."""
        self.crowd.prepare()
        seconds = _IDLE_PINGS * self.ping_s
        before_s = self._hub.cpu_s()
        await asyncio.sleep(seconds)
        return (self._hub.cpu_s() - before_s) / seconds, self.crowd.losses

    async def kill_hub(self, in_a_round: int) -> Wave:
        """Kill the hub; another takes its place after a while."""
        self.crowd.prepare()
        self.crowd.turns.in_a_round = in_a_round
        began, own_s = time.perf_counter(), time.process_time()
        port = self._hub.port
        self._hub.kill()
        starting = asyncio.create_task(self._replace_hub(port))
        try:
            return await self._wave(began, own_s, losses=self.count, starting=starting)
        finally:
            await asyncio.gather(starting, return_exceptions=True)

    async def cut(self) -> Wave:
        """Cut all connections; the hub lives on."""
        self.crowd.prepare()
        self.crowd.turns.in_a_round = _PROMPT
        began, own_s, hub_s = time.perf_counter(), time.process_time(), self._hub.cpu_s()
        for connection in list(self.crowd.connections.values()):
            connection.abort()
        return await self._wave(began, own_s, hub_s=hub_s, losses=self.count)

    async def _replace_hub(self, port: int) -> None:
        await asyncio.sleep(_DOWN_S)
        self._hub = await asyncio.to_thread(self._start_hub, port)  # the peers' time goes on meanwhile

    async def _wave(
        self, began: float, own_s: float, *, losses: int, hub_s: float | None = None, starting: asyncio.Task[None] | None = None
    ) -> Wave:
        """Wait until so many were lost, and all are registered."""
        crowd, curve = self.crowd, [(0.0, len(self.crowd.connections))]
        while crowd.losses < losses or len(crowd.connections) < self.count:
            await asyncio.sleep(0.05)
            curve.append((time.perf_counter() - began, len(crowd.connections)))
            if curve[-1][0] > _LIMIT_S:
                raise RuntimeError(f"{curve[-1][1]} of {self.count} peers are registered after {_LIMIT_S:.0f} s")
            if starting is not None and starting.done():
                starting.result()
        hub_cpu_s = self._hub.cpu_s() - (self._hub.first_cpu_s if hub_s is None else hub_s)
        own_cpu_s = time.process_time() - own_s
        await asyncio.sleep(1.0)  # the hub forgets those that are gone
        each_bytes = (self._hub.rss_bytes() - self._hub.first_bytes) / self.count
        return Wave(
            curve=tuple(curve),
            hub_cpu_s=hub_cpu_s,
            own_cpu_s=own_cpu_s,
            failures=dict(crowd.failures),
            waits_s=tuple(sorted(crowd.waits_s)),
            dialled_s=max(crowd.dialled_at.values()) - began,
            each_bytes=each_bytes,
        )


@contextlib.asynccontextmanager
async def _stage(keys: Keys, count: int, ping_s: float) -> AsyncIterator[Stage]:
    stage = Stage(keys, count, ping_s)
    try:
        yield stage
    finally:
        await stage.close()


async def _bare(keys: Keys, count: int) -> tuple[float, float, float]:
    """Return seconds, CPU seconds and bytes for each connection of the yardstick."""
    crowd = Crowd(keys, random.Random(1))
    server = Served(_BARE, keys.folder / "bare.log", str(keys.file))
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
            connection.abort()
        server.kill()


async def measure(keys: Keys, count: int, ping_s: float) -> tuple[list[Figure], dict[str, Wave]]:
    """Run everything; return the figures, and the waves by name."""
    bare_s, bare_cpu_s, bare_bytes = await _bare(keys, count)
    async with _stage(keys, count, ping_s) as stage:
        first = await stage.register()
        idle, dropped = await stage.idle()
        prompt = await stage.kill_hub(_PROMPT)
        rushed = await stage.kill_hub(_RUSHED)
        cut = await stage.cut()
    cpu_s = first.hub_cpu_s / count
    words = f"{count} peers"
    figures = [
        _beside(f"memory of the hub for each of {words}", first.each_bytes / 1e3, "kB", bare_bytes / 1e3),
        _beside("CPU of the hub for each registration", cpu_s * 1e3, "ms", bare_cpu_s * 1e3),
        _beside(f"registering {words}, {_AT_ONCE} at a time", first.took_s, "s", bare_s),
        Figure(f"CPU of the hub, {words} idle with a ping every {ping_s:.0f} s", idle * 100, "% of a core", None, None, None),
        Figure("peers dropped while idle", dropped, "peers", None, None, 0),
        *_storm("hub killed, prompt", prompt, count),
        *_storm("hub killed, rushed", rushed, count),
        *_storm("connections cut", cut, count),
    ]
    waves = {f"{_AT_ONCE} at a time": first, "hub killed, prompt": prompt, "hub killed, rushed": rushed, "connections cut": cut}
    return figures, waves


def _beside(name: str, ours: float, unit: str, theirs: float) -> Figure:
    return Figure(name, ours, unit, theirs, ours / theirs, None)


def _storm(name: str, wave: Wave, count: int) -> Iterator[Figure]:
    refused = wave.failures.get("ConnectionRefusedError", 0)
    waits_s = wave.waits_s
    for what, value, unit in (
        ("until all are registered again", wave.took_s, "s"),
        ("last dialled", wave.dialled_s, "s"),
        ("median peer without a hub", waits_s[len(waits_s) // 2], "s"),
        ("longest", waits_s[-1], "s"),
        ("CPU of the hub", wave.hub_cpu_s, "s"),
        ("CPU of the process that plays the peers", wave.own_cpu_s, "s"),
        ("tries for each peer while no hub was there", refused / count, "tries"),
        ("tries for each peer that the hub did not serve", (sum(wave.failures.values()) - refused) / count, "tries"),
        ("memory of the hub for each peer afterwards", wave.each_bytes / 1e3, "kB"),
    ):
        yield Figure(f"{name}: {what}", value, unit, None, None, None)
    yield Figure(f"{name}: peers that did not come back", count - wave.curve[-1][1], "peers", None, None, 0)


def _drawn(waves: dict[str, Wave], count: int) -> str:
    """Return a picture of registered peers over time."""
    width, height, left, top = 480, 240, 70, 40
    longest_s = max(wave.took_s for wave in waves.values())
    parts = []
    for row, ((name, wave), colour) in enumerate(zip(waves.items(), ("#a9a9a9", "#c1121f", "#e09f3e", "#2a6f97"), strict=True)):
        points = " ".join(
            f"{left + width * at_s / longest_s:.1f},{top + height * (1 - peers / count):.1f}"
            for at_s, peers in _thinned(wave.curve)
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        y = top + height - 80 + 20 * row
        parts.append(f'<text x="{left + width - 180}" y="{y}" fill="{colour}">{name}: {wave.took_s:.1f} s</text>')
    for tick in range(5):
        x, level = left + width * tick / 4, top + height * (1 - tick / 4)
        parts.append(f'<text x="{x:.0f}" y="{top + height + 20}" text-anchor="middle">{longest_s * tick / 4:.0f} s</text>')
        parts.append(f'<text x="{left - 8}" y="{level + 5:.0f}" text-anchor="end">{count * tick // 4}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="620" height="{top + height + 40}" font-family="sans-serif" font-size="14">'
        f'<rect width="100%" height="100%" fill="white"/><text x="10" y="18" font-size="16">bench/hub.py: registered peers</text>'
        f'<path d="M{left} {top}V{top + height}H{left + width}" fill="none" stroke="black"/>{"".join(parts)}</svg>\n'
    )


def _thinned(curve: Sequence[tuple[float, int]]) -> list[tuple[float, int]]:
    step = max(1, len(curve) // 200)
    return [*curve[::step], curve[-1]]


@contextlib.contextmanager
def _many_files(count: int) -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = count + 500
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(f"{wanted} open files are needed, {hard} are allowed: ulimit -n")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, wanted), hard))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def _peers_wanted() -> int | None:
    """Take --peers, which no other benchmark has, from the command line."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--peers", type=int)
    mine, rest = parser.parse_known_args()
    sys.argv[1:] = rest
    wanted: int | None = mine.peers
    return wanted


def main() -> None:
    """Run all and publish."""
    wanted = _peers_wanted()
    options = arguments(f"{__doc__}\n    --peers N       as many instead of {_COUNT} (--quick: {_QUICK_COUNT})")
    count = wanted or (_QUICK_COUNT if options.quick else _COUNT)
    with tempfile.TemporaryDirectory(prefix="deskgrid-bench-") as folder, _many_files(count):
        keys = Keys(Path(folder), count)
        figures, waves = asyncio.run(measure(keys, count, _QUICK_PING_S if options.quick else _PING_S))
    if options.plot:
        _PLOT.write_text(_drawn(waves, count), encoding="utf-8")
        options.plot = False
    publish("hub", figures, options)


if __name__ == "__main__":
    main()
