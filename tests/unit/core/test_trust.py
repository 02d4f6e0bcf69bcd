"""Grants: only the server's, only in time, only whole."""

from __future__ import annotations

import base64

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from deskgrid.core.trust import Grant, key_hash, sign_grant, verify_grant
from deskgrid.errors import Forbidden
from deskgrid.model.ids import Sha256

KEY = Ed25519PrivateKey.from_private_bytes(b"\x01" * 32)
OTHER = Ed25519PrivateKey.from_private_bytes(b"\x02" * 32)
GRANT = Grant(
    source="user-7.deskgrid",
    source_key=Sha256("a" * 64),
    target="attempt-1.job-42.deskgrid",
    target_key=Sha256("b" * 64),
    service="web",
    expires_at=1060.0,
    nonce="n",
)
SIGNED = sign_grant(GRANT, KEY)


def _verify(text: str, now: float = 1000.0) -> Grant:
    return verify_grant(text, KEY.public_key(), now=now)


def test_a_grant_says_what_the_server_signed():
    assert _verify(SIGNED) == GRANT


def test_a_grant_ends_when_it_says():
    assert _verify(SIGNED, now=1059.999) == GRANT
    for now in (1060.0, 2000.0):
        with pytest.raises(Forbidden, match="expired"):
            _verify(SIGNED, now=now)


def test_a_grant_of_another_key_is_refused():
    with pytest.raises(Forbidden):
        _verify(sign_grant(GRANT, OTHER))


def test_a_signed_body_that_is_no_grant_is_refused():
    for body in (b"{}", b"null", b'{"source":1}'):
        text = ".".join(base64.urlsafe_b64encode(part).rstrip(b"=").decode() for part in (body, KEY.sign(body)))
        with pytest.raises(Forbidden):
            _verify(text)


@given(st.fixed_dictionaries({}, optional={name: st.text(max_size=5) for name in ("source", "target", "service", "source_key")}))
def test_a_changed_body_under_the_same_signature_is_refused(changes: dict[str, str]):
    changed = msgspec.structs.replace(GRANT, **changes)
    body = base64.urlsafe_b64encode(msgspec.json.encode(changed)).rstrip(b"=").decode()
    text = f"{body}.{SIGNED.partition('.')[2]}"
    if changed == GRANT:
        assert _verify(text) == GRANT
    else:
        with pytest.raises(Forbidden):
            _verify(text)


@given(st.text(max_size=300) | st.binary(max_size=300).map(lambda data: data.decode("latin-1")))
@settings(max_examples=300)
def test_random_text_is_no_grant(text: str):
    with pytest.raises(Forbidden):
        _verify(text)


@given(st.integers(0, len(SIGNED) - 1), st.characters())
@settings(max_examples=300)
def test_one_changed_character_is_refused_or_means_the_same(place: int, character: str):
    text = SIGNED[:place] + character + SIGNED[place + 1 :]
    try:
        assert _verify(text) == GRANT  # the last character of base64 has bits that mean nothing
    except Forbidden:
        assert text != SIGNED


def test_a_grant_that_is_too_long_is_not_looked_at():
    with pytest.raises(Forbidden, match="long"):
        _verify("x" * 5000)


def test_a_key_is_named_by_its_sha256():
    assert key_hash(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
