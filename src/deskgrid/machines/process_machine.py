"""The process of a machine that is a sandboxed program or a container: starts it, watches its bounds, and leaves its report.

    nice ... [cage_entry] -- this program -- bwrap -- pid 1 of the sandbox -- prlimit -> the job's command -- ...

It is outside of the sandbox and, with a network, inside the cage. It starts anew with every job, so of the standard library it imports only what is there in no time: `_signal` and `marshal`, not `signal` and
`json`. It reads `plan` and leaves the traces that QEMU and an agent leave: the channel, the journal, and in `outcome/report` stdout, stderr and exit.
Nothing that the job can write is opened by a name: its output comes through descriptors.

Signals: USR1 freezes the job and then makes the file `paused`, USR2 lets it go on and removes that file, TERM asks it to end. KILL takes the
sandbox along (PR_SET_PDEATHSIG): whoever ends a machine ends this process.

Where the owner allows it a job has no sandbox (`sandboxed` is false): it is a child of this process, and what it leaves alone becomes one. Then
whoever kills this process has to end those below it first.

A program that is kept for many jobs ends with the worker that started it, however that ends. Other jobs go on, for a worker that comes after.

Bounds. What the kernel does not bound for us is looked at, the more often the more happens and the nearer the bound on memory is, and past it
everything is ended:

    memory          RSS of all processes; above the bound PSS, which counts once what they share
    threads         of all processes (besides RLIMIT_NPROC, which does not hold for root)
    CPU time        of all processes (besides RLIMIT_CPU, which holds for each)
    lifetime        seconds that it was not frozen: more than its worker gives it, in case there is none any more
    disk            blocks of scratch, tmp and shared memory, and of files without a name that are held open
"""

from __future__ import annotations

import ctypes
import marshal
import os
import select
import sys
import time

from deskgrid.machines.folders import OutOfBounds, folder_bytes
from deskgrid.machines.process_tree import deleted_bytes, descendants, end, freeze, ignoring, proportional_bytes, send, thaw, usage

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable
    from typing import Any
else:
    import _signal

__all__ = [
    "CHANNEL", "END_FILE", "JOURNAL", "PAUSED_MARK", "PLAN_FILE", "PROGRAM_SOCKET", "REPORT", "SANDBOX_FILE",
    "UNSANDBOXED_MARK", "main",
]  # fmt: skip

PLAN_FILE = "plan"
"""A dict, by marshal: this very Python wrote it, before there was a job."""
UNSANDBOXED_MARK = "unsandboxed"
CHANNEL, JOURNAL = "channel.log", "journal.out"
"""As base.py and qmp.py name them."""
REPORT = "outcome/report"
END_FILE = "end.json"
"""How it ended, once nothing of it is left: cause and detail of an `Exited`."""
SANDBOX_FILE = "sandbox.json"
"""What bwrap says of itself, a JSON object a line: the first with the host's id of the sandbox's pid 1, written before that one may go on."""
PAUSED_MARK = "paused"
PROGRAM_SOCKET = "program.sock"
FILTER_FD, STATUS_FD, FIRST_FREE_FD = 3, 4, 10

_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_DUMPABLE = 4
_PR_SET_NO_NEW_PRIVS = 38
_TOLD_BYTES = 1 << 20
"""Of each stream; the rest is in the report only."""
_CHUNK_BYTES = 64 << 10
_DOORS_S, _DOORS_POLL_S = 20.0, 0.005
_TICK_MIN_S, _TICK_MAX_S, _QUIET_TICK_S = 0.01, 0.1, 0.25
"""Between looks: the first when there is news, the last when there is none, and processes and threads are the same as before."""
_FILL_BYTES_PER_S = 4 << 30
"""How fast memory may fill: when the bound is that near, we look again that soon."""
_SHORTEST_TICK_S = 0.003
_DISK_S = 0.25
_DISK_SHARE = 20
"""Looking at the disk may take this part of our time."""
_LISTEN = "0A"
_IPV4_DIGITS = 8
_ANY_OR_LOOPBACK = frozenset({"0.0.0.0", "127.0.0.1", "0" * 32, "0" * 16 + "FFFF00000100007F"})  # noqa: S104 compared only
"""Addresses at which the worker's connections to 127.0.0.1 arrive."""


class LimitPassed(Exception):
    """The job is past one of its bounds; the message says which, for its user."""


def main() -> None:
    """Run one machine: arguments are its folder, its token (which is there only to be found) and the process with which it ends, or 0.

    Exit with 0 if all is told.
    """
    os.chdir(sys.argv[1])
    # The job has our user id.
    _prctl(_PR_SET_DUMPABLE, 0)
    # So that the sandbox's pid 1, whose parent ends before it, becomes our child, and we know when it is gone.
    _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    with open(PLAN_FILE, "rb") as file:
        plan: dict[str, Any] = marshal.load(file)  # noqa: S302 ours
    if not plan["sandboxed"]:
        _prctl(_PR_SET_NO_NEW_PRIVS, 1)  # no sudo; in the sandbox bwrap sees to that
    Machine(plan, int(sys.argv[3])).run()


class Machine:
    """One job's processes, from their start to the report."""

    def __init__(self, plan: dict[str, Any], worker: int) -> None:
        self._plan = plan
        self._worker = worker
        self._ran_s = 0.0
        self._streams = (_Stream(f"{REPORT}/stdout", b"1"), _Stream(f"{REPORT}/stderr", b"2"))
        self._signals: set[int] = set()
        self._silent: set[int] = set(plan["offer"])
        """Offered ports on which nothing listens yet."""
        self._stopping = self._paused = False
        self._child = 0
        self._init = 0
        self._known: tuple[list[int], int] = ([], 0)
        """The job's processes at the last look, and how many threads they had."""
        self._disk = _Disk(plan)
        self._tick_s = _TICK_MIN_S
        self._program: _Program | None = None
        self._status: int | None = None
        """Exit code of what we started."""

    def run(self) -> None:
        """Start, watch, and tell how it ended."""
        wake = self._catch_signals()
        _append(JOURNAL, b'{"QMP": {}}\n')  # from here on we may be sent signals
        if self._plan["interactive"]:
            self._program = _Program()
        forwards = self._forward()
        self._await_doors()
        _append(CHANNEL, b"! booted\n! context-started\n")
        if self._plan["cpu_set"]:
            os.sched_setaffinity(0, self._plan["cpu_set"])
        self._child = self._start()
        limit = ""
        try:
            self._watch(wake, forwards)
        except LimitPassed as passed:
            limit = str(passed)
        self._end_all()
        self._tell_end(limit)

    # ---- start

    def _start(self) -> int:
        """Start the sandbox; return its process id."""
        plan = self._plan
        files = [os.open(os.devnull, os.O_RDONLY), *(self._create(stream.path) for stream in self._streams)]
        if self._program is not None:
            for number in files[:2]:
                os.close(number)
            files[0] = files[1] = self._program.inner.fileno()
        files.append(os.open(plan["filter"] or os.devnull, os.O_RDONLY))
        files.append(self._create(SANDBOX_FILE))
        # First away from the numbers that they are to have, so that none overwrites another.
        import fcntl

        spare = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, FIRST_FREE_FD) for number in files]
        for number in set(files):
            os.close(number)
        if self._program is not None:
            self._program.inner.detach()
        command = plan["command"]
        child = os.posix_spawn(
            command[0],
            command,
            plan["environment"],
            file_actions=[(os.POSIX_SPAWN_DUP2, number, place) for place, number in enumerate(spare)],
            setsigdef=[_signal.SIGPIPE, _signal.SIGXFSZ],  # Python ignores these two, and what is ignored stays so
        )
        for number in spare:
            os.close(number)
        return child

    @staticmethod
    def _create(path: str) -> int:
        return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)

    def _catch_signals(self) -> int:
        """Return a descriptor that becomes readable with a _signal."""
        reader, writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        _signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
        for number in (_signal.SIGTERM, _signal.SIGUSR1, _signal.SIGUSR2):
            _signal.signal(number, lambda got, _: self._signals.add(got))
        return reader

    def _await_doors(self) -> None:
        """Wait until the worker listens for the job's services: a program starts so fast that it would find them closed.

        Not for ever, for the worker may be away, and not if we are asked for something.
        """
        wanted = {(host, port) for host, port in self._plan["doors"]}
        if not wanted:
            return  # the table of a PC with many connections takes long to read
        deadline = time.monotonic() + _DOORS_S
        while wanted - _listeners() and time.monotonic() < deadline and not self._signals:
            time.sleep(_DOORS_POLL_S)

    def _forward(self) -> Any:
        """Lead localhost:PORT to the job's services, too: many programs know no other place for their server."""
        if not self._plan["forward"]:
            return None
        from deskgrid.machines.process_forward import Forwards  # most jobs have no network and should start fast

        return Forwards(self._plan["forward"])

    # ---- watch

    def _watch(self, wake: int, forwards: Any) -> None:
        """Return when the job's command has ended. Raise LimitPassed."""
        poll = select.poll()
        ended = os.pidfd_open(self._child)
        poll.register(ended, select.POLLIN)
        poll.register(wake, select.POLLIN)
        if self._program is not None:
            poll.register(self._program.listener, select.POLLIN)
        worker = -1
        if self._worker:
            with ignoring(ProcessLookupError):
                worker = os.pidfd_open(self._worker)
                poll.register(worker, select.POLLIN)
            if os.getppid() != self._worker:  # it has ended already
                self._stopping = True
                return
        seen = time.monotonic()
        while True:
            ready = {number for number, _ in poll.poll(self._tick_s * 1000)}
            if ended in ready:
                return
            if worker in ready:
                self._stopping = True
                return
            now = time.monotonic()
            self._ran_s += 0.0 if self._paused else now - seen
            seen = now
            if wake in ready:
                _drain(wake)
            if self._program is not None and self._program.listener.fileno() in ready:
                self._program.serve()
            self._obey()
            news = self._tell_new()
            self._tick_s = _TICK_MIN_S if news else min(self._tick_s * 1.5, _QUIET_TICK_S)
            if not self._paused:
                self._check_bounds()

    def _pids(self) -> list[int]:
        """Return all processes of the job."""
        root = (self._init or self._find_init()) if self._plan["sandboxed"] else os.getpid()
        return descendants(root) if root else []

    def _find_init(self) -> int:
        """Return the sandbox's pid 1, as bwrap tells it; 0 if it did not yet."""
        self._init = _told("child-pid") or 0
        return self._init

    def _obey(self) -> None:
        while self._signals:
            number = self._signals.pop()
            if number == _signal.SIGTERM:
                if not self._pids():
                    self._signals.add(number)  # again, when there is somebody to hear it
                    return
                self._stopping = True
                self._signals.discard(_signal.SIGUSR1)
                self._resume()
                send(self._pids(), _signal.SIGTERM)
            elif number == _signal.SIGUSR1:
                if not self._pause():
                    self._signals.add(number)  # again, at the next look
                    return
            elif number == _signal.SIGUSR2:
                self._signals.discard(_signal.SIGUSR1)
                self._resume()

    def _pause(self) -> bool:
        """Freeze the job; False if that is not possible yet."""
        # With the sandbox's pid 1, which may be just about to start the job.
        if not self._paused and (not self._plan["sandboxed"] or self._init or self._find_init()):
            self._paused = freeze(lambda: [*self._inits(), *self._pids()])
            if self._paused:
                _append(PAUSED_MARK, b"")
        return self._paused

    def _resume(self) -> None:
        if self._paused:
            # Gone before it runs, so that nobody takes the mark for a pause to come.
            os.unlink(PAUSED_MARK)  # noqa: PTH108
            self._paused = False
            thaw([*self._inits(), *self._pids()])

    def _inits(self) -> list[int]:
        return [self._init] if self._init else []

    def _check_bounds(self) -> None:
        plan = self._plan
        if not plan["sandboxed"]:
            self._reap()
        pids = self._pids()
        used = usage(pids)
        if (pids, used.threads) != self._known:
            self._known = (pids, used.threads)
            self._tick_s = min(self._tick_s, _TICK_MAX_S)
        memory = used.memory_bytes
        if memory > plan["memory_bytes"]:
            memory = proportional_bytes(pids)
        if memory > plan["memory_bytes"]:
            raise LimitPassed(f"it used more than {plan['memory_bytes']} bytes of memory")
        if plan["processes"] and used.threads > plan["processes"]:
            raise LimitPassed(f"it had more than {plan['processes']} processes and threads")
        if plan["cpu_time_s"] and used.cpu_s + self._reaped_s() > plan["cpu_time_s"]:
            raise LimitPassed(f"it used more than {plan['cpu_time_s']:g} s of CPU time")
        if plan["lifetime_s"] and self._ran_s > plan["lifetime_s"]:
            raise LimitPassed(f"it ran for longer than {plan['lifetime_s']:g} s")
        left_s = (plan["memory_bytes"] - memory) / _FILL_BYTES_PER_S
        self._tick_s = max(_SHORTEST_TICK_S, min(self._tick_s, left_s))
        self._disk.check(pids)

    # ---- telling

    def _tell_new(self) -> bool:
        news = [stream.tell() for stream in self._streams]
        if self._silent:
            self._tell_listening()
        return any(news)

    def _tell_listening(self) -> None:
        for port in self._silent & _listening_ports():
            self._silent.discard(port)
            _append(CHANNEL, b"! listening %d\n" % port)

    def _tell_end(self, limit: str) -> None:
        code = self._exit_code()
        words = ""
        if limit:
            words = f"deskgrid: the job was ended: {limit}\n"
        elif self._stopping:
            code = None
        elif code is None and self._plan["sandboxed"]:
            words = "deskgrid: the sandbox ended before the job did\n"
        if words:
            _append(self._streams[1].path, words.encode())
        for stream in self._streams:
            while stream.tell():
                pass
            stream.tell_rest()
        cause = "limit" if limit else "powered_off" if code is not None else "stopped" if self._stopping else "start_failed"
        if code is not None and not limit:
            # Half a number must never be read as an exit code, so it gets its name when it is whole.
            _append(f"{REPORT}/exit.new", b"%d\n" % code)
            os.replace(f"{REPORT}/exit.new", f"{REPORT}/exit")  # noqa: PTH105
            _append(CHANNEL, b"! context-exited %d\n" % code)
        detail = limit or (_last_words(self._streams[1].path) if cause == "start_failed" else "")
        _append(f"{END_FILE}.new", _end_text(cause, detail))
        os.replace(f"{END_FILE}.new", END_FILE)  # noqa: PTH105

    def _exit_code(self) -> int | None:
        """Return the exit code of the job's command, None if it never ran."""
        if not self._plan["sandboxed"]:
            return self._status
        code = _told("exit-code")
        return None if code is None else code & 0xFF

    # ---- end

    def _end_all(self) -> None:
        """End what is left of the job, and wait until it is gone."""
        if not self._plan["sandboxed"]:
            end(self._pids)
            self._reap()
            return
        self._find_init()
        for pid in {self._init, self._child} - {0}:
            with ignoring(ProcessLookupError):
                os.kill(pid, _signal.SIGKILL)
        # The sandbox's pid 1 ends when all others in it have. Never any child: the keeper of the cage is one, too.
        for pid in (self._child, self._init):
            with ignoring(ChildProcessError):
                _, status = os.waitpid(pid, 0) if pid else (0, 0)
                if pid == self._child:
                    self._note_end(status)

    def _reap(self) -> None:
        """Without a sandbox: wait for those of our children that have ended; also what the job left alone is our child."""
        with ignoring(ChildProcessError):
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if not pid:
                    return
                if pid == self._child:
                    self._note_end(status)

    def _reaped_s(self) -> float:
        """Return the CPU time of those that `_reap` saw the end of, which nobody else counts."""
        spent = os.times()
        return 0.0 if self._plan["sandboxed"] else spent.children_user + spent.children_system

    def _note_end(self, status: int) -> None:
        code = os.waitstatus_to_exitcode(status)
        self._status = code if code >= 0 else 128 - code


class _Stream:
    """Follows one file of the report and tells it on the channel."""

    def __init__(self, path: str, prefix: bytes) -> None:
        self.path = path
        self._prefix = prefix
        self._offset = 0
        self._file: int | None = None

    def tell(self) -> bool:
        """Tell what is new, at most a chunk; whether there was something."""
        data = self._read(min(_CHUNK_BYTES, _TOLD_BYTES - self._offset))
        if not data:
            return False
        self._offset += len(data)
        *lines, rest = data.split(b"\n")
        told = b"".join(self._prefix + b" " + line + b"\n" for line in lines)
        _append(CHANNEL, told + (self._prefix + b"-" + rest + b"\n" if rest else b""))
        return True

    def tell_rest(self) -> None:
        """Close the file."""
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def _read(self, most: int) -> bytes:
        if most <= 0:
            return b""
        if self._file is None:
            try:
                self._file = os.open(self.path, os.O_RDONLY | os.O_CLOEXEC)
            except OSError:
                return b""
        return os.pread(self._file, most, self._offset)


class _Disk:
    """Looks now and then at how much disk the job takes."""

    def __init__(self, plan: dict[str, Any]) -> None:
        self._folders: list[str] = plan["measured"]
        self._most_bytes: int = plan["disk_bytes"]
        self._next_at = time.monotonic() + _DISK_S
        self._left_bytes = self._most_bytes
        self._free_bytes = self._free()
        self._device = os.stat(".").st_dev  # noqa: PTH116

    def check(self, pids: list[int]) -> None:
        """Raise LimitPassed if it takes too much. Looks before its time if the file system has lost as much as was left."""
        now = time.monotonic()
        if now < self._next_at and self._free_bytes - self._free() < self._left_bytes:
            return
        try:
            used = sum(map(folder_bytes, self._folders)) + deleted_bytes(pids, self._device)
        except OutOfBounds as error:
            raise LimitPassed(str(error)) from error
        if used > self._most_bytes:
            raise LimitPassed(f"it wrote more than {self._most_bytes} bytes")
        done = time.monotonic()
        self._left_bytes, self._free_bytes = self._most_bytes - used, self._free()
        self._next_at = done + max(_DISK_S, (done - now) * _DISK_SHARE)

    @staticmethod
    def _free() -> int:
        found = os.statvfs(".")
        return found.f_bfree * found.f_frsize


class _Program:
    """A stream whose one end is the program's stdin and stdout; the other one is handed to whoever connects (SCM_RIGHTS, unix(7))."""

    def __init__(self) -> None:
        import socket

        self._rights = (socket.SOL_SOCKET, socket.SCM_RIGHTS)
        self._outer, self.inner = socket.socketpair()
        self.listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        before = os.umask(0o177)
        # Relative: a folder's path may be longer than the 108 bytes that an address holds.
        self.listener.bind(PROGRAM_SOCKET)
        os.umask(before)
        self.listener.listen(16)

    def serve(self) -> None:
        """Answer one who connected."""
        with ignoring(OSError):
            connection, _ = self.listener.accept()
            with connection:
                connection.setblocking(False)
                connection.sendmsg([b"."], [(*self._rights, self._outer.fileno().to_bytes(4, sys.byteorder))])


def _listening_ports() -> set[int]:
    """Return the ports of this network namespace at which a connection to 127.0.0.1 finds somebody."""
    return {port for address, port in _listeners() if address in _ANY_OR_LOOPBACK}


def _listeners() -> set[tuple[str, int]]:
    """Return address (IPv4 as usual, IPv6 as in the table) and port of all that listens in this network namespace."""
    found = set()
    for name in ("/proc/net/tcp", "/proc/net/tcp6"):
        with ignoring(OSError), open(name) as file:
            for line in file.readlines()[1:]:
                fields = line.split()
                address, _, port = fields[1].rpartition(":")
                if fields[3] == _LISTEN:
                    found.add((_dotted(address) if len(address) == _IPV4_DIGITS else address, int(port, 16)))
    return found


def _dotted(digits: str) -> str:
    """Return an address of /proc/net/tcp, a word in the byte order of this PC, as people write it."""
    return ".".join(map(str, int(digits, 16).to_bytes(4, sys.byteorder)))


def _told(name: str) -> int | None:
    """Return a number that bwrap has told of itself, None if it did not yet."""
    with ignoring(OSError, ValueError), open(SANDBOX_FILE, "rb") as file:
        _, found, rest = file.read().partition(b'"%s":' % name.encode())
        if found and (b"," in rest or b"}" in rest):  # whole
            return int(rest.partition(b",")[0].partition(b"}")[0])
    return None


def _end_text(cause: str, detail: str) -> bytes:
    """Return a JSON object."""
    if not detail:
        return b'{"cause": "%s", "detail": ""}' % cause.encode()
    import json  # most jobs end without words

    return json.dumps({"cause": cause, "detail": detail}).encode()


def _last_words(path: str) -> str:
    with ignoring(OSError), open(path, "rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 1000))
        return "; ".join(file.read().decode(errors="replace").splitlines()[-3:])
    return ""


def _drain(descriptor: int) -> None:
    with ignoring(BlockingIOError):
        while os.read(descriptor, 512):
            pass


def _append(path: str, data: bytes) -> None:
    with open(path, "ab", buffering=0) as file:
        file.write(data)


def _prctl(option: int, value: int) -> None:
    call: Callable[..., int] = ctypes.CDLL(None).prctl
    call(option, value, 0, 0, 0)
