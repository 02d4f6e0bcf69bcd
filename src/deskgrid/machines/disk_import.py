"""Making a disk of the grid from whatever image a user has: unwrap, check, convert, pack. The policy is in images.py.

qemu-img sees one file, confined, as the format that our own check of its header found; no name in an image is followed, and no name of a
file can be taken for an option or a protocol.
"""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from deskgrid.archive import ParallelSha256, atomic_file, printable, write_all, zstd
from deskgrid.errors import BadImage, DriverUnusable, NoSpace
from deskgrid.machines.blocking import Progress, chunks, in_thread, on_loop
from deskgrid.machines.foreign_images import Foreign, read_vdi, read_vhd, read_vhdx, read_vmdk
from deskgrid.machines.images import MAX_VIRTUAL_BYTES, ImageInfo, ImageKind, check_image, detect_format, opened
from deskgrid.machines.sandbox import Confinement, Finished, run_confined
from deskgrid.machines.unwrapping import SPARE_BYTES, unwrap
from deskgrid.model.ids import Sha256
from deskgrid.model.machines import DiskFormat

__all__ = ["PreparedDisk", "prepare_disk"]

Begin = Callable[[str], Progress]
"""Called with the title of each stage; what it returns is told how far the stage is."""
_TRANSPORT_LEVEL = 6
"""zstd level: packed once, sent many times; higher ones gain 2 % and take twice as long."""
_CONVERT_S = 3600.0
_CONVERT_MEMORY_BYTES = 2 << 30
_FOREIGN = {ImageKind.VMDK: read_vmdk, ImageKind.VDI: read_vdi, ImageKind.VHD: read_vhd, ImageKind.VHDX: read_vhdx}


class PreparedDisk(Struct, frozen=True, kw_only=True):
    """A disk ready to be published."""

    path: Path
    """The transport file: one zstd frame of the image."""
    transport_sha256: Sha256
    transport_bytes: int
    sha256: Sha256
    """Of the unpacked image."""
    size_bytes: int
    """Of the unpacked image file."""
    format: DiskFormat
    virtual_bytes: int


async def prepare_disk(
    source: Path,
    output_dir: Path,
    begin: Begin | None = None,
    *,
    shrink: bool = False,
    max_virtual_bytes: int = MAX_VIRTUAL_BYTES,
) -> PreparedDisk:
    """Make a disk of the grid from a user's image, and pack it into `output_dir`. With `shrink` a qcow2 is written anew without its unused room.

    Raises BadImage, NoSpace, or DriverUnusable if a conversion needs qemu-img and it is missing; then nothing is left in
    `output_dir`. When cancelled, it stops within a second and leaves no part of a file.
    """
    begin = begin or (lambda title: lambda done, whole: None)
    # Resolved: the converter's confinement is by path.
    source, output_dir = source.resolve(), output_dir.resolve()
    made: list[Path] = []
    try:
        plain = await unwrap(source, output_dir, max_bytes=max_virtual_bytes, progress=begin(f"look at {source.name}"))
        made += [plain] if plain != source else []
        foreign = _what_to_convert(plain, max_virtual_bytes, shrink=shrink)
        if foreign is not None:
            begin(f"convert from {foreign.driver}")
            made.append(output_dir / f".{os.getpid()}.converted.part.qcow2")
            await _convert(plain, foreign, made[-1])
            plain = made[-1]
        info = check_image(plain, max_virtual_bytes=max_virtual_bytes)
        if foreign is None and info.format is DiskFormat.QCOW2:
            await _check_inside(plain)
        transport = output_dir / f"{source.stem}.{info.format}.zst"
        tell = on_loop(begin("pack"))
        return await in_thread(lambda stop: _pack(plain, transport, info, tell, stop))
    except BadImage as error:
        raise BadImage(error.message, where=str(source), hint=error.hint) from error
    finally:
        for file in made:
            file.unlink(missing_ok=True)


def _what_to_convert(image: Path, max_virtual_bytes: int, *, shrink: bool) -> Foreign | None:
    """Return as what an image is to be converted, None if it stays as it is. Raise BadImage."""
    kind = detect_format(image)
    with opened(image) as (read_at, size):
        foreign = _FOREIGN[kind](read_at, size) if kind in _FOREIGN else Foreign("raw", size)
    if kind not in (*_FOREIGN, ImageKind.RAW):
        info = check_image(image, max_virtual_bytes=max_virtual_bytes)
        if info.format is not DiskFormat.QCOW2 or not (info.compressed or info.snapshots or shrink):
            return None
        foreign = Foreign("qcow2", info.virtual_bytes)
    if foreign.virtual_bytes > max_virtual_bytes:
        raise BadImage(f"is a disk of {foreign.virtual_bytes} bytes, more than the {max_virtual_bytes} allowed")
    return foreign


async def _convert(image: Path, foreign: Foreign, output: Path) -> None:
    """Write a new plain qcow2 with the content of an image. Where it has only zeros, the new one has nothing."""
    room = shutil.disk_usage(output.parent).free - SPARE_BYTES
    if room <= 0:
        raise NoSpace("no space for the converted disk: less than 1 GiB is free", hint="free some disk space")
    # In these options a comma separates; two are one in a value.
    name = str(image).replace(",", ",,")
    options = ",".join((f"driver={foreign.driver}", *foreign.options, "file.driver=file", f"file.filename={name}"))
    command = ["convert", "--image-opts", "-O", "qcow2", "-o", "compat=1.1", options, str(output)]
    finished = await _qemu_img(command, image, output.parent, most_bytes=room)
    if not finished.code:
        return
    if b"No space left" in finished.errors or b"File too large" in finished.errors:
        raise NoSpace("no space for the converted disk: at least 1 GiB stays free", hint=f"free some space in {output.parent}")
    raise BadImage(f"cannot be converted: {_last_line(finished.errors)}")


async def _check_inside(image: Path) -> None:
    """Let qemu-img, where it is, check that the tables of a qcow2 do not contradict each other. Leaks do no harm."""
    if shutil.which("qemu-img") is None:
        return
    finished = await _qemu_img(["check", "-q", "-f", "qcow2", str(image)], image, None)
    if finished.code not in (0, 3):
        words = _last_line(finished.errors or finished.output)
        raise BadImage(f"is damaged: {words}", hint="see qemu-img check -r all")


async def _qemu_img(arguments: list[str], image: Path, output_dir: Path | None, *, most_bytes: int = 0) -> Finished:
    program = shutil.which("qemu-img")
    if program is None:
        raise DriverUnusable(
            "qemu-img is needed to convert this disk", hint="install the package qemu-utils, or convert it elsewhere"
        )
    confinement = Confinement(
        memory_bytes=_CONVERT_MEMORY_BYTES,
        cpu_s=int(_CONVERT_S) * 2,
        file_bytes=most_bytes,
        readable=(str(image),),
        writable=(str(output_dir),) if output_dir else (),
    )
    try:
        return await run_confined([str(Path(program).resolve()), *arguments], confinement, wall_s=_CONVERT_S)
    except TimeoutError as error:
        raise BadImage(f"converting took more than {_CONVERT_S:.0f} s") from error


def _last_line(words: bytes) -> str:
    return printable(words.strip().rpartition(b"\n")[2][-300:]) or "qemu-img gave no reason"


def _pack(image: Path, transport: Path, info: ImageInfo, progress: Progress, stop: threading.Event) -> PreparedDisk:
    parameter = zstd.CompressionParameter
    compressor = zstd.ZstdCompressor(
        options={
            parameter.compression_level: _TRANSPORT_LEVEL,
            parameter.nb_workers: min(os.cpu_count() or 1, 8),
            parameter.checksum_flag: 1,
        }
    )
    size = packed_bytes = 0
    with image.open("rb", buffering=0) as source, ParallelSha256() as whole, ParallelSha256() as packed:

        def put(data: bytes) -> int:
            packed.update(data)
            write_all(target, data)
            return len(data)

        with atomic_file(transport, mode=0o644) as target:
            for data in chunks(source, stop):
                whole.update(data)
                packed_bytes += put(compressor.compress(data))
                size += len(data)
                progress(size, info.file_bytes)
            packed_bytes += put(compressor.flush())
            if size != info.file_bytes:
                raise BadImage("changed while it was read", hint="shut down the machine that uses it")
        return PreparedDisk(
            path=transport,
            transport_sha256=Sha256(packed.hexdigest()),
            transport_bytes=packed_bytes,
            sha256=Sha256(whole.hexdigest()),
            size_bytes=size,
            format=info.format,
            virtual_bytes=info.virtual_bytes,
        )
