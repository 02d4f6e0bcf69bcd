"""The members of a tar file by their headers (POSIX ustar and pax, GNU), as hostile input: nothing of what they hold is read, no name is used as one."""

from __future__ import annotations

import re
from collections.abc import Iterator

from msgspec import Struct

from deskgrid.errors import BadImage
from deskgrid.machines.ext4 import ReadAt

__all__ = ["TarMember", "tar_members"]

_BLOCK = 512
_EXTENSIONS = (b"x", b"g", b"L", b"K")
_FILES, _FOLDER = (b"0", b"\0", b"7"), b"5"
_MOST_PAX_BYTES = 1 << 16
_MOST_HEADERS = 100_000
_PAX_SIZE = re.compile(rb"(?:^|\n)\d{1,5} size=(\d{1,18})\n")


class TarMember(Struct, frozen=True):
    """A member of a tar: where in the file its content is."""

    name: str
    """As the header has it: of names beyond 255 bytes the beginning."""
    at: int
    size: int
    is_file: bool
    is_folder: bool


def tar_members(read_at: ReadAt, size: int) -> Iterator[TarMember]:
    """Yield files, folders and whatever else there is, without headers that only extend others. Raise BadImage if the tar is damaged or cut short."""
    at, told = 0, None
    for _ in range(_MOST_HEADERS):
        if at + _BLOCK > size:
            return
        header = read_at(at, _BLOCK)
        if len(header) < _BLOCK or not any(header):
            return
        if header[257:262] != b"ustar":
            raise BadImage("is a damaged tar")
        kind = header[156:157]
        length = _number(header[124:136]) if told is None or kind in _EXTENSIONS else told
        if at + _BLOCK + length > size:
            raise BadImage("is cut short")
        if kind == b"x":
            found = _PAX_SIZE.search(read_at(at + _BLOCK, min(length, _MOST_PAX_BYTES)))
            told = int(found[1]) if found else None
        elif kind not in _EXTENSIONS:
            told = None
            yield TarMember(_name(header), at + _BLOCK, length, kind in _FILES, kind == _FOLDER)
        at += _BLOCK + -(-length // _BLOCK) * _BLOCK
    raise BadImage(f"has more than {_MOST_HEADERS} members")


def _name(header: bytes) -> str:
    prefix = header[345:500].rstrip(b"\0") + b"/" if header[345] and header[263:265] == b"00" else b""
    return (prefix + header[:100].partition(b"\0")[0]).decode(errors="replace")


def _number(field: bytes) -> int:
    """Return a size: octal digits, or binary with the first bit set (GNU)."""
    if field[0] & 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.strip(b" \0")
    if not re.fullmatch(rb"[0-7]*", digits):
        raise BadImage("is a damaged tar")
    return int(digits or b"0", 8)
