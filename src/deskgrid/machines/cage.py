"""The cage: a network that holds one machine and nothing else.

A user and network namespace (user_namespaces(7), network_namespaces(7)) of which only the loopback is up, with 127.0.0.0/8 and
10.64.0.0/16 on it. What runs in it reaches what listens in it: no other address of the world exists there, nor do the
abstract sockets of the host. An ordinary user can make one, where the kernel lets him.

    worker ----- cage.sock ----- keeper     \
      |   one byte in, one socket out        |  the cage
      |                                      |
      +-- listens at 10.64.1.1:5432 -------- QEMU -- its user networking -- guest
      +-- connects to 127.0.0.1:8080 ------- QEMU -- (port forward) ------- guest

The process that is to be caged is started through `enter`, and keeps its id, so it is found, bounded and ended like any other; any
argument list will do, not only QEMU's. The keeper beside it (cage_entry.py) dies with it. It hands out sockets made in the cage,
to a worker that was started later, too.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from deskgrid.clock import Clock, SystemClock
from deskgrid.errors import MachineFailed
from deskgrid.machines import cage_entry, processes
from deskgrid.machines.probes import probe_folder
from deskgrid.machines.processes import ProcessIdentity

__all__ = [
    "CAGE_NETWORK",
    "GATEWAY",
    "HTTP_PROXY_PORT",
    "SOCKS_PORT",
    "clear",
    "enter",
    "namespaces_hint",
    "namespaces_marks",
    "open_socket",
    "probe_cage",
    "receive_socket",
    "wait_keeper_gone",
]

CAGE_NETWORK = "10.64.0.0/16"
"""All addresses in it are the cage's own."""
GATEWAY = "10.64.0.1"
"""Where the worker itself listens in a cage."""
SOCKS_PORT, HTTP_PROXY_PORT = 1080, 3128
"""Of the gateway."""
_SOCKET_LIMIT_S = 20.0
_PROBE_LIMIT_S = 10.0
_RETRY_S = 0.005
_INT_BYTES = 4
_MAX_DESCRIPTORS = 4


def enter(command: Sequence[str], workdir: Path) -> list[str]:
    """Return a command line that runs `command` in a cage of its own, in folder `workdir`, where the cage has its files.

    The program in front replaces itself by `command`, so the process id stays. Should a cage not be possible, it ends with 1 and
    says why on stderr.
    """
    # -I -S: no site packages to search, so that it starts in 10 ms.
    return [sys.executable, "-I", "-S", str(Path(cage_entry.__file__)), "--enter", str(workdir), *command]


async def open_socket(workdir: Path, running: Callable[[], bool]) -> socket.socket:
    """Return a new TCP socket (IPv4, blocking) inside the cage of the machine in `workdir`; waits for a cage that is being made.

    Raise MachineFailed once `running` says no, or if the keeper does not answer.
    """
    try:
        async with asyncio.timeout(_SOCKET_LIMIT_S):
            return await receive_socket(
                workdir / cage_entry.SOCKET_NAME,
                running,
                kind=(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP),
                deserted=lambda: _was_kept(workdir) and _keeper(workdir) is None,
            )
    except TimeoutError as error:
        raise MachineFailed("the machine's cage does not answer") from error
    except OSError as error:
        raise MachineFailed(f"the machine's cage gives no socket: {error.strerror or error}") from error


async def wait_keeper_gone(workdir: Path, clock: Clock) -> None:
    """Wait until the keeper of a machine that has ended is gone as well, and end it if need be. Nothing happens without one."""
    keeper = _keeper(workdir)
    if keeper is not None:
        await processes.kill(keeper, clock)


async def clear(workdir: Path, clock: Clock) -> None:
    """Remove what is left of the cage of a machine that has ended, so that another can be made there. Idempotent."""
    await wait_keeper_gone(workdir, clock)
    for name in (cage_entry.SOCKET_NAME, cage_entry.KEEPER_FILE):
        (workdir / name).unlink(missing_ok=True)


async def probe_cage(clock: Clock | None = None, place: Path | None = None) -> str:
    """Return "" if cages work on this PC, else why not, in words for the owner. Makes one (below folder `place`) and uses it, within 10 s. Never raises."""
    if sys.platform != "linux":
        return "machines get a network only on Linux"
    try:
        async with asyncio.timeout(_PROBE_LIMIT_S):
            return await _probe(clock or SystemClock(), place)
    except TimeoutError:
        return f"a cage for the network was not made within {_PROBE_LIMIT_S:.0f} s"
    except (OSError, MachineFailed) as error:
        return f"no cage for the network can be made: {error}"


# ---- the keeper


def _was_kept(workdir: Path) -> bool:
    return (workdir / cage_entry.KEEPER_FILE).exists()


def _keeper(workdir: Path) -> ProcessIdentity | None:
    """Return the keeper of the machine in `workdir` while it lives."""
    try:
        pid = int((workdir / cage_entry.KEEPER_FILE).read_text())
    except (OSError, ValueError):
        return None
    return processes.identify(pid, str(workdir))


# ---- sockets


async def receive_socket(
    path: Path, running: Callable[[], bool], *, kind: tuple[int, int, int], deserted: Callable[[], bool] = lambda: False
) -> socket.socket:
    """Return the socket that is handed out at the local socket `path`; waits for one that is being made.

    It is of `kind` (family, type, protocol) and blocking. Raise MachineFailed once `running` says no, if it is another socket, or
    if nobody listens and `deserted` says that nobody will; OSError.
    """
    while True:
        alive, empty = running(), deserted()
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        with connection:
            try:
                _connect(connection, path)
                connection.send(b".")
                return await _receive(connection, kind)
            except (FileNotFoundError, BlockingIOError, ConnectionError, EOFError) as error:
                # Not made yet, overrun, or gone with its machine.
                if not alive:
                    raise MachineFailed("the machine is off") from None
                if isinstance(error, ConnectionRefusedError) and empty:
                    raise MachineFailed("the keeper of the machine's cage is gone") from None
        await asyncio.sleep(_RETRY_S)


def _connect(connection: socket.socket, path: Path) -> None:
    """Connect to a local socket whose path may be longer than the 108 bytes that an address holds (unix(7))."""
    folder = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        connection.connect(f"/proc/self/fd/{folder}/{path.name}")
    finally:
        os.close(folder)


async def _receive(connection: socket.socket, kind: tuple[int, int, int]) -> socket.socket:
    """Return the socket that comes. Raise EOFError if none does, MachineFailed if it is something else."""
    await _readable(connection)
    space = socket.CMSG_SPACE(_INT_BYTES * _MAX_DESCRIPTORS)
    data, ancillary, _, _ = connection.recvmsg(1, space, socket.MSG_CMSG_CLOEXEC)
    descriptors = [number for level, kind, rights in ancillary for number in _numbers(level, kind, rights)]
    if len(descriptors) != 1:
        _close(descriptors)
        if not data:
            raise EOFError
        raise MachineFailed("the machine's cage gave no socket")
    return _checked(descriptors[0], kind)


async def _readable(connection: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    ready = asyncio.Event()
    loop.add_reader(connection, ready.set)
    try:
        await ready.wait()
    finally:
        loop.remove_reader(connection)


def _numbers(level: int, kind: int, rights: bytes) -> list[int]:
    if (level, kind) != (socket.SOL_SOCKET, socket.SCM_RIGHTS):
        return []
    whole = len(rights) - len(rights) % _INT_BYTES
    return [int.from_bytes(rights[place : place + _INT_BYTES], sys.byteorder) for place in range(0, whole, _INT_BYTES)]


def _close(descriptors: Sequence[int]) -> None:
    for number in descriptors:
        os.close(number)


def _checked(descriptor: int, kind: tuple[int, int, int]) -> socket.socket:
    """Return the socket if it is of this kind: a guest may have taken over what is at the other end."""
    try:
        given = socket.socket(fileno=descriptor)
    except OSError as error:
        os.close(descriptor)
        raise MachineFailed("the machine's cage gave no socket") from error
    if (given.family, given.type, given.proto) != kind:
        given.close()
        raise MachineFailed("the machine's cage gave something that is no TCP socket")
    given.setblocking(True)
    return given


# ---- what this PC can do


async def _probe(clock: Clock, place: Path | None) -> str:
    with probe_folder(place) as folder:
        # It ends with its input, should we not come to end it.
        idle = [sys.executable, "-I", "-S", "-c", "import sys; sys.stdin.read()"]
        child = await asyncio.create_subprocess_exec(
            *enter(idle, folder), cwd=folder, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            return await _try_out(folder, child)
        finally:
            if child.returncode is None:
                child.kill()
            await child.communicate()
            await wait_keeper_gone(folder, clock)


async def _try_out(folder: Path, child: asyncio.subprocess.Process) -> str:
    try:
        given = await open_socket(folder, lambda: child.returncode is None)
    except MachineFailed as error:
        words = (await child.communicate())[1].decode(errors="replace").strip() if child.returncode is not None else str(error)
        return f"no cage for the network can be made ({words[-300:]}){namespaces_hint()}"
    with given:
        try:
            given.bind((cage_entry.ADDRESS, 1))
        except OSError as error:
            return f"a cage for the network does not work: {error.strerror}"
    return ""


_HINTS = (
    (
        "/proc/sys/kernel/apparmor_restrict_unprivileged_userns",
        "1",
        "AppArmor forbids ordinary users namespaces (sudo sysctl kernel.apparmor_restrict_unprivileged_userns=0)",
    ),
    (
        "/proc/sys/kernel/unprivileged_userns_clone",
        "0",
        "the kernel forbids ordinary users namespaces (sudo sysctl kernel.unprivileged_userns_clone=1)",
    ),
    ("/proc/sys/user/max_user_namespaces", "0", "user namespaces are switched off (sudo sysctl user.max_user_namespaces=10000)"),
    ("/proc/sys/user/max_net_namespaces", "0", "network namespaces are switched off (sudo sysctl user.max_net_namespaces=10000)"),
)
"""What forbids it, where that can be read, and what to do."""


def namespaces_marks() -> list[str]:
    """Return what the system says of namespaces: when that changes, what was found out about cages may not hold any more."""
    found = []
    for file, _, _ in _HINTS:
        with contextlib.suppress(OSError):
            found.append(f"{file}: {Path(file).read_text().strip()}")
    return found


def namespaces_hint() -> str:
    """Return what most likely forbids a cage or sandbox, "" if nothing is known to."""
    for file, value, words in _HINTS:
        try:
            if Path(file).read_text().strip() == value:
                return f": {words}"
        except OSError:
            continue
    return ""
