"""Grants: the server's signed, short-lived permission for one peer to reach one service.

A grant is signed by the server's grant key (core/signed.py). It names both peers by name and by the sha256 of their public keys, so it is of no use to anybody else, at no
other peer and for no other service. It is checked by the hub and again by the called peer, which sees the caller's certificate.
"""

from __future__ import annotations

import hashlib

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Struct

from deskgrid.core.signed import sign, verify
from deskgrid.errors import Forbidden
from deskgrid.model.ids import Sha256

__all__ = ["Grant", "key_hash", "sign_grant", "verify_grant"]

_MAX_GRANT_BYTES = 4096


class Grant(Struct, frozen=True, kw_only=True):
    """`source` may reach `service` of `target`."""

    source: str
    """Name in the caller's certificate."""
    source_key: Sha256
    """Of the caller's public key (SubjectPublicKeyInfo, DER)."""
    target: str
    target_key: Sha256
    service: str
    """Name of the service at its peer, such as `web`."""
    expires_at: float
    """Seconds since 1970 by the server's clock."""
    nonce: str


def key_hash(public_key_der: bytes) -> Sha256:
    """Return what names a key: the sha256 of its SubjectPublicKeyInfo (DER)."""
    return Sha256(hashlib.sha256(public_key_der).hexdigest())


def sign_grant(grant: Grant, key: Ed25519PrivateKey) -> str:
    """Return a grant as it travels."""
    return sign(grant, key)


def verify_grant(text: str, key: Ed25519PublicKey, *, now: float) -> Grant:
    """Return what a grant says. `now` is in the server's time. Raise Forbidden if it is damaged, not the server's, or expired."""
    grant = verify(text, key, Grant, what="grant", most_bytes=_MAX_GRANT_BYTES)
    if grant.expires_at <= now:
        raise Forbidden("this grant has expired")
    return grant
