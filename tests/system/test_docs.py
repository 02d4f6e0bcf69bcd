"""Every command that README, tutorial and how-to show is run, in order, as a newcomer would type it."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from deskgrid.testing.tiny_template import template_cache
from tests.system.harness import Program, until

ROOT = Path(__file__).parents[2]
SHOWN = re.compile(r"^(?:    |\$ )(deskgrid|ls|cat|pip|make) ?(.*)$", re.MULTILINE)
LINK = re.compile(r"deskgrid://\S+?/(join|login)\?[\w=&%.-]+")


class Newcomer:
    """Somebody with an empty home folder who types what a page says."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.links: dict[str, str] = {}
        self.background: list[Program] = []
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
        }
        shutil.copytree(ROOT / "examples", folder / "examples")

    def type(self, line: str) -> str:
        """Run one line and return what it printed."""
        words = shlex.split(line, comments=True)
        words = [self._filled(words, word) for word in words]
        if words[-1] == "&":
            return self._start(words[1:-1])
        done = subprocess.run(
            words, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=300, check=False
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
        for found in LINK.finditer(done.stdout):
            self.links[found[1]] = found[0]
        return done.stdout

    def _filled(self, words: list[str], word: str) -> str:
        if word not in ("deskgrid://...", "LINK"):
            return word
        return self.links["login" if "login" in words else "join"]

    def _start(self, words: list[str]) -> str:
        program = Program(words, self.environment, self.folder / f"{words[0]}.log")
        self.background.append(program)
        program.start()
        if words[0] == "server":
            until(lambda: "listening on" in program.said() or not program.alive, what="the server listens")
        assert program.alive, program.said()
        return ""

    def leave(self) -> None:
        for program in reversed(self.background):
            program.stop()


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


@pytest.fixture
def newcomer(tmp_path: Path):
    somebody = Newcomer(tmp_path)
    yield somebody
    somebody.leave()


def commands(page: str) -> list[str]:
    """Return the commands that a page shows, without those that set up a machine or end the tour's worker."""
    text = (ROOT / page).read_text()
    lines = [f"{found[1]} {found[2]}" for found in SHOWN.finditer(text)]
    return [line for line in lines if not line.startswith(("make", "pip"))]


def test_tutorial_works_as_written(newcomer: Newcomer):
    printed = {line: newcomer.type(line) for line in commands("docs/tutorial.md")}
    assert "completed" in next(text for line, text in printed.items() if line.startswith("deskgrid job list"))
    assert not newcomer.background[-1].alive or newcomer.background[-1].process.wait(30) == 0  # the worker that was told to leave


def test_readme_and_how_to_work_as_written(newcomer: Newcomer):
    printed = {line: newcomer.type(line) for line in commands("README.md")}
    assert "completed" in next(text for line, text in printed.items() if line.startswith("deskgrid job list"))
    shutil.copy(newcomer.folder / "tiny.qcow2", newcomer.folder / "my.qcow2")
    lines = commands("docs/how-to.md")
    assert len(lines) > 10
    leaving = [line for line in lines if line.endswith("worker leave")]
    for line in [*(line for line in lines if line not in leaving), *leaving]:
        newcomer.type(line)
