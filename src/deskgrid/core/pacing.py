"""How often workers call, so that a grid of any size is served by the same few processes.

Rules:

1. A worker that holds attempts calls more often than an idle one: it has leases to renew. Both calls cost the server about the same.
2. The calls of all workers together are to stay below what the operator aims at (`calls_per_s`); until there are so many workers, everybody calls
   every `interval_s`.
3. A lease lasts at least three intervals, so that two lost calls lose no attempt.
4. Nobody calls in step with others: each interval is shortened by up to a fifth, by a number that is each worker's own and changes with each call.
5. An idle worker's wake call is held only while there are few of them; of more, every n-th is held, so that some hear of new work at once.
"""

from __future__ import annotations

from msgspec import Struct

__all__ = ["Pace", "Terms", "pace"]

_BUSY_PART = 0.4
"""Of the calls that the grid aims at, for workers that hold attempts."""
_LEASE_INTERVALS = 3
_SPREAD = 0.2
_STRETCH = 1.12
"""Makes up for what rule 4 adds to the calls: the mean of 1 / (1 - x) for x from 0 to 0.2."""
_GOLDEN = 0.6180339887498949
"""Multiples of it, without their whole part, are spread evenly however many there are."""


class Terms(Struct, frozen=True, kw_only=True):
    """What the operator wants."""

    interval_s: float
    max_interval_s: float
    lease_s: float
    calls_per_s: float
    max_held: int
    """Wake calls held at the same time."""
    hold_s: float = 60.0


class Pace(Struct, frozen=True, kw_only=True):
    """What one worker is told."""

    interval_s: float
    lease_s: float
    hold_s: float
    """0: no wake calls."""


def pace(terms: Terms, *, online: int, busy: int, is_busy: bool, number: int, now: float) -> Pace:
    """Return when a worker is to call again. `online`: workers that call at all; `busy`: those of them that hold attempts; `number`: the
    worker's own, from 1."""
    renewing_s = _bounded(terms, _STRETCH * max(busy, 1) / (_BUSY_PART * terms.calls_per_s))
    idle_s = _bounded(terms, _STRETCH * max(online - busy, 0) / ((1 - _BUSY_PART) * terms.calls_per_s))
    fraction = (number * _GOLDEN + now / terms.interval_s) % 1.0
    interval_s = (renewing_s if is_busy else max(idle_s, renewing_s)) * (1 - _SPREAD * fraction)
    one_in = -(-online // terms.max_held) if terms.max_held > 0 else 0
    held = one_in > 0 and number % one_in == 0 if one_in > 1 else one_in == 1
    return Pace(
        interval_s=interval_s,
        lease_s=max(terms.lease_s, _LEASE_INTERVALS * renewing_s),
        hold_s=terms.hold_s if held else 0.0,
    )


def _bounded(terms: Terms, interval_s: float) -> float:
    return min(max(interval_s, terms.interval_s), max(terms.max_interval_s, terms.interval_s))
