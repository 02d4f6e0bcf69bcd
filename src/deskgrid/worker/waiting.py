"""Jobs that were leased ahead: made ready while others run, started the moment that one of those has ended.

Between the end of a process job and the start of the next are a call to the server and the next one's files. For jobs that are quick that is as long
as the job, so some more than fit are asked for: one for each that runs. They count for nothing in the owner's bounds until they have a place.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from deskgrid.clock import Clock
from deskgrid.core.matching import need_of
from deskgrid.model.machines import MachineKind
from deskgrid.model.workers import Assignment, Capacity
from deskgrid.worker.runner import Runner
from deskgrid.worker.slots import fits

__all__ = ["WaitingLine"]

_QUICK_S = 0.5
"""Jobs that take longer, on average, are not asked for ahead."""
_STARVED_S = 5.0
"""That a job waits for a place before it goes back."""
_MOST_CLASSES = 1000


class WaitingLine:
    """The attempts of one worker that wait for a place, first come first served. `free` says what is free in the owner's bounds."""

    def __init__(self, clock: Clock, free: Callable[[], Capacity]) -> None:
        self._clock = clock
        self._free = free
        self._line: dict[Runner, float] = {}
        """With the time since when they wait."""
        self._took_s: dict[int, float] = {}
        """What a job takes, by class, from the last ones."""

    def note_ran(self, assignment: Assignment, seconds: float) -> None:
        """Note how long the machine of a job ran."""
        before = self._took_s.pop(assignment.class_id, seconds)
        self._took_s[assignment.class_id] = (before + seconds) / 2
        if len(self._took_s) > _MOST_CLASSES:
            del self._took_s[next(iter(self._took_s))]

    def ahead(self, runners: Iterable[Runner]) -> dict[int, int]:
        """Return how many jobs more of which classes are wanted than fit at once: one for each that has a place, if they are quick."""
        wanted: dict[int, int] = {}
        for runner in runners:
            assignment = runner.entry.assignment
            if _may_wait(assignment) and self._took_s.get(assignment.class_id, _QUICK_S) < _QUICK_S:
                soon = runner.ran_s() < 2 * _QUICK_S  # one that takes longer than those before keeps others waiting
                number = -1 if not runner.placed else 1 if soon and not runner.needless else 0
                wanted[assignment.class_id] = wanted.get(assignment.class_id, 0) + number
        return {class_id: number for class_id, number in wanted.items() if number > 0}

    def admit(self, runner: Runner) -> None:
        """Let an attempt wait that does not fit in now. It is not counted yet."""
        assignment = runner.entry.assignment
        if runner.starting and _may_wait(assignment) and not fits(need_of(assignment.spec), self._free()):
            runner.queue()
            self._line[runner] = self._clock.monotonic()

    def give_places(self) -> None:
        """Let those start that fit in now."""
        for runner in list(self._line):
            if not runner.starting:  # given back, cancelled, or found running
                del self._line[runner]
            elif fits(need_of(runner.entry.assignment.spec), self._free()):
                del self._line[runner]
                runner.place()
            else:
                return

    def starved(self) -> list[Runner]:
        """Return those that have waited for too long."""
        now = self._clock.monotonic()
        return [runner for runner, since in self._line.items() if now - since >= _STARVED_S and runner.starting]


def _may_wait(assignment: Assignment) -> bool:
    # A set that starts together has its places from the start; disks take long to come, and space.
    return assignment.spec.machine.kind is MachineKind.PROCESS and not assignment.hold
