"""Signed statements as they travel: `BODY.SIGNATURE`, base64url without padding, of JSON and its Ed25519 signature (RFC 8032)."""

from __future__ import annotations

import base64
import binascii
from typing import TypeVar

import msgspec
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from deskgrid.errors import Forbidden

__all__ = ["base64url", "read_base64url", "sign", "verify"]

Statement = TypeVar("Statement")


def sign(statement: msgspec.Struct, key: Ed25519PrivateKey) -> str:
    """Return a statement as it travels."""
    body = msgspec.json.encode(statement)
    return f"{base64url(body)}.{base64url(key.sign(body))}"


def verify(text: str, key: Ed25519PublicKey, kind: type[Statement], *, what: str, most_bytes: int) -> Statement:
    """Return what a statement says. `what`: the word for it in messages. Raise Forbidden if it is damaged, or signed by another key."""
    if len(text) > most_bytes:
        raise Forbidden(f"this {what} is too long")
    body_text, _, signature_text = text.partition(".")
    try:
        body, signature = read_base64url(body_text), read_base64url(signature_text)
        key.verify(signature, body)
        return msgspec.json.decode(body, type=kind)
    except (ValueError, binascii.Error, InvalidSignature, msgspec.DecodeError) as error:
        raise Forbidden(f"this {what} is damaged, or signed by somebody else") from error


def base64url(data: bytes) -> str:
    """Return bytes as base64url without padding (RFC 4648)."""
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def read_base64url(text: str) -> bytes:
    """Return the bytes of base64url without padding. Raise ValueError."""
    return base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
