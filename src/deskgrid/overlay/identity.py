"""Who a peer is: a key made here, a certificate of the grid's authority, and the TLS contexts of both.

Peers do not look at the dates of certificates, since clocks of PCs may be wrong; grants carry the time limit (docs/decisions/012).
"""

from __future__ import annotations

import os
import ssl
import tempfile
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from deskgrid.core.trust import key_hash
from deskgrid.errors import Forbidden, NoSpace, ProtocolError
from deskgrid.model.ids import Sha256

__all__ = ["Identity", "listening_context", "who_is"]

_NO_CHECK_TIME = ssl.VerifyFlags(0x200000)  # X509_V_FLAG_NO_CHECK_TIME of OpenSSL


class Identity:
    """A peer's key, name and certificate. The key never leaves this process."""

    def __init__(self, authority_pem: str) -> None:
        self._key = ec.generate_private_key(ec.SECP256R1())
        public = self._key.public_key()
        self.public_pem = public.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
        self.key_hash = key_hash(public.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo))
        self.name = ""
        """In the certificate."""
        self._certificate = ""
        self.client_context = _context(ssl.PROTOCOL_TLS_CLIENT, authority_pem)
        """To call hubs and peers; wants the name that is dialled."""
        self.server_context = _context(ssl.PROTOCOL_TLS_SERVER, authority_pem)
        """To be called; wants a certificate of the same authority."""

    def renew(self, name: str, certificate_pem: str) -> None:
        """Use a certificate for this key from now on. Raise ProtocolError if it is not one, NoSpace if it cannot be loaded just now."""
        if certificate_pem == self._certificate:
            return
        try:
            _load(self._key, certificate_pem, (self.client_context, self.server_context))
        except (ssl.SSLError, ValueError) as error:
            raise ProtocolError(f"the server sent a certificate that does not fit: {error}") from error
        except OSError as error:  # temporary files cannot be made; it must not end who renews
            raise NoSpace(f"a certificate cannot be loaded: {error.strerror or error}") from error
        self.name, self._certificate = name, certificate_pem


def listening_context(authority_pem: str) -> ssl.SSLContext:
    """Return a context for a listener that does not know yet which peer is wanted: its sni_callback chooses."""
    return _context(ssl.PROTOCOL_TLS_SERVER, authority_pem)


def who_is(tls: ssl.SSLSocket | ssl.SSLObject) -> tuple[str, Sha256]:
    """Return name and key of the other end, whose certificate was verified. Raise Forbidden if it is not a peer's."""
    der = tls.getpeercert(binary_form=True)
    if not der:
        raise Forbidden("the other end showed no certificate")
    try:
        certificate = x509.load_der_x509_certificate(der)
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        found = names.get_values_for_type(x509.DNSName)
        public = certificate.public_key().public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    except (ValueError, x509.ExtensionNotFound) as error:
        raise Forbidden("the other end's certificate cannot be read") from error
    if len(found) != 1:
        raise Forbidden("the other end's certificate does not have one name")
    return found[0], key_hash(public)


def _context(protocol: ssl._SSLMethod, authority_pem: str) -> ssl.SSLContext:
    context = ssl.SSLContext(protocol)
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.verify_mode = ssl.CERT_REQUIRED
    context.verify_flags |= _NO_CHECK_TIME
    context.load_verify_locations(cadata=authority_pem)
    if protocol is ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # nobody resumes, and a ticket is a write nobody asked for
    return context


def _load(key: ec.EllipticCurvePrivateKey, certificate_pem: str, contexts: tuple[ssl.SSLContext, ...]) -> None:
    """Put key and certificate into contexts. OpenSSL takes them from files only, so the key in the file is encrypted."""
    password = os.urandom(32).hex().encode()
    encryption = serialization.BestAvailableEncryption(password)
    pem = key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, encryption)
    with tempfile.TemporaryDirectory(prefix="deskgrid-") as folder:
        file = Path(folder) / "identity.pem"
        file.write_bytes(pem + certificate_pem.encode())
        for context in contexts:
            context.load_cert_chain(file, password=password)
