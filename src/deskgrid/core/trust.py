"""Grants: the server's signed, short-lived permission for one peer to reach one service.

A grant is `BODY.SIGNATURE`, both base64url without padding: the JSON of a Grant, and its Ed25519 signature (RFC 8032) by the
server's grant key. It names both peers by name and by the sha256 of their public keys, so it is of no use to anybody else, at no
other peer and for no other service. It is checked by the hub and again by the called peer, which sees the caller's certificate.
"""

from __future__ import annotations

import base64
import binascii
import hashlib

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from msgspec import Struct

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
    body = msgspec.json.encode(grant)
    return f"{_text(body)}.{_text(key.sign(body))}"


def verify_grant(text: str, key: Ed25519PublicKey, *, now: float) -> Grant:
    """Return what a grant says. `now` is in the server's time. Raise Forbidden if it is damaged, not the server's, or expired."""
    body_text, _, signature_text = text.partition(".")
    if len(text) > _MAX_GRANT_BYTES:
        raise Forbidden("this grant is too long")
    try:
        body, signature = _bytes(body_text), _bytes(signature_text)
        key.verify(signature, body)
        grant = msgspec.json.decode(body, type=Grant)
    except (ValueError, binascii.Error, InvalidSignature, msgspec.DecodeError) as error:
        raise Forbidden("this grant is not the server's") from error
    if grant.expires_at <= now:
        raise Forbidden("this grant has expired")
    return grant


def _text(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _bytes(text: str) -> bytes:
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
