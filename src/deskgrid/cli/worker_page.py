"""What `deskgrid worker top` shows: one worker, on one page of a terminal."""

from __future__ import annotations

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from deskgrid.units import format_duration, format_size
from deskgrid.worker.control import StatusAnswer

__all__ = ["page"]


def page(status: StatusAnswer) -> RenderableType:
    """Return what a worker is and does."""
    head = Text.from_markup(_head(status))
    if not status.attempts:
        return Group(head, Text("no jobs"))
    table = Table("job", "name", "state", "ran", "CPUs", "memory", "disk", box=None, pad_edge=False)
    for one in status.attempts:
        table.add_row(
            f"{one.job_id}/{one.number}",
            Text(one.name[:40]),
            f"{one.phase} {format_size(one.fetched_bytes)}" if one.fetched_bytes else one.state or one.phase,
            format_duration(one.ran_s),
            str(one.cpus),
            format_size(one.memory_bytes),
            format_size(one.disk_bytes),
        )
    return Group(head, table)


def _head(status: StatusAnswer) -> str:
    lines = [f"[bold]worker {escape(status.name)}[/] of {escape(status.address)}: {_state(status)}"]
    if status.lent is not None and status.free is not None:
        lent, free = status.lent, status.free
        lines.append(
            f"CPUs {lent.cpus - free.cpus} of {lent.cpus}   memory {format_size(lent.memory_bytes - free.memory_bytes)}"
            f" of {format_size(lent.memory_bytes)}   disk {format_size(status.disk_bytes)} of {format_size(lent.disk_bytes)}"
            f"   cache {format_size(status.cache_bytes)}"
        )
    usable = [driver for driver in status.drivers if driver.usable]
    lines += [f"{driver.driver} {escape(driver.version)} {escape(driver.accelerator)}" for driver in usable]
    return "\n".join(lines)


def _state(status: StatusAnswer) -> str:
    if status.paused:
        return f"[yellow]paused[/] ({escape(status.why_paused)})"
    if not status.running:
        return "[red]not running[/]"
    if not status.connected:
        return f"[red]not connected[/] {escape(status.trouble)}"
    return f"[yellow]takes no work[/] ({escape(status.trouble)})" if status.trouble else "[green]working[/]"
