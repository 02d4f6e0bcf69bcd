"""The one archive format: a tar in the pax interchange format, compressed as one zstd frame.

Layout (POSIX.1-2001 pax; GNU tar manual, "Storing Sparse Files", for GNU.sparse 1.0; RFC 8878 for zstd):

    zstd frame { member*  zero-block zero-block }
    member     = [ header 'x' + records ]  header  [ sparse map ]  content, each padded to 512 bytes
    header     = ustar, uid and gid 0; type 0 file, 1 hard link, 2 symbolic link, 5 folder
    records    = path, linkpath, size where the ustar field cannot hold them; `hdrcharset=BINARY` for names that are not
                 UTF-8; GNU.sparse.major=1, .minor=0, .name, .realsize for a file with holes
    sparse map = number of extents, then offset and length of each, decimal, one a line

GNU tar and Python's tarfile read what is written here. What is read here is hostile: contexts come from users, results
from guests. The rules of `unpack`:

1. Nothing is written outside the new folder: absolute names and `..` refuse the whole archive.
2. No symbolic link exists while members are written, so none can be followed: links are made last. Those that would
   leave the folder, also by way of other links, are not made and are reported.
3. A hard link can only name a file that this archive has already unpacked.
4. Device nodes and FIFOs are dropped and reported; setuid, setgid and sticky bits are dropped.
5. A name that appears twice keeps its first content; the later one is reported.
6. Every size is bounded before memory or disk is used for it.
7. The folder appears complete, by one rename, or not at all.

Our own reader, not tarfile: its extraction filters are missing from the Python of Debian 12 (3.11.2), and its header
parser has had endless loops on made-up headers (CVE-2024-6232, CVE-2025-8194).

Tried on Linux only. Names that Windows cannot hold are dropped there and reported; that part is untested.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import queue
import shutil
import stat
import sys
import threading
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from struct import Struct as Layout
from typing import BinaryIO

from msgspec import Struct

from deskgrid.errors import BadArchive, Conflict, InvalidInput, NoSpace
from deskgrid.files import sync_folder

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

__all__ = [
    "MAX_EXTENTS",
    "MAX_REPORTED",
    "ArchiveWriter",
    "Extent",
    "PackReport",
    "ParallelSha256",
    "UnpackLimits",
    "UnpackReport",
    "atomic_file",
    "frame_pieces",
    "links_that_leave",
    "out_of_space",
    "pack_folder",
    "printable",
    "unpack",
    "write_all",
    "zstd",
]

BLOCK = 512
CHUNK = 1 << 20
"""Bytes moved at once."""
MAX_EXTENTS = 1 << 20
"""Extents of one sparse file; a map of more is refused."""
MAX_RECORDS_BYTES = 1 << 16
"""Of pax records before one member; names are far shorter."""
MAX_REPORTED = 1000
"""Entries in each list of a report."""
EPOCH = 315532800
"""Modification time of what `pack_folder` packs: 1980-01-01, the earliest that zip files can hold."""
LEVEL = 3
"""zstd level: the command's default, and what keeps up with a disk on one core."""

_HEADER = Layout("<100s8s8s8s12s12s8s1s100s8s32s32s8s8s155s12x")
_ZEROS = bytes(BLOCK)
_NEW_FILE = (
    os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0) | getattr(os, "O_BINARY", 0)
)
_FILE, _HARD_LINK, _SYMLINK, _FOLDER = b"0", b"1", b"2", b"5"
_FILE_TYPES = frozenset({_FILE, b"\0", b"7"})
_SPECIAL = {b"3": "character device", b"4": "block device", b"6": "FIFO"}
_OCTAL_LIMIT = 8**11
_SPACE_ERRORS = frozenset({errno.ENOSPC, getattr(errno, "EDQUOT", errno.ENOSPC)})
_NAME_ERRORS = frozenset({errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL})
_WINDOWS_DEVICES = frozenset({"CON", "PRN", "AUX", "NUL", *(f"{port}{n}" for port in ("COM", "LPT") for n in range(10))})
_LINK_HOPS = 40
"""What Linux follows in one path before it gives up with ELOOP."""
_LINK_STEPS = 2_000_000
"""Path components walked for all links of an archive together; later links count as leaving."""
_LINK_DEPTH = 256
"""Components of a path that a link may lead to."""

Bytes = bytes | bytearray | memoryview
Extent = tuple[int, int]
"""Offset and length in bytes."""


class PackReport(Struct, frozen=True, kw_only=True):
    """What was packed. `files` counts every member; `bytes` the contents without holes."""

    files: int
    bytes: int
    archive_bytes: int
    archive_sha256: str


class UnpackLimits(Struct, frozen=True, kw_only=True):
    """Bounds on what an archive may cost. Passing one raises BadArchive.

    There is none on the ratio: zeros, which jobs do write, pack 30,000 to 1, and the bounds on bytes hold whatever the ratio is.
    """

    bytes: int = 64 << 30
    """Contents written, holes not counted; a hard link that has to be copied counts."""
    apparent_bytes: int = 16 << 40
    """Sizes of all files, holes counted."""
    files: int = 1_000_000
    """Members of any kind."""
    depth: int = 64
    """Components of a name."""
    name_bytes: int = 4096
    """Of a whole name and of a link's target."""
    window_log: int = 27
    """log2 of the memory that a frame may ask the decoder for; 27 is zstd's own default (128 MiB)."""


class UnpackReport(Struct, frozen=True, kw_only=True):
    """What was unpacked and what was left out. Names are made printable; each list ends after `MAX_REPORTED` entries."""

    files: int
    """Files, folders and links made."""
    bytes: int
    dropped: tuple[tuple[str, str], ...] = ()
    """Name and reason: device nodes, FIFOs, names that appear twice or that this system cannot hold."""
    refused_links: tuple[tuple[str, str], ...] = ()
    """Name and target of symbolic links that would leave the folder."""
    left_out: int = 0
    """Everything dropped or refused, also beyond what the lists hold."""


# --- what both directions need ---


def printable(name: str | bytes) -> str:
    """Return a name without control characters or undecodable bytes, safe for terminals and JSON."""
    text = os.fsdecode(name) if isinstance(name, bytes) else name
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


@contextlib.contextmanager
def out_of_space(what: str) -> Iterator[None]:
    """Turn the system's "disk full" and "quota exceeded" into NoSpace; other errors pass."""
    try:
        yield
    except OSError as error:
        if error.errno not in _SPACE_ERRORS:
            raise
        raise NoSpace(f"no space left while writing {what}", hint="free some disk space and try again") from error


@contextlib.contextmanager
def atomic_file(path: Path, *, mode: int = 0o600) -> Iterator[BinaryIO]:
    """Yield a new file that appears at `path` complete and on disk, or not at all. Raise NoSpace if it does not fit.

    An existing file at `path` is replaced.
    """
    part = path.with_name(f".{path.name[:100]}.{os.urandom(4).hex()}.part")
    try:
        with out_of_space(path.name):
            descriptor = os.open(part, _NEW_FILE, 0o600)
            with open(descriptor, "w+b", buffering=0) as file:
                yield file
                os.fsync(file.fileno())
            part.chmod(mode)
            part.replace(path)
            sync_folder(path.parent)
    finally:
        part.unlink(missing_ok=True)


def write_all(output: BinaryIO, data: Bytes) -> None:
    """Write every byte, also to an unbuffered file that takes them in pieces."""
    written = output.write(data)
    if written < len(data):
        rest = memoryview(data)[written:]
        while rest:
            rest = rest[output.write(rest) :]


class ParallelSha256:
    """sha256 in a thread of its own: hashlib lets go of the GIL, so hashing overlaps with compressing and writing.

    Use as a context manager, or the thread stays. `update` keeps a reference: hand over bytes that do not change.
    """

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._queue: queue.Queue[bytes | None] = queue.Queue(maxsize=64)
        self._thread = threading.Thread(target=self._run, name="sha256", daemon=True)
        self._thread.start()

    def __enter__(self) -> ParallelSha256:
        return self

    def __exit__(self, *_: object) -> None:
        self._finish()

    def update(self, data: bytes) -> None:
        """Add bytes; blocks when hashing is far behind."""
        self._queue.put(data)

    def hexdigest(self) -> str:
        """Return the digest of everything added. Nothing can be added afterwards."""
        self._finish()
        return self._digest.hexdigest()

    def _finish(self) -> None:
        if self._thread.is_alive():
            self._queue.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (data := self._queue.get()) is not None:
            self._digest.update(data)


def links_that_leave(links: Mapping[str, str]) -> set[str]:
    """Return the names of those symbolic links whose target is outside the folder that they are in.

    `links` maps names relative to the folder, with "/" between components, to targets. Paths are walked as the kernel would, through
    other links of the mapping: with `d -> a/b`, `d/../..` is not the folder itself. Loops and endless chains count as leaving.
    """
    walk = _LinkWalk(links)
    return {name for name in links if walk.leaves(name)}


class _LinkWalk:
    """Walks link targets by names alone, within a budget for all links together."""

    def __init__(self, links: Mapping[str, str]) -> None:
        self._targets = {_fold(name): target for name, target in links.items()}
        self._links = links
        self._steps = _LINK_STEPS

    def leaves(self, name: str) -> bool:
        here = name.split("/")[:-1]
        if _is_absolute(self._links[name]):
            return True
        todo = _components(self._links[name])[::-1]
        hops = 1
        while todo:
            self._steps -= 1
            if self._steps < 0 or hops > _LINK_HOPS or len(here) > _LINK_DEPTH:
                return True
            part = todo.pop()
            if part == "..":
                if not here:
                    return True
                here.pop()
                continue
            target = self._targets.get(_fold("/".join([*here, part])))
            if target is None:
                here.append(part)
                continue
            if _is_absolute(target):
                return True
            hops += 1
            todo.extend(_components(target)[::-1])
        return False


def _components(path: str) -> list[str]:
    if os.name == "nt":
        path = path.replace("\\", "/")
    return [part for part in path.split("/") if part not in ("", ".")]


def _is_absolute(path: str) -> bool:
    return path.startswith("/") or (os.name == "nt" and (path.startswith("\\") or ":" in path))


def _fold(name: str) -> str:
    """Return what this system's file system takes for the same name."""
    if sys.platform == "linux":
        return name
    return unicodedata.normalize("NFD", name).casefold()


# --- writing ---


class ArchiveWriter:
    """Writes members one after the other; the caller decides the order. Use as a context manager.

    Names are bytes relative to the unpacked folder, without leading or trailing "/". With `threads` > 0 zstd compresses in threads of its
    own; they and the hashing thread are started here, so that a sandbox entered later need not allow new ones.
    Raises NoSpace once the archive would have more than `max_bytes` bytes (0: no bound).
    """

    def __init__(self, output: BinaryIO, *, threads: int = 0, level: int = LEVEL, max_bytes: int = 0) -> None:
        parameter = zstd.CompressionParameter
        self._zstd = zstd.ZstdCompressor(
            options={parameter.compression_level: level, parameter.nb_workers: threads, parameter.checksum_flag: 1}
        )
        self._output = output
        self._max_bytes = max_bytes
        self._files = self._bytes = self._archive_bytes = 0
        self._sha256 = ParallelSha256()
        self._compress(b"")

    def __enter__(self) -> ArchiveWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._sha256.__exit__()

    @property
    def files(self) -> int:
        """Members so far."""
        return self._files

    @property
    def stored_bytes(self) -> int:
        """Contents so far, holes not counted."""
        return self._bytes

    def add_folder(self, name: bytes, *, mode: int = 0o755, mtime: int = 0) -> None:
        """Add a folder."""
        self._add(name + b"/", _FOLDER, mode, mtime)

    def add_symlink(self, name: bytes, target: bytes, *, mtime: int = 0) -> None:
        """Add a symbolic link; the target is data and is not looked at."""
        self._add(name, _SYMLINK, 0o777, mtime, link=target)

    def add_hard_link(self, name: bytes, first: bytes, *, mode: int = 0o644, mtime: int = 0) -> None:
        """Add another name of the file added before as `first`."""
        self._add(name, _HARD_LINK, mode, mtime, link=first)

    def add_file(
        self,
        name: bytes,
        size_bytes: int,
        contents: Iterable[Bytes],
        *,
        mode: int = 0o644,
        mtime: int = 0,
        extents: Sequence[Extent] | None = None,
    ) -> None:
        """Add a file of `size_bytes`. With `extents` (ascending, apart, at most `MAX_EXTENTS`) the rest of it is holes.

        GNU tar reads them only if all but the last are multiples of 512 long, as in file systems they are.
        `contents` must yield just the bytes of the extents, else ValueError is raised and the archive is of no use.
        """
        if extents is None:
            self._add(name, _FILE, mode, mtime, size=size_bytes)
            self._contents(size_bytes, contents)
            return
        sparse_map = _sparse_map(size_bytes, extents)
        stored = sum(length for _, length in extents)
        self._add(name, _FILE, mode, mtime, size=len(sparse_map) + stored, real_size=size_bytes)
        self._compress(sparse_map)
        self._contents(stored, contents)

    def close(self) -> PackReport:
        """End the archive and return its report. The output is neither synced nor closed."""
        self._compress(_ZEROS * 2)
        self._put(self._zstd.flush())
        return PackReport(
            files=self._files, bytes=self._bytes, archive_bytes=self._archive_bytes, archive_sha256=self._sha256.hexdigest()
        )

    def _add(
        self, name: bytes, kind: bytes, mode: int, mtime: int, *, size: int = 0, link: bytes = b"", real_size: int = -1
    ) -> None:
        self._compress(_member_header(name, kind, mode & 0o777, max(mtime, 0), size, link, real_size))
        self._files += 1

    def _contents(self, size: int, contents: Iterable[Bytes]) -> None:
        seen = 0
        for data in contents:
            seen += len(data)
            self._compress(data)
        if seen != size:
            raise ValueError(f"contents have {seen} bytes, {size} were announced")
        self._bytes += size
        if size % BLOCK:
            self._compress(_ZEROS[size % BLOCK :])

    def _compress(self, data: Bytes) -> None:
        self._put(self._zstd.compress(data))

    def _put(self, packed: bytes) -> None:
        if not packed:
            return
        self._archive_bytes += len(packed)
        if self._max_bytes and self._archive_bytes > self._max_bytes:
            raise NoSpace(f"the archive has more than the {self._max_bytes} bytes that are allowed")
        self._sha256.update(packed)
        write_all(self._output, packed)


def _member_header(name: bytes, kind: bytes, mode: int, mtime: int, size: int, link: bytes, real_size: int) -> bytes:
    """Return all blocks before a member's content. `real_size` >= 0 marks a sparse file."""
    records: list[tuple[bytes, bytes]] = []
    if not (_is_utf8(name) and _is_utf8(link)):
        records.append((b"hdrcharset", b"BINARY"))
    short = name
    if real_size >= 0:
        records += [(b"GNU.sparse.major", b"1"), (b"GNU.sparse.minor", b"0")]
        records += [(b"GNU.sparse.name", name), (b"GNU.sparse.realsize", b"%d" % real_size)]
        short = b"GNUSparseFile.0/" + name.rpartition(b"/")[2]
    elif len(name) > 100 or not name.isascii():
        records.append((b"path", name))
    if len(link) > 100 or not link.isascii():
        records.append((b"linkpath", link))
    if size >= _OCTAL_LIMIT:
        records.append((b"size", b"%d" % size))
    if mtime >= _OCTAL_LIMIT:
        records.append((b"mtime", b"%d" % mtime))
    header = _header_block(short, kind, mode, mtime, size, link)
    if not records:
        return header
    text = b"".join(_record(key, value) for key, value in records)
    return _header_block(b"PaxHeader", b"x", 0o644, 0, len(text), b"") + text + bytes(-len(text) % BLOCK) + header


def _header_block(name: bytes, kind: bytes, mode: int, mtime: int, size: int, link: bytes) -> bytes:
    fields = [
        _ascii(name),
        b"%07o\0" % mode,
        b"0000000\0",
        b"0000000\0",
        b"%011o\0" % (size if size < _OCTAL_LIMIT else 0),
        b"%011o\0" % (mtime if mtime < _OCTAL_LIMIT else 0),
        b" " * 8,
        kind,
        _ascii(link),
        b"ustar\x0000",
        b"",
        b"",
        b"0000000\0",
        b"0000000\0",
        b"",
    ]
    fields[6] = b"%06o\0 " % sum(_HEADER.pack(*fields))
    return _HEADER.pack(*fields)


def _ascii(name: bytes) -> bytes:
    """Return what fits the old field; the real name is in the records where this is not it."""
    if not name.isascii():
        name = name.decode("ascii", "replace").encode("ascii", "replace")
    return name[:100]


def _is_utf8(name: bytes) -> bool:
    if name.isascii():
        return True
    try:
        name.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _record(key: bytes, value: bytes) -> bytes:
    """Return "<length> key=value\\n", whose length counts its own digits."""
    rest = len(key) + len(value) + 3
    length = rest + len(str(rest))
    if len(str(length)) != len(str(rest)):
        length = rest + len(str(length))
    return b"%d %s=%s\n" % (length, key, value)


def _sparse_map(size_bytes: int, extents: Sequence[Extent]) -> bytes:
    if len(extents) >= MAX_EXTENTS:
        raise ValueError(f"{len(extents)} extents, at most {MAX_EXTENTS - 1} can be written")
    # GNU tar ends every map with an empty extent at the end of the file and needs it when the file ends in a hole.
    lines = [len(extents) + 1, *(number for extent in extents for number in extent), size_bytes, 0]
    text = b"".join(b"%d\n" % number for number in lines)
    return text + bytes(-len(text) % BLOCK)


def pack_folder(
    folder: Path, output: BinaryIO | Path, *, max_bytes: int = 0, progress: Callable[[int], None] | None = None
) -> PackReport:
    """Pack a user's folder. The same folder gives the same bytes: sorted, times set to `EPOCH`, owners left out.

    (The same bytes with the same release of zstd, that is.) Symbolic links are kept as links. Raises InvalidInput, naming the file, for
    devices, sockets, FIFOs, links that lead out of the folder, files that change meanwhile, and more than `max_bytes` of contents
    (0: no bound). With a Path the file appears complete or not at all; NoSpace if it does not fit. `progress` is
    called with the bytes read so far, and what it raises ends the packing. Blocks; call it in a thread.
    """
    if isinstance(output, Path):
        with atomic_file(output) as file:
            return pack_folder(folder, file, max_bytes=max_bytes, progress=progress)
    if not folder.is_dir():
        raise InvalidInput("is not a folder", where=str(folder))
    entries = list(_walk(folder))
    _refuse_leaving_links(folder, entries)
    with ArchiveWriter(output) as writer:
        for path, name in entries:
            _pack_entry(writer, path, name)
            if max_bytes and writer.stored_bytes > max_bytes:
                raise InvalidInput(f"has more than {max_bytes} bytes", where=str(folder), hint="publish large files as data")
            if progress is not None:
                progress(writer.stored_bytes)
        return writer.close()


def _walk(folder: Path, prefix: bytes = b"") -> Iterator[tuple[Path, bytes]]:
    """Yield everything below a folder, parents first, sorted by the bytes of the names."""
    for name, path in sorted((_name_bytes(path.name), path) for path in folder.iterdir()):
        yield path, prefix + name
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path, prefix + name + b"/")


def _name_bytes(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass") if os.name == "nt" else os.fsencode(name)


def _refuse_leaving_links(folder: Path, entries: list[tuple[Path, bytes]]) -> None:
    links = {path.relative_to(folder).as_posix(): str(path.readlink()) for path, _ in entries if path.is_symlink()}
    for name in sorted(links_that_leave(links)):
        raise InvalidInput(
            f"is a link to {links[name]!r}, outside the folder",
            where=str(folder / name),
            hint="copy the file into the folder, or make the link relative",
        )


def _pack_entry(writer: ArchiveWriter, path: Path, name: bytes) -> None:
    status = path.lstat()
    mode = stat.S_IMODE(status.st_mode)
    if stat.S_ISLNK(status.st_mode):
        writer.add_symlink(name, _name_bytes(str(path.readlink())), mtime=EPOCH)
    elif stat.S_ISDIR(status.st_mode):
        writer.add_folder(name, mode=mode, mtime=EPOCH)
    elif stat.S_ISREG(status.st_mode):
        _pack_file(writer, path, name)
    else:
        raise InvalidInput("is a device, socket or FIFO", where=str(path), hint="only files, folders and links can be packed")


def _pack_file(writer: ArchiveWriter, path: Path, name: bytes) -> None:
    # O_NONBLOCK: a FIFO put in the file's place meanwhile must not hang us.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    with open(os.open(path, flags), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        try:
            writer.add_file(name, status.st_size, _pieces(file, status.st_size), mode=stat.S_IMODE(status.st_mode), mtime=EPOCH)
        except ValueError as error:
            raise InvalidInput("changed while it was read", where=str(path), hint="try again") from error


def _pieces(file: BinaryIO, size: int) -> Iterator[bytes]:
    while size > 0 and (data := file.read(min(size, CHUNK))):
        size -= len(data)
        yield data


# --- reading ---


class _Member(Struct, frozen=True):
    """A member's header, not yet judged."""

    name: bytes
    kind: bytes
    mode: int
    mtime: int
    link: bytes
    real_size: int
    extents: list[Extent]
    """Where the content goes; one extent for a file without holes."""


def frame_pieces(source: BinaryIO, *, window_log: int = 27) -> Iterator[bytes]:
    """Yield what one zstd frame holds, at most 1 MiB at a time, and check that the file ends with it.

    Raises BadArchive if it is damaged, cut short, followed by something, or asks for more than 2^`window_log` bytes of memory.
    """
    decompressor = zstd.ZstdDecompressor(options={zstd.DecompressionParameter.window_log_max: window_log})
    while not decompressor.eof:
        data = source.read(1 << 17) if decompressor.needs_input else b""
        if decompressor.needs_input and not data:
            raise BadArchive("the archive is cut short")
        try:
            piece = decompressor.decompress(data, CHUNK)
        except zstd.ZstdError as error:
            raise BadArchive(f"the archive is damaged: {error}") from error
        if piece:
            yield piece
    if decompressor.unused_data or source.read(1):
        raise BadArchive("something follows the end of the archive")


class _Stream:
    """The tar inside the frame, read in bounded pieces."""

    def __init__(self, source: BinaryIO, limits: UnpackLimits) -> None:
        self._pieces = frame_pieces(source, window_log=limits.window_log)
        self._piece = memoryview(b"")
        self._unpacked = 0

    @property
    def at(self) -> int:
        """Bytes of the tar consumed."""
        return self._unpacked - len(self._piece)

    def take(self, size: int) -> memoryview:
        """Return at least one and at most `size` bytes. Raise BadArchive at the end."""
        if not self._piece and not self._fill():
            raise BadArchive("the archive is cut short")
        taken, self._piece = self._piece[:size], self._piece[size:]
        return taken

    def exactly(self, size: int) -> bytes:
        """Return `size` bytes. The caller has bounded `size`."""
        data = bytes(self.take(size))
        while len(data) < size:
            data += self.take(size - len(data))
        return data

    def skip_to(self, position: int) -> None:
        """Consume up to a position of the tar."""
        while self.at < position:
            self.take(position - self.at)

    def finish(self) -> None:
        """Check that only padding follows and that the frame ends where the file does."""
        padding = len(self._piece)
        while self._fill():
            padding += len(self._piece)
            if padding > CHUNK:
                raise BadArchive("something follows the end of the archive")

    def _fill(self) -> bool:
        """Take the next piece; False at the end of the frame."""
        piece = next(self._pieces, None)
        if piece is None:
            return False
        self._unpacked += len(piece)
        self._piece = memoryview(piece)
        return True


def _members(stream: _Stream) -> Iterator[_Member]:
    """Yield headers up to the end mark. After each the stream is moved behind the member's content."""
    while True:
        block = stream.exactly(BLOCK)
        if block == _ZEROS:
            if stream.exactly(BLOCK) != _ZEROS:
                raise BadArchive("the archive is damaged: its end mark is incomplete")
            return
        fields = _fields(block)
        records: dict[bytes, bytes] = {}
        if fields[7] == b"x":
            records = _records(_read_padded(stream, _octal(fields[4]), MAX_RECORDS_BYTES))
            fields = _fields(stream.exactly(BLOCK))
        size = _decimal(records[b"size"]) if b"size" in records else _octal(fields[4])
        if size and fields[7] not in _FILE_TYPES:
            raise BadArchive("a member that is not a file has content")
        end = stream.at + size + -size % BLOCK
        yield _member(stream, fields, records, size)
        stream.skip_to(end)


def _fields(block: bytes) -> tuple[bytes, ...]:
    """Split a header and check its mark and its sum."""
    if block[257:263] != b"ustar\0":
        raise BadArchive("not a pax archive")
    if sum(block) - sum(block[148:156]) + 8 * 32 != _octal(block[148:156]):
        raise BadArchive("the archive is damaged: a header's sum is wrong")
    fields: tuple[bytes, ...] = _HEADER.unpack(block)
    return fields


def _octal(field: bytes) -> int:
    digits = field.strip(b" \0")
    if not digits:
        return 0
    if digits.strip(b"01234567"):
        raise BadArchive("the archive is damaged: a header's number is not octal")
    return int(digits, 8)


def _decimal(digits: bytes) -> int:
    if not digits.isdigit() or len(digits) > 18:
        raise BadArchive("the archive is damaged: a number is not decimal")
    return int(digits)


def _read_padded(stream: _Stream, size: int, limit: int) -> bytes:
    if size > limit:
        raise BadArchive(f"the archive has a header of {size} bytes")
    return stream.exactly(size + -size % BLOCK)[:size]


def _records(data: bytes) -> dict[bytes, bytes]:
    records = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 8)
        end = at + _decimal(data[at : max(space, at)])
        if end <= space + 2 or end > len(data) or data[end - 1 : end] != b"\n":
            raise BadArchive("the archive is damaged: a pax record has the wrong length")
        key, equals, value = data[space + 1 : end - 1].partition(b"=")
        if not equals:
            raise BadArchive("the archive is damaged: a pax record has no value")
        records[key] = value
        at = end
    return records


def _member(stream: _Stream, fields: tuple[bytes, ...], records: dict[bytes, bytes], size: int) -> _Member:
    name, link, prefix = (field.split(b"\0", 1)[0] for field in (fields[0], fields[8], fields[14]))
    name = records.get(b"path", prefix + b"/" + name if prefix else name)
    real_size, extents = size, [(0, size)] if size else []
    if any(key.startswith(b"GNU.sparse.") for key in records):
        if (records.get(b"GNU.sparse.major"), records.get(b"GNU.sparse.minor")) != (b"1", b"0"):
            raise BadArchive("the archive has a sparse file of a kind that is not known")
        name = records.get(b"GNU.sparse.name", name)
        real_size = _decimal(records.get(b"GNU.sparse.realsize", b""))
        extents = _read_sparse_map(stream, size, real_size)
    mtime = _decimal(records[b"mtime"].split(b".")[0]) if b"mtime" in records else _octal(fields[5])
    return _Member(name, fields[7], _octal(fields[1]), mtime, records.get(b"linkpath", link), real_size, extents)


def _read_sparse_map(stream: _Stream, size: int, real_size: int) -> list[Extent]:
    """Read the map of a sparse member of `size` stored bytes and check that it describes the rest of them."""
    text = bytearray()
    wanted = lines = 0
    while not wanted or lines < wanted:
        if len(text) + BLOCK > size:
            raise BadArchive("the archive is damaged: a sparse file's map is cut short")
        block = stream.exactly(BLOCK)
        text += block
        lines += block.count(b"\n")
        if not wanted and lines:
            count = _decimal(bytes(text[: text.index(b"\n")]))
            if count > MAX_EXTENTS:
                raise BadArchive(f"the archive has a file of {count} extents")
            wanted = 1 + 2 * count
    numbers = [_decimal(bytes(line)) for line in text.split(b"\n", wanted)[1:wanted]]
    extents = list(zip(numbers[::2], numbers[1::2], strict=True))
    end = 0
    for offset, length in extents:
        if offset < end or offset + length > real_size:
            raise BadArchive("the archive is damaged: a sparse file's extents overlap")
        end = offset + length
    if sum(length for _, length in extents) != size - len(text):
        raise BadArchive("the archive is damaged: a sparse file's extents do not add up")
    return [extent for extent in extents if extent[1]]


def unpack(
    archive: Path | BinaryIO,
    destination: Path,
    *,
    limits: UnpackLimits = UnpackLimits(),  # noqa: B008 frozen
    progress: Callable[[int], None] | None = None,
) -> UnpackReport:
    """Unpack a hostile archive into a new folder, by the rules at the top of this module.

    `destination` must not exist, or be an empty folder that is not the working directory; its parent must exist. The work is done in a
    hidden folder beside it and moved into place by one rename at the end (not synced: after a power cut it may be
    incomplete). Raises BadArchive, Conflict (there is something at `destination`) or NoSpace; then nothing is left. `progress` is
    called with the bytes written so far, and what it raises ends the unpacking. Blocks; call it in a thread.
    """
    if isinstance(archive, Path):
        with archive.open("rb") as source:
            return unpack(source, destination, limits=limits, progress=progress)
    destination = destination.absolute()
    _check_free(destination)
    staging = destination.with_name(f".{destination.name[:100]}.{os.urandom(4).hex()}.part")
    with out_of_space(destination.name):
        try:
            staging.mkdir()
            mode = stat.S_IMODE(staging.stat().st_mode)
            staging.chmod(0o700)
            report = _Unpacker(staging, limits, progress).run(_Stream(archive, limits))
            staging.chmod(mode)
            _move_into_place(staging, destination)
        except BaseException:
            _remove_tree(staging)
            raise
    return report


def _check_free(destination: Path) -> None:
    if not destination.parent.is_dir():
        raise InvalidInput("the folder does not exist", where=str(destination.parent), hint="create it first")
    if not os.path.lexists(destination):
        return
    if destination.is_symlink() or not destination.is_dir() or any(destination.iterdir()):
        raise Conflict(f"{destination} exists", hint="name a folder that does not exist yet")
    if destination.samefile(Path.cwd()):
        # The rename would leave the caller's shell in a folder that has no name any more.
        raise Conflict(f"{destination} is the working directory", hint="name a new folder")


def _move_into_place(staging: Path, destination: Path) -> None:
    try:
        if os.name == "nt" and destination.is_dir():
            destination.rmdir()
        staging.rename(destination)
    except OSError as error:
        if error.errno in _SPACE_ERRORS:
            raise
        raise Conflict(f"{destination} cannot be replaced: {error.strerror}", hint="name a new folder") from error


def _remove_tree(folder: Path) -> None:
    """Remove a folder whose subfolders may have been made read-only."""
    for parent, folders, _ in os.walk(folder):
        for path in (Path(parent, name) for name in folders):
            if not path.is_symlink():
                path.chmod(0o700)
    shutil.rmtree(folder, ignore_errors=True)


class _Unpacker:
    """Places members into an empty folder that nobody else writes to. Names are relative, with "/"."""

    def __init__(self, root: Path, limits: UnpackLimits, progress: Callable[[int], None] | None) -> None:
        self._root = root
        self._limits = limits
        self._progress = progress
        self._members = self._made = self._bytes = self._apparent = 0
        self._files: set[str] = set()
        self._folders: dict[str, tuple[int, int] | None] = {"": None}
        """Mode and time of each folder, None if the archive does not say."""
        self._links: dict[str, str] = {}
        self._dropped: list[tuple[str, str]] = []
        self._refused: list[tuple[str, str]] = []
        self._left_out = 0

    def run(self, stream: _Stream) -> UnpackReport:
        for member in _members(stream):
            self._members += 1
            if self._members > self._limits.files:
                raise BadArchive(f"the archive has more than {self._limits.files} members")
            self._place(member, stream)
        stream.finish()
        self._make_links()
        self._finish_folders()
        return UnpackReport(
            files=self._made,
            bytes=self._bytes,
            dropped=tuple(self._dropped),
            refused_links=tuple(self._refused),
            left_out=self._left_out,
        )

    def _place(self, member: _Member, stream: _Stream) -> None:
        name = self._checked_name(member.name)
        if name is None:
            return
        if member.kind in _SPECIAL:
            self._drop(name, f"is a {_SPECIAL[member.kind]}")
            return
        try:
            self._make(name, member, stream)
        except OSError as error:
            if error.errno in _NAME_ERRORS:
                self._drop(name, "this system cannot hold the name")
            elif error.errno == errno.EFBIG:
                self._drop(name, "is larger than this file system allows")
            else:
                raise

    def _make(self, name: str, member: _Member, stream: _Stream) -> None:
        if member.kind == _FOLDER:
            self._make_folder(name, member)
            return
        if member.kind not in (_SYMLINK, _HARD_LINK) and member.kind not in _FILE_TYPES:
            raise BadArchive(f"member {printable(name)} is of type {printable(member.kind)}, which is not known")
        if _fold(name) in self._files or _fold(name) in self._folders:
            self._drop(name, "appears twice")
            return
        self._ensure_folder(name.rpartition("/")[0])
        if member.kind == _SYMLINK:
            self._remember_link(name, member)
        elif member.kind == _HARD_LINK:
            self._make_hard_link(name, member)
        else:
            self._make_file(name, member, stream)

    def _checked_name(self, raw: bytes) -> str | None:
        """Return a clean relative name; None for the root itself or a name dropped. Raise BadArchive for one that leaves."""
        shown = printable(raw[:200])
        if raw.startswith(b"/") or b"\0" in raw:
            raise BadArchive(f"member {shown} has an absolute or impossible name")
        parts = [part for part in raw.split(b"/") if part not in (b"", b".")]
        if b".." in parts:
            raise BadArchive(f"member {shown} would leave the folder")
        if len(parts) > self._limits.depth or len(raw) > self._limits.name_bytes:
            raise BadArchive(f"member {shown} is nested too deeply or has too long a name")
        if not parts:
            return None
        name = _decode_name(b"/".join(parts))
        if name is None or (os.name == "nt" and not all(map(_windows_holds, name.split("/")))):
            self._drop(shown, "this system cannot hold the name")
            return None
        return name

    def _make_folder(self, name: str, member: _Member) -> None:
        if _fold(name) in self._files:
            self._drop(name, "appears twice")
            return
        self._ensure_folder(name)
        if self._folders[_fold(name)] is None:
            self._folders[_fold(name)] = (member.mode & 0o777, member.mtime)

    def _ensure_folder(self, name: str) -> None:
        if _fold(name) in self._folders:
            return
        if _fold(name) in self._files:
            raise BadArchive(f"{printable(name)} is a file and a folder")
        self._ensure_folder(name.rpartition("/")[0])
        (self._root / name).mkdir()
        self._folders[_fold(name)] = None
        self._made += 1

    def _make_file(self, name: str, member: _Member, stream: _Stream) -> None:
        self._apparent += member.real_size
        self._count(sum(length for _, length in member.extents))
        if self._apparent > self._limits.apparent_bytes:
            raise BadArchive(f"the archive's files have more than {self._limits.apparent_bytes} bytes with their holes")
        path = self._root / name
        try:
            with open(os.open(path, _NEW_FILE, 0o600), "wb", buffering=0) as file:
                for offset, length in member.extents:
                    file.seek(offset)
                    self._copy(stream, file, length)
                file.truncate(member.real_size)
        except OSError:
            path.unlink(missing_ok=True)
            raise
        path.chmod(member.mode & 0o777)
        _set_time(path, member.mtime)
        self._files.add(_fold(name))
        self._made += 1

    def _copy(self, stream: _Stream, file: BinaryIO, length: int) -> None:
        while length:
            data = stream.take(length)
            write_all(file, data)
            length -= len(data)
            if self._progress is not None:
                self._progress(self._bytes - length)

    def _count(self, size: int) -> None:
        self._bytes += size
        if self._bytes > self._limits.bytes:
            raise BadArchive(f"the archive has more than {self._limits.bytes} bytes")

    def _make_hard_link(self, name: str, member: _Member) -> None:
        first = self._checked_name(member.link)
        if first is None or _fold(first) not in self._files:
            self._drop(name, "is a hard link to something that is not a file of this archive")
            return
        path, source = self._root / name, self._root / first
        try:
            path.hardlink_to(source)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                raise
            # FAT has no hard links, ext4 allows 65,000 of one file.
            self._count(source.stat().st_size)
            shutil.copyfile(source, path)
            shutil.copystat(source, path)
        self._files.add(_fold(name))
        self._made += 1

    def _remember_link(self, name: str, member: _Member) -> None:
        target = _decode_name(member.link)
        if not target or "\0" in target or len(member.link) > self._limits.name_bytes:
            self._drop(name, "is a link to an impossible name")
        elif name in self._links:
            self._drop(name, "appears twice")
        else:
            self._links[name] = target

    def _make_links(self) -> None:
        for name in [name for name in self._links if _fold(name) in self._files or _fold(name) in self._folders]:
            self._drop(name, "appears twice")
            del self._links[name]
        leaving = links_that_leave(self._links)
        for name, target in self._links.items():
            if name in leaving:
                self._refuse_link(name, target)
            else:
                self._make_link(name, target)

    def _make_link(self, name: str, target: str) -> None:
        try:
            (self._root / name).symlink_to(target)
            self._made += 1
        except FileExistsError:
            self._drop(name, "appears twice")
        except OSError as error:
            if error.errno in _SPACE_ERRORS:
                raise
            # Windows lets ordinary users make links in developer mode only; macOS refuses some names.
            self._drop(name, f"the link cannot be made here: {error.strerror}")

    def _finish_folders(self) -> None:
        # Deepest first: a folder that loses its x bit hides those below it.
        for name, said in sorted(self._folders.items(), key=lambda item: item[0].count("/"), reverse=True):
            if said is not None:
                mode, mtime = said
                _set_time(self._root / name, mtime)
                (self._root / name).chmod(mode)

    def _drop(self, name: str, reason: str) -> None:
        self._left_out += 1
        if len(self._dropped) < MAX_REPORTED:
            self._dropped.append((printable(name), reason))

    def _refuse_link(self, name: str, target: str) -> None:
        self._left_out += 1
        if len(self._refused) < MAX_REPORTED:
            self._refused.append((printable(name), printable(target)))


def _decode_name(raw: bytes) -> str | None:
    """Return a name as this system's calls take it; None if it cannot hold it."""
    if os.name == "posix":
        return os.fsdecode(raw)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return None


def _windows_holds(part: str) -> bool:
    """Tell whether Windows can hold a component: `a:b` would be a stream of `a`, and NUL.txt the null device."""
    if part != part.rstrip(". ") or any(c in '<>:"|?*\\' or c < " " for c in part):
        return False
    return part.split(".")[0].rstrip(" ").upper() not in _WINDOWS_DEVICES


def _set_time(path: Path, mtime: int) -> None:
    """Set a modification time; one that the file system cannot hold is left out, being of no harm."""
    with contextlib.suppress(OverflowError, ValueError, OSError):
        os.utime(path, (mtime, mtime))
