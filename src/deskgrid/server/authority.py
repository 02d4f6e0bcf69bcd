"""The grid's certificate authority: one root made at init, which signs the certificates of the server, of hubs and of peers.

Keys are ECDSA on P-256 (which every TLS library and browser takes), made where they are used and readable by their user only. The server's
certificate carries the name that every client checks (wire.SERVER_NAME), so a grid may change its address; localhost and the listening host
are in it for browsers. A peer or hub brings its public key and gets a certificate with one name (model/overlay.py), which is made here of its
number: no peer can have the name of a hub or of the server.

HOME/authority/grants.key is the Ed25519 key by which grants (core/trust.py) are signed, HOME/authority/manifests.key that for what is said of
disks (core/manifests.py), which the authority certifies (manifests.pem): other grids and workers check it. HOME/authority/secrets.key is the X25519 key
to which users seal the secrets of their jobs (core/sealing.py).
"""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import ipaddress
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deskgrid.core.manifests import SIGNER, sign_statement
from deskgrid.core.sealing import for_user, open_secrets, sealing_key
from deskgrid.core.trust import Grant, key_hash, sign_grant
from deskgrid.errors import InvalidInput
from deskgrid.model.ids import Sha256, UserId
from deskgrid.model.manifests import Manifest, Revocation
from deskgrid.model.overlay import hub_peer
from deskgrid.model.wire import SERVER_NAME

__all__ = ["Authority", "PeerKey", "authority_fingerprint", "ensure_certificate", "ensure_key", "make_authority", "read_peer_key"]

_ROOT_DAYS, _SERVER_DAYS, _RENEW_DAYS = 3650, 397, 30
_SKEW = datetime.timedelta(hours=1)
_PEER_SKEW = datetime.timedelta(days=1)
"""Of peers' and hubs' certificates: their clocks may be that wrong."""
_PEER_SLACK = datetime.timedelta(hours=1)
"""For which a certificate is good after its registration has ended, so that a server that is away does not end the overlay."""
_LONGEST_KEY_PEM = 1000
_PEER_NAME = re.compile(r"(?:attempt-[0-9]+\.job|user|worker)-[0-9]+\.deskgrid")
_BLOB_NAME = re.compile(r"[0-9a-f]{40}\.blob\.deskgrid")


class PeerKey(NamedTuple):
    """A public key that a peer or hub sent, as far as it is one that we certify."""

    key: ec.EllipticCurvePublicKey
    hash: Sha256
    """See core.trust.key_hash."""


def read_peer_key(pem: str) -> PeerKey:
    """Read a peer's public key. Raise InvalidInput for anything but ECDSA on P-256."""
    wanted = "a public key is PEM of ECDSA on P-256"
    if len(pem) > _LONGEST_KEY_PEM or not pem.isascii():
        raise InvalidInput(wanted, where="key")
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise InvalidInput(wanted, where="key") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise InvalidInput(wanted, where="key")
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    return PeerKey(key, key_hash(der))


class Authority:
    """The authority's keys in memory. Raise ValueError or OSError if they cannot be read."""

    def __init__(self, folder: Path) -> None:
        self.pem = (folder / "authority.pem").read_bytes()
        self._root = x509.load_pem_x509_certificate(self.pem)
        self._key = _load_root_key(folder)
        self._grant_key = _ensure_ed25519_key(folder / "grants.key")
        self._manifest_key = _ensure_ed25519_key(folder / "manifests.key")
        self._manifest_certificate = _ensure_manifest_certificate(folder, self._root, self._key, self._manifest_key)
        self._secrets_key = _ensure_secrets_key(folder, self._grant_key)

    @property
    def grant_key_pem(self) -> str:
        """The public key by which grants are checked."""
        public = self._grant_key.public_key()
        return public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()

    def sign_grant(self, grant: Grant) -> str:
        """Return a grant as it travels."""
        return sign_grant(grant, self._grant_key)

    def sign_statement(self, statement: Manifest | Revocation) -> str:
        """Return what this grid says of a disk, as it travels."""
        return sign_statement(statement, self._manifest_key, self._manifest_certificate)

    @property
    def secrets_key(self) -> str:
        """The public key to which users seal the secrets of their jobs (core/sealing.py)."""
        return sealing_key(self._secrets_key)

    def open_secrets(self, sealed: bytes, owner_id: UserId) -> dict[str, bytes]:
        """Return a user's secrets, in memory only. Raise InvalidInput if they were not sealed to this key for him."""
        return open_secrets(sealed, self._secrets_key, for_user(owner_id))

    def sign_peer(self, name: str, key: PeerKey, *, now: float, lifetime_s: float) -> str:
        """Return a certificate (PEM) for a peer. `name` must be of model.overlay's attempt_peer, user_peer or worker_peer."""
        if not _PEER_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a peer's name")
        return self._sign(name, key, now, lifetime_s)

    def sign_sharer(self, name: str, key: PeerKey, *, now: float, lifetime_s: float) -> str:
        """Return a certificate (PEM) for a worker that may share a blob. `name` must be of core.torrents' torrent_name."""
        if not _BLOB_NAME.fullmatch(name):
            raise ValueError(f"{name!r} is not a blob's name")
        return self._sign(name, key, now, lifetime_s)

    def sign_hub(self, hub_id: int, key: PeerKey, *, now: float, lifetime_s: float) -> str:
        """Return a certificate (PEM) for a hub."""
        return self._sign(hub_peer(hub_id), key, now, lifetime_s)

    def _sign(self, name: str, key: PeerKey, now: float, lifetime_s: float) -> str:
        begin = datetime.datetime.fromtimestamp(now, datetime.UTC)
        end = begin + datetime.timedelta(seconds=lifetime_s) + _PEER_SLACK
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        usages = [ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH]
        certificate = (
            _builder(subject, self._root.subject, key.key, begin - _PEER_SKEW, end)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_key_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage(usages), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key()), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        return certificate.public_bytes(serialization.Encoding.PEM).decode()


def make_authority(folder: Path, name: str, now: datetime.datetime) -> None:
    """Make the root key and certificate, and the key for grants, in `folder`, unless they are there. Interrupted, it can be called again."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    _ensure_secrets_key(folder, _ensure_ed25519_key(folder / "grants.key"))
    if (folder / "authority.pem").exists():
        return
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} deskgrid authority")])
    certificate = (
        _builder(subject, subject, key.public_key(), now - _SKEW, now + datetime.timedelta(days=_ROOT_DAYS))
        .add_extension(x509.BasicConstraints(ca=True, path_length=1), critical=True)
        .add_extension(_key_usage(signs_certificates=True), critical=True)
        .sign(key, hashes.SHA256())
    )
    _write_secret(folder / "authority.key", _key_pem(key))
    _write_secret(folder / "authority.pem", certificate.public_bytes(serialization.Encoding.PEM))


def ensure_certificate(folder: Path, hosts: Sequence[str], now: datetime.datetime) -> tuple[Path, Path]:
    """Return certificate chain and key of the server, made or renewed if they are missing, for other hosts, or end within 30 days."""
    chain, key_file = folder / "server.pem", folder / "server.key"
    names = _alternative_names(hosts)
    if chain.exists() and key_file.exists() and _still_good(chain, names, now):
        return chain, key_file
    root = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
    root_key = _load_root_key(folder)
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
    certificate = (
        _builder(subject, root.subject, key.public_key(), now - _SKEW, now + datetime.timedelta(days=_SERVER_DAYS))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(root_key.public_key()), critical=False)
        .sign(root_key, hashes.SHA256())
    )
    _write_secret(key_file, _key_pem(key))
    _write_secret(chain, certificate.public_bytes(serialization.Encoding.PEM))
    return chain, key_file


def authority_fingerprint(folder: Path) -> str:
    """Return the sha256 of the root certificate (DER, hexadecimal), as it stands in links."""
    root = x509.load_pem_x509_certificate((folder / "authority.pem").read_bytes())
    return hashlib.sha256(root.public_bytes(serialization.Encoding.DER)).hexdigest()


def _builder(
    subject: x509.Name,
    issuer: x509.Name,
    key: ec.EllipticCurvePublicKey | Ed25519PublicKey,
    begin: datetime.datetime,
    end: datetime.datetime,
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(begin)
        .not_valid_after(end)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
    )


def _key_usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=True,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )


def _alternative_names(hosts: Sequence[str]) -> x509.SubjectAlternativeName:
    names: list[x509.GeneralName] = []
    for host in dict.fromkeys([SERVER_NAME, "localhost", "127.0.0.1", *hosts]):
        try:
            names.append(x509.IPAddress(ipaddress.ip_address(host)))
        except ValueError:
            names.append(x509.DNSName(host))
    return x509.SubjectAlternativeName(names)


def _still_good(chain: Path, names: x509.SubjectAlternativeName, now: datetime.datetime) -> bool:
    certificate = x509.load_pem_x509_certificate(chain.read_bytes())
    found = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
    return found == names and certificate.not_valid_after_utc > now + datetime.timedelta(days=_RENEW_DAYS)


def _load_root_key(folder: Path) -> ec.EllipticCurvePrivateKey:
    key = serialization.load_pem_private_key((folder / "authority.key").read_bytes(), password=None)
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise TypeError("authority.key is not an EC key")
    return key


def _ensure_ed25519_key(file: Path) -> Ed25519PrivateKey:
    """Return a key, made if it is missing: grids made by earlier versions have not all of them."""
    key = _ensure_private_key(file, Ed25519PrivateKey.generate)
    if not isinstance(key, Ed25519PrivateKey):
        raise TypeError(f"{file.name} is not an Ed25519 key")
    return key


def _ensure_manifest_certificate(
    folder: Path, root: x509.Certificate, root_key: ec.EllipticCurvePrivateKey, key: Ed25519PrivateKey
) -> x509.Certificate:
    """Return the authority's word for the manifest key, made if it is missing or for another key. It is good as long as the authority."""
    file = folder / "manifests.pem"
    if file.exists():
        known = x509.load_pem_x509_certificate(file.read_bytes())
        if known.public_key() == key.public_key():
            return known
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SIGNER)])
    certificate = (
        _builder(subject, root.subject, key.public_key(), root.not_valid_before_utc, root.not_valid_after_utc)
        .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
        .add_extension(_key_usage(signs_certificates=False), critical=True)
        .sign(root_key, hashes.SHA256())
    )
    _write_secret(file, certificate.public_bytes(serialization.Encoding.PEM))
    return certificate


def _ensure_secrets_key(folder: Path, grant_key: Ed25519PrivateKey) -> X25519PrivateKey:
    """Return the key to which secrets are sealed, made if it is missing: of the key for grants, so that servers on several machines, which
    have copies of one authority of a time before this key, make the same.
    """

    def make() -> X25519PrivateKey:
        derivation = HKDF(algorithm=hashes.SHA256(), length=32, salt=None, info=b"deskgrid secrets.key")
        return X25519PrivateKey.from_private_bytes(derivation.derive(grant_key.private_bytes_raw()))

    key = _ensure_private_key(folder / "secrets.key", make)
    if not isinstance(key, X25519PrivateKey):
        raise TypeError("secrets.key is not an X25519 key")
    return key


def _ensure_private_key(file: Path, make: Callable[[], Ed25519PrivateKey | X25519PrivateKey]) -> object:
    if not file.exists():
        _write_first(file, _key_pem(make()))
    return serialization.load_pem_private_key(file.read_bytes(), password=None)


def ensure_key(file: Path) -> bytes:
    """Return the PEM of an EC key of a program inside the server, made if it is missing."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        _write_secret(file, _key_pem(ec.generate_private_key(ec.SECP256R1())))
    return file.read_bytes()


def _key_pem(key: ec.EllipticCurvePrivateKey | Ed25519PrivateKey | X25519PrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _write_first(file: Path, content: bytes) -> None:
    """Write a file that only we can read, unless another process, which may start at the same time, has written one already."""
    temporary = _beside(file)
    try:
        _write_new(temporary, content)
        with contextlib.suppress(FileExistsError):
            file.hardlink_to(temporary)
    finally:
        temporary.unlink(missing_ok=True)


def _write_secret(file: Path, content: bytes) -> None:
    temporary = _beside(file)
    _write_new(temporary, content)
    temporary.replace(file)


def _beside(file: Path) -> Path:
    """Return a name of our own: several processes may start at the same time."""
    return file.with_name(f"{file.name}.{os.urandom(8).hex()}")


def _write_new(temporary: Path, content: bytes) -> None:
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as output:
        output.write(content)
        output.flush()
        os.fsync(descriptor)
