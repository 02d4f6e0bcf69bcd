"""A server and a hypervisor in memory, for tests of the worker: they say what happened, and fail on demand."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import random
import shutil
import socket
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import msgspec

from deskgrid.archive import zstd
from deskgrid.clock import FakeClock
from deskgrid.core.owner import Seen
from deskgrid.errors import DeskgridError, Forbidden, MachineFailed, NotFound, ProtocolError, Unauthenticated, Unreachable
from deskgrid.machines.driver import (
    Booted,
    ExitCause,
    Exited,
    Gone,
    MachineEvent,
    MachineHandle,
    MachineSpec,
    Output,
    Running,
    Saved,
    Stream,
)
from deskgrid.machines.results import ResultReport
from deskgrid.model import wire
from deskgrid.model.data import Blob, DataRef, Disk
from deskgrid.model.ids import AttemptId, JobId, Sha256
from deskgrid.model.jobs import AttemptState, JobSpec, Limits, Machine
from deskgrid.model.machines import DiskFormat, DriverName, Fingerprint, MachineKind
from deskgrid.model.placement import Keep
from deskgrid.model.workers import Assignment, AttemptReport
from deskgrid.settings import WorkerSettings
from deskgrid.units import GIB, MIB
from deskgrid.worker.agent import Agent, Term
from deskgrid.worker.home import Home

FINAL = (AttemptState.SUCCEEDED, AttemptState.FAILED, AttemptState.REFUSED)
DISK = b"disk" * 1000
SETTINGS = WorkerSettings(cpus=2, memory_bytes=2 * GIB, disk_bytes=20 * GIB, reserve_bytes=0, stop_grace_s=5.0, release_s=0.0)


def blob_of(content: bytes) -> Blob:
    return Blob(sha256=Sha256(hashlib.sha256(content).hexdigest()), size_bytes=len(content))


def disk_ref(content: bytes = DISK) -> DataRef:
    """A disk that travels as it is (`play_unpack` copies)."""
    blob = blob_of(content)
    disk = Disk(sha256=blob.sha256, size_bytes=len(content), virtual_bytes=len(content), format=DiskFormat.QCOW2)
    return DataRef(blob=blob, disk=disk)


def publish_iso(server: PlayServer) -> DataRef:
    """A disk as it really travels, with an ISO's mark and nothing on it."""
    image = bytearray(1 << 16)
    image[32768:32774] = b"\1CD001"
    packed = zstd.compress(bytes(image))
    server.blobs[blob_of(packed).sha256] = packed
    disk = Disk(sha256=blob_of(bytes(image)).sha256, size_bytes=len(image), virtual_bytes=len(image), format=DiskFormat.ISO)
    return DataRef(blob=blob_of(packed), disk=disk)


class PlayServer:
    """What the worker sees of a server. `waiting` is leased to it as its free CPUs allow."""

    def __init__(self) -> None:
        self.waiting: list[Assignment] = []
        self.leased: dict[AttemptId, Assignment] = {}
        self.told: dict[AttemptId, list[AttemptState]] = defaultdict(list)
        self.final: dict[AttemptId, AttemptReport] = {}
        self.returned: list[AttemptId] = []
        self.cancelled: set[AttemptId] = set()
        self.started: set[AttemptId] = set()
        self.consoles: set[AttemptId] = set()
        self.keep: list[Keep] = []
        self.remove: list[Sha256] = []
        self.syncs: list[wire.Sync] = []
        self.blobs: dict[str, bytes] = {blob_of(DISK).sha256: DISK}
        self.uploads: dict[str, bytes] = {}
        self.downloads: list[str] = []
        self.logs: dict[tuple[AttemptId, str], bytearray] = defaultdict(bytearray)
        self.left = self.down = self.revoked = self.ignores_free = False
        self.answers_to_lose = 0
        self.download_gate = asyncio.Event()
        self.download_gate.set()
        self.upload_gate = asyncio.Event()
        self.upload_gate.set()
        self.uploading = 0
        self.upload_errors: list[DeskgridError] = []
        self.tries = 0
        self._wake = asyncio.Event()
        self._next = 1

    # ---- what a test does

    def submit(
        self,
        *,
        limits: Limits | None = None,
        context: bytes | None = None,
        disk: DataRef | None = None,
        scratch_bytes: int = GIB,
        spec: JobSpec | None = None,
        **assigned: Any,
    ) -> AttemptId:
        """Let a job wait: of a VM, or of a `spec`; `assigned` are fields of its Assignment."""
        number = self._next
        self._next += 1
        needs_disk = spec is None or not (spec.machine.kind is MachineKind.PROCESS or spec.machine.installed_disk)
        spec = spec or JobSpec(
            name=f"job {number}",
            machine=Machine(disk="tiny", memory_bytes=128 * MIB, scratch_bytes=scratch_bytes),
            limits=limits or Limits(),
        )
        if context is not None:
            self.blobs[blob_of(context).sha256] = context
        assignment = Assignment(
            attempt_id=AttemptId(number),
            job_id=JobId(number),
            number=1,
            spec=spec,
            disk=(disk or disk_ref()) if needs_disk else None,
            context=blob_of(context) if context is not None else None,
            **assigned,
        )
        self.waiting.append(assignment)
        self.hint()
        return assignment.attempt_id

    def cancel(self, attempt_id: AttemptId) -> None:
        self.cancelled.add(attempt_id)
        self.hint()

    def hint(self) -> None:
        self._wake.set()

    def go_down(self) -> None:
        self.down = True
        self.hint()

    def state(self, attempt_id: AttemptId) -> AttemptState | None:
        return self.told[attempt_id][-1] if self.told[attempt_id] else None

    # ---- what a worker calls

    async def call(self, route: wire.Route[Any, Any], body: Any = None, **_: Any) -> Any:
        self._check()
        if route is wire.WAKE:
            await self._wake.wait()
            self._wake.clear()
            self._check()
            return wire.Wake(changed=True)
        if route is wire.SYNC:
            answer = self._sync(body)
            if self.answers_to_lose:
                self.answers_to_lose -= 1
                raise Unreachable("the answer was lost")
            return answer
        if route is wire.APPEND_LOG:
            self._append(body)
        if route is wire.LEAVE:
            self.left = True
        return wire.Nothing()

    async def download(self, blob: Blob, file: Path, progress: Callable[[int], None] | None = None) -> None:
        self._check()
        self.downloads.append(blob.sha256)
        content = self.blobs.get(blob.sha256)
        if content is None:
            raise NotFound(f"there is no blob {blob.sha256[:12]} for you")
        have = file.stat().st_size if file.exists() else 0
        with file.open("ab") as output:
            output.write(content[have : have + 100])
            output.flush()
            await self.download_gate.wait()
            self._check()
            output.write(content[have + 100 :])
        if progress:
            progress(len(content))

    async def upload(self, file: Path, blob: Blob, progress: Callable[[int], None] | None = None) -> None:
        self._check()
        if self.upload_errors:
            raise self.upload_errors.pop(0)
        assert blob_of(file.read_bytes()) == blob
        self.uploading += 1
        await self.upload_gate.wait()
        self.uploads[blob.sha256] = file.read_bytes()

    def _check(self) -> None:
        if self.down:
            self.tries += 1
            raise Unreachable("the server is down")
        if self.revoked:
            raise Unauthenticated("this token is not valid (any more)")

    def _sync(self, sync: wire.Sync) -> wire.SyncAnswer:
        self.syncs.append(sync)
        acknowledged, cancelled = [], []
        for report in sync.attempts:
            self.told[report.attempt_id].append(report.state)
            if report.state in FINAL:
                if report.attempt_id in self.leased:
                    self.final.setdefault(report.attempt_id, report)
                acknowledged.append(report.attempt_id)
                self.leased.pop(report.attempt_id, None)
            elif report.attempt_id in self.cancelled or report.attempt_id not in self.leased:
                cancelled.append(report.attempt_id)
        listed = {report.attempt_id for report in sync.attempts}
        for attempt_id in [one for one in self.leased if one not in listed]:
            self.returned.append(attempt_id)
            del self.leased[attempt_id]
        wanted = sync.free.cpus + sum(sync.ahead.values())
        assignments = () if sync.paused else tuple(self._lease(1 if self.ignores_free else wanted))
        return wire.SyncAnswer(
            assignments=assignments,
            acknowledged=tuple(acknowledged),
            cancelled=tuple(cancelled),
            started=tuple(self.started),
            consoles=tuple(self.consoles),
            keep=tuple(self.keep),
            remove=tuple(self.remove),
            lease_s=60.0,
            interval_s=20.0,
        )

    def _lease(self, count: int) -> list[Assignment]:
        given, self.waiting = self.waiting[:count], self.waiting[count:]
        self.leased |= {one.attempt_id: one for one in given}
        return given

    def _append(self, chunk: wire.AppendLog) -> None:
        if chunk.attempt_id not in self.leased:
            raise Forbidden("not this worker's")
        log = self.logs[chunk.attempt_id, chunk.stream]
        assert chunk.offset <= len(log), "a gap"
        log += chunk.data[len(log) - chunk.offset :]


class PlayMachine:
    """One machine: a test tells what happens in it."""

    def __init__(self, spec: MachineSpec, scratch: Path) -> None:
        self.spec = spec
        self.secrets = {file.name: file.read_bytes() for file in spec.secrets.iterdir()} if spec.secrets is not None else {}
        """As they were when it was made."""
        self.scratch = scratch
        self.started = self.off = self.frozen = self.saved = False
        self.checkpoints: list[float] = []
        """When each was made, in the rig's time."""
        self.stops: list[float] = []
        self.happened: list[MachineEvent] = []
        self._news = asyncio.Condition()
        self.outer, self.inner = socket.socketpair()
        """The worker's end and the program's, of a program that is talked to."""

    async def tell(self, *events: MachineEvent) -> None:
        async with self._news:
            self.happened += events
            self.off = self.off or any(isinstance(event, Exited) for event in events)
            if self.off:
                self.inner.close()
            self._news.notify_all()

    async def finish(self, exit_code: int | None = 0, *, stdout: bytes = b"", cause: ExitCause = ExitCause.POWERED_OFF) -> None:
        self.scratch.write_text(json.dumps({"exit_code": exit_code, "stdout": stdout.decode()}))
        outputs = [Output(Stream.STDOUT, stdout)] if stdout else []
        await self.tell(*outputs, Exited(cause))

    async def turn_off(self) -> None:
        """End without a word, as if the PC lost its power: it can go on from its last checkpoint, if it has one."""
        self.saved = bool(self.checkpoints)
        await self.tell(Saved() if self.saved else Exited(ExitCause.KILLED))

    async def events(self) -> AsyncIterator[MachineEvent]:
        seen = 0
        while True:
            async with self._news:
                while len(self.happened) == seen:
                    await self._news.wait()
            while seen < len(self.happened):
                seen += 1
                yield self.happened[seen - 1]
                if isinstance(self.happened[seen - 1], Exited | Saved):
                    return


class Pc:
    """What outlives a worker: the machines."""

    def __init__(self) -> None:
        self.machines: dict[str, PlayMachine] = {}
        self.made: list[PlayMachine] = []
        self.destroyed: list[str] = []

    @property
    def machine(self) -> PlayMachine:
        """The newest machine."""
        return self.made[-1]


class PlayDriver:
    """Driver, Suspendable and Conversing over a Pc."""

    def __init__(self, pc: Pc) -> None:
        self.pc = pc
        self.usable = True
        self.errors: dict[str, Exception] = {}
        """Raised by the method of that name."""
        self.prepare_gate = asyncio.Event()
        self.prepare_gate.set()

    async def fingerprint(self) -> Fingerprint:
        return Fingerprint(DriverName.FAKE, (MachineKind.VM, MachineKind.PROCESS), self.usable, "" if self.usable else "no CPU")

    async def prepare(self, spec: MachineSpec, workdir: Path) -> MachineHandle:
        self._raise("prepare")
        assert spec.kind is MachineKind.PROCESS or (spec.disk is not None and spec.disk.is_file())
        workdir.mkdir(parents=True)
        try:
            await self.prepare_gate.wait()
        except asyncio.CancelledError:
            shutil.rmtree(workdir)
            raise
        machine = PlayMachine(spec, workdir / "scratch")
        machine.scratch.write_text(json.dumps({"exit_code": None, "stdout": ""}))
        self.pc.machines[str(workdir)] = machine
        self.pc.made.append(machine)
        return MachineHandle("fake", str(workdir), spec, "token")

    async def start(self, handle: MachineHandle) -> None:
        self._raise("start")
        self.pc.machines[handle.workdir].started = True

    def events(self, handle: MachineHandle) -> AsyncIterator[MachineEvent]:
        return self.pc.machines[handle.workdir].events()

    async def stop(self, handle: MachineHandle, *, grace_s: float) -> None:
        machine = self.pc.machines.get(handle.workdir)
        if machine is not None and not machine.off:
            machine.stops.append(grace_s)
            await machine.tell(Exited(ExitCause.STOPPED))

    async def destroy(self, handle: MachineHandle) -> None:
        self._raise("destroy")
        machine = self.pc.machines.pop(handle.workdir, None)
        if machine is not None:
            machine.outer.close()
            machine.inner.close()
        self.pc.destroyed.append(handle.workdir)
        shutil.rmtree(handle.workdir, ignore_errors=True)

    async def recover(self, handle: MachineHandle) -> Running | Exited | Gone:
        machine = self.pc.machines.get(handle.workdir)
        if machine is None or not machine.started:
            return Gone()
        return Exited(ExitCause.POWERED_OFF) if machine.off else Running()

    def scratch(self, handle: MachineHandle) -> Path:
        return self.pc.machines[handle.workdir].scratch

    async def pause(self, handle: MachineHandle) -> None:
        self._raise("pause")
        self.pc.machines[handle.workdir].frozen = True

    async def resume(self, handle: MachineHandle) -> None:
        self._raise("resume")
        self.pc.machines[handle.workdir].frozen = False

    async def connect_program(self, handle: MachineHandle) -> socket.socket:
        self._raise("connect_program")
        return self.pc.machines[handle.workdir].outer.dup()

    def _raise(self, method: str) -> None:
        if method in self.errors:
            raise self.errors[method]


class ScreenDriver(PlayDriver):
    """With Viewable, too."""

    async def picture(self, handle: MachineHandle, file: Path) -> None:
        self._raise("picture")
        assert not self.pc.machines[handle.workdir].off
        file.write_bytes(b"picture")


class ConsoleDriver(PlayDriver):
    """With HasConsole, too: what is typed comes back."""

    def __init__(self, pc: Pc) -> None:
        super().__init__(pc)
        self.passwords: list[str] = []
        self._showing: list[asyncio.Task[None]] = []

    async def attach_console(self, handle: MachineHandle, connection: socket.socket, password: str) -> None:
        self._raise("attach_console")
        assert not self.pc.machines[handle.workdir].off
        self.passwords.append(password)
        reader, writer = await asyncio.open_connection(sock=connection.dup())

        async def answer() -> None:
            writer.write(b"RFB 003.008\n")
            with contextlib.suppress(OSError):
                while data := await reader.read(1 << 16):
                    writer.write(data)
            writer.close()

        self._showing.append(asyncio.create_task(answer()))


class SavingDriver(PlayDriver):
    """With Checkpointing, too."""

    def __init__(self, pc: Pc, clock: FakeClock) -> None:
        super().__init__(pc)
        self.clock = clock
        self.restored = 0
        self.save_gate = asyncio.Event()
        self.save_gate.set()

    async def checkpoint(self, handle: MachineHandle) -> None:
        self._raise("checkpoint")
        machine = self.pc.machines[handle.workdir]
        if machine.off:
            raise MachineFailed("the machine is off")
        machine.checkpoints.append(self.clock.now())

    async def save(self, handle: MachineHandle) -> None:
        self._raise("save")
        await self.save_gate.wait()
        await self.checkpoint(handle)
        await self.pc.machines[handle.workdir].turn_off()

    async def fall_back(self, handle: MachineHandle) -> bool:
        self._raise("fall_back")
        machine = self.pc.machines[handle.workdir]
        if machine.checkpoints and not machine.off:
            await machine.turn_off()
        return machine.saved

    async def restore(self, handle: MachineHandle) -> None:
        self._raise("restore")
        machine = self.pc.machines[handle.workdir]
        assert machine.saved
        machine.happened.remove(Saved())
        machine.saved = machine.frozen = False
        self.restored += 1

    async def recover(self, handle: MachineHandle) -> Running | Saved | Exited | Gone:  # type: ignore[override]
        machine = self.pc.machines.get(handle.workdir)
        return Saved() if machine is not None and machine.saved else await super().recover(handle)


class MeteredDriver(PlayDriver):
    """With Metered, too: `busy` uses a CPU for as long as it may run."""

    def __init__(self, pc: Pc, clock: FakeClock) -> None:
        super().__init__(pc)
        self.clock = clock
        self.busy: PlayMachine | None = None
        self.runs = True
        self._counted_at = clock.monotonic()
        self._used_s = 0.0

    @property
    def used_s(self) -> float:
        now = self.clock.monotonic()
        idle = self.busy is None or self.busy.frozen or not self.runs
        self._used_s += 0.0 if idle else now - self._counted_at
        self._counted_at = now
        return self._used_s

    def cpu_time_s(self, handle: MachineHandle) -> float:
        return self.used_s

    def let_run(self, handle: MachineHandle, run: bool) -> None:
        assert self.used_s >= 0
        self.runs = run


class PlaySight:
    """What is seen of a PC, as a test says."""

    def __init__(self, clock: FakeClock) -> None:
        self.seen = Seen(weekday=0, minute=0, idle_s=1e9, busy_cpus=0.0)
        self.looks: list[float] = []
        self._clock = clock

    async def look(self) -> Seen:
        self.looks.append(self._clock.now())
        return self.seen

    def change(self, **values: Any) -> None:
        self.seen = msgspec.structs.replace(self.seen, **values)

    async def close(self) -> None:
        pass


async def play_unpack(transport: Path, output: Path, *, sha256: str, base: Path | None = None, **_: Any) -> None:
    """Disks travel as they are, and a delta is what is to be added to the older disk."""
    content = (base.read_bytes() if base else b"") + transport.read_bytes()
    if base is not None and hashlib.sha256(content).hexdigest() != sha256:
        raise ProtocolError("the disk is not the one that was promised")
    output.write_bytes(content)
    output.chmod(0o444)


class Threads(ThreadPoolExecutor):
    """Threads that say whether one of them is at work."""

    def __init__(self) -> None:
        super().__init__()
        self.at_work: set[Future[Any]] = set()

    def submit(self, *args: Any, **kwargs: Any) -> Future[Any]:  # type: ignore[override]
        future = super().submit(*args, **kwargs)
        self.at_work.add(future)
        future.add_done_callback(self.at_work.discard)
        return future


class Rig:
    """A home, a server, a PC, and the workers that come and go on it."""

    def __init__(self, folder: Path) -> None:
        self.home = Home(folder / "home")
        self.clock = FakeClock()
        self.server = PlayServer()
        self.pc = Pc()
        self.driver = PlayDriver(self.pc)
        self.sight = PlaySight(self.clock)
        self.threads = Threads()
        self.free_bytes = 100 * GIB
        self.extract_error: Exception | None = None
        self.authority_pem = ""
        self.overlay: Any = None
        """Its part in the overlay: none."""

    async def extract(self, image: Path, output: Path, **_: Any) -> ResultReport:
        if self.extract_error:
            raise self.extract_error
        found = json.loads(image.read_text())
        content = f"packed {output.parent.name}".encode()
        output.write_bytes(content)
        return ResultReport(
            exit_code=found["exit_code"],
            stdout=found["stdout"].encode(),
            stderr=b"",
            files=1,
            bytes=1,
            archive_bytes=len(content),
            archive_sha256=blob_of(content).sha256,
            clean=True,
        )

    def cached_disk(self) -> Path:
        """Return where the one disk is that jobs need."""
        ref = disk_ref()
        assert ref.disk is not None
        return self.home.cache / f"{ref.disk.sha256}-{ref.blob.sha256}"

    def agent(self, settings: WorkerSettings = SETTINGS, term: Term | None = None) -> Agent:
        return Agent(
            self.home,
            settings,
            self.server,
            [self.driver],
            clock=self.clock,
            rng=random.Random(1),
            name="pc",
            address="grid",
            free_bytes=lambda _: self.free_bytes,
            sight=self.sight,
            authority_pem=self.authority_pem,
            unpack=play_unpack,
            extract=self.extract,
            overlay=self.overlay,
            term=term,
        )

    @asynccontextmanager
    async def working(
        self, settings: WorkerSettings = SETTINGS, *, keep: bool = False, step_s: float = 0.01
    ) -> AsyncIterator[Agent]:
        """Run a worker during the block; `keep` leaves its machines, as a kill would. Time goes in these steps while it ends."""
        asyncio.get_running_loop().set_default_executor(self.threads)
        agent = self.agent(settings)
        task = asyncio.create_task(agent.run())
        try:
            yield agent
        finally:
            agent.stop(keep=keep)
            with contextlib.suppress(Unauthenticated):
                await self.through(task, step_s=step_s)

    async def through(self, task: asyncio.Task[Any], *, step_s: float = 0.01) -> Any:
        """Let time pass until a task is done."""
        await self.until(task.done, step_s=step_s)
        return task.result()

    async def until(self, condition: Callable[[], object], *, limit_s: float = 10.0, step_s: float = 0.01) -> None:
        """Let a little time pass until something is so. It stands still while a thread is at work, however slow this machine is."""
        deadline = time.monotonic() + limit_s
        while not condition():
            assert time.monotonic() < deadline, "it did not come to that"
            await self.clock.advance(step_s)
            await asyncio.sleep(0.001)
            while self.threads.at_work and time.monotonic() < deadline:
                await asyncio.sleep(0.001)

    async def running(self, **job: Any) -> AttemptId:
        """Submit a job and return once its machine has booted."""
        attempt_id = self.server.submit(**job)
        count = len(self.pc.made)
        await self.until(lambda: len(self.pc.made) > count and self.pc.machine.started)
        await self.pc.machine.tell(Booted())
        await self.until(lambda: self.server.state(attempt_id) is AttemptState.RUNNING)
        return attempt_id

    async def ended(self, attempt_id: AttemptId) -> AttemptReport:
        """Return the final report once the worker has forgotten the attempt."""
        await self.until(lambda: attempt_id in self.server.final and not self.journalled())
        return self.server.final[attempt_id]

    def journalled(self) -> list[dict[str, Any]]:
        found = []
        for path in sorted(self.home.journal.glob("*.json")):
            with contextlib.suppress(FileNotFoundError):  # forgotten since it was listed
                found.append(msgspec.json.decode(path.read_bytes()))
        return found

    def nothing_left(self) -> bool:
        """No machine, no file of an attempt, no journal entry."""
        return not self.pc.machines and not list(self.home.attempts.iterdir()) and not list(self.home.journal.iterdir())
