"""A worker that has an older version of a disk fetches only what is new; whatever is wrong with that, the job gets its disk."""

from __future__ import annotations

from deskgrid.model.data import DataRef, Delta
from deskgrid.model.ids import Sha256
from deskgrid.model.jobs import AttemptState
from tests.unit.worker.play import DISK, Rig, blob_of, disk_ref

ADDED = b"what is new"
NEW = DISK + ADDED


def newer(added: bytes = ADDED, *, base: str = "", base_blob: str = "") -> DataRef:
    whole, old = disk_ref(NEW), disk_ref().disk
    assert old is not None
    delta = Delta(
        base=Sha256(base) if base else old.sha256, base_blob=Sha256(base_blob) or disk_ref().blob.sha256, blob=blob_of(added)
    )
    return DataRef(blob=whole.blob, disk=whole.disk, delta=delta)


async def downloads_of_the_second(rig: Rig, ref: DataRef, *, published: bytes | None = ADDED) -> list[str]:
    """Run a job with the older disk, then one with the newer one; return what the second fetched."""
    rig.server.blobs[blob_of(NEW).sha256] = NEW
    if published is not None:
        rig.server.blobs[blob_of(published).sha256] = published
    async with rig.working():
        first = await rig.running()
        await rig.pc.machine.finish(0)
        await rig.ended(first)
        before = len(rig.server.downloads)
        second = await rig.running(disk=ref)
        spec = rig.pc.machine.spec
        assert spec.disk is not None
        assert spec.disk.read_bytes() == NEW
        await rig.pc.machine.finish(0)
        assert (await rig.ended(second)).state is AttemptState.SUCCEEDED
    assert list((rig.home.cache / "partial").iterdir()) == []
    return rig.server.downloads[before:]


async def test_only_the_delta_is_fetched_by_who_has_the_older_disk(rig: Rig):
    assert await downloads_of_the_second(rig, newer()) == [blob_of(ADDED).sha256]


async def test_whole_disk_is_fetched_by_who_has_not_the_older_one(rig: Rig):
    assert await downloads_of_the_second(rig, newer(base="e" * 64)) == [blob_of(NEW).sha256]


async def test_whole_disk_is_fetched_if_the_older_one_came_from_a_blob_that_the_delta_is_not_of(rig: Rig):
    assert await downloads_of_the_second(rig, newer(base_blob="e" * 64)) == [blob_of(NEW).sha256]


async def test_delta_that_is_larger_than_its_disk_is_not_fetched(rig: Rig):
    added = ADDED * 1000
    assert await downloads_of_the_second(rig, newer(added), published=added) == [blob_of(NEW).sha256]


async def test_whole_disk_is_fetched_if_the_delta_is_wrong_or_gone(rig: Rig):
    wrong = b"something else"
    assert await downloads_of_the_second(rig, newer(wrong), published=wrong) == [blob_of(wrong).sha256, blob_of(NEW).sha256]
    assert await downloads_of_the_second(Rig(rig.home.folder.parent / "other"), newer(), published=None) == [
        blob_of(ADDED).sha256,
        blob_of(NEW).sha256,
    ]
