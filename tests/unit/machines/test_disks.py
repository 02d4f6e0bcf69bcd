"""The scratch disk is what ext4 tools take for sound."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from deskgrid.errors import DriverUnusable, MachineFailed, NoSpace
from deskgrid.machines import disks
from deskgrid.machines.disks import check_space, create_scratch
from deskgrid.machines.processes import find_program
from deskgrid.units import GIB, MIB


def run(program: str, *arguments: str | Path) -> str:
    path = find_program(program)
    assert path is not None
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


def test_scratch_is_sparse_labelled_sound_and_empty(tmp_path: Path) -> None:
    path = tmp_path / "scratch.img"
    create_scratch(path, 8 * GIB)
    assert path.stat().st_size == 8 * GIB
    assert path.stat().st_blocks * 512 < 5 * MIB
    run("e2fsck", "-fn", path)
    superblock = run("dumpe2fs", "-h", path)
    assert "SCRATCH" in superblock
    assert "has_journal" not in superblock
    names = {line.split("/")[5] for line in run("debugfs", "-R", "ls -p /", path).splitlines() if line}
    assert names == {".", "..", "lost+found"}


def test_scratch_can_be_made_with_content(tmp_path: Path) -> None:
    (tmp_path / "content" / "deep").mkdir(parents=True)
    (tmp_path / "content" / "deep" / "file").write_text("text")
    create_scratch(tmp_path / "scratch.img", 16 * MIB, content=tmp_path / "content")
    assert run("debugfs", "-R", "cat /deep/file", tmp_path / "scratch.img") == "text"


def test_scratch_too_small_for_a_file_system_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MachineFailed):
        create_scratch(tmp_path / "scratch.img", 4096)
    assert not (tmp_path / "scratch.img").exists()


def test_missing_mke2fs_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(disks, "find_program", lambda name: None)
    with pytest.raises(DriverUnusable, match="e2fsprogs"):
        create_scratch(tmp_path / "scratch.img", MIB)


def test_full_disk_is_told_before_anything_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=MIB)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(NoSpace):
        check_space(tmp_path)
