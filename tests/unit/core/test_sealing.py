"""core/sealing.py: what is sealed opens with its own key and for its own purpose, and no other way."""

from __future__ import annotations

import msgspec
import pytest
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from hypothesis import given, settings
from hypothesis import strategies as st

from deskgrid.core.sealing import (
    MOST_SEALED_BYTES,
    MOST_SECRET_BYTES,
    MOST_SECRETS,
    for_attempt,
    for_user,
    open_sealed,
    open_secrets,
    seal,
    seal_secrets,
    sealing_key,
)
from deskgrid.errors import InvalidInput
from deskgrid.model.ids import AttemptId, UserId

MINE, OTHER = X25519PrivateKey.generate(), X25519PrivateKey.generate()
INFO = for_user(UserId(7))
NAMES = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,99}", fullmatch=True)


@given(st.binary(max_size=300), st.binary(max_size=60))
@settings(max_examples=60, deadline=None)
def test_what_is_sealed_opens_with_its_key_for_its_purpose(plain: bytes, info: bytes) -> None:
    sealed = seal(plain, sealing_key(MINE), info)
    assert open_sealed(sealed, MINE, info) == plain
    assert len(plain) < 4 or plain not in sealed
    assert seal(plain, sealing_key(MINE), info) != sealed


@given(st.binary(max_size=100), st.data())
@settings(max_examples=150, deadline=None)
def test_one_flipped_bit_is_noticed(plain: bytes, data: st.DataObject) -> None:
    sealed = bytearray(seal(plain, sealing_key(MINE), INFO))
    bit = data.draw(st.integers(0, len(sealed) * 8 - 1))
    sealed[bit // 8] ^= 1 << bit % 8
    with pytest.raises(InvalidInput):
        open_sealed(bytes(sealed), MINE, INFO)


@given(st.binary(max_size=200))
@settings(max_examples=60, deadline=None)
def test_any_bytes_open_to_nothing_but_a_clear_error(data: bytes) -> None:
    with pytest.raises(InvalidInput, match="damaged"):
        open_sealed(data, MINE, INFO)


def test_another_key_does_not_open_it() -> None:
    with pytest.raises(InvalidInput, match="another key"):
        open_sealed(seal(b"token", sealing_key(MINE), INFO), OTHER, INFO)


@given(st.integers(1, 1 << 62), st.integers(1, 1 << 62))
@settings(max_examples=40, deadline=None)
def test_bytes_of_one_user_or_attempt_do_not_open_for_another(one: int, other: int) -> None:
    infos = {for_user(UserId(one)), for_user(UserId(other)), for_attempt(AttemptId(one)), for_attempt(AttemptId(other))}
    sealed = seal(b"token", sealing_key(MINE), for_user(UserId(one)))
    for info in infos - {for_user(UserId(one))}:
        with pytest.raises(InvalidInput):
            open_sealed(sealed, MINE, info)


@pytest.mark.parametrize("key", ["", "00" * 31, "00" * 32, "01" + "00" * 31, "AB" * 32, "zz" * 32, "00" * 33])
def test_what_is_no_key_is_refused(key: str) -> None:
    with pytest.raises(InvalidInput):
        seal(b"token", key, INFO)


@given(st.dictionaries(NAMES, st.binary(max_size=100), max_size=8))
@settings(max_examples=60, deadline=None)
def test_secrets_come_back_by_name(secrets: dict[str, bytes]) -> None:
    assert open_secrets(seal_secrets(secrets, sealing_key(MINE), INFO), MINE, INFO) == secrets


def test_the_most_that_may_be_sealed_fits() -> None:
    names = [f"{number:03d}{'n' * 97}" for number in range(MOST_SECRETS)]
    secrets = dict.fromkeys(names, b"s" * (MOST_SECRET_BYTES // MOST_SECRETS))
    sealed = seal_secrets(secrets, sealing_key(MINE), INFO)
    assert len(sealed) <= MOST_SEALED_BYTES
    assert open_secrets(sealed, MINE, INFO) == secrets


@pytest.mark.parametrize("name", ["", ".hidden", "-x", "a/b", "..", "a b", "ä", "n" * 101, "a\n", "a\0"])
def test_a_name_that_is_no_plain_file_name_is_refused_by_both_sides(name: str) -> None:
    with pytest.raises(InvalidInput, match="not a name"):
        seal_secrets({name: b"x"}, sealing_key(MINE), INFO)
    forged = seal(msgspec.msgpack.encode({name: b"x"}), sealing_key(MINE), INFO)
    with pytest.raises(InvalidInput, match="not a name"):
        open_secrets(forged, MINE, INFO)


def test_too_much_is_refused_by_both_sides() -> None:
    large = {"a": b"x" * MOST_SECRET_BYTES, "b": b"y"}
    many = {f"n{number}": b"" for number in range(MOST_SECRETS + 1)}
    for secrets in (large, many):
        with pytest.raises(InvalidInput, match="too many"):
            seal_secrets(secrets, sealing_key(MINE), INFO)
        with pytest.raises(InvalidInput, match="too many"):
            open_secrets(seal(msgspec.msgpack.encode(secrets), sealing_key(MINE), INFO), MINE, INFO)
    with pytest.raises(InvalidInput, match="too many"):
        open_secrets(bytes(MOST_SEALED_BYTES + 1), MINE, INFO)


@given(st.binary(max_size=100))
@settings(max_examples=100, deadline=None)
def test_no_plain_bytes_break_the_reader(plain: bytes) -> None:
    try:
        found = open_secrets(seal(plain, sealing_key(MINE), INFO), MINE, INFO)
    except InvalidInput:
        return
    assert all(isinstance(value, bytes) for value in found.values())
