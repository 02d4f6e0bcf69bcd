"""Programs that a command starts and ends: each in its own session, so that Ctrl-C in the terminal reaches only the command."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import psutil

from deskgrid.errors import OperatorError

__all__ = ["Program", "Programs"]

_GRACE_S = 15.0
_LAST_BYTES = 2000


class Program:
    """One of our own commands, running."""

    def __init__(self, name: str, process: subprocess.Popen[bytes], log: Path) -> None:
        self.name = name
        self.process = process
        self.log = log

    def require_alive(self) -> None:
        """Raise OperatorError with the program's last words if it has ended."""
        code = self.process.poll()
        if code is not None:
            raise OperatorError(f"the {self.name} ended with exit code {code}: {self.last_words()}", hint=f"its log: {self.log}")

    def last_words(self) -> str:
        """Return the end of its log."""
        return self.log.read_bytes()[-_LAST_BYTES:].decode(errors="replace").strip() or "it said nothing"

    def first_line(self) -> bytes:
        """Wait for the first line that it prints; raise OperatorError if it ends without one. Blocks: call it in a thread."""
        stdout: IO[bytes] | None = self.process.stdout
        line = stdout.readline() if stdout is not None else b""
        if not line:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(_GRACE_S)
            self.require_alive()
            raise OperatorError(f"the {self.name} does not say that it is ready", hint=f"its log: {self.log}")
        return line


class Programs:
    """The programs of one demo and their folder. As a context manager it ends them all, however the block ends."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.kept = False
        self._running: list[Program] = []

    def start(self, name: str, *arguments: str) -> Program:
        """Start `deskgrid ARGUMENTS` in the background."""
        log = self.home / f"{name.replace(' ', '-')}.log"
        with log.open("ab") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-m", "deskgrid", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=stderr,
                start_new_session=True,
                cwd=self.home,
                env=_environment(),
            )
        program = Program(name, process, log)
        self._running.append(program)
        return program

    @property
    def process_ids(self) -> list[int]:
        """The programs' process ids, in the order in which to end them."""
        return [program.process.pid for program in reversed(self._running)]

    def __enter__(self) -> Programs:
        return self

    def __exit__(self, *_: object) -> None:
        if not self.kept:
            with _uninterrupted():
                self._end_all()
                shutil.rmtree(self.home, ignore_errors=True)

    def _end_all(self) -> None:
        """End what was started after the server before it, so that workers can say goodbye; then what still runs from our folder."""
        for group in (self._running[1:], self._running[:1]):
            for program in group:
                program.process.terminate()
            for program in group:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    program.process.wait(_GRACE_S)
        for process in [*(_known(pid) for pid in self.process_ids), *_processes_in(self.home)]:
            if process is not None:
                with contextlib.suppress(psutil.Error):
                    process.kill()
        for program in self._running:
            program.process.wait()


def _environment() -> dict[str, str]:
    """Return ours without deskgrid's settings: those are about another grid, perhaps a real one."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("DESKGRID_SERVER_", "DESKGRID_WORKER_"))}


def _known(pid: int) -> psutil.Process | None:
    try:
        return psutil.Process(pid)
    except psutil.Error:
        return None


def _processes_in(home: Path) -> list[psutil.Process]:
    """Return the processes that work in our folder or have it in an argument: machines whose worker could not end them."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            inside = Path(process.cwd()).is_relative_to(home) or any(str(home) in argument for argument in process.cmdline())
            if inside and process.pid != os.getpid():
                found.append(process)
    return found


@contextlib.contextmanager
def _uninterrupted() -> Iterator[None]:
    """Let a second Ctrl-C not stop the cleaning up."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)
