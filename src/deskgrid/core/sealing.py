"""Sealed secrets: bytes that only the holder of one key can read, and only as what they were sealed for.

    client   seals a job's secrets to the server's key, for the user            `for_user`
    server   opens them in memory and seals them anew to the key of the worker that holds the lease, for the attempt   `for_attempt`
    worker   opens them when the machine is made

HPKE (RFC 9180), mode base, single shot: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, ChaCha20Poly1305. Its `info` says what the bytes are for, so that
sealed bytes of one user, copied into another's job, do not open, nor those of one attempt in another.

    key       the 32 bytes of an X25519 public key, as 64 hexadecimal digits
    sealed    encapsulated key (32 bytes), ciphertext, tag (16 bytes)
    plain     MessagePack: a map of names to bytes
"""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

from deskgrid.core.secret_names import MOST_SECRET_BYTES, MOST_SECRETS, check_names
from deskgrid.errors import InvalidInput
from deskgrid.model.ids import AttemptId, UserId

__all__ = [
    "MOST_SEALED_BYTES",
    "for_attempt",
    "for_user",
    "is_sealing_key",
    "open_sealed",
    "open_secrets",
    "seal",
    "seal_secrets",
    "sealing_key",
]

MOST_SEALED_BYTES = MOST_SECRET_BYTES + MOST_SECRETS * 110 + 200
"""What these take with their names, sealed."""
_KEY = re.compile(r"[0-9a-f]{64}")
_SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.CHACHA20_POLY1305)


# ---- what they are sealed for


def for_user(user_id: UserId) -> bytes:
    """Return what a user's secrets are sealed for on their way to the server, and there."""
    return b"deskgrid job secrets for user %d" % user_id


def for_attempt(attempt_id: AttemptId) -> bytes:
    """Return what secrets are sealed for on their way to the worker that holds the lease, and there."""
    return b"deskgrid job secrets for attempt %d" % attempt_id


# ---- bytes


def sealing_key(private: X25519PrivateKey) -> str:
    """Return the public key to which others seal."""
    return private.public_key().public_bytes_raw().hex()


def is_sealing_key(text: str) -> bool:
    """Tell whether a text has the form of a public key."""
    return _KEY.fullmatch(text) is not None


def seal(plain: bytes, key: str, info: bytes) -> bytes:
    """Return bytes that only the holder of a public key's private one can read, each time others. Raise InvalidInput for what is no key."""
    if not is_sealing_key(key):
        raise InvalidInput("this is no key to seal to", hint="X25519, 64 hexadecimal digits")
    try:
        return _SUITE.encrypt(plain, X25519PublicKey.from_public_bytes(bytes.fromhex(key)), info)
    except ValueError as error:  # a point of low order: the shared secret would be known to all
        raise InvalidInput("nothing can be sealed to this key") from error


def open_sealed(sealed: bytes, private: X25519PrivateKey, info: bytes) -> bytes:
    """Return what was sealed to a key for this. Raise InvalidInput if it was changed, or sealed to another key or for something else."""
    try:
        return _SUITE.decrypt(sealed, private, info)
    except InvalidTag as error:
        raise InvalidInput("these bytes were damaged, or sealed to another key or for something else") from error


# ---- a job's secrets


def seal_secrets(secrets: Mapping[str, bytes], key: str, info: bytes) -> bytes:
    """Return a job's secrets sealed. Raise InvalidInput for wrong names, for more than MOST_SECRET_BYTES, and for what is no key."""
    check_names(secrets)
    if sum(map(len, secrets.values())) > MOST_SECRET_BYTES:
        raise InvalidInput("these are too many bytes", where="secrets.files", hint=f"at most {MOST_SECRET_BYTES} all together")
    return seal(msgspec.msgpack.encode(dict(secrets)), key, info)


def open_secrets(sealed: bytes, private: X25519PrivateKey, info: bytes) -> dict[str, bytes]:
    """Return a job's secrets by name, checked: whoever sealed them may have written anything. Raise InvalidInput."""
    if len(sealed) > MOST_SEALED_BYTES:
        raise InvalidInput("these are too many bytes", where="secrets", hint=f"at most {MOST_SECRET_BYTES} all together")
    try:
        found = msgspec.msgpack.decode(open_sealed(sealed, private, info), type=dict[str, bytes])
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidInput("these are not the secrets of a job", where="secrets") from error
    check_names(found, "secrets")
    if sum(map(len, found.values())) > MOST_SECRET_BYTES:
        raise InvalidInput("these are too many bytes", where="secrets", hint=f"at most {MOST_SECRET_BYTES} all together")
    return found
