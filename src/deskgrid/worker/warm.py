"""Warm programs: a sandboxed program stays and is given one short job after the other, thousands a second.

Rules:

1. A program serves the jobs of one owner, spec, context and app (`_Line`): nothing of one user's ever comes to another's.
2. Its machine is journalled before it starts, its jobs nowhere: those of a killed worker are not listed any more, so the server has them back.
3. Each job is handed to one program once. When a program ends, the job at its head is to blame; those handed over behind it, which it may or may not
   have read, go back to the server as not started.
4. A program that does nothing is not counted in the owner's bounds: it ends when something else needs its place, or after a minute.
5. A program does one job after the other, so the time of a job counts from the end of the one before it. Programs of quick jobs are given some
   ahead, as many as they do in 20 ms, so that neither side waits for the other.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncGenerator, Callable, Hashable, Iterable, Iterator, Sequence

import structlog

from deskgrid.core.matching import need_of
from deskgrid.errors import DeskgridError, DriverUnusable, MachineFailed, ProtocolError
from deskgrid.machines.driver import (
    Conversing,
    Driver,
    ExitCause,
    Exited,
    MachineHandle,
    Output,
    Stream,
    Suspendable,
)
from deskgrid.model.ids import AttemptId
from deskgrid.model.jobs import AttemptState, JobSpec
from deskgrid.model.machines import Network
from deskgrid.model.workers import Assignment, AttemptReport, Capacity
from deskgrid.units import format_duration
from deskgrid.worker.control import AttemptStatus
from deskgrid.worker.conversation import Answer, Conversation, Task, task_line, value_of
from deskgrid.worker.home import make_empty, remove
from deskgrid.worker.journal import Verdict
from deskgrid.worker.judging import NOT_THE_JOB, fault_of
from deskgrid.worker.kit import Kit
from deskgrid.worker.slots import NOTHING, Usage
from deskgrid.worker.supplies import WARM_LIFE_S, Supplies
from deskgrid.worker.tasks import beside, finish, in_thread, within

__all__ = ["WarmAttempt", "WarmPool", "WarmProgram"]

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
_HANDED_S = 0.02
_MOST_HANDED = 64
_MOST_STRAYS = 1000
"""Answers to nothing after which a program is ended."""
_LAST_WORDS_BYTES = 500
_LAST_S = 5.0
"""That a program may live on once it has closed its stdout."""
_RECHECK_S = 0.05
_MACHINE = "machine"
_BACK = Verdict(AttemptState.REFUSED, "")
"""Given back without a reason: it was nothing about the job."""
_STOPPED = Verdict(AttemptState.REFUSED, "the worker was stopped")
_SUCCESS = Verdict(AttemptState.SUCCEEDED, "")


class WarmAttempt:
    """One job of a warm program. Has the questions of a Runner that the agent asks when it reports."""

    __slots__ = ("assignment", "dropped", "final", "id", "line", "program")

    def __init__(self, assignment: Assignment, line: _Line) -> None:
        self.assignment = assignment
        self.id = assignment.attempt_id
        self.line = line
        self.program: WarmProgram | None = None
        """That it was handed to."""
        self.final: AttemptReport | None = None
        self.dropped = False
        """The server does not want it any more."""

    def report(self) -> AttemptReport:
        """Return what the server is told now."""
        if self.final is not None:
            return self.final
        state = AttemptState.LEASED
        if self.program is not None and self.program.head() is self:
            state = AttemptState.SUSPENDED if self.program.frozen else AttemptState.RUNNING
        return AttemptReport(attempt_id=self.id, state=state)

    def settle(self, verdict: Verdict, *, exit_code: int | None = None, value: bytes | None = None) -> None:
        """Decide how it ends, once."""
        if self.final is None:
            self.final = AttemptReport(
                attempt_id=self.id, state=verdict.state, reason=verdict.reason, exit_code=exit_code, value=value
            )


class _Line:
    """Jobs that one program can do, one after the other, and the programs that do."""

    def __init__(self, key: Hashable, assignment: Assignment, *, single: bool) -> None:
        self.key = key
        self.assignment = assignment
        self.single = single
        """Its program does one job only."""
        self.need = need_of(assignment.spec)
        self.waiting: deque[WarmAttempt] = deque()
        self.programs: list[WarmProgram] = []
        self.starved_since: float | None = None

    @property
    def spec(self) -> JobSpec:
        return self.assignment.spec

    def next(self) -> WarmAttempt | None:
        """Take the first job that is still wanted."""
        while self.waiting:
            attempt = self.waiting.popleft()
            if not attempt.dropped:
                return attempt
        return None

    def rate(self) -> float:
        """Return how many jobs its programs do in a second."""
        return sum(1.0 / program.job_s for program in self.programs if program.job_s > 0)

    def held(self) -> int:
        """Return how many of its jobs are not done."""
        return len(self.waiting) + sum(len(program.in_hand) for program in self.programs)


class WarmProgram:
    """One warm program. `run` it once: when that is over, however it came to it, nothing is left of it."""

    def __init__(self, pool: WarmPool, kit: Kit, line: _Line, name: str) -> None:
        self._pool = pool
        self._kit = kit
        self._clock = kit.clock
        self.line = line
        self.name = name
        self.folder = kit.home.attempts / name
        self.disk_bytes = 0
        self.in_hand: dict[int, WarmAttempt] = {}
        """What it was given and has not answered, by job, in order."""
        self.ready = self.frozen = self.ending = False
        self.answered_any = False
        self.shown: WarmAttempt | None = None
        """The last job of which the server was to hear that it runs."""
        self.blamed: WarmAttempt | None = None
        """The job that it did when it was ended."""
        self.job_s = 0.0
        """Seconds that a job takes, from the last ones; 0: not known yet."""
        self.idle_since = self._started_at = self._head_since = self._told_at = kit.clock.monotonic()
        self._frozen_at = 0.0
        self._strays = 0
        self._words = b""
        self._handle: MachineHandle | None = None
        self._conversation: Conversation | None = None
        self._silent = asyncio.Event()
        """Nothing more comes from it."""
        self._over: asyncio.Future[Verdict | None] = asyncio.get_running_loop().create_future()

    # ---- what the pool asks and does

    def head(self) -> WarmAttempt | None:
        """Return the job that it does now."""
        return next(iter(self.in_hand.values()), None)

    @property
    def running(self) -> bool:
        """Whether nothing has ended it yet."""
        return not self.ending

    @property
    def idle(self) -> bool:
        """Whether it has nothing to do and can be ended without harm."""
        return self.ready and not self.in_hand and not self.ending

    def usage(self) -> Usage:
        """Return what it counts for in the owner's bounds."""
        return Usage(self.line.need, self.disk_bytes)

    def feed(self) -> None:
        """Give it what waits, as far as it should have it now."""
        if not self.ready or self.frozen or self.ending or self._conversation is None:
            return
        if self._retires():
            return
        room = self._depth() - len(self.in_hand)
        if self.in_hand and room * 2 < self._depth():
            return  # some at once rather than each on its own
        now, lines = self._clock.monotonic(), []
        if not self.in_hand:
            self._head_since = self._told_at = now
        while room > 0 and (attempt := self._next()) is not None:
            assignment = attempt.assignment
            attempt.program = self
            self.in_hand[assignment.job_id] = attempt
            lines.append(task_line(Task(assignment.job_id, assignment.index, assignment.parameters)))
            room -= 1
        if lines:
            self._conversation.send(lines)
        elif not self.in_hand:
            self.idle_since = now

    async def end(self, verdict: Verdict | None, *, grace_s: float = 0.0) -> None:
        """End it: what it does now ends with the verdict. The interface is that of a Runner; there is no grace."""
        self.end_now(verdict)

    def end_now(self, verdict: Verdict | None) -> None:
        """End it soon. The first verdict counts; None: the job at its head is nobody's any more."""
        self.ending = True
        if not self._over.done():
            self.blamed = self.head()
            self._over.set_result(verdict)

    async def freeze(self) -> None:
        """Let it stand still; one that cannot is ended."""
        try:
            driver = self._driver()
            if driver is None or self._handle is None or not isinstance(driver, Suspendable):
                raise MachineFailed("the driver cannot")
            self.frozen, self._frozen_at = True, self._clock.monotonic()
            await driver.pause(self._handle)
        except DeskgridError as error:
            _log.warning("program_not_frozen", name=self.name, error=str(error))
            self.end_now(Verdict(AttemptState.REFUSED, "the PC was paused, and the machine could not be frozen"))

    async def thaw(self) -> None:
        """Let it go on. Raise MachineFailed if it does not."""
        driver = self._driver()
        if not self.frozen or driver is None or self._handle is None:
            return
        if isinstance(driver, Suspendable):
            await driver.resume(self._handle)
        stood_s = self._clock.monotonic() - self._frozen_at
        self._head_since += stood_s
        self._told_at += stood_s
        self.frozen = False
        self.feed()

    def ran_s(self) -> float:
        """Return for how long it has done the job at its head."""
        return (self._frozen_at if self.frozen else self._clock.monotonic()) - self._head_since

    def _next(self) -> WarmAttempt | None:
        attempt = self.line.next()
        if attempt is not None and attempt.assignment.job_id in self.in_hand:
            # A second attempt of a job whose first one is still in it: its answers could not be told apart.
            attempt.settle(_BACK)
            self._pool.settled(attempt)
            return self._next()
        return attempt

    def _depth(self) -> int:
        return max(1, min(_MOST_HANDED, int(_HANDED_S / self.job_s))) if self.job_s > 0 else 1

    def _retires(self) -> bool:
        """Tell whether it is given nothing more, and end it if it has nothing left."""
        if not (self.line.single and self.answered_any) and self._clock.monotonic() - self._started_at < WARM_LIFE_S:
            return False
        if not self.in_hand:
            self.end_now(None)
        return True

    # ---- its life

    async def run(self) -> None:
        """Start it, talk to it until it ends, and remove it. Raise only CancelledError."""
        verdict: Verdict | None = None
        broken = False
        try:
            verdict = await self._live()
        except asyncio.CancelledError:
            self.end_now(None)
            verdict = _STOPPED
            raise
        except Exception as error:
            broken = not self.ready
            self.blamed = self.blamed or self.head()
            if not isinstance(error, DeskgridError | OSError):
                _log.exception("program_broken", name=self.name, exc_info=error)
            verdict = Verdict(*fault_of(error))
        finally:
            self.ready, self.ending = False, True
            if self._conversation is not None:
                self._conversation.close()
            await finish(self._remove())
            self._pool.gone(self, verdict, broken=broken)

    async def _live(self) -> Verdict | None:
        driver = self._kit.drivers.choose(self.line.spec.machine)
        if not isinstance(driver, Conversing):
            raise DriverUnusable("the driver of this PC keeps no programs")
        await self._prepare(driver)
        if self._over.done():
            return self._over.result()
        await driver.start(self._machine())
        _log.info("program_started", name=self.name, job=self.line.spec.name)
        return await beside(self._wait_over(), self._follow(driver), self._talk(driver), self._keep_limits())

    async def _prepare(self, driver: Driver) -> None:
        await in_thread(make_empty, self.folder)
        supplies = Supplies(self._kit, self.line.assignment, self.folder)
        context = await supplies.fetch_context()
        program = await supplies.fetch_program()
        self._handle = await driver.prepare(supplies.machine_spec(None, context, program), self.folder / _MACHINE)
        await in_thread(self._kit.journal.write_machine, self.name, self._handle)
        await in_thread(remove, *supplies.files())

    async def _wait_over(self) -> Verdict | None:
        return await asyncio.shield(self._over)  # a task that is cancelled cancels what it awaits

    async def _follow(self, driver: Driver) -> None:
        """Wait for its end; keep the last that it wrote to stderr."""
        events = driver.events(self._machine())
        try:
            async for event in events:
                if isinstance(event, Output) and event.stream is Stream.STDERR:
                    self._words = (self._words + event.data)[-_LAST_WORDS_BYTES:]
                elif isinstance(event, Exited):
                    if self._conversation is not None:
                        with contextlib.suppress(TimeoutError):
                            await within(self._silent.wait(), self._clock, _LAST_S)  # what it said last counts
                    self.end_now(self._fate(event))
        finally:
            if isinstance(events, AsyncGenerator):
                await events.aclose()

    async def _talk(self, driver: Conversing) -> None:
        """Open the conversation and see to its end."""
        try:
            stream = await driver.connect_program(self._machine())
        except MachineFailed as error:
            # Most often it is over already, which `_follow` is about to hear; that says more.
            await self._clock.sleep(_LAST_S)
            self.end_now(Verdict(AttemptState.REFUSED, str(error)))
            return
        stream.setblocking(False)
        loop = asyncio.get_running_loop()
        try:
            _, self._conversation = await loop.create_unix_connection(
                lambda: Conversation(self._answered, self._ended), sock=stream
            )
        except BaseException:
            stream.close()
            raise
        self.ready = True
        self._pool.spread()
        await self._silent.wait()
        await self._clock.sleep(_LAST_S)
        self.end_now(Verdict(AttemptState.FAILED, "the warm program closed its stdout"))

    async def _keep_limits(self) -> None:
        """End it when the job at its head takes longer than it may."""
        wall_s = self.line.spec.limits.wall_time_s
        while True:
            left_s = wall_s - self.ran_s() if self.in_hand else wall_s
            if left_s <= 0:
                self.end_now(Verdict(AttemptState.FAILED, f"wall time of {format_duration(wall_s)} exceeded"))
                return
            await self._clock.sleep(max(left_s, _RECHECK_S))

    async def _remove(self) -> None:
        """Remove machine, files and journal entry; what cannot be removed now is at the next start of the worker."""
        try:
            if self._handle is not None:
                await self._kit.drivers.of(self._handle).destroy(self._handle)
            await in_thread(remove, self.folder)
            await in_thread(self._kit.journal.remove_machine, self.name)
        except (DeskgridError, OSError) as error:
            _log.error("program_not_removed", name=self.name, error=str(error))

    # ---- what it says

    def _answered(self, answers: Sequence[Answer]) -> None:
        now, head, done = self._clock.monotonic(), self.head(), 0
        for answer in answers:
            attempt = self.in_hand.pop(answer.job, None)
            if attempt is None:
                self._strays += 1
                continue
            done += 1
            if not attempt.dropped:
                _settle(attempt, answer)
                self._pool.settled(attempt)
        if self.head() is not head:
            self._head_since = now
        if done:
            spent_s = max(now - self._told_at, 1e-6) / done
            self.job_s = (self.job_s + spent_s) / 2 if self.job_s else spent_s
            self._told_at, self.answered_any = now, True
        if self._strays > _MOST_STRAYS:
            self.end_now(Verdict(AttemptState.FAILED, "the warm program answered to jobs that it was not given"))
        self.feed()
        if self.idle:
            self._pool.spread()

    def _ended(self, fault: str) -> None:
        self._silent.set()
        if fault:
            self.end_now(Verdict(AttemptState.FAILED, f"the warm program: {fault}"))

    def _fate(self, exited: Exited) -> Verdict:
        """Return how the job ends in which it ended."""
        said = "; ".join(self._words.decode(errors="replace").splitlines()[-3:])
        said = "".join(character if character.isprintable() else "?" for character in said)
        details = "".join(f": {words}" for words in (exited.detail, said) if words)
        if exited.cause in NOT_THE_JOB or exited.cause is ExitCause.STOPPED:
            return Verdict(AttemptState.REFUSED, f"{NOT_THE_JOB.get(exited.cause, 'it was stopped from outside')}{details}")
        if exited.cause is ExitCause.LIMIT:
            return Verdict(AttemptState.FAILED, f"the warm program went past a limit of the job{details}")
        return Verdict(AttemptState.FAILED, f"the warm program ended{details}")

    def _machine(self) -> MachineHandle:
        if self._handle is None:
            raise MachineFailed("there is no machine")
        return self._handle

    def _driver(self) -> Driver | None:
        return None if self._handle is None else self._kit.drivers.of(self._handle)


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
        self._lines: dict[Hashable, _Line] = {}
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

    def take(self, assignments: Iterable[Assignment]) -> None:
        """Hold jobs of warm programs, which begin when `run` runs. What cannot be done is answered so."""
        for assignment in assignments:
            if assignment.attempt_id in self._attempts:
                continue
            line = self._line_of(assignment)
            attempt = self._attempts[assignment.attempt_id] = WarmAttempt(assignment, line)
            fault = _fault(assignment)
            if fault or self._kit.owner.paused:
                attempt.settle(Verdict(AttemptState.FAILED, fault) if fault else _BACK)
                self.settled(attempt)
                self._forget(line)
            elif assignment.hold:
                self._held[attempt.id] = attempt
            else:
                line.waiting.append(attempt)
        self.spread()

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
        while idle and not _fits(_total(program.line.need for program in idle), free):
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
            attempt.settle(Verdict(AttemptState.REFUSED, reason) if attempt.program is not None else _BACK)

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

    def _start_for(self, line: _Line) -> None:
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
        if not _fits(need, free):
            return False
        left = [program.line.need for program in idle]
        if _fits(_total([need, *left]), free):
            return True
        for program in idle:
            program.end_now(None)  # it is counted until it is gone; then `gone` brings us here again
            left.pop(0)
            if _fits(_total([need, *left]), free):
                break
        return False

    def _start(self, line: _Line) -> None:
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
        stopped = verdict is _STOPPED
        if verdict is not None:
            # An owner's paths are nobody else's business.
            verdict = Verdict(verdict.state, verdict.reason.replace(str(self._kit.home.folder), "HOME"))
        for attempt in program.in_hand.values():
            attempt.settle(verdict if verdict is not None and attempt is program.blamed else _BACK)
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

    def _blame(self, line: _Line, verdict: Verdict, most: int) -> None:
        for _ in range(most):
            attempt = line.next()
            if attempt is not None:
                attempt.settle(verdict)

    def _line_of(self, assignment: Assignment) -> _Line:
        # Without an owner there is no telling who may share a program with whom.
        single = not assignment.owner_id
        key: Hashable = assignment.owner_id, assignment.spec, assignment.context, assignment.program
        if single:
            key = assignment.attempt_id
        line = self._lines.get(key)
        if line is None:
            line = self._lines[key] = _Line(key, assignment, single=single)
        return line

    def _forget(self, line: _Line) -> None:
        if not line.programs and not line.waiting and not any(held.line is line for held in self._held.values()):
            self._lines.pop(line.key, None)

    def _give_back_waiting(self, lines: Iterable[_Line] | None = None) -> None:
        for line in list(self._lines.values() if lines is None else lines):
            while (attempt := line.next()) is not None:
                attempt.settle(_BACK)
                self._news.set()
            self._forget(line)
        if lines is None:
            for attempt in self._held.values():
                attempt.settle(_BACK)
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


def _settle(attempt: WarmAttempt, answer: Answer) -> None:
    """Make an answer the end of a job."""
    try:
        value = value_of(answer)
    except ProtocolError as error:
        attempt.settle(Verdict(AttemptState.FAILED, error.message), exit_code=answer.exit_code)
        return
    if answer.exit_code:
        attempt.settle(
            Verdict(AttemptState.FAILED, f"the warm program answered {answer.exit_code}"), exit_code=answer.exit_code, value=value
        )
    else:
        attempt.settle(_SUCCESS, exit_code=0, value=value)


def _fault(assignment: Assignment) -> str:
    """Return why a warm program cannot do a job at all, "" if it can."""
    spec = assignment.spec
    if spec.results.paths:
        return "a warm program answers with values, not with files: results.paths = []"
    if spec.machine.network is not Network.NONE:
        return "a warm program has no network"
    if spec.fill:
        return "files of a warm program are not filled in: it is told index and parameters with each job"
    return ""


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


def _fits(need: Capacity, free: Capacity) -> bool:
    return need.cpus <= free.cpus and need.memory_bytes <= free.memory_bytes and need.disk_bytes <= free.disk_bytes
