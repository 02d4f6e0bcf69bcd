"""A pilot with ROOT: from an empty grid to the first result, and what the worker in the machine costs its jobs.

The disk is built before, if it is not there (docs/how-to.md). Then:

    first result     from the start of the worker on the PC, which has nothing, to the result of a job that needs ROOT: the disk is fetched and unpacked, the
                     pilot boots and joins, the job runs. Yardstick: the same machine booted as a plain job whose context.sh runs the same program, on
                     the same PC that has nothing.
    jobs             how long a job takes in a row of them, one after the other, in a pilot with one CPU: from the first's start to the last's end, for each
                     second of CPU that its program used. Yardstick: the same programs one after the other by hand, as in that machine's context.sh. For jobs
                     of two lengths. By seconds of CPU, as the machine itself counts them, because how fast an emulated CPU is changes from minute to minute.

A job is `python3 part.py N FILLS`: ROOT starts, fills a histogram a thousand times, or FILLS times, and writes it.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from report import Figure, arguments, publish
from tests.system.harness import System, until

import deskgrid
from deskgrid.testing.tiny_template import template_cache

_LIMIT_S = 3600.0
_MEMORY, _SCRATCH = "2GiB", "4GiB"
_SHORT, _LONG = 1_000, 500_000
"""Fills of a histogram."""
PART = """
import os
import sys

import ROOT

mass = ROOT.TH1D("mass", "", 60, 60.0, 120.0)
chance = ROOT.TRandom3(int(sys.argv[1]) + 1)
for _ in range(int(sys.argv[2])):
    mass.Fill(chance.Gaus(91.2, 2.5))
file = ROOT.TFile("part.root", "RECREATE")
mass.Write()
file.Close()
with open("cpu", "w") as told:
    told.write(f"{os.times().user + os.times().system}\\n")
"""
BY_HAND = """
now() {{ cut -d' ' -f1 /proc/uptime; }}
for fills in {short} {long}; do
    begun=$(now)
    for number in $(seq {count}); do mkdir -p "/tmp/$number"; (cd "/tmp/$number" && python3 -W ignore /context/part.py "$number" "$fills"); done
    echo $begun $(now) $(cat /tmp/*/cpu) >>/scratch/times
done
"""


def _disk() -> Path:
    """Return the root disk with this very deskgrid in it, built if it is not there."""
    sources = Path(deskgrid.__file__).parent
    files = sorted(path for path in sources.rglob("*") if path.is_file() and "__pycache__" not in path.parts)
    mark = hashlib.sha256(b"".join(hashlib.sha256(path.read_bytes()).digest() for path in files)).hexdigest()[:12]
    file = template_cache() / f"bench-root-{mark}.qcow2"
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        for older in file.parent.glob("bench-root*.qcow2"):
            older.unlink()
        subprocess.run([sys.executable, "-m", "deskgrid", "disk", "build", "root", "-o", str(file)], check=True)
    return file


def _system(folder: Path, disk: Path) -> System:
    system = System(folder)
    for name in (
        "LEASE_S",
        "INTERVAL_S",
        "SWEEP_S",
    ):  # those of tests: a call a second from an emulated machine is a part of its CPU
        del system.environment[f"DESKGRID_SERVER_{name}"]
    system.start_server()
    system.cli("disk", "import", disk, "--name", "root", "--agent")
    return system


def _job(system: System, name: str, text: str, script: str) -> Path:
    folder = system.folder / name
    (folder / "context").mkdir(parents=True)
    (folder / "context" / "part.py").write_text(PART)
    (folder / "context" / "context.sh").write_text(script)
    (folder / "job.toml").write_text(text)
    return folder / "job.toml"


def _ended(system: System, job: int) -> Any:
    detail = until(lambda: _is_over(system.job(job)), what=f"job {job} has ended", limit_s=_LIMIT_S)
    if detail["job"]["state"] != "completed":
        raise SystemExit(f"job {job}: {detail['job']['message']}\n{system.logs()}")
    return detail


def _is_over(detail: Any) -> Any:
    return detail if detail["job"]["state"] in ("completed", "failed", "cancelled") else None


class Row(NamedTuple):
    """Jobs one after the other."""

    seconds: float
    """Of each job, from one's begin to the next one's."""
    cpu_s: float
    """Of each program."""

    @property
    def dilation(self) -> float:
        return self.seconds / self.cpu_s


class Times(NamedTuple):
    """What one way of doing it took."""

    first: float
    """Seconds from the worker's start to the first result."""
    short: Row
    long: Row


def by_hand(folder: Path, disk: Path, count: int) -> Times:
    """Return the times of a machine that runs the programs; its first result is that of the whole machine, less what all but the first took."""
    folder.mkdir()
    system = _system(folder, disk)
    try:
        text = f'[machine]\ndisk = "root"\ncontext = "context/"\nmemory = "{_MEMORY}"\nscratch = "{_SCRATCH}"\n[limits]\nboot_time = "15m"\nwall_time = "2h"\n'
        system.cli("job", "submit", _job(system, "hand", text, BY_HAND.format(count=count, short=_SHORT, long=_LONG)))
        start = time.time()
        system.add_worker(DESKGRID_WORKER_DRIVERS="qemu")
        detail = _ended(system, 1)
        seconds = detail["job"]["finished_at"] - start
        system.cli("job", "results", "1", "-o", folder / "out")
        rows = [list(map(float, line.split())) for line in (folder / "out" / "times").read_text().splitlines()]
        short, long = (Row((over - begun) / count, sum(cpu) / count) for begun, over, *cpu in rows)
        return Times(seconds - short.seconds * (count - 1) - long.seconds * count, short, long)
    finally:
        system.stop()


def by_pilot(folder: Path, disk: Path, count: int) -> Times:
    """Return the same for jobs in a pilot, each for itself."""
    folder.mkdir()
    system = _system(folder, disk)
    try:
        pilot = (
            "--disk",
            "root",
            "--packages",
            "root",
            "--memory",
            _MEMORY,
            "--scratch",
            _SCRATCH,
            "--idle",
            "30m",
            "--lifetime",
            "6h",
        )
        system.cli("pilot", "submit", *pilot)
        for fills in (_SHORT, _LONG):
            text = (
                f'command = ["python3", "-W", "ignore", "/context/part.py", "{{index}}", "{fills}"]\n[machine]\nkind = "process"\nneed = ["root"]\n'
                f'context = "context/"\nmemory = "1GiB"\nscratch = "64MiB"\n[array]\ncount = {count}\n'
            )
            system.cli("job", "submit", _job(system, f"jobs {fills}", text, ""))
        start = time.time()
        system.add_worker(DESKGRID_WORKER_DRIVERS="qemu")
        rows = [[_ended(system, 2 + row * count + number) for number in range(count)] for row in range(2)]
        ends = [[detail["job"]["finished_at"] for detail in row] for row in rows]
        begun = [min(detail["attempts"][-1]["leased_at"] for detail in rows[0]), max(ends[0])]
        system.cli("job", "cancel", "1")
        short, long = (
            Row(
                (max(ends[row]) - begun[row]) / count,
                sum(_cpu_s(system, 2 + row * count + number) for number in range(count)) / count,
            )
            for row in range(2)
        )
        return Times(min(ends[0]) - start, short, long)
    finally:
        system.stop()


def _cpu_s(system: System, job: int) -> float:
    folder = system.folder / f"out-{job}"
    system.cli("job", "results", str(job), "-o", folder)
    return float((folder / "cpu").read_text())


def figures(*, quick: bool) -> list[Figure]:
    """Run all and return the figures."""
    disk, count = _disk(), 2 if quick else 3
    with tempfile.TemporaryDirectory(prefix="deskgrid-bench-", dir="/var/tmp") as name:
        hand = by_hand(Path(name) / "hand", disk, count)
        print(f"by hand: {hand}", flush=True)
        pilot = by_pilot(Path(name) / "pilot", disk, count)
        print(f"in a pilot: {pilot}", flush=True)
    # At least 0.9 times as many jobs as by hand.
    return [
        Figure("from an empty grid to the first result of ROOT", pilot.first, "s", hand.first, pilot.first / hand.first, None),
        *(
            Figure(
                f"time of a {name} job in one pilot by its CPU time",
                ours.dilation,
                "s/s",
                theirs.dilation,
                ours.dilation / theirs.dilation,
                1 / 0.9,
            )
            for name, ours, theirs in (("short", pilot.short, hand.short), ("longer", pilot.long, hand.long))
        ),
    ]


def main() -> None:
    options = arguments(__doc__)
    publish("pilot", figures(quick=options.quick), options)


if __name__ == "__main__":
    main()
