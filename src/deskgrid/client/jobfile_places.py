"""Where a key stands in a TOML file: tomllib does not tell."""

from __future__ import annotations

import re

from deskgrid.errors import InvalidInput

__all__ = ["line_of", "split_path", "syntax_error"]

_HEADER = re.compile(r"\s*\[\[?\s*(?P<name>[^\]]*?)\s*\]\]?\s*(?:#.*)?")


def split_path(path: str) -> tuple[str, str]:
    """Return section and name of a key with its section."""
    section, _, name = path.rpartition(".")
    return section, name


def line_of(lines: list[str], section: str, name: str) -> int:
    """Return the line (from 1) of a key: `name =` below [section], or section.name, else the section's, else the first.

    Good for TOML as people write it; a text over several lines that looks like TOML can mislead it.
    """
    now, section_line = "", 0
    for number, line in enumerate(lines, start=1):
        header = _HEADER.fullmatch(line)
        if header:
            now = _bare(header["name"])
            if section and now == f"{section}.{name}":
                return number
            if now == (section or name) and not section_line:
                section_line = number
            continue
        key = _bare(line.partition("=")[0]) if "=" in line else ""
        path = f"{now}.{key}" if now else key
        if key and (path == (f"{section}.{name}" if section else name) or path.startswith(f"{section or name}.{name}.")):
            return number
        if key and (path == section or path.split(".")[0] == (section or name)) and not section_line:
            section_line = number
    if not section_line and "." in section:  # as of [job.NAME.machine], which is not there: where the job begins
        return line_of(lines, *split_path(section))
    return section_line or 1


def _bare(name: str) -> str:
    """Return a key without quotes and spaces around its parts."""
    return ".".join(part.strip().strip("\"'") for part in name.split("."))


def syntax_error(error: ValueError, source_name: str) -> InvalidInput:
    """Return tomllib's error with the line in front, where editors and people look for it."""
    match = re.fullmatch(r"(.*) \(at line (\d+), column (\d+)\)", str(error), re.DOTALL)
    if match:
        return InvalidInput(f"not TOML: {match[1]} (column {match[3]})", where=f"{source_name}:{match[2]}")
    return InvalidInput(f"not TOML: {error}", where=source_name)
