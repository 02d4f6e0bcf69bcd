"""Every command that README, tutorial and how-to show is run, in order, as a newcomer would type it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.system.newcomer import Newcomer, commands, slow_commands


@pytest.fixture
def newcomer(tmp_path: Path):
    somebody = Newcomer(tmp_path)
    yield somebody
    somebody.leave()


def test_tutorial_works_as_written(newcomer: Newcomer):
    printed = {line: newcomer.type(line) for line in commands("docs/tutorial.md")}
    assert "completed" in next(text for line, text in printed.items() if line.startswith("deskgrid job list"))
    assert newcomer.background[-1].wait(30) == 0  # the worker that was told to leave


def test_readme_and_how_to_work_as_written(newcomer: Newcomer):
    printed = {line: newcomer.type(line) for line in commands("README.md")}
    assert "completed" in next(text for line, text in printed.items() if line.startswith("deskgrid job list"))
    shutil.copy(newcomer.folder / "tiny.qcow2", newcomer.folder / "my.qcow2")
    lines = commands("docs/how-to.md")
    assert len(lines) > 10
    leaving = [line for line in lines if line.endswith("worker leave")]
    for line in [*(line for line in lines if line not in leaving), *leaving]:
        newcomer.type(line)


@pytest.mark.full
def test_what_takes_minutes_works_as_written(newcomer: Newcomer):
    for line in commands("README.md"):
        newcomer.type(line)
    lines = slow_commands("docs/how-to.md")
    assert lines[0].startswith("deskgrid disk build debian")
    for line in lines:
        newcomer.type(line)
