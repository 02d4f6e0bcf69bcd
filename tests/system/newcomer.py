"""Somebody who types what a page of the documentation says."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

from deskgrid.testing.reaper import follow
from deskgrid.testing.tiny_template import template_cache
from tests.system.harness import LIMIT_S, until

ROOT = Path(__file__).parents[2]
SHOWN = re.compile(r"^(?:    |\$ )((?:deskgrid|ls|cat|pip|make|dd|cmp|curl|rsync|python3|snakemake) ?.*)$", re.MULTILINE)
SLOW = re.compile(r"^```sh\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_COMMAND_S = 280.0
"""Less than a test may take, so that one that hangs shows what the others said."""
LINK = re.compile(r"deskgrid://\S+?/(join|login)\?[\w=&%.-]+")


def commands(page: str) -> list[str]:
    """Return the commands that a page shows, without those that set up a machine."""
    lines = SHOWN.findall((ROOT / page).read_text())
    return [line for line in lines if not line.startswith(("make", "pip"))]


def slow_commands(page: str) -> list[str]:
    """Return the commands that take minutes, which a page shows in blocks of their own."""
    return [line for block in SLOW.findall((ROOT / page).read_text()) for line in block.splitlines()]


class Newcomer:
    """Somebody with an empty home folder. `environment` is added to what there is.

    `prefix` stands before all that is typed but what builds disks, which needs the packages' servers. No command takes longer than `command_s`.
    """

    def __init__(self, folder: Path, prefix: tuple[str, ...] = (), *, command_s: float = _COMMAND_S, **environment: str) -> None:
        self.folder = folder
        self.command_s = command_s
        self.prefix = prefix
        self.links: dict[str, str] = {}
        self.background: list[subprocess.Popen[bytes]] = []
        scripts = str(Path(sys.executable).parent)
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("DESKGRID_", "XDG_"))}
        self.environment = {
            **kept,
            "HOME": str(folder),
            "PATH": f"{scripts}:{os.environ['PATH']}",
            "DESKGRID_CACHE": str(template_cache().parent),
            "DESKGRID_SERVER_LISTEN": f"127.0.0.1:{_free_port()}",
            "DESKGRID_WORKER_RESERVE_BYTES": "1000000",
            "DESKGRID_SERVER_RESERVE_BYTES": "1000000",
            **environment,
        }
        shutil.copytree(ROOT / "examples", folder / "examples")

    def set_up(self) -> None:
        """Type what the README says of a server and a worker."""
        for line in commands("README.md"):
            if line.startswith(("deskgrid server", "deskgrid login", "deskgrid worker")) and "status" not in line:
                self.type(line)

    def type(self, line: str) -> str:
        """Run one line and return what it printed."""
        words = shlex.split(line, comments=True)
        prefix = () if words[:3] == ["deskgrid", "disk", "build"] else self.prefix
        words = [*prefix, *(self._filled(words, word) for word in words)]
        if words[-1] == "&":
            return self._start(words[:-1])
        try:
            done = subprocess.run(
                words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=self.command_s, check=False
            )
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"{line}\n{error.stdout!r}\n{error.stderr!r}\n{self.said()}") from error
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}\n{self.said()}"
        for found in LINK.finditer(done.stdout):
            self.links[found[1]] = found[0]
        return done.stdout

    def _filled(self, words: list[str], word: str) -> str:
        if word not in ("deskgrid://...", "LINK"):
            return word
        return self.links["login" if "login" in words else "join"]

    def _start(self, words: list[str]) -> str:
        """Start a program that runs on; return once it has said something; the server: that it listens."""
        log = self._log(len(self.background))
        with log.open("ab") as file:
            process = subprocess.Popen(
                words,
                cwd=self.folder,
                env={**self.environment, "PYTHONUNBUFFERED": "1"},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
            )
        self.background.append(process)
        follow(process.pid)
        awaited = "listening on" if "server" in words else ""
        until(lambda: _said(log, awaited) or process.poll() is not None, what=f"{words} has begun")
        assert process.poll() is None, self.said()
        return ""

    def _log(self, number: int) -> Path:
        return self.folder / f"background-{number}.log"

    def said(self) -> str:
        """Return what programs said that run on."""
        return "\n".join(self._log(number).read_text(errors="replace")[-3000:] for number in range(len(self.background)))

    def leave(self) -> None:
        """End what was started and runs yet."""
        for process in reversed(self.background):
            process.terminate()
            try:
                process.wait(LIMIT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _said(log: Path, words: str) -> bool:
    said = log.read_text(errors="replace")
    return bool(said) and words in said


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])
