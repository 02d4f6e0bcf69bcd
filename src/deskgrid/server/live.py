"""Hints inside one process: who waits for a topic is told when it changed. Losing a hint costs only latency.

What other processes change comes through hints.py.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable

__all__ = ["Live"]

_MOST_MARKS = 10_000
_FIRST_WOKEN, _WAKE_ON_S = 16, 0.1


class Live:
    """Counts changes, notes the last of each topic and wakes those who wait."""

    def __init__(self, *, spread: Iterable[str] = ()) -> None:
        """`spread`: topics whose waiters are woken a few at a time, until `settle` says that those were enough."""
        self._spread = frozenset(spread)
        self._settled: dict[str, int] = {}
        self._marks: dict[str, int] = {}
        """Of the topics that changed last, the one longest ago first."""
        self._count = 0
        self._forgotten = 0
        """Mark of topics that are not kept: to who waits for one, it may seem to have changed, which costs one look."""
        self._waiting: dict[str, list[asyncio.Future[None]]] = defaultdict(list)
        self._seen: dict[str, dict[str, int]] = {}

    def notify(self, topics: list[str]) -> None:
        """Note a change of each topic named and wake its waiters."""
        for topic in topics:
            self._count += 1
            self._marks.pop(topic, None)
            self._marks[topic] = self._count
            if topic in self._spread:
                self._wake_some(topic, self._count, _FIRST_WOKEN)
                continue
            for future in self._waiting.pop(topic, ()):
                if not future.done():
                    future.set_result(None)
        while len(self._marks) > _MOST_MARKS:
            self._forgotten = self._marks.pop(next(iter(self._marks)))

    def settle(self, topic: str, count: int) -> None:
        """Note that whoever looked when there were `count` changes left nothing to do: nobody else need be woken for those."""
        self._settled[topic] = max(count, self._settled.get(topic, 0))

    def _wake_some(self, topic: str, count: int, number: int) -> None:
        """Wake some waiters, those who have waited longest first, and later twice as many, unless it is settled by then.

        One new job must not make a thousand idle workers call at once.
        """
        waiting = self._waiting.get(topic, [])
        if self._settled.get(topic, 0) >= count or self._marks.get(topic) != count or not waiting:
            return  # done, or a later change wakes on
        woken, self._waiting[topic] = waiting[:number], waiting[number:]
        for future in woken:
            if not future.done():
                future.set_result(None)
        if self._waiting[topic]:
            asyncio.get_running_loop().call_later(_WAKE_ON_S, self._wake_some, topic, count, 2 * number)

    def notify_all(self) -> None:
        """Let every topic seem to have changed and wake all who wait: hints may have been lost."""
        self._count += 1
        self._marks.clear()
        self._forgotten = self._count
        waiting, self._waiting = self._waiting, defaultdict(list)
        for futures in waiting.values():
            for future in futures:
                if not future.done():
                    future.set_result(None)

    @property
    def count(self) -> int:
        """How many changes there were. A topic that changes from now on has a greater mark."""
        return self._count

    def mark(self, topic: str) -> int:
        """Return a number that grows with each change of a topic."""
        return self._marks.get(topic, self._forgotten)

    def remember(self, principal: str, marks: dict[str, int]) -> None:
        """Keep what somebody had seen when it last looked, so that a change before it waits again is not missed."""
        self._seen[principal] = marks

    def remembered(self, principal: str) -> dict[str, int] | None:
        """Return what `remember` kept, or None."""
        return self._seen.get(principal)

    async def wait(self, seen: dict[str, int], timeout_s: float) -> bool:
        """Return True once a topic's mark is greater than in `seen`, or False after `timeout_s`."""
        if any(self.mark(topic) > mark for topic, mark in seen.items()):
            return True
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        for topic in seen:
            self._waiting[topic].append(future)
        try:
            await asyncio.wait_for(future, timeout_s)
        except TimeoutError:
            return False
        finally:
            for topic in seen:
                self._forget(topic, future)
        return True

    def _forget(self, topic: str, future: asyncio.Future[None]) -> None:
        waiting = self._waiting.get(topic)
        if waiting and future in waiting:
            waiting.remove(future)
        if waiting == []:
            del self._waiting[topic]
