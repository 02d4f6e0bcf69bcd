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
import functools
import itertools
import secrets
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from deskgrid.archive import UnpackLimits, printable
from deskgrid.client.calls import ANSWER, CallFailed, Packed, of_module, pack_call, read_answer, write_calls
from deskgrid.client.jobfile import as_written, read_job
from deskgrid.client.patience import patiently
from deskgrid.errors import DeskgridError, InvalidInput
from deskgrid.model import wire
from deskgrid.model.ids import ArrayId
from deskgrid.model.jobs import Array, Job, JobSpec, JobState, Results

if TYPE_CHECKING:
    from deskgrid.client.blocking import Grid
    from deskgrid.client.grid import Grid as AsyncGrid

__all__ = ["GridExecutor"]

T = TypeVar("T")
_GATHER_S = 0.05
_MOST_CALLS = 10_000
"""In one array."""
_LOOK_GAP_S = 0.2
_GOODBYE_S = 20.0
"""For which the server is waited for when jobs are to be cancelled."""
_LISTED_PER_S = 5000.0
"""Of an array's jobs that have ended: all are looked through for those that are new."""
_FETCHED_AT_ONCE = 4
_ANSWERING = "deskgrid-answers"
_LIMITS = UnpackLimits(files=10, bytes=1 << 29, apparent_bytes=1 << 29)
_NO_OPTIONS = {"array", "command", "context", "fill", "paths", "secret", "table", "warm"}
_Waiting = tuple["concurrent.futures.Future[Any]", Packed]


class GridExecutor(concurrent.futures.Executor):
    """See concurrent.futures.Executor. A call that has been submitted is cancelled only with all others, by `shutdown`."""

    _max_workers = 1000  # what Dask takes for the number of tasks that it may submit at the same time

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
        if wrong := _NO_OPTIONS & options.keys():
            raise InvalidInput(f"{min(wrong)} is the executor's own matter", where=min(wrong))
        self._grid = grid
        options = {"kind": "vm" if "disk" in options else "process", "name": "calls", **options, "trust": tuple(trust)}
        command = (python, "/context/run.py", "{index}")
        spec = read_job(None, as_written({**options, "command": command})).spec
        self._spec = msgspec.structs.replace(spec, results=Results(paths=(ANSWER,)))
        self._modules = tuple(modules)
        self._functions: dict[bytes, bytes] = {}
        """Of calls that wait to be sent: each once in memory, however many calls there are."""
        self._trusted = bool(trust) and "everyone" not in trust
        self._lock = threading.Lock()
        self._pending: list[_Waiting] = []
        self._arrays: set[concurrent.futures.Future[None]] = set()
        self._closed = False
        self._answering = ThreadPoolExecutor(_FETCHED_AT_ONCE, thread_name_prefix=_ANSWERING)

    def submit(self, function: Callable[..., T], /, *arguments: Any, **keywords: Any) -> concurrent.futures.Future[T]:
        """See Executor.submit. Raise InvalidInput for what cannot be packed."""
        packed = pack_call(function, arguments, keywords, self._modules)
        future: concurrent.futures.Future[T] = concurrent.futures.Future()
        with self._lock:
            if self._closed:
                raise RuntimeError("cannot schedule new futures after shutdown")
            packed.function = self._functions.setdefault(packed.function, packed.function)
            self._pending.append((future, packed))
            begins = len(self._pending) == 1
        if begins:
            self._begin()
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
            dropped: list[_Waiting] = []
            if cancel_futures:
                dropped, self._pending = self._pending, []
        for future, _ in dropped:
            if future.cancel():
                future.set_running_or_notify_cancel()
        if cancel_futures:
            for one in arrays:
                one.cancel()
        while wait and arrays:
            concurrent.futures.wait(arrays)
            with self._lock:
                arrays = {one for one in self._arrays if not one.done()}
        if wait:
            self._answering.shutdown(wait=threading.current_thread().name.partition("_")[0] != _ANSWERING)

    def _begin(self) -> None:
        sending = self._grid.begin(self._send())
        with self._lock:
            self._arrays.add(sending)
        sending.add_done_callback(self._forget)

    def _forget(self, sent: concurrent.futures.Future[None]) -> None:
        with self._lock:
            self._arrays.discard(sent)

    async def _send(self) -> None:
        """Submit what has gathered, in the grid's loop, and stay until all of it is answered."""
        await asyncio.sleep(_GATHER_S)
        with self._lock:
            pending, self._pending = self._pending[:_MOST_CALLS], self._pending[_MOST_CALLS:]
            self._functions.clear()
            is_more = bool(self._pending)
        if is_more:
            self._begin()
        calls = [(future, packed) for future, packed in pending if future.set_running_or_notify_cancel()]
        if calls:
            await _Batch(self._grid.asynchronous, self._spec, self._answering, calls, trusted=self._trusted).run()


class _Batch:
    """The calls of one array. Futures are answered in threads of their own: what waits for them may use the grid."""

    def __init__(
        self, grid: AsyncGrid, spec: JobSpec, answering: ThreadPoolExecutor, calls: Sequence[_Waiting], *, trusted: bool
    ) -> None:
        self._grid, self._spec, self._answering, self._trusted = grid, spec, answering, trusted
        self._calls = [packed for _, packed in calls]
        self._futures = dict(enumerate(future for future, _ in calls))
        """Of jobs that have not ended, as far as is known."""
        self._places = asyncio.Semaphore(_FETCHED_AT_ONCE)

    async def run(self) -> None:
        """Submit the calls and answer all futures, whatever happens."""
        why: BaseException = CallFailed("its job left no answer")
        try:
            with tempfile.TemporaryDirectory(prefix="deskgrid-") as place:
                await self._run(Path(place))
        except asyncio.CancelledError:
            why = CallFailed("the executor was shut down")
            raise
        except Exception as error:
            why = error
        finally:
            for future in self._futures.values():
                self._answer(future, None, why)

    async def _run(self, place: Path) -> None:
        context, answers = place / "context", place / "answers"
        context.mkdir()
        answers.mkdir()
        await asyncio.to_thread(functools.partial(write_calls, context, self._calls, trusted=self._trusted))
        submitting = asyncio.ensure_future(self._submit(context))
        try:
            array_id = (await asyncio.shield(submitting)).id
            await self._collect(array_id, answers)
        except BaseException:
            # Also if that came while the server was about to take it: nobody would wait for those jobs.
            with contextlib.suppress(DeskgridError, TimeoutError):
                async with asyncio.timeout(_GOODBYE_S):
                    await self._grid.cancel_array((await submitting).id)
            raise
        with contextlib.suppress(DeskgridError):  # it stays for a while, as any array does
            await self._grid.remove_array(array_id)

    async def _submit(self, context: Path) -> Array:
        key = secrets.token_hex(16)  # one array, however often it is asked for
        blob = await patiently(lambda: self._grid.send_folder(context))
        request = wire.SubmitArray(spec=self._spec, count=len(self._calls), context=blob)
        return await patiently(lambda: self._grid.transport.call(wire.SUBMIT_ARRAY, request, key=key))

    async def _collect(self, array_id: ArrayId, answers: Path) -> None:
        """Answer each future when its job has ended, until the array has."""

        async def watch() -> None:
            async for array in self._grid.array_changes(array_id):
                done = await self._look(array, answers)
                await asyncio.sleep(max(_LOOK_GAP_S, done / _LISTED_PER_S))

        await patiently(watch)

    async def _look(self, array: Array, answers: Path) -> int:
        """Answer the futures of jobs that have ended since the last look; return how many have ended in all."""
        ended = [state for state in (JobState.COMPLETED, JobState.FAILED, JobState.CANCELLED) if array.jobs.get(state)]
        done = sum(array.jobs[state] for state in ended)
        if len(self._futures) > array.count - done:
            jobs = [job for state in ended async for job in self._grid.jobs_of(array.id, state=state) if job.index in self._futures]
            await asyncio.gather(*(self._finish(job, self._futures.pop(job.index), answers / str(job.index)) for job in jobs))
        return done

    async def _finish(self, job: Job, future: concurrent.futures.Future[Any], place: Path) -> None:
        """Fetch the answer of a job and give it to its future; what is wrong with it is that call's alone."""
        value: Any = None
        error: BaseException | None = CallFailed("the executor was shut down")
        try:
            if job.state is not JobState.COMPLETED:
                raise CallFailed(f"job {job.id}: {printable(job.message) or job.state.value}")
            async with self._places:
                await patiently(lambda: self._grid.results_of(job, place, limits=_LIMITS))
                reading = functools.partial(_outcome, place, trusted=self._trusted)
                value, error = await asyncio.get_running_loop().run_in_executor(self._answering, reading)
        except Exception as wrong:
            error = wrong
        finally:
            self._answer(future, value, error)

    def _answer(self, future: concurrent.futures.Future[Any], value: Any, error: BaseException | None) -> None:
        def answer() -> None:
            with contextlib.suppress(concurrent.futures.InvalidStateError):
                future.set_result(value) if error is None else future.set_exception(error)

        try:
            self._answering.submit(answer)
        except RuntimeError:  # the executor is shut down, and nobody is to wait for this for ever
            answer()


def _outcome(place: Path, *, trusted: bool) -> tuple[Any, BaseException | None]:
    """Return what a call returned or raised, and remove its files. Nothing is raised here: a StopIteration would be lost on its way."""
    try:
        if not (place / ANSWER).is_file():
            return None, CallFailed("its job left no answer")
        return read_answer(place / ANSWER, trusted=trusted), None
    except BaseException as error:
        return None, error
    finally:
        shutil.rmtree(place, ignore_errors=True)


def _of_each(function: Callable[..., T]) -> Callable[[Sequence[tuple[Any, ...]]], list[T]]:
    def call(items: Sequence[tuple[Any, ...]]) -> list[T]:  # not a function of this module, which PCs do not have
        return [function(*one) for one in items]

    return of_module(call, function)
