"""Processes that outlive us: started in a session of their own, found again after a restart, never mistaken for another.

A process is known by its id and the moment it began, since ids are used again. What we start has its machine's token among
its arguments, so it is found even if we were killed between starting it and writing its identity down.
"""

from __future__ import annotations

import asyncio
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import msgspec
import psutil
from msgspec import Struct

from deskgrid.clock import Clock
from deskgrid.errors import MachineFailed
from deskgrid.machines import process_tree

__all__ = [
    "ProcessIdentity",
    "find_by_token",
    "find_by_variable",
    "find_program",
    "forget_identity",
    "gently",
    "identify",
    "is_alive",
    "kill",
    "read_identity",
    "send_signal",
    "spawn",
    "threads_of_user",
    "wait_ended",
    "wait_gone",
    "write_identity",
]

_POLL_S = 0.01
_IDENTITY_FILE = "process.json"
MOST_FILES = 4096
"""That one machine's process may have open."""
_SYSTEM_FOLDERS = ("/usr/local/sbin", "/usr/sbin", "/sbin", "/opt/homebrew/bin")
"""Where mke2fs and the like may be without being on an ordinary user's PATH."""

_found: dict[tuple[str, str], str] = {}
"""Programs by name and PATH, which are looked for with every job."""
_children: dict[int, subprocess.Popen[bytes]] = {}
"""Those of our own that may have to be reaped; a worker started later is not their parent and has none."""


class ProcessIdentity(Struct, frozen=True):
    """One process of this machine since it was switched on."""

    pid: int
    began: str
    """When it began, in the system's own terms; compared, never computed with."""


def find_program(name: str) -> str | None:
    """Return the path of a program, also from the folders that only root has on PATH; None if there is none."""
    path = os.environ.get("PATH", os.defpath)
    found = _found.get((name, path))
    if found is None or not os.access(found, os.X_OK):
        found = shutil.which(name, path=path) or shutil.which(name, path=os.pathsep.join(_SYSTEM_FOLDERS))
        if found is not None:
            _found[name, path] = found
    return found


def gently(command: Sequence[str], *, nice: int, cpu_time_s: float = 0.0) -> list[str]:
    """Return a command line that runs `command` at low CPU and IO priority, within a CPU time and a number of open files, and
    without core dumps.

    Each program in front replaces itself by the next, so the process id stays. Those that this PC lacks are left out.
    """
    bounds = ["--core=0", *_file_bound(), *([f"--cpu={int(cpu_time_s) + 1}"] if cpu_time_s > 0 else [])]
    chain = (("nice", "-n", str(nice)), ("ionice", "-c", "3"), ("prlimit", *bounds, "--"))
    found = [(program, arguments) for name, *arguments in chain if (program := find_program(name))]
    return [word for program, arguments in found for word in (program, *arguments)] + list(command)


def _file_bound() -> list[str]:
    """Each connection of a guest is an open file of its hypervisor, and two of ours."""
    try:
        import resource
    except ImportError:  # Windows, where prlimit is not either
        return []
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return [f"--nofile={MOST_FILES if hard == resource.RLIM_INFINITY else min(hard, MOST_FILES)}"]


def spawn(command: Sequence[str], *, cwd: Path, log: Path) -> ProcessIdentity:
    """Start a process in a new session, its output appended to `log`. Raise MachineFailed if it cannot be started."""
    try:
        with log.open("ab") as output:
            child = subprocess.Popen(
                command, cwd=cwd, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
    except OSError as error:
        raise MachineFailed(f"{command[0]} cannot be started: {error.strerror}") from error
    _children[child.pid] = child
    # A child of ours keeps its id until we reap it, even if it ended already.
    return ProcessIdentity(child.pid, _began(child.pid) or "ended")


def is_alive(identity: ProcessIdentity) -> bool:
    """Tell whether the process runs (or is frozen); one that only waits to be reaped does not."""
    alive = _began(identity.pid) == identity.began
    # After that look: whoever hears that it has ended asks no more, and then it must have been reaped.
    child = _children.get(identity.pid)
    if child is not None and child.poll() is not None:
        _children.pop(identity.pid, None)
    return alive


def send_signal(identity: ProcessIdentity, number: signal.Signals) -> None:
    """Send a signal to this very process; nothing happens if it is gone."""
    try:
        if not hasattr(os, "pidfd_open"):
            if is_alive(identity):
                os.kill(identity.pid, number)
            return
        # Open first, compare then: the descriptor cannot come to mean another process.
        descriptor = os.pidfd_open(identity.pid)
        try:
            if is_alive(identity):
                signal.pidfd_send_signal(descriptor, number)
        finally:
            os.close(descriptor)
    except ProcessLookupError:
        return


async def wait_gone(identity: ProcessIdentity, clock: Clock, *, limit_s: float) -> bool:
    """Wait until the process is gone; False if it still runs after `limit_s`."""
    deadline = clock.monotonic() + limit_s
    while is_alive(identity):
        if clock.monotonic() >= deadline:
            return False
        await clock.sleep(_POLL_S)
    return True


async def wait_ended(identity: ProcessIdentity, clock: Clock, seconds: float) -> None:
    """Sleep for so long, or shorter if the process ends meanwhile."""
    try:
        descriptor = os.pidfd_open(identity.pid)
    except (AttributeError, OSError):  # not Linux, or it is gone
        await clock.sleep(seconds if not hasattr(os, "pidfd_open") else 0.0)
        return
    loop = asyncio.get_running_loop()
    sleep = asyncio.ensure_future(clock.sleep(seconds))
    loop.add_reader(descriptor, sleep.cancel)
    try:
        await asyncio.wait((sleep,))
    finally:
        loop.remove_reader(descriptor)
        os.close(descriptor)
        sleep.cancel()


async def kill(identity: ProcessIdentity, clock: Clock, *, limit_s: float = 20.0) -> None:
    """End the process and wait for it. Idempotent. Raise MachineFailed if the system cannot end it in time."""
    send_signal(identity, signal.SIGKILL)
    if not await wait_gone(identity, clock, limit_s=limit_s):
        raise MachineFailed(f"process {identity.pid} does not end", hint="it may hang in a broken disk or driver; restart the PC")


def find_by_token(token: str) -> ProcessIdentity | None:
    """Return the process of our own user that has `token` within its arguments."""
    found = {}
    for process in psutil.process_iter(["cmdline", "ppid"]):
        if process.pid == os.getpid() or not any(token in word for word in process.info["cmdline"] or ()):
            continue
        began = _began(process.pid)
        if began is not None and _is_ours(process):
            found[process.pid] = (process.info["ppid"], ProcessIdentity(process.pid, began))
    # A child has its parent's arguments until it becomes another program.
    return next((identity for parent, identity in found.values() if parent not in found), None)


def find_by_variable(name: str, value: str) -> list[ProcessIdentity]:
    """Return the processes of our own user that were started with this variable, not ourselves."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get(name) == value and _is_ours(process):
                began = _began(process.pid)
                if began is not None:
                    found.append(ProcessIdentity(process.pid, began))
        except (psutil.Error, OSError):
            continue
    return found


def threads_of_user() -> int:
    """Return how many threads our own user has now, as the kernel counts them for RLIMIT_NPROC."""
    told = (process.info["num_threads"] for process in psutil.process_iter(["num_threads"]) if _is_ours(process))
    return sum(threads or 0 for threads in told)


def identify(pid: int, word: str = "") -> ProcessIdentity | None:
    """Return the process of our own user that has this id now, if `word`, where given, is one of its arguments."""
    began = _began(pid)
    try:
        process = psutil.Process(pid)
        if began is None or (word and word not in process.cmdline()) or not _is_ours(process):
            return None
    except psutil.Error:
        return None
    return ProcessIdentity(pid, began)


def write_identity(workdir: Path, identity: ProcessIdentity) -> None:
    """Keep the identity in `workdir`, whole or not at all."""
    temporary = workdir / f"{_IDENTITY_FILE}.new"
    temporary.write_bytes(msgspec.json.encode(identity))
    temporary.replace(workdir / _IDENTITY_FILE)


def read_identity(workdir: Path) -> ProcessIdentity | None:
    """Return what `write_identity` kept, or None."""
    try:
        return msgspec.json.decode((workdir / _IDENTITY_FILE).read_bytes(), type=ProcessIdentity)
    except (FileNotFoundError, NotADirectoryError, msgspec.DecodeError):
        return None


def forget_identity(workdir: Path) -> None:
    """Remove what `write_identity` kept. Idempotent."""
    (workdir / _IDENTITY_FILE).unlink(missing_ok=True)


def _is_ours(process: psutil.Process) -> bool:
    if not hasattr(os, "getuid"):
        return True
    try:
        return bool(process.uids().real == os.getuid())
    except psutil.Error:
        return False


def _began(pid: int) -> str | None:
    """Return the mark of a living process's beginning, None if there is none."""
    if sys.platform == "linux":
        return _began_linux(pid)
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else repr(process.create_time())
    except psutil.Error:
        return None


@functools.cache
def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _began_linux(pid: int) -> str | None:
    """Clock ticks since the boot, and which boot (proc(5)): unlike psutil's time of day, these never move with the clock."""
    stat = process_tree.read_proc(f"/proc/{pid}/stat")
    try:
        boot = _boot()
    except OSError:
        return None
    if not stat:
        return None
    # The name in parentheses may itself have blanks and parentheses; the state follows it.
    fields = stat[stat.rindex(b")") + 2 :].split()
    state, threads, start_ticks = fields[0], int(fields[17]), fields[19]
    # A first thread that has ended while others have not yet still holds its files and their locks.
    return None if state == b"X" or (state == b"Z" and threads <= 1) else f"{boot}:{start_ticks.decode()}"
