"""Certificates for tests: an authority and leaves with one DNS name, on EC P-256, and TLS contexts made of them."""

from __future__ import annotations

import datetime
import functools
import ssl
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

__all__ = ["Authority", "Leaf"]

_NO_CHECK_TIME = 0x200000  # X509_V_FLAG_NO_CHECK_TIME


class Leaf:
    """A key and its certificate, in PEM."""

    def __init__(self, authority_pem: bytes, certificate: x509.Certificate, key: ec.EllipticCurvePrivateKey) -> None:
        self.authority_pem = authority_pem
        self.certificate_pem = certificate.public_bytes(serialization.Encoding.PEM)
        self.key_pem = _key_pem(key)
        self.key = key
        self.certificate = certificate
        self.public_key_der = key.public_key().public_bytes(
            serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo
        )

    @functools.cached_property
    def server_context(self) -> ssl.SSLContext:
        """TLS 1.3 as the called peer or hub; the caller must show a certificate of the same authority."""
        context = self._context(ssl.PROTOCOL_TLS_SERVER)
        context.verify_mode = ssl.CERT_REQUIRED
        return context

    @functools.cached_property
    def client_context(self) -> ssl.SSLContext:
        """TLS 1.3 as the caller, with this certificate; the server's name is checked, dates are not."""
        return self._context(ssl.PROTOCOL_TLS_CLIENT)

    def _context(self, protocol: int) -> ssl.SSLContext:
        context = ssl.SSLContext(protocol)
        context.minimum_version = ssl.TLSVersion.TLSv1_3
        context.load_verify_locations(cadata=self.authority_pem.decode())
        context.verify_flags |= _NO_CHECK_TIME
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "leaf.pem")
            path.write_bytes(self.key_pem + self.certificate_pem)
            context.load_cert_chain(path)
        return context


class Authority:
    """Issues leaves."""

    def __init__(self, name: str = "test authority") -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.name = _name(name)
        self.certificate = (
            _builder(self.name, self.name, self.key.public_key())
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        self.pem = self.certificate.public_bytes(serialization.Encoding.PEM)

    def issue(self, dns_name: str, key: ec.EllipticCurvePrivateKey | None = None, *, days: int = 1) -> Leaf:
        """Make a certificate for one DNS name; negative `days`: one that has expired."""
        key = key or ec.generate_private_key(ec.SECP256R1())
        certificate = (
            _builder(_name(dns_name), self.name, key.public_key(), days)
            .add_extension(x509.SubjectAlternativeName([x509.DNSName(dns_name)]), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .sign(self.key, hashes.SHA256())
        )
        return Leaf(self.pem, certificate, key)


def _builder(subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int = 1) -> x509.CertificateBuilder:
    now = datetime.datetime.now(datetime.UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=10))
        .not_valid_after(now + datetime.timedelta(days=days))
    )


def _name(text: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text)])


def _key_pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
