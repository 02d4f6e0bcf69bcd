"""Overlays and packed disks are what QEMU takes for sound, and are read as QEMU reads them, whatever is done to their bytes."""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deskgrid.errors import BadImage
from deskgrid.machines.ext4 import file_reader
from deskgrid.machines.processes import find_program
from deskgrid.machines.qcow2 import Qcow2Reader, create_overlay, pack_sparse, qcow2_virtual_size
from deskgrid.units import GIB, KIB, MIB


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


# ---- disks that stand alone


def sparse(path: Path, size: int, pieces: dict[int, bytes]) -> Path:
    with path.open("xb") as file:
        file.truncate(size)
        for offset, data in pieces.items():
            file.seek(offset)
            file.write(data)
    return path


def as_raw(image: Path) -> Path:
    raw = image.with_suffix(".back")
    run("qemu-img", "convert", "-f", "qcow2", "-O", "raw", image, raw)
    return raw


PIECES = [
    {},
    {0: b"first", 5 * MIB + 3: b"x" * 200_000, 40 * MIB - 5: b"last!"},
    {GIB - 4: b"here", 0: b"a"},
]


@pytest.mark.parametrize("pieces", PIECES)
@pytest.mark.parametrize("size", [40 * MIB, GIB, 3 * GIB + 512])
def test_packed_disk_is_sound_and_holds_what_the_raw_one_does(tmp_path: Path, size: int, pieces: dict[int, bytes]) -> None:
    raw = sparse(tmp_path / "raw", size, {at: data for at, data in pieces.items() if at + len(data) <= size})
    image = tmp_path / "disk.qcow2"
    pack_sparse(raw, image)
    run("qemu-img", "check", "-q", "-f", "qcow2", image)
    assert image.stat().st_size < 2 * MIB
    run("qemu-img", "compare", "-q", "-f", "raw", "-F", "qcow2", raw, image)
    with image.open("rb") as file:
        reader = Qcow2Reader(file_reader(file.fileno()))
        assert reader.size_bytes == size
        with raw.open("rb") as plain:
            for offset in [0, 5 * MIB, size - 100_000, *pieces]:
                plain.seek(offset)
                assert reader.read_at(offset, 300_000) == plain.read(300_000)


@pytest.mark.full
def test_many_clusters_need_many_refcount_blocks(tmp_path: Path) -> None:
    raw = tmp_path / "raw"
    with raw.open("xb") as file:
        file.truncate(8 * GIB)
        for number in range(0, 40_000):
            os.pwrite(file.fileno(), b"x", number * 3 * 64 * KIB)
    pack_sparse(raw, tmp_path / "disk.qcow2")
    raw_blocks = raw.stat().st_blocks
    assert raw_blocks * 512 < 400 * MIB
    run("qemu-img", "check", "-q", "-f", "qcow2", tmp_path / "disk.qcow2")


def test_disk_that_a_guest_wrote_to_is_read_as_qemu_reads_it(tmp_path: Path) -> None:
    raw, image = sparse(tmp_path / "raw", 64 * MIB, {0: b"begin"}), tmp_path / "disk.qcow2"
    pack_sparse(raw, image)
    writes = ["write -P 1 1M 3M", "write -z 2M 64k", "discard 3M 128k", "write -P 7 63M 1M", "write -P 9 100k 5k"]
    run("qemu-io", "-f", "qcow2", *(word for command in writes for word in ("-c", command)), image)
    run("qemu-img", "snapshot", "-c", "one", image)
    run("qemu-io", "-f", "qcow2", "-c", "write -P 3 1M 1M", image)
    with image.open("rb") as file:
        assert Qcow2Reader(file_reader(file.fileno())).read_at(0, 64 * MIB) == as_raw(image).read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None)
@given(seed=st.integers(), count=st.integers(1, 6), cut=st.integers(0, 700_000) | st.none())
def test_damaged_image_is_refused_or_read_never_more(tmp_path: Path, seed: int, count: int, cut: int | None) -> None:
    rng = random.Random(seed)
    path = tmp_path / "whole.qcow2"
    if not path.exists():
        pack_sparse(sparse(tmp_path / "raw", 8 * MIB, {0: b"x" * 70_000, 4 * MIB: b"y"}), path)
    data = bytearray(path.read_bytes())
    for _ in range(count):
        at = rng.choice([rng.randrange(104), rng.randrange(len(data))])
        data[at] = rng.randrange(256)
    data = data[:cut]
    try:
        reader = Qcow2Reader(lambda offset, size: bytes(data[offset : offset + size]))
        for offset in range(0, min(reader.size_bytes, 16 * MIB), MIB):
            assert len(reader.read_at(offset, 4096)) <= 4096
    except BadImage:
        pass


def test_image_of_another_kind_is_refused(tmp_path: Path) -> None:
    for options in ("cluster_size=4k", "extended_l2=on,cluster_size=64k", "compat=0.10"):
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", options, tmp_path / options, "8M")
        with (tmp_path / options).open("rb") as file, pytest.raises(BadImage):
            Qcow2Reader(file_reader(file.fileno()))
