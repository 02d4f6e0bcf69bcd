"""What a worker holds, on disk: one file per attempt, so that a restarted worker finds every machine again.

    HOME/journal/<attempt_id>.json      an attempt
    HOME/journal/<name>.machine         the machine of a warm program, whose jobs are written down nowhere

Each is replaced whole (written, synced, renamed, folder synced), so a kill or power cut leaves the state before or after.
What does not read as an entry all the same is moved aside as <name>.bad.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path
from typing import Any

import msgspec
import structlog
from msgspec import Struct

from deskgrid.archive import out_of_space
from deskgrid.files import sync_folder, write_durably, write_whole
from deskgrid.machines.driver import Exited, MachineHandle, decode_handle, encode_handle
from deskgrid.model.ids import AttemptId
from deskgrid.model.jobs import AttemptState
from deskgrid.model.workers import Assignment, AttemptReport

__all__ = ["Entry", "Journal", "Phase", "Verdict"]

_log = structlog.get_logger()

_MACHINE = ".machine"


class Phase(StrEnum):
    """How far an attempt has come on this PC."""

    FETCHING = "fetching"
    """Disk and context are fetched, the machine's files are made."""
    PREPARED = "prepared"
    """The handle is journalled; no process yet."""
    STARTED = "started"
    SAVED = "saved"
    """The machine is off, its state on the disk; it goes on from there when the owner lets it."""
    EXITED = "exited"
    """The machine is off; its scratch waits to be read."""
    SETTLED = "settled"
    """How it ended is decided and what comes back is packed; machine and result go now."""
    DONE = "done"
    """There is a final report, until the server acknowledges it."""


class Verdict(Struct, frozen=True):
    """How an attempt ends by our decision, noted before its machine is stopped."""

    state: AttemptState
    """failed (the job's fault) or refused (this PC's)."""
    reason: str
    rests: bool = True
    """Whether a refusal lets the worker take no new work for a while: not if it was only the owner's wish."""


class Entry(Struct, frozen=True, kw_only=True):
    """All that has to survive a restart of the worker about one attempt."""

    assignment: Assignment
    phase: Phase = Phase.FETCHING
    handle: MachineHandle | None = None
    started_at: float | None = None
    """When the machine was started, for people: seconds since 1970."""
    ran_s: float = 0.0
    """Seconds that the machine had run, suspensions left out, when this was written."""
    ran_at: float | None = None
    """When `ran_s` was true, if the machine ran on from there."""
    booted: bool = False
    kept_s: float = 0.0
    """Seconds that the machine had run at its last checkpoint."""
    restores: int = 0
    """Times that it went on from there without a new one since."""
    verdict: Verdict | None = None
    exited: Exited | None = None
    settled: AttemptReport | None = None
    """What will be reported once the machine is removed and the result is with the server."""
    report: AttemptReport | None = None
    """The final report."""


class Journal:
    """The entries in one folder. Blocks. What is written survives the worker however it is killed; `durably`, a power cut, too.

    After a power cut no machine is left, so only two things must not be lost: that one was started, and what a finished one has brought. An entry
    that is older than it should be leads to the same step once more, and one that is damaged, or gone, gives the job back.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def write(self, entries: Iterable[Entry], *, durably: bool = True) -> None:
        """Write entries, each whole or not at all. Raise NoSpace; then earlier ones may be written already."""
        written = False
        with out_of_space("the worker's journal"):
            for entry in entries:
                data = msgspec.json.encode(entry, enc_hook=str)
                write_whole(self._path(entry.assignment.attempt_id), data, synced=durably)
                written = True
            if written and durably:
                sync_folder(self._folder)

    def remove(self, attempt_id: AttemptId) -> None:
        """Forget an attempt. Idempotent. After a power cut it may be there again: its report is then acknowledged once more."""
        self._path(attempt_id).unlink(missing_ok=True)

    def read(self) -> list[Entry]:
        """Return all entries by attempt. What cannot be read is moved aside, so its files belong to no attempt any more."""
        found = []
        for path in self._folder.iterdir():
            if path.suffix == ".new":
                path.unlink()
            elif path.suffix == ".json":
                entry = self._read_one(path)
                if entry is not None:
                    found.append(entry)
        return sorted(found, key=lambda entry: entry.assignment.attempt_id)

    def write_machine(self, name: str, handle: MachineHandle) -> None:
        """Note the machine of a warm program, before it starts. `name` is a file's name. Raise NoSpace."""
        with out_of_space("the worker's journal"):
            write_durably(self._folder / f"{name}{_MACHINE}", encode_handle(handle))

    def remove_machine(self, name: str) -> None:
        """Forget the machine of a warm program. Idempotent."""
        (self._folder / f"{name}{_MACHINE}").unlink(missing_ok=True)
        sync_folder(self._folder)

    def machines(self) -> dict[str, MachineHandle]:
        """Return the machines of warm programs by name: those that a worker before us left. What cannot be read is moved aside."""
        found = {}
        for path in sorted(self._folder.glob(f"*{_MACHINE}")):
            try:
                found[path.stem] = decode_handle(path.read_bytes())
            except (msgspec.MsgspecError, OSError) as error:
                _log.warning("journal_entry_damaged", file=path.name, error=str(error))
                path.replace(path.with_suffix(".bad"))
        return found

    def _read_one(self, path: Path) -> Entry | None:
        try:
            entry = msgspec.json.decode(path.read_bytes(), type=Entry, dec_hook=_decode)
        except (msgspec.DecodeError, UnicodeDecodeError, OSError) as error:
            _log.warning("journal_entry_damaged", file=path.name, error=str(error))
            path.replace(path.with_suffix(".bad"))
            return None
        if path.name == self._path(entry.assignment.attempt_id).name:
            return entry
        path.replace(path.with_suffix(".bad"))
        return None

    def _path(self, attempt_id: AttemptId) -> Path:
        return self._folder / f"{attempt_id}.json"


def _decode(kind: type, value: Any) -> Any:
    return kind(value)
