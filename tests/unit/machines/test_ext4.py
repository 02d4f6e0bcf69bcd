"""The ext4 reader: right on what mke2fs and kernels write, bounded and polite on everything else."""

from __future__ import annotations

import contextlib
import os
import random
import stat
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskgrid.errors import BadImage
from deskgrid.machines import disks, ext4
from deskgrid.machines.ext4 import ROOT_INODE, Ext4, Inode, Run, file_reader

KINDS = {
    "ours": ["-t", "ext4", "-I", "256", "-O", "^has_journal"],
    "made by create_scratch": ["-t", "ext4", "-I", "256", "-O", disks._FEATURES],
    "default": ["-t", "ext4"],
    "small blocks": ["-t", "ext4", "-b", "1024"],
    "large blocks": ["-t", "ext4", "-b", "65536"],
    "no 64bit": ["-t", "ext4", "-O", "^64bit,^metadata_csum"],
    "ext3": ["-t", "ext3"],
    "ext2": ["-t", "ext2", "-b", "1024"],
}


def make_image(image: Path, size_bytes: int, content: Path, options: list[str]) -> Path:
    with image.open("wb") as file:
        file.truncate(size_bytes)
    common = ["-q", "-F", "-E", "lazy_itable_init=1,nodiscard", "-d", str(content)]
    subprocess.run(["mke2fs", *options, *common, str(image)], check=True, capture_output=True)
    return image


def debugfs(image: Path, *commands: str) -> str:
    """Change an image as a hostile guest could."""
    script = image.with_suffix(".debugfs")
    script.write_text("\n".join(commands) + "\n")
    done = subprocess.run(["debugfs", "-w", "-f", str(script), str(image)], check=True, capture_output=True, text=True)
    return done.stdout


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("content")
    rng = random.Random(4)
    (folder / "many").mkdir()
    for number in range(700):
        (folder / "many" / f"a long name to fill folders {number:040}").write_text(str(number))
    (folder / "plain").write_bytes(rng.randbytes(300_001))
    (folder / "empty").touch()
    (folder / "short link").symlink_to("plain")
    (folder / "long link").symlink_to("x/" * 300)
    with (folder / "holes").open("wb") as file:
        for place in range(900):
            file.seek(place * 200_000)
            file.write(rng.randbytes(1500))
        file.truncate(200_000_000)
    os.link(folder / "plain", folder / "second name")
    Path(os.fsdecode(os.fsencode(folder) + b"/odd\xff\n")).write_text("odd")
    os.utime(folder / "plain", (-5_000, -5_000))
    return folder


def opened(image: Path) -> Ext4:
    data = image.open("rb")
    return Ext4(file_reader(os.dup(data.fileno())), image.stat().st_size)


def walk(
    system: Ext4, number: int = ROOT_INODE, prefix: bytes = b"", seen: set[int] | None = None
) -> Iterator[tuple[bytes, Inode]]:
    seen = set() if seen is None else seen
    for name, child in system.records(system.inode(number)):
        inode = system.inode(child)
        yield prefix + name, inode
        if stat.S_ISDIR(inode.mode) and child not in seen:
            seen.add(child)
            yield from walk(system, child, prefix + name + b"/", seen)


@pytest.mark.parametrize("kind", KINDS)
def test_every_file_is_read_as_it_was_written(content: Path, tmp_path: Path, kind: str) -> None:
    system = opened(make_image(tmp_path / "image", 1 << 30, content, KINDS[kind]))
    names = set()
    for name, inode in walk(system):
        if name == b"lost+found":
            continue
        names.add(name)
        path = os.path.join(os.fsencode(content), name)
        status = os.lstat(path)
        assert stat.S_IFMT(inode.mode) == stat.S_IFMT(status.st_mode)
        assert stat.S_IMODE(inode.mode) == stat.S_IMODE(status.st_mode)
        if stat.S_ISLNK(inode.mode):
            assert system.link_target(inode) == os.readlink(path)
        elif stat.S_ISREG(inode.mode):
            assert inode.size_bytes == status.st_size
            with open(path, "rb") as file:
                assert contents(system, inode) == file.read()
    expected = {
        os.path.relpath(os.path.join(parent, entry), os.fsencode(content))
        for parent, folders, files in os.walk(os.fsencode(content))
        for entry in folders + files
    }
    assert names == expected
    assert system.clean


def contents(system: Ext4, inode: Inode) -> bytes:
    """Put a file together from its runs, as `results` does."""
    data = bytearray(inode.size_bytes)
    for run in system.runs(inode):
        data[run.offset : run.offset + run.length] = system._exactly(run.source, run.length)
    return bytes(data)


def test_times_before_1970_and_after_2038_and_link_counts(content: Path, tmp_path: Path) -> None:
    image = make_image(tmp_path / "image", 1 << 30, content, KINDS["ours"])
    debugfs(image, "set_inode_field empty mtime @5000000000")  # mke2fs -d loses the bits past 2038
    found = dict(walk(opened(image)))
    assert found[b"empty"].mtime == 5_000_000_000
    assert found[b"plain"].mtime == -5_000
    assert found[b"plain"].links == 2
    assert found[b"plain"].number == found[b"second name"].number


def test_holes_are_left_out_and_deep_extent_trees_are_read(content: Path, tmp_path: Path) -> None:
    system = opened(make_image(tmp_path / "image", 1 << 30, content, KINDS["ours"]))
    inode = dict(walk(system))[b"holes"]
    assert struct.unpack_from("<H", inode.block, 6)[0] >= 1, "the tree has no depth: the test tests nothing"
    runs = system.runs(inode)
    assert len(runs) == 900
    assert sum(run.length for run in runs) < 9_000_000


def test_read_returns_any_piece_of_a_file(content: Path, tmp_path: Path) -> None:
    system = opened(make_image(tmp_path / "image", 1 << 30, content, KINDS["ours"]))
    found = dict(walk(system))
    whole = (content / "holes").read_bytes()
    for offset, size in ((0, 10), (1490, 20), (199_990, 30), (150_000_000, 1), (199_999_990, 100), (300_000_000, 5)):
        assert system.read(found[b"holes"], offset, size) == whole[offset : offset + size]


# --- hostile images ---


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small image with one of everything."""
    folder = tmp_path_factory.mktemp("small")
    (folder / "in" / "d" / "e").mkdir(parents=True)
    (folder / "in" / "f").write_bytes(b"hello" * 1000)
    (folder / "in" / "d" / "g").write_bytes(b"x")
    (folder / "in" / "s").symlink_to("f")
    (folder / "in" / "t").symlink_to("y" * 100)
    with (folder / "in" / "h").open("wb") as file:
        for place in range(30):
            file.seek(place * 20_000)
            file.write(b"z")
    return make_image(
        folder / "image", 2 << 20, folder / "in", ["-t", "ext4", "-b", "1024", "-I", "256", "-O", "^has_journal", "-N", "64"]
    )


@pytest.fixture
def hostile(small: Path, tmp_path: Path) -> Path:
    image = tmp_path / "image"
    image.write_bytes(small.read_bytes())
    return image


def exercise(data: bytes) -> None:
    """Do all that can be done with an image, as far as a careful caller would."""
    system = Ext4(lambda offset, size: data[offset : offset + size], len(data))
    for count, (_, inode) in enumerate(walk(system)):
        if count > 2000:
            return
        try:
            if stat.S_ISLNK(inode.mode):
                system.link_target(inode)
            for run in system.runs(inode):
                assert 0 <= run.source <= run.source + run.length <= len(data)
                assert 0 <= run.offset < inode.size_bytes
            system.read(inode, 0, 10_000)
        except BadImage:
            pass


def patched(image: Path, offset: int, data: bytes) -> bytes:
    whole = bytearray(image.read_bytes())
    whole[offset : offset + len(data)] = data
    return bytes(whole)


@pytest.mark.parametrize(
    ("offset", "value"),
    [
        (1024 + 0x38, b"\0\0"),  # magic
        (1024 + 0x18, b"\x07\0\0\0"),  # block size
        (1024 + 0x18, b"\xff\xff\xff\xff"),
        (1024 + 0x14, b"\xff\0\0\0"),  # first block
        (1024 + 0x4, b"\xff\xff\xff\x0f"),  # blocks
        (1024 + 0x20, b"\0\0\0\0"),  # blocks per group
        (1024 + 0x28, b"\0\0\0\0"),  # inodes per group
        (1024 + 0x58, b"\x03\0"),  # inode size
        (1024 + 0x58, b"\0\xff"),
        (1024 + 0xFE, b"\x01\0"),  # descriptor size
        (1024 + 0x150, b"\xff\xff\xff\xff"),  # blocks, high half
    ],
)
def test_superblock_without_sense_is_refused(small: Path, offset: int, value: bytes) -> None:
    with pytest.raises(BadImage):
        exercise(patched(small, offset, value))


@pytest.mark.parametrize("feature", [0x4, 0x10, 0x8000, 0x10000, 0x80000000])
def test_feature_that_is_not_read_is_refused_by_name(small: Path, feature: int) -> None:
    features = struct.unpack_from("<I", small.read_bytes(), 1024 + 0x60)[0]
    with pytest.raises(BadImage, match="feature"):
        exercise(patched(small, 1024 + 0x60, struct.pack("<I", features | feature)))


@pytest.mark.parametrize("data", [b"", b"x", bytes(5000), b"\xff" * 5000])
def test_what_is_no_file_system_is_refused(data: bytes) -> None:
    with pytest.raises(BadImage):
        exercise(data)


def test_image_cut_short_is_refused(small: Path) -> None:
    whole = small.read_bytes()
    for end in range(0, len(whole), 10_007):
        with pytest.raises(BadImage):
            exercise(whole[:end])


def test_guest_that_did_not_unmount_is_noticed(hostile: Path) -> None:
    debugfs(hostile, "set_super_value state 0")
    assert not opened(hostile).clean


def test_folder_that_contains_itself_is_left_to_the_caller_to_notice(hostile: Path) -> None:
    debugfs(hostile, "link <2> d/loop", "link d d/e/loop")
    assert len(list(walk(opened(hostile)))) < 30


def test_extent_tree_that_points_to_itself_ends(hostile: Path) -> None:
    system = opened(hostile)
    inode = dict(walk(system))[b"h"]
    _, low, _ = struct.unpack_from("<IIH", inode.block, 12)
    data = bytearray(hostile.read_bytes())
    at = data.index(inode.block)
    for claimed in (1, 5, 6):
        # The root claims a depth, and its child is an index node that points to itself 80 times.
        struct.pack_into("<HHHH", data, at, 0xF30A, 1, 4, claimed)
        struct.pack_into("<HHHH", data, low * 1024, 0xF30A, 80, 84, max(claimed - 1, 0))
        for entry in range(80):
            struct.pack_into("<IIHH", data, low * 1024 + 12 + 12 * entry, entry, low, 0, 0)
        image = bytes(data)
        start = time.monotonic()
        system = Ext4(lambda offset, size, image=image: image[offset : offset + size], len(image))
        with pytest.raises(BadImage):
            system.runs(dict(walk(system))[b"h"])
        assert time.monotonic() - start < 5


def mapped(numbers: list[int], size_bytes: int) -> Inode:
    return Inode(12, 0o100644, size_bytes, 0, 1, 0, struct.pack("<15I", *numbers))


def test_block_map_that_points_to_itself_ends(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ext4, "MAX_EXTENTS", 50_000)  # 4 s otherwise
    data = bytearray(small.read_bytes())
    data[1000 * 1024 : 1001 * 1024] = struct.pack("<256I", *[1000] * 256)
    image = bytes(data)
    system = Ext4(lambda offset, size: image[offset : offset + size], len(image))
    start = time.monotonic()
    for size in (1 << 40, 1 << 30, 1 << 24):
        runs: list[Run] = []
        with contextlib.suppress(BadImage):
            runs = system.runs(mapped([0] * 12 + [1000] * 3, size))
        assert len(runs) <= ext4.MAX_EXTENTS
    assert time.monotonic() - start < 30


def test_block_map_of_zeros_ends(small: Path) -> None:
    data = bytearray(small.read_bytes())
    data[1000 * 1024 : 1001 * 1024] = struct.pack("<256I", *[1001] * 256)
    data[1001 * 1024 : 1002 * 1024] = bytes(1024)
    image = bytes(data)
    system = Ext4(lambda offset, size: image[offset : offset + size], len(image))
    start = time.monotonic()
    assert system.runs(mapped([0] * 14 + [1000], 1 << 34)) == []
    assert time.monotonic() - start < 5


def record(inode: int, length: int, name: bytes, name_length: int | None = None) -> bytes:
    data = struct.pack("<IHBB", inode, length, len(name) if name_length is None else name_length, 0) + name
    return data.ljust(length, b"\0") if length < 100 else data


@pytest.mark.parametrize(
    "block",
    [
        record(11, 0, b"a"),
        record(11, 6, b"a"),
        record(11, 13, b"abcde"),
        record(11, 2048, b"a"),
        record(11, 1020, b"a"),  # leaves 4 bytes, less than a record
        record(11, 12, b"a", 200),
        record(0xFFFFFFFF, 1024, b"a"),
    ],
)
def test_damaged_folder_is_refused(small: Path, block: bytes) -> None:
    system = opened(small)
    run = system.runs(system.inode(ROOT_INODE))[0]
    with pytest.raises(BadImage):
        exercise(patched(small, run.source, block))


def test_any_bytes_are_yielded_as_names(small: Path) -> None:
    system = opened(small)
    run = system.runs(system.inode(ROOT_INODE))[0]
    block = record(11, 16, b"../../x") + record(12, 12, b"a/b") + record(12, 12, b"") + record(12, 984, b"a/b")
    data = patched(small, run.source, block)
    system = Ext4(lambda offset, size: data[offset : offset + size], len(data))
    assert [name for name, _ in system.records(system.inode(ROOT_INODE))] == [b"../../x", b"a/b", b"", b"a/b"]


def interesting(data: bytes) -> list[int]:
    """Return offsets of everything that is not zero: metadata, mostly."""
    return [at for at, byte in enumerate(data) if byte] + list(range(1024, 2048, 2))


@pytest.fixture(scope="module")
def offsets(small: Path) -> list[int]:
    return interesting(small.read_bytes())


FUZZ = settings(max_examples=200, deadline=None)


@pytest.fixture(scope="module")
def bounded() -> Iterator[Callable[[bytes], None]]:
    def run(data: bytes) -> None:
        start = time.monotonic()
        with contextlib.suppress(BadImage):
            exercise(data)
        assert time.monotonic() - start < 10

    return run


@FUZZ
@given(draw=st.data())
def test_mutated_image_is_refused_or_read_in_bounds(
    small: Path, offsets: list[int], bounded: Callable[[bytes], None], draw
) -> None:
    data = bytearray(small.read_bytes())
    for _ in range(draw.draw(st.integers(1, 8))):
        at = offsets[draw.draw(st.integers(0, len(offsets) - 1))]
        value = draw.draw(st.one_of(st.binary(min_size=1, max_size=8), st.sampled_from([b"\xff" * 4, bytes(4), b"\x0a\xf3"])))
        data[at : at + len(value)] = value
    bounded(bytes(data[: 2 << 20]))


@FUZZ
@given(source=st.integers(0, 2047), target=st.integers(0, 2047), shift=st.integers(0, 1023))
def test_image_with_blocks_copied_over_each_other_is_refused_or_read_in_bounds(
    small: Path, bounded: Callable[[bytes], None], source: int, target: int, shift: int
) -> None:
    data = bytearray(small.read_bytes())
    data[target * 1024 + shift : target * 1024 + shift + 1024] = data[source * 1024 : (source + 1) * 1024]
    bounded(bytes(data[: 2 << 20]))
