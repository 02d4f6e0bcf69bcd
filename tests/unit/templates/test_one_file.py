"""deskgrid as one file: what is in it, and the environment that its first run makes."""

from __future__ import annotations

import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tests.unit.templates.test_worker import pip

from deskgrid.errors import InvalidInput, OperatorError
from deskgrid.templates.one_file import write_program
from deskgrid.templates.program import PYTHONS

__all__ = ["pip"]

HERE = "{}.{}".format(*sys.version_info[:2])
PYTHON = sys.executable
"""The real one, which `pip` puts another before."""


def start(file: Path, home: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [PYTHON, file, "--version"],
        env={"DESKGRID_PROGRAM_HOME": str(home)},
        stderr=subprocess.PIPE,
        text=True,
        stdout=subprocess.PIPE,
    )


def test_same_packages_give_the_same_file_with_deskgrid_in_it(pip: Path, tmp_path: Path) -> None:
    for name in ("a.pyz", "b.pyz"):
        write_program(tmp_path / name, tmp_path / "cache")
    assert (tmp_path / "a.pyz").read_bytes() == (tmp_path / "b.pyz").read_bytes()
    assert (tmp_path / "a.pyz").stat().st_mode & 0o777 == 0o755
    names = zipfile.ZipFile(tmp_path / "a.pyz").namelist()
    assert {"__main__.py", "program/msgspec/a.py", "program/deskgrid/__main__.py", "program/deskgrid/machines/agent.sh"} <= set(
        names
    )
    assert {path.name for path in tmp_path.iterdir()} >= {"a.pyz", "b.pyz", "cache"} and not list(tmp_path.glob(".*"))


def test_first_runs_make_one_environment_whoever_is_first(pip: Path, tmp_path: Path) -> None:
    write_program(tmp_path / "deskgrid.pyz", tmp_path / "cache", python=HERE)
    running = [start(tmp_path / "deskgrid.pyz", tmp_path / "home") for _ in range(3)]
    said = [one.communicate(timeout=60)[1] for one in running]
    assert all("/program-" in one for one in said), "it is run there, and lacks what the pip of this test did not bring"
    [made] = (tmp_path / "home").iterdir()
    assert next(made.glob("lib/python*/site-packages/msgspec/a.py")).is_file()


def test_file_for_another_python_says_so(pip: Path, tmp_path: Path) -> None:
    other = next(one for one in PYTHONS if one != HERE)
    write_program(tmp_path / "deskgrid.pyz", tmp_path / "cache", python=other)
    running = start(tmp_path / "deskgrid.pyz", tmp_path / "home")
    assert running.communicate(timeout=60)[1] == f"this file is for Python {other}, and this is {HERE}\n"
    assert running.returncode == 1 and not (tmp_path / "home").exists()


def test_what_cannot_be_made_leaves_no_file(pip: Path, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"3\.9"):
        write_program(tmp_path / "deskgrid.pyz", tmp_path / "cache", python="3.9")
    pip.write_text("exit 1")
    with pytest.raises(OperatorError, match=r"worker\.lock"):
        write_program(tmp_path / "deskgrid.pyz", tmp_path / "cache")
    assert not list(tmp_path.glob("*.pyz*")) and not list(tmp_path.glob(".*"))
