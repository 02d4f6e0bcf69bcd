"""Python packages as files for a disk, as a lock file beside this one pins them; and deskgrid itself: this very version with what it needs.

They are fetched with this machine's own pip, for the disk's Python and not for the one that runs here, and kept in a cache, so that a
later build needs no network. pip holds each file against its sha256.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import deskgrid
from deskgrid.errors import OperatorError

__all__ = ["PROGRAM_FOLDER", "PYTHONS", "program_files", "python_files"]

PROGRAM_FOLDER = "/usr/lib/deskgrid/program"
"""Where the files are put in a disk; a recipe's commands move them on."""
PYTHONS = ("3.11", "3.12", "3.13")
"""For which there are packages. The first is Debian 12's, in disks."""
_GLIBC_MINORS = (36, 35, 34, 31, 28, 27, 24, 17, 12, 5)
"""Of the manylinux tags that a Debian 12 takes (PEP 600)."""
_PIP_LIMIT_S = 900.0
_NOT_IN_A_DISK = ("bin", "share", "__pycache__")
"""Scripts name the Python that ran pip; bytecode is the disk's own matter."""


def program_files(cache: Path, *, python: str = PYTHONS[0]) -> dict[str, Path]:
    """Return deskgrid and what it needs: path in the disk -> file. As `python_files`."""
    return python_files(cache, "worker.lock", PROGRAM_FOLDER, python=python) | _below(
        Path(deskgrid.__file__).parent, f"{PROGRAM_FOLDER}/deskgrid"
    )


def python_files(cache: Path, lock: str, folder: str, *, python: str = PYTHONS[0]) -> dict[str, Path]:
    """Return the packages of a lock file for a folder of the disk: path in the disk -> file, in one order.

    They are kept in folder `cache`. Not safe for two callers of one cache at a time. Raise OperatorError if a package cannot be had.
    """
    return _below(_packages(cache, Path(__file__).parent / lock, python), folder)


def _below(root: Path, folder: str) -> dict[str, Path]:
    found: dict[str, Path] = {}
    for file in sorted(root.rglob("*")):
        path = file.relative_to(root)
        if file.is_file() and path.parts[0] not in _NOT_IN_A_DISK and "__pycache__" not in path.parts:
            found[f"{folder}/{path.as_posix()}"] = file
    return found


def _packages(cache: Path, lock: Path, python: str) -> Path:
    """Return the folder with the packages, fetching them if they are not there."""
    name = f"python{python}-{lock.stem}"
    folder = cache / f"{name}-{hashlib.sha256(lock.read_bytes()).hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    for old in cache.glob(f"{name}-*"):  # of other versions, and those that were cut short
        shutil.rmtree(old)
    unfinished = folder.with_suffix(".new")
    _install(unfinished, lock, python)
    unfinished.rename(folder)
    return folder


def _install(folder: Path, lock: Path, python: str) -> None:
    tags = [f"manylinux_2_{minor}_x86_64" for minor in _GLIBC_MINORS] + ["manylinux2014_x86_64"]
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"),
        *("--target", str(folder), "--no-compile", "--no-deps", "--require-hashes", "--only-binary=:all:"),
        *("--python-version", python, "--implementation", "cp", *(word for tag in tags for word in ("--platform", tag))),
        *("--requirement", str(lock)),
    ]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=_PIP_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OperatorError(f"pip did not run: {error}") from error
    if done.returncode != 0:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(folder)
        missing = "No module named pip" in done.stderr
        hint = f"{sys.executable} -m ensurepip" if missing else "check the network and pip's settings, then try again"
        raise OperatorError(f"the packages of {lock.name} could not be fetched: {done.stderr.strip()[-1000:]}", hint=hint)
