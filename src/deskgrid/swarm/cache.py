"""The cache of disks: verified, bounded, on disk, shared by all attempts of a worker.

    FOLDER/<sha256>-<blob>     an unpacked disk, complete and verified, mode 0444; its mtime is when it was last used
    FOLDER/partial/<blob>      the transport file (by its own sha256) of a disk that is being downloaded, or was; beside it <blob>.delta,
                               while that is looked at
    FOLDER/shared/<blob>       a transport file, complete and verified, mode 0444, kept to be given to others
    FOLDER/shared/<blob>.part  one that is being fetched from others, or was: with holes

Rules:

1. A file under its name is complete: it appears by one rename, after it was verified and written to disk. It is given only to who may fetch
   the blob that it came from, which the server has checked: that a disk has some sha256 is only what a user says.
2. What is in use is never removed. Of the rest, partial downloads go first, then what is there only for others, then the disk used longest ago.
3. One fetch per disk at a time; others that want it wait, and go on with it if the first gives up.
4. A partial download survives a restart and is continued. Any other file in the folder is removed when the cache is opened.
5. The disk that a delta is of is kept for it, unless there is no room for both.
6. Complete files are checked again now and then (worker/keeping.py): a disk that rots must not cost jobs, nor other PCs.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import shutil
import stat
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path

from deskgrid.errors import BadImage, NoSpace, ProtocolError, Unreachable
from deskgrid.model.data import Blob, DataRef
from deskgrid.model.ids import Sha256
from deskgrid.units import format_size

__all__ = ["Cache", "Fetch"]

Fetch = Callable[[Path, Path], Awaitable[object]]
"""Called with (partial, output): goes on with the download in `partial`, then makes `output` appear complete and verified."""

_NAME = re.compile(r"[0-9a-f]{64}-[0-9a-f]{64}")
_BLOB_NAME = re.compile(r"[0-9a-f]{64}")
_PART_NAME = re.compile(r"[0-9a-f]{64}\.part")
_PARTIAL, _SHARED = "partial", "shared"


class Cache:
    """Verified disks in one folder. For one process and one event loop; `open` it before use.

    `bound_bytes` holds for complete and partial files together; `reserve_bytes` stay free on the owner's disk.
    """

    def __init__(
        self, folder: Path, *, bound_bytes: int, reserve_bytes: int = 0, free_bytes: Callable[[Path], int] | None = None
    ) -> None:
        self._folder = folder
        self._partials = folder / _PARTIAL
        self.shared_folder = folder / _SHARED
        """Where files are that are fetched from others or given to them."""
        self._shared: dict[Sha256, int] = {}
        """Blobs that are given to others, with their sizes, the one kept first first."""
        self._bound_bytes = bound_bytes
        self._reserve_bytes = reserve_bytes
        self._free_bytes = free_bytes or _free_bytes
        self._sizes: dict[str, int] = {}
        """Complete disks by the names of their files, the one used longest ago first."""
        self._holds: Counter[Sha256] = Counter()
        self._fetching: dict[str, tuple[str, int]] = {}
        """Disks being fetched: the name of the partial file, and the bytes promised to both files."""
        self._locks: dict[Sha256, asyncio.Lock] = {}
        """By blob: a partial download is one's at a time."""
        self.dropped: Callable[[Sha256], None] = lambda _: None
        """Told of a blob that is not kept for others any more."""

    def open(self) -> None:
        """Look at what is there and remove what is no disk and no partial download. Blocks."""
        for folder in (self._partials, self.shared_folder):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        found = []
        for path in self._folder.iterdir():
            if path in (self._partials, self.shared_folder):
                continue
            status = path.lstat()
            if _is_entry(path, status, _NAME):
                found.append((status.st_mtime, path.name, status.st_size))
            else:
                _remove(path)
        for path in self._partials.iterdir():
            if not (_BLOB_NAME.fullmatch(path.name) and stat.S_ISREG(path.lstat().st_mode)):
                _remove(path)
        for path in self.shared_folder.iterdir():
            status = path.lstat()
            if _is_entry(path, status, _BLOB_NAME):
                self._shared[Sha256(path.name)] = status.st_size
            elif not (_PART_NAME.fullmatch(path.name) and stat.S_ISREG(status.st_mode)):
                _remove(path)
        self._sizes = {name: size for _, name, size in sorted(found)}

    def entries(self) -> tuple[Sha256, ...]:
        """Return the disks that are complete, the one used longest ago first."""
        return tuple(dict.fromkeys(_disk_of(name) for name in self._sizes))

    def shared(self) -> tuple[Sha256, ...]:
        """Return the blobs that are kept for others."""
        return tuple(self._shared)

    def shared_file(self, blob: Sha256) -> Path | None:
        """Return the file of a blob that is kept for others; None if it is not here."""
        return self.shared_folder / blob if blob in self._shared else None

    def part_file(self, blob: Sha256) -> Path:
        """Return where a blob is fetched from others. What is there from before is gone on with."""
        return self.shared_folder / f"{blob}.part"

    def keep_for_others(self, blob: Sha256) -> None:
        """Note that a blob's part is complete, verified and has its final name."""
        path = self.shared_folder / blob
        path.chmod(0o444)
        self._shared[blob] = _size(path)

    def room_for_others(self) -> bool:
        """Say whether a part that has become complete may stay: it must not cost a disk, and it goes as soon as its room is needed."""
        return self._promised_bytes() <= self._bound_bytes and self._free_bytes(self._folder) >= self._reserve_bytes

    def forget_shared(self, blob: Sha256) -> None:
        """Remove what is there of a blob for others, complete or not. Idempotent."""
        self._shared.pop(blob, None)
        _remove(self.shared_folder / blob)
        _remove(self.part_file(blob))

    def files(self) -> tuple[tuple[Path, Sha256], ...]:
        """Return all complete files with the sha256 that each must have."""
        disks = ((self._folder / name, _disk_of(name)) for name in self._sizes)
        return (*disks, *((self.shared_folder / blob, blob) for blob in self._shared))

    def remove_damaged(self, path: Path) -> bool:
        """Remove a file that is not what its name says, unless it is in use just now; return whether it went."""
        if self._holds[_disk_of(path.name)]:
            return False
        self._forget(path)
        return True

    def discard(self, content: Sha256) -> bool:
        """Remove a disk, or a blob that is kept whole, unless it is in use; return whether anything went."""
        if self._holds[content]:
            return False
        names = [name for name in self._sizes if _disk_of(name) == content]
        for name in names:
            self._forget(self._folder / name)
            self._forget_if_shared(Sha256(name.partition("-")[2]))
        return self._forget_if_shared(content) or bool(names)

    def _forget_if_shared(self, blob: Sha256) -> bool:
        if blob not in self._shared or self._holds[blob]:
            return False
        self._forget(self.shared_folder / blob)
        return True

    def size_bytes(self) -> int:
        """Return what all files take, partial downloads included."""
        return sum(self._sizes.values()) + sum(self._shared.values()) + sum(_allocated(path) for path in self._parts())

    def _parts(self) -> Iterator[Path]:
        """Yield the files that are not complete."""
        if self._partials.is_dir():
            yield from self._partials.iterdir()
        if self.shared_folder.is_dir():
            yield from (path for path in self.shared_folder.iterdir() if path.suffix)

    @contextlib.contextmanager
    def borrow(self, sha256: Sha256, blob: Sha256) -> Iterator[Path | None]:
        """Yield the path of a disk that came from a blob, if it is here, and keep it while the block runs; None if it is not."""
        name = f"{sha256}-{blob}"
        if name not in self._sizes or not (self._folder / name).is_file():
            yield None
            return
        release = self.hold(sha256)
        try:
            yield self._folder / name
        finally:
            release()

    def hold(self, sha256: Sha256) -> Callable[[], None]:
        """Keep a disk from being removed, whether it is complete or not, until the returned function is called (once or more)."""
        self._holds[sha256] += 1
        left = [sha256]

        def release() -> None:
            if left:
                self._holds[left.pop()] -= 1

        return release

    @asynccontextmanager
    async def use(self, ref: DataRef, fetch: Fetch) -> AsyncIterator[Path]:
        """Yield the path of a disk, fetching it if it is not here; it stays while the block runs.

        Raise NoSpace if it cannot be given room, ProtocolError if it comes with another size than `ref` says, and what `fetch` raises.
        """
        if ref.disk is None:
            raise BadImage("this data is not a disk")
        name = f"{ref.disk.sha256}-{ref.blob.sha256}"
        release = self.hold(ref.disk.sha256)
        try:
            async with self._locks.setdefault(ref.blob.sha256, asyncio.Lock()):
                if not self._is_complete(name, ref.disk.size_bytes):
                    await self._fetch(ref, name, ref.disk.size_bytes, fetch)
                self._touch(name)
            yield self._folder / name
        finally:
            release()

    async def bring(self, blob: Blob, fetch: Callable[[Path], Awaitable[Path]]) -> Path:
        """Return the file of a blob that is kept whole, fetching it if it is not here. Hold it before.

        `fetch` is given a partial file to go on with, and returns the file with the blob, verified: that, or the one that is kept for others.
        Raise NoSpace if it cannot be given room, and what `fetch` raises.
        """
        async with self._locks.setdefault(blob.sha256, asyncio.Lock()):
            path = self.shared_folder / blob.sha256
            if blob.sha256 in self._shared and _size(path) == blob.size_bytes:
                return path
            partial = self._partials / blob.sha256
            self._fetching[blob.sha256] = (partial.name, 0)
            try:
                self._make_room(blob.size_bytes, there_bytes=self._there_bytes(blob.sha256))
                self._fetching[blob.sha256] = (partial.name, blob.size_bytes)
                file = await fetch(partial)
                if file != path:
                    file.replace(path)
                    self.keep_for_others(blob.sha256)
            finally:
                del self._fetching[blob.sha256]
            return path

    def shrink(self, wanted_bytes: int) -> int:
        """Remove what is not in use until `wanted_bytes` are freed or nothing is left to remove; return the bytes freed."""
        freed = 0
        while freed < wanted_bytes:
            victim = next(self._removable(), None)
            if victim is None:
                break
            freed += self._forget(victim)
        return freed

    def _is_complete(self, name: str, size_bytes: int) -> bool:
        """Say whether the disk is here. One of another size stays: either it was damaged, and will be replaced, or the size is wrong."""
        path = self._folder / name
        return name in self._sizes and path.is_file() and path.stat().st_size == size_bytes

    async def _fetch(self, ref: DataRef, name: str, size_bytes: int, fetch: Fetch) -> None:
        partial, output = self._partials / ref.blob.sha256, self._folder / name
        self._fetching[name] = (partial.name, 0)
        release = self.hold(ref.delta.base) if ref.delta is not None else _nothing
        try:
            try:
                self._make_room(ref.blob.size_bytes + size_bytes, there_bytes=self._there_bytes(ref.blob.sha256))
            except NoSpace:
                release()
                self._make_room(ref.blob.size_bytes + size_bytes, there_bytes=self._there_bytes(ref.blob.sha256))
            self._fetching[name] = (partial.name, ref.blob.size_bytes + size_bytes)
            await fetch(partial, output)
            came_bytes = _size(output)
            if came_bytes != size_bytes and name not in self._sizes:
                _remove(output)
            else:
                self._sizes[name] = came_bytes
            if came_bytes != size_bytes:
                raise ProtocolError(f"disk {name[:12]} came with another size than it was promised with")
        except (asyncio.CancelledError, Unreachable):
            raise  # what came so far is of use the next time
        except BaseException:
            _remove(partial)
            raise
        finally:
            release()
            del self._fetching[name]
        _remove(partial)

    def _there_bytes(self, blob: Sha256) -> int:
        """Return what is there already of a blob that is to be fetched."""
        return max(_allocated(self._partials / blob), _allocated(self.part_file(blob)))

    def _touch(self, name: str) -> None:
        os.utime(self._folder / name)
        self._sizes[name] = self._sizes.pop(name)

    def _make_room(self, need_bytes: int, *, there_bytes: int) -> None:
        """Remove what is not in use until there is room. Raise NoSpace if there is too little to remove."""
        while True:
            over_bound = self._promised_bytes() + need_bytes - self._bound_bytes
            over_disk = need_bytes - there_bytes + self._reserve_bytes - self._free_bytes(self._folder)
            if max(over_bound, over_disk) <= 0:
                return
            victims = [(path, self._counted(path)) for path in self._removable()]
            # What cannot be had anyway must not cost the disks that are here: a disk's size is what a user says.
            if not victims or max(over_bound, over_disk) > sum(size for _, size in victims):
                raise NoSpace(_why_no_room(need_bytes, self._bound_bytes, over_bound > 0))
            for path, size in victims:
                over_bound -= size
                over_disk -= self._forget(path)
                if max(over_bound, over_disk) <= 0:
                    break  # and look again: what is free is the system's to say

    def _counted(self, path: Path) -> int:
        """Return what a file counts for in the bound."""
        return self._sizes.get(path.name) or self._shared.get(Sha256(path.name)) or _allocated(path)

    def _promised_bytes(self) -> int:
        """Return what the files take or may come to take."""
        in_work = {name for name, _ in self._fetching.values()}
        idle = sum(_allocated(path) for path in self._parts() if path.stem not in in_work)
        return sum(self._sizes.values()) + sum(self._shared.values()) + idle + sum(size for _, size in self._fetching.values())

    def _removable(self) -> Iterator[Path]:
        in_work = {name for name, _ in self._fetching.values()}
        yield from sorted((path for path in self._parts() if path.stem not in in_work), key=lambda path: path.stat().st_mtime)
        yield from (self.shared_folder / blob for blob in list(self._shared) if not self._holds[blob])
        yield from (self._folder / name for name in list(self._sizes) if not self._holds[_disk_of(name)])

    def _forget(self, path: Path) -> int:
        """Remove a file and return its size, at least 1 so that it counts as progress."""
        size = _allocated(path)
        _remove(path)
        self._sizes.pop(path.name, None)
        if self._shared.pop(Sha256(path.name), None) is not None:
            self.dropped(Sha256(path.name))
        return max(size, 1)


def _nothing() -> None:
    """Release what was not held."""


def _disk_of(name: str) -> Sha256:
    return Sha256(name.partition("-")[0])


def _is_entry(path: Path, status: os.stat_result, names: re.Pattern[str]) -> bool:
    """Tell a complete file: nobody can have written to it, for it never was writable under this name."""
    plain = bool(names.fullmatch(path.name)) and stat.S_ISREG(status.st_mode) and status.st_size > 0
    return plain and (os.name == "nt" or not status.st_mode & 0o222)


def _why_no_room(need_bytes: int, bound_bytes: int, by_bound: bool) -> str:
    need = format_size(need_bytes)
    if by_bound:
        return f"the disk needs {need} of the cache, which may have {format_size(bound_bytes)} in all"
    return f"the disk needs {need}, more than is free on this PC"


def _free_bytes(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except FileNotFoundError:
        return 0


def _allocated(path: Path) -> int:
    """Return what a file takes on the disk, its holes not counted."""
    try:
        status = path.stat()
    except FileNotFoundError:
        return 0
    blocks: int | None = getattr(status, "st_blocks", None)
    return status.st_size if blocks is None else min(status.st_size, blocks * 512)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
        return
    with contextlib.suppress(FileNotFoundError):
        path.unlink()
