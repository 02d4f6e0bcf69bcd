"""The folder of a worker, and the rule that one worker at a time uses it.

credentials.json   worker.toml      who we are on which grid; what the owner lends
journal/           attempts/<id>/   what we hold; their files
cache/                              verified disks
probes/                             what drivers try out, and what they found (known.json)
secrets.key                         to which the server seals secrets of jobs
disks.json                          disks that are on this PC already
paused                              there while the owner wants no work done
control.json                        where the running worker listens for commands of this user
lock                                held by the running worker
"""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from msgspec import Struct

from deskgrid import files
from deskgrid.errors import Conflict
from deskgrid.machines.clear_secrets import wipe_secrets
from deskgrid.machines.folders import wipe
from deskgrid.model.ids import AttemptId

__all__ = ["MACHINE", "SECRETS", "Home", "locked", "make_empty", "remove", "remove_attempt"]


class Home(Struct, frozen=True):
    """Where a worker's files are. `folder` is absolute."""

    folder: Path

    @property
    def credentials(self) -> Path:
        return self.folder / "credentials.json"

    @property
    def journal(self) -> Path:
        return self.folder / "journal"

    @property
    def attempts(self) -> Path:
        return self.folder / "attempts"

    @property
    def cache(self) -> Path:
        return self.folder / "cache"

    @property
    def probes(self) -> Path:
        return self.folder / "probes"

    @property
    def disks(self) -> Path:
        return self.folder / "disks.json"

    @property
    def secrets_key(self) -> Path:
        return self.folder / "secrets.key"

    @property
    def paused(self) -> Path:
        return self.folder / "paused"

    @property
    def control(self) -> Path:
        return self.folder / "control.json"

    @property
    def lock(self) -> Path:
        return self.folder / "lock"

    def attempt(self, attempt_id: AttemptId) -> Path:
        """Return the folder of one attempt."""
        return self.attempts / str(attempt_id)

    def told(self, reason: str) -> str:
        """Return words as the server gets them: an owner's paths are nobody else's business, and no text there has a character 0."""
        return reason.replace(str(self.folder), "HOME").replace("\0", "?")

    def create(self) -> None:
        """Make the folders, for nobody's eyes but the owner's."""
        for folder in (self.folder, self.journal, self.attempts, self.cache, self.probes):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)


@contextlib.contextmanager
def locked(home: Home) -> Iterator[None]:
    """Be the only worker of this folder. Raise Conflict if another is."""
    home.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(files.locked(home.lock, wait=False))
        except OSError as error:
            raise Conflict(f"a worker runs in {home.folder} already", hint="deskgrid worker status") from error
        yield


def make_empty(folder: Path) -> None:
    """Make an empty folder, whatever is in its place. Blocks."""
    remove(folder)
    folder.mkdir(parents=True, mode=0o700)


MACHINE, SECRETS = "machine", "secrets"
"""Folders in an attempt's: of its machine, which the driver makes, and of the job's secrets in clear until the machine has them."""


def remove_attempt(folder: Path) -> None:
    """Remove the folder of an attempt whose machine is gone; what is left of secrets in it is written over. Idempotent. Blocks."""
    wipe(folder / SECRETS)
    wipe_secrets(folder / MACHINE)  # of one whose making was cut short
    remove(folder)


def remove(*paths: Path) -> None:
    """Remove files and folders, read-only ones too, never what links point to. Idempotent. Blocks."""
    for path in paths:
        if path.is_dir() and not path.is_symlink():
            # The user's folders may be read-only; they are ours now.
            for parent, folders, _ in os.walk(path):
                for inner in (Path(parent, name) for name in folders):
                    if not inner.is_symlink():
                        inner.chmod(0o700)
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
