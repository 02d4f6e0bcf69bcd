"""Disks that are on the PC already."""

from __future__ import annotations

import os
from pathlib import Path

import msgspec
import pytest

from deskgrid.errors import BadImage, InvalidInput, MachineFailed, NotFound
from deskgrid.model.ids import AttemptId
from deskgrid.model.jobs import AttemptState, JobSpec, Limits, Machine
from deskgrid.model.machines import ContextLabel, DiskFormat
from deskgrid.testing.images import iso_bytes
from deskgrid.units import MIB
from deskgrid.worker.installed import InstalledDisks
from tests.unit.worker.play import SETTINGS, Rig, SavingDriver

SPEC = JobSpec(machine=Machine(disk="installed:mine", memory_bytes=128 * MIB), limits=Limits(wall_time_s=100_000))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "mine.iso").write_bytes(iso_bytes())
    return tmp_path / "mine.iso"


@pytest.fixture
def declared(rig: Rig) -> InstalledDisks:
    rig.home.create()
    return InstalledDisks(rig.home.disks)


def touch_later(image: Path) -> None:
    changed = image.stat().st_mtime_ns + 10**9
    os.utime(image, ns=(changed, changed))


def test_declared_disk_is_offered_until_it_is_changed_or_taken_back(declared: InstalledDisks, image: Path) -> None:
    disk = declared.add(image, "mine", ContextLabel.CONTEXT)
    assert (disk.format, disk.context_label, disk.path) == (DiskFormat.ISO, ContextLabel.CONTEXT, str(image))
    assert declared.packages() == ("installed:mine",)
    touch_later(image)
    assert declared.packages() == ()
    with pytest.raises(MachineFailed, match="changed or removed"):
        declared.find("mine")
    declared.add(image, "mine", ContextLabel.CONTEXT)
    assert len(declared.all()) == 1
    assert declared.find("mine").unchanged
    image.unlink()
    assert declared.packages() == ()
    declared.remove("mine")
    assert declared.all() == ()
    for look in (declared.remove, declared.find):
        with pytest.raises((NotFound, MachineFailed), match="mine"):
            look("mine")


def test_what_a_worker_does_not_take_cannot_be_declared(declared: InstalledDisks, image: Path, tmp_path: Path) -> None:
    (tmp_path / "disk.vmdk").write_bytes(b"KDMV" + bytes(1000))
    with pytest.raises(BadImage, match="disk import"):
        declared.add(tmp_path / "disk.vmdk", "vm", ContextLabel.CIDATA)
    for name in ("", "a/b", "a b", "-a", "x" * 65):
        with pytest.raises(InvalidInput, match="name"):
            declared.add(image, name, ContextLabel.CIDATA)
    assert declared.all() == ()


def test_damaged_file_declares_nothing(declared: InstalledDisks, rig: Rig, image: Path) -> None:
    for content in (b"", b"{", b"\xff", b'[{"name": 1}]'):
        rig.home.disks.write_bytes(content)
        assert declared.packages() == ()
    declared.add(image, "mine", ContextLabel.CIDATA)
    assert declared.packages() == ("installed:mine",)


async def test_job_boots_the_disk_where_it_lies(rig: Rig, declared: InstalledDisks, image: Path) -> None:
    async with rig.working():
        await rig.until(lambda: rig.server.syncs)
        assert rig.server.syncs[-1].profile.packages == ()
        declared.add(image, "mine", ContextLabel.CONTEXT)  # while it runs
        await rig.until(lambda: rig.server.syncs[-1].profile.packages == ("installed:mine",), step_s=1.0)
        attempt = await rig.running(spec=SPEC)
        spec = rig.pc.machine.spec
        assert (spec.disk, spec.disk_format, spec.context_label) == (image, DiskFormat.ISO, ContextLabel.CONTEXT)
        assert rig.server.downloads == []
        await rig.pc.machine.finish(0)
        assert (await rig.ended(attempt)).state is AttemptState.SUCCEEDED
    assert image.read_bytes() == iso_bytes()


async def test_job_whose_disk_is_gone_goes_to_another_pc(rig: Rig, declared: InstalledDisks, image: Path) -> None:
    declared.add(image, "mine", ContextLabel.CONTEXT)
    async with rig.working():
        await rig.until(lambda: rig.server.syncs)
        touch_later(image)
        report = await rig.ended(rig.server.submit(spec=SPEC))
    assert report.state is AttemptState.REFUSED
    assert "changed or removed" in report.reason
    assert str(image) not in report.reason


async def test_saved_machine_does_not_go_on_with_a_disk_that_was_changed(rig: Rig, declared: InstalledDisks, image: Path) -> None:
    declared.add(image, "mine", ContextLabel.CONTEXT)
    rig.driver = driver = SavingDriver(rig.pc, rig.clock)
    async with rig.working(msgspec.structs.replace(SETTINGS, release_s=60.0, checkpoint_s=0.0)) as agent:
        attempt: AttemptId = await rig.running(spec=SPEC)
        await agent.pause()
        await rig.until(lambda: rig.pc.machine.saved, step_s=1.0)
        touch_later(image)
        await agent.resume()
        report = await rig.ended(attempt)
    assert (report.state, driver.restored) == (AttemptState.REFUSED, 0)
    assert rig.nothing_left()
