"""Process jobs: native programs in a sandbox (process_sandbox.py), as an ordinary user, with bubblewrap. Linux only.

Where no sandbox can be made and the owner said so (`unsandboxed`), they run without: the same files, process and bounds, but another command line.
Then the job is one of the owner's own programs and can do what he can; only what it is bounded by stays.

The machine's process is process_machine.py; the sandbox's processes end with it. In the machine's folder, besides what base.py lists:

    plan  filter.bpf           what process_machine.py is told, the sandbox's seccomp filter
    context  etc  tmp  shared  what the sandbox sees as /context, /etc, /tmp, /dev/shm
    outcome/scratch            its /scratch, which is the result
    outcome/report             exit, stdout, stderr
    sandbox.json  end.json     what bwrap says of itself; how it ended
    paused                     there while it is frozen
    program.sock               if it is interactive: where its stdin and stdout are handed out

How bounds are enforced: file size, processes (not for root), open files, locked memory, each process's CPU time and data by rlimits;
CPUs by affinity, which the filter lets nobody change; memory, threads, CPU time and disk of all processes together by watching them, so they
can be passed for some milliseconds (memory) up to a quarter of a second (disk) before everything is ended. There is nothing better
for the disk without root.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import marshal
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path

import msgspec
from msgspec import Struct

from deskgrid.clock import Clock
from deskgrid.errors import DeskgridError, InvalidInput, MachineFailed
from deskgrid.machines import cage, process_machine, process_tree, processes, qmp
from deskgrid.machines.base import CONTEXT_FOLDER, STOPPED_MARK, ProcessDriver
from deskgrid.machines.clear_secrets import SECRETS_FOLDER
from deskgrid.machines.context import DATA_FOLDER, OWN_FOLDER, check_places, environment_file, secret_files, services_file
from deskgrid.machines.driver import ExitCause, Exited, MachineEvent, MachineHandle, MachineSpec, Recovery, Saved
from deskgrid.machines.probes import probe_folder
from deskgrid.machines.process_sandbox import (
    Folders,
    bare_environment,
    bare_line,
    confinement_faults,
    environment_of,
    missing,
    missing_bare,
    sandbox_line,
    seccomp_filter,
    system_files,
)
from deskgrid.machines.processes import ProcessIdentity
from deskgrid.machines.sandbox import python_command
from deskgrid.model.machines import DriverName, Fingerprint, MachineKind, Network
from deskgrid.units import MIB

__all__ = ["OUTCOME", "SandboxDriver", "program_version"]

OUTCOME = "outcome"
SCRATCH = f"{OUTCOME}/scratch"
FILTER = "filter.bpf"
_CONTEXT = CONTEXT_FOLDER
_ETC, _TMP, _SHARED = "etc", "tmp", "shared"
_CONTROL_LIMIT_S = 5.0
_CONTROL_POLL_S = 0.005
_PROBE_LIMIT_S = 30.0
_VERSION_LIMIT_S = 10.0
_PROGRAM_LIMIT_S = 20.0
_MOST_SWEEPS = 100


class _End(Struct, frozen=True):
    cause: ExitCause
    detail: str


class SandboxDriver(ProcessDriver):
    """The Driver, Suspendable, Caged and Conversing protocols for programs of this very PC."""

    name = DriverName.PROCESS
    kind = MachineKind.PROCESS

    def __init__(
        self,
        clock: Clock,
        *,
        nice: int = 19,
        overlay: bool = True,
        internet: bool = False,
        probes: Path | None = None,
        unsandboxed: bool = False,
    ) -> None:
        super().__init__(clock, nice=nice, overlay=overlay, internet=internet, probes=probes)
        self._turn = itertools.count()
        self._unsandboxed = unsandboxed
        self._bare = False
        """Jobs have no sandbox: none can be made here, and the owner allows it."""

    # ---- what this PC can do

    async def fingerprint(self) -> Fingerprint:
        """See Driver. Runs a job that looks around in its sandbox; takes 0.1 s."""
        self._bare, self._networks = False, self._allowed
        reason = self._missing() or await self._fault(self._try_out)
        if reason and self._unsandboxed:
            return await self._bare_fingerprint(reason)
        found = Fingerprint(self.name, (self.kind,), not reason, reason, await asyncio.to_thread(self._version))
        return await self._with_networks(found) if found.usable else found

    async def _bare_fingerprint(self, reason: str) -> Fingerprint:
        """Return what can be done without a sandbox, of which there is none for a reason."""
        self._bare, self._networks = True, (Network.NONE,)
        fault = missing_bare() if sys.platform == "linux" else reason
        fault = fault or await self._fault(self._try_bare)
        if fault:
            return Fingerprint(self.name, (self.kind,), usable=False, reason=fault)
        words = f"WITHOUT A SANDBOX, as the owner allows: {reason}; so jobs that need a network are not taken"
        return Fingerprint(self.name, (self.kind,), usable=True, reason=words, networks=self._networks)

    async def _fault(self, try_out: Callable[[], Awaitable[str]]) -> str:
        try:
            async with asyncio.timeout(_PROBE_LIMIT_S):
                return await try_out()
        except TimeoutError:
            return f"the smallest job was not done after {_PROBE_LIMIT_S:.0f} s"
        except (DeskgridError, OSError) as error:
            return f"no job can be run: {error}" if self._bare else f"no sandbox can be made: {error}"

    def _missing(self) -> str:
        return missing() if sys.platform == "linux" else "sandboxes for processes exist only on Linux"

    def _version(self) -> str:
        return program_version("bwrap")

    async def _try_out(self) -> str:
        """Return what is wrong with sandboxes here, "" if nothing."""
        exited, told = await self._probe(_look_around)
        if exited.cause is not ExitCause.POWERED_OFF:
            return f"no sandbox can be made: {exited.detail or exited.cause}{cage.namespaces_hint()}"
        return _judge_probe(told)

    async def _try_bare(self) -> str:
        """Return what is wrong with jobs without sandbox here, "" if nothing."""
        exited, told = await self._probe(lambda _: "echo DONE")
        if told != "DONE\n":
            return f"no job can be run: {exited.detail or exited.cause}"
        return ""

    async def _probe(self, script: Callable[[Path], str]) -> tuple[Exited, str]:
        """Run a script, which is made for the machine's folder, as a job; return its end and what it printed."""
        with probe_folder(self._probes) as folder:
            workdir = folder / "machine"
            spec = MachineSpec("probe", self.kind, 256 * MIB, 1, 16 * MIB, command=("/bin/sh", "-c", script(workdir)))
            handle = await self.prepare(spec, workdir)
            try:
                await self.start(handle)
                async for event in self.events(handle):
                    exited = event  # the last one counts
                assert isinstance(exited, Exited)
                output = workdir / process_machine.REPORT / "stdout"
                return exited, output.read_text(errors="replace") if output.is_file() else ""
            finally:
                await self.destroy(handle)

    # ---- files and command

    def _check(self, spec: MachineSpec) -> None:
        super()._check(spec)
        if spec.kind is not self.kind:
            raise MachineFailed(f"the {self.name} driver makes no {spec.kind}")
        if spec.interactive and not spec.command:
            raise InvalidInput("a program that is to be kept needs a command", where="command")
        environment_file(spec.environment)  # refuses what is no variable
        if any("\0" in word for word in spec.command):
            raise InvalidInput("a word of a command cannot have a NUL", where="command")

    def _make_files(self, handle: MachineHandle) -> None:
        spec, workdir = handle.spec, Path(handle.workdir)
        for name in (OUTCOME, SCRATCH, process_machine.REPORT, _TMP, _SHARED, _ETC, _CONTEXT):
            (workdir / name).mkdir(mode=0o700)
        check_places(spec)
        if spec.context is not None:
            _copy_context(spec.context, workdir / _CONTEXT)
        for name, data in secret_files(spec):
            _add(workdir / _CONTEXT / SECRETS_FOLDER / name, data)
        _add_data(workdir / _CONTEXT / DATA_FOLDER, spec, bare=self._bare)
        _add_network_files(workdir / _CONTEXT, spec)
        for name, text in system_files(spec).items():
            (workdir / _ETC / name).write_text(text)
        if self._bare:
            (workdir / process_machine.UNSANDBOXED_MARK).touch()
        else:
            (workdir / FILTER).write_bytes(seccomp_filter())
        qmp.create_journal(workdir)
        (workdir / process_machine.PLAN_FILE).write_bytes(marshal.dumps(self._plan(handle)))

    def _plan(self, handle: MachineHandle) -> dict[str, object]:
        spec, workdir = handle.spec, Path(handle.workdir)
        networked = spec.network is not Network.NONE
        return {
            "command": self._job_line(handle),
            "environment": bare_environment(spec, self._folders(handle)) if self._bare else environment_of(spec),
            "filter": "" if self._bare else FILTER,
            "sandboxed": not self._bare,
            "memory_bytes": spec.memory_bytes,
            "processes": spec.processes,
            "cpu_time_s": spec.cpu_time_s,
            "lifetime_s": spec.lifetime_s,
            "disk_bytes": spec.scratch_bytes,
            "measured": [str(workdir / name) for name in (OUTCOME, _TMP, _SHARED)],
            "cpu_set": self._choose_cpus(spec.cpus),
            "offer": [port for _, port in spec.offer] if networked else [],
            "forward": _forwards(spec) if networked else [],
            "doors": [(door.host, door.port) for door in spec.reach] if networked else [],
            "interactive": spec.interactive,
        }

    def _job_line(self, handle: MachineHandle) -> list[str]:
        line = bare_line if self._bare else sandbox_line
        return line(handle.spec, self._folders(handle))

    def _folders(self, handle: MachineHandle) -> Folders:
        workdir = Path(handle.workdir)
        return Folders(
            etc=workdir / _ETC,
            context=workdir / _CONTEXT,
            scratch=workdir / SCRATCH,
            tmp=workdir / _TMP,
            shared=workdir / _SHARED,
            program=handle.spec.program,
            data=handle.spec.data,
        )

    def _choose_cpus(self, wanted: int) -> list[int]:
        """Return the CPUs of a machine, each machine starting after the one before; none means all."""
        if not hasattr(os, "sched_getaffinity"):
            return []
        usable = sorted(os.sched_getaffinity(0))
        if wanted <= 0 or wanted >= len(usable):
            return []
        first = next(self._turn) * wanted
        return [usable[(first + place) % len(usable)] for place in range(wanted)]

    async def _command(self, handle: MachineHandle) -> list[str]:
        # A program that is kept ends with its worker. Others go on for one that comes after.
        worker = str(os.getpid()) if handle.spec.interactive else "0"
        return python_command("deskgrid.machines.process_machine", "main", handle.workdir, handle.token, worker)

    # ---- control

    async def _ask_to_stop(self, handle: MachineHandle, identity: ProcessIdentity) -> bool:
        workdir = Path(handle.workdir)
        if not qmp.read_journal(workdir).began or (workdir / process_machine.PAUSED_MARK).exists():
            return False
        processes.send_signal(identity, signal.SIGTERM)
        return True

    async def pause(self, handle: MachineHandle) -> None:
        """See Suspendable. Nothing happens if the machine is off. Raise MachineFailed if it cannot be frozen."""
        await self._control(handle, signal.SIGUSR1, paused=True)

    async def resume(self, handle: MachineHandle) -> None:
        """See Suspendable. Nothing happens if the machine is off."""
        await self._control(handle, signal.SIGUSR2, paused=False)

    def _pids(self, handle: MachineHandle) -> list[int]:
        # Not the one that watches over them.
        return [pid for root in super()._pids(handle) for pid in process_tree.descendants(root)]

    async def _control(self, handle: MachineHandle, number: signal.Signals, *, paused: bool) -> None:
        """Send a signal to the machine's process, once it can take one, and wait for what it does."""
        workdir, identity = Path(handle.workdir), self._identity(handle)
        mark = workdir / process_machine.PAUSED_MARK
        deadline = self._clock.monotonic() + _CONTROL_LIMIT_S
        sent = False
        while identity is not None and processes.is_alive(identity) and (not sent or mark.exists() != paused):
            if self._clock.monotonic() >= deadline:
                raise MachineFailed(f"the job cannot be {'frozen' if paused else 'let run on'}")
            if not sent and qmp.read_journal(workdir).began:
                processes.send_signal(identity, number)
                sent = True
            else:
                await self._clock.sleep(_CONTROL_POLL_S)

    async def connect_program(self, handle: MachineHandle) -> socket.socket:
        """See Conversing."""
        if not handle.spec.interactive:
            raise MachineFailed("the machine has no program to talk to")
        identity = self._identity(handle)
        if identity is None:
            raise MachineFailed("the machine is off")
        path = Path(handle.workdir) / process_machine.PROGRAM_SOCKET
        try:
            async with asyncio.timeout(_PROGRAM_LIMIT_S):
                kind = (socket.AF_UNIX, socket.SOCK_STREAM, 0)
                return await cage.receive_socket(path, lambda: processes.is_alive(identity), kind=kind)
        except TimeoutError as error:
            raise MachineFailed("the machine's program does not answer") from error
        except OSError as error:
            raise MachineFailed(f"the machine's program cannot be reached: {error.strerror or error}") from error

    # ---- the end

    async def events(self, handle: MachineHandle) -> AsyncIterator[MachineEvent]:
        """See Driver."""
        source = super().events(handle)
        async with contextlib.aclosing(source) as events:  # type: ignore[type-var]
            async for event in events:
                if isinstance(event, Exited):
                    await self._sweep(handle)
                yield event

    async def stop(self, handle: MachineHandle, *, grace_s: float) -> None:
        """See Driver."""
        await super().stop(handle, grace_s=grace_s)
        await self._sweep(handle)

    async def destroy(self, handle: MachineHandle) -> None:
        """See Driver."""
        identity = self._identity(handle)
        if identity is not None:
            await self._kill(handle, identity)
        await self._sweep(handle)
        await super().destroy(handle)

    async def recover(self, handle: MachineHandle) -> Recovery:
        """See Driver."""
        found = await super().recover(handle)
        if isinstance(found, Exited):
            await self._sweep(handle)
        return found

    def scratch(self, handle: MachineHandle) -> Path:
        """Return the folder with the result and the report: scratch and report in it (results.py)."""
        return Path(handle.workdir) / OUTCOME

    async def _kill(self, handle: MachineHandle, identity: ProcessIdentity) -> None:
        if _is_bare(handle):
            await asyncio.to_thread(_end_below, identity)
        await super()._kill(handle, identity)

    async def _sweep(self, handle: MachineHandle) -> None:
        """End what is left of the sandbox of a machine whose process was killed: it is about to end, but may not have yet.

        It may even be left alone, if the kill came before bwrap had asked to be ended with its parent. A machine that came to its end has
        nothing left.
        """
        workdir = Path(handle.workdir)
        if (workdir / process_machine.END_FILE).exists():
            return
        for word in (handle.token, str(workdir / SCRATCH)):
            for _ in range(_MOST_SWEEPS):
                found = await asyncio.to_thread(processes.find_by_token, word)
                if found is None:
                    break
                await processes.kill(found, self._clock)
        if _is_bare(handle):
            await self._sweep_bare(str(workdir / _TMP))

    async def _sweep_bare(self, folder: str) -> None:
        """End what is left of a job without sandbox, by the one variable that all its processes have unless they threw it away."""
        for _ in range(_MOST_SWEEPS):
            found = await asyncio.to_thread(processes.find_by_variable, "TMPDIR", folder)
            if not found:
                return
            for identity in found:
                await processes.kill(identity, self._clock)

    def _exit(self, handle: MachineHandle) -> Exited | Saved:
        workdir = Path(handle.workdir)
        if not (workdir / STOPPED_MARK).exists():
            with contextlib.suppress(OSError, msgspec.DecodeError):
                end = msgspec.json.decode((workdir / process_machine.END_FILE).read_bytes(), type=_End)
                return Exited(end.cause, end.detail)
        return super()._exit(handle)


def _is_bare(handle: MachineHandle) -> bool:
    """Tell whether a machine has no sandbox; another worker may have made it."""
    return (Path(handle.workdir) / process_machine.UNSANDBOXED_MARK).exists()


def _end_below(identity: ProcessIdentity) -> None:
    """End all processes below that of a machine, which stands still meanwhile and so stays their parent. Blocks."""
    processes.send_signal(identity, signal.SIGSTOP)
    if processes.is_alive(identity):
        process_tree.end(lambda: process_tree.descendants(identity.pid))


# ---- files


def _copy_context(source: Path, target: Path) -> None:
    """Copy a folder, by hard links where possible: the sandbox sees it read-only. Links are kept; sockets and devices left out."""
    for folder, names, files in os.walk(source):
        place = target / Path(folder).relative_to(source)
        if folder == str(source) and OWN_FOLDER in names:
            names.remove(OWN_FOLDER)
        for name in list(names):
            if Path(folder, name).is_symlink():
                files.append(name)
            else:
                (place / name).mkdir()
                shutil.copymode(Path(folder, name), place / name)
        for name in files:
            _copy_file(Path(folder, name), place / name)


def _copy_file(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(source.readlink())
    elif source.is_file():
        try:
            os.link(source, target)
        except OSError:  # another file system, or a file of somebody else
            shutil.copy2(source, target)


def _add_data(folder: Path, spec: MachineSpec, *, bare: bool) -> None:
    """Make the places over which the sandbox mounts the job's data; without one, links to it."""
    if spec.data:
        folder.mkdir()
    for name, path in spec.data:
        if bare:
            (folder / name).symlink_to(path)
        else:
            (folder / name).touch()


def _add_network_files(context: Path, spec: MachineSpec) -> None:
    """Add what a job with a network finds in /context, but not in the place of the user's own files."""
    if spec.network is Network.NONE:
        return
    _add(context / "services.json", services_file(spec, localhost=frozenset(name for name, _, _ in _doors_at_localhost(spec))))
    if spec.credentials is not None:
        _add(context / "grid" / "credentials.json", spec.credentials.read_bytes())


def _add(file: Path, data: bytes) -> None:
    # Links of the user's are data: nothing of ours is written through them.
    if file.parent.is_symlink() or (file.parent.exists() and not file.parent.is_dir()):
        return
    file.parent.mkdir(exist_ok=True)
    with contextlib.suppress(FileExistsError), open(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as target:
        target.write(data)


def _doors_at_localhost(spec: MachineSpec) -> list[tuple[str, str, int]]:
    """Return name, address and port of the services that are at localhost, too: the first with a port that the job does not offer."""
    taken = {port for _, port in spec.offer}
    found = []
    for door in spec.reach:
        if door.port not in taken:
            taken.add(door.port)
            found.append((door.name, door.host, door.port))
    return found


def _forwards(spec: MachineSpec) -> list[tuple[str, int]]:
    return [(host, port) for _, host, port in _doors_at_localhost(spec)]


# ---- the probe


def _look_around(workdir: Path) -> str:
    """Return a shell script that prints what it sees, and complains about what it should not be able to do."""
    canary = workdir / process_machine.PLAN_FILE
    forbidden = ("/usr/.deskgrid", "/etc/hosts", "/context/x", "/proc/sys/kernel/core_pattern", "/dev/x", "/x")
    tries = "".join(f"(: >>{path}) 2>/dev/null && echo 'FAULT: {path} can be written'\n" for path in forbidden)
    return (
        f"{tries}test -e '{canary}' && echo 'FAULT: the files of the PC can be seen'\n"
        "set -- /proc/[0-9]*; test $# -le 4 || echo 'FAULT: the processes of the PC can be seen'\n"
        "(: >/scratch/x && : >/tmp/x) || echo 'FAULT: its folders cannot be written'\n"
        "echo STATUS; cat /proc/self/status; echo DEVICES; cat /proc/net/dev; echo DONE\n"
    )


def _judge_probe(told: str) -> str:
    """Return what is wrong, by what `_look_around` printed."""
    faults = re.findall(r"^FAULT: (.*)$", told, re.MULTILINE)
    status, _, devices = told.partition("\nDEVICES\n")
    if not told.endswith("DONE\n"):
        faults.append("the smallest job did not come to its end")
    faults += confinement_faults(status, devices.removesuffix("DONE\n"))
    return f"the sandbox does not confine: {'; '.join(faults)}" if faults else ""


def program_version(name: str) -> str:
    """Return the version that a program says it has, "" if it says none."""
    program = processes.find_program(name)
    if program is None:
        return ""
    try:
        done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=_VERSION_LIMIT_S, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    match = re.search(r"(\d+(?:\.\d+)+)", done.stdout)
    return match[1] if match else ""
