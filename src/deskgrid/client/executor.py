"""Python functions as jobs of the grid, as concurrent.futures has it: `joblib` and Dask work with it, too.

    with grid.executor(need=["root"], memory="1GiB") as executor:
        futures = [executor.submit(analyse, name) for name in names]

What is submitted within a moment of each other becomes one array. Functions and arguments travel as cloudpickle packs them, so the PCs need Python of
the same version, and nothing else. Jobs are processes; with `disk`, virtual machines whose disk has a Python. Answers: see calls.py.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import itertools
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from deskgrid.client.calls import ANSWER, CallFailed, Packed, of_module, pack_call, read_answer, write_calls
from deskgrid.client.jobfile import as_written, read_job
from deskgrid.errors import DeskgridError, InvalidInput
from deskgrid.model.ids import ArrayId
from deskgrid.model.jobs import Array, JobState, Results

if TYPE_CHECKING:
    from deskgrid.client.blocking import Grid

__all__ = ["GridExecutor"]

T = TypeVar("T")
_GATHER_S = 0.05
_MOST_CALLS = 10_000
"""In one array."""
_LOOK_GAP_S = 0.2
_Waiting = tuple["concurrent.futures.Future[Any]", Packed]


class GridExecutor(concurrent.futures.Executor):
    """See concurrent.futures.Executor. A call that has been submitted is cancelled only with all others, by `shutdown`."""

    def __init__(
        self,
        grid: Grid,
        *,
        trust: Sequence[str] = (),
        modules: Sequence[ModuleType] = (),
        python: str = "python3",
        **options: Any,
    ) -> None:
        """`options` are keys of a job file. `trust`: whose PCs they may run on; then answers may hold anything. `modules`: of the user's own, that
        functions need. Raise InvalidInput."""
        self._grid = grid
        options = {"kind": "vm" if "disk" in options else "process", "name": "calls", **options, "trust": tuple(trust)}
        command = (python, "/context/run.py", "{index}")
        self._spec = read_job(None, as_written({**options, "command": command})).spec
        self._spec = msgspec.structs.replace(self._spec, results=Results(paths=(ANSWER,)))
        self._modules = tuple(modules)
        self._trusted = bool(trust) and "everyone" not in trust
        self._lock = threading.Lock()
        self._pending: list[_Waiting] = []
        self._arrays: set[concurrent.futures.Future[None]] = set()
        self._closed = False

    def submit(self, function: Callable[..., T], /, *arguments: Any, **keywords: Any) -> concurrent.futures.Future[T]:
        """See Executor.submit. Raise InvalidInput for what cannot be packed."""
        packed = pack_call(function, arguments, keywords, self._modules)
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            self._pending.append((future, packed))
            if len(self._pending) == 1:
                self._arrays.add(self._grid.begin(self._send()))
        return future

    def map(
        self, function: Callable[..., T], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[T]:
        """See Executor.map; `chunksize` calls are one job."""
        if chunksize < 1:
            raise InvalidInput("a chunk has one call at least", where="chunksize")
        if chunksize == 1:
            return super().map(function, *iterables, timeout=timeout)
        items = zip(*iterables, strict=False)
        chunks = iter(lambda: list(itertools.islice(items, chunksize)), [])
        found = super().map(_of_each(function), chunks, timeout=timeout)
        return itertools.chain.from_iterable(found)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """See Executor.shutdown. `cancel_futures` cancels what runs, too. Idempotent."""
        with self._lock:
            self._closed = True
            arrays = set(self._arrays)
            if cancel_futures:
                for future, _ in self._pending:
                    future.cancel()
        if cancel_futures:
            for one in arrays:
                one.cancel()
        if wait:
            concurrent.futures.wait(arrays)

    # ---- in the grid's loop

    async def _send(self) -> None:
        """Submit what has gathered, and stay until all of it is answered."""
        await asyncio.sleep(_GATHER_S)
        with self._lock:
            pending, self._pending = self._pending[:_MOST_CALLS], self._pending[_MOST_CALLS:]
            if self._pending:
                self._arrays.add(self._grid.begin(self._send()))
        calls = [(future, packed) for future, packed in pending if future.set_running_or_notify_cancel()]
        if not calls:
            return
        futures = dict(enumerate(future for future, _ in calls))
        try:
            await self._run([packed for _, packed in calls], futures)
        except BaseException as error:
            why = error if isinstance(error, Exception) else CallFailed("the executor was shut down")
            for future in futures.values():
                future.set_exception(why)
            if not isinstance(error, Exception):
                raise

    async def _run(self, calls: Sequence[Packed], futures: dict[int, concurrent.futures.Future[Any]]) -> None:
        with tempfile.TemporaryDirectory(prefix="deskgrid-") as place:
            context, answers = Path(place) / "context", Path(place) / "answers"
            context.mkdir()
            await asyncio.to_thread(write_calls, context, calls)
            array = await self._grid.asynchronous.submit_array(self._spec, count=len(calls), context=context)
            try:
                await self._collect(array.id, answers, futures)
            except BaseException:
                await asyncio.shield(self._drop(array.id, cancel=True))
                raise
            await self._drop(array.id)

    async def _collect(self, array_id: ArrayId, answers: Path, futures: dict[int, concurrent.futures.Future[Any]]) -> None:
        """Give each future its answer when its job has ended."""
        grid, seen = self._grid.asynchronous, (0, 0)
        async for array in grid.array_changes(array_id):
            counts = _ended(array)
            if counts[0] > seen[0]:
                await grid.array_results(array_id, answers)
                for number in [number for number in futures if (answers / str(number) / ANSWER).exists()]:
                    self._answer(futures.pop(number), answers / str(number) / ANSWER)
            if counts[1] > seen[1]:
                for state in (JobState.FAILED, JobState.CANCELLED):
                    async for job in grid.jobs_of(array_id, state=state):
                        if (future := futures.pop(job.index, None)) is not None:
                            future.set_exception(CallFailed(f"job {job.id}: {job.message or state.value}"))
            seen = counts
            await asyncio.sleep(_LOOK_GAP_S)
        for future in futures.values():
            future.set_exception(CallFailed("its job left no answer"))
        futures.clear()

    def _answer(self, future: concurrent.futures.Future[Any], file: Path) -> None:
        try:
            future.set_result(read_answer(file, trusted=self._trusted))
        except Exception as error:
            future.set_exception(error)

    async def _drop(self, array_id: ArrayId, *, cancel: bool = False) -> None:
        """Remove an array whose answers are here, or are not wanted any more."""
        grid = self._grid.asynchronous
        with contextlib.suppress(DeskgridError):  # it stays for a while, as any array does
            await (grid.cancel_array(array_id) if cancel else grid.remove_array(array_id))


def _ended(array: Array) -> tuple[int, int]:
    """Return how many jobs have completed, and how many have ended otherwise."""
    failed = array.jobs.get(JobState.FAILED, 0) + array.jobs.get(JobState.CANCELLED, 0)
    return array.jobs.get(JobState.COMPLETED, 0), failed


def _of_each(function: Callable[..., T]) -> Callable[[Sequence[tuple[Any, ...]]], list[T]]:
    def call(items: Sequence[tuple[Any, ...]]) -> list[T]:  # not a function of this module, which PCs do not have
        return [function(*one) for one in items]

    return of_module(call, function)
