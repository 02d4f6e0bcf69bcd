"""deskgrid disk list, search, show, endorse, revoke, export, and import with a manifest."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any, cast

import pytest

from deskgrid.cli.disk import _check_believed
from deskgrid.errors import InvalidInput, ProtocolError
from deskgrid.machines import images
from deskgrid.model.manifests import Bundle
from deskgrid.testing.images import iso_bytes
from tests.unit.cli.conftest import Deskgrid, Server


@pytest.fixture
def image(tmp_path: Path) -> Path:
    (tmp_path / "cern.iso").write_bytes(iso_bytes())
    return tmp_path / "cern.iso"


def test_disks_are_listed_searched_and_shown_with_who_vouches_for_them(user: Deskgrid, image: Path):
    described = ("--os", "cernvm 5", "--arch", "aarch64", "--about", "analysis of events")
    assert user("disk", "import", image, "--public", *described).out == "cern@1\n"
    assert user("disk", "endorse", "cern", "--lifetime", "30d").code == 0
    ran = user("disk", "endorse", "cern", "--as", "grid")
    assert "endorsed  by grid (admin) now, for 180 days\n" in ran.out
    shown = user("disk", "show", "cern").out
    for words in (
        "cern@1 of admin, public",
        "analysis of events",
        "cernvm 5, aarch64",
        "iso,",
        "cloud-init: the context disk",
        "user:admin",
    ):
        assert words in shown
    assert user("disk", "show", "cern", "--json").document["manifests"][0]["endorser"] == "grid"
    for words in ((), ("analysis", "cern"), ("--os", "CernVM"), ("--arch", "aarch64"), ("--endorsed-by", "user:admin")):
        assert "grid, user:admin" in user("disk", "search", *words).out
    assert user("disk", "search", "analysis", "tiny").out == "no disks\n"
    assert user("disk", "search", "--endorsed-by", "group:hep", "--json").document == []
    assert "user:admin" not in user("disk", "endorse", "cern", "--withdraw").out
    assert "cern@1" in user("disk", "list").out


def test_revoked_disk_is_told_as_such(user: Deskgrid, image: Path):
    user("disk", "import", image)
    ran = user("disk", "revoke", "cern", "--reason", "its ssh has a hole", "--json")
    assert ran.document["reason"] == "its ssh has a hole"
    assert "its ssh has a hole" in user("disk", "show", "cern").out
    assert "revoked" in user("disk", "list").out
    submitted = user("job", "submit", "--disk", "cern", "--name", "x", "--json")
    assert submitted.code == 1
    assert "revoked by admin: its ssh has a hole" in submitted.error["message"]
    assert user("disk", "revoke", "gone", "--reason", "x").code == 2


def test_disk_travels_to_another_grid_with_what_is_said_of_it(user: Deskgrid, image: Path, tmp_path: Path):
    user("disk", "import", image, "--agent", "--about", "analysis")
    assert user("disk", "export", "cern").code == 2  # nobody vouches for it
    user("disk", "endorse", "cern", "--as", "grid")
    ran = user("disk", "export", "cern")
    file, authority = ran.out.splitlines()
    fingerprint = authority.split()[-1]
    carried = tmp_path / "carried.iso.zst"
    assert user("data", "get", "cern", "-o", carried).code == 0
    assert (file, len(fingerprint)) == ("cern.manifest", 64)
    refused = user("disk", "import", image, "--name", "again", "--manifest", file, "--json")
    assert (refused.code, fingerprint in refused.error["hint"]) == (1, True)
    assert "again" not in user("disk", "list").out
    other = Server(tmp_path / "other", trusted_grids=(f"cern={fingerprint}",))
    try:
        assert user("login", other.login_link()).code == 0
        assert user("disk", "import", file, "--json").error["error"] == "NotFound"
        assert user("disk", "import", carried, "--name", "theirs", "--manifest", file, "--os", "ignored").out == "theirs@1\n"
        (tmp_path / "another.iso").write_bytes(iso_bytes() + bytes(2048))
        ran = user("disk", "import", tmp_path / "another.iso", "--manifest", file, "--json")
        assert (ran.code, ran.error["error"]) == (2, "BadImage")
        assert "another" not in user("disk", "list").out
        shown = user("disk", "show", "theirs").out
        assert "by grid@cern (admin@cern)" in shown
        assert "analysis" in shown
        assert "agent: the context disk is labelled CONTEXT" in shown
        assert user("disk", "import", file).out == "theirs@1\n"
    finally:
        other.stop()


def test_manifest_that_is_not_believed_and_files_that_are_none_are_refused_before_anything_is_sent(
    user: Deskgrid, image: Path, tmp_path: Path
):
    user("disk", "import", image)
    user("disk", "endorse", "cern")
    user("disk", "export", "cern", "-o", tmp_path / "cern.manifest")
    another = tmp_path / "another.iso"
    another.write_bytes(iso_bytes() + bytes(2048))
    ran = user("disk", "import", another, "--manifest", tmp_path / "cern.manifest", "--json")
    assert (ran.code, ran.error["error"]) == (1, "Forbidden")
    assert "another" not in user("disk", "list").out
    for content in (b"", b"{}", b"[1]", b'{"grid": "x", "authority": "", "statements": ["???"]}'):
        (tmp_path / "wrong.manifest").write_bytes(content)
        for arguments in ((tmp_path / "wrong.manifest",), (another, "--manifest", tmp_path / "wrong.manifest")):
            assert user("disk", "import", *arguments).code in (1, 2)
    assert user("disk", "export", "cern", "-o", tmp_path / "no" / "x").code == 2


def test_next_version_that_differs_little_has_a_delta(user: Deskgrid, tmp_path: Path):
    same = random.Random(1).randbytes(1 << 20)
    image, carried = tmp_path / "d.iso", []
    for version, new in enumerate((b"", b"changed", b"again", random.Random(2).randbytes(2 << 20)), start=1):
        image.write_bytes(iso_bytes() + same + new)
        whole = ("--whole",) if new == b"again" else ()
        assert user("disk", "import", image, *whole).out == f"d@{version}\n"
        shown = user("disk", "show", "d", "--json").document["data"]
        carried.append(shown["delta"]["blob"]["size_bytes"] if shown["delta"] else None)
    assert (carried[0], carried[2], carried[3]) == (None, None, None)
    assert carried[1] < 2000
    assert "delta" in user("disk", "show", "d@2").out


def test_new_version_is_imported_whole_if_the_old_one_cannot_be_used(
    user: Deskgrid, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    async def unpack_disk(*_: object, **__: object) -> None:
        raise ProtocolError("the disk is not the one that was promised")

    monkeypatch.setattr(images, "unpack_disk", unpack_disk)
    for version in (1, 2):
        (tmp_path / "d.iso").write_bytes(iso_bytes() + bytes([version]))
        ran = user("disk", "import", tmp_path / "d.iso")
        assert ran.out == f"d@{version}\n"
    assert "no delta to the version before: the disk is not the one" in ran.err
    assert user("disk", "show", "d", "--json").document["data"]["delta"] is None


async def test_manifest_whose_time_is_over_describes_no_disk():
    class Grid:
        async def take_bundle(self, bundle: Bundle) -> tuple[()]:
            return ()

    with pytest.raises(InvalidInput, match="which is over"):
        await _check_believed(cast("Any", Grid()), Bundle(grid="x", authority="", statements=()))
