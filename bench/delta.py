"""A new version of a disk: what its delta costs, against the whole disk and against zstd's own --patch-from.

    python bench/delta.py [--quick] [--runs N] [--plot]

Real Debian disks, built here (minutes, and a network unless the packages are in the cache): the plain one, and the same with a changed line, with
one package more, and with many. Bytes are those that travel. Times are medians: unpacking and verifying the whole disk, as a worker does,
against making it from the older one and the delta. Neither has the network in it; at 100 Mbit/s a whole disk takes 10 s more.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import msgspec
from report import Figure, arguments, median_of, publish

from deskgrid.cli.disk import cache_folder
from deskgrid.machines.deltas import make_delta
from deskgrid.machines.disk_import import PreparedDisk, prepare_disk
from deskgrid.machines.images import unpack_disk
from deskgrid.templates.debian import debian_recipe
from deskgrid.templates.debian_disk import build_disk

CHANGES = {
    "one line": ([], "echo changed >/etc/motd"),
    "bc besides": (["bc"], ""),
    "numpy besides": (["python3-numpy"], ""),
}


def build(folder: Path, name: str, packages: list[str], command: str) -> Path:
    """Build a Debian disk and return its file."""
    recipe = debian_recipe(packages)
    if command:
        recipe = msgspec.structs.replace(recipe, commands=f"{command}\n")
    disk = folder / f"{name.replace(' ', '-')}.qcow2"
    print(f"# build debian, {name}", flush=True)
    build_disk(disk, cache_folder() / "templates" / "debian", recipe, lambda _stage, _fraction: None)
    return disk


def patch_from(old: Path, new: Path, output: Path) -> int:
    """Return the bytes of zstd's own delta."""
    subprocess.run(["zstd", "-q", "-f", "-9", "--long=31", f"--patch-from={old}", str(new), "-o", str(output)], check=True)
    return output.stat().st_size


async def unpacked(packed: Path, output: Path, wanted: PreparedDisk, base: Path | None = None) -> float:
    """Make a disk as a worker does; return the seconds."""
    start = time.perf_counter()
    await unpack_disk(packed, output, sha256=wanted.sha256, size_bytes=wanted.size_bytes, format=wanted.format, base=base)
    seconds = time.perf_counter() - start
    output.unlink()
    return seconds


async def measure(folder: Path, name: str, old: Path, new: Path, runs: int) -> list[Figure]:
    made = await prepare_disk(new, folder)
    start = time.perf_counter()
    blob = await make_delta(old, made.path, folder / "delta", most_bytes=made.transport_bytes)
    making_s = time.perf_counter() - start
    if blob is None:
        raise SystemExit(f"{name}: the delta is larger than the disk")
    zstds = patch_from(old, new, folder / "patch")
    by_delta: list[float] = []
    whole: list[float] = []
    for _ in range(runs):
        by_delta.append(await unpacked(folder / "delta", folder / "out", made, old))
        whole.append(await unpacked(made.path, folder / "out", made))
    mib = 1 << 20
    return [
        Figure(
            f"{name}: bytes, against the whole",
            blob.size_bytes / mib,
            "MiB",
            made.transport_bytes / mib,
            blob.size_bytes / made.transport_bytes,
            0.5,
        ),
        Figure(
            f"{name}: bytes, against zstd --patch-from", blob.size_bytes / mib, "MiB", zstds / mib, blob.size_bytes / zstds, None
        ),
        Figure(
            f"{name}: made from the older disk",
            median_of(by_delta),
            "s",
            median_of(whole),
            median_of(by_delta) / median_of(whole),
            None,
        ),
        Figure(f"{name}: the delta is found in", making_s, "s", None, None, None),
    ]


def main() -> None:
    options = arguments(__doc__)
    runs = options.runs or (1 if options.quick else 5)
    figures: list[Figure] = []
    folder = Path(tempfile.mkdtemp(prefix="deskgrid-bench-", dir=os.environ.get("TMPDIR", "/var/tmp")))
    try:
        old = build(folder, "plain", [], "")
        for name, (packages, command) in list(CHANGES.items())[: 1 if options.quick else None]:
            figures += asyncio.run(measure(folder, name, old, build(folder, name, packages, command), runs))
    finally:
        shutil.rmtree(folder)
    publish("delta", figures, options)


if __name__ == "__main__":
    main()
