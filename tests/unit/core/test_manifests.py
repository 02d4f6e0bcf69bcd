"""Who vouches for disks: statements are believed from their own grid only, whole, and for their time."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import NamedTuple

import msgspec
import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.core.manifests import (
    check_endorser,
    elsewhere,
    endorsers_of,
    is_accepted,
    read_bundle,
    read_own,
    read_statement,
    read_trusted,
    sign_statement,
)
from deskgrid.core.signed import base64url
from deskgrid.errors import Forbidden, InvalidInput
from deskgrid.model.data import Disk
from deskgrid.model.ids import Sha256
from deskgrid.model.machines import DiskFormat
from deskgrid.model.manifests import Bundle, Manifest, Revocation
from deskgrid.server.authority import Authority, authority_fingerprint, ensure_certificate, make_authority

NOW = 1_800_000_000.0
DISK = Disk(sha256=Sha256("a" * 64), size_bytes=10, virtual_bytes=20, format=DiskFormat.QCOW2, os="debian 12")
REVOKED = Revocation(grid="lab", disk_sha256=DISK.sha256, reason="a hole", by="root", at=NOW)


def manifest(endorser: str = "group:hep", *, until: float = NOW + 10, disk: Disk = DISK) -> Manifest:
    return Manifest(grid="lab", name="d@1", disk=disk, endorser=endorser, by="ann", issued_at=NOW, expires_at=until)


class Grid(NamedTuple):
    authority: Authority
    root: x509.Certificate
    fingerprint: str
    folder: Path

    def bundle(self, *statements: Manifest | Revocation) -> Bundle:
        signed = tuple(self.authority.sign_statement(one) for one in statements)
        return Bundle(grid="lab", authority=self.authority.pem.decode(), statements=signed)


def made(folder: Path) -> Grid:
    make_authority(folder, "lab", datetime.datetime.now(datetime.UTC))
    authority = Authority(folder)
    return Grid(authority, x509.load_pem_x509_certificate(authority.pem), authority_fingerprint(folder), folder)


@pytest.fixture(scope="module")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return made(tmp_path_factory.mktemp("lab"))


@pytest.fixture(scope="module")
def other(tmp_path_factory: pytest.TempPathFactory) -> Grid:
    return made(tmp_path_factory.mktemp("other"))


@pytest.mark.parametrize("said", [manifest(), REVOKED])
def test_statement_is_read_as_it_was_said_by_whoever_knows_the_authority(lab: Grid, said: Manifest | Revocation):
    signed = lab.authority.sign_statement(said)
    assert read_statement(signed, lab.root) == said
    assert read_own(signed) == said


def test_keys_of_an_authority_stay_and_a_lost_certificate_is_made_anew(lab: Grid):
    signed = lab.authority.sign_statement(manifest())
    (lab.folder / "manifests.pem").unlink()
    again = Authority(lab.folder)
    assert read_statement(signed, lab.root) == read_statement(again.sign_statement(manifest()), lab.root)
    assert (lab.folder / "manifests.key").stat().st_mode & 0o077 == 0


def test_statement_of_another_grid_says_nothing_here(lab: Grid, other: Grid):
    signed = other.authority.sign_statement(manifest())
    with pytest.raises(Forbidden, match="authority did not sign"):
        read_statement(signed, lab.root)
    assert endorsers_of([signed], DISK.sha256, lab.root, now=NOW) == set()


def test_certificate_of_something_else_signs_no_statements(lab: Grid):
    chain, key = ensure_certificate(lab.folder, [], datetime.datetime.now(datetime.UTC))
    server = x509.load_pem_x509_certificate(chain.read_bytes())
    body = lab.authority.sign_statement(manifest()).rpartition(".")[0]
    assert key.exists()
    with pytest.raises(Forbidden, match="not for manifests"):
        read_statement(f"{body}.{base64url(server.public_bytes(Encoding.DER))}", lab.root)


@given(st.data())
def test_changed_statement_is_refused_and_nothing_else_is_raised(lab: Grid, data: st.DataObject):
    signed = lab.authority.sign_statement(manifest())
    place = data.draw(st.integers(0, len(signed) - 1))
    letter = data.draw(st.characters())
    changed = signed[:place] + letter + signed[place + 1 :]
    try:
        assert read_statement(changed, lab.root) == manifest()  # base64 has bits to spare, and the certificate is not in the body
    except Forbidden:
        assert changed != signed
    assert endorsers_of([changed], DISK.sha256, lab.root, now=NOW) <= {"group:hep"}


@given(st.text(max_size=200))
def test_any_text_is_a_statement_or_refused(lab: Grid, text: str):
    with pytest.raises(Forbidden):
        read_statement(text, lab.root)


def test_too_long_a_statement_is_not_even_looked_at(lab: Grid):
    with pytest.raises(Forbidden, match="too long"):
        read_statement("x" * 20_000, lab.root)


def test_only_manifests_of_that_disk_count_and_only_for_their_time(lab: Grid):
    of_another = msgspec.structs.replace(DISK, sha256=Sha256("b" * 64))
    said = (manifest(), manifest("grid", until=NOW), manifest("user:eve", disk=of_another), REVOKED)
    signed = [lab.authority.sign_statement(one) for one in said]
    assert endorsers_of(signed, DISK.sha256, lab.root, now=NOW) == {"group:hep"}
    assert endorsers_of(signed, DISK.sha256, lab.root, now=NOW - 1) == {"group:hep", "grid"}
    assert endorsers_of(signed, DISK.sha256, lab.root, now=NOW + 10) == set()


@given(st.sets(st.sampled_from(["grid", "group:hep", "user:ann"])), st.sets(st.sampled_from(["grid", "group:hep", "user:bob"])))
def test_disk_is_accepted_if_one_of_those_wanted_vouches_or_nobody_is_wanted(wanted: set[str], endorsers: set[str]):
    assert is_accepted(wanted, endorsers) == (not wanted or bool(wanted & endorsers))


@pytest.mark.parametrize("name", ["grid", "group:hep", "user:ann", "grid@lab-2", "group:a.b_c-d@x"])
def test_endorsers_have_names(name: str):
    check_endorser(name, "endorsers")


@pytest.mark.parametrize(
    "name", ["", "any", "everyone", "group:", "grid:x", "group:HEP", "user:a b", "grid@", "grid@a@b", "worker:1"]
)
def test_what_is_no_endorser_is_refused_with_what_is(name: str):
    with pytest.raises(InvalidInput, match="cannot vouch") as caught:
        check_endorser(name, "endorsers")
    assert "group:NAME" in caught.value.hint


def test_endorser_of_another_grid_is_told_apart_and_a_third_grids_is_none_of_its_business():
    assert elsewhere("group:hep", "lab") == "group:hep@lab"
    for wrong in ("group:hep@third", "grid@lab", "everyone", ""):
        with pytest.raises(Forbidden):
            elsewhere(wrong, "lab")


def test_bundle_of_a_trusted_grid_is_believed_without_what_has_expired(lab: Grid):
    trusted = read_trusted([f"cern={lab.fingerprint}"])
    bundle = lab.bundle(manifest(), manifest("grid", until=NOW), REVOKED)
    assert read_bundle(bundle, trusted, now=NOW) == ("cern", [manifest(), REVOKED])


def test_bundle_of_a_grid_that_is_not_trusted_is_refused_with_its_fingerprint(lab: Grid, other: Grid):
    with pytest.raises(Forbidden, match="does not trust") as caught:
        read_bundle(lab.bundle(manifest()), read_trusted([f"x={other.fingerprint}"]), now=NOW)
    assert lab.fingerprint in caught.value.hint


def test_bundle_with_a_strange_statement_or_authority_is_refused_whole(lab: Grid, other: Grid):
    trusted = read_trusted([f"lab={lab.fingerprint}"])
    strange = msgspec.structs.replace(
        lab.bundle(manifest()), statements=(lab.authority.sign_statement(manifest()), other.authority.sign_statement(manifest()))
    )
    for bundle in (strange, msgspec.structs.replace(strange, authority="-"), lab.bundle(*[manifest()] * 101)):
        with pytest.raises(Forbidden):
            read_bundle(bundle, trusted, now=NOW)


@pytest.mark.parametrize("line", ["", "lab", "lab=", "lab=12", "=" + "a" * 64, "Lab=" + "a" * 64, "lab=" + "A" * 64])
def test_trusted_grids_are_names_with_fingerprints(line: str):
    with pytest.raises(InvalidInput) as caught:
        read_trusted([line])
    assert caught.value.where == "trusted_grids"


def test_signature_is_over_the_kind_of_statement_too(lab: Grid):
    """A revocation cannot be read as a manifest: the tag is in the signed body."""
    signed = sign_statement(REVOKED, lab.authority._manifest_key, lab.authority._manifest_certificate)
    assert isinstance(read_statement(signed, lab.root), Revocation)
