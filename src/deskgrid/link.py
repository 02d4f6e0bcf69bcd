"""Links that people paste: where the grid is, how to know it, and a secret to get in.

    deskgrid://HOST:PORT/join?authority=SHA256&secret=SECRET      for a PC
    deskgrid://HOST:PORT/login?authority=SHA256&secret=SECRET     for a user
    deskgrid://HOST:PORT/hub?authority=SHA256&secret=SECRET       for a hub

A grid with several servers has all their addresses, with commas between. `authority` is the sha256 of the grid's CA certificate (DER, hexadecimal): whoever holds the link can tell the real server
from any other before the secret is sent.
"""

from __future__ import annotations

import hashlib
import secrets
from urllib.parse import parse_qs, urlencode, urlsplit

from msgspec import Struct

from deskgrid.errors import InvalidInput

__all__ = ["Link", "hash_secret", "make_secret", "parse_link"]


class Link(Struct, frozen=True, kw_only=True):
    """A link by which somebody gets in."""

    purpose: str
    """join, login or hub."""
    address: str
    """HOST:PORT, or several with commas between."""
    authority: str
    secret: str

    def __str__(self) -> str:
        query = urlencode({"authority": self.authority, "secret": self.secret})
        return f"deskgrid://{self.address}/{self.purpose}?{query}"


def parse_link(text: str, purpose: str) -> Link:
    """Read a link for `purpose`. Raise InvalidInput if it is damaged or for something else."""
    try:
        parts = urlsplit(text.strip())
    except ValueError as error:  # of brackets that hold no address
        raise InvalidInput("this is not a whole deskgrid link", hint="copy it again, from deskgrid:// to its end") from error
    query = parse_qs(parts.query)
    authority, secret = query.get("authority", [""])[0], query.get("secret", [""])[0]
    found = parts.path.strip("/")
    if parts.scheme != "deskgrid" or not parts.netloc or len(authority) != 64 or not secret:
        raise InvalidInput("this is not a whole deskgrid link", hint="copy it again, from deskgrid:// to its end")
    if found != purpose:
        raise InvalidInput(
            f"this link is for {found!r}, not for {purpose!r}", hint=f"use: deskgrid {_COMMAND.get(found, found)} LINK"
        )
    return Link(purpose=purpose, address=parts.netloc, authority=authority.lower(), secret=secret)


def make_secret() -> str:
    """Return 256 random bits as text, for a link or a token."""
    return secrets.token_urlsafe(32)


def hash_secret(text: str) -> str:
    """Return what a server keeps of a secret or token: its sha256. Of 256 random bits no salt is needed."""
    return hashlib.sha256(text.encode()).hexdigest()


_COMMAND = {"join": "worker join", "login": "login", "hub": "hub join"}
