"""Blocking work on large files beside the event loop: it can be stopped, and tells how far it is."""

from __future__ import annotations

import asyncio
import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeVar

__all__ = ["Progress", "Stopped", "chunks", "in_thread", "on_loop"]

T = TypeVar("T")
Progress = Callable[[int, int], None]
"""Called on the event loop with the bytes done and the bytes in all (0: not known)."""
CHUNK = 1 << 20


class Stopped(Exception):
    """The waiting task was cancelled."""


async def in_thread(work: Callable[[threading.Event], T]) -> T:
    """Run blocking work in a thread. When cancelled, tell it through the event and wait until it has cleaned up."""
    stop = threading.Event()
    thread = asyncio.ensure_future(asyncio.to_thread(work, stop))
    try:
        return await asyncio.shield(thread)
    except asyncio.CancelledError:
        stop.set()
        await asyncio.wait([thread])
        if not thread.cancelled():
            thread.exception()  # looked at, or the loop complains
        raise


def on_loop(progress: Progress | None) -> Progress:
    """Return a function for threads that calls `progress` on the running loop."""
    if progress is None:
        return lambda done, whole: None
    loop = asyncio.get_running_loop()

    def call(done: int, whole: int) -> None:
        # A loop that was closed meanwhile wants no news.
        with contextlib.suppress(RuntimeError):
            loop.call_soon_threadsafe(progress, done, whole)

    return call


def chunks(source: BinaryIO, stop: threading.Event) -> Iterator[bytes]:
    """Yield what a file has, 1 MiB at a time. Raise Stopped soon after `stop` is set."""
    while data := source.read(CHUNK):
        if stop.is_set():
            raise Stopped
        yield data
