"""One attempt, from its assignment to its final report, in steps that a restarted worker can take up again.

    fetching -> prepared -> started -> exited -> settled -> done
                            |  ^
                            v  |                any of them -> settled
                            saved

Whose fault it is decides what is reported. The job's: `failed`, which counts against its attempts. This PC's: `refused`, which
does not (the server calls it lost if the machine had started): no space, a broken driver, a machine killed from outside,
a bound of the owner's. A way to the server that is broken is nobody's fault: what has to be sent is tried for ever,
with pauses, until it is there or the server says that it is not wanted.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import Any

import msgspec
import structlog

from deskgrid.archive import pack_folder
from deskgrid.core.backoff import delay_s
from deskgrid.errors import (
    BadImage,
    Conflict,
    DeskgridError,
    MachineFailed,
    NoSpace,
    ProtocolError,
    StoreUnavailable,
    Unauthenticated,
    Unreachable,
)
from deskgrid.machines.driver import (
    Booted,
    Caged,
    Checkpointing,
    Driver,
    ExitCause,
    Exited,
    Gone,
    Listening,
    MachineHandle,
    Metered,
    Output,
    Running,
    Saved,
    Stream,
    Suspendable,
    Viewable,
)
from deskgrid.machines.folders import wipe
from deskgrid.machines.results import ExtractLimits, ResultReport
from deskgrid.model.data import Blob
from deskgrid.model.ids import Sha256
from deskgrid.model.jobs import AttemptState
from deskgrid.model.machines import MachineKind
from deskgrid.model.workers import AttemptReport
from deskgrid.units import format_duration
from deskgrid.worker.console import make_console
from deskgrid.worker.endorsed import check_endorsed
from deskgrid.worker.home import MACHINE, SECRETS, make_empty, remove, remove_attempt
from deskgrid.worker.journal import Entry, Phase, Verdict
from deskgrid.worker.judging import NOT_THE_JOB, fault_of, judge, without_result
from deskgrid.worker.kit import Kit
from deskgrid.worker.output import LiveOutput
from deskgrid.worker.services import make_services
from deskgrid.worker.slots import Usage, usage_of
from deskgrid.worker.supplies import Supplies
from deskgrid.worker.tasks import beside, in_thread
from deskgrid.worker.throttles import Throttled

__all__ = ["Runner"]

_log = structlog.get_logger()

_WITH_MACHINE = frozenset({Phase.PREPARED, Phase.STARTED, Phase.SAVED})
_RECHECK_S = 1.0
_WORTH_SAVING_S = 300.0
_WHOLE_REPORT_BYTES = 1 << 20
"""The report holds the last MiB of a stream; shorter ones are known to be whole."""
_MOST_RESTORES = 3
"""Times that a machine goes on from the same checkpoint: then something is wrong with it, or with this PC."""
_RESULT = "result.tar.zst"
_SEEN, _PICTURE = "seen", "screen.png"
"""Folder of what is left of a machine that never came up, and the picture of its screen in it."""
_PICTURE_S = 10.0
_MOST_PICTURE_BYTES = 32 << 20


class Runner:
    """One attempt. `run` may be cancelled at any moment and called again, also by another process with the journalled entry.

    `entry` is what is known; `disk_bytes` what its files take (measured by the agent). Everything but `run` returns quickly,
    or waits only for the machine.
    """

    def __init__(self, kit: Kit, entry: Entry) -> None:
        self._kit = kit
        self._clock = kit.clock
        self.entry = entry
        self.id = entry.assignment.attempt_id
        self.disk_bytes = 0
        self._folder = kit.home.attempt(self.id)
        self._supplies = Supplies(kit, entry.assignment)
        self._services = make_services(kit, entry.assignment, self._supplies.credentials)
        self._console = make_console(kit, entry.assignment)
        self._output = self._make_output()
        self._machine_lock = asyncio.Lock()
        self._journal_lock = asyncio.Lock()
        self._forgotten = False
        self._holds: list[Callable[[], None]] = []
        """What lets go of its disk and data in the cache."""
        self._released = asyncio.Event()
        if not entry.assignment.hold or entry.phase not in (Phase.FETCHING, Phase.PREPARED):
            self._released.set()
        self._placed = asyncio.Event()
        self._placed.set()
        self._awake = asyncio.Event()
        """The owner lets machines run."""
        if not kit.owner.paused:
            self._awake.set()
        self._tried_s = entry.kept_s
        """When the last checkpoint was made or tried, in seconds of its running."""
        if entry.phase in _WITH_MACHINE:
            self._hold()
        self._ran_s = entry.ran_s
        self._since: float | None = None
        """Monotonic time since when the machine runs, which `_ran_s` does not have yet."""
        if entry.ran_at is not None:
            # It ran on while no worker watched.
            self._ran_s += max(0.0, kit.clock.now() - entry.ran_at)
            self._since = kit.clock.monotonic()

    # ---- what others ask

    def report(self) -> AttemptReport:
        """Return what the server is told now."""
        if self.entry.report is not None:
            return self.entry.report
        if self.entry.phase in (Phase.FETCHING, Phase.PREPARED):
            return AttemptReport(attempt_id=self.id, state=AttemptState.LEASED)
        suspended = self.entry.phase is Phase.SAVED or (self.entry.phase is Phase.STARTED and self._kit.owner.paused)
        return AttemptReport(attempt_id=self.id, state=AttemptState.SUSPENDED if suspended else AttemptState.RUNNING)

    def usage(self) -> Usage:
        """Return what it counts for in the owner's bounds."""
        needs_machine = not self.needless and (self.placed or not self.starting)
        assignment = self.entry.assignment
        data = [file.blob for file in assignment.data]
        return usage_of(assignment.spec, data, disk_bytes=self.disk_bytes, needs_machine=needs_machine)

    @property
    def starting(self) -> bool:
        """Whether its machine has not started yet."""
        return self.entry.phase in (Phase.FETCHING, Phase.PREPARED)

    @property
    def needless(self) -> bool:
        """Whether it needs no machine any more."""
        return self.entry.phase in (Phase.SETTLED, Phase.DONE)

    @property
    def placed(self) -> bool:
        """Whether there is a place for its machine, or none has to be waited for."""
        return self._placed.is_set()

    def ran_s(self) -> float:
        """Return the seconds that its machine has run, suspensions left out."""
        return self._ran_s + (self._clock.monotonic() - self._since if self._since is not None else 0.0)

    @property
    def fetched_bytes(self) -> int:
        """What has come of the disk or context that is fetched now."""
        return self._supplies.fetched_bytes

    @property
    def running(self) -> bool:
        """Whether its machine has started and nothing has ended it yet."""
        return self.entry.phase is Phase.STARTED and self.entry.verdict is None

    @property
    def folder(self) -> Path:
        """Where its files are."""
        return self._folder

    # ---- what the owner and the server want

    def release(self) -> None:
        """Let it start, if it was held until all of its set can. Idempotent."""
        self._released.set()

    def want_console(self, wanted: bool) -> None:
        """Note whether its owner wants to see its machine's screen. Idempotent."""
        if self._console is not None:
            self._console.want(wanted)

    def queue(self) -> None:
        """Let it be made ready, but not start before `place`."""
        self._placed.clear()

    def place(self) -> None:
        """Let it start: there is a place for its machine. Idempotent."""
        self._placed.set()

    async def suspend(self) -> None:
        """Stop the CPUs of its machine. One that cannot be frozen is ended: the owner comes first."""
        self._awake.clear()
        async with self._machine_lock:
            if self.entry.phase is not Phase.STARTED or self._since is None:
                return
            frozen = await self._freeze()
            self._stop_watch()
            await self._note()
        if not frozen:
            await self.end(Verdict(AttemptState.REFUSED, "the PC was paused, and the machine could not be frozen", rests=False))

    async def resume(self) -> None:
        """Let its machine run on. Raise MachineFailed if it does not. One that is on the disk goes on when `run` comes to it."""
        if not self._kit.owner.paused:
            self._awake.set()
        async with self._machine_lock:
            if self.entry.phase is not Phase.STARTED or self._since is not None or self._kit.owner.paused:
                return
            driver = self._driver()
            if isinstance(driver, Suspendable):
                await driver.resume(self._handle())
            self._since = self._clock.monotonic()
            await self._note()

    def throttled(self) -> Throttled | None:
        """Return its machine, if that runs and can be held to a share of the CPUs."""
        if not self.running or self._since is None or self._machine_lock.locked():
            return None
        driver = self._driver()
        return Throttled(driver, self._handle()) if isinstance(driver, Metered) else None

    @property
    def worth_saving(self) -> bool:
        """Whether its machine has done so much that it should go on later rather than begin elsewhere."""
        return self.running and self.ran_s() >= _WORTH_SAVING_S and isinstance(self._driver(), Checkpointing)

    async def save(self) -> None:
        """Write its machine to the disk and give its memory back. The owner comes first: where that is not possible, it is ended and goes on
        from its last checkpoint; without one the job goes back.
        """
        async with self._machine_lock:
            if not self.running:
                return
            fault = await self._save()
            self._stop_watch()
            if not fault:
                _log.info("machine_saved", **self._names(), ran_s=round(self._ran_s, 1))
                await self._note(durably=True, phase=Phase.SAVED, kept_s=self._ran_s, restores=0)
            elif await self._fall_back(fault) or not isinstance(await self._driver().recover(self._handle()), Running):
                return  # or it ended by itself meanwhile
        if fault:
            await self.end(Verdict(AttemptState.REFUSED, f"the owner needed the memory, and {fault}", rests=False))

    async def fall_back(self) -> None:
        """End its machine, if it runs and has a checkpoint: it goes on from there, after a later start of the worker if need be."""
        async with self._machine_lock:
            if self.running:
                await self._fall_back("there was no time")

    async def _fall_back(self, fault: str) -> bool:
        driver = self._driver()
        if not isinstance(driver, Checkpointing) or not await driver.fall_back(self._handle()):
            return False
        _log.warning("machine_falls_back", **self._names(), kept_s=round(self.entry.kept_s, 1), error=fault)
        self._stop_watch()
        await self._note(durably=True, phase=Phase.SAVED)
        return True

    async def end(self, verdict: Verdict, *, grace_s: float = 0.0) -> None:
        """End its machine, if it runs, for a reason of ours. What follows is up to `run`."""
        async with self._machine_lock:
            if self.entry.phase not in (Phase.STARTED, Phase.SAVED) or self.entry.verdict is not None:
                return
            _log.info("attempt_ends", **self._names(), reason=verdict.reason)
            await self._note(verdict=verdict)
        self._awake.set()
        try:
            await self._driver().stop(self._handle(), grace_s=grace_s)
        except (DeskgridError, OSError):
            await self._note(verdict=None)  # so that it is tried again
            raise

    async def settle(
        self, state: AttemptState, reason: str, *, exit_code: int | None = None, result: Blob | None = None, rests: bool = True
    ) -> None:
        """Decide how it ends. `rests`: a refusal lets this worker take no new work for a while."""
        self._stop_watch()
        told = self._kit.home.told(reason)
        report = AttemptReport(attempt_id=self.id, state=state, exit_code=exit_code, reason=told, result=result)
        await self._note(durably=True, phase=Phase.SETTLED, settled=report)
        if state is AttemptState.REFUSED and rests:
            self._kit.fault(reason)
        self._kit.freed()

    async def give_back(self, reason: str, *, for_good: bool = False) -> None:
        """Let it end as refused, at once, its machine and files removed and the rest of its output unsent. `run` must not be running.

        One that never started goes back without a reason: that says it was nothing about the job, which may be offered to us
        again at once; unless it is `for_good`.
        """
        self._output.close()
        started = self.entry.phase in (Phase.STARTED, Phase.SAVED)
        await self.settle(AttemptState.REFUSED, reason if started or for_good else "", rests=False)
        await self.run()

    async def discard(self, *, grace_s: float = 0.0) -> None:
        """Remove its machine, its files and its journal entry. `run` must not be running. Idempotent."""
        if grace_s and self.entry.phase is Phase.STARTED:
            with contextlib.suppress(DeskgridError):
                await self._driver().stop(self._handle(), grace_s=grace_s)
        await self._clean()
        await self.forget()

    async def forget(self) -> None:
        """Remove its journal entry; nothing is written for it any more. Idempotent."""
        async with self._journal_lock:
            self._forgotten = True
            await in_thread(self._kit.journal.remove, self.id)

    # ---- the way of an attempt

    async def run(self) -> None:
        """Go on from where the entry says, up to the final report. Raise only CancelledError."""
        steps: dict[Phase, Callable[[], Coroutine[Any, Any, None]]] = {
            Phase.FETCHING: self._prepare,
            Phase.PREPARED: self._start,
            Phase.STARTED: self._watch,
            Phase.SAVED: self._revive,
            Phase.EXITED: self._collect,
            Phase.SETTLED: self._deliver,
        }
        step = self._recover
        while True:
            try:
                await step()
            except Exception as error:
                await self._settle_error(error)
            if self.entry.phase is Phase.DONE:
                return
            step = steps[self.entry.phase]

    async def _recover(self) -> None:
        """Find the machine again, if there was one."""
        if self.entry.phase not in _WITH_MACHINE:
            return
        handle, driver = self._handle(), self._driver()
        found = await driver.recover(handle)
        if isinstance(found, Gone):
            await self._settle_gone(driver)
            return
        _log.info("machine_found_again", **self._names(), running=isinstance(found, Running))
        if self.entry.phase is Phase.PREPARED:
            # Killed between its start and our note of it.
            self._since = self._clock.monotonic()
            await self._note(phase=Phase.STARTED, started_at=self._clock.now())
        if not isinstance(found, Running):
            # It is off since nobody knows when: only what we saw of its time counts.
            self._ran_s, self._since = self.entry.ran_s, None
            if isinstance(found, Saved):
                await self._note(phase=Phase.SAVED)
            return
        if self.entry.phase is Phase.SAVED:
            # Killed between making it run again and our note of it.
            self._ran_s, self._since = self.entry.kept_s, self._clock.monotonic()
            await self._note(phase=Phase.STARTED)
        if isinstance(driver, Metered) and (handle.spec.kind is MachineKind.VM or not self._kit.owner.paused):
            # A worker before us may have been killed while it throttled it. (Processes are paused by the same signal; hypervisors are not.)
            driver.let_run(handle, True)
        if self.entry.verdict is not None:
            await driver.stop(handle, grace_s=0.0)
        elif self._kit.owner.paused:
            self._since = self._since or self._clock.monotonic()
            await self.suspend()
        else:
            self._stop_watch()
            await self.resume()

    async def _settle_gone(self, driver: Driver) -> None:
        verdict = self.entry.verdict
        if verdict is not None:
            await self.settle(verdict.state, verdict.reason, rests=False)
        elif self.entry.phase is not Phase.PREPARED:
            await self.settle(AttemptState.REFUSED, "the machine was gone when the worker came back", rests=False)
        else:
            # It never ran, so it can be made again.
            await driver.destroy(self._handle())
            self._release()
            await self._note(phase=Phase.FETCHING, handle=None)

    async def _prepare(self) -> None:
        """Fetch disk, context and data, and make the machine's files."""
        if self._kit.owner.paused:
            await self.settle(AttemptState.REFUSED, "", rests=False)
            return
        assignment = self.entry.assignment
        driver = self._kit.drivers.choose(assignment.spec.machine)
        await in_thread(remove_attempt, self._folder)
        await in_thread(make_empty, self._folder)
        self._hold()
        context = await self._supplies.fetch_context()
        program = await self._supplies.fetch_program()
        try:
            data = await self._supplies.fetch_data()
        except NoSpace as error:  # with other jobs' data in its cache; that is no reason to rest
            await self.settle(AttemptState.REFUSED, error.message, rests=False)
            return
        async with self._disk() as disk:
            try:
                spec = self._supplies.machine_spec(disk, context, program, await self._supplies.open_secrets(), data)
                handle = await driver.prepare(spec, self._folder / MACHINE)
                # At once, so that whoever cancels us now knows what to remove.
                self.entry = msgspec.structs.replace(self.entry, handle=handle)
            finally:
                await in_thread(wipe, self._folder / SECRETS)
        await self._note(needed=True, phase=Phase.PREPARED)
        await in_thread(remove, *self._supplies.files())

    @contextlib.asynccontextmanager
    async def _disk(self) -> AsyncIterator[Path | None]:
        """Keep the job's disk in the cache while the block runs, if it is not on this PC already; a process has none."""
        if name := self.entry.assignment.spec.machine.installed_disk:
            yield Path(self._kit.installed.find(name).path)
            return
        ref = self.entry.assignment.disk
        if ref is None:
            yield None
            return
        if ref.disk is not None:
            check_endorsed(self._kit, self.entry.assignment, ref.disk)
        async with self._kit.cache.use(ref, self._supplies.fetch_disk) as disk:
            yield disk

    async def _start(self) -> None:
        await self._released.wait()
        await self._placed.wait()
        async with self._machine_lock:
            if self._kit.owner.paused:
                await self.settle(AttemptState.REFUSED, "", rests=False)
                return
            await self._driver().start(self._handle())
            self._since = self._clock.monotonic()
            await self._note(durably=True, phase=Phase.STARTED, started_at=self._clock.now())
        _log.info("machine_started", **self._names())
        self._kit.changed()

    async def _watch(self) -> None:
        """Follow the machine until it is off, and what it sent last has arrived."""
        await beside(self._await_end(), self._serve(), self._show())
        if self.entry.phase is not Phase.SAVED:
            self._release()

    async def _await_end(self) -> None:
        exited = await beside(self._follow(), self._keep_limits(), self._keep_checkpoints(), self._output.run())
        self._stop_watch()
        if isinstance(exited, Saved):
            async with self._machine_lock:  # whoever saves it may not have noted that yet
                await self._note(phase=Phase.SAVED)
            return
        _log.info("machine_exited", **self._names(), cause=exited.cause.value, detail=exited.detail, ran_s=round(self._ran_s, 1))
        await self._note(phase=Phase.EXITED, exited=exited)
        if self._services is not None and self.entry.verdict is None:
            await self._services.finish()

    async def _revive(self) -> None:
        """Let a machine that is on the disk go on, once the owner lets it."""
        await self._awake.wait()
        if self.entry.verdict is not None:
            await self._note(phase=Phase.EXITED, exited=Exited(ExitCause.STOPPED))
            self._release()
            return
        if self.entry.restores >= _MOST_RESTORES:
            await self.settle(AttemptState.REFUSED, "the machine was killed again and again")
            return
        async with self._machine_lock:
            driver = self._driver()
            if self._kit.owner.paused or not isinstance(driver, Checkpointing):
                self._awake.clear()
                return
            if name := self.entry.assignment.spec.machine.installed_disk:
                self._kit.installed.find(name)  # on a disk that was changed its memory would not know what is where
            await self._note(restores=self.entry.restores + 1)
            await driver.restore(self._handle())
            # What it had told is read again, from its beginning.
            self._output = self._make_output()
            self._ran_s, self._since = self.entry.kept_s, self._clock.monotonic()
            await self._note(durably=True, phase=Phase.STARTED)
        _log.info("machine_restored", **self._names(), ran_s=round(self._ran_s, 1))
        self._kit.changed()

    async def _keep_checkpoints(self) -> None:
        """Write the machine's state to the disk every so often, so that a killed one does not begin anew."""
        interval_s, driver = self._kit.settings.checkpoint_s, self._driver()
        while interval_s > 0 and isinstance(driver, Checkpointing):
            left_s = self._tried_s + interval_s - self.ran_s()
            if left_s > 0 or self._since is None:
                await self._clock.sleep(max(left_s, _RECHECK_S))
                continue
            self._tried_s = self.ran_s()
            async with self._machine_lock:
                if self.running and self._since is not None:
                    await self._checkpoint(driver)

    async def _checkpoint(self, driver: Checkpointing) -> None:
        ran_s = self.ran_s()
        try:
            self._check_room()
            self._kit.unthrottle(self._handle())
            await driver.checkpoint(self._handle())
        except (DeskgridError, OSError) as error:
            _log.warning("no_checkpoint", **self._names(), error=str(error))
            return
        _log.info("checkpoint", **self._names(), ran_s=round(ran_s, 1))
        await self._note(kept_s=ran_s, restores=0)

    def _check_room(self) -> None:
        """Raise NoSpace if the owner's bounds leave no room for the machine's memory on the disk."""
        room, needed = self._kit.result_room(), self.entry.assignment.spec.machine.memory_bytes
        if room < needed:
            raise NoSpace(f"the machine's memory takes {needed >> 20} MiB, and {max(0, room) >> 20} MiB may be used")

    async def _follow(self) -> Exited | Saved:
        events = self._driver().events(self._handle())
        try:
            async for event in events:
                if isinstance(event, Output):
                    self._output.feed(event.stream, event.data)
                elif isinstance(event, Booted):
                    await self._note(booted=True)
                elif isinstance(event, Listening) and self._services is not None:
                    self._services.listening(event.port)
                elif isinstance(event, Exited | Saved):
                    return event
        finally:
            if isinstance(events, AsyncGenerator):
                await events.aclose()
        raise MachineFailed("the driver lost sight of the machine")

    async def _serve(self) -> None:
        """Join the machine with the services that its spec names."""
        driver = self._driver()
        if self._services is not None and isinstance(driver, Caged):
            await self._services.run(driver, self._handle())

    async def _show(self) -> None:
        """Show its screen to its owner, when he wants to see it."""
        if self._console is not None:
            await self._console.run(self._driver(), self._handle())

    async def _keep_limits(self) -> None:
        """End the machine when a limit of the job is passed."""
        while True:
            left_s, reason = self._limit()
            if left_s <= 0:
                grace_s = self._kit.settings.stop_grace_s if self.entry.booted else 0.0
                if not self.entry.booted:
                    await self._take_picture()
                await self.end(Verdict(AttemptState.FAILED, reason), grace_s=grace_s)
                return
            # While it is suspended its time stands still, so look again.
            await self._clock.sleep(left_s if self._since is not None else max(left_s, _RECHECK_S))

    async def _take_picture(self) -> None:
        """Keep what is on the screen, if there is one: it mostly tells why a system does not come up."""
        driver, file = self._driver(), self._folder / _SEEN / _PICTURE
        if not isinstance(driver, Viewable):
            return
        try:
            await in_thread(make_empty, file.parent)
            async with asyncio.timeout(_PICTURE_S):
                await driver.picture(self._handle(), file)
            if file.stat().st_size > _MOST_PICTURE_BYTES:
                raise MachineFailed("the picture is too large")
        except (DeskgridError, OSError) as error:
            await in_thread(remove, file.parent)
            _log.info("no_picture", **self._names(), error=str(error))

    def _limit(self) -> tuple[float, str]:
        """Return the seconds left of the limit that comes first, and what to say when it has come."""
        limits = self.entry.assignment.spec.limits
        wall_s, boot_s = limits.wall_time_s - self.ran_s(), limits.boot_time_s - self.ran_s()
        if not self.entry.booted and boot_s < wall_s:
            return boot_s, f"the guest did not boot within {format_duration(limits.boot_time_s)}"
        return wall_s, f"wall time of {format_duration(limits.wall_time_s)} exceeded"

    async def _collect(self) -> None:
        """Take the result out of the scratch disk of a machine that is off, and judge."""
        exited, verdict = self.entry.exited, self.entry.verdict
        if exited is None:
            raise MachineFailed("nobody knows how the machine ended")
        if verdict is not None and (verdict.state is AttemptState.REFUSED or not self.entry.booted):
            await self.settle(verdict.state, verdict.reason, rests=verdict.rests, result=await self._pack_picture())
            return
        if exited.cause in NOT_THE_JOB or (exited.cause is ExitCause.STOPPED and verdict is None):
            why = NOT_THE_JOB.get(exited.cause, "the machine was stopped from outside")
            await self.settle(AttemptState.REFUSED, f"{why}: {exited.detail}" if exited.detail else why)
            return
        try:
            found = await self._extract()
        except BadImage as error:
            reason = verdict.reason if verdict else f"the scratch file system is damaged or past a limit: {error.message}"
            await self.settle(AttemptState.FAILED, reason)
            return
        for stream, whole in ((Stream.STDOUT, found.stdout), (Stream.STDERR, found.stderr)):
            if len(whole) < _WHOLE_REPORT_BYTES:
                self._output.complete(stream, whole)
        program = "the command" if self.entry.assignment.spec.command else "context.sh"
        state, reason = judge(exited, found, verdict, program=program)
        if not self.entry.assignment.spec.results.paths:
            await self.settle(state, reason, exit_code=found.exit_code)
            return
        result = Blob(sha256=Sha256(found.archive_sha256), size_bytes=found.archive_bytes)
        await self.settle(state, reason, exit_code=found.exit_code, result=result)

    async def _pack_picture(self) -> Blob | None:
        """Make a result of the picture of a machine that never came up, if there is one."""
        seen = self._folder / _SEEN
        if not (seen / _PICTURE).exists():
            return None
        packed = await in_thread(pack_folder, seen, self._folder / _RESULT)
        return Blob(sha256=Sha256(packed.archive_sha256), size_bytes=packed.archive_bytes)

    async def _extract(self) -> ResultReport:
        room = self._kit.result_room()
        if room <= 0:
            raise NoSpace("no room is left for the packed result")
        limits = ExtractLimits(bytes=self._kit.settings.max_result_bytes, archive_bytes=room)
        scratch = self._driver().scratch(self._handle())
        paths = self.entry.assignment.spec.results.paths
        return await self._kit.extract(scratch, self._folder / _RESULT, paths=paths, limits=limits)

    async def _deliver(self) -> None:
        """Remove the machine, then send what comes back; now the slot is free for another."""
        report = self.entry.settled
        if report is None:
            raise MachineFailed("nobody knows how the attempt ended")
        removed = await self.remove_machine()
        if report.result is not None:
            self._kit.changed()
        await self._output.drain()
        if report.result is not None:
            report = await self._upload(report, report.result)
        if removed:
            await in_thread(remove_attempt, self._folder)
            self.disk_bytes = 0
        # One with a result must not look for that again when it has been removed.
        await self._note(durably=report.result is not None, phase=Phase.DONE, report=report)
        _log.info("attempt_done", **self._names(), state=report.state.value, exit_code=report.exit_code, reason=report.reason)
        self._kit.changed()

    async def _upload(self, report: AttemptReport, blob: Blob) -> AttemptReport:
        """Send the packed result; return what is reported: without it, if the server will not have it."""
        failures = 0
        while True:
            try:
                await self._kit.connection.upload(self._folder / _RESULT, blob)
                return report
            except (Unreachable, StoreUnavailable, ProtocolError, Conflict, Unauthenticated) as error:
                failures += 1
                _log.info("result_not_sent_yet", **self._names(), error=str(error), failures=failures)
            except FileNotFoundError:
                return without_result(report, AttemptState.REFUSED, "the packed result was removed from the PC")
            except DeskgridError as error:
                return without_result(report, AttemptState.FAILED, f"the server does not take the result: {error}")
            await self._pause(failures)

    # ---- parts

    async def _settle_error(self, error: Exception) -> None:
        """Turn an error of a step into how the attempt ends."""
        if self.entry.phase is Phase.SETTLED:
            # Nothing may keep a report that is decided from being told; what is left over is removed at the next start.
            _log.error("attempt_not_delivered", **self._names(), exc_info=error)
            report = self.entry.settled or self.report()
            await self._note(phase=Phase.DONE, report=without_result(report, *fault_of(error)))
            self._kit.changed()
            return
        if not isinstance(error, DeskgridError | OSError):
            _log.exception("attempt_broken", **self._names(), exc_info=error)
        state, reason = fault_of(error)
        await self.settle(state, reason)

    async def _note(self, *, needed: bool = False, durably: bool = False, **changes: Any) -> None:
        """Change the entry and journal it, `durably` (journal.py) or not. Raise NoSpace only if it is `needed` before we go on."""
        running = self._since is not None
        self.entry = msgspec.structs.replace(
            self.entry, **changes, ran_s=self.ran_s(), ran_at=self._clock.now() if running else None
        )
        async with self._journal_lock:
            if self._forgotten:
                return
            try:
                await in_thread(self._kit.journal.write, (self.entry,), durably=durably)
            except (NoSpace, OSError) as error:
                if needed:
                    raise
                _log.warning("journal_not_written", **self._names(), error=str(error))

    async def _freeze(self) -> bool:
        self._kit.unthrottle(self._handle())
        driver = self._driver()
        if not isinstance(driver, Suspendable):
            return False
        try:
            await driver.pause(self._handle())
        except MachineFailed as error:
            _log.warning("machine_not_frozen", **self._names(), error=str(error))
            return False
        return True

    async def _save(self) -> str:
        """Write its machine to the disk; return why that was not possible."""
        driver = self._driver()
        if not isinstance(driver, Checkpointing):
            return f"a machine of kind {self._handle().spec.kind} cannot be written to the disk"
        try:
            self._check_room()
            self._kit.unthrottle(self._handle())
            await driver.save(self._handle())
        except (DeskgridError, OSError) as error:
            return f"its machine could not be written to the disk: {error}"
        return ""

    def _make_output(self) -> LiveOutput:
        return LiveOutput(self.id, self._kit.connection, self._clock, self._kit.rng)

    async def _clean(self) -> None:
        """Remove the machine and all files. What cannot be removed now is at the next start."""
        if await self.remove_machine():
            try:
                await in_thread(remove_attempt, self._folder)
            except OSError as error:
                _log.error("files_not_removed", **self._names(), error=str(error))

    async def remove_machine(self) -> bool:
        """Destroy its machine; False if that cannot be done now. Then its folder is left for the next start to find it by."""
        try:
            if self.entry.handle is not None:
                await self._driver().destroy(self.entry.handle)
        except (DeskgridError, OSError) as error:
            _log.error("machine_not_removed", **self._names(), error=str(error))
            return False
        self._release()
        return True

    async def _pause(self, failures: int) -> None:
        settings = self._kit.settings
        await self._clock.sleep(delay_s(failures, first_s=settings.backoff_s, max_s=settings.max_backoff_s, rng=self._kit.rng))

    def _stop_watch(self) -> None:
        self._ran_s, self._since = self.ran_s(), None

    def _hold(self) -> None:
        """Keep in the cache what its machine is made from. Idempotent."""
        if not self._holds:
            self._holds = [self._kit.cache.hold(content) for content in self._supplies.contents()]

    def _release(self) -> None:
        while self._holds:
            self._holds.pop()()

    def _handle(self) -> MachineHandle:
        if self.entry.handle is None:
            raise MachineFailed("there is no machine")
        return self.entry.handle

    def _driver(self) -> Driver:
        return self._kit.drivers.of(self._handle())

    def _names(self) -> dict[str, int]:
        assignment = self.entry.assignment
        return {"attempt_id": self.id, "job_id": assignment.job_id, "number": assignment.number}
