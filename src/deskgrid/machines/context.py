"""The context disk: an ISO 9660 image with Rock Ridge (long names, modes, symlinks) made from the user's files and ours.

    /...                      the user's files, as they are
    /.deskgrid/agent.sh       what a template runs at the end of its boot
    /.deskgrid/environment    variables for context.sh, for a POSIX shell to read
    /user-data, /meta-data    cloud-init NoCloud, for disks without our agent; the user's own files go first

ISO 9660:1999 (level 4) has no limit on depth. There is no Joliet: only Windows needs it, and that could not read scratch.
"""

from __future__ import annotations

import hashlib
import importlib.resources
import io
import os
import re
import shlex
import stat
from collections.abc import Iterable, Iterator
from pathlib import Path

from msgspec import Struct
from pycdlib import PyCdlib
from pycdlib.pycdlibexception import PyCdlibException

from deskgrid.errors import InvalidInput
from deskgrid.machines.driver import MachineSpec
from deskgrid.model.machines import ContextLabel

__all__ = ["OWN_FOLDER", "create_context", "environment_file", "meta_data", "user_data"]

OWN_FOLDER = ".deskgrid"
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_NAME_BYTES = 255


def create_context(path: Path, spec: MachineSpec, *, instance: str) -> None:
    """Write the context disk of `spec` to `path`. `instance` tells this boot from others, for cloud-init.

    Sockets and devices are left out, links are kept and never followed. Raise InvalidInput for what an ISO cannot hold.
    """
    image = PyCdlib()
    image.new(interchange_level=4, rock_ridge="1.09", vol_ident=spec.context_label.value)
    writer = _Writer(image)
    try:
        taken = writer.add_folder(spec.context) if spec.context else frozenset[str]()
        writer.add_own(_own_files(spec, instance), taken)
        image.write(str(path))
    except PyCdlibException as error:
        raise InvalidInput(f"the context folder cannot be put on a disk: {error}") from error
    finally:
        image.close()


def environment_file(variables: Iterable[tuple[str, str]]) -> bytes:
    """Return lines that a POSIX shell reads as exactly these variables. Raise InvalidInput for what is no variable."""
    lines = []
    for name, value in variables:
        if not _VARIABLE.fullmatch(name) or "\0" in value:
            raise InvalidInput(f"{name!r} cannot be an environment variable", hint="letters, digits and _, and a value without NUL")
        lines.append(f"export {name}={shlex.quote(value)}\n")
    return "".join(lines).encode("utf-8", "surrogateescape")


def meta_data(name: str, instance: str) -> bytes:
    """Return NoCloud's meta-data. The instance id is new for each machine, or cloud-init would take it for a reboot."""
    hostname = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:63] or "job"
    mark = hashlib.sha256(instance.encode()).hexdigest()[:16]
    return f"instance-id: deskgrid-{mark}\nlocal-hostname: {hostname}\n".encode()


def user_data(label: ContextLabel) -> bytes:
    """Return NoCloud's user-data, which does what a template's own start-up does."""
    return (
        "#cloud-config\n"
        "runcmd:\n"
        "  - mkdir -p /context\n"
        f"  - test -e /context/{OWN_FOLDER}/agent.sh || mount -o ro LABEL={label.value} /context\n"
        f"  - sh /context/{OWN_FOLDER}/agent.sh\n"
    ).encode()


def _own_files(spec: MachineSpec, instance: str) -> dict[str, bytes]:
    return {
        f"{OWN_FOLDER}/agent.sh": (importlib.resources.files("deskgrid.machines") / "agent.sh").read_bytes(),
        f"{OWN_FOLDER}/environment": environment_file(spec.environment),
        "user-data": user_data(spec.context_label),
        "meta-data": meta_data(spec.name, instance),
    }


class _Place(Struct, frozen=True):
    """A folder on the host and its identifier path on the ISO."""

    folder: Path
    identifier: str


class _Writer:
    """Gives every entry a short unique ISO identifier; guests see the Rock Ridge name."""

    def __init__(self, image: PyCdlib) -> None:
        self._image = image
        self._count = 0

    def add_folder(self, root: Path) -> frozenset[str]:
        """Add what is in `root`, at any depth; return the names at the top."""
        places = [_Place(root, "")]
        while places:
            places.extend(self._add_entries(places.pop()))
        return frozenset(entry.name for entry in root.iterdir())

    def add_own(self, files: dict[str, bytes], taken: frozenset[str]) -> None:
        """Add our files, but none whose name the user took."""
        folder = self._directory("", OWN_FOLDER, 0o755)
        for name, data in files.items():
            inside = name.startswith(f"{OWN_FOLDER}/")
            if not inside and name in taken:
                continue
            self._image.add_fp(
                io.BytesIO(data),
                len(data),
                f"{folder if inside else ''}/{self._next('F')}.;1",
                rr_name=name.rpartition("/")[2],
                file_mode=stat.S_IFREG | 0o644,
            )

    def _add_entries(self, place: _Place) -> Iterator[_Place]:
        with os.scandir(place.folder) as entries:
            for entry in sorted(entries, key=lambda found: found.name):
                if place.identifier == "" and entry.name == OWN_FOLDER:
                    continue
                _check_name(entry.name)
                mode = entry.stat(follow_symlinks=False).st_mode
                if stat.S_ISDIR(mode):
                    yield _Place(Path(entry.path), self._directory(place.identifier, entry.name, stat.S_IMODE(mode)))
                elif stat.S_ISLNK(mode):
                    self._symlink(place.identifier, entry.name, str(Path(entry.path).readlink()))
                elif stat.S_ISREG(mode):
                    target = f"{place.identifier}/{self._next('F')}.;1"
                    # Read only when the image is written, so a thousand files are not a thousand open ones.
                    self._image.add_file(
                        entry.path, target, rr_name=entry.name, file_mode=stat.S_IFREG | (stat.S_IMODE(mode) & 0o777)
                    )

    def _directory(self, parent: str, name: str, mode: int) -> str:
        identifier = f"{parent}/{self._next('D')}"
        self._image.add_directory(identifier, rr_name=name, file_mode=stat.S_IFDIR | (mode & 0o777))
        return identifier

    def _symlink(self, parent: str, name: str, target: str) -> None:
        _check_utf8(target)
        self._image.add_symlink(f"{parent}/{self._next('L')}.;1", rr_symlink_name=name, rr_path=target)

    def _next(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count:07d}"


def _check_name(name: str) -> None:
    _check_utf8(name)
    if len(name.encode()) > _NAME_BYTES:
        raise InvalidInput(f"the name {name[:40]!r}... in the context folder is too long", hint=f"at most {_NAME_BYTES} bytes")


def _check_utf8(name: str) -> None:
    try:
        name.encode()
    except UnicodeEncodeError as error:
        raise InvalidInput(f"the name {name!r} in the context folder is not UTF-8") from error
