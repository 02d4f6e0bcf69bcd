"""The processes below one, and what they use; read from /proc (proc(5)). Of the standard library only what is there in no time, for
process_machine.py.

What is read changes while it is read, and is made by hostile programs: whatever is gone or odd counts as nothing.
"""

from __future__ import annotations

import os
import time

TYPE_CHECKING = False
if TYPE_CHECKING:
    import signal as _signal
    from collections.abc import Callable, Iterator
else:
    import _signal

__all__ = [
    "Usage",
    "deleted_bytes",
    "descendants",
    "end",
    "freeze",
    "ignoring",
    "proportional_bytes",
    "read_proc",
    "send",
    "thaw",
    "usage",
]

# Windows has no such calls, and no /proc, but it loads this module.
_TICKS_PER_S, _PAGE_BYTES = (os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")) if hasattr(os, "sysconf") else (1, 1)
_QUIET = frozenset("TtZXD")
"""States in which a process runs no instruction of its own; D is one that waits for its vforked child, which is stopped itself."""
_ENDED = frozenset("ZX")
_FREEZE_ROUNDS = 1000
_END_ROUNDS, _END_PAUSE_S = 5000, 0.001
_BLOCK_BYTES = 512
"""Of st_blocks (stat(2))."""
_READ_BYTES = 64 << 10


class Usage:
    """What a tree uses."""

    __slots__ = ("cpu_s", "memory_bytes", "threads")

    def __init__(self, memory_bytes: int, cpu_s: float, threads: int) -> None:
        self.memory_bytes = memory_bytes
        """Resident; what several share is counted for each."""
        self.cpu_s = cpu_s
        """Of all, also of those that ended and were waited for."""
        self.threads = threads


class _Stat:
    __slots__ = ("cpu_ticks", "pages", "state", "threads")

    def __init__(self, state: str, cpu_ticks: int, threads: int, pages: int) -> None:
        self.state, self.cpu_ticks, self.threads, self.pages = state, cpu_ticks, threads, pages


class ignoring:
    """contextlib.suppress without the 4 ms that its module takes."""

    def __init__(self, *errors: type[BaseException]) -> None:
        self._errors = errors

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: object, trace: object) -> bool:
        return kind is not None and issubclass(kind, self._errors)


def descendants(root: int) -> list[int]:
    """Return the ids of all processes below `root`, without it, parents first."""
    found = [root]
    for pid in found:
        found.extend(_children(pid))
    return found[1:]


def usage(pids: list[int]) -> Usage:
    """Return what these processes use together."""
    stats = [stat for pid in pids if (stat := _stat(pid)) is not None]
    return Usage(
        sum(stat.pages for stat in stats) * _PAGE_BYTES,
        sum(stat.cpu_ticks for stat in stats) / _TICKS_PER_S,
        sum(stat.threads for stat in stats),
    )


def proportional_bytes(pids: list[int]) -> int:
    """Return the memory of these processes with what they share counted once (PSS); takes milliseconds for each GiB."""
    return sum(_proportional(pid) for pid in pids)


def deleted_bytes(pids: list[int], device: int) -> int:
    """Return what files on a device take that have no name any more, but are held open by these processes."""
    files = {(found.st_ino): found.st_blocks * _BLOCK_BYTES for pid in pids for found in _open_files(pid)
             if found.st_nlink == 0 and found.st_dev == device}  # fmt: skip
    return sum(files.values())


def send(pids: list[int], number: int) -> None:
    """Send a signal to each that is still there."""
    for pid in pids:
        try:
            os.kill(pid, number)
        except OSError:
            continue


def freeze(find: Callable[[], list[int]]) -> bool:
    """Stop all processes that `find` returns, until it finds none that runs. False if new ones come faster than that."""
    for _ in range(_FREEZE_ROUNDS):
        running = [pid for pid in find() if (stat := _stat(pid)) is not None and stat.state not in _QUIET]
        if not running:
            return True
        send(running, _signal.SIGSTOP)
    return False


def end(find: Callable[[], list[int]]) -> bool:
    """Kill all processes that `find` returns, until it finds none that lives. False if that takes longer than some seconds."""
    freeze(find)  # so that none makes new ones meanwhile
    for _ in range(_END_ROUNDS):
        living = [pid for pid in find() if (stat := _stat(pid)) is not None and stat.state not in _ENDED]
        if not living:
            return True
        send(living, _signal.SIGKILL)
        time.sleep(_END_PAUSE_S)
    return False


def thaw(pids: list[int]) -> None:
    """Let all of them run on."""
    send(pids, _signal.SIGCONT)


def _children(pid: int) -> list[int]:
    found: list[int] = []
    for thread in _names(f"/proc/{pid}/task"):
        found.extend(map(int, read_proc(f"/proc/{pid}/task/{thread}/children").split()))
    return found


def _stat(pid: int) -> _Stat | None:
    text = read_proc(f"/proc/{pid}/stat")
    # The name in parentheses may itself have blanks and parentheses; the state follows it.
    fields = text[text.rfind(b")") + 2 :].split()
    if len(fields) < 22:
        return None
    return _Stat(fields[0].decode(), sum(map(int, fields[11:15])), int(fields[17]), int(fields[21]))


def _proportional(pid: int) -> int:
    for line in read_proc(f"/proc/{pid}/smaps_rollup").splitlines():
        if line.startswith(b"Pss:"):
            return int(line.split()[1]) << 10
    stat = _stat(pid)
    return stat.pages * _PAGE_BYTES if stat is not None else 0


def _open_files(pid: int) -> Iterator[os.stat_result]:
    for name in _names(f"/proc/{pid}/fd"):
        try:
            yield os.stat(f"/proc/{pid}/fd/{name}")  # noqa: PTH116
        except OSError:
            continue


def _names(folder: str) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208
    except OSError:
        return []


def read_proc(path: str) -> bytes:
    """Return what a file of /proc has, nothing if that cannot be read (any more)."""
    # Not by `open`, whose layers take as long as the system: this is done for each process of a job, several times a second.
    try:
        number = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return b""
    parts = []
    try:
        while part := os.read(number, _READ_BYTES):
            parts.append(part)
    except OSError:  # it has ended
        return b""
    finally:
        os.close(number)
    return b"".join(parts)
