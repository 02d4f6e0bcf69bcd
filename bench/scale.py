"""How many jobs may wait and how many workers may call: the store, the server, and 100,000 simulated workers.

Part 1, waiting jobs: arrays of process jobs in 200 requirement classes, 10 thousand, 1 million and 10 million in all, each in a new database.

    filling     jobs per second that the chores make of the arrays, one writer, as the server does it
    submit      single jobs per second, 32 submitting at once, group commit
    dispatch    jobs per second that are reported and leased by worker calls through the store (no HTTPS), 32 calling at once; each call ends a job and
                gets another (or 20). Every run has the same number of jobs at every size; at 10 thousand each run has a new database, or the jobs
                would be gone. Aim: at 10 million at least 0.8 of that at 10 thousand
    call        p99 of a worker's call through a real server and HTTPS, 100 calls per second offered, each ends a job and gets another

Part 2, workers: 90,000 idle ones that call every 300 s and 10,000 with a job that call every 60 s (a tenth of the calls end the job and get another), over HTTPS to a
real `deskgrid server` with a new TLS connection for each call (bench/swarm_of_workers.py says why). Idle ones ask for work; what waits does not fit them.
Latency counts from when a call was due. Both programs share this machine's CPUs; what each used is reported apart.

These workers make no wake calls. What the server asks of idle ones is reported beside: real ones hold a wake call where it says so.

    --postgresql    PostgreSQL in the place of SQLite
    --only PART     jobs or workers
    --workers N     so many instead of 100,000, at the same intervals; a tenth has a job
    --squeeze F     intervals shorter by this factor: N workers call as often as N times F would
    --generators N  programs that play workers
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import resource
import secrets
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import msgspec
import psutil
import sqlalchemy as sa
from msgspec import Struct

sys.path.insert(0, str(Path(__file__).parent))
from report import Figure, arguments, median_of, publish
from swarm_of_workers import Plan, Played

from deskgrid import __version__
from deskgrid.clock import SystemClock
from deskgrid.link import hash_secret
from deskgrid.model import wire
from deskgrid.model.ids import WorkerId
from deskgrid.model.jobs import AttemptState, JobSpec, Machine, Results
from deskgrid.model.machines import DriverName, Fingerprint, MachineKind
from deskgrid.model.users import Role
from deskgrid.model.workers import AttemptReport, Capacity, Profile
from deskgrid.server import scheduler
from deskgrid.server.setup import database_url, init_server
from deskgrid.server.store import accounts, submissions, workers
from deskgrid.server.store.accounts import Caller
from deskgrid.server.store.engine import SqlStore, Transaction, open_engine
from deskgrid.settings import ServerSettings
from deskgrid.testing.postgresql import running_postgresql
from deskgrid.units import GIB, MIB

_CLASSES = 200
_SIZES, _QUICK_SIZES = (10_000, 1_000_000, 10_000_000), (10_000, 100_000)
_FILL_AT_ONCE = 5000
"""As server/chores.py."""
_CALLERS = 32
_DISPATCHED, _UNCOUNTED, _SUBMITTED, _RUNS = 2000, 500, 2000, 5
_PER_CALL = (1, 20)
_CALLING, _CALLING_S = 300, 3.0
_WORKERS, _QUICK_WORKERS = 100_000, 2_000
_BUSY_PART = 10
_IDLE_S, _BUSY_S, _STEADY_S = 300.0, 60.0, 300.0
_QUICK_SQUEEZE, _QUICK_STEADY_S = 10.0, 30.0
_KEEP_S = 15.0
"""For which aiohttp keeps a connection that is not used (client/transport.py says nothing else)."""
_ENDS = 0.1
_BEFORE_START_S = 3.0
_LIMIT_S = 600.0
_LENT = Capacity(cpus=64, memory_bytes=64 * GIB, disk_bytes=200 * GIB)
_SMALL = Capacity(cpus=1, memory_bytes=64 * MIB, disk_bytes=20 * GIB)
"""Of idle workers: too small for what waits."""
_NOTHING = Capacity(cpus=0, memory_bytes=0, disk_bytes=0)
_ADMIN = "admin"


class Choice(Struct, frozen=True):
    """Options that only this benchmark has."""

    jobs: bool
    workers: bool
    postgresql: bool
    count: int | None
    squeeze: float | None
    generators: int


def chosen(given: Sequence[str]) -> tuple[Choice, list[str]]:
    """Take our own options; return the rest, too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--postgresql", action="store_true")
    parser.add_argument("--only", choices=("jobs", "workers"))
    parser.add_argument("--workers", type=int)
    parser.add_argument("--squeeze", type=float)
    parser.add_argument("--generators", type=int, default=1)
    mine, rest = parser.parse_known_args(given)
    if (
        (mine.workers is not None and mine.workers < _BUSY_PART)
        or mine.generators < 1
        or (mine.squeeze is not None and mine.squeeze <= 0)
    ):
        parser.error(f"at least {_BUSY_PART} workers, one generator, and a squeeze above 0")
    return Choice(mine.only != "workers", mine.only != "jobs", mine.postgresql, mine.workers, mine.squeeze, mine.generators), rest


# ---- a grid's database, filled


@contextlib.contextmanager
def new_home(postgresql: bool) -> Iterator[tuple[Path, ServerSettings]]:
    """Make the folder and the database of a grid, and remove them afterwards."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deskgrid-bench-")))
        url = stack.enter_context(running_postgresql()) if postgresql else ""
        settings = ServerSettings(database=url, lease_s=3600.0, max_waiting=0)
        asyncio.run(init_server(folder / "server", settings, admin=_ADMIN))
        yield folder / "server", settings


@contextlib.asynccontextmanager
async def opened(home: Path, settings: ServerSettings) -> AsyncIterator[SqlStore]:
    """Open the store, as a server does."""
    store = SqlStore(database_url(home, settings), SystemClock())
    try:
        yield store
    finally:
        await store.close()


def spec_of(number: int) -> JobSpec:
    """Return a job of one of the classes, which differ in the memory that they need."""
    machine = Machine(kind=MachineKind.PROCESS, memory_bytes=(128 + number % _CLASSES) * MIB, scratch_bytes=64 * MIB)
    return JobSpec(machine=machine, command=("/bin/true",), results=Results(paths=()))


async def fill(store: SqlStore, count: int) -> float:
    """Make `count` waiting jobs, in an array per class; return jobs per second."""
    caller = await user(store)
    began = time.perf_counter()
    for number in range(_CLASSES):
        size = count // _CLASSES
        new = submissions.NewSubmission(spec=spec_of(number))

        array_id = await store.write(partial(submissions.submit_array, caller=caller, new=new, size=size))
        while await store.write(partial(submissions.fill, array_id=array_id, limit=_FILL_AT_ONCE)):
            pass
    return count / (time.perf_counter() - began)


async def user(store: SqlStore) -> Caller:
    """Return the admin as who submits."""
    found = await store.read(lambda tx: accounts.find_account(tx, _ADMIN))
    return Caller(Role.ADMIN, _ADMIN, user_id=found.id)


def profile() -> Profile:
    """Return what all simulated workers are."""
    able = Fingerprint(driver=DriverName.PROCESS, kinds=(MachineKind.PROCESS,), usable=True, version="1")
    return Profile(os="linux", arch="x86_64", drivers=(able,), lent=_LENT, version=__version__)


def sync_of(free: Capacity, attempts: tuple[AttemptReport, ...] = ()) -> wire.Sync:
    """Return a worker's call."""
    return wire.Sync(profile=profile(), paused=False, attempts=attempts, free=free, cached=())


async def add_workers(store: SqlStore, count: int) -> list[tuple[WorkerId, str]]:
    """Add workers that have called already; return their numbers and tokens."""
    added: list[tuple[WorkerId, str]] = []

    def add(tx: Transaction, tokens: Sequence[str]) -> Iterator[tuple[WorkerId, str]]:
        for token in tokens:
            worker_id = workers.add_worker(tx, "simulated")
            accounts.add_token(tx, hash_secret(token), role=Role.WORKER, label="simulated", on=worker_id)
            workers.seen(tx, worker_id, sync_of(_NOTHING))
            yield worker_id, token

    for first in range(0, count, 1000):
        tokens = [secrets.token_urlsafe(32) for _ in range(first, min(first + 1000, count))]
        added += await store.write(lambda tx, tokens=tokens: list(add(tx, tokens)))  # type: ignore[misc]
    return added


# ---- part 1: waiting jobs


async def at_once(count: int, one: Callable[[int], Awaitable[int]]) -> tuple[float, list[float]]:
    """Let callers call one after the other until `count` is done; return done per second, and how long each call took."""
    done, took = 0, []

    async def call_on(number: int) -> None:
        nonlocal done
        while done < count:
            began = time.perf_counter()
            more = await one(number)  # by itself: `done += await` would forget what the others did meanwhile
            done += more
            took.append(time.perf_counter() - began)

    began = time.perf_counter()
    await asyncio.gather(*(call_on(number) for number in range(_CALLERS)))
    return done / (time.perf_counter() - began), took


async def dispatch(store: SqlStore, settings: ServerSettings, count: int, per_call: int) -> tuple[float, list[float]]:
    """Return jobs per second that are ended and leased anew, and how long each call took."""
    callers = [Caller(Role.WORKER, "simulated", worker_id=found) for found, _ in await add_workers(store, _CALLERS)]
    free = Capacity(cpus=per_call, memory_bytes=64 * GIB, disk_bytes=200 * GIB)
    held: list[list[int]] = [[] for _ in callers]

    async def call(number: int) -> int:
        reports = tuple(AttemptReport(attempt_id=one, state=AttemptState.SUCCEEDED, exit_code=0) for one in held[number])  # type: ignore[arg-type]
        request = sync_of(free, reports)
        answer = await store.write(lambda tx: scheduler.sync(tx, callers[number], request, settings, secrets.token_hex(16)))
        if len(answer.acknowledged) != len(reports) or len(answer.assignments) != per_call:
            raise RuntimeError(
                f"{len(reports)} reported, {len(answer.acknowledged)} taken, {len(answer.assignments)} of {per_call} leased"
            )
        held[number] = [one.attempt_id for one in answer.assignments]
        return len(reports)

    for number in range(_CALLERS):  # each has its first jobs before the time counts
        await call(number)
    await at_once(_UNCOUNTED, call)  # a database that was filled a moment ago, as at the smallest size, is not slower for that
    return await at_once(count, call)


async def submit_singles(store: SqlStore, count: int) -> float:
    """Return single jobs per second."""
    caller = await user(store)

    async def submit(number: int) -> int:
        new = submissions.NewSubmission(spec=spec_of(number))
        await store.write(lambda tx: submissions.submit_job(tx, caller, new))
        return 1

    rate, _ = await at_once(count, submit)
    return rate


class Waiting(Struct, kw_only=True):
    """What was measured with so many waiting jobs."""

    size: int
    fill_rate: float
    dispatch_rates: dict[int, float]
    """Medians, by jobs per call."""
    submit_rate: float
    call_p99_s: float
    call_errors: int


def measure_waiting(size: int, choice: Choice, runs: int, steady_s: float) -> Waiting:
    """Measure everything with `size` waiting jobs."""
    rates: dict[int, list[float]] = {per_call: [] for per_call in _PER_CALL}
    filled: list[float] = []
    taken = (_DISPATCHED + _UNCOUNTED + _CALLERS * max(_PER_CALL)) * runs * len(_PER_CALL)
    fresh = taken * 5 > size
    with contextlib.ExitStack() as stack:
        home, settings = stack.enter_context(new_home(choice.postgresql))
        filled.append(asyncio.run(_filled(home, settings, size)))
        for per_call in _PER_CALL:
            for run in range(runs):
                if fresh and (run or per_call != _PER_CALL[0]):
                    stack.close()
                    home, settings = stack.enter_context(new_home(choice.postgresql))
                    filled.append(asyncio.run(_filled(home, settings, size)))
                rates[per_call].append(asyncio.run(_dispatched(home, settings, per_call)))
        played = simulate(home, settings, busy=_CALLING, idle=0, busy_s=_CALLING_S, idle_s=1.0, ends=1.0, steady_s=steady_s).played
        submit_rate = asyncio.run(_submitted(home, settings))
    return Waiting(
        size=size,
        fill_rate=median_of(filled),
        dispatch_rates={per_call: median_of(found) for per_call, found in rates.items()},
        submit_rate=submit_rate,
        call_p99_s=quantile([took for one in played for took in one.latencies_s], 0.99),
        call_errors=sum(sum(one.errors.values()) for one in played),
    )


async def _filled(home: Path, settings: ServerSettings, size: int) -> float:
    async with opened(home, settings) as store:
        rate = await fill(store, size)
    if not settings.database:
        return rate  # SQLite keeps no statistics unless told to, and the server does not
    engine = open_engine(settings.database)
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(sa.text("ANALYZE"))  # PostgreSQL does it some time after; here at all sizes before the first run
    engine.dispose()
    return rate


async def _dispatched(home: Path, settings: ServerSettings, per_call: int) -> float:
    async with opened(home, settings) as store:
        rate, _ = await dispatch(store, settings, _DISPATCHED, per_call)
        return rate


async def _submitted(home: Path, settings: ServerSettings) -> float:
    async with opened(home, settings) as store:
        return await submit_singles(store, _SUBMITTED)


# ---- part 2: workers


class Simulated(Struct, frozen=True, kw_only=True):
    """What became of simulated workers, in the steady time."""

    played: tuple[Played, ...]
    server_cpu_s: float
    bytes_before: int
    bytes_after: int
    """Resident, of the server."""


def simulate(
    home: Path,
    settings: ServerSettings,
    *,
    busy: int,
    idle: int,
    busy_s: float,
    idle_s: float,
    ends: float,
    steady_s: float,
    generators: int = 1,
    squeeze: float = 1.0,
) -> Simulated:
    """Run a server and the programs that play workers. They begin within the longer interval, which is not measured."""
    require_files(busy, idle, busy_s, idle_s)
    added = asyncio.run(_added(home, settings, busy + idle))
    tokens = [token for _, token in added]
    with running_server(home, settings) as (server, port), tempfile.TemporaryDirectory(prefix="deskgrid-bench-") as name:
        process = psutil.Process(server.pid)
        start_at = time.monotonic() + _BEFORE_START_S
        measure_at = start_at + max(busy_s, idle_s if idle else 0.0)
        times = (start_at, measure_at, measure_at + steady_s)
        bytes_before = process.memory_info().rss
        players = []
        for number in range(generators):
            mine = tokens[:busy][number::generators] + tokens[busy:][number::generators]
            plan = _plan(home, port, mine, len(tokens[:busy][number::generators]), number, times, busy_s, idle_s, ends, squeeze)
            file = Path(name) / f"{number}.json"
            file.write_bytes(msgspec.json.encode(msgspec.structs.replace(plan, output=str(file.with_suffix(".played")))))
            script = Path(__file__).parent / "swarm_of_workers.py"
            players.append(subprocess.Popen([sys.executable, str(script), str(file)], stdout=subprocess.DEVNULL))
        try:
            time.sleep(max(0.0, measure_at - time.monotonic()))
            require_running(server, home)
            cpu_s = sum(process.cpu_times()[:2])
            time.sleep(max(0.0, times[2] - time.monotonic()))
            cpu_s = sum(process.cpu_times()[:2]) - cpu_s
            bytes_after = process.memory_info().rss
            require_running(server, home)
            for player in players:
                if player.wait(_LIMIT_S):
                    raise RuntimeError("a program that plays workers failed")
        finally:
            for player in players:
                player.kill()
                player.wait()
        played = [msgspec.json.decode(file.read_bytes(), type=Played) for file in sorted(Path(name).glob("*.played"))]
    return Simulated(played=tuple(played), server_cpu_s=cpu_s, bytes_before=bytes_before, bytes_after=bytes_after)


async def _added(home: Path, settings: ServerSettings, count: int) -> list[tuple[WorkerId, str]]:
    async with opened(home, settings) as store:
        return await add_workers(store, count)


def _plan(
    home: Path,
    port: int,
    tokens: Sequence[str],
    busy: int,
    number: int,
    times: tuple[float, float, float],
    busy_s: float,
    idle_s: float,
    ends: float,
    squeeze: float,
) -> Plan:
    asking = Capacity(cpus=1, memory_bytes=4 * GIB, disk_bytes=20 * GIB)
    before, after = _around_attempts(sync_of(asking))
    before_full, after_full = _around_attempts(sync_of(_NOTHING))
    lines = (
        f"POST {wire.SYNC.path} HTTP/1.1",
        f"Host: 127.0.0.1:{port}",
        f"{wire.WIRE_VERSION_HEADER}: {wire.WIRE_VERSION[0]}.{wire.WIRE_VERSION[1]}",
        "Accept: */*",
        "Accept-Encoding: gzip, deflate",
        "User-Agent: Python/3.11 aiohttp/3",
        "Content-Type: application/octet-stream",
    )
    return Plan(
        address=("127.0.0.1", port),
        server_name=wire.SERVER_NAME,
        authority_pem=(home / "authority" / "authority.pem").read_text(),
        headers="".join(f"{line}\r\n" for line in lines),
        before=before,
        after=after,
        before_full=before_full,
        after_full=after_full,
        idle=msgspec.json.encode(sync_of(_SMALL)).decode(),
        tokens=tuple(tokens),
        first_number=number << 18,
        busy=busy,
        idle_s=idle_s,
        busy_s=busy_s,
        keep_s=_KEEP_S / squeeze,
        start_at=times[0],
        measure_at=times[1],
        end_at=times[2],
        ends=ends,
        final='{"attempt_id":%d,"state":"succeeded","exit_code":0}',
        seed=number,
        output="",
    )


def _around_attempts(sync: wire.Sync) -> tuple[str, str]:
    before, word, after = msgspec.json.encode(sync).decode().partition('"attempts":[')
    return before + word, after


@contextlib.contextmanager
def running_server(home: Path, settings: ServerSettings) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """Run `deskgrid server run` and yield it with its port once it answers."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("DESKGRID_")},
        "DESKGRID_SERVER_LEASE_S": str(settings.lease_s),
        "DESKGRID_SERVER_DATABASE": settings.database,
        "DESKGRID_SERVER_HUB_LISTEN": "off",
    }
    command = [sys.executable, "-m", "deskgrid", "server", "run", "--home", str(home), "--listen", f"127.0.0.1:{port}"]
    with (home / "server.log").open("ab") as log:
        server = subprocess.Popen(
            command, env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=_many_files
        )
    try:
        end = time.monotonic() + 60
        while not _answers(port):
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start: {(home / 'server.log').read_text()[-2000:]}")
            time.sleep(0.05)
        require_running(server, home)
        yield server, port
    finally:
        server.terminate()
        try:
            server.wait(20)
        except subprocess.TimeoutExpired:
            server.kill()
            server.wait()


def require_running(server: subprocess.Popen[bytes], home: Path) -> None:
    """Raise RuntimeError if the server has ended: what its absence cost is no figure."""
    if server.poll() is not None:
        raise RuntimeError(f"the server ended with {server.returncode}: {(home / 'server.log').read_text()[-2000:]}")


def _answers(port: int) -> bool:
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
        return True
    return False


def _many_files() -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def require_files(busy: int, idle: int, busy_s: float, idle_s: float) -> None:
    """Raise SystemExit if fewer files may be open than there will be connections, each kept for a while after its call."""
    wanted = min(busy + idle, int((busy / busy_s + idle / idle_s) * _KEEP_S * 1.5)) + 500
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < wanted:
        raise SystemExit(f"{wanted} open files are needed, {hard} are allowed: ulimit -n")


def measure_workers(choice: Choice, count: int, squeeze: float, steady_s: float) -> list[Figure]:
    """Simulate workers; return the figures."""
    busy = count // _BUSY_PART
    intervals = {"busy_s": _BUSY_S / squeeze, "idle_s": _IDLE_S / squeeze}
    with new_home(choice.postgresql) as (home, settings):
        waiting = _CLASSES * (1 + int(busy * (2 + _ENDS * (steady_s + intervals["idle_s"]) / intervals["busy_s"])) // _CLASSES)
        asyncio.run(_filled(home, settings, waiting))
        found = simulate(
            home,
            settings,
            busy=busy,
            idle=count - busy,
            ends=_ENDS,
            steady_s=steady_s,
            generators=choice.generators,
            squeeze=squeeze,
            **intervals,
        )
    return worker_figures(found, count, squeeze, steady_s)


def worker_figures(found: Simulated, count: int, squeeze: float, steady_s: float) -> list[Figure]:
    """Return the figures of simulated workers."""
    took = [one for played in found.played for one in played.latencies_s]
    lags = [one for played in found.played for one in played.lags_s]
    errors: dict[str, int] = {}
    for played in found.played:
        for why, times in played.errors.items():
            errors[why] = errors.get(why, 0) + times
    for why, times in errors.items():
        print(f"{times} times: {why}", file=sys.stderr)
    calls = max(1, len(took))
    holding = sum(played.holding for played in found.played)
    words = f"{count} workers" + (f", intervals by {squeeze:g} shorter" if squeeze != 1 else "")
    hold_s = max(played.longest_hold_s for played in found.played)
    whole = count >= _WORKERS and squeeze == 1 and steady_s >= _STEADY_S  # the aim says nothing of fewer workers
    rows: list[tuple[str, float, str, float | None]] = [
        (f"{words}: calls", len(took) / steady_s, "calls/s", None),
        ("with a new TLS connection", sum(played.connections for played in found.played) / calls * 100, "% of calls", None),
        ("call, p50 from when it was due", quantile(took, 0.5) * 1e3, "ms", None),
        ("call, p99 from when it was due", quantile(took, 0.99) * 1e3, "ms", 250.0 if whole else None),
        ("call, longest", max(took, default=0.0) * 1e3, "ms", None),
        ("of that, until the generator began the call, p99", quantile(lags, 0.99) * 1e3, "ms", None),
        ("errors", sum(errors.values()), "calls", 0.0),
        ("jobs ended and replaced", sum(played.ended for played in found.played), "jobs", None),
        ("workers with a job at the end", holding, "workers", None),
        ("idle workers that got a job", sum(played.idle_holding for played in found.played), "jobs", 0.0),
        ("CPU of the server", found.server_cpu_s / steady_s * 100, "% of a core", None),
        ("CPU of the server per call", found.server_cpu_s / calls * 1e3, "ms", None),
        ("CPU of the generator", sum(played.cpu_s for played in found.played) / steady_s * 100, "% of a core", None),
        ("connections open at most", sum(played.most_open for played in found.played), "connections", None),
        ("memory of the server per worker", (found.bytes_after - found.bytes_before) / count / 1e3, "kB", None),
        ("memory of the server", found.bytes_after / 1e6, "MB", None),
        ("wake call that the server asked idle workers to hold (not played)", hold_s, "s", None),
        ("least interval that the server told idle workers (not followed)", min(p.intervals_s[0] for p in found.played), "s", None),
    ]
    return [Figure(name, value, unit, None, None, target) for name, value, unit, target in rows]


def quantile(values: Sequence[float], part: float) -> float:
    """Return a quantile, 0 of nothing."""
    return sorted(values)[round(part * (len(values) - 1))] if values else 0.0


# ---- all


def waiting_figures(found: Sequence[Waiting]) -> list[Figure]:
    """Return the figures of part 1; ratios are of costs: dispatch at the smallest size by that at this one."""
    figures = []
    for one in found:
        words = f"{one.size} waiting"
        figures.append(Figure(f"{words}: filling arrays", one.fill_rate, "jobs/s", None, None, None))
        figures.append(Figure(f"{words}: single submits", one.submit_rate, "jobs/s", None, None, None))
        for per_call, rate in one.dispatch_rates.items():
            name, least = f"{words}: dispatch, {per_call} per call", found[0].dispatch_rates[per_call]
            first = one is found[0]
            largest = one.size == _SIZES[-1]
            figures.append(
                Figure(
                    name, rate, "jobs/s", None if first else least, None if first else least / rate, 1 / 0.8 if largest else None
                )
            )
        figures.append(Figure(f"{words}: worker's call, p99", one.call_p99_s * 1e3, "ms", None, None, None))
        figures.append(Figure(f"{words}: errors", one.call_errors, "calls", None, None, 0))
    return figures


def main() -> None:
    """Run all and publish."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended, too
    choice, sys.argv[1:] = chosen(sys.argv[1:])
    options = arguments(__doc__)
    steady_s = _QUICK_STEADY_S if options.quick else _STEADY_S
    figures: list[Figure] = []
    if choice.jobs:
        runs = options.runs or (1 if options.quick else _RUNS)
        sizes = _QUICK_SIZES if options.quick else _SIZES
        figures += waiting_figures(
            [measure_waiting(size, choice, runs, min(steady_s, 10.0 if options.quick else 30.0)) for size in sizes]
        )
    if choice.workers:
        count = choice.count or (_QUICK_WORKERS if options.quick else _WORKERS)
        squeeze = choice.squeeze or (_QUICK_SQUEEZE if options.quick else 1.0)
        figures += measure_workers(choice, count, squeeze, steady_s)
    publish("scale-postgresql" if choice.postgresql else "scale", figures, options)


if __name__ == "__main__":
    main()
