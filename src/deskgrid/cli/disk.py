"""deskgrid disk: build virtual disks and publish them for jobs to boot."""

from __future__ import annotations

import asyncio
import hashlib
import importlib.resources
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import platformdirs
from cyclopts import App, Parameter

from deskgrid.cli.connection import connected
from deskgrid.cli.data import print_data, reference_of, require_file
from deskgrid.cli.output import NO_NEGATIVES, Json, Reporter, make_reporter, print_json, print_lines
from deskgrid.errors import InvalidInput
from deskgrid.model.data import Blob, Data, DataKind, Disk, Visibility
from deskgrid.model.machines import ContextLabel
from deskgrid.units import parse_size

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid

__all__ = ["app", "cache_folder", "cached_tiny", "publish_disk"]

app = App(default_parameter=NO_NEGATIVES, name="disk", help="Build virtual disks and publish them.")


def cache_folder() -> Path:
    """Return where packages and built templates are kept: $DESKGRID_CACHE, or the user's cache folder."""
    return Path(os.environ.get("DESKGRID_CACHE") or platformdirs.user_cache_path("deskgrid"))


@app.command
async def build(
    template: Literal["tiny", "debian"],
    /,
    *,
    packages: str = "",
    size: str = "",
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    json: Json = False,
) -> None:
    """Build a template disk from Debian's packages, as an ordinary user.

    For example:

        deskgrid disk build tiny
        deskgrid disk build tiny --output tiny.iso
        deskgrid disk build debian --packages apache2,gnuplot-nox --size 8GiB

    Parameters
    ----------
    template
        Which one: tiny is a kernel, busybox and the agent, and boots in seconds.
        debian has systemd, ssh, rsync, cloud-init, and what is installed besides.
    packages
        What to install in debian besides, with commas between.
    size
        Of the disk of debian, 4GiB by default; what is not used takes no room.
    output
        File to write, .qcow2 (or .iso for tiny); ./TEMPLATE.qcow2 by default.
    """
    file = output or Path(f"{template}.qcow2")
    _check_output(file, (".qcow2", ".iso") if template == "tiny" else (".qcow2",))
    with make_reporter(json) as reporter:
        if template == "tiny":
            _refuse_for_tiny(packages=packages, size=size)
            with tempfile.TemporaryDirectory(prefix="deskgrid-") as folder:
                built = await _build_tiny(Path(folder), reporter)
                await asyncio.to_thread(_put_in_place, built[file.suffix], file)
        else:
            await _build_debian(file, packages, size, reporter)
    if json:
        print_json({"template": template, "file": str(file), "size_bytes": file.stat().st_size})
    else:
        print_lines(str(file))


def _check_output(file: Path, suffixes: tuple[str, ...]) -> None:
    """Refuse what cannot be written before minutes are spent on it."""
    if file.suffix not in suffixes:
        wanted = " or ".join(suffixes)
        raise InvalidInput(f"{file.name} does not end in {wanted}", where="--output", hint=f"name a file {wanted}")
    if file.is_dir() or not file.parent.is_dir():
        raise InvalidInput(f"{file} is no file that can be written", where="--output", hint="name a file in a folder that exists")


def _refuse_for_tiny(**options: str) -> None:
    for name, value in options.items():
        if value:
            raise InvalidInput(
                "tiny is always the same", where=f"--{name}", hint="for packages or a size: deskgrid disk build debian"
            )


async def _build_debian(file: Path, packages: str, size: str, reporter: Reporter) -> None:
    from deskgrid.templates.debian import DEFAULT_SIZE_BYTES, debian_recipe
    from deskgrid.templates.debian_disk import build_disk

    names = [name.strip() for name in packages.split(",") if name.strip()]
    recipe = debian_recipe(names, size_bytes=parse_size(size) if size else DEFAULT_SIZE_BYTES)
    phase = reporter.begin("build the debian disk")
    cache = cache_folder() / "templates" / "debian"
    await asyncio.to_thread(build_disk, file, cache, recipe, lambda stage, _fraction: phase.note(stage))


async def _build_tiny(folder: Path, reporter: Reporter) -> dict[str, Path]:
    """Build into `folder`; return the files by suffix."""
    from deskgrid.templates.tiny import build_tiny

    phase = reporter.begin("build the tiny disk")
    packages = cache_folder() / "templates" / "packages"
    made = await asyncio.to_thread(build_tiny, folder, packages, lambda stage, _fraction: phase.note(stage))
    return {".iso": made.iso, ".qcow2": made.qcow2}


def _put_in_place(source: Path, file: Path) -> None:
    """Copy a file so that it appears whole or not at all."""
    partial = file.with_name(file.name + ".part")
    shutil.copyfile(source, partial)
    partial.replace(file)


async def cached_tiny(reporter: Reporter) -> Path:
    """Return the tiny disk, built now or by an earlier run of the same version of deskgrid."""
    folder = cache_folder() / "templates" / f"tiny-{_recipe_hash()}"
    disk = folder / "tiny.qcow2"
    if disk.exists():
        reporter.begin("build the tiny disk")
        reporter.end("built before")
        return disk
    await _build_tiny(folder, reporter)
    return disk


def _recipe_hash() -> str:
    """Return a hash of how templates are built, so that a newer recipe does not find an older one's disk."""
    digest = hashlib.sha256()
    for item in sorted(importlib.resources.files("deskgrid.templates").iterdir(), key=lambda entry: entry.name):
        if item.is_file():
            digest.update(item.name.encode() + b"\0" + item.read_bytes())
    return digest.hexdigest()[:12]


@app.command
async def publish(file: Path, /, *, name: str | None = None, public: bool = False, agent: bool = False, json: Json = False) -> None:
    """Check a disk image, pack it and upload it; jobs then boot it by its name.

    qcow2, raw, VDI, VMDK, VHDX and ISO images are taken. Images that refer to other files are refused.

    For example:

        deskgrid disk publish tiny.qcow2 --name tiny --public --agent
        deskgrid disk publish debian.qcow2 --name debian --agent
        deskgrid disk publish debian-12-nocloud.qcow2 --name cloud

    Parameters
    ----------
    file
        The image.
    name
        Its name on the grid; by default the file's without suffix. A name that exists gets a new version.
    public
        Everybody on the grid may boot it.
    agent
        Its system mounts a disk labelled CONTEXT and runs the agent from it, as built templates do.
        Otherwise the context disk is made for cloud-init (NoCloud, label CIDATA).
    """
    require_file(file)
    async with connected() as grid:
        with make_reporter(json) as reporter:
            label = ContextLabel.CONTEXT if agent else ContextLabel.CIDATA
            data = await publish_disk(grid, file, name or file.stem, reporter, label=label, public=public)
    if json:
        print_json(data)
    else:
        print_lines(reference_of(data))


async def publish_disk(grid: Grid, file: Path, name: str, reporter: Reporter, *, label: ContextLabel, public: bool = False) -> Data:
    """Check, pack and upload a disk image."""
    from deskgrid.machines.images import prepare_disk

    packed = cache_folder() / "publish"  # not the temporary folder, which may be in memory: disks are large
    packed.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=packed) as folder:
        packing = reporter.begin(f"check and pack {file.name}")
        made = await prepare_disk(file, Path(folder), packing.done)
        disk = Disk(
            sha256=made.sha256,
            size_bytes=made.size_bytes,
            virtual_bytes=made.virtual_bytes,
            format=made.format,
            context_label=label,
        )
        uploading = reporter.begin(f"upload {name}", made.transport_bytes)
        return await grid.put(
            made.path,
            name,
            kind=DataKind.DISK,
            visibility=Visibility.PUBLIC if public else Visibility.PRIVATE,
            disk=disk,
            blob=Blob(sha256=made.transport_sha256, size_bytes=made.transport_bytes),
            progress=uploading.done,
        )


@app.command(name="list")
async def list_(*, json: Json = False) -> None:
    """List the disks that your jobs may boot.

    For example:

        deskgrid disk list
    """
    async with connected() as grid:
        found = await grid.list_data(DataKind.DISK)
    if json:
        print_json(found)
    else:
        print_data(found)
