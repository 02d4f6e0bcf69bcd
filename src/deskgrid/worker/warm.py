"""Warm programs: a sandboxed program stays and is given one short job after the other, thousands a second.

Rules:

1. A program serves the jobs of one owner, spec, context, data and app (`WarmLine`): nothing of one user's ever comes to another's.
2. Its machine is journalled before it starts, its jobs nowhere: those of a killed worker are not listed any more, so the server has them back.
3. Each job is handed to one program once. When a program ends, the job at its head is to blame; those handed over behind it, which it may or may not
   have read, go back to the server as not started.
4. A program that does nothing is not counted in the owner's bounds: it ends when something else needs its place, or after a minute.
5. A program does one job after the other, so the time of a job counts from the end of the one before it. Programs of quick jobs are given some
   ahead, as many as they do in 20 ms, so that neither side waits for the other.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Hashable, Iterable, Iterator

import structlog

from deskgrid.errors import DeskgridError
from deskgrid.model.ids import AttemptId
from deskgrid.model.jobs import AttemptState
from deskgrid.model.workers import Assignment, AttemptReport, Capacity
from deskgrid.worker.control import AttemptStatus
from deskgrid.worker.home import remove
from deskgrid.worker.journal import Verdict
from deskgrid.worker.kit import Kit
from deskgrid.worker.slots import NOTHING, Usage, fits
from deskgrid.worker.tasks import in_thread
from deskgrid.worker.warm_jobs import BACK, STOPPED, WarmAttempt, WarmLine, fault_of_warm
from deskgrid.worker.warm_program import WarmProgram

__all__ = ["WarmPool"]

_log = structlog.get_logger()

_IDLE_S = 60.0
_LOOK_S = 1.0
_SHOWN_AFTER_S = 0.5
"""From then on a job is worth telling that it runs; of quicker ones only the end is told."""
_STARVED_S = 5.0
"""That jobs wait for a place for their program before they go back."""
_GATHER_S, _GATHER_LONG_S = 0.02, 0.1
"""In which answers are gathered for one call to the server; the longer one while enough jobs wait here."""
_AHEAD_S = 0.5
"""Of work that is kept here: more than a call to the server takes, and little enough that no worker sits on what others could do."""
_MOST_AHEAD = 4000
_LEAST_RATE = 4.0
"""Jobs a second from which on jobs are asked for ahead."""


class WarmPool:
    """The warm programs of one worker and their jobs. All but `run`, `pause`, `resume` and `clear` return at once.

    `free` says what is free for new machines in the owner's bounds once `usages` is counted in them.
    """

    def __init__(self, kit: Kit, free: Callable[[], Capacity]) -> None:
        self._kit = kit
        self._clock = kit.clock
        self._free = free
        self._attempts: dict[AttemptId, WarmAttempt] = {}
        self._held: dict[AttemptId, WarmAttempt] = {}
        """To be released first."""
        self._lines: dict[Hashable, WarmLine] = {}
        self._programs: list[WarmProgram] = []
        self._group: asyncio.TaskGroup | None = None
        self._count = 0
        self._news = asyncio.Event()

    # ---- what the agent asks

    def takes(self, assignment: Assignment) -> bool:
        """Tell whether an assignment is for a warm program."""
        return assignment.spec.machine.warm

    def __contains__(self, attempt_id: object) -> bool:
        return attempt_id in self._attempts

    def attempts(self) -> Iterable[WarmAttempt]:
        """Return what is held, and what has ended until it is acknowledged: all that is to be reported."""
        return self._attempts.values()

    def programs(self) -> tuple[WarmProgram, ...]:
        """Return the programs, whose `folder` is to be measured into `disk_bytes`, and which can be told to `end`."""
        return tuple(self._programs)

    def usages(self) -> Iterator[Usage]:
        """Yield what programs count for in the owner's bounds; idle ones only with what they have written."""
        for program in self._programs:
            usage = program.usage()
            yield usage if not program.idle else Usage(NOTHING, usage.disk_bytes)

    def ahead(self) -> dict[int, int]:
        """Return how many jobs more of which classes are wanted than fit at once: about half a second of work."""
        wanted: dict[int, int] = {}
        if self._kit.owner.paused or any(line.starved_since is not None for line in self._lines.values()):
            return wanted
        for line in self._lines.values():
            rate = line.rate()
            more = min(_MOST_AHEAD, int(rate * _AHEAD_S)) - line.held()
            if rate >= _LEAST_RATE and more > 0:
                class_id = line.assignment.class_id
                wanted[class_id] = wanted.get(class_id, 0) + more
        return wanted

    def statuses(self) -> Iterator[AttemptStatus]:
        """Yield what programs do now, as the owner sees it."""
        for program in self._programs:
            attempt = program.head()
            if attempt is not None:
                yield _status(program, attempt)

    # ---- what the agent tells

    def take(self, assignments: Iterable[Assignment], why_not: Callable[[Assignment], str]) -> None:
        """Hold jobs of warm programs, which begin when `run` runs. What cannot be done is answered so, and what is not to be done here, for what
        `why_not` returns."""
        for assignment in assignments:
            if assignment.attempt_id in self._attempts:
                continue
            line = self._line_of(assignment)
            attempt = self._attempts[assignment.attempt_id] = WarmAttempt(assignment, line)
            if verdict := self._verdict_on(assignment, why_not):
                attempt.settle(verdict)
                self.settled(attempt)
                self._forget(line)
            elif assignment.hold:
                self._held[attempt.id] = attempt
            else:
                line.waiting.append(attempt)
        self.spread()

    def _verdict_on(self, assignment: Assignment, why_not: Callable[[Assignment], str]) -> Verdict | None:
        """Return how a job ends at once, if it does."""
        if fault := fault_of_warm(assignment):
            return Verdict(AttemptState.FAILED, fault)
        if self._kit.owner.paused:
            return BACK
        reason = why_not(assignment)
        return Verdict(AttemptState.REFUSED, reason, rests=False) if reason else None

    def release(self, attempt_id: AttemptId) -> None:
        """Let a job start that was held until all of its set can. Idempotent."""
        attempt = self._held.pop(attempt_id, None)
        if attempt is not None and attempt.final is None and not attempt.dropped:
            attempt.line.waiting.append(attempt)
            self.spread()

    def acknowledge(self, attempt_id: AttemptId, sent: AttemptReport | None) -> bool:
        """Forget an attempt whose final report the server has; False if it is not ours, or there is another report by now."""
        attempt = self._attempts.get(attempt_id)
        if attempt is None or attempt.final is None or attempt.final != sent:
            return False
        del self._attempts[attempt_id]
        return True

    def discard(self, attempt_id: AttemptId) -> None:
        """Forget an attempt that the server does not want any more, and end the program that does it now. Idempotent."""
        attempt = self._attempts.pop(attempt_id, None)
        if attempt is None:
            return
        attempt.dropped = True
        self._held.pop(attempt_id, None)
        if attempt.program is not None and attempt.final is None and attempt.program.head() is attempt:
            attempt.program.end_now(None)

    def trim(self) -> None:
        """End idle programs as far as the owner's bounds have no room for them any more; call it when others have taken some."""
        idle = sorted((program for program in self._programs if program.idle), key=lambda program: program.idle_since)
        free = self._free()
        while idle and not fits(_total(program.line.need for program in idle), free):
            idle.pop(0).end_now(None)

    async def pause(self) -> None:
        """Let no program run: what has not started goes back, and programs that do something are frozen."""
        self._give_back_waiting()
        for program in self._programs:
            if not program.in_hand:
                program.end_now(None)
        await asyncio.gather(*(program.freeze() for program in self._programs if program.in_hand and not program.ending))

    async def resume(self) -> None:
        """Let programs go on. Raise MachineFailed if one cannot."""
        await asyncio.gather(*(program.thaw() for program in self._programs))
        self.spread()

    def give_back(self, reason: str) -> None:
        """Let all that has not ended end as refused. `run` must be over."""
        for attempt in self._attempts.values():
            attempt.settle(Verdict(AttemptState.REFUSED, reason) if attempt.program is not None else BACK)

    async def clear(self) -> None:
        """Remove what a worker before us left of its programs."""
        for name, handle in (await in_thread(self._kit.journal.machines)).items():
            _log.info("program_of_before_removed", name=name)
            try:
                await self._kit.drivers.of(handle).destroy(handle)
                await in_thread(remove, self._kit.home.attempts / name)
                await in_thread(self._kit.journal.remove_machine, name)
            except (DeskgridError, OSError) as error:
                _log.error("program_not_removed", name=name, error=str(error))

    async def run(self) -> None:
        """Run programs as there are jobs, until cancelled; then all of them have been removed."""
        async with asyncio.TaskGroup() as group:
            self._group = group
            group.create_task(self._tell())
            try:
                self.spread()
                while True:
                    await self._clock.sleep(_LOOK_S)
                    self._look()
            finally:
                # Before the group waits for its tasks: it would wait for a program that one of them starts, too.
                self._group = None

    # ---- jobs to programs

    def spread(self) -> None:
        """Give what waits to programs, and start programs for what is left, as far as there is room."""
        for line in list(self._lines.values()):
            if not line.waiting:
                line.starved_since = None
                continue
            for program in sorted(line.programs, key=lambda program: len(program.in_hand)):
                program.feed()
            if not self._kit.owner.paused:
                self._start_for(line)

    def _start_for(self, line: WarmLine) -> None:
        """Start programs for the jobs of a line that no program is about to take."""
        coming = sum(not program.ready and not program.ending for program in line.programs)
        while coming < len(line.waiting) and self._has_room(line.need):
            self._start(line)
            coming += 1
        if line.programs:
            line.starved_since = None
        elif line.waiting and line.starved_since is None:
            line.starved_since = self._clock.monotonic()

    def _has_room(self, need: Capacity) -> bool:
        """Tell whether a machine fits in now; end idle programs if it would without them."""
        if self._group is None:
            return False
        free = self._free()
        idle = sorted((program for program in self._programs if program.idle), key=lambda program: program.idle_since)
        if not fits(need, free):
            return False
        left = [program.line.need for program in idle]
        if fits(_total([need, *left]), free):
            return True
        for program in idle:
            program.end_now(None)  # it is counted until it is gone; then `gone` brings us here again
            left.pop(0)
            if fits(_total([need, *left]), free):
                break
        return False

    def _start(self, line: WarmLine) -> None:
        assert self._group is not None
        self._count += 1
        program = WarmProgram(self, self._kit, line, f"warm-{line.assignment.attempt_id}-{self._count}")
        line.programs.append(program)
        self._programs.append(program)
        self._group.create_task(program.run())

    def settled(self, attempt: WarmAttempt) -> None:
        """Note that a job has ended."""
        self._news.set()

    def gone(self, program: WarmProgram, verdict: Verdict | None, *, broken: bool) -> None:
        """Deal with what a program that is gone has left. `broken`: it could not be started at all."""
        line = program.line
        line.programs.remove(program)
        self._programs.remove(program)
        _log.info("program_ended", name=program.name, reason=verdict.reason if verdict else "")
        stopped = verdict is STOPPED
        if verdict is not None:
            verdict = Verdict(verdict.state, self._kit.home.told(verdict.reason))
        for attempt in program.in_hand.values():
            attempt.settle(verdict if verdict is not None and attempt is program.blamed else BACK)
        if verdict is not None and not stopped:
            refused = verdict.state is AttemptState.REFUSED
            if not program.in_hand and not program.answered_any and not (refused and line.programs):
                # It ended before it took a job: one has to answer for that, or it would be started for ever.
                self._blame(line, verdict, len(line.waiting) if broken else 1)
            if refused:
                self._kit.fault(verdict.reason)
        program.in_hand.clear()
        self._news.set()
        self._forget(line)
        self.spread()

    def _blame(self, line: WarmLine, verdict: Verdict, most: int) -> None:
        for _ in range(most):
            attempt = line.next()
            if attempt is not None:
                attempt.settle(verdict)

    def _line_of(self, assignment: Assignment) -> WarmLine:
        # Without an owner there is no telling who may share a program with whom.
        single = not assignment.owner_id
        key: Hashable = assignment.owner_id, assignment.spec, assignment.context, assignment.data, assignment.program
        if single:
            key = assignment.attempt_id
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = WarmLine(key, assignment, single=single)
        return line

    def _forget(self, line: WarmLine) -> None:
        if not line.programs and not line.waiting and not any(held.line is line for held in self._held.values()):
            self._lines.pop(line.key, None)

    def _give_back_waiting(self, lines: Iterable[WarmLine] | None = None) -> None:
        for line in list(self._lines.values() if lines is None else lines):
            while (attempt := line.next()) is not None:
                attempt.settle(BACK)
                self._news.set()
            self._forget(line)
        if lines is None:
            for attempt in self._held.values():
                attempt.settle(BACK)
                self._news.set()
            self._held.clear()

    # ---- in time

    def _look(self) -> None:
        now = self._clock.monotonic()
        for program in self._programs:
            if program.idle and now - program.idle_since >= _IDLE_S:
                program.end_now(None)
            head = program.head()
            if head is not None and head is not program.shown and program.ran_s() >= _SHOWN_AFTER_S:
                program.shown = head
                self._news.set()
        self.trim()
        self.spread()
        self._give_back_waiting(
            [line for line in self._lines.values() if line.starved_since is not None and now - line.starved_since >= _STARVED_S]
        )

    async def _tell(self) -> None:
        """Let the agent call the server for what has ended: at once for the first, then for what came together."""
        while True:
            await self._news.wait()
            self._news.clear()
            self._kit.changed()
            await self._clock.sleep(_GATHER_LONG_S if self._has_enough() else _GATHER_S)

    def _has_enough(self) -> bool:
        """Tell whether all lines have work for as long as the longer gathering takes, and a call."""
        return all(line.held() > line.rate() * _AHEAD_S / 2 for line in self._lines.values())


def _status(program: WarmProgram, attempt: WarmAttempt) -> AttemptStatus:
    assignment, machine = attempt.assignment, attempt.assignment.spec.machine
    return AttemptStatus(
        attempt_id=attempt.id,
        job_id=assignment.job_id,
        number=assignment.number,
        name=assignment.spec.name,
        phase="started",
        state=attempt.report().state.value,
        started_at=None,
        ran_s=program.ran_s(),
        cpus=machine.cpus,
        memory_bytes=machine.memory_bytes,
        disk_bytes=program.disk_bytes,
    )


def _total(needs: Iterable[Capacity]) -> Capacity:
    cpus = memory = disk = 0
    for need in needs:
        cpus, memory, disk = cpus + need.cpus, memory + need.memory_bytes, disk + need.disk_bytes
    return Capacity(cpus=cpus, memory_bytes=memory, disk_bytes=disk)
