"""The secrets of jobs on a worker: its key, to which the server seals them, and where they are while a machine is made.

HOME/secrets.key is an X25519 key, made here, for nobody else's eyes. What is journalled is sealed to it; it is opened when a machine is made, and what was
opened is written over as soon as the machine has it, and again what the machine has, when it is removed (machines/clear_secrets.py).
"""

from __future__ import annotations

import os
from functools import cached_property
from pathlib import Path

import structlog
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey

from deskgrid.core.sealing import for_attempt, open_secrets, sealing_key
from deskgrid.errors import InvalidInput
from deskgrid.files import write_durably
from deskgrid.model.workers import Assignment
from deskgrid.worker.home import SECRETS

__all__ = ["SecretsKey", "write_secrets"]


_log = structlog.get_logger()


class SecretsKey:
    """The key of one worker, made when it is first needed."""

    def __init__(self, file: Path) -> None:
        self._file = file

    @cached_property
    def _private(self) -> X25519PrivateKey:
        if not self._file.exists():
            write_durably(self._file, X25519PrivateKey.generate().private_bytes_raw())
        return X25519PrivateKey.from_private_bytes(self._file.read_bytes())

    @cached_property
    def public(self) -> str:
        """What the grid is told; empty if the file cannot be used, which is logged: then no job with secrets comes here."""
        try:
            return sealing_key(self._private)
        except (OSError, ValueError) as error:
            _log.error("no_jobs_with_secrets", file=str(self._file), error=str(error))
            return ""

    def open(self, assignment: Assignment) -> dict[str, bytes]:
        """Return the secrets of an attempt. Raise InvalidInput if they do not open."""
        if not assignment.secrets:
            raise InvalidInput("the server could not open the job's secrets: its key was replaced", hint="submit the job anew")
        return open_secrets(assignment.secrets, self._private, for_attempt(assignment.attempt_id))


def write_secrets(attempt: Path, secrets: dict[str, bytes]) -> Path:
    """Write secrets as files that only we can read, into a folder of an attempt's; return that. Blocks."""
    folder = attempt / SECRETS
    folder.mkdir(mode=0o700)
    for name, content in secrets.items():
        with open(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(content)
    return folder
