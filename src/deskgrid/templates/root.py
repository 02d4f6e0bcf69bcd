"""The root template: the worker template (worker.py) with ROOT in it (root.cern), for pilots that run physicists' jobs.

    /usr/local/lib/python3.11/dist-packages      ROOT's Python package and numpy, as root.lock pins them: `python3 -c "import ROOT"`
    /usr/local/bin/root                          its command

ROOT compiles C++ as it goes, so the compiler is there: without its headers it runs and quietly fills nothing.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from deskgrid.templates.debian import DEFAULT_SIZE_BYTES
from deskgrid.templates.debian_disk import DebianRecipe
from deskgrid.templates.worker import worker_recipe

__all__ = ["root_recipe"]

_SYSTEM = ("g++", "libsm6", "libxext6", "libxrender1")
"""The compiler with its headers, and what ROOT's libraries for pictures are linked with; all else they bring along."""
_PACKAGES = "/usr/local/lib/python3.11/dist-packages"
_COMMAND = f'#!/bin/sh\nexport ROOTSYS={_PACKAGES}/ROOT\nexec "$ROOTSYS/bin/root.exe" "$@"\n'
_INSTALL = f"""\
chmod 755 {_PACKAGES}/ROOT/bin/* || true
PYTHONHASHSEED=0 python3 -m compileall -q --invalidation-mode unchecked-hash {_PACKAGES}/ROOT {_PACKAGES}/numpy || true
"""


def root_recipe(packages: Sequence[str] = (), *, size_bytes: int = DEFAULT_SIZE_BYTES) -> DebianRecipe:
    """Return the root template's recipe. Raise InvalidInput as debian_recipe does."""
    base = worker_recipe((*_SYSTEM, *packages), size_bytes=size_bytes)
    return msgspec.structs.replace(
        base,
        name="root",
        files={**base.files, "/usr/local/bin/root": _COMMAND},
        commands=base.commands + _INSTALL,
        python={_PACKAGES: "root.lock"},
    )
