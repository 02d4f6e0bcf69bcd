"""What the grid wants this PC to hold: it is fetched in the background, stays while it is wanted, and goes when its time is over."""

from __future__ import annotations

import msgspec

from deskgrid.model.data import DataRef
from deskgrid.model.ids import DataId
from deskgrid.model.placement import Keep
from tests.unit.worker.play import DISK, SETTINGS, Rig, blob_of, disk_ref

FILE = b"measured" * 100


def file_keep(content: bytes = FILE) -> Keep:
    blob = blob_of(content)
    return Keep(data_id=DataId(1), content=blob.sha256, name="events", ref=DataRef(blob=blob))


def disk_keep() -> Keep:
    ref = disk_ref()
    assert ref.disk is not None
    return Keep(data_id=DataId(2), content=ref.disk.sha256, name="debian", ref=ref)


async def test_what_is_wanted_is_fetched_and_told(rig: Rig):
    rig.server.blobs[blob_of(FILE).sha256] = FILE
    rig.server.keep = [file_keep(), disk_keep()]
    async with rig.working():
        await rig.until(lambda: rig.server.syncs and rig.server.syncs[-1].held and rig.server.syncs[-1].cached)
        assert rig.server.syncs[-1].held == (blob_of(FILE).sha256,)
        assert rig.server.syncs[-1].cached == (disk_keep().content,)
        assert (rig.home.cache / "shared" / blob_of(FILE).sha256).read_bytes() == FILE
        assert rig.cached_disk().read_bytes() == DISK


async def test_what_is_held_is_not_evicted_and_what_is_not_any_more_is(rig: Rig):
    rig.server.blobs[blob_of(FILE).sha256] = FILE
    rig.server.keep = [file_keep(), disk_keep()]
    async with rig.working() as agent:
        await rig.until(lambda: rig.server.syncs and rig.server.syncs[-1].held and rig.server.syncs[-1].cached)
        assert agent._cache.shrink(1 << 40) == 0
        rig.server.keep = []
        before = len(rig.server.syncs)
        rig.server.hint()
        await rig.until(lambda: len(rig.server.syncs) > before and not agent._keeper._held)
        assert agent._cache.shrink(1 << 40) == len(FILE) + len(DISK)


async def test_what_has_outlived_its_time_is_removed_but_not_from_under_a_job(rig: Rig):
    rig.server.blobs[blob_of(FILE).sha256] = FILE
    rig.server.keep = [file_keep()]
    async with rig.working():
        attempt = await rig.running()
        await rig.until(lambda: rig.server.syncs[-1].held)
        rig.server.keep, rig.server.remove = [], [blob_of(FILE).sha256, disk_keep().content]
        rig.server.hint()
        await rig.until(lambda: not rig.server.syncs[-1].held)
        assert rig.cached_disk().exists()
        await rig.pc.machine.finish(0)
        await rig.ended(attempt)
        await rig.until(lambda: not rig.server.syncs[-1].cached)
        assert not rig.cached_disk().exists()


async def test_what_cannot_be_had_is_tried_again_later_and_the_rest_is_held_meanwhile(rig: Rig):
    rig.server.keep = [file_keep(), disk_keep()]
    async with rig.working():
        await rig.until(lambda: rig.server.syncs and rig.server.syncs[-1].cached)
        assert not rig.server.syncs[-1].held
        tries = rig.server.downloads.count(blob_of(FILE).sha256)
        rig.server.blobs[blob_of(FILE).sha256] = FILE
        await rig.until(lambda: rig.server.syncs[-1].held, step_s=30.0)
        assert tries >= 1


async def test_nothing_is_fetched_while_the_owner_does_not_want_work(rig: Rig):
    rig.server.blobs[blob_of(FILE).sha256] = FILE
    async with rig.working() as agent:
        await rig.until(lambda: rig.server.syncs)
        await agent.pause()
        rig.server.keep = [file_keep()]
        before = len(rig.server.syncs)
        rig.server.hint()
        await rig.until(lambda: len(rig.server.syncs) > before + 1)
        assert not rig.server.downloads
        await agent.resume()
        await rig.until(lambda: rig.server.syncs[-1].held)


async def test_what_is_being_fetched_stops_when_the_owner_comes_back(rig: Rig):
    rig.server.blobs[blob_of(FILE).sha256] = FILE
    rig.server.keep = [file_keep()]
    rig.server.download_gate.clear()
    async with rig.working() as agent:
        await rig.until(lambda: rig.server.downloads)
        await agent.pause()
        await rig.until(lambda: agent._keeper._fetching is None)
        rig.server.download_gate.set()
        await agent.resume()
        await rig.until(lambda: rig.server.syncs[-1].held)


async def test_a_restarted_worker_holds_what_it_held_without_fetching_it_again(rig: Rig):
    rig.server.blobs[blob_of(FILE).sha256] = FILE
    rig.server.keep = [file_keep()]
    async with rig.working():
        await rig.until(lambda: rig.server.syncs and rig.server.syncs[-1].held)
    fetched = len(rig.server.downloads)
    async with rig.working() as agent:
        await rig.until(lambda: agent._keeper._held)
        assert agent._cache.shrink(1 << 40) == 0
    assert len(rig.server.downloads) == fetched


async def test_what_does_not_fit_is_not_held_and_costs_no_disk(rig: Rig):
    large = file_keep(b"x" * 10_000)
    rig.server.blobs[large.content] = b"x" * 10_000
    async with rig.working(msgspec.structs.replace(SETTINGS, cache_bytes=9_000)):
        attempt = await rig.running()
        rig.server.keep = [large]
        rig.server.hint()
        await rig.until(lambda: any(sync.attempts for sync in rig.server.syncs[-2:]))
        await rig.pc.machine.finish(0)
        await rig.ended(attempt)
        assert not rig.server.syncs[-1].held and rig.cached_disk().exists()


async def test_what_rots_in_the_cache_is_found_and_fetched_again(rig: Rig):
    rig.server.blobs[blob_of(FILE).sha256] = FILE
    rig.server.keep = [file_keep()]
    async with rig.working():
        await rig.until(lambda: rig.server.syncs and rig.server.syncs[-1].held)
        file = rig.home.cache / "shared" / blob_of(FILE).sha256
        file.chmod(0o600)
        file.write_bytes(b"x" * len(FILE))
        file.chmod(0o444)
        await rig.until(lambda: rig.server.downloads.count(blob_of(FILE).sha256) == 2, step_s=5.0)
        await rig.until(lambda: file.exists() and file.read_bytes() == FILE, step_s=5.0)


async def test_a_damaged_disk_that_is_to_be_held_is_fetched_again(rig: Rig):
    rig.server.keep = [disk_keep()]
    async with rig.working():
        await rig.until(lambda: rig.server.syncs and rig.server.syncs[-1].cached)
        disk = rig.cached_disk()
        disk.chmod(0o600)
        disk.write_bytes(b"x" * len(DISK))
        disk.chmod(0o444)
        await rig.until(lambda: disk.exists() and disk.read_bytes() == DISK, step_s=5.0)


async def test_a_damaged_disk_is_not_taken_from_under_a_job(rig: Rig):
    async with rig.working() as agent:
        attempt = await rig.running()
        disk = rig.cached_disk()
        disk.chmod(0o600)
        disk.write_bytes(b"x" * len(DISK))
        disk.chmod(0o444)
        assert not agent._cache.remove_damaged(disk)
        await rig.pc.machine.finish(0)
        await rig.ended(attempt)
        await rig.until(lambda: not disk.exists(), step_s=5.0)
