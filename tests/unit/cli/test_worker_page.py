"""The page of `deskgrid worker top`."""

from __future__ import annotations

import io

from rich.console import Console

from deskgrid.cli.worker_page import page
from deskgrid.model.ids import AttemptId, JobId
from deskgrid.model.machines import DriverName, Fingerprint, MachineKind
from deskgrid.model.workers import Capacity
from deskgrid.units import GIB
from deskgrid.worker.control import AttemptStatus, StatusAnswer

LENT = Capacity(cpus=4, memory_bytes=8 * GIB, disk_bytes=20 * GIB)
FREE = Capacity(cpus=3, memory_bytes=7 * GIB, disk_bytes=19 * GIB)


def shown(**changes: object) -> str:
    fields: dict[str, object] = {"running": True, "name": "pc", "address": "grid:1", "paused": False, "connected": True, **changes}
    console = Console(width=120, file=io.StringIO(), record=True)
    console.print(page(StatusAnswer(**fields)))  # type: ignore[arg-type]
    return console.export_text()


def test_page_shows_jobs_bounds_and_drivers() -> None:
    attempt = AttemptStatus(
        attempt_id=AttemptId(1),
        job_id=JobId(42),
        number=1,
        name="[red]fit",
        phase="started",
        state="running",
        started_at=0.0,
        ran_s=90.0,
        cpus=1,
        memory_bytes=GIB,
        disk_bytes=0,
    )
    driver = Fingerprint(DriverName.QEMU, (MachineKind.VM,), usable=True, version="7.2", accelerator="kvm")
    text = shown(attempts=(attempt,), lent=LENT, free=FREE, drivers=(driver,))
    assert "42/1" in text and "[red]fit" in text and "running" in text
    assert "CPUs 1 of 4" in text and "qemu 7.2 kvm" in text
    assert "working" in text


def test_page_says_why_nothing_is_done() -> None:
    assert "paused (keyboard or mouse are used)" in shown(paused=True, why_paused="keyboard or mouse are used")
    assert "takes no work (no space)" in shown(trouble="no space")
    assert "not connected no route" in shown(connected=False, trouble="no route")
    assert "not running" in shown(running=False)
    assert "no jobs" in shown()
