"""Scratch disks: making one, and getting the results out of it, against `tar | zstd` of the same files in a plain folder.

    python bench/scratch.py [--quick] [--runs N] [--folder DIR] [--plot [FILE.svg]]

Ours and the yardstick run in turn on the same files with warm caches; medians are compared. Ours includes starting the confined
child, reading ext4, hashing the archive and fsync; the yardstick is `tar -c . | zstd -3` into a file, without hash or fsync.
On a busy PC wall times compare schedulers; the processor times are then the better ones to look at.
The files: half random bytes, half words, in sizes from 2 KB to 32 MiB.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import random
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from deskgrid.machines.disks import create_scratch
from deskgrid.machines.qcow2 import pack_sparse
from deskgrid.machines.results import ExtractLimits, extract_results
from deskgrid.machines.sandbox import sandbox_status

MB = 10**6
GIB = 1 << 30
SCRATCH_BYTES = 8 * GIB
PLOT = Path("docs/bench/scratch.svg")
FILE_BYTES = (2_000, 30_000, 400_000, 4_000_000, 32 << 20)


def make_files(folder: Path, size_bytes: int, rng: random.Random) -> None:
    """Fill a folder with files of many sizes, every other one incompressible."""
    words = [bytes(rng.choices(b"etaoinshrdlucmfw", k=rng.randint(2, 9))) for _ in range(4000)]
    text = b" ".join(rng.choices(words, k=2_000_000))
    left, number = size_bytes, 0
    while left > 0:
        size = min(left, FILE_BYTES[number % len(FILE_BYTES)])
        path = folder / f"folder{number % 7}" / f"file{number}"
        path.parent.mkdir(exist_ok=True, parents=True)
        path.write_bytes(rng.randbytes(size) if number % 2 else piece_of(text, size, rng))
        left, number = left - size, number + 1


def piece_of(text: bytes, size: int, rng: random.Random) -> bytes:
    """Return `size` bytes of text that does not repeat from file to file."""
    start = rng.randrange(len(text))
    return (text[start:] + text * (size // len(text) + 1))[:size]


def seconds(work: Callable[[], Any]) -> float:
    """Return how long something takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def tar_zstd(folder: Path, output: Path, *options: str, sync: bool = False) -> None:
    """Run the yardstick; with `sync` until its file is on disk, as ours is."""
    with output.open("wb") as target:
        tar = subprocess.Popen(["tar", "-c", "-C", folder, "."], stdout=subprocess.PIPE)
        subprocess.run(["zstd", "-q", "-3", *options, "-c"], stdin=tar.stdout, stdout=target, check=True)
        assert tar.stdout is not None
        tar.stdout.close()
        assert tar.wait() == 0
        if sync:
            os.fsync(target.fileno())


def figure(name: str, value: float, unit: str, yardstick: float, target: str, met: bool) -> dict[str, Any]:
    """Return one figure as the benchmarks print them."""
    ratio = round(value / yardstick, 3) if yardstick else None
    return {
        "name": name,
        "value": round(value, 4),
        "unit": unit,
        "yardstick": round(yardstick, 4),
        "ratio": ratio,
        "target": target or None,
        "met": met if target else None,
    }


def packed_of(image: Path) -> Path:
    """Return where the scratch disk that a raw image became is."""
    return image.with_suffix(".qcow2")


def create_packed(image: Path, size_bytes: int, *, content: Path | None = None) -> None:
    """Make a scratch disk as the QEMU driver does."""
    create_scratch(image, size_bytes, content=content)
    packed_of(image).unlink(missing_ok=True)
    pack_sparse(image, packed_of(image))
    image.unlink()


def measure_creation(folder: Path, runs: int) -> list[dict[str, Any]]:
    """Time empty 8 GiB scratch disks, against mke2fs by hand."""
    ours: list[float] = []
    by_hand: list[float] = []
    image = folder / "empty.img"

    def yardstick() -> None:
        with image.open("xb") as file:
            file.truncate(SCRATCH_BYTES)
        options = ["-q", "-F", "-t", "ext4", "-m0", "-O", "^has_journal", "-E", "lazy_itable_init=1,nodiscard"]
        subprocess.run(["mke2fs", *options, image], check=True)

    for _ in range(runs):
        ours.append(seconds(lambda: create_packed(image, SCRATCH_BYTES)))
        stored = packed_of(image).stat().st_blocks * 512
        packed_of(image).unlink()
        by_hand.append(seconds(yardstick))
        image.unlink()
    value = statistics.median(ours)
    return [
        figure("create 8 GiB scratch", value, "s", statistics.median(by_hand), "", True),
        figure("8 GiB scratch on the host's disk", stored / MB, "MB", SCRATCH_BYTES / MB, "", True),
    ]


class Series:
    """Runs of one contender: wall and processor seconds, of all processes that it starts."""

    def __init__(self, name: str, work: Callable[[], Any]) -> None:
        self.name = name
        self._work = work
        self._wall: list[float] = []
        self._processor: list[float] = []

    def run(self, *, measured: bool) -> str:
        """Run once and return words about it."""
        before = processor_seconds()
        wall = seconds(self._work)
        processor = processor_seconds() - before
        if measured:
            self._wall.append(wall)
            self._processor.append(processor)
        return f"{self.name} {wall:.2f} s ({processor:.2f})"

    @property
    def wall(self) -> float:
        """Median."""
        return statistics.median(self._wall)

    @property
    def processor(self) -> float:
        """Median."""
        return statistics.median(self._processor)


def processor_seconds() -> float:
    """Return what this process and its ended children have used."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def measure_results(folder: Path, label: str, size_bytes: int, runs: int, *, allowed_s: float = 0.0) -> list[dict[str, Any]]:
    """Time getting `size_bytes` of files out. The target is `allowed_s` more than the yardstick, or 1.3 times it."""
    files, image, archive, tarball = (folder / name for name in ("files", "scratch.img", "result.tar.zst", "yardstick.tar.zst"))
    files.mkdir()
    make_files(files, size_bytes, random.Random(size_bytes))
    create_packed(image, SCRATCH_BYTES, content=files)
    os.sync()
    ours = Series("ours", lambda: asyncio.run(extract_results(packed_of(image), archive, limits=ExtractLimits())))
    yard_2 = Series("tar | zstd -T2", lambda: tar_zstd(files, tarball, "-T2"))
    yard_synced = Series("tar | zstd and fsync", lambda: tar_zstd(files, tarball, sync=True))
    yard = Series("tar | zstd", lambda: tar_zstd(files, tarball))
    # Once unmeasured: caches, byte code.
    for number in range(runs + 1):
        words = [series.run(measured=number > 0) for series in (ours, yard_2, yard_synced, yard)]
        print(f"{label}, wall (processor): {', '.join(words)}; load {os.getloadavg()[0]:.1f}", flush=True)
    met = ours.wall <= yard.wall + allowed_s if allowed_s else ours.wall <= 1.3 * yard.wall
    target = f"yardstick + {allowed_s} s" if allowed_s else "1.3 x"
    sent, expected = archive.stat().st_size, tarball.stat().st_size
    name = f"extract and pack {label}"
    figures = [
        figure(name, ours.wall, "s", yard.wall, target, met),
        figure(f"{name}, against zstd -T2", ours.wall, "s", yard_2.wall, "", True),
        figure(f"{name}, against zstd and fsync", ours.wall, "s", yard_synced.wall, "", True),
        figure(f"{name}, processor time", ours.processor, "s", yard.processor, "", True),
        figure(f"bytes sent for {label}", sent / MB, "MB", expected / MB, "1.05 x", sent <= 1.05 * expected),
    ]
    subprocess.run(["rm", "-rf", *map(str, (files, image, archive, tarball))], check=True)
    return figures


def plot(figures: list[dict[str, Any]], output: Path) -> None:
    """Draw value and yardstick of the timed figures as bars, by hand: no library needed."""
    timed = [f for f in figures if f["unit"] == "s"]
    scale = 420 / max(max(f["value"], f["yardstick"]) for f in timed)
    parts = []
    for row, f in enumerate(timed):
        y = 20 + 52 * row
        parts.append(f'<text x="10" y="{y + 10}">{f["name"]}</text>')
        for offset, key, colour in ((14, "value", "#2f6f9f"), (28, "yardstick", "#b9b9b9")):
            width = max(1, f[key] * scale)
            parts.append(f'<rect x="10" y="{y + offset}" width="{width:.1f}" height="12" fill="{colour}"/>')
            parts.append(f'<text x="{16 + width:.1f}" y="{y + offset + 10}">{f[key]:.3f} s</text>')
    height = 40 + 52 * len(timed)
    note = f'<text x="10" y="{height - 8}">blue: deskgrid, grey: yardstick of the same run; median</text>'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="560" height="{height}" font-family="sans-serif" font-size="11">'
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(head + '<rect width="100%" height="100%" fill="white"/>' + "".join(parts) + note + "</svg>\n")


def main() -> None:
    """Measure and print; the last line is one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="50 MB and 200 MB, 3 runs")
    parser.add_argument("--runs", type=int, default=0, help="measured runs each (5; quick: 3)")
    parser.add_argument("--folder", type=Path, help="where the files are made (about 15 GB; quick: 1 GB)")
    parser.add_argument("--plot", type=Path, nargs="?", const=PLOT, help=f"write a drawing (SVG), by default {PLOT}")
    arguments = parser.parse_args()
    runs = arguments.runs or (3 if arguments.quick else 5)
    large = ("200 MB", 200 * MB) if arguments.quick else ("2 GB", 2000 * MB)
    print("confined by:", ", ".join(sandbox_status()) or "nothing")
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder = Path(name)
        figures = measure_creation(folder, runs)
        figures += measure_results(folder, "50 MB", 50 * MB, max(runs, 5), allowed_s=0.3)
        figures += measure_results(folder, *large, runs)
    for f in figures:
        print(f"{f['name']:48} {f['value']:>9.3f} {f['unit']:3} yardstick {f['yardstick']:>9.3f}  x{f['ratio']:<6} {f['target']}")
    if arguments.plot:
        plot(figures, arguments.plot)
    print(json.dumps({"bench": "scratch", "figures": figures}))


if __name__ == "__main__":
    main()
