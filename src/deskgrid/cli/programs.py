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
_MARK = "DESKGRID_STARTED_BY"


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

    def wait_or_kill(self) -> None:
        """Return once it has ended, if need be by force."""
        try:
            self.process.wait(_GRACE_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

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
                env=_environment(self.home),
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
                self.end()

    def end(self) -> None:
        """End all and remove their folder. Workers end before the server (which was started first) and can say goodbye."""
        for group in (self._running[1:], self._running[:1]):
            for program in group:
                program.process.terminate()
            for program in group:
                program.wait_or_kill()
        for process in _processes_of(self.home):
            with contextlib.suppress(psutil.Error):
                process.kill()
        shutil.rmtree(self.home, ignore_errors=True)


def _environment(home: Path) -> dict[str, str]:
    """Return ours without deskgrid's settings (those are about another grid, perhaps a real one) and with our mark."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith(("DESKGRID_SERVER_", "DESKGRID_WORKER_"))}
    return {**ours, _MARK: str(home)}


def _processes_of(home: Path) -> list[psutil.Process]:
    """Return the processes that come from our programs, by the mark that they inherited: machines whose worker could not end
    them. Not by the folder, where a shell of the user's may be too."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if process.environ().get(_MARK) == str(home):
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
