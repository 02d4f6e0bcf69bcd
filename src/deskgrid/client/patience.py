"""Calls to a server that may be away for a while."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Awaitable, Callable
from typing import TypeVar

from deskgrid.core.backoff import delay_s
from deskgrid.errors import DeskgridError, StoreUnavailable, Unreachable

__all__ = ["patiently"]

T = TypeVar("T")
_rng = random.Random()  # noqa: S311 - jitter


async def patiently(call: Callable[[], Awaitable[T]], told: Callable[[DeskgridError | None], None] = lambda error: None) -> T:
    """Make a call that may be made again, until the server has answered; return that. Raise its errors.

    `told` hears why a call failed, and None when one did not; what it raises ends the patience.
    """
    failures = 0
    while True:
        try:
            answer = await call()
        except (Unreachable, StoreUnavailable) as error:
            told(error)
            failures += 1
            await asyncio.sleep(delay_s(failures, first_s=1.0, max_s=60.0, rng=_rng))
        else:
            told(None)
            return answer
