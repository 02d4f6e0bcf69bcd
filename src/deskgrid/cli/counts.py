"""Progress that is counted in jobs: a bar on a terminal, a line at its end elsewhere, nothing with --json."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

from deskgrid.cli.output import clean, warn
from deskgrid.units import format_duration

__all__ = ["Count", "counting"]


class Count(Protocol):
    """What is told how far something is."""

    def show(self, done: int, total: int, note: str = "") -> None:
        """Tell how many of `total` are done, and what else is happening."""


@contextmanager
def counting(title: str, json: bool) -> Iterator[Count]:
    """Show a count until the block ends."""
    if json:
        yield _Silent()
    elif sys.stderr.isatty():
        with _bar(title) as bar:
            yield bar
    else:
        with _line(title) as line:
            yield line


class _Silent:
    def show(self, done: int, total: int, note: str = "") -> None: ...


class _Line:
    def __init__(self) -> None:
        self.last = ""

    def show(self, done: int, total: int, note: str = "") -> None:
        self.last = f", {done:,} of {total:,}"


@contextmanager
def _line(title: str) -> Iterator[Count]:
    line, started, outcome = _Line(), time.monotonic(), "stopped"
    try:
        yield line
        outcome = "done"
    finally:
        warn(f"{title}: {outcome}{line.last}, {format_duration(time.monotonic() - started)}")


@contextmanager
def _bar(title: str) -> Iterator[Count]:
    from rich.console import Console
    from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

    progress = Progress(
        SpinnerColumn(finished_text="[green]*"),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=20),
        TextColumn("{task.fields[count]}", markup=False),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}", markup=False, style="dim"),
        console=Console(stderr=True),
    )
    task = progress.add_task(clean(title), total=None, count="", note="")

    class Bar:
        def show(self, done: int, total: int, note: str = "") -> None:
            progress.update(task, completed=done, total=total, count=f"{done:,} of {total:,}", note=clean(note))

    with progress:
        yield Bar()
