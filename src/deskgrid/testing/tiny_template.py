"""The tiny template for tests and benches: built once, kept under the checkout's .cache, shared by parallel test processes."""

from __future__ import annotations

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from deskgrid.templates import cpio, tiny
from deskgrid.templates.tiny import TinyBuild, build_tiny

__all__ = ["template_cache", "tiny_template"]


def template_cache() -> Path:
    """Return the folder for templates and their packages: $DESKGRID_TEST_CACHE, or .cache/templates of the checkout."""
    chosen = os.environ.get("DESKGRID_TEST_CACHE")
    return Path(chosen) if chosen else Path(__file__).parents[3] / ".cache" / "templates"


def tiny_template() -> TinyBuild:
    """Return the tiny template made by the present recipe, building it if need be. Raise OperatorError as build_tiny does."""
    folder = template_cache() / f"tiny-{_recipe()}"
    build = TinyBuild(iso=folder / "tiny.iso", qcow2=folder / "tiny.qcow2")
    with _lock(template_cache()):
        if not (build.iso.exists() and build.qcow2.exists()):
            build = build_tiny(folder, template_cache() / "packages")
    return build


def _recipe() -> str:
    """Return a mark of everything in our sources that goes into the template."""
    sources = [Path(cpio.__file__), Path(tiny.__file__), *Path(tiny.__file__).parent.glob("tiny-*.sh")]
    return hashlib.sha256(b"".join(source.read_bytes() for source in sorted(sources))).hexdigest()[:16]


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
