"""Whether the owner of the PC lets us work now: what he said, in a file that outlives the worker, and what his rules say of what is seen."""

from __future__ import annotations

from pathlib import Path

from deskgrid.core.owner import Rules, parse_spans
from deskgrid.errors import InvalidInput
from deskgrid.files import sync_folder, write_durably
from deskgrid.settings import WorkerSettings

__all__ = ["Owner", "rules_of"]

_LEAST_SHARE = 0.05


def rules_of(settings: WorkerSettings) -> Rules:
    """Return the owner's rules. Raise InvalidInput for those that make no sense."""
    if not _LEAST_SHARE <= settings.cpu_share <= 1:
        raise InvalidInput(f"{settings.cpu_share:g} is no share of a CPU", where="cpu_share", hint="0.05 to 1")
    if settings.busy_cpus and not settings.nice:
        raise InvalidInput(
            "with nice = 0 our own use of the CPUs cannot be told from that of others",
            where="busy_cpus",
            hint="set nice to 1 to 19",
        )
    return Rules(
        hours=parse_spans(settings.hours),
        idle_s=settings.idle_s,
        busy_cpus=settings.busy_cpus,
        on_battery=settings.on_battery,
        full_screen=settings.full_screen,
    )


class Owner:
    """The owner's will. What he says by hand is read once and then kept with its file; both changes are durable when they return, and idempotent."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._by_hand = file.exists()
        self.objection = ""
        """Why his rules forbid work now."""

    @property
    def paused(self) -> bool:
        """Whether no machine may run."""
        return self._by_hand or bool(self.objection)

    @property
    def why(self) -> str:
        """Why no machine may run, for people."""
        return "paused by hand" if self._by_hand else self.objection

    def pause(self) -> None:
        """Note that no work may be done. It holds for this process even if the disk is full."""
        self._by_hand = True
        write_durably(self._file, b"deskgrid worker resume removes this file\n")

    def resume(self) -> None:
        """Note that work may be done, as far as the rules go."""
        self._file.unlink(missing_ok=True)
        sync_folder(self._file.parent)
        self._by_hand = False
