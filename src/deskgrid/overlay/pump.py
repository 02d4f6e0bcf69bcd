"""Pumps: threads that carry bytes between sockets, so that an event loop need not.

Rules:

- A thread has one poller and many tasks. A task is a small state machine over non-blocking sockets: it says which socket it wants
  readable or writable, and is called when that is so (level-triggered). It belongs to one thread for life, so nothing in it is locked.
- OpenSSL and os.splice release the interpreter, so N threads use N cores.
- A task never waits and never takes long: it moves about one buffer, then lets the others have their turn.
- Buffers and pipes are the thread's. A task borrows one only while bytes are inside that could not be written, so an idle connection
  costs its sockets and a few hundred bytes.

Where there is epoll it is used without Python's selectors module: it costs half as much per event, and a socket without interest still
tells when it breaks. Elsewhere selectors.DefaultSelector serves.
"""

from __future__ import annotations

import asyncio
import contextlib
import heapq
import itertools
import os
import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from typing import Generic, Protocol, TypeVar

import structlog

__all__ = [
    "BUFFER_BYTES",
    "ERROR",
    "HANGUP",
    "READ",
    "WRITE",
    "Buffer",
    "Outcome",
    "Pipe",
    "Poller",
    "Pump",
    "Pumps",
    "Task",
    "Timer",
]

READ, WRITE, ERROR, HANGUP = 1, 4, 8, 16
"""What a socket is ready for; the values of poll(2)."""
BUFFER_BYTES = 256 << 10
_PIPE_BYTES = 1 << 20
_SPARE_BUFFERS = 16
_MOST_REST_S = 0.1
_SPARE_PIPES = 16
_F_SETPIPE_SZ = 1031

T = TypeVar("T")
log = structlog.get_logger()


class Task(Protocol):
    """What a pump carries. Everything is called in the pump's thread."""

    def start(self, pump: Pump) -> None:
        """Say what to watch."""

    def ready(self, fd: int, mask: int) -> None:
        """Go on: the socket `fd` is ready for `mask`."""

    def abandon(self, reason: str) -> None:
        """Close everything at once. Idempotent."""


class Outcome(Generic[T]):
    """A result that one thread sets once and coroutines of any event loop wait for."""

    __slots__ = ("_error", "_is_set", "_lock", "_value", "_waiters")

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_set = False
        self._value: T | None = None
        self._error: BaseException | None = None
        self._waiters: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    @property
    def is_set(self) -> bool:
        """Tell whether there is a result."""
        return self._is_set

    def set(self, value: T | None = None, error: BaseException | None = None) -> None:
        """Set the result, or the error to raise. Later calls change nothing. Thread-safe."""
        with self._lock:
            if self._is_set:
                return
            self._value, self._error, self._is_set = value, error, True
            waiters, self._waiters = self._waiters, []
        for loop, future in waiters:
            with contextlib.suppress(RuntimeError):  # that loop is closed: nobody waits any more
                loop.call_soon_threadsafe(_resolve, future)

    async def wait(self) -> T:
        """Return the result, or raise the error. Cancelling one waiter does not touch the others."""
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        with self._lock:
            if not self._is_set:
                self._waiters.append((loop, future))
        if not self._is_set:
            try:
                await future
            finally:
                with self._lock:
                    self._waiters = [waiter for waiter in self._waiters if waiter[1] is not future]
        if self._error is not None:
            raise self._error
        return self._value  # type: ignore[return-value]  # it is set


class Buffer:
    """256 KiB, and views of it."""

    __slots__ = ("body", "view")

    def __init__(self) -> None:
        self.view = memoryview(bytearray(BUFFER_BYTES))
        self.body = self.view[4:]
        """What follows the length of a frame."""


class Pipe:
    """A kernel pipe for os.splice, as large as the system allows."""

    __slots__ = ("read_fd", "size_bytes", "write_fd")

    def __init__(self) -> None:
        self.read_fd, self.write_fd = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self.size_bytes = _enlarge(self.write_fd)

    def close(self) -> None:
        """Close both ends."""
        os.close(self.read_fd)
        os.close(self.write_fd)


class Timer:
    """Something a pump does later; `cancel` in the pump's thread."""

    __slots__ = ("_call",)

    def __init__(self, call: Callable[[], None]) -> None:
        self._call: Callable[[], None] | None = call

    def cancel(self) -> None:
        """Forget it. Idempotent."""
        self._call = None

    def fire(self) -> None:
        """Do it, once."""
        call, self._call = self._call, None
        if call is not None:
            call()


class Poller(Protocol):
    """Which sockets are ready."""

    def watch(self, fd: int, old: int | None, new: int | None) -> None:
        """Change what is of interest; None: nothing, not even that it broke."""

    def wait(self, timeout_s: float | None) -> Iterable[tuple[int, int]]:
        """Return file numbers and what they are ready for."""

    def close(self) -> None:
        """Close."""


class Pump:
    """One thread and what it carries. Only `adopt`, `post` and `stop` may be called from other threads."""

    def __init__(self, name: str, poller: Poller, pace: Callable[[int], float] | None = None) -> None:
        self._name = name
        self._pace = pace
        self._poller = poller
        self._masks: dict[int, int] = {}
        self._watchers: dict[int, Task] = {}
        self._tasks: set[Task] = set()
        self._calls: deque[Callable[[], None]] = deque()
        self._soon: list[Task] = []
        self._timers: list[tuple[float, int, Timer]] = []
        self._numbers = itertools.count()
        self._spare_buffers: list[Buffer] = []
        self._spare_pipes: list[Pipe] = []
        self._lock = threading.Lock()
        self._stopping = False
        self._is_woken = False
        self._thread: threading.Thread | None = None
        self._wake_receiver, self._wake_sender = socket.socketpair()
        self._wake_receiver.setblocking(False)
        self._wake_sender.setblocking(False)
        self._poller.watch(self._wake_receiver.fileno(), None, READ)
        self.buffer = Buffer()
        """The thread's scratch: what is in it is lost when the task returns, unless it keeps the buffer."""

    def count(self, size_bytes: int) -> None:
        """Note that a task has moved bytes over the network."""
        if self._pace is not None:
            self._pace(size_bytes)

    # from any thread

    def __len__(self) -> int:
        return len(self._tasks)

    def adopt(self, task: Task) -> bool:
        """Carry a task from now on. Return False if this pump has stopped."""
        with self._lock:
            if self._stopping:
                return False
            self._tasks.add(task)
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name=self._name, daemon=True)
                self._thread.start()
        self.post(lambda: self._guarded(task, lambda: task.start(self)))
        return True

    def post(self, call: Callable[[], None]) -> None:
        """Have something done in the thread. Once the pump has stopped, nothing is done."""
        self._calls.append(call)
        if not self._is_woken:
            self._is_woken = True
            with contextlib.suppress(OSError):  # full: it wakes anyway; closed: it has ended
                self._wake_sender.send(b"\0")

    def stop(self) -> None:
        """Abandon all tasks and end the thread. Idempotent."""
        with self._lock:
            self._stopping = True
            thread = self._thread
        if thread is not None:
            self.post(lambda: None)
            thread.join()
        else:
            self._close()

    # from the thread

    def watch(self, fd: int, mask: int | None, task: Task) -> None:
        """Call `task.ready` while `fd` is ready for `mask`. 0: only when it breaks (where the system tells); None: never.

        None must be said before `fd` is closed; to say it again later does no harm.
        """
        old = self._masks.get(fd)
        if mask == old:
            return
        if mask is None:
            if self._watchers.get(fd) is not task:
                return  # its own was closed before, and the number is another's now
            del self._masks[fd], self._watchers[fd]
            with contextlib.suppress(OSError, KeyError, ValueError):  # somebody has closed it
                self._poller.watch(fd, old, mask)
        else:
            self._poller.watch(fd, old, mask)
            self._masks[fd], self._watchers[fd] = mask, task

    def soon(self, task: Task) -> None:
        """Call `task.ready(-1, 0)` in the next turn, after those whose sockets are ready."""
        if task not in self._soon:
            self._soon.append(task)

    def after(self, delay_s: float, call: Callable[[], None]) -> Timer:
        """Do something later."""
        timer = Timer(call)
        heapq.heappush(self._timers, (time.monotonic() + delay_s, next(self._numbers), timer))
        return timer

    def forget(self, task: Task) -> None:
        """Drop a task that has ended; its sockets are no longer watched."""
        with self._lock:
            self._tasks.discard(task)
        if task in self._soon:
            self._soon.remove(task)

    def keep_buffer(self) -> Buffer:
        """Take the scratch away, with what is in it."""
        kept = self.buffer
        self.buffer = self._spare_buffers.pop() if self._spare_buffers else Buffer()
        return kept

    def return_buffer(self, buffer: Buffer) -> None:
        """Give back what `keep_buffer` gave."""
        if len(self._spare_buffers) < _SPARE_BUFFERS:
            self._spare_buffers.append(buffer)

    def borrow_pipe(self) -> Pipe:
        """Return an empty pipe. Raise OSError if there is none to be had."""
        return self._spare_pipes.pop() if self._spare_pipes else Pipe()

    def return_pipe(self, pipe: Pipe, *, is_empty: bool = True) -> None:
        """Give a pipe back; one with bytes inside is closed."""
        if is_empty and len(self._spare_pipes) < _SPARE_PIPES:
            self._spare_pipes.append(pipe)
        else:
            pipe.close()

    def _run(self) -> None:
        watchers, wait = self._watchers, self._poller.wait
        wake_fd = self._wake_receiver.fileno()
        while not self._stopping:
            for fd, mask in wait(self._timeout_s()):
                task = watchers.get(fd)
                if task is not None:
                    try:
                        task.ready(fd, mask)
                    except Exception:
                        self._broke(task)
                elif fd == wake_fd:
                    self._woken()
            if self._soon:
                self._run_soon()
            if self._timers:
                self._run_timers()
            if self._pace is not None:
                self._rest(self._pace)
        self._close()

    def _rest(self, pace: Callable[[int], float]) -> None:
        """Wait until bytes may move again, all tasks together; what else there is to do waits for some moments only."""
        rest_s = pace(0)
        if rest_s > 0:
            time.sleep(min(rest_s, _MOST_REST_S))

    def _timeout_s(self) -> float | None:
        if self._soon:
            return 0.0
        if not self._timers:
            return None
        return max(0.0, self._timers[0][0] - time.monotonic())

    def _woken(self) -> None:
        with contextlib.suppress(BlockingIOError):
            self._wake_receiver.recv(4096)
        self._is_woken = False  # before the calls are taken: one that comes later wakes again
        while self._calls:
            self._calls.popleft()()

    def _run_soon(self) -> None:
        tasks, self._soon = self._soon, []
        for task in tasks:
            self._guarded(task, lambda task=task: task.ready(-1, 0))  # type: ignore[misc]

    def _run_timers(self) -> None:
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            timer = heapq.heappop(self._timers)[2]
            try:
                timer.fire()
            except Exception:
                log.exception("a timer of a pump failed", pump=self._name)

    def _guarded(self, task: Task, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception:
            self._broke(task)

    def _broke(self, task: Task) -> None:
        log.exception("a task of a pump failed", pump=self._name, task=type(task).__name__)
        self._abandon(task, "an error of its own")

    def _close(self) -> None:
        for task in list(self._tasks):
            self._abandon(task, "closed")
        self._calls.clear()
        for pipe in self._spare_pipes:
            pipe.close()
        self._spare_pipes.clear()
        self._spare_buffers.clear()
        self._timers.clear()
        self._poller.close()
        self._wake_receiver.close()
        self._wake_sender.close()

    def _abandon(self, task: Task, reason: str) -> None:
        try:
            task.abandon(reason)
        except Exception:
            log.exception("a task of a pump failed", pump=self._name, task=type(task).__name__)


class Pumps:
    """Some pump threads; tasks are spread over them. The threads start when there is something to carry."""

    def __init__(
        self, threads: int = 2, *, name: str = "pump", portable: bool = False, pace: Callable[[int], float] | None = None
    ) -> None:
        """Make them. `portable` leaves epoll alone, for tests of what other systems get.

        `pace` is told of bytes that were moved, by any of the threads, and returns the seconds in which no more should be.
        """
        self._pace = pace
        self._lock = threading.Lock()
        self._closed = False
        self._pumps: list[Pump] = []
        self._threads, self._name, self._portable = max(1, threads), name, portable

    def __len__(self) -> int:
        return sum(len(pump) for pump in self._pumps)

    def carry(self, task: Task) -> Pump | None:
        """Have a task carried by the thread that has fewest. If the pumps are closed, abandon it and return None. Thread-safe."""
        with self._lock:
            pump = None if self._closed else self._choose()
        if pump is not None and pump.adopt(task):
            return pump
        task.abandon("closed")
        return None

    def close(self) -> None:
        """Reset everything that is carried and end the threads. Idempotent."""
        with self._lock:
            pumps, self._pumps, self._closed = self._pumps, [], True
        for pump in pumps:
            pump.stop()

    def _choose(self) -> Pump:
        idle = next((pump for pump in self._pumps if not len(pump)), None)
        if idle is None and len(self._pumps) < self._threads:
            idle = Pump(f"{self._name}-{len(self._pumps)}", _make_poller(self._portable), self._pace)
            self._pumps.append(idle)
        return idle or min(self._pumps, key=len)


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():
        future.set_result(None)


def _enlarge(pipe_fd: int) -> int:
    import fcntl

    for size_bytes in (_PIPE_BYTES, _PIPE_BYTES // 4):
        with contextlib.suppress(OSError):  # over the user's bound (pipe-user-pages-soft)
            return fcntl.fcntl(pipe_fd, _F_SETPIPE_SZ, size_bytes)
    return 64 << 10


def _make_poller(portable: bool) -> Poller:
    return _Selector() if portable or not hasattr(select, "epoll") else _Epoll()


class _Selector:
    """Any system; a socket without interest tells nothing."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()

    def watch(self, fd: int, old: int | None, new: int | None) -> None:
        if not new:
            if old:
                self._selector.unregister(fd)
            return
        events = (selectors.EVENT_READ if new & READ else 0) | (selectors.EVENT_WRITE if new & WRITE else 0)
        (self._selector.modify if old else self._selector.register)(fd, events)

    def wait(self, timeout_s: float | None) -> Iterable[tuple[int, int]]:
        return [
            (key.fd, (READ if events & selectors.EVENT_READ else 0) | (WRITE if events & selectors.EVENT_WRITE else 0))
            for key, events in self._selector.select(timeout_s)
        ]

    def close(self) -> None:
        self._selector.close()


if hasattr(select, "epoll"):

    class _Epoll:
        """Linux; its events have our values."""

        def __init__(self) -> None:
            self._epoll = select.epoll()

        def watch(self, fd: int, old: int | None, new: int | None) -> None:
            if new is None:
                self._epoll.unregister(fd)
            elif old is None:
                self._epoll.register(fd, new)
            else:
                self._epoll.modify(fd, new)

        def wait(self, timeout_s: float | None) -> Iterable[tuple[int, int]]:
            return self._epoll.poll(timeout_s)

        def close(self) -> None:
            self._epoll.close()
