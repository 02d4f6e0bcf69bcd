"""The worker template: the debian template (debian.py) with deskgrid in it, so that a machine can itself be a worker.

    /opt/deskgrid                 a Python environment with deskgrid and the packages of worker.lock (program.py)
    /usr/local/bin/deskgrid       its command

It is started by nobody: a job's context.sh says whose grid to join. Native programs run in it in a sandbox, as on any PC.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from deskgrid.templates.debian import DEFAULT_SIZE_BYTES, debian_recipe
from deskgrid.templates.debian_disk import DebianRecipe
from deskgrid.templates.program import PROGRAM_FOLDER

__all__ = ["worker_recipe"]

_PACKAGES = ("python3", "bubblewrap", "util-linux")
"""What runs deskgrid, and what it runs native programs with."""
_ENVIRONMENT = "/opt/deskgrid"
_COMMAND = f"#!{_ENVIRONMENT}/bin/python\nfrom deskgrid.cli.main import main\n\nmain()\n"
_INSTALL = f"""\
python3 -m venv --without-pip {_ENVIRONMENT}
mv {PROGRAM_FOLDER}/* {_ENVIRONMENT}/lib/python3.*/site-packages/; rmdir {PROGRAM_FOLDER}
# Once, here: in software emulation to compile it all anew takes longer than the boot. Hashes in place of times, and in one order.
PYTHONHASHSEED=0 {_ENVIRONMENT}/bin/python -m compileall -q --invalidation-mode unchecked-hash {_ENVIRONMENT}/lib
"""


def worker_recipe(packages: Sequence[str] = (), *, size_bytes: int = DEFAULT_SIZE_BYTES) -> DebianRecipe:
    """Return the worker template's recipe. Raise InvalidInput as debian_recipe does."""
    base = debian_recipe((*_PACKAGES, *packages), size_bytes=size_bytes)
    files = {**base.files, "/usr/local/bin/deskgrid": _COMMAND}
    return msgspec.structs.replace(base, name="worker", files=files, commands=base.commands + _INSTALL, program=True)
