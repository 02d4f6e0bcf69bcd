"""The repository: uploads in random pieces, interrupted anywhere, end whole or not at all."""

from __future__ import annotations

import asyncio
import errno
import hashlib
import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskgrid.errors import Conflict, InvalidInput, NotFound, StoreUnavailable
from deskgrid.model.data import Blob
from deskgrid.model.ids import Sha256
from deskgrid.server.repository_local import LocalRepository as Repository


def blob_of(content: bytes) -> Blob:
    return Blob(sha256=Sha256(hashlib.sha256(content).hexdigest()), size_bytes=len(content))


def repository(home: Path) -> Repository:
    return Repository(home, reserve_bytes=0, max_bytes=1 << 40)


async def pieces(content: bytes, size: int, cut_after: int | None = None):
    for number, start in enumerate(range(0, len(content), size)):
        if cut_after is not None and number >= cut_after:
            raise ConnectionResetError
        yield content[start : start + size]


class Sender:
    """Sends two bytes, and the rest once it may go on."""

    def __init__(self, content: bytes) -> None:
        self._content = content
        self.paused, self.go_on = asyncio.Event(), asyncio.Event()

    async def pieces(self):
        yield self._content[:2]
        self.paused.set()
        await self.go_on.wait()
        yield self._content[2:]


@settings(max_examples=60, deadline=None)
@given(
    content=st.binary(min_size=1, max_size=5000),
    cuts=st.lists(st.tuples(st.integers(1, 700), st.integers(0, 6), st.booleans()), max_size=6),
)
def test_upload_cut_anywhere_ends_whole(content: bytes, cuts: list[tuple[int, int, bool]]):
    async def history(home: Path) -> None:
        store, blob = repository(home), blob_of(content)
        for size, cut, restart in cuts:
            if restart:
                store = repository(home)
            offset = store.received_bytes(1)
            try:
                await store.receive(1, blob, offset, pieces(content[offset:], size, cut))
            except ConnectionResetError:
                assert store.received_bytes(1) == min(len(content), offset + size * cut)
        offset = store.received_bytes(1)
        await store.receive(1, blob, offset, pieces(content[offset:], 1000))
        await store.finish(1, blob)
        assert store.path(blob.sha256).read_bytes() == content
        assert list((home / "uploads").iterdir()) == []

    with tempfile.TemporaryDirectory() as folder:
        asyncio.run(history(Path(folder)))


async def test_wrong_bytes_are_forgotten(tmp_path: Path):
    store, blob = repository(tmp_path), blob_of(b"right")
    await store.receive(1, blob, 0, pieces(b"wrong", 5))
    with pytest.raises(InvalidInput, match="sha256"):
        await store.finish(1, blob)
    assert store.received_bytes(1) == 0
    with pytest.raises(NotFound):
        store.path(blob.sha256)


async def test_wrong_bytes_of_a_blob_that_is_here_are_nothing_either(tmp_path: Path):
    """To have sent a blob is the right to read it."""
    store, blob = repository(tmp_path), blob_of(b"right")
    await store.receive(1, blob, 0, pieces(b"right", 5))
    await store.finish(1, blob)
    await store.receive(2, blob, 0, pieces(b"wrong", 5))
    with pytest.raises(InvalidInput, match="sha256"):
        await store.finish(2, blob)
    with pytest.raises(Conflict, match="gone"):
        await store.finish(2, blob)


async def test_digest_of_a_file_that_was_forgotten_counts_for_no_other(tmp_path: Path):
    here, elsewhere = repository(tmp_path), repository(tmp_path)
    blob, sender = blob_of(b"right"), Sender(b"right")
    receiving = asyncio.create_task(here.receive(1, blob, 0, sender.pieces()))
    await sender.paused.wait()
    await elsewhere.forget_uploads([1])
    await elsewhere.receive(1, blob, 0, pieces(b"wrong", 5))
    sender.go_on.set()
    assert await receiving == 5
    with pytest.raises(InvalidInput, match="sha256"):
        await here.finish(1, blob)


async def test_digest_counts_only_for_what_was_received(tmp_path: Path):
    store, blob = repository(tmp_path), blob_of(b"right")
    await store.receive(1, blob, 0, pieces(b"right", 5))
    part = store._part(1)
    part.write_bytes(b"wrong")  # by another process: the same file with as many bytes
    os.utime(part, (1, 1))
    with pytest.raises(InvalidInput, match="sha256"):
        await store.finish(1, blob)


async def test_more_bytes_than_announced_are_refused(tmp_path: Path):
    store = repository(tmp_path)
    with pytest.raises(InvalidInput, match="more bytes"):
        await store.receive(1, blob_of(b"abc"), 0, pieces(b"abcd", 4))


async def test_upload_at_another_offset_is_refused(tmp_path: Path):
    store = repository(tmp_path)
    with pytest.raises(Conflict):
        await store.receive(1, blob_of(b"abc"), 2, pieces(b"c", 1))


async def test_upload_larger_than_the_free_space_is_refused_at_its_beginning(tmp_path: Path):
    store = Repository(tmp_path, reserve_bytes=0, max_bytes=1 << 62)
    with pytest.raises(StoreUnavailable, match="full"):
        await store.standing(1, Blob(sha256=Sha256("0" * 64), size_bytes=1 << 60), None, direct=False)


async def test_disk_that_fills_up_during_an_upload_is_told_and_the_upload_goes_on_later(tmp_path: Path, monkeypatch):
    import deskgrid.server.repository_local as module

    store, blob = repository(tmp_path), blob_of(b"abcdef")
    real = module._append

    def full(output, piece, digest):
        real(output, piece[:2], digest)
        raise OSError(errno.ENOSPC, "No space left on device")

    def translated(output, piece, digest):
        try:
            full(output, piece, digest)
        except OSError as error:
            raise StoreUnavailable("the server's disk is full") from error

    monkeypatch.setattr(module, "_append", translated)
    with pytest.raises(StoreUnavailable):
        await store.receive(1, blob, 0, pieces(b"abcdef", 6))
    monkeypatch.setattr(module, "_append", real)
    await store.receive(1, blob, 2, pieces(b"cdef", 4))
    await store.finish(1, blob)
    assert store.path(blob.sha256).read_bytes() == b"abcdef"


async def test_repeated_finish_and_remove_do_no_harm(tmp_path: Path):
    store, blob = repository(tmp_path), blob_of(b"abc")
    await store.receive(1, blob, 0, pieces(b"abc", 3))
    await store.finish(1, blob)
    with pytest.raises(Conflict):
        await store.finish(1, blob)
    assert await store.holds(blob)
    await store.remove(blob.sha256)
    await store.remove(blob.sha256)
    assert not await store.holds(blob)


class PartOfADisk:
    """A file on a disk that takes half of a piece and is then full."""

    def __init__(self, file: Path) -> None:
        self.file = file.open("ab", buffering=0)
        self.full = False

    def write(self, piece: memoryview) -> int:
        if self.full:
            raise OSError(errno.ENOSPC, "No space left on device")
        self.full = True
        return self.file.write(piece[: len(piece) // 2])

    def fileno(self) -> int:
        return self.file.fileno()

    def __enter__(self) -> PartOfADisk:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()


async def test_upload_that_a_full_disk_cut_inside_a_piece_is_continued_and_right(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = bytes(range(200))
    store, blob = repository(tmp_path), blob_of(content)
    with monkeypatch.context() as patched:
        patched.setattr(store, "_part", lambda upload_id: FullPart(tmp_path / "uploads" / str(upload_id)))
        with pytest.raises(StoreUnavailable, match="full"):
            await store.receive(1, blob, 0, pieces(content, 200))
    offset = store.received_bytes(1)
    assert 0 < offset < 200
    await store.receive(1, blob, offset, pieces(content[offset:], 200))
    await store.finish(1, blob)
    assert store.path(blob.sha256).read_bytes() == content


class FullPart(type(Path())):  # type: ignore[misc]
    def open(self, *_: object, **__: object) -> PartOfADisk:
        return PartOfADisk(Path(self))


async def test_uploads_begun_together_leave_the_reserve_free(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    content = b"x" * 100
    store, blob = repository(tmp_path), blob_of(content)
    await store.standing(1, blob, None, direct=False)
    monkeypatch.setattr(store, "free_bytes", lambda: 99)
    with pytest.raises(StoreUnavailable, match="full"):
        await store.receive(1, blob, 0, pieces(content, 100))


async def test_nothing_is_kept_in_memory_of_uploads_that_are_over(tmp_path: Path):
    store = repository(tmp_path)
    for number in range(20):
        blob = blob_of(b"%d" % number)
        await store.receive(number, blob, 0, pieces(b"%d" % number, 1))
        await store.finish(number, blob)
        await store.remove(blob.sha256)
    await store.receive(99, blob_of(b"never ends"), 0, pieces(b"never", 5))
    assert await store.upload_ids() == {99}
    await store.forget_uploads([99])
    assert not store._locks
    assert not store._digests


async def test_processes_that_share_a_folder_never_append_to_the_same_upload_at_once(tmp_path: Path):
    here, elsewhere = repository(tmp_path), repository(tmp_path)
    content, blob = b"abcdef", blob_of(b"abcdef")
    sender = Sender(content)
    receiving = asyncio.create_task(here.receive(1, blob, 0, sender.pieces()))
    await sender.paused.wait()
    with pytest.raises(Conflict, match="elsewhere"):
        await elsewhere.receive(1, blob, 0, pieces(content, 6))
    sender.go_on.set()
    assert await receiving == 6
    assert await elsewhere.finish(1, blob)
    with pytest.raises(Conflict, match="gone"):  # the other has noted it, which who asks again hears
        await here.finish(1, blob)
    assert here.path(blob.sha256).read_bytes() == content
