"""Tables of parameters: a CSV file with a job a line, as it travels: a JSON list of texts a line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

from deskgrid.core.submission import check_array
from deskgrid.errors import InvalidInput

__all__ = ["write_table"]

_LONGEST_LINE_BYTES = 1 << 16


def write_table(source: Path, output: Path) -> tuple[int, tuple[str, ...]]:
    """Write the lines of a CSV file to `output` as they travel; return how many there are, and the names of the columns.

    Reads a line at a time, so a table may be large. Raise InvalidInput with file and line.
    """
    csv.field_size_limit(_LONGEST_LINE_BYTES)
    count = 0
    with source.open(encoding="utf-8-sig", newline="") as text, output.open("w", encoding="utf-8") as lines:
        reader = csv.reader(text, strict=True)
        try:
            names = tuple(name.strip() for name in next(reader, ()))
            check_array(1, names, has_table=True)
            for row in reader:
                if not row:
                    continue  # an empty line, as at the end
                if len(row) != len(names):
                    raise InvalidInput(f"{len(row)} values, but {len(names)} columns")
                line = json.dumps(row, ensure_ascii=False, separators=(",", ":"))
                if len(line.encode()) > _LONGEST_LINE_BYTES:
                    raise InvalidInput(f"longer than {_LONGEST_LINE_BYTES} bytes")
                lines.write(f"{line}\n")
                count += 1
        except csv.Error as error:
            raise InvalidInput(f"not CSV: {error}", where=f"{source}:{reader.line_num}") from error
        except UnicodeDecodeError as error:
            raise InvalidInput("this is not a text in UTF-8", where=str(source)) from error
        except InvalidInput as error:
            message = error.message.removeprefix(f"{error.where}: ")
            raise InvalidInput(message, where=f"{source}:{max(reader.line_num, 1)}", hint=error.hint) from error
    if not count:
        raise InvalidInput("a table has at least one line below the names", where=str(source))
    return count, names
