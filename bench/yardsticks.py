"""Runs one of the tools that bench/dispatch.py compares deskgrid with: no-op jobs from submit to acknowledged result.

    python bench/yardsticks.py NAME SECONDS RUNS WHERE      in .cache/bench-yardsticks; prints one JSON object

It knows nothing of deskgrid and is run by the Python of the other tools' environment. Each tool has two workers on this machine and what its manual
recommends for short tasks; _SETTINGS says what that is, and is published with the figures. How many jobs a run has is found by trying, so that it takes
about SECONDS. WHERE is the URL of Redis or PostgreSQL for those that need one.
"""

# mypy: disable-error-code="import-not-found,import-untyped,unused-ignore"

from __future__ import annotations

import asyncio
import contextlib
import importlib.metadata
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

_FIRST = 200
_MOST = 200_000
_WAIT_S = 120.0
_PREFETCH = 64
_CONCURRENCY = 10
_SETTINGS = {
    "dask": "LocalCluster of 2 processes with 1 thread each; no profiling, no work stealing, worker-saturation inf (together 2 to 3 times as fast as without); "
    "map(batch_size=1000, pure=False), one gather",
    "parsl": f"HighThroughputExecutor, 2 workers, prefetch_capacity={_PREFETCH}; no memoization, no monitoring, no log files",
    "parsl-command": f"as parsl; a python_app that runs /bin/true (no shell), prefetch_capacity={_PREFETCH}",
    "celery": f"prefork, concurrency 2, worker_prefetch_multiplier={_PREFETCH}, early acknowledgement, no gossip, mingle, heartbeat or events; "
    "Redis as broker and result backend without persistence; delay, then get of each (faster than a group with join_native)",
    "celery-durable": f"as celery, prefetch {_PREFETCH}; Redis with appendonly and appendfsync always",
    "procrastinate": f"2 worker processes, concurrency {_CONCURRENCY} each (async no-op), batch_defer of 1000; PostgreSQL with its default synchronous_commit; "
    "a job is done when its row says succeeded",
}
_PACKAGES = {"dask": "distributed", "parsl": "parsl", "parsl-command": "parsl", "celery-durable": "celery"}
Submit = Callable[[int], None]


def no_op(number: int = 0) -> int:
    """Do nothing."""
    return number


def run_true(number: int = 0) -> int:
    """Run a command that does nothing."""
    import subprocess

    return subprocess.run(["/bin/true"], check=False).returncode


@contextlib.contextmanager
def dask(_where: str) -> Iterator[Submit]:
    """Dask's scheduler."""
    import dask as tool
    from distributed import Client, LocalCluster

    tool.config.set(
        {
            "distributed.worker.profile.enabled": False,
            "distributed.scheduler.work-stealing": False,
            "distributed.scheduler.worker-saturation": float("inf"),
        }
    )
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):

        def submit(count: int) -> None:
            results = client.gather(client.map(no_op, range(count), pure=False, batch_size=1000))
            require(results == list(range(count)))

        yield submit


@contextlib.contextmanager
def parsl(_where: str, function: Callable[[int], int] = no_op) -> Iterator[Submit]:
    """Parsl's executor for clusters."""
    import parsl as tool
    from parsl.config import Config
    from parsl.executors import HighThroughputExecutor
    from parsl.providers import LocalProvider

    executor = HighThroughputExecutor(
        label="bench",
        address="127.0.0.1",
        max_workers_per_node=2,
        prefetch_capacity=_PREFETCH,
        worker_debug=False,
        provider=LocalProvider(init_blocks=1, max_blocks=1),
    )
    with tool.load(Config(executors=[executor], strategy="none", initialize_logging=False, usage_tracking=0)):
        app = tool.python_app(function)

        def submit(count: int) -> None:
            results = [future.result() for future in [app(number) for number in range(count)]]
            require(results == (list(range(count)) if function is no_op else [0] * count))

        yield submit


def parsl_command(where: str) -> Any:
    """Parsl, running a command."""
    return parsl(where, run_true)


_CELERY = """
import os
from celery import Celery
app = Celery("bench", broker=os.environ["BENCH_WHERE"], backend=os.environ["BENCH_WHERE"])
app.conf.update(worker_prefetch_multiplier=%d, worker_send_task_events=False, task_send_sent_event=False, task_store_errors_even_if_ignored=True,
                broker_connection_retry_on_startup=True, worker_hijack_root_logger=False, task_acks_late=False)
@app.task(name="no_op")
def no_op(number=0):
    return number
"""


@contextlib.contextmanager
def celery(where: str) -> Iterator[Submit]:
    """Celery over Redis."""
    folder = Path.cwd()
    (folder / "bench_celery.py").write_text(_CELERY % _PREFETCH)
    os.environ["BENCH_WHERE"] = where
    sys.path.insert(0, str(folder))
    from bench_celery import app, no_op  # type: ignore[import-not-found]

    quiet = ["--without-gossip", "--without-mingle", "--without-heartbeat", "--loglevel", "ERROR"]
    command = [sys.executable, "-m", "celery", "-A", "bench_celery", "worker", "--pool", "prefork", "--concurrency", "2", *quiet]
    with running(command):
        app.control.purge()
        no_op.delay(0).get(timeout=_WAIT_S)

        def submit(count: int) -> None:
            handles = [no_op.delay(number) for number in range(count)]  # a group with join_native is half as fast
            require([handle.get(timeout=_WAIT_S) for handle in handles] == list(range(count)))
            for handle in handles:
                handle.forget()

        yield submit


_PROCRASTINATE = """
import os
import procrastinate
app = procrastinate.App(connector=procrastinate.PsycopgConnector(conninfo=os.environ["BENCH_WHERE"]))
@app.task(name="no_op")
async def no_op(number):
    return number
"""
_PROCRASTINATE_WORKER = """
import asyncio, logging
from bench_procrastinate import app
logging.disable(logging.CRITICAL)
async def main():
    async with app.open_async():
        await app.run_worker_async(concurrency=%d, install_signal_handlers=True)
asyncio.run(main())
"""


@contextlib.contextmanager
def procrastinate(where: str) -> Iterator[Submit]:
    """Procrastinate over PostgreSQL."""
    folder = Path.cwd()
    (folder / "bench_procrastinate.py").write_text(_PROCRASTINATE)
    (folder / "bench_procrastinate_worker.py").write_text(_PROCRASTINATE_WORKER % _CONCURRENCY)
    os.environ["BENCH_WHERE"] = where
    sys.path.insert(0, str(folder))
    from bench_procrastinate import app, no_op  # type: ignore[import-not-found]

    async def prepare() -> None:
        async with app.open_async():
            await app.schema_manager.apply_schema_async()

    async def deferred(count: int) -> None:
        async with app.open_async():
            before = await succeeded()
            for first in range(0, count, 1000):
                await no_op.batch_defer_async(*({"number": number} for number in range(first, min(first + 1000, count))))
            end = time.monotonic() + _WAIT_S
            while await succeeded() < before + count:
                require(time.monotonic() < end)
                await asyncio.sleep(0.01)

    async def succeeded() -> int:
        row = await app.connector.execute_query_one_async(
            "SELECT count(*) AS done FROM procrastinate_jobs WHERE status = 'succeeded'"
        )
        return int(row["done"])

    asyncio.run(prepare())
    command = [sys.executable, str(folder / "bench_procrastinate_worker.py")]
    with running(command), running(command):
        yield lambda count: asyncio.run(deferred(count))


@contextlib.contextmanager
def running(command: list[str]) -> Iterator[None]:
    """Run a worker in a process group of its own, which ends with it."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=sys.stderr, start_new_session=True)
    try:
        yield
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def require(is_so: bool) -> None:
    """Raise RuntimeError if a result is wrong, so that no figure comes of it."""
    if not is_so:
        raise RuntimeError("not all jobs came back with the right result")


def timed(submit: Submit, count: int) -> float:
    """Return jobs per second."""
    began = time.perf_counter()
    submit(count)
    return count / (time.perf_counter() - began)


def measure(submit: Submit, seconds: float, runs: int) -> tuple[int, list[float]]:
    """Return how many jobs the runs had, and the rates."""
    rate = timed(submit, _FIRST)  # what is loaded and connected once is not counted
    rate = timed(submit, min(_MOST, max(_FIRST, int(rate * min(seconds, 2)))))
    count = min(_MOST, max(_FIRST, int(rate * seconds * 1.1)))
    return count, [timed(submit, count) for _ in range(runs)]


TOOLS: dict[str, Callable[[str], Any]] = {
    "dask": dask,
    "parsl": parsl,
    "parsl-command": parsl_command,
    "celery": celery,
    "celery-durable": celery,
    "procrastinate": procrastinate,
}


def main() -> None:
    """Run the tool that is named."""
    name, seconds, runs, where = sys.argv[1], float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    with tempfile.TemporaryDirectory(prefix="deskgrid-bench-") as folder:
        os.chdir(folder)  # they leave files
        os.environ["PATH"] = f"{Path(sys.executable).parent}:{os.environ['PATH']}"  # parsl looks for its programs there
        with TOOLS[name](where) as submit:
            count, rates = measure(submit, seconds, runs)
        os.chdir("/")
    version = importlib.metadata.version(_PACKAGES.get(name, name))
    print(json.dumps({"name": name, "version": version, "jobs": count, "rates": rates, "settings": _SETTINGS[name]}))


if __name__ == "__main__":
    main()
