"""OCI archives are taken if they are what they say, and nothing that is forged does more than be refused."""

from __future__ import annotations

import contextlib
import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.errors import BadImage
from deskgrid.machines.container_image import check_archive, looks_like_archive, write_archive
from deskgrid.machines.ext4 import ReadAt
from deskgrid.machines.images import ImageKind, check_image, detect_format


def reader(data: bytes) -> tuple[ReadAt, int]:
    """Return what reads these bytes, and how many there are."""
    return lambda offset, size: data[offset : offset + size], len(data)


def tar_of(members: dict[str, bytes], kind: bytes = tarfile.REGTYPE) -> bytes:
    """Return a tar with these members."""
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w") as archive:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size, member.type = len(data), kind
            archive.addfile(member, io.BytesIO(data))
    return whole.getvalue()


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("image") / "image"
    write_archive(path, b"layer", {})
    return path.read_bytes()


def test_archive_is_taken(archive: bytes) -> None:
    assert looks_like_archive(*reader(archive))
    assert check_archive(*reader(archive)) > 0


@pytest.mark.parametrize(
    "members",
    [
        {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}'},
        {"oci-layout": b"{}", "index.json": b'{"manifests": []}'},
        {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": b'{"manifests": []}'},
        {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": b"[" * 100_000},
        {"oci-layout": b"x", "../../etc/passwd": b""},
        {"oci-layout": b"x", "/index.json": b"{}"},
        {"other": b""},
    ],
)
def test_what_is_none_is_refused(members: dict[str, bytes]) -> None:
    with pytest.raises(BadImage):
        check_archive(*reader(tar_of(members)))


def test_links_in_the_place_of_its_files_are_refused() -> None:
    with pytest.raises(BadImage):
        check_archive(*reader(tar_of({"oci-layout": b"", "index.json": b""}, tarfile.SYMTYPE)))


def test_any_other_tar_is_something_to_import(tmp_path: Path) -> None:
    path = tmp_path / "file.tar"
    path.write_bytes(tar_of({"disk.vmdk": b"x"}))
    assert detect_format(path) is ImageKind.TAR
    with pytest.raises(BadImage, match="disk import takes it"):
        check_image(path)


@given(data=st.data())
def test_damaged_archives_are_taken_or_refused(archive: bytes, data: st.DataObject) -> None:
    changed = bytearray(archive)
    for at, value in data.draw(st.lists(st.tuples(st.integers(0, len(archive) - 1), st.integers(0, 255)), min_size=1, max_size=20)):
        changed[at] = value
    cut = bytes(changed[: data.draw(st.integers(0, len(archive)))])
    with contextlib.suppress(BadImage):
        check_archive(*reader(cut))
    looks_like_archive(*reader(cut))
