"""The two programs of a cage (cage.py), with nothing but the standard library. Linux only.

    --enter FOLDER COMMAND...     make a cage around this very process, leave a keeper in it, and become COMMAND in FOLDER
    --keep FOLDER PARENT SOCKET   the keeper: lives as long as its parent, and hands out sockets at the listener SOCKET

The process that enters keeps its id, so whoever started it has started COMMAND. In the cage there is a loopback with
127.0.0.0/8 and 10.64.0.0/16 on it and nothing else, and ports below 1024 are as free as all others. COMMAND and the keeper have no
capability left, not in the cage either, and can get none.

The keeper's protocol: connect, send one byte, receive one new TCP socket (SCM_RIGHTS, unix(7)); then it closes. A network
namespace belongs to a socket from its making on, so whoever receives it binds or connects in the cage.
"""

from __future__ import annotations

import _socket  # not the module around it, which would make the keeper a megabyte larger
import os
import select
import sys
from _socket import socket

SOCKET_NAME = "cage.sock"
KEEPER_FILE = "cage.pid"
ADDRESS, NETMASK = "10.64.0.1", "255.255.0.0"
"""On the loopback, all addresses of a network are local."""

_CLONE_NEWUSER, _CLONE_NEWNET = 0x10000000, 0x40000000
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT = 1, 4, 24, 38, 47
_PR_CAP_AMBIENT_CLEAR_ALL = 4
_CAP_VERSION_3 = 0x20080522
_MAX_CAPABILITY = 63
_SIOCSIFFLAGS, _SIOCSIFADDR, _SIOCSIFNETMASK = 0x8914, 0x8916, 0x891C
_IFF_UP = 1
_SIGKILL = 9
_NOT_ROOT = 1000
_BACKLOG = 128
_MAX_CONNECTIONS = 64
"""More at a time are garbage: the one that waits longest is dropped."""


class CageError(Exception):
    """A cage cannot be made here; the message says which step failed."""


# ---- entering


def enter(command: list[str], folder: str) -> None:
    """Make the cage, with its files in the current folder, and become `command`. Raise CageError or OSError."""
    _make_namespaces()
    _make_network()
    listener = _listen()
    _drop_rights()
    _start_keeper(listener, folder)
    import signal

    # Python ignores these two, and what is ignored stays so in the next program.
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_DFL)
    os.execvp(command[0], command)  # noqa: S606 no shell is the point


class _Step:
    """Gives an OSError the words for what was being done."""

    def __init__(self, words: str) -> None:
        self._words = words

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise CageError(f"{self._words}: {error.strerror}") from error


def _make_namespaces() -> None:
    uid, gid = os.geteuid(), os.getegid()
    with _Step("cannot make a user and network namespace"):
        _call("unshare", _CLONE_NEWUSER | _CLONE_NEWNET)
    with _Step("cannot map the user into its namespace"):
        _write("/proc/self/setgroups", "deny")
        # Without rights nobody can make a namespace in which root of this one exists (user_namespaces(7)), as sandboxes in the cage are.
        _write("/proc/self/uid_map", f"{uid or _NOT_ROOT} {uid} 1")
        _write("/proc/self/gid_map", f"{gid} {gid} 1")


def _make_network() -> None:
    import fcntl
    import struct

    control = socket(_socket.AF_INET, _socket.SOCK_DGRAM)

    def request(name: bytes, code: int, value: bytes) -> None:
        fcntl.ioctl(control, code, struct.pack("16s24s", name, value))

    def address(text: str) -> bytes:
        return struct.pack("=H2x4s", _socket.AF_INET, bytes(map(int, text.split("."))))

    with _Step("cannot set up the network of a namespace"):
        request(b"lo", _SIOCSIFFLAGS, struct.pack("=H", _IFF_UP))
        request(b"lo:1", _SIOCSIFADDR, address(ADDRESS))
        request(b"lo:1", _SIOCSIFNETMASK, address(NETMASK))
    # The worker, who binds, has no rights in the cage; and a hypervisor, who forwards to port 22, has none left.
    with _Step("cannot open low ports in a namespace"):
        _write("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0")


def _drop_rights() -> None:
    import ctypes

    with _Step("cannot give up rights"):
        for capability in range(_MAX_CAPABILITY + 1):
            try:
                _call("prctl", _PR_CAPBSET_DROP, capability, 0, 0, 0)
            except OSError:
                break  # this kernel's last one was the one before
        _call("prctl", _PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0)
        _call("capset", (ctypes.c_uint32 * 2)(_CAP_VERSION_3, 0), (ctypes.c_uint32 * 6)())
        _call("prctl", _PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)


def _listen() -> socket:
    """Return the listener at SOCKET_NAME in the current folder, for our own user only."""
    with _Step(f"cannot listen at {SOCKET_NAME}"):
        listener = socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
        before = os.umask(0o177)
        # Relative: a folder's path may be longer than the 108 bytes that an address holds.
        listener.bind(SOCKET_NAME)
        os.umask(before)
        listener.listen(_BACKLOG)
    return listener


def _start_keeper(listener: socket, folder: str) -> None:
    """Start the keeper as a program of its own: it must not have our arguments, by which we are found."""
    parent = os.getpid()
    with _Step("cannot start the keeper"):
        child = os.fork()
    if child == 0:
        try:
            _call("prctl", _PR_SET_PDEATHSIG, _SIGKILL, 0, 0, 0)
            os.set_inheritable(listener.fileno(), True)
            arguments = ["-I", "-S", os.path.abspath(__file__), "--keep", folder, str(parent), str(listener.fileno())]  # noqa: PTH100
            os.execv(sys.executable, [sys.executable, *arguments])  # noqa: S606
        finally:
            os._exit(1)
    _write(KEEPER_FILE, str(child))


def _call(function: str, *arguments: object) -> None:
    """Call a function of the C library (Python 3.11 has none of these). Raise OSError."""
    import ctypes

    words = [ctypes.c_ulong(word) if isinstance(word, int) else word for word in arguments]
    library = ctypes.CDLL(None, use_errno=True)
    if getattr(library, function)(*words) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def _write(path: str, text: str) -> None:
    with open(path, "w") as file:
        file.write(text)


# ---- keeping


def keep(parent: int, listener: socket) -> None:
    """Hand out sockets until the parent ends, which kills us. Whatever is sent, nothing is kept of it."""
    if os.getppid() != parent:
        return  # it ended before we could ask for that signal
    # The hypervisor, if a guest took it over, has our user id: it shall not trace us to get a process without its filter.
    _call("prctl", _PR_SET_DUMPABLE, 0, 0, 0, 0)
    listener.setblocking(False)
    poll = select.poll()
    poll.register(listener, select.POLLIN)
    connections: dict[int, socket] = {}

    def drop(number: int) -> socket:
        poll.unregister(number)
        return connections.pop(number)

    while True:
        for number, _ in poll.poll():
            if number in connections:
                _serve(drop(number))
        connection = _accept(listener)
        if connection is not None:
            if len(connections) >= _MAX_CONNECTIONS:
                drop(next(iter(connections))).close()
            connections[connection.fileno()] = connection
            poll.register(connection, select.POLLIN)


def _accept(listener: socket) -> socket | None:
    """Return one who waits, if any."""
    try:
        number, _ = listener._accept()  # type: ignore[attr-defined]
    except OSError:
        return None
    connection = socket(fileno=number)
    connection.setblocking(False)
    return connection


def _serve(connection: socket) -> None:
    """Answer one byte by one socket; anything else by closing."""
    try:
        if connection.recv(1):
            given = socket(_socket.AF_INET, _socket.SOCK_STREAM)
            rights = given.fileno().to_bytes(4, sys.byteorder)
            connection.sendmsg([b"."], [(_socket.SOL_SOCKET, _socket.SCM_RIGHTS, rights)])
            given.close()
    except OSError:
        pass  # it went away, or we have no descriptor left just now
    connection.close()


def main(arguments: list[str]) -> int:
    """Run one of the two programs; return the exit status if it does not become another."""
    if arguments[0] == "--keep":
        _, _, parent, number = arguments
        keep(int(parent), socket(fileno=int(number)))
        return 0
    folder, command = arguments[1], arguments[2:]
    try:
        os.chdir(folder)
        enter(command, folder)
    except CageError as error:
        print(f"cage: {error}", file=sys.stderr)
    except OSError as error:
        print(f"cage: {command[0]} cannot be started: {error.strerror}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
