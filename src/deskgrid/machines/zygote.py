"""The process from which readers (sandbox.py) are forked: it has imported what they need, which takes ten times as long as all else they do.

It has one thread, a socket to the worker, and reads nothing. A request (readers.py) is one byte on that socket, with descriptors: an end of a control
socket, and the files of the reader. On the control socket, messages in both directions:

    to the reader    a JSON object: its function, its argument, and the numbers that its files are to have
    to the worker    when the reader has ended: its exit code, or the signal as a negative number, 4 bytes; nothing, if it could not be started

A control socket that is closed ends its reader, and the worker's socket, when that is closed, everything. A reader has no descriptor but its files, and
ends with this process.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import select
import signal
import socket
import struct
import sys
import traceback
from contextlib import suppress
from typing import Any

from deskgrid.machines.sandbox import load_seccomp

try:
    import fcntl
except ModuleNotFoundError:  # Windows, where only the constants below are used
    fcntl = None  # type: ignore[assignment]

__all__ = ["CODE", "MOST_DESCRIPTORS", "MOST_REQUEST_BYTES", "main"]

CODE = struct.Struct("<i")
MOST_REQUEST_BYTES = 1 << 20
MOST_DESCRIPTORS = 8
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Serve until the worker is gone. Arguments: the number of its socket, and the module in which the readers' functions are."""
    module = importlib.import_module(sys.argv[2])
    load_seccomp()
    Zygote(socket.socket(fileno=int(sys.argv[1])), module).run()


class Zygote:
    """Forks readers and waits for them."""

    def __init__(self, worker: socket.socket, module: Any) -> None:
        self._worker = worker
        self._module = module
        self._poll = select.poll()
        self._poll.register(worker, select.POLLIN)
        self._readers: dict[int, tuple[int, int]] = {}
        """Process id and control socket, by the descriptor that tells its end."""
        self._controls: dict[int, int] = {}
        """Process ids, by their control sockets."""

    def run(self) -> None:
        """Return when the worker is gone; the readers end with us."""
        while True:
            ready = [number for number, _ in self._poll.poll()]
            for number in ready:
                if number in self._readers:
                    self._tell_end(number)
                elif number in self._controls:
                    self._poll.unregister(number)
                    os.kill(self._controls[number], signal.SIGKILL)
            # After the others: a new reader's descriptors may have the numbers of those that were closed.
            if self._worker.fileno() in ready and not self._take():
                return

    def _take(self) -> bool:
        """Start the reader that is asked for; False if nobody will ask any more."""
        message, descriptors, _, _ = socket.recv_fds(self._worker, 1, MOST_DESCRIPTORS)
        if not message:
            return False
        control, *files = descriptors
        parent = os.getpid()
        try:
            pid = os.fork()
        except OSError:  # too many processes; the others go on
            pid = -1
        if not pid:
            self._become_reader(control, files, parent)
        for number in files:
            os.close(number)
        if pid < 0:
            os.close(control)
            return True
        ended = os.pidfd_open(pid)
        self._readers[ended] = pid, control
        self._controls[control] = pid
        self._poll.register(ended, select.POLLIN)
        self._poll.register(control, select.POLLRDHUP)
        return True

    def _tell_end(self, ended: int) -> None:
        pid, control = self._readers.pop(ended)
        _, status = os.waitpid(pid, 0)
        del self._controls[control]
        self._poll.unregister(ended)
        with suppress(KeyError):  # of one that is not wanted any more
            self._poll.unregister(control)
        with suppress(OSError):
            os.write(control, CODE.pack(os.waitstatus_to_exitcode(status)))
        os.close(ended)
        os.close(control)

    def _become_reader(self, control: int, files: list[int], parent: int) -> None:
        """Do what the request says, in the child, and end it."""
        code = 1
        try:
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
            if os.getppid() != parent:
                return
            request = json.loads(os.read(control, MOST_REQUEST_BYTES))
            _place(files, request["numbers"])
            sys.argv[1:] = [request["argument"]]
            getattr(self._module, request["function"])()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            try:
                sys.stdout.flush()
                sys.stderr.flush()
            finally:
                os._exit(code)  # no destructor may close a number that means another file now


def _place(files: list[int], numbers: list[int]) -> None:
    """Give the files their numbers, and close all others."""
    # First away from the numbers that they are to have, so that none overwrites another.
    spare = [fcntl.fcntl(number, fcntl.F_DUPFD_CLOEXEC, max(numbers) + 1) for number in files]
    for number, place in zip(spare, numbers, strict=True):
        os.dup2(number, place)
    for number in map(int, os.listdir("/proc/self/fd")):  # noqa: PTH208
        if number not in numbers:
            with suppress(OSError):  # that of the listing itself
                os.close(number)
