"""Waiting in the few ways that a worker needs and asyncio has no word for."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, ParamSpec, TypeVar

from deskgrid.clock import Clock

__all__ = ["beside", "finish", "in_thread", "wait_for_event", "within"]

T = TypeVar("T")
P = ParamSpec("P")


async def finish(work: Coroutine[Any, Any, T]) -> T:
    """Run to the end even if the caller is cancelled meanwhile; the cancellation is raised afterwards."""
    task = asyncio.ensure_future(work)
    cancelled = False
    while not task.done():
        try:
            await asyncio.wait({task})
        except asyncio.CancelledError:
            cancelled = True
    if cancelled:
        if not task.cancelled():
            task.exception()  # seen; the cancellation counts for more
        raise asyncio.CancelledError
    return task.result()


async def in_thread(function: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run a blocking function in a thread. When this returns or raises, the thread is done with it, also when cancelled."""
    return await finish(asyncio.to_thread(function, *args, **kwargs))


async def beside(main: Coroutine[Any, Any, T], *others: Coroutine[Any, Any, None]) -> T:
    """Run `others` while `main` runs; return its result. The first error of any ends all and is raised as it is."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(other) for other in others]
            result = await main
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return result


async def wait_for_event(event: asyncio.Event, clock: Clock, seconds: float) -> bool:
    """Return True once the event is set, or False after `seconds`."""
    if event.is_set():
        return True
    tasks = {asyncio.create_task(event.wait()), asyncio.ensure_future(clock.sleep(seconds))}
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return event.is_set()


async def within(work: Coroutine[Any, Any, T], clock: Clock, seconds: float) -> T:
    """Return the result of `work`. Raise TimeoutError if it takes longer, once it is cancelled."""
    task, limit = asyncio.ensure_future(work), asyncio.ensure_future(clock.sleep(seconds))
    try:
        await asyncio.wait({task, limit}, return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise TimeoutError
        return task.result()
    finally:
        task.cancel()
        limit.cancel()
        await asyncio.gather(task, limit, return_exceptions=True)
