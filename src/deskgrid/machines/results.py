"""Results: the files of a scratch disk (a raw or qcow2 image), or of a folder that a process wrote, as an archive, taken out by a confined child.

The image is hostile. The worker itself never parses it: it starts a child (sandbox.py, a reader; readers.py) with three descriptors,

    0  the image, read-only
    1  the archive, a new file
    2  one JSON message at the end: an `_Outcome`

and, in the place of 0, with one of the folder (result_folder.py): then it may open what is below that, and nothing else. It
reads the file system (ext4.py), compresses what the job's patterns select (archive.py) and hashes the archive. The
parent believes nothing but the message's types: the length it checks, and the server checks the sha256 again. Compressing in the child
saves the pipe that `tar | zstd` needs: bytes go from the page cache into zstd, which has threads of its own.

Rules:

1. `/.deskgrid` (the agent's report: exit, stdout, stderr) and `/lost+found` are not part of the result.
2. Links are data and never followed. A second name of a file is a hard link in the archive.
3. Device nodes, FIFOs and sockets are dropped, and so are names that no file can have; setuid, setgid and sticky bits too.
4. Damage refuses the whole image if the guest unmounted it. If not, for it was killed, what is damaged is dropped.
   In a folder, what cannot be opened is dropped.
5. Members come sorted by name, parents first, so the same image gives the same archive.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import signal
import stat
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import msgspec
from msgspec import Struct

from deskgrid.archive import MAX_REPORTED, ArchiveWriter, Extent, PackReport, out_of_space, printable, zstd
from deskgrid.errors import BadImage, DeskgridError, InvalidInput, MachineFailed, NoSpace
from deskgrid.files import sync_folder
from deskgrid.machines.ext4 import ROOT_INODE, Ext4, Inode, Run, file_reader
from deskgrid.machines.qcow2 import Qcow2Reader, is_qcow2
from deskgrid.machines.result_folder import MOST_OPEN, REPORT_BYTES, ResultFolder, Unreadable, read_report
from deskgrid.machines.sandbox import (
    Confinement,
    Finished,
    allow_computing_only,
    forbid_files,
    limit_resources,
)

if TYPE_CHECKING:
    from deskgrid.machines.readers import RunReader

__all__ = ["ExtractLimits", "ResultReport", "compile_globs", "extract_results"]

_CHUNK = 1 << 20
_APPARENT_BYTES = 16 << 40
"""Sizes of all files with their holes; unpacking refuses more."""
_MAX_DEPTH = 200
"""Folders are walked recursively."""
_REPORT_FOLDER = b".deskgrid"
_NOT_RESULTS = frozenset({_REPORT_FOLDER, b"lost+found"})
_KINDS = {
    stat.S_IFCHR: "character device",
    stat.S_IFBLK: "block device",
    stat.S_IFIFO: "FIFO",
    stat.S_IFSOCK: "socket",
}
_ERRORS = {kind.__name__: kind for kind in (BadImage, NoSpace, MachineFailed)}


class ExtractLimits(Struct, frozen=True, kw_only=True):
    """Bounds on what taking out one result may cost."""

    bytes: int = 64 << 30
    """Contents, holes not counted. More: BadImage."""
    files: int = 1_000_000
    """Entries of all folders, selected or not. More: BadImage."""
    depth: int = 64
    """Folders in folders, at most 200. More: BadImage."""
    archive_bytes: int = 0
    """Of the archive; 0: no bound. More: NoSpace."""
    wall_s: float = 900.0
    memory_bytes: int = 1 << 30
    """Address space of the child, of which most is only reserved."""
    threads: int = 2
    """Threads that compress."""


_Output = bytes  # inside a struct with a field `bytes`, that name is the field's


class ResultReport(Struct, frozen=True, kw_only=True):
    """What came out of one scratch image. Names are made printable."""

    exit_code: int | None
    """Of context.sh, as the agent wrote it into the image; None if it did not, or nonsense."""
    stdout: _Output
    """The last MiB."""
    stderr: _Output
    """The last MiB."""
    files: int
    """Members of the archive."""
    bytes: int
    """Contents before compression, holes not counted."""
    archive_bytes: int
    archive_sha256: str
    clean: bool
    """Whether the guest unmounted its scratch. If not, files written last may be missing or short."""
    dropped: tuple[tuple[str, str], ...] = ()
    """Name and reason; at most 1000 of them."""
    dropped_count: int = 0
    protections: tuple[str, ...] = ()
    """What confined the child, see sandbox.py."""


class _Request(Struct, frozen=True):
    paths: tuple[str, ...]
    limits: ExtractLimits
    folder: int | None = None
    """Descriptor of the folder; None for an image, which is descriptor 0. (Python does not start with a folder there.)"""


class _Outcome(Struct, frozen=True):
    """The child's only message: a report, or the name and the words of an error."""

    report: ResultReport | None = None
    error: str = ""
    message: str = ""
    hint: str = ""


# --- in the worker ---


async def extract_results(
    image: Path,
    output: Path,
    *,
    paths: tuple[str, ...] = ("**",),
    limits: ExtractLimits = ExtractLimits(),  # noqa: B008 frozen
    run: RunReader | None = None,
) -> ResultReport:
    """Write the files of an ext4 image (raw or qcow2), or of a result folder, that match `paths` (see `compile_globs`) to the archive `output`.

    `run` runs this module's readers; None: each is a new Python. `output` appears complete and on disk, replacing what was there, or not at all; of a folder of which nothing is wanted there is none. The image must not be in use. Raises BadImage (not
    readable, or over a limit), NoSpace, InvalidInput (a pattern) or MachineFailed (the child could not be run). However this
    ends, also by cancellation, no reader, descriptor or other file is left.
    """
    from deskgrid.machines.readers import run_reader  # here, for the child does without asyncio's 60 ms

    compile_globs(paths)
    if not paths and image.is_dir() and not image.is_symlink():
        return await _report_alone(image)
    part = output.with_name(f".{output.name[:100]}.{os.urandom(4).hex()}.part")
    try:
        with _open_image(image) as source, out_of_space(output.name), part.open("xb") as target:
            folder = source if stat.S_ISDIR(os.fstat(source).st_mode) else None
            try:
                finished = await (run or run_reader(__name__))(
                    "serve",
                    msgspec.json.encode(_Request(paths, limits, folder)).decode(),
                    stdin=source if folder is None else None,
                    stdout=target,
                    kept=() if folder is None else (folder,),
                    wall_s=limits.wall_s,
                )
            except TimeoutError as error:
                raise BadImage(f"taking out the results took more than {limits.wall_s:g} s") from error
        report = _judge(finished, part.stat().st_size, limits)
        await _publish(part, output)
        return report
    finally:
        part.unlink(missing_ok=True)


async def _report_alone(folder: Path) -> ResultReport:
    """Return what a result folder says without its files: that is read here, for to start a child takes longer than most such jobs."""
    import asyncio  # here, see extract_results

    told = await asyncio.to_thread(read_report, folder)
    return ResultReport(
        exit_code=_exit_code(told.get("exit", b"")),
        stdout=told.get("stdout", b""),
        stderr=told.get("stderr", b""),
        files=0,
        bytes=0,
        archive_bytes=0,
        archive_sha256="",
        clean=True,
    )


@contextlib.contextmanager
def _open_image(image: Path) -> Iterator[int]:
    """Open a regular file or a folder; a link or FIFO in its place is refused without waiting for it."""
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    try:
        descriptor = os.open(image, flags)
    except OSError as error:
        raise BadImage(f"cannot be opened: {error.strerror}", where=str(image)) from error
    try:
        if stat.S_IFMT(os.fstat(descriptor).st_mode) not in (stat.S_IFREG, stat.S_IFDIR):
            raise BadImage("is not a file", where=str(image))
        yield descriptor
    finally:
        os.close(descriptor)


def _judge(finished: Finished, archive_bytes: int, limits: ExtractLimits) -> ResultReport:
    """Turn the child's end into its report or the error that it stands for."""
    if finished.code == -getattr(signal, "SIGXCPU", 0):
        raise BadImage(f"taking out the results used more than {_cpu_s(limits)} s of CPU time")
    try:
        outcome = msgspec.json.decode(finished.errors, type=_Outcome)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        words = printable(finished.errors[-200:].strip().rpartition(b"\n")[2])
        raise MachineFailed(f"the process that takes out results ended with {finished.code}: {words}") from error
    if outcome.report is None:
        raise _ERRORS.get(outcome.error, BadImage)(outcome.message, hint=outcome.hint)
    if outcome.report.archive_bytes != archive_bytes:
        raise MachineFailed("the process that takes out results lost bytes")
    return outcome.report


async def _publish(part: Path, output: Path) -> None:
    import asyncio  # here, see extract_results

    await asyncio.to_thread(_sync_and_rename, part, output)


def _sync_and_rename(part: Path, output: Path) -> None:
    try:
        with part.open("rb+") as file:
            os.fsync(file.fileno())
    except OSError as error:
        raise NoSpace(f"the result could not be written: {error.strerror}") from error
    part.replace(output)
    sync_folder(output.parent)


def _cpu_s(limits: ExtractLimits) -> int:
    return int(limits.wall_s * (limits.threads + 1)) + 5


def compile_globs(patterns: tuple[str, ...]) -> re.Pattern[str]:
    """Return an expression that fully matches the paths that one of the patterns selects. Raise InvalidInput for a bad one.

    Paths are relative to the scratch, with "/" between components. `*` and `?` match within a component, dots included, `[a-z]` and `[!a-z]` one
    character, `**` as a whole component any number of them. A folder that matches is taken with all it contains.
    """
    expressions = []
    for pattern in patterns:
        parts = [part for part in pattern.split("/") if part not in ("", ".")]
        if ".." in parts or not parts or len(pattern) > 4096:
            raise InvalidInput(f"{pattern!r} is no pattern", where="results.paths", hint='as in "out/*.root" or "**"')
        expressions.append(_glob(parts))
    try:
        return re.compile("|".join(expressions) or "(?!)", re.DOTALL)
    except re.error as error:
        raise InvalidInput(f"a pattern is not valid: {error}", where="results.paths") from error


def _glob(parts: list[str]) -> str:
    expression = ""
    for place, part in enumerate(parts):
        last = place == len(parts) - 1
        if part != "**":
            expression += _component(part) + ("" if last else "/")
        elif last:
            expression += ".+"
        elif parts[place + 1] != "**":  # a row of them means the same as one, and would match slowly
            expression += "(?:.+/)?"
    return expression


def _component(part: str) -> str:
    expression = ""
    at = 0
    while at < len(part):
        character = part[at]
        close = part.find("]", at + 2) if character == "[" else -1
        if close > 0:
            inside = part[at + 1 : close].replace("\\", "\\\\").replace("[", "\\[").replace("^", "\\^")
            expression += f"[^/{inside[1:]}]" if inside[0] == "!" else f"(?!/)[{inside}]"
            at = close
        else:
            expression += {"*": "[^/]*", "?": "[^/]"}.get(character, re.escape(character))
        at += 1
    return expression


# --- in the child ---


def serve() -> None:
    """Take out one result: entry point of the child."""
    request = msgspec.json.decode(sys.argv[1], type=_Request)
    limits = request.limits
    limit_resources(Confinement(memory_bytes=limits.memory_bytes, cpu_s=_cpu_s(limits), file_bytes=limits.archive_bytes))
    held = forbid_files() if request.folder is None else forbid_files(beneath=request.folder, most_open=request.folder + MOST_OPEN)
    with open(1, "wb", buffering=0, closefd=False) as target:
        outcome = _attempt(lambda: _extract(request, target, held))
    with open(2, "wb", closefd=False) as channel:
        channel.write(msgspec.json.encode(outcome))


def _attempt(work: Callable[[], ResultReport]) -> _Outcome:
    """Run it, and turn everything that goes wrong into words for the parent."""
    try:
        return _Outcome(report=work())
    except DeskgridError as error:
        return _Outcome(error=type(error).__name__, message=error.message, hint=error.hint)
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        words = "no space left for the result" if full else f"the result could not be written: {error.strerror}"
        return _Outcome(error="NoSpace" if full else "MachineFailed", message=words)
    except (MemoryError, zstd.ZstdError):  # compressing fails for want of memory only
        return _Outcome(error="BadImage", message="reading the scratch takes more memory than is allowed")
    except Exception as error:
        # Not foreseen, so made by a strange image; its words must not get lost.
        return _Outcome(error="BadImage", message=f"the scratch cannot be read: {type(error).__name__}: {error}")


def _extract(request: _Request, target: BinaryIO, held: tuple[str, ...]) -> ResultReport:
    limits = request.limits
    globs = compile_globs(request.paths)
    with ArchiveWriter(target, threads=limits.threads, max_bytes=limits.archive_bytes) as writer:
        held += allow_computing_only(reading=request.folder is not None)
        system = _image() if request.folder is None else ResultFolder(request.folder)
        extractor = _Extractor(system, writer, globs, limits)
        extractor.run()
        report = extractor.agents_report()
        return extractor.report(writer.close(), report, held)


class _Image(Ext4):
    """A scratch image, as descriptor 0; `packed` if it is a qcow2."""

    def __init__(self, packed: Qcow2Reader | None) -> None:
        self._packed = packed
        if packed is None:
            super().__init__(file_reader(0), os.lseek(0, 0, os.SEEK_END))
        else:
            super().__init__(packed.read_at, packed.size_bytes)

    def root(self) -> Inode:
        """Return the folder that is the result."""
        return self.inode(ROOT_INODE)

    def report(self) -> Iterator[tuple[bytes, int]]:
        """Yield name and number of the files that our agent leaves in `/.deskgrid`."""
        for name, number in self.records(self.inode(ROOT_INODE)):
            if name == _REPORT_FOLDER and stat.S_ISDIR((folder := self.inode(number)).mode):
                yield from self.records(folder)

    def read_into(self, piece: memoryview, source: int) -> int:
        """Read from a place of the disk."""
        if self._packed is None:
            return _read_into(piece, source)
        place, length = self._packed.locate(source, len(piece))
        if place is not None:
            return _read_into(piece[:length], place)
        piece[:length] = bytes(length)
        return length


def _image() -> _Image:
    reader = file_reader(0)
    return _Image(Qcow2Reader(reader) if is_qcow2(reader(0, 4)) else None)


class _Extractor:
    """Walks a file system and writes what is wanted. Names are bytes relative to the root."""

    def __init__(self, system: _Image | ResultFolder, writer: ArchiveWriter, globs: re.Pattern[str], limits: ExtractLimits) -> None:
        self._system = system
        self._writer = writer
        self._globs = globs
        self._limits = limits
        self._buffer = bytearray(_CHUNK)
        self._entries = self._apparent = 0
        self._folders: set[int] = set()
        self._first_names: dict[int, bytes] = {}
        self._parents: list[tuple[bytes, Inode]] = []
        """Folders around the current one, outermost first; those from `_written` on are not in the archive yet."""
        self._written = 0
        self._dropped: list[tuple[str, str]] = []
        self._dropped_count = 0

    def run(self) -> None:
        root = self._system.root()
        self._folders.add(root.number)
        for name, number in self._sorted_records(root, b""):
            if name not in _NOT_RESULTS:
                self._entry(name, number, wanted=False)

    def report(self, packed: PackReport, agents: dict[bytes, bytes], held: tuple[str, ...]) -> ResultReport:
        return ResultReport(
            exit_code=_exit_code(agents.get(b"exit", b"")),
            stdout=agents.get(b"stdout", b""),
            stderr=agents.get(b"stderr", b""),
            files=packed.files,
            bytes=packed.bytes,
            archive_bytes=packed.archive_bytes,
            archive_sha256=packed.archive_sha256,
            clean=self._system.clean,
            dropped=tuple(self._dropped),
            dropped_count=self._dropped_count,
            protections=held,
        )

    def agents_report(self) -> dict[bytes, bytes]:
        """Return the ends of the files of the report; what is not a file there is not read."""
        found: dict[bytes, bytes] = {}
        for key, file in self._system.report():
            if key in (b"exit", b"stdout", b"stderr") and key not in found:
                found[key] = self._tail(self._system.inode(file))
        return found

    def _tail(self, inode: Inode) -> bytes:
        if not stat.S_ISREG(inode.mode):
            return b""
        return self._system.read(inode, max(0, inode.size_bytes - REPORT_BYTES), REPORT_BYTES)

    def _sorted_records(self, folder: Inode, prefix: bytes) -> list[tuple[bytes, int]]:
        """Return a folder's usable entries, sorted; of entries with the same name the first."""
        records: dict[bytes, int] = {}
        with self._damage_of(prefix):
            for name, number in self._system.records(folder):
                self._entries += 1
                if self._entries > self._limits.files:
                    raise _TooMuch(f"the scratch has more than {self._limits.files} files")
                if not name or b"/" in name or b"\0" in name:
                    self._drop(prefix + name, "has a name that no file can have")
                elif name in records:
                    self._drop(prefix + name, "appears twice")
                else:
                    records[name] = number
        return sorted(records.items())

    def _entry(self, name: bytes, number: int, *, wanted: bool) -> None:
        wanted = wanted or self._globs.fullmatch(os.fsdecode(name)) is not None
        with self._damage_of(name):
            inode = self._system.inode(number)
            if stat.S_ISDIR(inode.mode):
                self._folder(name, inode, wanted=wanted)
            elif wanted:
                self._member(name, inode)

    def _folder(self, name: bytes, inode: Inode, *, wanted: bool) -> None:
        if inode.number in self._folders:
            self._drop(name, "is a folder that is somewhere else too")
            return
        if len(self._parents) >= min(self._limits.depth, _MAX_DEPTH) - 1:
            raise _TooMuch(f"folders are nested more than {self._limits.depth} deep at {printable(name[:200])}")
        self._folders.add(inode.number)
        self._parents.append((name, inode))
        if wanted:
            self._write_parents()
        for child, number in self._sorted_records(inode, name + b"/"):
            self._entry(name + b"/" + child, number, wanted=wanted)
        self._parents.pop()
        self._written = min(self._written, len(self._parents))

    def _write_parents(self) -> None:
        for name, inode in self._parents[self._written :]:
            self._writer.add_folder(name, mode=inode.mode, mtime=inode.mtime)
        self._written = len(self._parents)

    def _member(self, name: bytes, inode: Inode) -> None:
        kind = stat.S_IFMT(inode.mode)
        if kind in _KINDS:
            self._drop(name, f"is a {_KINDS[kind]}")
        elif kind == stat.S_IFLNK:
            target = self._system.link_target(inode)
            self._write_parents()
            self._writer.add_symlink(name, target, mtime=inode.mtime)
        elif kind != stat.S_IFREG:
            self._drop(name, "is of no known kind")
        elif inode.number in self._first_names:
            self._write_parents()
            self._writer.add_hard_link(name, self._first_names[inode.number], mode=inode.mode, mtime=inode.mtime)
        else:
            self._file(name, inode)

    def _file(self, name: bytes, inode: Inode) -> None:
        runs = self._system.runs(inode)
        stored = sum(run.length for run in runs)
        self._apparent += inode.size_bytes
        if self._writer.stored_bytes + stored > self._limits.bytes or self._apparent > _APPARENT_BYTES:
            raise _TooMuch(f"the results have more than {self._limits.bytes} bytes")
        self._write_parents()
        if inode.links > 1:
            self._first_names[inode.number] = name
        self._writer.add_file(
            name,
            inode.size_bytes,
            self._contents(runs),
            mode=inode.mode,
            mtime=inode.mtime,
            extents=None if stored == inode.size_bytes else _joined(runs),
        )

    def _contents(self, runs: list[Run]) -> Iterator[memoryview]:
        """Yield a file's bytes, always in the same buffer: fresh ones would cost a page fault for each 4 KiB."""
        view = memoryview(self._buffer)
        for _, source, length in runs:
            while length:
                piece = view[: min(length, _CHUNK)]
                count = self._system.read_into(piece, source)
                if not count:
                    raise BadImage("the image is cut short")
                yield piece[:count]
                source, length = source + count, length - count

    @contextlib.contextmanager
    def _damage_of(self, name: bytes) -> Iterator[None]:
        """Drop what is damaged in an image that was not unmounted."""
        try:
            yield
        except _TooMuch:
            raise
        except BadImage as error:
            if isinstance(error, Unreadable):
                self._drop(name, error.message)
                return
            if self._system.clean:
                raise
            self._drop(name, f"is damaged: {error.message}")

    def _drop(self, name: bytes, reason: str) -> None:
        self._dropped_count += 1
        if len(self._dropped) < MAX_REPORTED:
            self._dropped.append((printable(name[:200]), reason))


class _TooMuch(BadImage):
    """A limit was passed; this is never taken for damage."""


def _read_into(piece: memoryview, source: int) -> int:
    if hasattr(os, "preadv"):
        return os.preadv(0, [piece], source)
    os.lseek(0, source, os.SEEK_SET)
    data = os.read(0, len(piece))
    piece[: len(data)] = data
    return len(data)


def _joined(runs: list[Run]) -> list[Extent]:
    """Return a file's extents, those that touch made one although they are apart in the image."""
    extents: list[Extent] = []
    for run in runs:
        if extents and sum(extents[-1]) == run.offset:
            extents[-1] = (extents[-1][0], extents[-1][1] + run.length)
        else:
            extents.append((run.offset, run.length))
    return extents


def _exit_code(text: bytes) -> int | None:
    """Return the code that the agent wrote, 0 to 255, or None."""
    digits = text.strip()
    return int(digits) if 0 < len(digits) <= 3 and digits.isdigit() and int(digits) <= 255 else None
