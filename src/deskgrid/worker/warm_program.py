"""One warm program: its machine, its conversation, its end, and who is to blame for it (see warm.py for the rules)."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, Callable, Sequence
from typing import Protocol

import structlog

from deskgrid.errors import DeskgridError, DriverUnusable, MachineFailed
from deskgrid.machines.driver import (
    Conversing,
    Driver,
    ExitCause,
    Exited,
    MachineHandle,
    Metered,
    Output,
    Stream,
    Suspendable,
)
from deskgrid.model.jobs import AttemptState
from deskgrid.units import format_duration
from deskgrid.worker.conversation import Answer, Conversation, Task, task_line
from deskgrid.worker.home import MACHINE, make_empty, remove
from deskgrid.worker.journal import Verdict
from deskgrid.worker.judging import NOT_THE_JOB, fault_of
from deskgrid.worker.kit import Kit
from deskgrid.worker.slots import Usage
from deskgrid.worker.supplies import WARM_LIFE_S, Supplies
from deskgrid.worker.tasks import beside, finish, in_thread, within
from deskgrid.worker.throttles import Throttled
from deskgrid.worker.warm_jobs import BACK, STOPPED, WarmAttempt, WarmLine, settle_by

__all__ = ["Pool", "WarmProgram"]

_log = structlog.get_logger()

_HANDED_S = 0.02
_MOST_HANDED = 64
_MOST_STRAYS = 1000
"""Answers to nothing after which a program is ended."""
_LAST_WORDS_BYTES = 500
_LAST_S = 5.0
"""That a program may live on once it has closed its stdout."""
_RECHECK_S = 0.05


class Pool(Protocol):
    """What a program tells the pool that it is of."""

    def spread(self) -> None:
        """Give what waits to programs."""

    def settled(self, attempt: WarmAttempt) -> None:
        """Note that a job has ended."""

    def gone(self, program: WarmProgram, verdict: Verdict | None, *, broken: bool) -> None:
        """Deal with what a program that is gone has left. `broken`: it could not be started at all."""


class WarmProgram:
    """One warm program. `run` it once: when that is over, however it came to it, nothing is left of it."""

    def __init__(self, pool: Pool, kit: Kit, line: WarmLine, name: str) -> None:
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
        self._holds: list[Callable[[], None]] = []
        """What lets go of its data in the cache."""
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

    def throttled(self) -> Throttled | None:
        """Return its machine, if that runs and can be held to a share of the CPUs."""
        driver = self._driver()
        if not self.ready or self.frozen or self.ending or not isinstance(driver, Metered):
            return None
        return Throttled(driver, self._machine())

    async def freeze(self) -> None:
        """Let it stand still; one that cannot is ended."""
        try:
            driver = self._driver()
            if driver is None or self._handle is None or not isinstance(driver, Suspendable):
                raise MachineFailed("the driver cannot")
            self.frozen, self._frozen_at = True, self._clock.monotonic()
            self._kit.unthrottle(self._handle)
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
            attempt.settle(BACK)
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
            verdict = STOPPED
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
        self._holds = [self._kit.cache.hold(content) for content in supplies.contents()]
        context = await supplies.fetch_context()
        program = await supplies.fetch_program()
        spec = supplies.machine_spec(None, context, program, data=await supplies.fetch_data())
        self._handle = await driver.prepare(spec, self.folder / MACHINE)
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
            return
        while self._holds:
            self._holds.pop()()

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
                settle_by(attempt, answer)
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
