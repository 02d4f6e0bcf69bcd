"""Tables of parameters: what a user has (a CSV file, or rows of a program) as it travels: a JSON list of texts a line.

A CSV file has a job a line, and the names of the columns in the first. It may have millions of lines: one is held at a time.
"""

from __future__ import annotations

import csv
from codecs import BOM_UTF8
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from deskgrid.core.submission import MOST_JOBS, check_array
from deskgrid.errors import InvalidInput

__all__ = ["read_columns", "write_rows", "write_table"]

_LONGEST_LINE_BYTES = 1 << 16
"""As it travels, with the end of the line: what the server takes."""
_MOST_BYTES = 4 * _LONGEST_LINE_BYTES
"""Of one job's line in the file, which quotes may spread over several."""
_TOLD_EVERY = 10_000


class _Source:
    """The lines of a file, as csv wants them, and where it is: never more in memory than one job's line may have."""

    def __init__(self, file: Path, raw: BinaryIO) -> None:
        self._file, self._raw = file, raw
        self._read_bytes = 0
        self.line = 0
        """Number of the line that was read last, from 1."""

    def __iter__(self) -> Iterator[str]:
        while line := self._next():
            yield line

    def _next(self) -> str:
        self.line += 1
        line = self._raw.readline(_MOST_BYTES + 1 - self._read_bytes)
        self._read_bytes += len(line)
        if self._read_bytes > _MOST_BYTES:
            raise InvalidInput(f"longer than {_LONGEST_LINE_BYTES} bytes", hint="is a quote open?")
        # Decoded line by line, so that bytes that are no text are told with their line; spreadsheets put a mark before the first.
        return line.removeprefix(BOM_UTF8 if self.line == 1 else b"").decode()

    def row_ends(self) -> None:
        """Note that csv has made a row of what was read since the last."""
        self._read_bytes = 0

    @property
    def bytes_read(self) -> int:
        return self._raw.tell()

    def placed(self, error: Exception) -> InvalidInput:
        """Return an error as one about this file and line."""
        where = f"{self._file}:{max(self.line, 1)}"
        if isinstance(error, InvalidInput):
            return InvalidInput(error.message.removeprefix(f"{error.where}: "), where=where, hint=error.hint)
        if isinstance(error, UnicodeDecodeError):
            return InvalidInput("this is not a text in UTF-8", where=where)
        return InvalidInput(f"not CSV: {error}", where=where)


def read_columns(table: Path) -> tuple[str, ...]:
    """Return the names of a CSV file's columns, reading no more than its first line. Raise InvalidInput with file and line."""
    with _opened(table) as raw:
        source = _Source(table, raw)
        try:
            return _columns(_reader(source))
        except (csv.Error, UnicodeDecodeError, InvalidInput) as error:
            raise source.placed(error) from error


def write_table(table: Path, output: Path, progress: Callable[[int], None] | None = None) -> tuple[int, tuple[str, ...]]:
    """Write the lines of a CSV file to `output` as they travel; return how many there are, and the names of the columns.

    `progress` gets the bytes read. Raise InvalidInput with file and line.
    """
    with _opened(table) as raw, output.open("wb") as lines:
        source = _Source(table, raw)
        try:
            reader = _reader(source)
            names = _columns(reader)
            count = 0
            for count, row in enumerate(_rows(reader, source), start=1):
                lines.write(_line(row, names, count))
                if progress and count % _TOLD_EVERY == 0:
                    progress(source.bytes_read)
        except (csv.Error, UnicodeDecodeError, InvalidInput) as error:
            raise source.placed(error) from error
    if not count:
        raise InvalidInput("a table has at least one line below the names", where=str(table))
    return count, names


def write_rows(rows: Iterable[Mapping[str, object]], output: Path) -> tuple[int, tuple[str, ...]]:
    """Write a program's rows (names and values; all with the same names) to `output` as they travel, as write_table does."""
    names: tuple[str, ...] = ()
    count = 0
    with output.open("wb") as lines:
        for count, row in enumerate(rows, start=1):
            try:
                if count == 1:
                    names = tuple(row)
                    check_array(1, names, has_table=True)
                if set(row) != set(names):
                    raise InvalidInput(f"the names are {', '.join(row)[:200]}", hint=f"in the first row: {', '.join(names)[:200]}")
                lines.write(_line([str(row[name]) for name in names], names, count))
            except InvalidInput as error:
                message = error.message.removeprefix(f"{error.where}: ")
                raise InvalidInput(message, where=f"table:{count}", hint=error.hint) from error
    if not count:
        raise InvalidInput("a table has at least one row", where="table")
    return count, names


def _opened(table: Path) -> BinaryIO:
    try:
        return table.open("rb")
    except OSError as error:
        raise InvalidInput(f"cannot read the table: {error.strerror}", where=str(table)) from error


def _reader(source: _Source) -> Iterator[list[str]]:
    csv.field_size_limit(_LONGEST_LINE_BYTES)
    return csv.reader(iter(source), strict=True)


def _columns(reader: Iterator[list[str]]) -> tuple[str, ...]:
    names = tuple(name.strip() for name in next(reader, []))
    if not names:
        raise InvalidInput("the first line names the columns", hint="as in alpha,beta")
    check_array(1, names, has_table=True)
    return names


def _rows(reader: Iterator[list[str]], source: _Source) -> Iterator[list[str]]:
    source.row_ends()
    for row in reader:
        source.row_ends()
        if row:  # else an empty line, as at the end
            yield row


def _line(row: Sequence[str], names: Sequence[str], count: int) -> bytes:
    """Return a job's values as they travel. Raise InvalidInput for what the server would refuse."""
    if len(row) != len(names):
        raise InvalidInput(f"{len(row)} values, but {len(names)} columns")
    if any("\0" in value for value in row):
        raise InvalidInput("a value has a NUL")
    if count > MOST_JOBS:
        raise InvalidInput(f"more than {MOST_JOBS} jobs")
    try:
        line = msgspec.json.encode(row) + b"\n"
    except UnicodeEncodeError as error:
        raise InvalidInput("a value is not a text") from error
    if len(line) > _LONGEST_LINE_BYTES:
        raise InvalidInput(f"longer than {_LONGEST_LINE_BYTES} bytes")
    return line
