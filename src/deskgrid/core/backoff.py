"""How long to wait before trying again: twice as long after each failure, with jitter so that many do not come back at once."""

from __future__ import annotations

from typing import Protocol

__all__ = ["Chance", "delay_s"]

_MOST_DOUBLINGS = 32


class Chance(Protocol):
    """Where jitter comes from; random.Random is one."""

    def random(self) -> float:
        """Return a number from 0 (included) to 1 (not included)."""
        ...


def delay_s(failures: int, *, first_s: float, max_s: float, rng: Chance) -> float:
    """Return the seconds to wait after so many failures in a row (from 1).

    Between half and all of first_s * 2 ** (failures - 1), of which max_s is the most: never so short that a server that comes up is
    run over, never the same for all.
    """
    whole = min(max_s, first_s * 2.0 ** min(max(failures, 1) - 1, _MOST_DOUBLINGS))
    return whole * (0.5 + 0.5 * rng.random())
