"""Overlay and scratch are what QEMU and ext4 tools take for sound."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
from pathlib import Path

import pytest

from deskgrid.errors import BadImage, DriverUnusable, MachineFailed, NoSpace
from deskgrid.machines import disks
from deskgrid.machines.disks import check_space, create_overlay, create_scratch, qcow2_virtual_size
from deskgrid.machines.processes import find_program
from deskgrid.units import GIB, MIB


def run(program: str, *arguments: str | Path) -> str:
    path = find_program(program)
    assert path is not None
    return subprocess.run([path, *arguments], check=True, capture_output=True, text=True).stdout


@pytest.mark.parametrize("size", [512, MIB, 512 * MIB, 512 * MIB + 512, 40 * GIB, 5 << 40])
def test_overlay_is_sound_empty_and_of_the_right_size(tmp_path: Path, size: int) -> None:
    path = tmp_path / "disk.qcow2"
    create_overlay(path, size)
    run("qemu-img", "check", "-q", "-f", "qcow2", path)
    told = json.loads(run("qemu-img", "info", "--output=json", "-f", "qcow2", path))
    assert told["virtual-size"] == size
    assert "backing-filename" not in told
    assert qcow2_virtual_size(path) == size
    assert path.stat().st_size < MIB


def test_overlay_never_replaces_a_file(tmp_path: Path) -> None:
    (tmp_path / "disk.qcow2").write_text("keep")
    with pytest.raises(FileExistsError):
        create_overlay(tmp_path / "disk.qcow2", MIB)


def test_image_that_names_another_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(MIB))
    run("qemu-img", "create", "-q", "-f", "qcow2", "-F", "raw", "-b", tmp_path / "secret", tmp_path / "backed.qcow2")
    run("qemu-img", "create", "-q", "-f", "qcow2", "-o", f"data_file={tmp_path}/data", tmp_path / "outside.qcow2", "1M")
    for name in ("backed.qcow2", "outside.qcow2"):
        with pytest.raises(BadImage):
            qcow2_virtual_size(tmp_path / name)


@pytest.mark.parametrize("content", [b"", b"QFI\xfb", b"QFI\xfb" + bytes(200), b"not an image at all" * 20])
def test_what_is_no_image_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "bad").write_bytes(content)
    with pytest.raises(BadImage):
        qcow2_virtual_size(tmp_path / "bad")


def test_absurd_size_is_refused(tmp_path: Path) -> None:
    create_overlay(tmp_path / "disk", MIB)
    data = bytearray((tmp_path / "disk").read_bytes())
    data[24:32] = struct.pack(">Q", 1 << 60)
    (tmp_path / "disk").write_bytes(data)
    with pytest.raises(BadImage):
        qcow2_virtual_size(tmp_path / "disk")


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
