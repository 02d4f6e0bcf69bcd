"""deskgrid disk: build virtual disks, and import any for jobs to boot."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import importlib.resources
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import platformdirs
from cyclopts import App, Parameter
from msgspec import Struct

from deskgrid.cli.connection import connected
from deskgrid.cli.data import label_of, reference_of, require_file
from deskgrid.cli.output import NO_NEGATIVES, Json, Reporter, make_reporter, print_json, print_lines
from deskgrid.errors import BadImage, DeskgridError, InvalidInput, NotFound
from deskgrid.model.data import Blob, Data, DataKind, Delta, Disk, Visibility
from deskgrid.model.machines import ContextLabel
from deskgrid.model.manifests import Bundle, Manifest, Revocation
from deskgrid.units import format_size, parse_size

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid
    from deskgrid.machines.disk_import import PreparedDisk
    from deskgrid.templates.debian_disk import DebianRecipe

__all__ = ["DiskWords", "app", "cache_folder", "cached_tiny", "import_disk"]

app = App(default_parameter=NO_NEGATIVES, name="disk", help="Build virtual disks, and import any.")


def cache_folder() -> Path:
    """Return where packages and built templates are kept: $DESKGRID_CACHE, or the user's cache folder."""
    return Path(os.environ.get("DESKGRID_CACHE") or platformdirs.user_cache_path("deskgrid"))


@app.command
async def build(
    template: str,
    /,
    *,
    packages: str = "",
    size: str = "",
    output: Annotated[Path | None, Parameter(name=["--output", "-o"])] = None,
    json: Json = False,
) -> None:
    """Build a disk from Debian's packages, as an ordinary user: a template, or after a recipe of your own.

    For example:

        deskgrid disk build tiny
        deskgrid disk build tiny --output tiny.iso
        deskgrid disk build debian --packages apache2,gnuplot-nox --size 8GiB
        deskgrid disk build worker
        deskgrid disk build root
        deskgrid disk build physics.toml

    Parameters
    ----------
    template
        Which one: tiny is a kernel, busybox and the agent, and boots in seconds.
        debian has systemd, ssh, rsync, cloud-init, and what is installed besides.
        worker is debian with deskgrid in it, so that a machine can be a worker.
        root is worker with ROOT (root.cern) in it, for pilots that run physicists' jobs.
        A file that ends in .toml is a recipe: one of these with packages, files and commands of yours.
    packages
        What to install besides, not in tiny, with commas between.
    size
        Of the disk, 4GiB by default; what is not used takes no room.
    output
        File to write, .qcow2 (or .iso for tiny); ./TEMPLATE.qcow2 by default.
    """
    recipe = _recipe(template, packages, size)
    file = output or Path(f"{Path(template).stem}.qcow2")
    _check_output(file, (".qcow2", ".iso") if recipe is None else (".qcow2",))
    with make_reporter(json) as reporter:
        if recipe is None:
            with tempfile.TemporaryDirectory(prefix="deskgrid-") as folder:
                built = await _build_tiny(Path(folder), reporter)
                await asyncio.to_thread(_put_in_place, built[file.suffix], file)
        else:
            await _build_debian(file, recipe, reporter)
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


def _recipe(template: str, packages: str, size: str) -> DebianRecipe | None:
    """Return what to build; None for tiny. Raise InvalidInput."""
    from deskgrid.templates.debian import DEFAULT_SIZE_BYTES
    from deskgrid.templates.recipe import TEMPLATES, read_recipe

    if template in TEMPLATES:
        names = [name.strip() for name in packages.split(",") if name.strip()]
        return TEMPLATES[template](names, size_bytes=parse_size(size) if size else DEFAULT_SIZE_BYTES)
    if template != "tiny" and not template.endswith(".toml"):
        allowed = f"tiny, {', '.join(TEMPLATES)}, or a recipe: a file .toml"
        raise InvalidInput(f"there is no template {template[:80]!r}", where="TEMPLATE", hint=allowed)
    why = "tiny is always the same" if template == "tiny" else "a recipe says that itself"
    for name, value in (("--packages", packages), ("--size", size)):
        if value:
            raise InvalidInput(why, where=name, hint="for packages or a size: deskgrid disk build debian")
    return None if template == "tiny" else read_recipe(Path(template))


async def _build_debian(file: Path, recipe: DebianRecipe, reporter: Reporter) -> None:
    from deskgrid.templates.debian_disk import build_disk

    phase = reporter.begin(f"build the {recipe.name} disk")
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


@app.command(name="import")
async def import_(
    source: str,
    /,
    *,
    name: str | None = None,
    public: bool = False,
    agent: bool = False,
    cernvm: bool = False,
    shrink: bool = False,
    whole: bool = False,
    sha256: str = "",
    os: str = "",
    arch: str = "x86_64",
    about: str = "",
    manifest: Path | None = None,
    json: Json = False,
) -> None:
    """Make a disk of the grid from an image: check it, convert it, pack it and upload it; jobs then boot it by its name.

    Images of qcow2, raw, vmdk, vdi, vhd, vhdx and ISO are taken, also packed (zst, gz, xz, bz2) or in an .ova, tar or zip.
    What an image is, is found by its content. Images that refer to other files are refused.

    For example:

        deskgrid disk import tiny.qcow2 --name tiny --public --agent
        deskgrid disk import appliance.ova --name appliance
        deskgrid disk import https://example.org/debian-13-nocloud-amd64.qcow2 --name cloud --os "debian 13"
        deskgrid disk import root.qcow2 --name root --manifest root.manifest

    Parameters
    ----------
    source
        The image: a file, or an address that begins with https://. A file .manifest by itself is news from another grid of a disk that is here.
    name
        Its name on the grid; by default the file's without suffix. A name that exists gets a new version.
    public
        Everybody on the grid may boot it.
    agent
        Its system mounts a disk labelled CONTEXT and runs the agent from it, as built templates do.
        Otherwise the context disk is made for cloud-init (NoCloud, label CIDATA).
    cernvm
        It is a CernVM: the context disk has user-data in its format.
    shrink
        Write a qcow2 anew, without the room in it that has only zeros.
    whole
        Do not look whether a delta to the version before would spare the PCs that have that one most of the download.
    sha256
        Of the file: what is fetched or read must be that. An address that begins with http:// needs it.
    os
        Its system, as in "debian 12", for those who search.
    arch
        Kind of CPU that it is for.
    about
        What it is for, in a line.
    manifest
        What another grid, which this one trusts, says of it (`deskgrid disk export` there): the disk must be that one, and is described so.
    """
    from deskgrid.client.download import forget_download, is_url

    if source.endswith(_BUNDLE):
        await _take_news(Path(source), json)
        return
    bundle = _read_bundle(manifest) if manifest is not None else None
    label = label_of(agent=agent, cernvm=cernvm)
    words = DiskWords(label=label, os=os, arch=arch, about=about, said=_disk_in(bundle) if bundle is not None else None)
    async with connected() as grid:
        if bundle is not None:
            await _check_believed(grid, bundle)
        with make_reporter(json) as reporter:
            file, stem = await _file_of(source, sha256, reporter)
            data = await import_disk(grid, file, name or stem, reporter, words, public=public, shrink=shrink, whole=whole)
        if bundle is not None:
            await grid.take_bundle(bundle)
        if is_url(source):
            forget_download(file)
    if json:
        print_json(data)
    else:
        print_lines(reference_of(data))


_BUNDLE = ".manifest"
_LARGEST_BUNDLE_BYTES = 1 << 20


async def _take_news(file: Path, as_json: bool) -> None:
    bundle = _read_bundle(file)
    async with connected() as grid:
        found = await grid.take_bundle(bundle)
    if as_json:
        print_json(found)
    else:
        print_lines(*(reference_of(one.data) for one in found))


def _read_bundle(file: Path) -> Bundle:
    """Read what another grid says of a disk. Whether it is true, the server finds out. Raise InvalidInput."""
    require_file(file)
    try:
        if file.stat().st_size > _LARGEST_BUNDLE_BYTES:
            raise ValueError("it is too large")
        return msgspec.json.decode(file.read_bytes(), type=Bundle)
    except (ValueError, msgspec.DecodeError) as error:
        raise InvalidInput(f"is not what `deskgrid disk export` writes: {error}", where=str(file)) from error


async def _check_believed(grid: Grid, bundle: Bundle) -> None:
    """Let the server look at a bundle before a disk is described as it says. Raise Forbidden, Conflict (a revoked disk), InvalidInput."""
    with contextlib.suppress(NotFound):  # believed; the disk is what is imported now
        if not await grid.take_bundle(bundle):
            raise InvalidInput(
                "what it says was for a time, which is over", where="--manifest", hint="export it anew on the other grid"
            )


def _disk_in(bundle: Bundle) -> Disk:
    """Return which disk a bundle vouches for. Raise InvalidInput."""
    from deskgrid.core.manifests import read_own

    try:
        said = [read_own(text) for text in bundle.statements]
    except (ValueError, msgspec.DecodeError) as error:
        raise InvalidInput("its statements are damaged", where="--manifest") from error
    found = next((one.disk for one in said if isinstance(one, Manifest)), None)
    if found is None or any(isinstance(one, Revocation) for one in said):
        raise InvalidInput("it vouches for no disk: it was revoked", where="--manifest", hint="use another disk")
    return found


class DiskWords(Struct, frozen=True, kw_only=True):
    """What is said of an image besides what is found in it."""

    label: ContextLabel
    os: str = ""
    arch: str = "x86_64"
    about: str = ""
    said: Disk | None = None
    """What a manifest says: it goes before the others."""


async def _file_of(source: str, sha256: str, reporter: Reporter) -> tuple[Path, str]:
    """Return the file with an image, fetched if need be, and a name for it."""
    from deskgrid.client.download import download, is_url, name_in, sha256_of

    if is_url(source):
        fetching = reporter.begin(f"fetch {name_in(source)}")
        file = await download(source, cache_folder() / "downloads", sha256=sha256, progress=fetching.done)
        return file, _stem(name_in(source))
    file = Path(source)
    require_file(file)
    if sha256 and await asyncio.to_thread(sha256_of, file) != sha256:
        raise BadImage("is not the file that was wanted: its sha256 is another", where=source)
    return file, _stem(file.name)


def _stem(name: str) -> str:
    """Return a name without the suffixes of images: disk.raw.xz is disk."""
    while (path := Path(name)).suffix.lower() in _SUFFIXES:
        name = path.stem
    return name


_SUFFIXES = frozenset(
    (
        *(".qcow2", ".raw", ".img", ".vmdk", ".vdi", ".vhd", ".vhdx", ".iso", ".ova"),
        *(".zst", ".gz", ".xz", ".bz2", ".tar", ".tgz", ".zip"),
    )
)


async def import_disk(
    grid: Grid,
    file: Path,
    name: str,
    reporter: Reporter,
    words: DiskWords,
    *,
    public: bool = False,
    shrink: bool = False,
    whole: bool = False,
) -> Data:
    """Check, convert, pack and upload a disk image; besides, unless `whole`, a delta to its version before, if that is a small one."""
    from deskgrid.machines.disk_import import prepare_disk
    from deskgrid.machines.work_folders import work_folder

    packed = cache_folder() / "import"  # not the temporary folder, which may be in memory: disks are large
    packed.mkdir(parents=True, exist_ok=True)
    with work_folder(packed, "tmp") as folder:
        made = await prepare_disk(file, folder, lambda title: reporter.begin(title).done, shrink=shrink)
        delta = None if whole else await _delta_if_possible(grid, name, made, folder, reporter)
        uploading = reporter.begin(f"upload {name}", made.transport_bytes)
        return await grid.put(
            made.path,
            name,
            kind=DataKind.DISK,
            visibility=Visibility.PUBLIC if public else Visibility.PRIVATE,
            disk=_described(made, words),
            delta=delta,
            blob=Blob(sha256=made.transport_sha256, size_bytes=made.transport_bytes),
            progress=uploading.done,
        )


_WORTH_A_DELTA = 0.5
"""Of the whole: a larger delta spares too little to be kept."""


async def _delta_if_possible(
    grid: Grid, name: str, made: PreparedDisk, folder: Path, reporter: Reporter
) -> tuple[Path, Delta] | None:
    """Return what `_delta` does, or None with a note: a delta spares something, and whatever is wrong with the old version, the new one is right."""
    try:
        return await _delta(grid, name, made, folder, reporter)
    except DeskgridError as error:
        reporter.end("failed")
        reporter.say(f"no delta to the version before: {error.message}")
        return None


async def _delta(grid: Grid, name: str, made: PreparedDisk, folder: Path, reporter: Reporter) -> tuple[Path, Delta] | None:
    """Return a delta to the newest version of the caller's disk of this name; None if there is none, or it does not pay."""
    from deskgrid.machines.deltas import MOST_BASE_BYTES, make_delta
    from deskgrid.machines.images import unpack_disk

    me = (await grid.who()).name
    mine = [one for one in await grid.list_data(DataKind.DISK) if one.name == name and one.owner == me]
    newest = max(mine, key=lambda one: one.version, default=None)
    if newest is None or newest.disk is None or newest.disk.sha256 == made.sha256 or newest.disk.size_bytes > MOST_BASE_BYTES:
        return None
    fetching = reporter.begin(f"fetch {reference_of(newest)} for a delta", newest.blob.size_bytes)
    packed, base, output = folder / "base.zst", folder / "base", folder / "delta"
    await grid.get(reference_of(newest), packed, fetching.done)
    known = newest.disk
    await unpack_disk(packed, base, sha256=known.sha256, size_bytes=known.size_bytes, format=known.format)
    packed.unlink()
    making = reporter.begin("look for what has changed", made.size_bytes)
    blob = await make_delta(
        base, made.path, output, most_bytes=int(made.transport_bytes * _WORTH_A_DELTA), progress=lambda done, _: making.done(done)
    )
    base.unlink()
    if blob is None:
        return None
    making.note(f"{format_size(blob.size_bytes)} of {format_size(made.transport_bytes)}")
    return output, Delta(base=known.sha256, blob=blob)


def _described(made: PreparedDisk, words: DiskWords) -> Disk:
    """Return what a disk is. Raise BadImage if a manifest speaks of another one."""
    if words.said is not None:
        if words.said.sha256 != made.sha256:
            raise BadImage(
                "is not the disk that the manifest speaks of", where="--manifest", hint="the image as the other grid has it"
            )
        return words.said
    return Disk(
        sha256=made.sha256,
        size_bytes=made.size_bytes,
        virtual_bytes=made.virtual_bytes,
        format=made.format,
        context_label=words.label,
        os=words.os,
        arch=words.arch,
        about=words.about,
    )
