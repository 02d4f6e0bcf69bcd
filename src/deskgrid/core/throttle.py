"""Bounds on what is used in a second: of CPU time by a machine, of bytes by the network. Pure.

A token bucket, filled at `rate` up to what BURST_S of it bring. What is used too much at once is owed afterwards, so over a time that is long
against BURST_S the use is the rate exactly, whatever comes in which pieces.
"""

from __future__ import annotations

__all__ = ["BURST_S", "Bucket", "Throttle"]

BURST_S = 0.2


class Bucket:
    """What may be used, `rate` of it in a second, from `now` on (monotonic)."""

    def __init__(self, rate: float, *, now: float) -> None:
        self._rate = rate
        self._now = now
        self._tokens = rate * BURST_S

    def take(self, amount: float, *, now: float) -> float:
        """Note what has been used; return the seconds in which nothing more may be."""
        self._tokens = min(self._rate * BURST_S, self._tokens + max(0.0, now - self._now) * self._rate) - amount
        self._now = max(self._now, now)
        return max(0.0, -self._tokens / self._rate)


class Throttle:
    """One machine that may use `rate` CPU seconds in a second. `used_s` and `now` are what it had used, and when, at the start."""

    def __init__(self, rate: float, *, used_s: float, now: float) -> None:
        self._bucket = Bucket(rate, now=now)
        self._used_s = used_s

    def may_run(self, used_s: float, *, now: float) -> bool:
        """Return whether the machine may run until the next look. Should `used_s` have shrunk, it counts from there."""
        new_s, self._used_s = max(0.0, used_s - self._used_s), used_s
        return self._bucket.take(new_s, now=now) == 0
