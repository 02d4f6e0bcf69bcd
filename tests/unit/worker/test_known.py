"""What drivers found out is remembered while the system stays the same; what cut-short probes leave is removed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import msgspec
import psutil
import pytest

from deskgrid.clock import FakeClock, SystemClock
from deskgrid.machines.probes import clear_probes, file_mark, probe_folder
from deskgrid.model.machines import DriverName, Fingerprint, MachineKind
from deskgrid.worker.known import Known

GOOD = Fingerprint(DriverName.QEMU, (MachineKind.VM,), usable=True, version="7", accelerator="kvm")
SLOW = msgspec.structs.replace(GOOD, accelerator="tcg", reason="kvm does not work here")


class Slow:
    """A driver that counts how often it tries something out."""

    def __init__(self, found: Fingerprint = GOOD) -> None:
        self.found, self.tried, self.mark = found, 0, "7.2"
        self.recalled: list[Fingerprint] = []

    async def fingerprint(self) -> Fingerprint:
        self.tried += 1
        return self.found

    def marks(self) -> list[str]:
        return [self.mark]

    def recall(self, found: Fingerprint) -> None:
        self.recalled.append(found)


async def ask(driver: Slow, file: Path, clock: FakeClock) -> Fingerprint:
    """As a worker that has just been started."""
    return await Known(file, clock).ask(driver)  # type: ignore[arg-type]


async def test_answer_is_kept_until_the_system_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver, clock, file = Slow(), FakeClock(), tmp_path / "known.json"
    for _ in range(3):
        assert await ask(driver, file, clock) == GOOD
        await clock.advance(1e6)
    assert (driver.tried, driver.recalled) == (1, [GOOD, GOOD])
    driver.mark = "8.0"
    await ask(driver, file, clock)
    assert driver.tried == 2
    monkeypatch.setattr(psutil, "boot_time", lambda: 1.0)
    await ask(driver, file, clock)
    assert driver.tried == 3


async def test_trouble_is_looked_at_again_every_day(tmp_path: Path) -> None:
    driver, clock, file = Slow(SLOW), FakeClock(), tmp_path / "known.json"
    await ask(driver, file, clock)
    await clock.advance(86_000)
    await ask(driver, file, clock)
    assert driver.tried == 1
    await clock.advance(500)
    await ask(driver, file, clock)
    assert driver.tried == 2


@pytest.mark.parametrize("content", [b"", b"{", b'{"Slow": 1}', b"\xff"])
async def test_file_that_cannot_be_read_is_nothing_known(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "known.json").write_bytes(content)
    driver = Slow()
    assert await ask(driver, tmp_path / "known.json", FakeClock()) == GOOD
    assert driver.tried == 1


async def test_answers_of_drivers_do_not_mix(tmp_path: Path) -> None:
    class Other(Slow):
        pass

    file, clock = tmp_path / "known.json", FakeClock()
    await ask(Slow(), file, clock)
    await ask(Other(SLOW), file, clock)
    assert await ask(Slow(SLOW), file, clock) == GOOD


async def test_probe_of_a_killed_worker_is_ended_and_removed_and_nothing_else(tmp_path: Path) -> None:
    place = tmp_path / "probes"
    place.mkdir()
    (place / "known.json").write_text("{}")
    left = place / "deskgrid-probe-left"
    left.mkdir()
    (left / "file").touch()
    with probe_folder(tmp_path) as elsewhere:
        hanging, strange = (subprocess.Popen(["sleep", "600"], cwd=folder) for folder in (left, elsewhere))
        try:
            await clear_probes(place, SystemClock())
            assert hanging.wait(timeout=10) == -9
            assert strange.poll() is None
        finally:
            strange.kill()
            strange.wait()
    assert [entry.name for entry in place.iterdir()] == ["known.json"]
    await clear_probes(place, SystemClock())


def test_mark_changes_with_the_file(tmp_path: Path) -> None:
    file = tmp_path / "program"
    missing = file_mark(file)
    file.write_text("1")
    there = file_mark(file)
    file.chmod(0o755)
    assert len({missing, there, file_mark(file), file_mark(None)}) == 4
