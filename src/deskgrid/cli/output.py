"""What commands print: one JSON document, or tables and lines for people; progress goes to stderr.

Names, messages and output come from other people and from guests: control characters never reach the terminal.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Annotated, Any, Protocol

import msgspec
from cyclopts import Parameter

from deskgrid.units import format_duration, format_size

if TYPE_CHECKING:
    from rich.progress import Progress as RichProgress
    from rich.progress import TaskID

__all__ = [
    "NO_NEGATIVES",
    "Json",
    "Phase",
    "Reporter",
    "age",
    "clean",
    "make_reporter",
    "print_json",
    "print_lines",
    "print_table",
    "warn",
]

Json = Annotated[bool, Parameter(name="--json", show_default=False, help="Print one JSON document.")]
"""The option that every command has which prints."""
NO_NEGATIVES = Parameter(negative=())
"""For every App: flags without a --no- twin, lists without an --empty- one."""


def print_json(document: Any, *, indent: int = 2) -> None:
    """Print one JSON document; structs become objects, bytes Base64. With `indent` 0 on one line."""
    sys.stdout.write(msgspec.json.format(msgspec.json.encode(document), indent=indent).decode() + "\n")
    sys.stdout.flush()


def print_lines(*lines: str) -> None:
    """Print lines for people."""
    sys.stdout.write("".join(clean(line) + "\n" for line in lines))
    sys.stdout.flush()


def warn(message: str) -> None:
    """Tell people something on stderr that is no error."""
    sys.stderr.write(clean(message) + "\n")
    sys.stderr.flush()


def clean(text: str) -> str:
    """Return text with what could steer a terminal (or break a line) made visible."""
    return "".join(c if c.isprintable() else _visible(c) for c in text)


def _visible(character: str) -> str:
    return {"\n": " ", "\t": " ", "\r": " "}.get(character, ascii(character)[1:-1])


def print_table(columns: Sequence[str], rows: Iterable[Sequence[object]], *, empty: str) -> None:
    """Print rows in aligned columns: drawn to the width of a terminal, or whole and plain into a pipe. `empty` stands for no rows."""
    cells = [[clean(str(value)) for value in row] for row in rows]
    if not cells:
        print_lines(empty)
    elif sys.stdout.isatty():
        _draw_table(columns, cells)
    else:
        widths = [max(len(row[index]) for row in [list(columns), *cells]) for index in range(len(columns))]
        for row in [list(columns), *cells]:
            print_lines("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _draw_table(columns: Sequence[str], cells: list[list[str]]) -> None:
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(*columns, box=SIMPLE_HEAD, header_style="bold", pad_edge=False)
    for row in cells:
        table.add_row(*(Text(cell) for cell in row))  # Text: brackets in a name are no markup
    Console().print(table)


def age(since: float | None) -> str:
    """Return how long ago a time (seconds since 1970) was; None stands for never."""
    if since is None:
        return "-"
    return f"{format_duration(max(round(time.time() - since), 10))} ago" if time.time() - since >= 10 else "now"


# ---- progress


class Phase(Protocol):
    """One step that is being waited for."""

    def done(self, amount: int, total_bytes: int | None = None) -> None:
        """Tell how much of the phase's total is behind us, and the total if it was not known when the phase began."""

    def note(self, text: str) -> None:
        """Tell what is happening within the phase."""


class Reporter(Protocol):
    """Shows phases one after the other."""

    def begin(self, title: str, total_bytes: int | None = None) -> Phase:
        """End the phase before, if any, and begin one."""

    def end(self, outcome: str = "done") -> None:
        """End the phase."""

    def say(self, line: str) -> None:
        """Print a line that stays."""


class _Silent:
    """For --json: stdout has one document, stderr errors only."""

    def begin(self, title: str, total_bytes: int | None = None) -> Phase:
        return self

    def end(self, outcome: str = "done") -> None: ...

    def say(self, line: str) -> None: ...

    def done(self, amount: int, total_bytes: int | None = None) -> None: ...

    def note(self, text: str) -> None: ...


class _Lines:
    """For pipes and CI logs: a line at the end of each phase, none in between."""

    def __init__(self) -> None:
        self._title = ""
        self._started = 0.0

    def begin(self, title: str, total_bytes: int | None = None) -> Phase:
        self.end()
        self._title, self._started = title, time.monotonic()
        if total_bytes is not None:
            self._title += f" ({format_size(total_bytes)})"
        return self

    def end(self, outcome: str = "done") -> None:
        if self._title:
            warn(f"{self._title}: {outcome}, {format_duration(time.monotonic() - self._started)}")
        self._title = ""

    def say(self, line: str) -> None:
        warn(line)

    def done(self, amount: int, total_bytes: int | None = None) -> None: ...

    def note(self, text: str) -> None: ...


class _Bars:
    """For terminals: a line per phase that moves, with bytes where they are counted."""

    def __init__(self, progress: RichProgress) -> None:
        self._progress = progress
        self._task: TaskID | None = None
        self._total: int | None = None

    def begin(self, title: str, total_bytes: int | None = None) -> Phase:
        self.end()
        self._total = total_bytes
        self._task = self._progress.add_task(clean(title), total=total_bytes, note="", size=_size_text(0, total_bytes))
        return self

    def end(self, outcome: str = "done") -> None:
        if self._task is not None:
            total = self._total or 1  # a phase without a total has a bar too, full now
            self._progress.update(self._task, total=total, completed=total, note=clean(outcome))
            self._progress.stop_task(self._task)
        self._task = None

    def say(self, line: str) -> None:
        self._progress.console.print(clean(line), markup=False, highlight=False, soft_wrap=True)

    def done(self, amount: int, total_bytes: int | None = None) -> None:
        if self._task is not None:
            self._total = total_bytes or self._total
            self._progress.update(self._task, completed=amount, total=self._total, size=_size_text(amount, self._total))

    def note(self, text: str) -> None:
        if self._task is not None:
            self._progress.update(self._task, note=clean(text))


def _size_text(amount: int, total_bytes: int | None) -> str:
    return "" if total_bytes is None else f"{format_size(amount)} of {format_size(total_bytes)}"


@contextmanager
def make_reporter(json: bool) -> Iterator[Reporter]:
    """Return what shows progress here: bars on a terminal, lines elsewhere, nothing with --json."""
    if json:
        yield _Silent()
    elif sys.stderr.isatty():
        with _rich_progress() as progress:
            reporter = _Bars(progress)
            with _ended(reporter):
                yield reporter
    else:
        lines = _Lines()
        with _ended(lines):
            yield lines


@contextmanager
def _ended(reporter: Reporter) -> Iterator[None]:
    """End the last phase with the block, as done or as stopped."""
    try:
        yield
    except BaseException:
        reporter.end("stopped")
        raise
    reporter.end()


def _rich_progress() -> RichProgress:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, ProgressColumn, SpinnerColumn, Task, TextColumn, TimeElapsedColumn
    from rich.text import Text

    class Note(ProgressColumn):
        def render(self, task: Task) -> Text:
            return Text(str(task.fields["note"]), style="dim", overflow="ellipsis", no_wrap=True)

    return Progress(
        SpinnerColumn(finished_text="[green]*"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[size]}", markup=False),
        TimeElapsedColumn(),
        Note(),
        console=Console(stderr=True),
    )
