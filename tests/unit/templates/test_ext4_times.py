"""Times in a new file system: the same files give the same bytes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest

from deskgrid.errors import OperatorError
from deskgrid.templates.ext4_times import set_times

UUID = "11111111-2222-3333-4444-555555555555"
EPOCH, SINCE = 1_577_836_800, 1_700_000_000
PLAIN = "^has_journal,^metadata_csum,uninit_bg"


def file_system(folder: Path, image: Path, offset: int, *, size: str = "40m", features: str = PLAIN, more: str = "") -> Path:
    options = f"hash_seed={UUID},lazy_itable_init=1,offset={offset}{more}"
    command = ["mke2fs", "-q", "-F", "-t", "ext4", "-U", UUID, "-O", features, "-E", options, "-d", folder, image, size]
    subprocess.run(command, env=dict(os.environ, E2FSPROGS_FAKE_TIME=str(EPOCH)), check=True, capture_output=True)
    return image


def make_files(folder: Path, names: list[str], now: float) -> Path:
    """Files in some order, made at some time; those of packages have times of their own."""
    folder.mkdir()
    for name in names:
        (folder / name).write_text(name)
        os.utime(folder / name, (now, now))
    (folder / "of a package").write_text("old")
    os.utime(folder / "of a package", (now, SINCE - 1000))
    (folder / "link").symlink_to("a")
    os.utime(folder / "link", (now, now), follow_symlinks=False)
    os.utime(folder, (now, now))
    return folder


@pytest.mark.parametrize("offset", [0, 1 << 20])
@pytest.mark.parametrize("features", [PLAIN, f"{PLAIN},^64bit"])
def test_same_files_give_the_same_bytes_whenever_they_were_made(tmp_path: Path, offset: int, features: str) -> None:
    for name, order, now in (("one", ["a", "b", "c"], SINCE + 10.5), ("two", ["c", "a", "b"], SINCE + 99999.25)):
        image = file_system(make_files(tmp_path / f"{name}.d", order, now), tmp_path / name, offset, features=features)
        set_times(image, offset, changed_since=SINCE, epoch=EPOCH)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    (tmp_path / "plain").write_bytes((tmp_path / "one").read_bytes()[offset:])
    subprocess.run(["e2fsck", "-fn", tmp_path / "plain"], check=True, capture_output=True)
    told = {
        name: subprocess.run(
            ["debugfs", "-R", f'stat "/{name}"', tmp_path / "plain"], check=True, capture_output=True, text=True
        ).stdout
        for name in ("a", "of a package", "link")
    }
    for name, words in told.items():
        assert [f"{EPOCH:#x}:00000000"] * 3 == [
            line.split()[1] for line in words.splitlines() if line[:6] in (" ctime", " atime", "crtime")
        ]
        modified = next(line.split()[1] for line in words.splitlines() if line.startswith(" mtime"))
        assert modified == (f"{SINCE - 1000:#x}:00000000" if name == "of a package" else f"{EPOCH:#x}:00000000")


def test_many_groups_are_all_reached(tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(300):
        (folder / f"d{number}").mkdir()
        (folder / f"d{number}" / "file").write_text("x")
    image = file_system(folder, tmp_path / "image", 0, size="400m")
    set_times(image, 0, changed_since=0, epoch=EPOCH)
    script = "".join(f"stat /d{number}/file\n" for number in range(300))
    told = subprocess.run(["debugfs", "-f", "-", image], input=script, check=True, capture_output=True, text=True).stdout
    assert told.count(f"{EPOCH:#x}:00000000") == 4 * 300


def test_file_system_with_checksums_is_left_alone(tmp_path: Path) -> None:
    folder = make_files(tmp_path / "d", ["a"], SINCE)
    image = file_system(folder, tmp_path / "image", 0, features="metadata_csum")
    before = image.read_bytes()
    with pytest.raises(OperatorError, match="checksums"):
        set_times(image, 0, changed_since=0, epoch=EPOCH)
    assert image.read_bytes() == before
