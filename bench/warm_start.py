"""A second job on a cached disk: from submit to the first line of context.sh, against QEMU started by hand with the same disks; and the bytes
that a job writes.

Both ways are watched alike: by the file that the guest's second serial line is written to. By hand means: disks made before
the clock starts, then QEMU with plain options, no sandbox, no priority, no bounds. Ours includes packing and sending the context,
the two calls, the journal, making the disks, and starting QEMU confined. The runs alternate. Bytes are those that the kernel says the processes
wrote (wchar of proc(5): what they gave it, before it merges anything), of worker, server and QEMU from submit to the end of the job; the
disk's size in the cache is what a copy of the disk for each job would write at least.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from report import Figure, arguments, median_of, publish
from tests.system.harness import System

from deskgrid.clock import SystemClock
from deskgrid.machines.disks import create_scratch
from deskgrid.machines.driver import MachineSpec
from deskgrid.machines.qemu import QemuDriver
from deskgrid.model.ids import JobId
from deskgrid.model.jobs import JobSpec, Machine
from deskgrid.model.machines import ContextLabel, MachineKind
from deskgrid.testing.tiny_template import tiny_template
from deskgrid.units import GIB, MIB

_FIRST = b"1 first"
_LIMIT_S = 120.0


def appears(files: Callable[[], list[Path]]) -> float:
    """Return when the first line of context.sh stands in one of the files (perf_counter)."""
    end = time.perf_counter() + _LIMIT_S
    while time.perf_counter() < end:
        for file in files():
            try:
                if _FIRST in file.read_bytes():
                    return time.perf_counter()
            except FileNotFoundError:
                continue
        time.sleep(0.005)
    raise SystemExit("context.sh did not begin within two minutes")


def by_hand(folder: Path, context: Path) -> float:
    """Start QEMU as a person would and return the seconds to the first line."""
    driver = QemuDriver(SystemClock(), accelerator="tcg")
    spec = MachineSpec(
        "by-hand", MachineKind.VM, 256 * MIB, 1, 8 * GIB, tiny_template().qcow2, context=context, context_label=ContextLabel.CONTEXT
    )
    handle = asyncio.run(driver.prepare(spec, folder / "hand"))
    workdir = Path(handle.workdir)
    base = tiny_template().qcow2
    subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base, workdir / "hand.qcow2"], check=True)
    create_scratch(workdir / "hand.img", 8 * GIB)
    drives = (
        "file=hand.qcow2,format=qcow2,index=0",
        "file=hand.img,format=raw,index=1",
        "file=context.iso,format=raw,index=3,media=cdrom",
    )
    command = ["qemu-system-x86_64", "-nodefaults", "-accel", "tcg", "-cpu", "max", "-m", "256", "-display", "none", "-no-reboot"]
    command += ["-serial", "file:hand-console.log", "-serial", "file:hand-channel.log"]
    for drive in drives:
        command += ["-drive", f"if=ide,{drive}"]
    start = time.perf_counter()
    process = subprocess.Popen(command, cwd=workdir)
    try:
        return appears(lambda: [workdir / "hand-channel.log"]) - start
    finally:
        process.kill()
        process.wait()
        asyncio.run(driver.destroy(handle))


class Writers:
    """Counts what a system's programs write, and the machine that runs."""

    def __init__(self, system: System) -> None:
        self._system = system
        programs = [system.server, system.workers["pc"]]
        self._ids = [program.process.pid for program in programs if program is not None and program.process is not None]
        self._before = self._written(self._ids)
        self._machine = 0

    def look(self) -> None:
        """See what the machine has written so far."""
        self._machine = max([self._machine, *(self._written([one.pid]) for one in self._system.machines())])

    def total(self) -> int:
        """Return the bytes since the start."""
        return self._written(self._ids) - self._before + self._machine

    def _written(self, pids: list[int]) -> int:
        found = 0
        for pid in pids:
            with contextlib.suppress(OSError):
                found += int(re.search(r"wchar: (\d+)", Path(f"/proc/{pid}/io").read_text())[1])  # type: ignore[index]
        return found


def ours(system: System, context: Path) -> tuple[float, float, int]:
    """Submit a job and return the seconds to the first line, those to the start of QEMU's process, and the bytes written."""
    writers = Writers(system)
    attempts = system.folder / "pc" / "attempts"
    spec = JobSpec(name="bench", machine=Machine(disk="tiny", scratch_bytes=8 * GIB))
    wall, start = time.time(), time.perf_counter()
    job_id = asyncio.run(_submit(system, spec, context))
    seconds = appears(lambda: list(attempts.glob("**/channel.log"))) - start
    # Written just after QEMU was started; the kernel's own start time of a process is off by its rounding of the boot time.
    [started] = attempts.glob("**/process.json")
    began = started.stat().st_mtime
    while system.machines():
        writers.look()
        time.sleep(0.02)
    system.wait_for(job_id, "completed", limit_s=_LIMIT_S)
    system.nothing_left()
    return seconds, began - wall, writers.total()


async def _submit(system: System, spec: JobSpec, context: Path) -> JobId:
    async with system.grid() as grid:
        return (await grid.submit(spec, context=context)).id


async def _idle(worker: psutil.Process, seconds: float) -> tuple[float, float]:
    """Return resident memory (MiB) and CPU (percent of one) of an idle worker."""
    before = sum(worker.cpu_times()[:2])
    await asyncio.sleep(seconds)
    return worker.memory_info().rss / MIB, 100 * (sum(worker.cpu_times()[:2]) - before) / seconds


def main() -> None:
    options = arguments(__doc__)
    runs = options.runs or (1 if options.quick else 5)
    with tempfile.TemporaryDirectory(prefix="deskgrid-bench-") as name:
        folder = Path(name)
        context = folder / "context"
        context.mkdir()
        (context / "context.sh").write_text("echo first\n")
        system = System(folder)
        for variable in ("DESKGRID_SERVER_LEASE_S", "DESKGRID_SERVER_INTERVAL_S", "DESKGRID_SERVER_SWEEP_S"):
            del system.environment[variable]
        try:
            system.start_server()
            system.cli("disk", "import", tiny_template().qcow2, "--name", "tiny", "--agent")
            system.add_worker(DESKGRID_WORKER_DRIVERS="qemu", DESKGRID_WORKER_ACCELERATOR="tcg")
            ours(system, context)  # the disk is in the cache after this
            mine, to_qemu, hand, written = [], [], [], []
            for number in range(runs):
                hand.append(by_hand(folder, context))
                seconds, start, size = ours(system, context)
                mine.append(seconds)
                written.append(size)
                to_qemu.append(start)
                print(f"run {number + 1}: by hand {hand[-1]:.2f} s; deskgrid {seconds:.2f} s, of which {start:.2f} s before QEMU")
            worker = system.workers["pc"].process
            assert worker is not None
            resident, percent = asyncio.run(_idle(psutil.Process(worker.pid), 5 if options.quick else 60))
        finally:
            system.stop()
    bytes_, disk = median_of(written) / MIB, tiny_template().qcow2.stat().st_size / MIB
    publish(
        "warm_start",
        [
            Figure(
                "submit to first line of context.sh", median_of(mine), "s", median_of(hand), median_of(mine) / median_of(hand), 1.10
            ),
            Figure("submit to start of QEMU", median_of(to_qemu), "s", None, None, None),
            Figure("written per job", bytes_, "MiB", disk, bytes_ / disk, None),
            Figure("idle worker, resident memory", resident, "MiB", None, None, None),
            Figure("idle worker, CPU", percent, "% of one CPU", None, None, None),
        ],
        options,
    )


if __name__ == "__main__":
    main()
