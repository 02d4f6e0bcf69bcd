"""Files with a job's secrets, on the user's PC: read when the job is submitted, and sealed before they leave it."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import msgspec

from deskgrid.core.secret_names import MOST_SECRET_BYTES
from deskgrid.errors import Conflict, InvalidInput
from deskgrid.model import wire
from deskgrid.model.jobs import JobSpec

__all__ = ["check_files", "read_files", "sealed", "with_secrets"]


def check_files(files: Sequence[tuple[str, Path]], context: Path | None, where: str) -> None:
    """Check that files are there and will not travel in clear with the context, whose folder they must not be in. Raise InvalidInput."""
    if files and context is not None and os.path.lexists(context / "secrets"):
        raise InvalidInput(
            f"{context} has 'secrets', which is where the job finds its secrets", where=where, hint="give it another name"
        )
    for name, file in files:
        try:
            good = file.exists() and not file.is_dir()  # a pipe will do: --secret token=<(pass show token)
        except (OSError, ValueError):  # too long a name, or a folder that we may not look into
            good = False
        if not good:
            raise InvalidInput(
                f"there is no file {str(file)[:200]!r} for {name}", where=where, hint="the file with the secret in it"
            )
        if context is not None and file.resolve().is_relative_to(context.resolve()):
            raise InvalidInput(
                f"{str(file)[:200]!r} is in the context, which is not sealed", where=where, hint="keep secrets in another folder"
            )


def read_files(files: Iterable[tuple[str, Path]]) -> dict[str, bytes]:
    """Return what is in files, by name. Blocks. Raise InvalidInput for what cannot be read, or is too long."""
    found = {}
    left = MOST_SECRET_BYTES
    for name, file in files:
        try:
            with file.open("rb") as opened:
                found[name] = opened.read(left + 1)
        except OSError as error:
            raise InvalidInput(f"cannot read the secret {name}: {error.strerror or error}", where=str(file)) from error
        left -= len(found[name])
        if left < 0:
            raise InvalidInput("the secrets are too long", where=str(file), hint=f"at most {MOST_SECRET_BYTES} bytes all together")
    return found


def with_secrets(spec: JobSpec, secrets: Mapping[str, bytes]) -> JobSpec:
    """Return a spec that names its secrets, and trusts the submitter's own PCs if it trusts nobody."""
    return msgspec.structs.replace(spec, secrets=tuple(secrets), trust=spec.trust or ("mine",)) if secrets else spec


def sealed(secrets: Mapping[str, bytes], me: wire.WhoAmI) -> bytes:
    """Return secrets as only the server can read them. Raise InvalidInput, or Conflict if it takes none."""
    from deskgrid.core.sealing import for_user, seal_secrets

    if not me.secrets_key or me.user_id is None:
        raise Conflict("this server takes no secrets", hint="it is older than this program: ask its admin to update it")
    return seal_secrets(secrets, me.secrets_key, for_user(me.user_id))
