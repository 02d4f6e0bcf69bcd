"""Recipes that users write: a Debian with packages, files and commands of theirs, in one TOML.

    template = "debian"                      what it begins with: debian; worker, with deskgrid in it; or root, with ROOT too
    name = "physics"                         of the machine; by default the file's
    size = "8GiB"                            of the disk; what is not used takes no room
    packages = ["gnuplot-nox", "python3-numpy"]
    commands = ["useradd --create-home physicist"]    as root, in the system, after all else; one that fails ends the build

    [files]                                  path in the system -> a file in the recipe's folder or below, which keeps its right to be executed,
    "/usr/local/bin/analyse" = "analyse.py"  or text
    "/etc/motd" = { text = "hello\\n" }

All the rest is the template's (debian.py, worker.py, root.py).
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated

import msgspec
from msgspec import Meta, Struct

from deskgrid.errors import InvalidInput
from deskgrid.templates.debian import DEFAULT_SIZE_BYTES, debian_recipe
from deskgrid.templates.debian_disk import DebianRecipe
from deskgrid.templates.root import root_recipe
from deskgrid.templates.worker import worker_recipe
from deskgrid.units import parse_size

__all__ = ["TEMPLATES", "read_recipe"]

TEMPLATES: Mapping[str, Callable[..., DebianRecipe]] = {"debian": debian_recipe, "worker": worker_recipe, "root": root_recipe}
"""Name -> what makes a recipe of further packages and the disk's size."""
_HOST_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")


class _Text(Struct, forbid_unknown_fields=True):
    text: str


class _Recipe(Struct, forbid_unknown_fields=True):
    template: str = "debian"
    name: str = ""
    size: str = ""
    packages: tuple[str, ...] = ()
    commands: tuple[Annotated[str, Meta(min_length=1)], ...] = ()
    files: dict[str, str | _Text] = {}


def read_recipe(file: Path) -> DebianRecipe:
    """Read a recipe. Raise InvalidInput, saying where and what is allowed; what it names beside it must be there."""
    try:
        found = msgspec.convert(tomllib.loads(file.read_text()), type=_Recipe)
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidInput(f"cannot be read: {error}", where=str(file)) from error
    except (tomllib.TOMLDecodeError, msgspec.ValidationError) as error:
        raise InvalidInput(str(error), where=str(file), hint="template, name, size, packages, commands and [files]") from error
    name = found.name or re.sub(r"[^a-z0-9]+", "-", file.stem.lower()).strip("-")[:63] or "debian"
    if not _HOST_NAME.fullmatch(name):
        raise InvalidInput(f"{name[:80]!r} cannot be a machine's name", where=f"{file}: name", hint="small letters, digits and -")
    if found.template not in TEMPLATES:
        raise InvalidInput(f"there is no template {found.template[:80]!r}", where=f"{file}: template", hint=" or ".join(TEMPLATES))
    base = TEMPLATES[found.template](found.packages, size_bytes=parse_size(found.size) if found.size else DEFAULT_SIZE_BYTES)
    own = {_path(path, file): _content(content, file) for path, content in found.files.items()}
    taken = sorted(set(own) & set(base.files))
    if taken:
        raise InvalidInput(f"{', '.join(taken)} is the template's own", where=f"{file}: files", hint="change it by a command")
    commands = "".join(f"{command}\n" for command in found.commands)
    return msgspec.structs.replace(base, name=name, files={**base.files, **own}, commands=base.commands + commands)


def _path(path: str, file: Path) -> str:
    pure = PurePosixPath(path)
    if not path.startswith("/") or path.endswith("/") or ".." in pure.parts or pure == PurePosixPath("/") or not path.isprintable():
        raise InvalidInput(f"{path[:80]!r} is no place for a file", where=f"{file}: files", hint="a path from /, without ..")
    return str(PurePosixPath("/") / str(pure).lstrip("/"))


def _content(content: str | _Text, file: Path) -> str | Path:
    if isinstance(content, _Text):
        return content.text
    source = file.parent / content
    if not source.is_file():
        raise InvalidInput(f"there is no file {content[:200]!r} beside it", where=f"{file}: files", hint='or { text = "..." }')
    # Recipes are passed on: one of somebody else must not put a key of the user's into a disk that is published.
    resolved = source.resolve()
    if not resolved.is_relative_to(file.parent.resolve()):
        hint = "copy it into the recipe's folder, if it is meant"
        raise InvalidInput(f"{content[:200]!r} is outside of the recipe's folder", where=f"{file}: files", hint=hint)
    return resolved
