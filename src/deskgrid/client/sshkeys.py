"""The key by which a user logs in to the machines of his jobs; made when it is first needed and kept with his login."""

from __future__ import annotations

import os
from pathlib import Path

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

__all__ = ["ensure_ssh_key"]

_COMMENT = "deskgrid"


def ensure_ssh_key(home: Path) -> tuple[Path, str]:
    """Return the file of the private key in `home` and the public key as a line for authorized_keys; made if missing."""
    file = home / "ssh" / "id_ed25519"
    if not file.exists():
        _make_key(file)
    key = serialization.load_ssh_private_key(file.read_bytes(), password=None)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return file, f"{public.decode()} {_COMMENT}"


def _make_key(file: Path) -> None:
    """Write a new key, readable by its owner only, whole or not at all; two programs at once agree on one."""
    file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    content = Ed25519PrivateKey.generate().private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    try:
        with open(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "wb") as output:
            output.write(content)
        if not file.exists():
            temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
