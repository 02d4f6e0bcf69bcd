"""What the owner lends, held against what there is now; and pauses after this PC could not do what it had taken."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable
from pathlib import Path
from random import Random

import structlog

from deskgrid.clock import Clock
from deskgrid.core.backoff import delay_s
from deskgrid.model.workers import Capacity
from deskgrid.worker.slots import NOTHING, Usage, excess_bytes, free_capacity

__all__ = ["Bounds"]

_log = structlog.get_logger()

_FIRST_REST_S = 30.0
_MAX_REST_S = 900.0
"""Pauses in which no work is taken: without them, a PC with a full disk would take and refuse one job after the other."""


class Bounds:
    """The bounds of one worker, whose files are in `folder`. `free_bytes` says what is free on a folder's disk."""

    def __init__(
        self,
        lent: Capacity,
        reserve_bytes: int,
        folder: Path,
        *,
        clock: Clock,
        rng: Random,
        free_bytes: Callable[[Path], int] | None = None,
    ) -> None:
        self._lent = lent
        self._reserve_bytes = reserve_bytes
        self._folder = folder
        self._clock = clock
        self._rng = rng
        self._free_bytes = free_bytes or (lambda folder: shutil.disk_usage(folder).free)
        self._resting_until = 0.0
        self._rests = 0
        self._reason = ""

    def free(self, usages: Iterable[Usage]) -> Capacity:
        """Return what new attempts may use besides those that are; nothing while resting."""
        if self.why_resting():
            return NOTHING
        disk = self._free_bytes(self._folder)
        return free_capacity(self._lent, usages, disk_free_bytes=disk, reserve_bytes=self._reserve_bytes)

    def result_room(self, used_bytes: int) -> int:
        """Return how many bytes a packed result may take while attempts take `used_bytes`; not more than 0 if there is no room."""
        return min(self._lent.disk_bytes - used_bytes, self._free_bytes(self._folder) - self._reserve_bytes)

    def excess_bytes(self, used_bytes: int) -> tuple[int, int]:
        """Return by how much attempts pass the owner's bound, and by how much the disk is short of the reserve; 0 if not."""
        disk = self._free_bytes(self._folder)
        return excess_bytes(self._lent, used_bytes, disk_free_bytes=disk, reserve_bytes=self._reserve_bytes)

    def rest(self, reason: str) -> None:
        """Take no work for a while, longer each time until `forgive`."""
        if self.why_resting():
            return
        self._rests += 1
        rest_s = delay_s(self._rests, first_s=_FIRST_REST_S, max_s=_MAX_REST_S, rng=self._rng)
        self._resting_until, self._reason = self._clock.monotonic() + rest_s, reason
        _log.warning("resting", seconds=round(rest_s), reason=reason)

    def forgive(self) -> None:
        """Note that this PC has done what it had taken: the next rest is a short one again."""
        self._rests = 0

    def why_resting(self) -> str:
        """Return why no work is taken now, or nothing if it is."""
        return self._reason if self._clock.monotonic() < self._resting_until else ""
