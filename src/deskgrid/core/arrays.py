"""What is filled in for the jobs of an array: {index} and the names of its table's columns.

    {index}  {alpha}     the job's number in its array, from 0; a value of its line of the table
    {{  }}               a brace

Anything else in braces is an error: a name that is not known is a mistake, and must not reach a thousand machines.
"""

from __future__ import annotations

import re
from collections.abc import Mapping

from deskgrid.errors import InvalidInput

__all__ = ["fill", "placeholders", "values_of"]

_PIECE = re.compile(r"\{\{|\}\}|\{([^{}]*)\}|[{}]")


def values_of(index: int, parameters: Mapping[str, str]) -> dict[str, str]:
    """Return what is filled in for one job."""
    return {**parameters, "index": str(index)}


def fill(text: str, values: Mapping[str, str]) -> str:
    """Return `text` with its placeholders filled in; what is filled in is not looked at again. Raise InvalidInput naming what is wrong."""

    def one(match: re.Match[str]) -> str:
        piece = match[0]
        if piece in ("{{", "}}"):
            return piece[0]
        name = match[1]
        if name is None:
            raise InvalidInput(f"a single {piece} near {_near(text, match)!r}", hint="write {{ or }} for a brace")
        if name not in values:
            raise InvalidInput(
                f"there is no {{{name[:40]}}} to fill in", hint=f"one of {', '.join(sorted(values))}; {{{{ for a brace"
            )
        return values[name]

    return _PIECE.sub(one, text)


def placeholders(text: str) -> list[str]:
    """Return the names that `text` wants filled in, in order. Raise InvalidInput for a single brace."""
    found: list[str] = []

    class _Any(dict[str, str]):
        def __contains__(self, name: object) -> bool:
            return True

        def __getitem__(self, name: str) -> str:
            found.append(name)
            return ""

    fill(text, _Any())
    return found


def _near(text: str, match: re.Match[str]) -> str:
    return text[max(0, match.start() - 20) : match.end() + 20]
