"""The worker's loop: one call to the server carries all that changed, and brings all that is new.

Rules:

1. One sync at a time. It lists every attempt held, so what the server leased in an answer that got lost goes back at once.
2. An assignment is journalled before anything is done for it. One that cannot be journalled is not held, so it goes back.
3. A final report is repeated until the server acknowledges it; only then is the attempt forgotten.
4. A lost connection changes nothing here: attempts go on, what they bring waits. A lease that ends meanwhile is the server's affair: it
   takes a late result while the job has none.
5. The owner comes first: paused means that no guest's CPU runs and no work is taken; the bounds hold by ending attempts.
6. Whatever ends the worker, no machine stays behind, unless it was asked to keep them; those the next worker finds again.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import os
import random
import signal
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from enum import Enum
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import structlog
from msgspec import Struct

from deskgrid.client.pace import Pace
from deskgrid.client.peers import ServerCalls
from deskgrid.client.transport import Credentials, Transport, load_credentials
from deskgrid.clock import Clock, SystemClock
from deskgrid.core.backoff import delay_s
from deskgrid.core.owner import Presence
from deskgrid.errors import Conflict, DeskgridError, InvalidInput, NoSpace, Unauthenticated
from deskgrid.machines import results
from deskgrid.machines.driver import Driver
from deskgrid.machines.probes import clear_probes
from deskgrid.machines.readers import Readers
from deskgrid.model import wire
from deskgrid.model.ids import AttemptId
from deskgrid.model.jobs import AttemptState
from deskgrid.model.workers import Assignment, AttemptReport, Capacity
from deskgrid.overlay.endpoint import Endpoint
from deskgrid.settings import PeerSettings, WorkerSettings, load_settings
from deskgrid.swarm.cache import Cache
from deskgrid.worker.bounds import Bounds
from deskgrid.worker.connection import Connect, Connection
from deskgrid.worker.control import AttemptStatus, StatusAnswer, control_server
from deskgrid.worker.drivers import Drivers, make_driver, make_drivers
from deskgrid.worker.home import Home, locked
from deskgrid.worker.installed import InstalledDisks
from deskgrid.worker.joining import Joining
from deskgrid.worker.journal import Entry, Journal, Phase, Verdict
from deskgrid.worker.keeping import Keeper
from deskgrid.worker.kit import Kit, Overlay
from deskgrid.worker.known import Known
from deskgrid.worker.leave import attempt_status, destroy_strays, remove_files, say_goodbye
from deskgrid.worker.owner import Owner, rules_of
from deskgrid.worker.presence import Sight, Watcher
from deskgrid.worker.probe import allocated_bytes, lent_by, make_gentle, profile_of
from deskgrid.worker.runner import Runner
from deskgrid.worker.secrets import SecretsKey
from deskgrid.worker.sharing import Sharing, own_bound
from deskgrid.worker.slots import NOTHING
from deskgrid.worker.tasks import finish, in_thread, wait_for_event, within
from deskgrid.worker.throttles import Throttled, Throttles
from deskgrid.worker.waiting import WaitingLine
from deskgrid.worker.warm import WarmPool
from deskgrid.worker.warm_jobs import WarmAttempt
from deskgrid.worker.warm_program import WarmProgram

__all__ = ["Agent", "Term", "run_worker"]

_log = structlog.get_logger()

_WAKE_HOLD_S = 25.0
_WAKE_GAP_S = 0.02
_BUSY_WAKE_GAP_S = 1.0
"""Least time between syncs that only a hint asked for, with and without a free slot."""
_LOOK_S = 1.0
"""Between looks at what the owner does with his PC."""
_MEASURE_S = 3.0
"""Between looks at what attempts have written."""
_GOODBYE_S = 5.0
_SAVE_S = 60.0
"""In which machines are written to the disk when the worker is stopped; the unit in docs/how-to.md gives it 100 s in all."""
_LOCK_S = 2.0
_LOCK_RETRY_S = 0.1


class _End(Enum):
    """Why the worker ends."""

    STOPPED = "stopped"
    KEEPING = "keeping"
    LEFT = "left"
    REVOKED = "revoked"


class Term(Struct, frozen=True, kw_only=True):
    """Of a worker that is one for a time: at the end, however that comes, it leaves the grid."""

    lifetime_s: float = 0.0
    """Seconds until then; 0: no bound."""
    idle_s: float = 0.0
    """Seconds without an attempt after which it leaves; 0: no bound."""


class Agent:
    """One worker. `run` it once; the other methods are for the same event loop, and `status` for any time."""

    def __init__(
        self,
        home: Home,
        settings: WorkerSettings,
        connection: Connection,
        drivers: Sequence[Driver],
        *,
        clock: Clock,
        rng: random.Random,
        name: str = "",
        address: str = "",
        free_bytes: Callable[[Path], int] | None = None,
        sight: Watcher | None = None,
        joining: Joining | None = None,
        term: Term | None = None,
        **kit: Any,
    ) -> None:
        self._home = home
        self._term = term
        self._ends_at = clock.monotonic() + (term.lifetime_s if term is not None and term.lifetime_s else math.inf)
        """When its time as a worker is over."""
        self._settings = settings
        self._connection = connection
        self._clock = clock
        self._rng = rng
        self._name, self._address = name, address
        self._bounds = Bounds(lent_by(settings), settings.reserve_bytes, home.folder, clock=clock, rng=rng, free_bytes=free_bytes)
        self._drivers = Drivers(drivers, lambda name: make_driver(name, settings, clock))
        self._profile = profile_of(settings, ())
        self._installed = InstalledDisks(home.disks)
        self._secrets = SecretsKey(home.secrets_key)
        rules = rules_of(settings)
        self._owner, self._presence = Owner(home.paused), Presence(rules)
        self._sight: Watcher = sight or Sight(rules, clock)
        self._paused_since: float | None = None
        self._obeyed = False
        """Whether machines stand still now, as the owner wanted when we last did what he wants."""
        self._journal = Journal(home.journal)
        self._cache = Cache(
            home.cache, bound_bytes=settings.cache_bytes, reserve_bytes=settings.reserve_bytes, free_bytes=free_bytes
        )
        self._sharing = Sharing(
            settings,
            self._cache,
            connection,
            clock,
            paused=lambda: self._owner.paused,
            changed=self._note_change,
            joining=joining,
        )
        self._kit = Kit(
            home=home,
            settings=settings,
            journal=self._journal,
            installed=self._installed,
            secrets=self._secrets,
            cache=self._cache,
            sharing=self._sharing,
            connection=connection,
            drivers=self._drivers,
            owner=self._owner,
            clock=clock,
            rng=rng,
            changed=self._note_change,
            freed=lambda: self._waiting.give_places(),
            fault=self._bounds.rest,
            unthrottle=lambda handle: self._throttles.release(handle),
            result_room=lambda: self._bounds.result_room(self._disk_bytes()),
            **kit,
        )
        self._keeper = Keeper(self._kit)
        self._warm = WarmPool(self._kit, self._free)
        self._waiting = WaitingLine(clock, self._free)
        self._throttles = Throttles(settings.cpu_share, clock, self._throttled)
        self._runners: dict[AttemptId, Runner] = {}
        self._tasks: dict[AttemptId, asyncio.Task[None]] = {}
        self._going: set[AttemptId] = set()
        """Being discarded: not listed any more, still counted."""
        self._group: asyncio.TaskGroup | None = None
        self._change = asyncio.Event()
        self._ending = asyncio.Event()
        self._ended = asyncio.Event()
        self._end: _End | None = None
        self._goodbye = ""
        self._owner_lock = asyncio.Lock()
        # What is known of the server.
        self._synced = asyncio.Event()
        """Pulsed by each successful sync."""
        self._hold_s = _WAKE_HOLD_S
        """For how long the server holds our wake calls; 0: it does not."""
        self._failures = 0
        self._trouble = ""
        self._connected_since: float | None = None
        self._last_sync_at: float | None = None
        self._lease_until: float | None = None

    # ---- what others ask

    def stop(self, *, keep: bool = False) -> None:
        """Let `run` end. Attempts whose machine runs are given back, or with `keep` left running for the next worker.

        One for a time leaves; if results are on their way, a little later, unless it is told once more.
        """
        if keep or self._term is None:
            self._finish_as(_End.KEEPING if keep else _End.STOPPED)
        elif self._left_s() > 0 and self._is_delivering():
            self._ends_at = self._clock.monotonic()
        else:
            self._finish_as(_End.LEFT)

    async def leave(self) -> StatusAnswer:
        """Leave the grid: everything is destroyed and removed, and `run` ends. Returns when that is done."""
        self._finish_as(_End.LEFT)
        await self._ended.wait()
        return StatusAnswer(running=False, name="", address=self._address, paused=False, message=self._goodbye)

    async def pause(self) -> None:
        """Stop all guests' CPUs and take no work. What has not started goes back. Holds after a restart."""
        async with self._owner_lock:
            try:
                self._owner.pause()
            except OSError as error:
                raise NoSpace(f"paused, but not for longer than the worker runs: {error}") from error
            finally:
                await self._obey()

    async def resume(self) -> None:
        """Go on, as far as the owner's rules go. Raise MachineFailed if a machine cannot."""
        async with self._owner_lock:
            self._owner.resume()
            await self._obey()

    async def _obey(self) -> None:
        """Let machines run or not, as the owner wants. Idempotent; the caller holds the owner's lock."""
        runners = list(self._runners.values())
        self._sharing.obey()
        self._keeper.obey_owner()
        if self._owner.paused:
            self._paused_since = self._paused_since if self._paused_since is not None else self._clock.monotonic()
            await asyncio.gather(*(self._pause_one(runner) for runner in runners), self._warm.pause())
        else:
            self._paused_since = None
            await asyncio.gather(*(runner.resume() for runner in runners), self._warm.resume())
            self._waiting.give_places()
        self._obeyed = self._owner.paused
        _log.info("paused" if self._obeyed else "resumed", why=self._owner.why)
        self._note_change()

    async def _keep_rules(self) -> None:
        """Look at the PC all the time, make way for its owner at once, and give him the memory, too, if he stays."""
        while True:
            objection = await self._look()
            try:
                async with self._owner_lock:
                    self._owner.objection = objection
                    if self._owner.paused is not self._obeyed:  # also if it did not succeed the last time
                        await self._obey()
                await self._release_memory()
            except (DeskgridError, OSError) as error:
                _log.error("rules_not_kept", error=str(error))
            await self._clock.sleep(_LOOK_S)

    async def _look(self) -> str:
        """Return why the owner's rules forbid work now."""
        return self._presence.why_not(await self._sight.look(), now=self._clock.monotonic())

    def _throttled(self) -> Iterator[Throttled]:
        """Yield the machines that run now."""
        for one in self._writers():
            machine = one.throttled()
            if machine is not None:
                yield machine

    async def _release_memory(self) -> None:
        """Write machines to the disk that have been frozen for long."""
        release_s, since = self._settings.release_s, self._paused_since
        if not release_s or since is None or self._clock.monotonic() - since < release_s:
            return
        await self._save_all([runner for runner in self._runners.values() if runner.running])
        verdict = Verdict(AttemptState.REFUSED, "the owner needed the memory", rests=False)
        await asyncio.gather(*(program.end(verdict) for program in self._warm.programs()))

    async def _keep_term(self) -> None:
        """Leave when the time is over, or there was nothing to do for long."""
        term = self._term
        if term is None:
            return
        busy_at = self._clock.monotonic()
        while True:
            now = self._clock.monotonic()
            busy_at = now if self._listed() else busy_at
            is_over = self._left_s() <= 0
            if (is_over and not self._is_delivering()) or (term.idle_s and now - busy_at >= term.idle_s):
                _log.info("term_ends", why="lifetime" if is_over else "idle", attempts=len(self._listed()))
                self._finish_as(_End.LEFT)
                return
            await self._clock.sleep(_LOOK_S)

    def _left_s(self) -> float:
        """Return how long this worker is one yet; below 0: for how long it is none."""
        return self._ends_at - self._clock.monotonic()

    def _is_delivering(self) -> bool:
        """Tell whether a result is on its way, and not for too long."""
        return self._left_s() > -_DELIVER_S and any(one.entry.phase in _DELIVERING for one in self._runners.values())

    def _why_not(self, assignment: Assignment) -> str:
        """Return why this worker does not begin a job, empty if it does."""
        is_long = assignment.spec.limits.wall_time_s > self._left_s()
        return "it may take longer than this worker is there" if is_long else ""

    async def answer(self, command: str) -> StatusAnswer:
        """Carry out a command of control.py."""
        if command == "leave":
            return await self.leave()
        if command == "pause":
            await self.pause()
        elif command == "resume":
            await self.resume()
        elif command != "status":
            raise InvalidInput(f"there is no command {command!r}")
        return self.status({"pause": "paused", "resume": self._owner.objection or "resumed"}.get(command, ""))

    def status(self, message: str = "") -> StatusAnswer:
        """Return what is going on."""
        return StatusAnswer(
            running=True,
            name=self._name,
            address=self._address,
            paused=self._owner.paused,
            why_paused=self._owner.why,
            message=message,
            connected=self._connected_since is not None,
            connected_since=self._connected_since,
            last_sync_at=self._last_sync_at,
            lease_until=self._lease_until,
            trouble=self._trouble or self._bounds.why_resting(),
            attempts=(*(self._status_of(runner) for runner in self._runners.values()), *self._warm.statuses()),
            lent=self._profile.lent,
            free=self._free(),
            disk_bytes=self._disk_bytes(),
            cache_bytes=self._cache.size_bytes() if self._home.cache.is_dir() else 0,
            cached=len(self._cache.entries()),
            drivers=self._drivers.fingerprints,
            process_id=os.getpid(),
        )

    # ---- from beginning to end

    async def run(self) -> None:
        """Work until `stop`, `leave` or a token that is not valid any more. Raise Unauthenticated for the last, unless it is a worker for a time.

        However it ends, also by cancellation, machines are dealt with as rule 6 says.
        """
        try:
            self._home.create()
            await in_thread(self._cache.open)
            await clear_probes(self._home.probes, self._clock)
            await self._drivers.probe(Known(self._home.probes / "known.json", self._clock))
            self._profile = profile_of(self._settings, self._drivers.fingerprints)
            self._owner.objection = await self._look()  # before anything runs
            self._paused_since = self._clock.monotonic() if self._owner.paused else None
            self._obeyed = self._owner.paused
            await self._read_journal()
            try:
                await self._work()
            finally:
                self._group = None
                await finish(self._close())
        finally:
            await finish(self._sight.close())
            self._ending.set()
            self._ended.set()
        if self._end is _End.REVOKED and self._term is None:
            raise Unauthenticated(
                "the server does not know this worker any more, so it has stopped and removed its machines",
                hint="deskgrid worker leave, then deskgrid worker join LINK with a new link",
            )

    async def _read_journal(self) -> None:
        entries = await in_thread(self._journal.read)
        for entry in entries:
            self._runners[entry.assignment.attempt_id] = Runner(self._kit, entry)
        await self._warm.clear()
        known = [runner.folder for runner in self._runners.values()]
        await destroy_strays(self._home, self._drivers, known=known)

    async def _work(self) -> None:
        async with asyncio.TaskGroup() as group:
            self._group = group
            runners = list(self._runners.values())
            self._runners.clear()
            for runner in runners:
                self._add(runner)
                self._begin(runner)
            loops = (
                *(self._keep_synced, self._keep_awake, self._keep_bounds, self._keep_rules),
                *(self._throttles.run, self._warm.run, self._sharing.run, self._keeper.run, self._keeper.check, self._keep_term),
            )
            tasks = [group.create_task(loop()) for loop in loops]
            await self._ending.wait()
            self._group = None
            for task in (*tasks, *self._tasks.values()):
                task.cancel()

    async def _close(self) -> None:
        """Deal with what is held, by the reason of the end."""
        _log.info("worker_ends", why=(self._end or _End.STOPPED).value, attempts=len(self._runners))
        if self._end is _End.KEEPING:
            return
        if self._end in (_End.LEFT, _End.REVOKED):
            await asyncio.gather(*(runner.discard() for runner in self._runners.values()))
            self._runners.clear()
        if self._end is _End.LEFT:
            self._goodbye = await self._say_goodbye()
        if self._end is _End.LEFT or (self._end is _End.REVOKED and self._term is not None):  # the grid may be the first to end it
            await in_thread(remove_files, self._home)
        elif self._end is not _End.REVOKED:
            await self._give_all_back()

    async def _say_goodbye(self) -> str:
        try:
            return await within(say_goodbye(self._connection), self._clock, _GOODBYE_S)
        except TimeoutError:
            return "left, but the server was not told and will find out by itself: it does not answer"

    async def _give_all_back(self) -> None:
        """Destroy the machines and tell the server, if it can be reached. What is on the disk waits for the next start: results, and
        machines that have done so much that they are written there."""
        runners = self._runners.values()
        worthy = [runner for runner in runners if runner.worth_saving]
        try:
            await within(self._save_all(worthy), self._clock, _SAVE_S)
        except TimeoutError:
            await asyncio.gather(*(runner.fall_back() for runner in worthy), return_exceptions=True)
        given = [runner.give_back("the worker was stopped") for runner in runners if runner.entry.phase in _GIVEN_BACK]
        settled = [runner.remove_machine() for runner in runners if runner.entry.phase is Phase.SETTLED]
        await asyncio.gather(*given, *settled)
        self._warm.give_back("the worker was stopped")
        with contextlib.suppress(DeskgridError, TimeoutError):
            await within(self._sync(taking=False), self._clock, _GOODBYE_S)

    async def _save_all(self, runners: Iterable[Runner]) -> None:
        """Write machines to the disk. What cannot be done for one does not matter to the others."""
        for found in await asyncio.gather(*(runner.save() for runner in runners), return_exceptions=True):
            if isinstance(found, Exception):
                _log.error("machine_not_saved", error=str(found))

    def _finish_as(self, end: _End) -> None:
        self._end = self._end or end
        self._ending.set()

    # ---- talking to the server

    async def _keep_synced(self) -> None:
        while True:
            try:
                interval_s = await self._sync()
            except Unauthenticated as error:
                self._trouble = str(error)
                self._finish_as(_End.REVOKED)
                return
            except DeskgridError as error:
                await self._wait_for_server(error)
                continue
            await wait_for_event(self._change, self._clock, interval_s)

    async def _wait_for_server(self, error: DeskgridError) -> None:
        self._failures += 1
        if self._trouble != str(error):
            _log.warning("server_not_reached", error=str(error), attempts=len(self._runners))
        self._trouble, self._connected_since = str(error), None
        first_s, max_s = self._settings.backoff_s, self._settings.max_backoff_s
        await self._clock.sleep(delay_s(self._failures, first_s=first_s, max_s=max_s, rng=self._rng))

    async def _sync(self, *, taking: bool = True) -> float:
        """Make one call and act on the answer; return the seconds until the next."""
        self._change.clear()
        asked_at = self._clock.now()
        reports = {runner.id: runner.report() for runner in self._listed()}
        self._profile = profile_of(
            self._settings, self._drivers.fingerprints, self._installed.packages(), secrets_key=self._secrets.public
        )
        request = wire.Sync(
            profile=self._profile,
            paused=self._owner.paused,
            attempts=tuple(reports.values()),
            free=self._free() if taking else NOTHING,
            cached=self._cache.entries(),
            ahead=self._ahead() if taking else {},
            held=self._cache.shared(),
            left_s=max(left_s, 0.0) if math.isfinite(left_s := self._left_s()) else None,
        )
        answer = await self._connection.call(wire.SYNC, request)
        self._note_contact(asked_at, answer.lease_s)
        for attempt_id in answer.acknowledged:
            await self._acknowledged(attempt_id, reports.get(attempt_id))
        for attempt_id in answer.cancelled:
            self._discard(attempt_id)
        for attempt_id in answer.started:
            if attempt_id in self._runners:
                self._runners[attempt_id].release()
            self._warm.release(attempt_id)
        for runner in self._runners.values():
            runner.want_console(runner.id in answer.consoles)
        self._keeper.obey(answer.keep, answer.remove, answer.fetch, answer.guard)
        self._sharing.want(answer.share)
        self._hold_s = min(answer.hold_s, _WAKE_HOLD_S)
        if taking:
            await self._take(answer.assignments)
        pulse, self._synced = self._synced, asyncio.Event()
        pulse.set()
        return max(_WAKE_GAP_S, answer.interval_s)

    def _listed(self) -> list[Runner | WarmAttempt]:
        return [*(runner for runner in self._runners.values() if runner.id not in self._going), *self._warm.attempts()]

    def _ahead(self) -> dict[int, int]:
        """Return how many jobs more than fit at once are wanted, by class."""
        if self._ending.is_set() or self._owner.paused or self._bounds.why_resting():
            return {}
        return {**self._warm.ahead(), **self._waiting.ahead(self._runners.values())}

    def _note_contact(self, asked_at: float, lease_s: float) -> None:
        """Note that the server answered. The lease counts from before we asked, so it never seems longer than it is."""
        if self._connected_since is None:
            _log.info("connected", address=self._address)
            self._connected_since = self._clock.now()
        self._failures, self._trouble = 0, ""
        self._last_sync_at, self._lease_until = self._clock.now(), asked_at + lease_s

    async def _keep_awake(self) -> None:
        """Sync when the server hints that there is news."""
        failures = 0
        while True:
            if self._connected_since is None or self._hold_s <= 0:
                await self._synced.wait()
                continue
            try:
                wake = await self._connection.call(wire.WAKE, wait_s=self._hold_s)
                failures = 0
            except DeskgridError:
                # The next sync finds out what it is; until then there is nobody to wait for.
                failures += 1
                self._note_change()
                await self._synced.wait()
                await self._clock.sleep(delay_s(failures, first_s=_WAKE_GAP_S, max_s=_WAKE_HOLD_S, rng=self._rng))
                continue
            if wake.changed:
                self._note_change()
                await self._synced.wait()
                if self._free().cpus:
                    await self._clock.sleep(_WAKE_GAP_S)
                else:  # the next call may already tell that there is a place again
                    await wait_for_event(self._synced, self._clock, _BUSY_WAKE_GAP_S)

    def _note_change(self) -> None:
        self._change.set()

    # ---- attempts

    async def _take(self, assignments: Iterable[Assignment]) -> None:
        """Journal what was assigned, all of it, and begin."""
        given = tuple(assignments)
        new = [Entry(assignment=one) for one in given if not self._warm.takes(one) and one.attempt_id not in self._runners]
        try:
            await in_thread(self._journal.write, new)
        except (NoSpace, OSError) as error:
            # Not held, so not listed, so the server has them back with the next call.
            for entry in new:
                await in_thread(self._journal.remove, entry.assignment.attempt_id)
            self._bounds.rest(f"the journal cannot be written: {error}")
            self._note_change()
            return
        for entry in new:
            runner = Runner(self._kit, entry)
            self._add(runner)
            _log.info("attempt_taken", attempt_id=runner.id, job_id=entry.assignment.job_id, number=entry.assignment.number)
            if self._owner.paused:
                self._spawn(runner, runner.give_back(""))
            elif reason := self._why_not(entry.assignment):
                self._spawn(runner, runner.give_back(reason, for_good=True))
            else:
                self._begin(runner)
        if new:
            self._warm.trim()
        self._warm.take((one for one in given if self._warm.takes(one)), self._why_not)

    def _add(self, runner: Runner) -> None:
        """Hold an attempt; one for which there is no place waits for it."""
        self._waiting.admit(runner)
        self._runners[runner.id] = runner

    def _begin(self, runner: Runner) -> None:
        self._spawn(runner, runner.run())

    def _spawn(self, runner: Runner, work: Coroutine[Any, Any, None]) -> None:
        """Let a task work on an attempt; there is one per attempt at most."""
        if self._group is None:
            work.close()
            return
        self._tasks[runner.id] = self._group.create_task(work)

    async def _acknowledged(self, attempt_id: AttemptId, sent: AttemptReport | None) -> None:
        if self._warm.acknowledge(attempt_id, sent):
            if sent is not None and sent.state is AttemptState.SUCCEEDED:
                self._bounds.forgive()
            return
        runner = self._runners.get(attempt_id)
        if runner is None or sent is None or runner.entry.report != sent:
            return
        await runner.forget()
        self._runners.pop(attempt_id, None)
        self._tasks.pop(attempt_id, None)
        if sent.state in (AttemptState.SUCCEEDED, AttemptState.FAILED):
            self._bounds.forgive()
            self._waiting.note_ran(runner.entry.assignment, runner.ran_s())

    def _discard(self, attempt_id: AttemptId) -> None:
        """Stop, destroy and forget an attempt that the server does not want any more."""
        self._warm.discard(attempt_id)
        runner = self._runners.get(attempt_id)
        if runner is None or attempt_id in self._going or self._group is None:
            return
        _log.info("attempt_cancelled", attempt_id=attempt_id, job_id=runner.entry.assignment.job_id)
        self._going.add(attempt_id)
        self._group.create_task(self._discard_one(runner))

    async def _discard_one(self, runner: Runner) -> None:
        async with self._owner_lock:
            await self._halt(runner)
        await runner.discard(grace_s=self._settings.stop_grace_s)
        self._runners.pop(runner.id, None)
        self._going.discard(runner.id)
        self._waiting.give_places()
        self._note_change()

    async def _halt(self, runner: Runner) -> None:
        """Cancel the attempt's task and wait for its end."""
        task = self._tasks.pop(runner.id, None)
        if task is not None:
            task.cancel()
            await asyncio.wait({task})

    async def _pause_one(self, runner: Runner) -> None:
        """Freeze its machine; without one, give it back."""
        if runner.entry.phase in (Phase.FETCHING, Phase.PREPARED) and runner.id not in self._going:
            await self._halt(runner)
            if runner.entry.phase in (Phase.FETCHING, Phase.PREPARED):
                self._spawn(runner, runner.give_back(""))
                return
            self._begin(runner)  # its machine came up under our hands
        await runner.suspend()

    async def _give_back_starved(self, runner: Runner) -> None:
        """Give an attempt back that was leased ahead and has found no place."""
        async with self._owner_lock:
            if runner.id in self._going or not runner.starting or runner.placed:
                return
            await self._halt(runner)
            self._spawn(runner, runner.give_back(""))

    def _status_of(self, runner: Runner) -> AttemptStatus:
        return msgspec.structs.replace(
            attempt_status(runner.entry),
            state=runner.report().state.value,
            ran_s=runner.ran_s(),
            disk_bytes=runner.disk_bytes,
            fetched_bytes=runner.fetched_bytes,
        )

    # ---- the owner's bounds

    def _free(self) -> Capacity:
        """Return what new attempts may use now."""
        if self._owner.paused or self._ending.is_set() or self._left_s() < _SHORTEST_S:
            return NOTHING
        return self._bounds.free((*(runner.usage() for runner in self._runners.values()), *self._warm.usages()))

    def _writers(self) -> list[Runner | WarmProgram]:
        """Return what writes to the owner's disk."""
        return [*self._runners.values(), *self._warm.programs()]

    def _disk_bytes(self) -> int:
        return sum(one.disk_bytes for one in self._writers())

    async def _keep_bounds(self) -> None:
        """Measure what attempts have written, and end the largest one when that is more than the owner lends."""
        while True:
            for one in self._writers():
                one.disk_bytes = await in_thread(allocated_bytes, one.folder)
            try:
                await self._hold_bounds()
            except (DeskgridError, OSError) as error:
                _log.error("bounds_not_held", error=str(error))
            self._waiting.give_places()
            for runner in self._waiting.starved():
                await self._give_back_starved(runner)
            await self._clock.sleep(_MEASURE_S)

    async def _hold_bounds(self) -> None:
        over, short = self._bounds.excess_bytes(self._disk_bytes())
        if short:
            short -= self._cache.shrink(short)  # not in a thread: nobody may begin to use a disk between the look and its removal
        running = [one for one in self._writers() if one.running]
        if running and (over > 0 or short > 0):
            largest = max(running, key=lambda one: one.disk_bytes)
            reason = "disk bound of the owner reached" if over > 0 else "the disk of the PC is nearly full"
            await largest.end(Verdict(AttemptState.REFUSED, reason))


_DELIVERING = frozenset({Phase.EXITED, Phase.SETTLED, Phase.DONE})
"""Phases in which a result is on its way."""
_DELIVER_S = 60.0
_SHORTEST_S = 30.0
"""What is left of a worker's time in which it asks for nothing any more."""
_GIVEN_BACK = frozenset({Phase.FETCHING, Phase.PREPARED, Phase.STARTED})
"""Phases whose work is lost when the worker stops; later ones have a result to bring, or are on the disk."""


# ---- the program


async def run_worker(
    home: Path,
    settings: WorkerSettings,
    *,
    clock: Clock | None = None,
    drivers: Sequence[Driver] | None = None,
    transport_factory: Connect | None = None,
    rng: random.Random | None = None,
    keep: bool = False,
    term: Term | None = None,
) -> None:
    """Be the worker of a folder until SIGTERM, SIGINT, `leave`, or a token that is not valid any more.

    `keep`: on a signal leave the machines running for the next worker. `term`: leave then, and on a signal. Raise InvalidInput if the folder has
    no credentials, Conflict if a worker uses it already, Unauthenticated if the server does not know the worker any more and there is no term.
    """
    clock, rng = clock or SystemClock(), rng or random.Random()  # noqa: S311 - jitter
    place = Home(home.absolute())
    credentials = load_credentials(place.credentials)
    chosen = make_drivers(settings, clock, probes=place.probes) if drivers is None else drivers
    async with _locked(place, clock):
        place.create()
        make_gentle(settings.nice)
        pace = Pace(own_bound(settings)) if settings.network_bytes_per_s else None
        connect = transport_factory or (lambda found: Transport(found, rng=rng, pace=pace))
        async with (
            connect(credentials) as connection,
            _overlay(place, settings, connection, credentials, clock, rng, pace) as overlay,
            Readers(results.__name__) as readers,
        ):
            agent = Agent(
                place,
                settings,
                connection,
                chosen,
                clock=clock,
                rng=rng,
                name=credentials.name,
                address=credentials.address,
                authority_pem=credentials.authority_pem,
                overlay=overlay,
                extract=partial(results.extract_results, run=readers.run),
                joining=_joining(place, connection, credentials, clock, rng),
                term=term,
            )
            _log.info("worker_starts", home=str(place.folder), address=credentials.address, name=credentials.name)
            with _signals(lambda: agent.stop(keep=keep)):
                async with control_server(place, agent.answer):
                    await agent.run()


@contextlib.asynccontextmanager
async def _overlay(
    home: Home,
    settings: WorkerSettings,
    connection: Connection,
    credentials: Credentials,
    clock: Clock,
    rng: random.Random,
    pace: Pace | None,
) -> AsyncIterator[Overlay | None]:
    """Take part in the overlay, if the owner allows machines a network."""
    if not settings.overlay:
        yield None
        return
    chosen = _peer_settings(home)
    spend = pace.spend if pace is not None else None
    async with Endpoint(chosen, clock=clock, rng=rng, authority_pem=credentials.authority_pem, pace=spend) as endpoint:
        yield Overlay(endpoint=endpoint, calls=ServerCalls(connection), credentials=credentials)


def _joining(home: Home, connection: Connection, credentials: Credentials, clock: Clock, rng: random.Random) -> Joining:
    calls = ServerCalls(connection)
    return Joining(_peer_settings(home), calls, authority_pem=credentials.authority_pem, clock=clock, rng=rng)


def _peer_settings(home: Home) -> PeerSettings:
    return load_settings(PeerSettings, home.folder / "peer.toml", "DESKGRID_PEER")


@contextlib.asynccontextmanager
async def _locked(home: Home, clock: Clock) -> AsyncIterator[None]:
    """Be the only worker; a command that works on the files may hold the lock for a moment."""
    deadline = clock.monotonic() + _LOCK_S
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(locked(home))
                break
            except Conflict:
                if clock.monotonic() >= deadline:
                    raise
            await clock.sleep(_LOCK_RETRY_S)
        yield


@contextlib.contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` for signals that ask a program to end, where the system has such."""
    loop = asyncio.get_running_loop()
    numbers = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]
    with contextlib.suppress(NotImplementedError, RuntimeError):
        for number in numbers:
            loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        with contextlib.suppress(NotImplementedError, RuntimeError):
            for number in numbers:
                loop.remove_signal_handler(number)
