"""What the authority signs, and what it does not."""

from __future__ import annotations

import datetime
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, rsa
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.sealing import for_user, seal_secrets
from deskgrid.core.trust import key_hash
from deskgrid.errors import InvalidInput
from deskgrid.model.ids import UserId
from deskgrid.server.authority import Authority, make_authority, read_peer_key

NOW = 1_700_000_000.0


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    make_authority(tmp_path, "test", datetime.datetime.fromtimestamp(NOW, datetime.UTC))
    return Authority(tmp_path)


def pem_of(private: object) -> str:
    public = private.public_key()
    return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()


@pytest.mark.parametrize(
    "private",
    [
        ec.generate_private_key(ec.SECP384R1()),
        ec.generate_private_key(ec.SECP256K1()),
        ed25519.Ed25519PrivateKey.generate(),
        rsa.generate_private_key(public_exponent=65537, key_size=1024),
    ],
)
def test_key_of_another_kind_is_refused(private: object):
    with pytest.raises(InvalidInput, match="P-256"):
        read_peer_key(pem_of(private))


def test_private_key_is_refused():
    key = ec.generate_private_key(ec.SECP256R1())
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with pytest.raises(InvalidInput):
        read_peer_key(pem.decode())


def test_key_is_named_by_its_hash_however_it_was_written():
    private = ec.generate_private_key(ec.SECP256R1())
    public = private.public_key()
    compressed = public.public_bytes(serialization.Encoding.X962, serialization.PublicFormat.CompressedPoint)
    again = ec.EllipticCurvePublicKey.from_encoded_point(ec.SECP256R1(), compressed)
    der = public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    assert again == public
    assert read_peer_key(pem_of(private)).hash == read_peer_key(pem_of(private).replace("\n", "\r\n")).hash == key_hash(der)


@given(
    st.text(max_size=300)
    | st.binary(max_size=200).map(lambda data: f"-----BEGIN PUBLIC KEY-----\n{data.hex()}\n-----END PUBLIC KEY-----")
)
def test_no_text_crashes_the_reader_of_keys(text: str):
    with pytest.raises(InvalidInput):
        read_peer_key(text)


@pytest.mark.parametrize(
    "name",
    [
        "server.deskgrid",
        "hub-1.deskgrid",
        "user-1.deskgrid.example.org",
        "*.deskgrid",
        "user-x.deskgrid",
        "",
        "user-1.deskgrid\n",
        "job-1.deskgrid",
    ],
)
def test_peer_is_never_given_another_name(authority: Authority, name: str):
    with pytest.raises(ValueError, match="not a peer's name"):
        authority.sign_peer(name, read_peer_key(pem_of(ec.generate_private_key(ec.SECP256R1()))), now=NOW, lifetime_s=900)


def test_certificate_is_good_from_a_day_ago_until_after_the_registration_and_signs_nothing(authority: Authority):
    key = read_peer_key(pem_of(ec.generate_private_key(ec.SECP256R1())))
    found = x509.load_pem_x509_certificate(authority.sign_peer("user-7.deskgrid", key, now=NOW, lifetime_s=900).encode())
    root = x509.load_pem_x509_certificate(authority.pem)
    found.verify_directly_issued_by(root)
    assert found.not_valid_before_utc.timestamp() == NOW - 86400
    assert NOW + 900 < found.not_valid_after_utc.timestamp() <= NOW + 900 + 7200
    assert not found.extensions.get_extension_for_class(x509.BasicConstraints).value.ca
    assert not found.extensions.get_extension_for_class(x509.KeyUsage).value.key_cert_sign


def test_keys_are_their_owners_only_and_stay(tmp_path: Path, authority: Authority):
    assert {file.stat().st_mode & 0o077 for file in tmp_path.iterdir()} == {0}
    assert Authority(tmp_path).grant_key_pem == authority.grant_key_pem


def test_servers_with_copies_of_one_authority_from_before_secrets_agree_on_the_key(tmp_path: Path):
    make_authority(tmp_path / "one", "test", datetime.datetime.fromtimestamp(NOW, datetime.UTC))
    (tmp_path / "one" / "secrets.key").unlink()
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    assert Authority(tmp_path / "one").secrets_key == Authority(tmp_path / "two").secrets_key


def test_processes_that_start_at_once_agree_on_the_keys(tmp_path: Path):
    make_authority(tmp_path, "test", datetime.datetime.fromtimestamp(NOW, datetime.UTC))
    for name in ("grants.key", "secrets.key"):
        (tmp_path / name).unlink()
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(Authority, [tmp_path] * 8))
    assert len({one.secrets_key for one in found}) == len({one.grant_key_pem for one in found}) == 1
    keys = ["authority.key", "authority.pem", "grants.key", "manifests.key", "manifests.pem", "secrets.key"]
    assert sorted(file.name for file in tmp_path.iterdir()) == keys
    assert (tmp_path / "secrets.key").stat().st_mode & 0o777 == 0o600


def test_secrets_open_for_the_user_who_sealed_them_and_for_nobody_else(authority: Authority):
    sealed = seal_secrets({"token": b"s3cret"}, authority.secrets_key, for_user(UserId(7)))
    assert authority.open_secrets(sealed, UserId(7)) == {"token": b"s3cret"}
    with pytest.raises(InvalidInput):
        authority.open_secrets(sealed, UserId(8))
