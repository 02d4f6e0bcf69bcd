"""A bound on the bytes that a program sends and receives in a second, shared by its transfers and its threads that carry streams."""

from __future__ import annotations

import asyncio
import threading
import time

from deskgrid.core.throttle import Bucket

__all__ = ["Pace"]


class Pace:
    """Bytes in a second, both directions together. Thread-safe."""

    def __init__(self, bytes_per_s: int) -> None:
        self._bucket = Bucket(bytes_per_s, now=time.monotonic())
        self._lock = threading.Lock()

    def spend(self, size_bytes: int) -> float:
        """Note that bytes have come or gone; return the seconds in which no more should. 0 bytes: only ask."""
        with self._lock:
            return self._bucket.take(size_bytes, now=time.monotonic())

    async def keep(self, size_bytes: int) -> None:
        """Note that bytes have come or gone, and return when more may."""
        await asyncio.sleep(self.spend(size_bytes))
