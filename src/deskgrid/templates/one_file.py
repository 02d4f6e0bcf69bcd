"""deskgrid as one file, for machines that do not have it, as those of a batch system: `python3 deskgrid.pyz worker run ...`.

    __main__.py        makes a Python environment of the rest, once, and runs it
    program/...        deskgrid and the packages of worker.lock (program.py)

It is a zip that Python runs (PEP 441), for one version of Python on x86-64 Linux: some packages are compiled. Compiled ones are not loaded from a zip,
and programs that deskgrid starts must find them, too; so they are unpacked into $DESKGRID_PROGRAM_HOME, or the user's cache folder.
"""

from __future__ import annotations

import hashlib
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

from deskgrid.errors import InvalidInput
from deskgrid.files import locked
from deskgrid.templates.program import PROGRAM_FOLDER, PYTHONS, program_files

__all__ = ["write_program"]

_SHEBANG = b"#!/usr/bin/env python3\n"
_MAIN = '''\
"""Makes a Python environment of this file's packages, once, and runs deskgrid in it."""

import os
import shutil
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

PYTHON, MARK = {python!r}, {mark!r}


def main():
    if sys.version_info[:2] != PYTHON:
        sys.exit("this file is for Python %d.%d, and this is %d.%d" % (*PYTHON, *sys.version_info[:2]))
    caches = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    home = Path(os.environ.get("DESKGRID_PROGRAM_HOME") or Path(caches, "deskgrid"))
    place = home / ("program-" + MARK)
    if not place.is_dir():
        make(place)
    python = str(place / "bin" / "python")
    os.execv(python, [python, "-m", "deskgrid", *sys.argv[1:]])


def make(place):
    place.parent.mkdir(parents=True, exist_ok=True)
    new = Path(tempfile.mkdtemp(prefix=".program-", dir=place.parent))
    try:
        venv.create(new, symlinks=True)
        [packages] = new.glob("lib/python*/site-packages")
        with zipfile.ZipFile(Path(__file__).parent) as files:
            for member in files.infolist():
                if member.filename.startswith("program/"):
                    member.filename = member.filename[len("program/"):]
                    files.extract(member, packages)
        try:
            new.rename(place)
        except OSError:
            if not place.is_dir():  # made by another at the same time
                raise
    finally:
        shutil.rmtree(new, ignore_errors=True)


main()
'''


def write_program(file: Path, cache: Path, *, python: str = PYTHONS[0]) -> None:
    """Write deskgrid as one file for a version of Python; the same each time. It appears whole or not at all.

    Packages are kept in folder `cache`; of several that use it at a time each waits for its turn. Raise InvalidInput for another version, OperatorError
    if packages cannot be had, OSError.
    """
    if python not in PYTHONS:
        raise InvalidInput(f"{python[:20]!r} is no Python that deskgrid is made for", where="python", hint=", ".join(PYTHONS))
    cache.mkdir(parents=True, exist_ok=True)
    with locked(cache / "lock"):
        files = program_files(cache, python=python)
        names = {f"program/{path.removeprefix(f'{PROGRAM_FOLDER}/')}": source for path, source in files.items()}
        partial = file.with_name(f".{file.name}.part")
        try:
            _write(partial, names, python)
            partial.chmod(0o755)
            partial.replace(file)
        finally:
            partial.unlink(missing_ok=True)


def _write(file: Path, sources: Mapping[str, Path], python: str) -> None:
    file.write_bytes(_SHEBANG)
    digest = hashlib.sha256(python.encode())
    with zipfile.ZipFile(file, "a", zipfile.ZIP_DEFLATED) as archive:
        for name, source in sources.items():
            content = source.read_bytes()
            digest.update(f"{name} {len(content)}\n".encode() + content)
            archive.writestr(_member(name), content)
        major, minor = map(int, re.findall(r"\d+", python))
        main = _MAIN.format(python=(major, minor), mark=digest.hexdigest()[:16])
        archive.writestr(_member("__main__.py"), main)


def _member(name: str) -> zipfile.ZipInfo:
    found = zipfile.ZipInfo(name)  # of 1980: the same bytes each time
    found.compress_type = zipfile.ZIP_DEFLATED
    found.external_attr = 0o100644 << 16
    return found
