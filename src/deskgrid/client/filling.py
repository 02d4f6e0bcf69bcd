"""What is filled in for the jobs of an array, checked before anything is sent: a name that no column has must not reach a thousand PCs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from deskgrid.core.arrays import placeholders
from deskgrid.errors import InvalidInput
from deskgrid.model.jobs import JobSpec

__all__ = ["check_filling"]

_LARGEST_FILLED_BYTES = 1 << 20
"""What workers fill in."""


def check_filling(spec: JobSpec, columns: Sequence[str], context: Path | None, where: Callable[[str], str]) -> None:
    """Check all {NAME} of a job in an array: in command, environment and the files to fill in. A warm program has none.

    `where` tells the place of a key (command, environment.NAME, fill). Raise InvalidInput with that, or with a file's name and line.
    """
    if spec.machine.warm:
        return
    names = frozenset((*columns, "index"))
    for text in spec.command:
        _check(text, names, where("command"))
    for variable, text in spec.environment:
        _check(text, names, where(f"environment.{variable}"))
    for name in spec.fill:
        for number, line in _lines(context, name, where("fill")):
            _check(line, names, f"{context}/{name}:{number}")


def _check(text: str, names: Iterable[str], where: str) -> None:
    try:
        unknown = next((name for name in placeholders(text) if name not in names), None)
    except InvalidInput as error:
        raise InvalidInput(error.message, where=where, hint=error.hint) from error
    if unknown is not None:
        hint = f"one of {', '.join(sorted(names))[:200]}; {{{{ and }}}} for braces"
        raise InvalidInput(f"nothing fills in {{{unknown[:40]}}}", where=where, hint=hint)


def _lines(context: Path | None, name: str, where: str) -> Iterator[tuple[int, str]]:
    """Yield the lines of a file of the context, numbered from 1."""
    if context is None:
        raise InvalidInput("without a context there are no files to fill in", where=where, hint='machine.context = "context/"')
    try:
        file = context / name
        if not file.resolve().is_relative_to(context.resolve()) or not file.is_file():
            raise InvalidInput(f"there is no file {name[:80]!r} in the context", where=where)
        if file.stat().st_size > _LARGEST_FILLED_BYTES:
            raise InvalidInput(f"{name[:80]} is too large to be filled in", where=where, hint="at most 1 MiB")
        # Not splitlines: a brace's pair may not be torn by what only Unicode calls the end of a line.
        yield from enumerate(file.read_text(encoding="utf-8").split("\n"), start=1)
    except UnicodeDecodeError as error:
        raise InvalidInput(f"{name[:80]} is not a text in UTF-8", where=where) from error
    except ValueError as error:  # a NUL in the name
        raise InvalidInput(f"{name[:80]!r} is not the name of a file", where=where) from error
    except OSError as error:
        raise InvalidInput(f"cannot read {name[:80]} of the context: {error.strerror}", where=where) from error
