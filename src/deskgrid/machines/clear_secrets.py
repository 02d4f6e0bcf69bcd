"""Secrets of jobs in clear on a volunteer's PC: where they may be, and how they go.

1. The folder of a machine is marked before the first byte of a secret is written into it.
2. Whoever removes such a folder calls `wipe_secrets` first: with the mark the places below are written over, whatever was cut short before.
3. A folder without the mark is not touched: what a user's own files are called says nothing, and they may be linked from elsewhere.
4. Until the machine has them, secrets are in SECRETS_FOLDER of the attempt's folder, where nothing is named by users (worker/secrets.py).
"""

from __future__ import annotations

from pathlib import Path

from deskgrid.machines.folders import wipe

__all__ = ["CONTEXT_DISK", "CONTEXT_FOLDER", "SECRETS_FOLDER", "mark_secrets", "wipe_secrets"]

SECRETS_FOLDER = "secrets"
"""In what the machine sees as /context."""
CONTEXT_DISK = "context.iso"
CONTEXT_FOLDER = "context"
"""The same of a machine without disks."""
_MARK = "holds-secrets"
_PLACES = (CONTEXT_DISK, f"{CONTEXT_FOLDER}/{SECRETS_FOLDER}")


def mark_secrets(workdir: Path) -> None:
    """Note that secrets will be written into a machine's folder. Raise OSError."""
    (workdir / _MARK).touch(mode=0o600)


def wipe_secrets(workdir: Path) -> None:
    """Write over and remove what a machine's folder may have of secrets, if it is marked. Idempotent; two at once do no harm. Blocks.

    Raise OSError.
    """
    if (workdir / _MARK).exists():
        wipe(*(workdir / place for place in _PLACES))
        (workdir / _MARK).unlink(missing_ok=True)
