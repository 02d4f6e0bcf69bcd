"""The owner's caps, measured from outside with the system's own counters: CPU share of a virtual machine and of a program, memory, network.

Guest and program use all that they get: a loop without end, memory filled until it is refused, a disk that is fetched as fast as it comes. The
yardstick is the bound itself, so a ratio of 1.05 is 5 % too much; that is the target.
"""

from __future__ import annotations

import os
import random
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from report import Figure, arguments, median_of, publish
from tests.system.harness import System, until

from deskgrid.testing.tiny_template import tiny_template
from deskgrid.units import MIB

_SPIN = "echo began\nwhile :; do :; done\n"
_LIMIT_S = 120.0


def tree(system: System) -> list[psutil.Process]:
    """Return the processes of the worker's machines and all below them."""
    found = {one.pid: one for root in system.machines() for one in (root, *root.children(recursive=True))}
    return list(found.values())


def used_s(processes: list[psutil.Process]) -> float:
    """Return the CPU seconds that processes have used."""
    return sum(sum(one.cpu_times()[:2]) for one in processes if one.is_running())


def submit(system: System, name: str, machine: str, script: str) -> int:
    """Submit a job of one script."""
    folder = system.folder / name
    (folder / "context").mkdir(parents=True)
    (folder / "context" / "context.sh").write_text(script)
    (folder / "job.toml").write_text(
        f'name = "{name}"\n[machine]\ncontext = "context"\n{machine}\n[limits]\nwall_time = "1h"\nattempts = 1\n'
    )
    return int(system.json("job", "submit", folder / "job.toml")["id"])


def cpu_share(system: System, kind: str, share: float, seconds: float) -> Figure:
    """Measure what a job uses that may use a share of one CPU."""
    drivers = {"vm": "qemu", "process": "process"}[kind]
    worker = system.add_worker(
        kind, DESKGRID_WORKER_DRIVERS=drivers, DESKGRID_WORKER_ACCELERATOR="tcg", DESKGRID_WORKER_CPU_SHARE=str(share)
    )
    machine = {"vm": 'disk = "tiny"\nmemory = "256MiB"\nscratch = "64MiB"', "process": 'kind = "process"\nscratch = "64MiB"'}[kind]
    job = submit(system, f"spin-{kind}-{share}", machine, _SPIN)
    until(lambda: "began" in system.cli("job", "logs", str(job)).stdout, what="the job spins", limit_s=_LIMIT_S)
    processes = [one for one in psutil.process_iter() if _is_of(one, system.folder / kind / "attempts")]
    every = list({one.pid: one for root in processes for one in (root, *root.children(recursive=True))}.values())
    before, start = used_s(every), time.monotonic()
    time.sleep(seconds)
    found = (used_s(every) - before) / (time.monotonic() - start)
    system.cli("job", "cancel", str(job))
    worker.stop()
    return Figure(f"CPU of a {kind} that may use {share:.0%} of one", found, "CPUs", share, found / share, 1.05)


def _is_of(process: psutil.Process, folder: Path) -> bool:
    try:
        return process.cwd().startswith(str(folder))
    except (psutil.Error, OSError):
        return False


def memory(system: System) -> Figure:
    """Measure the most that a program has that takes memory until it is ended."""
    bound = 128 * MIB
    system.add_worker("memory", DESKGRID_WORKER_DRIVERS="process")
    script = "exec python3 -c 'x = []\nwhile True: x.append(bytearray(1 << 20))'\n"
    job = submit(system, "memory", f'kind = "process"\nscratch = "64MiB"\nmemory = "{bound >> 20}MiB"', script)
    most = 0
    while system.states(job)[0] not in ("failed", "completed"):
        found = 0
        for one in psutil.process_iter():
            try:
                if "bytearray(1 << 20)" in " ".join(one.cmdline()) and one.name().startswith("python"):
                    found = max(found, one.memory_info().rss)
            except (psutil.Error, OSError):
                continue
        most = max(most, found)
    return Figure("memory of a program that takes what it gets", most / MIB, "MiB", bound / MIB, most / bound, 1.05)


def fetched(cache: Path) -> int:
    """Return the bytes that have come."""
    return sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())


def fetch_rate(system: System, name: str, size: int, rate: int) -> float:
    """Return the bytes in a second at which a new worker fetches a new disk."""
    raw = system.folder / f"{name}.img"
    raw.write_bytes(b"\xf4\xeb\xfd".ljust(510, b"\0") + b"\x55\xaa" + random.Random(name).randbytes(size - 512))
    system.cli("disk", "import", raw, "--name", name)
    worker = system.add_worker(
        name, DESKGRID_WORKER_DRIVERS="qemu", DESKGRID_WORKER_ACCELERATOR="tcg", DESKGRID_WORKER_NETWORK_BYTES_PER_S=str(rate)
    )
    job = submit(system, name, f'disk = "{name}"\nmemory = "64MiB"\nscratch = "64MiB"', "true\n")
    cache = system.folder / name / "cache"
    until(lambda: fetched(cache) > 4 * MIB, what="the disk comes", limit_s=_LIMIT_S)
    first, start = fetched(cache), time.monotonic()
    until(lambda: fetched(cache) > size * 0.9, what="most of it is there", limit_s=_LIMIT_S)
    found = (fetched(cache) - first) / (time.monotonic() - start)
    system.cli("job", "cancel", str(job))
    worker.stop()
    return found


def network(system: System, runs: int) -> Figure:
    """Measure how fast a worker fetches a disk."""
    rate = 8 * MIB
    found = median_of([fetch_rate(system, f"large{number}", 64 * MIB, rate) for number in range(runs)])
    return Figure("network of a worker that fetches a disk", found / MIB, "MiB/s", rate / MIB, found / rate, 1.05)


def main() -> None:
    options = arguments(__doc__)
    seconds = 5.0 if options.quick else 30.0
    os.environ.pop("DISPLAY", None)
    with tempfile.TemporaryDirectory(prefix="deskgrid-bench-") as folder:
        system = System(Path(folder))
        try:
            system.start_server()
            system.cli("disk", "import", tiny_template().qcow2, "--name", "tiny", "--agent")
            figures = [cpu_share(system, "process", 0.25, seconds)]
            figures += [cpu_share(system, "vm", share, seconds) for share in ((0.5,) if options.quick else (0.2, 0.5))]
            figures += [memory(system), network(system, 1 if options.quick else options.runs or 3)]
        finally:
            system.stop()
    publish("caps", figures, options)


if __name__ == "__main__":
    main()
