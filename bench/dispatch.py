"""No-op jobs from submit to acknowledged result: deskgrid against dask.distributed, parsl, Celery over Redis, and Procrastinate.

deskgrid is a real `deskgrid server` (TLS, SQLite with synchronous=FULL) and two real `deskgrid worker` processes with one slot each, since the yardsticks
have two workers. Every tool runs alone, after the one before has ended. What each yardstick was told is printed with its figures (bench/yardsticks.py):
what its manual recommends for short tasks and what was found fastest here. Each is durable or not as its name says; deskgrid always is.

    warm        an array of no-ops in a warm program, submitted in one call, until the server counts all as completed. The same kind of task
                on both sides: a function in a process that is there already. Aims: twice the best yardstick, ten times the best durable one
    command     sandboxed /bin/true, an array, against /bin/true by parsl, which has no sandbox
    one job     one warm no-op at a time on an idle grid: from the submit call to the answer that it is completed, p50 and p95

Durable: what was acknowledged is there after a power cut. Celery acknowledges a task before it runs it (its default, and its faster way), so its
durable form still loses what a killed worker held; deskgrid and Procrastinate do not.

    --postgresql    deskgrid on PostgreSQL in the place of SQLite
    --only PART     yardsticks or deskgrid alone; the report then has no ratios
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator, Sequence
from pathlib import Path

import msgspec
from msgspec import Struct

sys.path.insert(0, str(Path(__file__).parent))
from report import Figure, arguments, median_of, publish

from deskgrid.client.grid import Grid, join, login
from deskgrid.client.transport import load_credentials, save_credentials
from deskgrid.model import wire
from deskgrid.model.jobs import ArrayState, JobSpec, JobState, Machine, Results
from deskgrid.model.machines import MachineKind
from deskgrid.server.setup import init_server, make_login_link
from deskgrid.settings import ServerSettings
from deskgrid.testing.postgresql import running_postgresql
from deskgrid.units import MIB

_ROOT = Path(__file__).parent.parent
_PYTHON = _ROOT / ".cache" / "bench-yardsticks" / "bin" / "python"
_NAMES = ("dask", "parsl", "celery", "celery-durable", "procrastinate")
_DURABLE = ("celery-durable", "procrastinate")
_RUN_S, _QUICK_RUN_S, _RUNS = 6.0, 1.0, 3
_ALONE, _QUICK_ALONE = 100, 10
_FIRST = 200
_LOOK_S = 0.05
"""Between looks at the array: at most so much is added to what a run took."""
_LIMIT_S = 120.0
_WARM = """
import json, sys
for line in sys.stdin:
    print(json.dumps({"job": json.loads(line)["job"], "exit_code": 0, "value": ""}), flush=True)
"""


class Measured(Struct, frozen=True, kw_only=True):
    """What one yardstick did."""

    name: str
    version: str
    jobs: int
    rates: tuple[float, ...]
    """Jobs per second of each run."""
    settings: str


class Choice(Struct, frozen=True):
    """What is to be run."""

    yardsticks: bool
    deskgrid: bool
    postgresql: bool


def chosen(given: Sequence[str]) -> tuple[Choice, list[str]]:
    """Take the options that only this benchmark has; return the rest, too."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--postgresql", action="store_true")
    parser.add_argument("--only", choices=("yardsticks", "deskgrid"))
    mine, rest = parser.parse_known_args(given)
    return Choice(mine.only != "deskgrid", mine.only != "yardsticks", mine.postgresql), rest


# ---- yardsticks


@contextlib.contextmanager
def running_redis(folder: Path, *, durable: bool) -> Iterator[str]:
    """Run a Redis server on a Unix socket and yield its URL."""
    file = folder / "redis.sock"
    keeping = ["--appendonly", "yes", "--appendfsync", "always"] if durable else ["--appendonly", "no"]
    command = ["redis-server", "--port", "0", "--unixsocket", str(file), "--dir", str(folder), "--save", "", *keeping]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        end = time.monotonic() + _LIMIT_S
        while not _answers(file):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError("redis-server did not start")
            time.sleep(0.05)
        yield f"redis+socket://{file}"
    finally:
        process.terminate()
        process.wait()


def _answers(file: Path) -> bool:
    with socket.socket(socket.AF_UNIX) as client, contextlib.suppress(OSError):
        client.connect(str(file))
        return True
    return False


def run_yardstick(name: str, run_s: float, runs: int) -> Measured:
    """Run one yardstick, with the database that it needs."""
    with contextlib.ExitStack() as stack:
        where = ""
        if name.startswith("celery"):
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deskgrid-bench-")))
            where = stack.enter_context(running_redis(folder, durable=name == "celery-durable"))
        elif name == "procrastinate":
            where = stack.enter_context(running_postgresql()).replace("+psycopg", "")
        command = [str(_PYTHON), str(Path(__file__).parent / "yardsticks.py"), name, str(run_s), str(runs), where]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=False)
    if done.returncode != 0:
        raise SystemExit(f"{name} failed:\n{done.stderr[-3000:]}")
    return msgspec.json.decode(done.stdout.splitlines()[-1], type=Measured)


# ---- deskgrid


class Stage:
    """A grid of real processes."""

    def __init__(self, folder: Path, database: str) -> None:
        self.folder = folder
        self.settings = ServerSettings(database=database)
        self.programs: list[subprocess.Popen[bytes]] = []
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DESKGRID_")},
            "DESKGRID_SERVER_HOME": str(folder / "server"),
            "DESKGRID_SERVER_HUB_LISTEN": "off",
            "DESKGRID_SERVER_DATABASE": database,
            "DESKGRID_WORKER_DRIVERS": "process",
            "DESKGRID_WORKER_CPUS": "1",
            "DESKGRID_WORKER_MEMORY_BYTES": str(1 << 30),
        }

    def start(self, name: str, *command: str) -> subprocess.Popen[bytes]:
        """Start a program of ours; what it says goes to NAME.log."""
        with (self.folder / f"{name}.log").open("wb") as log:
            whole = [sys.executable, "-m", "deskgrid", *command]
            program = subprocess.Popen(whole, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        self.programs.append(program)
        return program

    async def prepare(self) -> None:
        """Start the server and two workers."""
        home = self.folder / "server"
        await init_server(home, self.settings)
        server = self.start("server", "server", "run", "--listen", "127.0.0.1:0", "--json")
        await self._until_said("server", server, '"address"')
        save_credentials(self.folder / "user.json", await login(await make_login_link(home, self.settings, "admin")))
        for name in ("one", "two"):
            async with self.grid() as grid:
                link = await grid.join_link()
            save_credentials(self.folder / name / "credentials.json", await join(link, name))
            self.start(name, "worker", "run", "--home", str(self.folder / name))

    async def _until_said(self, name: str, program: subprocess.Popen[bytes], words: str) -> None:
        end = time.monotonic() + _LIMIT_S
        while words not in (said := (self.folder / f"{name}.log").read_text()):
            if program.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"{name} did not start: {said[-2000:]}")
            await asyncio.sleep(0.05)

    def grid(self) -> Grid:
        """Return the user's view."""
        return Grid(load_credentials(self.folder / "user.json"))

    def close(self) -> None:
        """End all programs, the workers first."""
        for program in reversed(self.programs):
            program.terminate()
            try:
                program.wait(20)
            except subprocess.TimeoutExpired:
                program.kill()
                program.wait()


def warm_spec() -> JobSpec:
    """Return a no-op in a warm program."""
    return _spec(("python3", "-c", _WARM), warm=True)


def command_spec() -> JobSpec:
    """Return a sandboxed /bin/true."""
    return _spec(("/bin/true",), warm=False)


def _spec(command: tuple[str, ...], *, warm: bool) -> JobSpec:
    machine = Machine(kind=MachineKind.PROCESS, warm=warm, memory_bytes=256 * MIB, scratch_bytes=64 * MIB)
    return JobSpec(machine=machine, command=command, results=Results(paths=()))


async def run_array(grid: Grid, spec: JobSpec, count: int) -> float:
    """Return seconds from the submit call until the server says that all have completed."""
    began = time.perf_counter()
    array = await grid.transport.call(wire.SUBMIT_ARRAY, wire.SubmitArray(spec=spec, count=count))
    while array.jobs.get(JobState.COMPLETED, 0) < count:
        if time.perf_counter() - began > _LIMIT_S or array.jobs.get(JobState.FAILED) or array.state is ArrayState.CANCELLED:
            raise RuntimeError(f"the array is {array.state}: {array.jobs} {array.message}")
        await asyncio.sleep(_LOOK_S)
        array = await grid.transport.call(wire.GET_ARRAY, path={"array": array.id})
    return time.perf_counter() - began


async def rates_of(grid: Grid, spec: JobSpec, run_s: float, runs: int) -> tuple[int, list[float]]:
    """Return how many jobs the runs had, found by trying as for the yardsticks, and the rates."""
    await run_array(grid, spec, _FIRST // 10 or 1)  # programs start
    rate = _FIRST / await run_array(grid, spec, _FIRST)
    tried = max(_FIRST, int(rate * min(run_s, 2)))
    rate = tried / await run_array(grid, spec, tried)
    count = max(_FIRST, int(rate * run_s * 1.1))
    return count, [count / await run_array(grid, spec, count) for _ in range(runs)]


async def alone(grid: Grid, count: int, rng: random.Random) -> list[float]:
    """Return seconds from submit to result of single jobs, one after the other; the grid is idle in between."""
    took = []
    for number in range(count + 1):
        began = time.perf_counter()
        job = await grid.submit(warm_spec())
        [detail] = await grid.wait([job.id])
        if detail.job.state is not JobState.COMPLETED:
            raise RuntimeError(f"job {job.id} is {detail.job.state}: {detail.job.message}")
        if number:  # the first starts the program
            took.append(time.perf_counter() - began)
        await asyncio.sleep(rng.uniform(0.05, 0.3))
    return sorted(took)


@contextlib.asynccontextmanager
async def staged(postgresql: bool) -> AsyncIterator[Grid]:
    """Run a grid and yield the user's view of it."""
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="deskgrid-bench-")))
        stage = Stage(folder, stack.enter_context(running_postgresql()) if postgresql else "")
        stack.callback(stage.close)
        await stage.prepare()
        async with stage.grid() as grid:
            yield grid


class Ours(Struct, frozen=True, kw_only=True):
    """What deskgrid did."""

    jobs: int
    warm: float
    command: float
    alone_s: tuple[float, ...]


async def measure_ours(choice: Choice, run_s: float, runs: int, singles: int) -> Ours:
    """Run everything of ours."""
    async with staged(choice.postgresql) as grid:
        count, warm = await rates_of(grid, warm_spec(), run_s, runs)
        print(f"deskgrid, warm: {count} jobs, {_shown(warm)}")
        commands, command = await rates_of(grid, command_spec(), run_s, runs)
        print(f"deskgrid, command: {commands} jobs, {_shown(command)}")
        alone_s = await alone(grid, singles, random.Random(1))
    return Ours(jobs=count, warm=median_of(warm), command=median_of(command), alone_s=tuple(alone_s))


def _shown(rates: Sequence[float]) -> str:
    return ", ".join(f"{rate:.0f}/s" for rate in rates)


# ---- what comes of it


def figures_of(ours: Ours | None, theirs: dict[str, float]) -> list[Figure]:
    """Return the figures: `theirs` are medians in jobs per second by name. Ratios are theirs by ours, so that below 1 is better."""
    figures = [Figure(name, rate, "jobs/s", None, None, None) for name, rate in theirs.items()]
    if ours is None:
        return figures
    rates = {name: theirs[name] for name in _NAMES if name in theirs}
    durable = {name: rates[name] for name in _DURABLE if name in rates}
    best, best_durable = (max(found, key=found.__getitem__, default="") for found in (rates, durable))
    figures += [
        _against(f"warm no-op against the best ({best})", ours.warm, rates.get(best), 0.5),
        _against(f"warm no-op against the best durable ({best_durable})", ours.warm, rates.get(best_durable), 0.1),
        _against("sandboxed /bin/true against parsl's", ours.command, theirs.get("parsl-command"), None),
        Figure("one job on an idle grid, p50", _quantile(ours.alone_s, 0.5) * 1e3, "ms", None, None, None),
        Figure("one job on an idle grid, p95", _quantile(ours.alone_s, 0.95) * 1e3, "ms", None, None, 50.0),
    ]
    return figures


def _against(name: str, rate: float, theirs: float | None, target: float | None) -> Figure:
    if theirs is None:  # a target without its yardstick would be taken for a bound of the rate
        return Figure(name.partition(" against")[0], rate, "jobs/s", None, None, None)
    return Figure(name, rate, "jobs/s", theirs, theirs / rate, target)


def _quantile(ordered: Sequence[float], part: float) -> float:
    return ordered[round(part * (len(ordered) - 1))]


def main() -> None:
    """Run all and publish."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was started is ended, too
    choice, sys.argv[1:] = chosen(sys.argv[1:])
    options = arguments(__doc__)
    run_s = _QUICK_RUN_S if options.quick else _RUN_S
    runs = options.runs or (1 if options.quick else _RUNS)
    theirs: dict[str, float] = {}
    if choice.yardsticks and not _PYTHON.exists():
        raise SystemExit("the tools that we are compared with are missing: tools/setup bench")
    for name in (*_NAMES, "parsl-command") if choice.yardsticks else ():
        found = run_yardstick(name, run_s, runs)
        theirs[name] = median_of(found.rates)
        print(f"{name} {found.version}: {found.jobs} jobs, {_shown(found.rates)}; {found.settings}")
    ours = asyncio.run(measure_ours(choice, run_s, runs, _QUICK_ALONE if options.quick else _ALONE)) if choice.deskgrid else None
    publish("dispatch-postgresql" if choice.postgresql else "dispatch", figures_of(ours, theirs), options)


if __name__ == "__main__":
    main()
