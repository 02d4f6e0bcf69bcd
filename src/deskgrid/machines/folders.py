"""How much hostile folders take on the disk, while programs change them; and how to remove them. Of the standard library only what is there in no
time, for process_machine.py.

No link is followed, nothing is opened by more than its own name, and a tree of any depth takes a bounded number of descriptors and no recursion.
"""

from __future__ import annotations

import os
import stat

from deskgrid.machines.process_tree import ignoring

TYPE_CHECKING = False
if TYPE_CHECKING:
    from pathlib import Path

__all__ = ["MOST_DEPTH", "MOST_ENTRIES", "OutOfBounds", "folder_bytes", "remove_tree", "wipe"]

MOST_DEPTH = 200
"""Folders in folders: results do not take more (results.py)."""
MOST_ENTRIES = 1_000_000
_BLOCK_BYTES = 512
"""Of st_blocks (stat(2))."""
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
_NAME = "removed-"


class OutOfBounds(Exception):
    """A tree is deeper or has more entries than is allowed; the message says so."""


def folder_bytes(path: str) -> int:
    """Return the bytes on disk of all that is below a folder; what vanishes or cannot be read counts as nothing.

    Raise OutOfBounds past MOST_DEPTH or MOST_ENTRIES.
    """
    return _Measure().below(path)


class _Measure:
    def __init__(self) -> None:
        self._entries = 0
        self._seen: set[int] = set()
        """Files with several names."""

    def below(self, path: str) -> int:
        total = 0
        todo = [(path, 0)]
        while todo:
            folder, depth = todo.pop()
            if depth > MOST_DEPTH:
                raise OutOfBounds(f"folders are nested more than {MOST_DEPTH} deep")
            with ignoring(OSError), os.scandir(folder) as entries:
                for entry in entries:
                    total += self._entry_bytes(entry)
                    if entry.is_dir(follow_symlinks=False):
                        todo.append((entry.path, depth + 1))
        return total

    def _entry_bytes(self, entry: os.DirEntry[str]) -> int:
        self._entries += 1
        if self._entries > MOST_ENTRIES:
            raise OutOfBounds(f"there are more than {MOST_ENTRIES} files")
        try:
            found = entry.stat(follow_symlinks=False)
        except OSError:
            return 0
        if found.st_nlink > 1 and not stat.S_ISDIR(found.st_mode):
            if found.st_ino in self._seen:
                return 0
            self._seen.add(found.st_ino)
        return found.st_blocks * _BLOCK_BYTES


# ---- removing


def wipe(*paths: Path) -> None:
    """Write zeros over files, and over those in folders, on the disk, and remove them. Idempotent, and two at once do no harm. Raise OSError.

    Folders stay, empty. Worth what the disk makes of it: an SSD, or a file system that copies, may keep the old bytes for a while where nobody finds them by name.
    """
    for path in paths:
        with ignoring(FileNotFoundError):  # somebody else wipes it, too
            if path.is_dir() and not path.is_symlink():
                wipe(*path.iterdir())
            elif path.is_file() and not path.is_symlink():
                _write_over(path)
                path.unlink()


def _write_over(path: Path) -> None:
    with path.open("r+b") as file:
        left = os.fstat(file.fileno()).st_size
        while left > 0:
            left -= file.write(bytes(min(left, 1 << 20)))
        file.flush()
        os.fsync(file.fileno())


def remove_tree(path: str) -> None:
    """Remove a folder and all below it. Nobody else may use it any more. Raise OSError; one that is not there is an error, too.

    Folders are moved up into the top one before they are emptied, so depth costs nothing; those without rights get them back.
    """
    top = _open_folder(path, None)
    try:
        todo = [""]
        count = 0
        while todo:
            name = todo.pop()
            folder = _open_folder(name, top) if name else os.dup(top)
            try:
                for child, is_folder in _entries(folder):
                    if not is_folder:
                        os.unlink(child, dir_fd=folder)
                    elif name or not child.startswith(_NAME):
                        count = _move_up(child, folder, top, count)
                        todo.append(f"{_NAME}{count}")
                    elif child not in todo:
                        todo.append(child)  # left by a removal that was cut short, or so named by a program
            finally:
                os.close(folder)
            if name:
                os.rmdir(name, dir_fd=top)
        os.rmdir(path)  # noqa: PTH106
    finally:
        os.close(top)


def _move_up(child: str, folder: int, top: int, count: int) -> int:
    """Move a folder to the first free name in the top one; return the number of that name."""
    while True:
        count += 1
        try:
            os.mkdir(f"{_NAME}{count}", dir_fd=top)
        except FileExistsError:
            continue
        # A folder that cannot be written cannot be moved, for its own .. changes (rename(2)).
        with ignoring(OSError):
            os.chmod(child, 0o700, dir_fd=folder)
        os.rename(child, f"{_NAME}{count}", src_dir_fd=folder, dst_dir_fd=top)
        return count


def _entries(folder: int) -> list[tuple[str, bool]]:
    """Return names and whether they are folders, before anything is changed: a listing of what changes may skip some."""
    with os.scandir(folder) as entries:
        return [(entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries]


def _open_folder(name: str, parent: int | None) -> int:
    """Open a folder, giving its owner all rights on it first if need be."""
    try:
        folder = os.open(name, _FOLDER, dir_fd=parent)
    except PermissionError:
        os.chmod(name, 0o700, dir_fd=parent)
        return os.open(name, _FOLDER, dir_fd=parent)
    if os.fstat(folder).st_mode & 0o700 != 0o700:
        os.fchmod(folder, 0o700)
    return folder
