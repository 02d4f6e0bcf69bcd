"""Pause, checkpoint, save and restore of a virtual machine whose guest has filled memory and scratch: times and sizes.

The guest keeps random bytes in a file in memory (which compress to nothing, so nothing is left out), has written as many to scratch, and goes on
counting. Yardstick of a checkpoint's time: writing as many bytes as the guest's memory has to a file and syncing it (dd by hand), in the
same run on the same disk. What a killed machine loses is the interval between two checkpoints (`checkpoint_s`), by construction; here it is
shown that it goes on from the last one.
"""

from __future__ import annotations

import asyncio
import os
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import psutil

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from report import Figure, arguments, median_of, publish

from deskgrid.clock import SystemClock
from deskgrid.machines import processes
from deskgrid.machines.driver import MachineHandle, MachineSpec, Output, Saved
from deskgrid.machines.qemu import QemuDriver
from deskgrid.model.machines import ContextLabel, MachineKind
from deskgrid.testing.tiny_template import tiny_template
from deskgrid.units import GIB, MIB
from deskgrid.worker.probe import allocated_bytes

_SCRIPT = (
    "mkdir -p /tmp/full && mount -t tmpfs -o size=90% tmpfs /tmp/full\n"
    "dd if=/dev/urandom of=/tmp/full/x bs=1M count={memory} 2>/dev/null\n"
    "dd if=/dev/urandom of=y bs=1M count={scratch} 2>/dev/null; sync\n"
    "i=0; while :; do i=$((i + 1)); echo $i; sleep 0.1; done\n"
)
_PAUSES = 10


async def timed(work: Callable[[], Awaitable[object]]) -> float:
    """Return the seconds that something takes."""
    start = time.perf_counter()
    await work()
    return time.perf_counter() - start


async def counted(driver: QemuDriver, handle: MachineHandle, more: int) -> int:
    """Return how far the guest has counted, once it has said so many numbers."""
    numbers = 0
    async for event in driver.events(handle):
        if isinstance(event, Output):
            numbers += event.data.count(b"\n")
        if numbers >= more:
            return numbers
        if isinstance(event, Saved):
            break
    raise SystemExit("the guest ended")


def write_by_hand(folder: Path, size_bytes: int) -> float:
    """Return the seconds that writing and syncing as many bytes takes."""
    piece, start = os.urandom(MIB), time.perf_counter()
    with (folder / "by-hand").open("wb") as file:
        for _ in range(size_bytes // MIB):
            file.write(piece)
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - start
    (folder / "by-hand").unlink()
    return seconds


async def measure(folder: Path, memory_mib: int, runs: int) -> list[Figure]:
    """Measure one machine."""
    context = folder / "context"
    context.mkdir()
    full = memory_mib // 2
    (context / "context.sh").write_text(_SCRIPT.format(memory=full, scratch=full))
    driver = QemuDriver(SystemClock(), accelerator="tcg")
    disk, label = tiny_template().qcow2, ContextLabel.CONTEXT
    spec = MachineSpec("bench", MachineKind.VM, memory_mib * MIB, 1, 8 * GIB, disk=disk, context=context, context_label=label)
    handle = await driver.prepare(spec, folder / "machine")
    pauses, checkpoints, grown, saves, restores, hand = [], [], [], [], [], []
    try:
        await driver.start(handle)
        await counted(driver, handle, 1)
        for _ in range(_PAUSES):
            pauses.append(await timed(lambda: driver.pause(handle)))
            await driver.resume(handle)
        before = allocated_bytes(folder / "machine")
        for number in range(runs):
            hand.append(write_by_hand(folder, full * MIB))
            checkpoints.append(await timed(lambda: driver.checkpoint(handle)))
            grown.append(allocated_bytes(folder / "machine") - before)
            reached = await counted(driver, handle, 1)
            saves.append(await timed(lambda: driver.save(handle)))
            restores.append(await timed(lambda: driver.restore(handle)))
            identity = processes.read_identity(folder / "machine")
            assert identity is not None
            resident = psutil.Process(identity.pid).memory_info().rss / MIB
            await counted(driver, handle, reached + 3)
            print(
                f"{memory_mib} MiB, run {number + 1}: checkpoint {checkpoints[-1]:.2f} s, save {saves[-1]:.2f} s, restore {restores[-1]:.2f} s,"
                f" {grown[-1] / MIB:.0f} MiB more on the disk; by hand {hand[-1]:.2f} s",
                flush=True,
            )
    finally:
        await driver.destroy(handle)
    name = f"{memory_mib} MiB guest, half of it full"
    by_hand = median_of(hand)
    return [
        Figure(f"{name}: pause", median_of(pauses), "s", None, None, 2.0),
        Figure(
            f"{name}: checkpoint (it stands still)", median_of(checkpoints), "s", by_hand, median_of(checkpoints) / by_hand, None
        ),
        Figure(f"{name}: save, until its memory is free", median_of(saves), "s", by_hand, median_of(saves) / by_hand, None),
        Figure(f"{name}: restore, until it runs", median_of(restores), "s", by_hand, median_of(restores) / by_hand, None),
        Figure(f"{name}: one checkpoint on the disk", grown[0] / MIB, "MiB", full, grown[0] / MIB / full, None),
        Figure(f"{name}: after {runs} checkpoints", grown[-1] / MIB, "MiB", full, grown[-1] / MIB / full, None),
        Figure(f"{name}: resident after a restore", resident, "MiB", memory_mib, resident / memory_mib, None),
    ]


def main() -> None:
    options = arguments(__doc__)
    runs = options.runs or (1 if options.quick else 5)
    figures = []
    for memory_mib in (256,) if options.quick else (256, 1024):
        with tempfile.TemporaryDirectory(prefix="deskgrid-bench-") as name:
            figures += asyncio.run(measure(Path(name), memory_mib, runs))
    publish("checkpoint", figures, options)


if __name__ == "__main__":
    main()
