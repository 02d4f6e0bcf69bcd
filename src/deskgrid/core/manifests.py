"""Who vouches for disks. Rules:

1. A manifest says what a disk is and who vouches for it (its endorser) until when. Anybody may vouch for himself (`user:NAME`) and for the
   groups that he is in (`group:NAME`), an admin for the grid (`grid`). One that has expired, or was withdrawn, says nothing.
2. A revocation ends it all: a revoked disk is not started any more, whoever vouches for it. It is final; what is mended is another disk.
   An owner's counts for his own disks, an admin's for everybody's (server/store/manifests.py).
3. The owner of a PC may name endorsers (`endorsers` in his worker's settings): then a machine boots a disk of the grid only if one of them
   vouches for it. His own installed disks are not asked about.
4. A grid believes the statements of another whose authority its admin trusts; there an endorser NAME is known as NAME@GRID here.
   What it said later goes before what it said earlier, in whatever order it is carried here.

A statement is signed by the manifest key of its grid (core/signed.py) and carries that key's certificate (X.509, DER) as its third part,
signed by the grid's authority: `BODY.SIGNATURE.CERTIFICATE`. So whoever knows the authority can check it without asking anybody. That
certificate is good as long as the authority is; what a statement is worth ends with the time that it names.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Iterable, Mapping

import msgspec
from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import Encoding
from cryptography.x509.oid import NameOID

from deskgrid.core.signed import base64url, read_base64url, sign, verify
from deskgrid.errors import Forbidden, InvalidInput
from deskgrid.model.ids import Sha256
from deskgrid.model.manifests import Bundle, Manifest, Revocation

__all__ = [
    "GRID",
    "SIGNER",
    "check_endorser",
    "elsewhere",
    "endorsers_of",
    "is_accepted",
    "read_bundle",
    "read_own",
    "read_statement",
    "read_trusted",
    "sign_statement",
]

GRID = "grid"
"""The endorser that an admin speaks for."""
SIGNER = "manifests.deskgrid"
"""The name in the certificate of a manifest key."""
_MOST_BYTES = 16_384
_BAD_CERTIFICATE = (ValueError, TypeError, InvalidSignature, UnsupportedAlgorithm, x509.InvalidVersion)
"""What the library raises for certificates that are damaged, strange, or signed by somebody else."""
_ENDORSER = re.compile(r"(?:grid|(?:group|user):[a-z][a-z0-9_.-]{0,62})(?:@[a-z][a-z0-9_.-]{0,62})?")


def check_endorser(text: str, where: str) -> None:
    """Check that a text names an endorser. Raise InvalidInput."""
    if not _ENDORSER.fullmatch(text):
        hint = "grid, group:NAME or user:NAME, with @GRID of another grid"
        raise InvalidInput(f"{text[:80]!r} cannot vouch for a disk", where=where, hint=hint)


def elsewhere(endorser: str, grid: str) -> str:
    """Return by which name an endorser of another grid is known here. Raise Forbidden for one that is a third grid's."""
    if "@" in endorser or not _ENDORSER.fullmatch(f"{endorser}@{grid}"):
        raise Forbidden(f"{endorser[:80]!r} is not an endorser of {grid}")
    return f"{endorser}@{grid}"


def is_accepted(wanted: Collection[str], endorsers: Collection[str]) -> bool:
    """Tell whether an owner who wants one of `wanted` (none: no matter who) takes a disk that `endorsers` vouch for."""
    return not wanted or any(one in wanted for one in endorsers)


def endorsers_of(statements: Iterable[str], disk: Sha256, authority: x509.Certificate, *, now: float) -> set[str]:
    """Return who vouches for a disk now, by signed statements. What is not of that authority's grid, or of another disk, says nothing."""
    found = set()
    for text in statements:
        try:
            said = read_statement(text, authority)
        except Forbidden:
            continue
        if isinstance(said, Manifest) and said.disk.sha256 == disk and said.expires_at > now:
            found.add(said.endorser)
    return found


def sign_statement(statement: Manifest | Revocation, key: Ed25519PrivateKey, certificate: x509.Certificate) -> str:
    """Return a statement as it travels."""
    return f"{sign(statement, key)}.{base64url(certificate.public_bytes(Encoding.DER))}"


def read_statement(text: str, authority: x509.Certificate) -> Manifest | Revocation:
    """Return what a statement says, also an expired one. Raise Forbidden if it is damaged, or not of that authority's grid."""
    if len(text) > _MOST_BYTES:
        raise Forbidden("this statement is too long")
    signed, _, certificate = text.rpartition(".")
    key = _key_of(certificate, authority)
    return verify(signed, key, Manifest | Revocation, what="statement", most_bytes=_MOST_BYTES)  # type: ignore[arg-type]


def read_own(text: str) -> Manifest | Revocation:
    """Return what a statement says that this grid keeps itself, without asking who signed it."""
    return msgspec.json.decode(read_base64url(text.partition(".")[0]), type=Manifest | Revocation)


def _key_of(text: str, authority: x509.Certificate) -> Ed25519PublicKey:
    """Return the key of a certificate that the authority signed for manifests. Raise Forbidden."""
    try:
        certificate = x509.load_der_x509_certificate(read_base64url(text))
        certificate.verify_directly_issued_by(authority)
        names = [name.value for name in certificate.subject.get_attributes_for_oid(NameOID.COMMON_NAME)]
        key = certificate.public_key()
    except _BAD_CERTIFICATE as error:
        raise Forbidden("the authority did not sign for this statement") from error
    if names != [SIGNER] or not isinstance(key, Ed25519PublicKey):
        raise Forbidden("this certificate is not for manifests")
    return key


# Other grids


def read_trusted(lines: Iterable[str]) -> dict[str, str]:
    """Return grids whose statements are believed, names by their authorities' fingerprints. `lines`: NAME=FINGERPRINT. Raise InvalidInput."""
    found = {}
    for line in lines:
        name, _, fingerprint = line.partition("=")
        if not _TRUSTED.fullmatch(line):
            hint = "NAME=FINGERPRINT, of the other grid's authority, 64 digits: which `deskgrid disk export` shows there"
            raise InvalidInput(f"{line[:100]!r} names no grid", where="trusted_grids", hint=hint)
        found[fingerprint] = name
    return found


_TRUSTED = re.compile(r"[a-z][a-z0-9_.-]{0,62}=[0-9a-f]{64}")
_MOST_STATEMENTS = 100


def read_bundle(bundle: Bundle, trusted: Mapping[str, str], *, now: float) -> tuple[str, list[Manifest | Revocation]]:
    """Return by which name the grid of a bundle is known here, and what it says. What has expired is left out.

    Raise Forbidden if it is not trusted, or one of the statements is not its own.
    """
    try:
        authority = x509.load_pem_x509_certificate(bundle.authority.encode())
    except _BAD_CERTIFICATE as error:
        raise Forbidden("the authority of this bundle is no certificate") from error
    fingerprint = hashlib.sha256(authority.public_bytes(Encoding.DER)).hexdigest()
    name = trusted.get(fingerprint)
    if name is None:
        hint = (
            f"an admin can: trusted_grids in server.toml, {bundle.grid[:40]!r} with the fingerprint {fingerprint}, if that is right"
        )
        raise Forbidden(f"this grid does not trust what {bundle.grid[:40]!r} says", hint=hint)
    if len(bundle.statements) > _MOST_STATEMENTS:
        raise Forbidden(f"more than {_MOST_STATEMENTS} statements of one disk")
    found = (_unless_expired(text, authority, now) for text in bundle.statements)
    return name, [statement for statement in found if statement is not None]


def _unless_expired(text: str, authority: x509.Certificate, now: float) -> Manifest | Revocation | None:
    statement = read_statement(text, authority)
    return None if isinstance(statement, Manifest) and statement.expires_at <= now else statement
