"""The grid's certificate authority: one root made at init, which signs the server's certificate.

Keys are ECDSA on P-256 (which every TLS library and browser takes), made here and readable by the server's user only. The server's certificate carries the name that every
client checks (wire.SERVER_NAME), so a grid may change its address; localhost and the listening host are in it for browsers.
"""

from __future__ import annotations

import datetime
import hashlib
import ipaddress
import os
from collections.abc import Sequence
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from deskgrid.model.wire import SERVER_NAME

__all__ = ["authority_fingerprint", "ensure_certificate", "make_authority"]

_ROOT_DAYS, _SERVER_DAYS, _RENEW_DAYS = 3650, 397, 30
_SKEW = datetime.timedelta(hours=1)


def make_authority(folder: Path, name: str, now: datetime.datetime) -> None:
    """Make the root key and certificate in `folder`, unless they are there. Interrupted, it can be called again."""
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    if (folder / "authority.pem").exists():
        return
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"{name} deskgrid authority")])
    certificate = (
        _builder(subject, subject, key, now, _ROOT_DAYS)
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
    root_key = serialization.load_pem_private_key((folder / "authority.key").read_bytes(), password=None)
    if not isinstance(root_key, ec.EllipticCurvePrivateKey):
        raise TypeError("authority.key is not an EC key")
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, SERVER_NAME)])
    certificate = (
        _builder(subject, root.subject, key, now, _SERVER_DAYS)
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
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePrivateKey, now: datetime.datetime, days: int
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _SKEW)
        .not_valid_after(now + datetime.timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
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


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())


def _write_secret(file: Path, content: bytes) -> None:
    temporary = file.with_name(file.name + ".new")
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with open(descriptor, "wb") as output:
        output.write(content)
        output.flush()
        os.fsync(descriptor)
    temporary.replace(file)
