"""The cache of disks."""

from __future__ import annotations

import asyncio
import functools
import hashlib
import os
from pathlib import Path

import msgspec
import pytest

from deskgrid.errors import BadImage, NoSpace, ProtocolError, Unreachable
from deskgrid.model.data import Blob, DataRef, Delta, Disk
from deskgrid.model.ids import Sha256
from deskgrid.model.machines import DiskFormat
from deskgrid.swarm.cache import Cache

SENT, SIZE = 10, 100
BOTH = SENT + SIZE


def ref(name: str, size: int = SIZE) -> DataRef:
    disk = Disk(sha256=digest(name), size_bytes=size, virtual_bytes=size, format=DiskFormat.ISO)
    return DataRef(blob=Blob(sha256=digest("sent " + name), size_bytes=SENT), disk=disk)


def file_of(name: str) -> str:
    return f"{digest(name)}-{digest('sent ' + name)}"


def digest(text: str) -> Sha256:
    return Sha256(hashlib.sha256(text.encode()).hexdigest())


def newer(name: str, base: str) -> DataRef:
    delta = Delta(base=digest(base), base_blob=digest("sent " + base), blob=Blob(sha256=digest("delta"), size_bytes=1))
    return msgspec.structs.replace(ref(name), delta=delta)


class Source:
    """Makes disks, and counts how often."""

    def __init__(self, size: int = SIZE) -> None:
        self.size = size
        self.fetched = 0
        self.gate = asyncio.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.found: list[bytes] = []

    async def __call__(self, partial: Path, output: Path) -> None:
        self.fetched += 1
        self.found.append(partial.read_bytes() if partial.exists() else b"")
        partial.write_bytes(b"p" * (SENT // 2))
        await self.gate.wait()
        if self.error:
            raise self.error
        partial.write_bytes(b"p" * SENT)
        output.write_bytes(b"d" * self.size)
        output.chmod(0o444)


def make(folder: Path, *, bound: int = 10 * BOTH, free: int = 10**9, reserve: int = 0) -> Cache:
    cache = Cache(folder, bound_bytes=bound, reserve_bytes=reserve, free_bytes=lambda _: free)
    cache.open()
    return cache


async def fill(cache: Cache, *names: str) -> None:
    for name in names:
        async with cache.use(ref(name), Source()):
            pass


async def test_disk_is_fetched_once_and_stays(tmp_path: Path) -> None:
    cache, source = make(tmp_path), Source()
    for _ in range(2):
        async with cache.use(ref("a"), source) as path:
            assert path.read_bytes() == b"d" * SIZE
    assert source.fetched == 1
    assert make(tmp_path).entries() == (digest("a"),)
    assert cache.size_bytes() == SIZE, "the partial download is gone"


async def test_those_that_want_it_at_once_share_one_fetch(tmp_path: Path) -> None:
    cache, source = make(tmp_path), Source()
    source.gate.clear()

    async def want() -> None:
        async with cache.use(ref("a"), source):
            pass

    tasks = [asyncio.create_task(want()) for _ in range(5)]
    await asyncio.sleep(0)
    source.gate.set()
    await asyncio.gather(*tasks)
    assert source.fetched == 1


async def test_next_one_goes_on_when_the_first_gives_up(tmp_path: Path) -> None:
    cache, source = make(tmp_path), Source()
    source.gate.clear()

    async def want() -> None:
        async with cache.use(ref("a"), source):
            pass

    first, second = asyncio.create_task(want()), asyncio.create_task(want())
    await asyncio.sleep(0)
    first.cancel()
    await asyncio.wait({first})
    source.gate.set()
    await second
    assert source.found == [b"", b"p" * (SENT // 2)]


@pytest.mark.parametrize(("error", "kept"), [(Unreachable("gone"), True), (BadImage("bad"), False), (ProtocolError("x"), False)])
async def test_partial_download_is_kept_only_if_it_is_of_use(tmp_path: Path, error: Exception, kept: bool) -> None:
    cache, source = make(tmp_path), Source()
    source.error = error
    with pytest.raises(type(error)):
        await cache.use(ref("a"), source).__aenter__()
    assert [path.read_bytes() for path in (tmp_path / "partial").iterdir()] == ([b"p" * (SENT // 2)] if kept else [])
    assert cache.entries() == ()
    if kept:
        again = Source()
        async with make(tmp_path).use(ref("a"), again):
            assert again.found == [b"p" * (SENT // 2)]


async def test_disk_used_longest_ago_goes_first(tmp_path: Path) -> None:
    cache = make(tmp_path, bound=3 * SIZE + SENT)
    await fill(cache, "a", "b", "c")
    await fill(cache, "a")
    await fill(cache, "d")
    assert cache.entries() == (digest("c"), digest("a"), digest("d"))


async def test_order_of_use_survives_a_restart(tmp_path: Path) -> None:
    await fill(make(tmp_path), "a", "b")
    os.utime(tmp_path / file_of("a"), (2e9, 2e9))
    assert make(tmp_path).entries() == (digest("b"), digest("a"))


async def test_disk_in_use_is_never_removed(tmp_path: Path) -> None:
    cache = make(tmp_path, bound=SIZE + BOTH)
    await fill(cache, "b")
    async with cache.use(ref("a"), Source()) as path:
        release = cache.hold(digest("b"))
        with pytest.raises(NoSpace, match="in all"):
            await fill(cache, "c")
        release()
        release()
        await fill(cache, "c")
        assert path.exists()
    assert digest("b") not in cache.entries()
    assert cache.shrink(10**9) == 2 * SIZE


async def test_disk_larger_than_the_bound_is_refused_before_it_is_fetched(tmp_path: Path) -> None:
    cache, source = make(tmp_path, bound=BOTH - 1), Source()
    with pytest.raises(NoSpace):
        await cache.use(ref("a"), source).__aenter__()
    assert source.fetched == 0


async def test_many_small_files_make_room_for_a_large_one_and_no_more_go_than_need_be(tmp_path: Path) -> None:
    cache = make(tmp_path, bound=10_000)

    async def come(partial: Path, content: bytes) -> Path:
        partial.write_bytes(content)
        return partial

    for at in range(100):
        content = b"%100d" % at
        await cache.bring(describe(content), functools.partial(come, content=content))
    large = bytes(2_950)
    await cache.bring(describe(large), functools.partial(come, content=large))
    left = cache.shared()
    assert describe(large).sha256 in left and len(left) == 1 + 70
    assert describe(b"%100d" % 99).sha256 in left and describe(b"%100d" % 29).sha256 not in left
    held = cache.hold(left[0])
    assert not cache.remove_damaged(cache.shared_folder / left[0])
    held()
    assert cache.remove_damaged(cache.shared_folder / left[0])


def describe(content: bytes) -> Blob:
    return Blob(sha256=Sha256(hashlib.sha256(content).hexdigest()), size_bytes=len(content))


async def test_reserve_of_the_owners_disk_is_left_alone(tmp_path: Path) -> None:
    await fill(make(tmp_path, free=BOTH + 50, reserve=50), "a")
    with pytest.raises(NoSpace, match="free on this PC"):
        await fill(make(tmp_path, free=BOTH + 49, reserve=50), "b")


async def test_fetches_at_the_same_time_do_not_promise_the_same_room(tmp_path: Path) -> None:
    cache, source = make(tmp_path, bound=2 * BOTH - 1), Source()
    source.gate.clear()
    first = asyncio.create_task(cache.use(ref("a"), source).__aenter__())
    await asyncio.sleep(0)
    with pytest.raises(NoSpace):
        await cache.use(ref("b"), source).__aenter__()
    source.gate.set()
    await first


async def test_disk_of_another_size_is_fetched_again(tmp_path: Path) -> None:
    await fill(make(tmp_path), "a")
    path = tmp_path / file_of("a")
    path.chmod(0o644)
    path.write_bytes(b"short")
    path.chmod(0o444)
    cache, source = make(tmp_path), Source()
    async with cache.use(ref("a"), source) as found:
        assert found.stat().st_size == SIZE
    assert source.fetched == 1


async def test_fetch_that_makes_something_else_is_refused(tmp_path: Path) -> None:
    cache = make(tmp_path)
    with pytest.raises(ProtocolError):
        await cache.use(ref("a"), Source(size=SIZE - 1)).__aenter__()
    assert cache.entries() == () and not (tmp_path / file_of("a")).exists()


async def test_disk_is_given_only_to_who_may_fetch_the_blob_it_came_from(tmp_path: Path) -> None:
    """That some blob unpacks to this disk is only what who published it says."""
    cache = make(tmp_path)
    await fill(cache, "a")
    claimed = msgspec.structs.replace(ref("a"), blob=Blob(sha256=digest("junk"), size_bytes=1))
    source = Source()
    source.error = BadImage("it is no disk")
    with pytest.raises(BadImage):
        await cache.use(claimed, source).__aenter__()
    assert source.fetched == 1
    assert cache.entries() == (digest("a"),)


async def test_wrong_size_that_was_published_costs_nobody_the_disk(tmp_path: Path) -> None:
    cache = make(tmp_path)
    async with cache.use(ref("a"), Source()) as path:
        with pytest.raises(ProtocolError, match="size"):
            await cache.use(ref("a", size=SIZE - 1), Source()).__aenter__()
        assert path.stat().st_size == SIZE
    source = Source()
    async with cache.use(ref("a"), source):
        assert source.fetched == 0


async def test_what_is_no_disk_is_removed_at_the_start(tmp_path: Path) -> None:
    await fill(make(tmp_path), "a")
    (tmp_path / f".{file_of('b')}.1234.part").write_bytes(b"x")
    (tmp_path / digest("b")).write_bytes(b"of which blob is not known")
    (tmp_path / file_of("c")).write_bytes(b"written to after it was complete, or never complete")
    (tmp_path / file_of("d")).symlink_to(tmp_path / file_of("a"))
    (tmp_path / "folder").mkdir()
    (tmp_path / "partial" / "x").write_bytes(b"x")
    (tmp_path / "partial" / digest("e")).write_bytes(b"x")
    (tmp_path / "shared" / "x.part").write_bytes(b"x")
    (tmp_path / "shared" / f"{digest('f')}.part").write_bytes(b"x")
    (tmp_path / "shared" / digest("g")).write_bytes(b"written to after it was complete, or never complete")
    kept_for_others(tmp_path, "h")
    cache = make(tmp_path)
    assert cache.entries() == (digest("a"),) and cache.shared() == (digest("h"),)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([file_of("a"), "partial", "shared"])
    assert [path.name for path in (tmp_path / "partial").iterdir()] == [digest("e")]
    assert {path.name for path in (tmp_path / "shared").iterdir()} == {f"{digest('f')}.part", digest("h")}


def kept_for_others(folder: Path, name: str) -> None:
    file = folder / "shared" / digest(name)
    file.write_bytes(b"x" * SIZE)
    file.chmod(0o444)


async def test_what_is_there_only_for_others_goes_before_disks_and_is_told(tmp_path: Path) -> None:
    await fill(make(tmp_path), "a")
    kept_for_others(tmp_path, "b")
    cache = make(tmp_path)
    told: list[str] = []
    cache.dropped = told.append
    assert cache.size_bytes() == 2 * SIZE
    assert cache.shrink(1) == SIZE
    assert told == [digest("b")] and cache.shared() == () and cache.entries() == (digest("a"),)


async def test_a_part_with_holes_counts_as_what_it_takes(tmp_path: Path) -> None:
    cache = make(tmp_path)
    part = cache.part_file(digest("p"))
    with part.open("wb") as file:
        file.truncate(1 << 30)
    assert cache.size_bytes() < 1 << 20
    assert cache.room_for_others()
    cache.forget_shared(digest("p"))
    assert not part.exists()


async def test_idle_partial_downloads_go_before_disks(tmp_path: Path) -> None:
    cache = make(tmp_path)
    await fill(cache, "a")
    (tmp_path / "partial" / digest("old")).write_bytes(b"x" * 5)
    assert cache.shrink(1) == 5
    assert cache.entries() == (digest("a"),)


async def test_disk_that_can_never_fit_costs_no_disk_that_is_here(tmp_path: Path):
    cache = Cache(tmp_path, bound_bytes=3 * BOTH)
    cache.open()
    async with cache.use(ref("small"), Source()):
        pass
    with pytest.raises(NoSpace):
        async with cache.use(ref("huge", 1 << 50), Source(1 << 50)):
            pass
    assert cache.entries() == (digest("small"),)


@pytest.mark.parametrize(("bound", "kept"), [(2 * BOTH, True), (BOTH, False)])
async def test_disk_that_a_delta_is_of_stays_for_it_if_there_is_room_for_both(tmp_path: Path, bound: int, kept: bool):
    cache = make(tmp_path, bound=bound)
    found = []

    async def fetch(partial: Path, output: Path) -> None:
        with cache.borrow(digest("old"), digest("sent old")) as base, cache.borrow(digest("old"), digest("sent other")) as other:
            found.append((base is not None, other))
        await Source()(partial, output)

    async with cache.use(ref("old"), Source()):
        pass
    async with cache.use(ref("older") if bound > BOTH else ref("old"), Source()):
        pass
    async with cache.use(newer("new", "old"), fetch):
        pass
    assert found == [(kept, None)]


async def test_delta_beside_a_download_is_nobody_elses_to_remove(tmp_path: Path):
    cache = make(tmp_path, bound=3 * BOTH)

    async def fetch(partial: Path, output: Path) -> None:
        beside = partial.with_name(f"{partial.name}.delta")
        beside.write_bytes(b"delta")
        async with cache.use(ref("other", 2 * SIZE + 6), Source(2 * SIZE + 6)):  # all that is left, but for the delta's five bytes
            pass
        assert beside.exists()
        await Source()(partial, output)
        beside.unlink()

    async with cache.use(ref("new"), fetch):
        pass
