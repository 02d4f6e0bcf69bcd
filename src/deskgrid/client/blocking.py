"""The SDK for programs without an event loop, and for notebooks: every call returns when it is done.

    from deskgrid import Grid

    with Grid() as grid:                                  # as `deskgrid login` left it
        job = grid.submit("job.toml")
        job.wait()
        job.results("out")
        squares = grid.map(square, range(100), memory="1GiB")

What it does is done by client/grid.py, in an event loop of its own thread, so that it works where a loop runs already.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import html
import threading
import time
import weakref
from collections.abc import Callable, Coroutine, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from deskgrid.client import grid as grid_module
from deskgrid.client.connecting import connected_to, open_login
from deskgrid.client.jobfile import as_written, read_job
from deskgrid.client.submitting import submit_file
from deskgrid.client.transport import Credentials
from deskgrid.core.lifecycle import FINAL_JOB_STATES
from deskgrid.errors import InvalidInput
from deskgrid.model import jobs as model
from deskgrid.model import wire
from deskgrid.model.data import Data, DataKind, Visibility
from deskgrid.model.ids import ArrayId, JobId
from deskgrid.model.jobs import ArrayState, JobState

if TYPE_CHECKING:
    from deskgrid.client.executor import GridExecutor

__all__ = ["Array", "Grid", "Job", "Jobs"]

T = TypeVar("T")


class _Loop:
    """An event loop in a thread."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="deskgrid", daemon=True)
        self._thread.start()

    def begin(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Let a coroutine run."""
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Return what a coroutine returns. Raise TimeoutError, having cancelled it, after `timeout` seconds."""
        if threading.current_thread() is self._thread:
            work.close()
            raise RuntimeError("this is the grid's own thread: a callback of it waits for nothing")
        future = self.begin(work)
        try:
            return future.result(timeout)
        except BaseException:
            future.cancel()
            raise

    def close(self) -> None:
        self.run(self._cancel_all())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    async def _cancel_all(self) -> None:
        """Let whoever waits in another thread hear that it is over."""
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Job:
    """A job of the grid. What it says of itself is as of the last call to the server: `refresh`, `wait`."""

    def __init__(self, grid: Grid, detail: wire.JobDetail) -> None:
        self._grid = grid
        self.detail = detail
        """The job and its attempts."""

    @property
    def id(self) -> JobId:
        return self.detail.job.id

    @property
    def name(self) -> str:
        return self.detail.job.spec.name

    @property
    def state(self) -> JobState:
        return self.detail.job.state

    @property
    def ended(self) -> bool:
        return self.state in FINAL_JOB_STATES

    @property
    def exit_code(self) -> int | None:
        return self.detail.job.exit_code

    @property
    def message(self) -> str:
        """Why it failed or was cancelled."""
        return self.detail.job.message

    def refresh(self) -> Job:
        """Ask the server how it stands; return the job."""
        self.detail = self._grid.run(self._grid.asynchronous.job(self.id))
        return self

    def wait(self, timeout: float | None = None) -> Job:
        """Return the job once it has ended, however. Raise TimeoutError after `timeout` seconds."""
        [self.detail] = self._grid.run(self._grid.asynchronous.wait([self.id]), timeout)
        return self

    def results(self, folder: str | Path) -> Path:
        """Fetch its results into a folder, which is made; return that. Raise Conflict if it has none."""
        self._grid.run(self._grid.asynchronous.results(self.id, Path(folder)))
        return Path(folder)

    def output(self, stream: str = "stdout") -> str:
        """Return what it printed, or with `stderr` what went there: of its last attempt, as far as the server keeps it."""
        return self._grid.run(self._grid.read_all(self.id, stream))

    def cancel(self) -> Job:
        """Let it not run any more; return the job. One that has ended stays as it is."""
        self._grid.run(self._grid.asynchronous.cancel(self.id))
        return self.refresh()

    def __repr__(self) -> str:
        return f"<job-{self.id} {self.name}: {self.state.value}{f', exit code {self.exit_code}' if self.exit_code is not None else ''}>"

    def _repr_html_(self) -> str:
        return Jobs([self])._repr_html_()


class Jobs(list[Job]):
    """Jobs; a notebook shows them as a table."""

    def _repr_html_(self) -> str:
        rows = ((f"job-{one.id}", one.name, one.state.value, one.exit_code, one.message) for one in self)
        return _table(("job", "name", "state", "exit code", "message"), rows)


class Array:
    """Many jobs of one spec."""

    def __init__(self, grid: Grid, found: model.Array) -> None:
        self._grid = grid
        self.found = found

    @property
    def id(self) -> ArrayId:
        return self.found.id

    @property
    def state(self) -> ArrayState:
        return self.found.state

    @property
    def counts(self) -> dict[JobState, int]:
        """How many of its jobs are in which state."""
        return self.found.jobs

    def refresh(self) -> Array:
        """Ask the server how it stands; return the array."""
        self.found = self._grid.run(self._grid.asynchronous.array(self.id))
        return self

    def wait(self, timeout: float | None = None) -> Array:
        """Return the array once all its jobs have ended. Raise TimeoutError after `timeout` seconds."""
        self.found = self._grid.run(self._grid.asynchronous.wait_array(self.id), timeout)
        return self

    def results(self, folder: str | Path) -> Path:
        """Fetch what there is of its results, a folder a job, named by index; what is there already is left alone."""
        self._grid.run(self._grid.asynchronous.array_results(self.id, Path(folder)))
        return Path(folder)

    def cancel(self) -> Array:
        """Let no job of it run any more; return the array."""
        self.found = self._grid.run(self._grid.asynchronous.cancel_array(self.id))
        return self

    def __repr__(self) -> str:
        counts = ", ".join(f"{number} {state.value}" for state, number in self.counts.items() if number)
        return f"<array-{self.id} {self.found.spec.name}: {self.state.value}, {counts}>"

    def _repr_html_(self) -> str:
        return _table(
            ("array", "name", "state", *(state.value for state in self.counts)),
            [(f"array-{self.id}", self.found.spec.name, self.state.value, *self.counts.values())],
        )


class Grid:
    """A user's view of one grid. Use as a context manager, or `close` it; all methods raise DeskgridError."""

    def __init__(self, credentials: Credentials | None = None) -> None:
        """Without credentials: those that `deskgrid login` left, with the token in $DESKGRID_TOKEN if there is one."""
        self._loop: _Loop | None = _Loop()
        try:
            self.asynchronous = grid_module.Grid(credentials if credentials is not None else open_login())
            """The same with coroutines, and all that is not here. Use it in this grid's loop: `run`."""
            self._executors: weakref.WeakSet[GridExecutor] = weakref.WeakSet()
            self.run(self.asynchronous.__aenter__())
        except BaseException:
            self._loop.close()
            self._loop = None
            raise

    def __enter__(self) -> Grid:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End. Jobs go on. Idempotent."""
        if self._loop is None:
            return
        for executor in list(self._executors):
            executor.shutdown(cancel_futures=True)
        self.run(self.asynchronous.__aexit__(None, None, None))
        self._loop.close()
        self._loop = None

    def run(self, work: Coroutine[Any, Any, T], timeout: float | None = None) -> T:
        """Return what a coroutine returns, run in this grid's loop. Raise TimeoutError after `timeout` seconds."""
        return self._open(work).run(work, timeout)

    def begin(self, work: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Let a coroutine run in this grid's loop."""
        return self._open(work).begin(work)

    def _open(self, work: Coroutine[Any, Any, Any]) -> _Loop:
        if self._loop is None:
            work.close()
            raise InvalidInput("this grid is closed", hint="use it inside its with block")
        return self._loop

    # Jobs

    def submit(self, file: str | Path | None = None, **options: Any) -> Job | Array:
        """Submit a job file, or a job made of options, which win over the file; return the job, or the array.

        Options are the keys of a job file without sections: `command=["python3", "x.py"]`, `kind="process"`, `memory="1GiB"`,
        `data={"f": "events"}`, `array=20`. Raise InvalidInput naming the key.
        """
        wanted = read_job(Path(file) if file is not None else None, as_written(options))
        found = self.run(submit_file(self.asynchronous, wanted))
        if isinstance(found, model.Array):
            return Array(self, found)
        return self.job(found.id)

    def job(self, job_id: int) -> Job:
        """Return a job by its number. Raise NotFound."""
        return Job(self, self.run(self.asynchronous.job(JobId(job_id))))

    def array(self, array_id: int) -> Array:
        """Return an array by its number. Raise NotFound."""
        return Array(self, self.run(self.asynchronous.array(ArrayId(array_id))))

    def jobs(self, *, state: JobState | None = None, limit: int = 20) -> Jobs:
        """Return the newest jobs of one's own."""
        page = self.run(self.asynchronous.jobs(state=state, limit=limit))
        return Jobs([Job(self, wire.JobDetail(job=one, attempts=())) for one in page.jobs])

    def wait(self, jobs: Iterable[Job], timeout: float | None = None, *, progress: bool = False) -> Jobs:
        """Return the jobs once all have ended. Raise TimeoutError after `timeout` seconds. `progress`: show a bar."""
        wanted = list(jobs)
        with _bar(len(wanted), "jobs") if progress else contextlib.nullcontext(lambda: None) as tick:
            for _ in self.as_completed(wanted, timeout):
                tick()
        return Jobs(wanted)

    def as_completed(self, jobs: Iterable[Job], timeout: float | None = None) -> Iterator[Job]:
        """Yield jobs as they end. Raise TimeoutError after `timeout` seconds."""
        by_id: dict[JobId, list[Job]] = {}
        for job in jobs:
            by_id.setdefault(job.id, []).append(job)
        ended = self.asynchronous.as_completed(by_id)

        async def next_one() -> wire.JobDetail | None:
            return await anext(ended, None)

        until = None if timeout is None else time.monotonic() + timeout
        try:
            while (detail := self.run(next_one(), None if until is None else until - time.monotonic())) is not None:
                for job in by_id[detail.job.id]:
                    job.detail = detail
                    yield job
        finally:
            self.run(ended.aclose())

    # Functions

    def executor(self, *, trust: Sequence[str] = (), **options: Any) -> GridExecutor:
        """Return an executor of Python functions as jobs; see client/executor.py."""
        from deskgrid.client.executor import GridExecutor

        made = GridExecutor(self, trust=trust, **options)
        self._executors.add(made)
        return made

    def map(
        self,
        function: Callable[..., T],
        *iterables: Iterable[Any],
        chunksize: int = 1,
        timeout: float | None = None,
        trust: Sequence[str] = (),
        **options: Any,
    ) -> list[T]:
        """Call a function with each of the items, as jobs with these options, `chunksize` calls a job; return what it returned, in order."""
        executor = self.executor(trust=trust, **options)
        try:
            found = list(executor.map(function, *iterables, timeout=timeout, chunksize=chunksize))
        except BaseException:  # one failed, or that took too long: the others are not waited for
            executor.shutdown(cancel_futures=True)
            raise
        executor.shutdown()
        return found

    # Data

    def put(
        self, file: str | Path, name: str = "", *, kind: DataKind = DataKind.FILE, visibility: Visibility = Visibility.PRIVATE
    ) -> Data:
        """Upload a file as data of the grid, by default under its own name."""
        path = Path(file)
        return self.run(self.asynchronous.put(path, name or path.name, kind=kind, visibility=visibility))

    def get(self, reference: str, file: str | Path) -> Path:
        """Fetch data into a file."""
        self.run(self.asynchronous.get(reference, Path(file)))
        return Path(file)

    # Services

    @contextmanager
    def connect(self, service: str, *, wait_s: float = 300.0) -> Iterator[tuple[str, int]]:
        """Let a service be reached at the address that is yielded, while the block lasts: `web.job-42`, `web.user-ann`."""
        ready: concurrent.futures.Future[tuple[str, int]] = concurrent.futures.Future()

        async def carry() -> None:
            async with connected_to(self.asynchronous, service, wait_s=wait_s) as address:
                ready.set_result(address)
                await asyncio.Event().wait()

        carrying = self.begin(carry())
        carrying.add_done_callback(lambda done: _pass_on(done, ready))
        try:
            yield ready.result()
        finally:
            carrying.cancel()
            with contextlib.suppress(concurrent.futures.CancelledError):
                concurrent.futures.wait([carrying])

    # Bits

    async def read_all(self, job_id: JobId, stream: str) -> str:
        """Return all that is kept of a stream of a job's last attempt."""
        kept, at, number = bytearray(), 0, None
        while True:
            chunk = await self.asynchronous.read_log(job_id, stream=stream, offset=at, attempt=number)
            if not chunk.data:
                return kept.decode(errors="replace")
            kept += chunk.data
            at, number = chunk.offset + len(chunk.data), chunk.number

    def __repr__(self) -> str:
        return f"<grid at {self.asynchronous.transport.credentials.address}>"


def _pass_on(done: concurrent.futures.Future[None], ready: concurrent.futures.Future[tuple[str, int]]) -> None:
    """Let who waits for an address hear why none comes."""
    if done.cancelled():  # the grid was closed
        ready.cancel()
    elif not ready.done() and (error := done.exception()) is not None:
        ready.set_exception(error)


@contextmanager
def _bar(total: int, what: str) -> Iterator[Callable[[], None]]:
    from rich.progress import Progress

    with Progress() as bars:
        bar = bars.add_task(what, total=total)
        yield lambda: bars.advance(bar)


def _table(heads: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    def row(cells: Sequence[Any], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape('' if cell is None else str(cell))}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{row(heads, 'th')}{''.join(row(cells, 'td') for cells in rows)}</table>"
