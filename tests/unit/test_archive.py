"""The archive format: what is packed comes back, and what is hostile does no harm."""

from __future__ import annotations

import errno
import io
import os
import random
import shutil
import stat
import subprocess
import tarfile
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from deskgrid import archive
from deskgrid.archive import (
    ArchiveWriter,
    PackReport,
    UnpackLimits,
    UnpackReport,
    links_that_leave,
    pack_folder,
    printable,
    unpack,
    zstd,
)
from deskgrid.errors import BadArchive, Conflict, InvalidInput, NoSpace

SLOW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def packed_tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    """Return a compressed pax archive of members made by hand."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for info, data in members:
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return zstd.compress(buffer.getvalue())


def member(name: str, kind: bytes = tarfile.REGTYPE, *, link: str = "", data: bytes = b"", mode: int = 0o644):
    info = tarfile.TarInfo(name)
    info.type, info.linkname, info.mode = kind, link, mode
    return info, data


def unpacked(data: bytes, folder: Path, **limits: int) -> UnpackReport:
    return unpack(io.BytesIO(data), folder, limits=UnpackLimits(**limits))


def listing(folder: Path) -> dict[bytes, tuple[object, ...]]:
    """Describe everything below a folder: kind, mode, content or target."""
    found: dict[bytes, tuple[object, ...]] = {}
    root = os.fsencode(folder)
    for parent, folders, files in os.walk(root):
        for name in folders + files:
            path = os.path.join(parent, name)
            mode = os.lstat(path).st_mode
            content: object = None
            if stat.S_ISLNK(mode):
                content = os.readlink(path)
            elif stat.S_ISREG(mode):
                with open(path, "rb") as file:
                    content = file.read()
            found[os.path.relpath(path, root)] = (stat.S_IFMT(mode), 0 if stat.S_ISLNK(mode) else stat.S_IMODE(mode), content)
    return found


@pytest.fixture
def source(tmp_path: Path) -> Path:
    folder = tmp_path / "source"
    (folder / "sub" / "empty").mkdir(parents=True)
    (folder / "context.sh").write_text("#!/bin/sh\n")
    (folder / "context.sh").chmod(0o755)
    (folder / "größe €").write_text("utf-8")
    Path(os.fsdecode(os.fsencode(folder) + b"/odd\xff\xfe\n")).write_bytes(b"odd")
    (folder / "sub" / ("x" * 200)).write_bytes(os.urandom(3 << 20))
    (folder / "sub" / "link").symlink_to("../context.sh")
    (folder / "sub").chmod(0o750)
    return folder


def test_packed_folder_comes_back_as_it_was(source: Path, tmp_path: Path) -> None:
    report = pack_folder(source, tmp_path / "a.tar.zst")
    unpack(tmp_path / "a.tar.zst", tmp_path / "out")
    assert listing(tmp_path / "out") == listing(source)
    assert report.files == 7
    assert report.archive_bytes == (tmp_path / "a.tar.zst").stat().st_size


def test_same_folder_gives_the_same_bytes_whatever_the_times_and_order(source: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(source, copy, symlinks=True)
    for path in copy.rglob("*"):
        os.utime(path, (1, 1), follow_symlinks=False)
    assert pack_folder(source, io.BytesIO()) == pack_folder(copy, io.BytesIO())


def test_gnu_tar_reads_what_is_written(source: Path, tmp_path: Path) -> None:
    pack_folder(source, tmp_path / "a.tar.zst")
    (tmp_path / "out").mkdir()
    subprocess.run(["tar", "--zstd", "-xpf", tmp_path / "a.tar.zst", "-C", tmp_path / "out"], check=True, capture_output=True)
    assert listing(tmp_path / "out") == listing(source)


def test_what_gnu_tar_writes_is_read(source: Path, tmp_path: Path) -> None:
    with (source / "sparse").open("wb") as file:
        file.seek(5 << 20)
        file.write(b"end")
    subprocess.run(["tar", "--zstd", "--posix", "--sparse", "-cf", tmp_path / "a.tar.zst", "-C", source, "."], check=True)
    unpack(tmp_path / "a.tar.zst", tmp_path / "out")
    assert listing(tmp_path / "out") == listing(source)
    assert (tmp_path / "out" / "sparse").stat().st_blocks * 512 < 1 << 20


names = st.binary(min_size=1, max_size=40).filter(lambda n: not set(n) & set(b"/\0") and n not in (b".", b".."))
extents = st.lists(st.tuples(st.integers(1, 1 << 20), st.integers(0, 9000)), max_size=5)


@SLOW
@given(
    files=st.dictionaries(names, st.tuples(st.binary(max_size=2000), st.integers(0, 0o777)), max_size=8),
    links=st.dictionaries(names, names, max_size=3),
    folder=names,
)
def test_any_tree_survives(files: dict[bytes, tuple[bytes, int]], links: dict[bytes, bytes], folder: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        root = os.fsencode(name) + b"/in"
        os.mkdir(root)
        os.mkdir(root + b"/" + folder)
        for file, (data, mode) in files.items():
            path = root + b"/" + folder + b"/" + file
            with open(path, "wb") as output:
                output.write(data)
            os.chmod(path, mode)
        for link in links.keys() - files.keys():
            os.symlink(b"nowhere/" + links[link], root + b"/" + folder + b"/" + link)
        pack_folder(Path(name, "in"), Path(name, "a"))
        report = unpack(Path(name, "a"), Path(name, "out"))
        assert report.left_out == 0
        assert listing(Path(name, "out")) == listing(Path(name, "in"))


@SLOW
@given(pieces=extents, tail=st.integers(0, 1 << 30))
def test_any_holes_survive(pieces: list[tuple[int, int]], tail: int) -> None:
    where, end = [], 0
    for gap, length in pieces:
        where.append((end + gap, length))
        end += gap + length
    output = io.BytesIO()
    with ArchiveWriter(output) as writer:
        writer.add_file(b"f\xff", end + tail, [b"x" * length for _, length in where], extents=where)
        writer.close()
    with tempfile.TemporaryDirectory() as name:
        unpack(io.BytesIO(output.getvalue()), Path(name, "out"))
        with open(os.fsencode(name) + b"/out/f\xff", "rb") as file:
            assert os.fstat(file.fileno()).st_size == end + tail
            for offset, length in where:
                assert os.pread(file.fileno(), length, offset) == b"x" * length
                assert os.pread(file.fileno(), 1, offset - 1) == b"\0"


def test_holes_take_no_space_and_are_read_by_gnu_tar(tmp_path: Path) -> None:
    with (tmp_path / "a.tar.zst").open("wb") as output, ArchiveWriter(output, threads=2) as writer:
        writer.add_file(b"big", 9 << 30, [b"a" * 512, b"b"], extents=[(4096, 512), (8 << 30, 1)])
        writer.add_file(b"only-hole", 1 << 20, [], extents=[])
        writer.close()
    unpack(tmp_path / "a.tar.zst", tmp_path / "out")
    (tmp_path / "gnu").mkdir()
    subprocess.run(["tar", "--zstd", "-xf", tmp_path / "a.tar.zst", "-C", tmp_path / "gnu"], check=True)
    for folder in (tmp_path / "out", tmp_path / "gnu"):
        status = (folder / "big").stat()
        assert status.st_size == 9 << 30
        assert status.st_blocks * 512 < 1 << 20
        with (folder / "big").open("rb") as file:
            assert os.pread(file.fileno(), 514, 4095) == b"\0" + b"a" * 512 + b"\0"
            assert os.pread(file.fileno(), 2, (8 << 30) - 1) == b"\0b"
        assert (folder / "only-hole").stat().st_size == 1 << 20


def test_hard_links_stay_hard_links(tmp_path: Path) -> None:
    output = io.BytesIO()
    with ArchiveWriter(output) as writer:
        writer.add_file(b"first", 3, [b"abc"])
        writer.add_hard_link(b"second", b"first")
        writer.close()
    unpacked(output.getvalue(), tmp_path / "out")
    assert (tmp_path / "out" / "first").samefile(tmp_path / "out" / "second")


def test_writer_notices_contents_of_the_wrong_length() -> None:
    with ArchiveWriter(io.BytesIO()) as writer, pytest.raises(ValueError, match="announced"):
        writer.add_file(b"f", 10, [b"short"])


def test_writer_stops_at_its_bound() -> None:
    with ArchiveWriter(io.BytesIO(), max_bytes=10_000) as writer, pytest.raises(NoSpace):
        writer.add_file(b"f", 1 << 20, [os.urandom(1 << 20)])


# --- what cannot be packed ---


@pytest.mark.parametrize("target", ["/etc/passwd", "../outside", "sub/../../outside", "sub/link/../../.."])
def test_link_out_of_the_folder_is_refused_by_name(source: Path, tmp_path: Path, target: str) -> None:
    (source / "bad").symlink_to(target)
    with pytest.raises(InvalidInput, match="bad"):
        pack_folder(source, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_fifo_is_refused_by_name(source: Path) -> None:
    os.mkfifo(source / "pipe")
    with pytest.raises(InvalidInput, match="pipe"):
        pack_folder(source, io.BytesIO())


def test_too_large_a_folder_is_refused(source: Path) -> None:
    with pytest.raises(InvalidInput, match="more than"):
        pack_folder(source, io.BytesIO(), max_bytes=1000)


def test_file_that_shrinks_while_packed_is_refused(source: Path) -> None:
    def shrink(done: int) -> None:
        os.truncate(source / "sub" / ("x" * 200), 10)

    big = source / "sub" / ("x" * 200)
    real = archive._pieces

    def pieces(file, size):
        if size > 1 << 20:
            os.truncate(big, 10)
        return real(file, size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(archive, "_pieces", pieces)
        with pytest.raises(InvalidInput, match="changed"):
            pack_folder(source, io.BytesIO())


# --- hostile archives ---


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "a/../b"])
def test_name_that_leaves_refuses_the_archive(tmp_path: Path, name: str) -> None:
    with pytest.raises(BadArchive):
        unpacked(packed_tar(member("good", data=b"x"), member(name, data=b"x")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_file_is_never_written_through_a_link(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    data = packed_tar(member("d", tarfile.SYMTYPE, link=str(outside)), member("d/evil", data=b"x"))
    report = unpacked(data, tmp_path / "out")
    assert list(outside.iterdir()) == []
    assert (tmp_path / "out" / "d").is_dir()
    assert not (tmp_path / "out" / "d").is_symlink()
    assert report.dropped == (("d", "appears twice"),)


@pytest.mark.parametrize(
    ("links", "leaving"),
    [
        ({"a": "/etc"}, {"a"}),
        ({"a": "../x"}, {"a"}),
        ({"d/a": "../x"}, set()),
        ({"d/a": "../../x"}, {"d/a"}),
        ({"a": "b/../../x"}, {"a"}),
        ({"p/q/d": "../..", "p/q/l": "d/../x"}, {"p/q/l"}),
        ({"up": "d/e", "d/e": "../..", "x": "up/y"}, {"up", "d/e", "x"}),
        ({"a": "b", "b": "a"}, {"a", "b"}),
        ({"a": "a"}, {"a"}),
        ({"a": "nowhere/at/all"}, set()),
        ({"a": "."}, set()),
    ],
)
def test_links_that_leave_are_found_by_walking_as_the_kernel_does(links: dict[str, str], leaving: set[str]) -> None:
    assert links_that_leave(links) == leaving


@SLOW
@given(
    st.dictionaries(st.sampled_from("abcd"), st.lists(st.sampled_from(["a", "b", "c", "d", "..", "."]), max_size=5).map("/".join))
)
def test_no_accepted_link_leads_out(links: dict[str, str]) -> None:
    links = {f"{name}/{name}" if name in "cd" else name: target or "." for name, target in links.items()}
    links = {name: target for name, target in links.items() if name[0] not in links}
    leaving = links_that_leave(links)
    with tempfile.TemporaryDirectory() as name:
        root = os.path.realpath(name) + "/root"
        os.makedirs(root)
        for link, target in links.items():
            if link not in leaving:
                os.makedirs(os.path.dirname(f"{root}/{link}"), exist_ok=True)
                os.symlink(target, f"{root}/{link}")
        for link in links.keys() - leaving:
            assert os.path.realpath(f"{root}/{link}").startswith(root)


def test_leaving_links_are_reported_and_not_made(tmp_path: Path) -> None:
    data = packed_tar(
        member("a", tarfile.SYMTYPE, link="../../etc"), member("b", tarfile.SYMTYPE, link="c"), member("c", data=b"x")
    )
    report = unpacked(data, tmp_path / "out")
    assert report.refused_links == (("a", "../../etc"),)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["b", "c"]


@pytest.mark.parametrize("target", ["/etc/passwd", "../../etc/passwd", "later", "link", "nowhere"])
def test_hard_link_reaches_only_files_of_the_archive(tmp_path: Path, target: str) -> None:
    data = packed_tar(
        member("link", tarfile.SYMTYPE, link="/etc/passwd"), member("h", tarfile.LNKTYPE, link=target), member("later", data=b"x")
    )
    try:
        report = unpacked(data, tmp_path / "out")
    except BadArchive:
        assert not (tmp_path / "out").exists()
    else:
        assert not (tmp_path / "out" / "h").exists()
        assert report.dropped[0][0] == "h"


def test_devices_are_dropped_and_reported(tmp_path: Path) -> None:
    kinds = {"chr": tarfile.CHRTYPE, "blk": tarfile.BLKTYPE, "fifo": tarfile.FIFOTYPE}
    report = unpacked(packed_tar(*(member(name, kind) for name, kind in kinds.items()), member("f", data=b"1")), tmp_path / "out")
    assert {name for name, _ in report.dropped} == set(kinds)
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["f"]


def test_setuid_setgid_and_sticky_are_dropped(tmp_path: Path) -> None:
    data = packed_tar(member("f", data=b"x", mode=0o6755), member("d", tarfile.DIRTYPE, mode=0o3777))
    unpacked(data, tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out" / "f").stat().st_mode) == 0o755
    assert stat.S_IMODE((tmp_path / "out" / "d").stat().st_mode) == 0o777


def test_second_member_of_a_name_is_dropped(tmp_path: Path) -> None:
    data = packed_tar(member("f", data=b"first"), member("./f", data=b"second"), member("f", tarfile.SYMTYPE, link="x"))
    report = unpacked(data, tmp_path / "out")
    assert (tmp_path / "out" / "f").read_bytes() == b"first"
    assert len(report.dropped) == 2


def test_read_only_folder_is_filled_and_then_closed(tmp_path: Path) -> None:
    unpacked(packed_tar(member("d", tarfile.DIRTYPE, mode=0o500), member("d/f", data=b"x")), tmp_path / "out")
    assert stat.S_IMODE((tmp_path / "out" / "d").stat().st_mode) == 0o500
    assert (tmp_path / "out" / "d" / "f").read_bytes() == b"x"


def test_file_used_as_a_folder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadArchive):
        unpacked(packed_tar(member("f", data=b"x"), member("f/g", data=b"x")), tmp_path / "out")


@pytest.mark.parametrize(
    ("limits", "members"),
    [
        ({"bytes": 1000}, [member("f", data=b"x" * 1001)]),
        ({"bytes": 1000}, [member("f", data=b"x" * 600), member("g", data=b"x" * 600)]),
        ({"files": 3}, [member(f"f{i}") for i in range(4)]),
        ({"depth": 3}, [member("a/b/c/d", data=b"")]),
        ({"name_bytes": 100}, [member("a" * 101, data=b"")]),
    ],
)
def test_limits_refuse_and_leave_nothing(tmp_path: Path, limits: dict[str, int], members: list) -> None:
    with pytest.raises(BadArchive):
        unpacked(packed_tar(*members), tmp_path / "out", **limits)
    assert list(tmp_path.iterdir()) == []


def test_zeros_that_unpack_to_terabytes_stop_at_the_limit(tmp_path: Path) -> None:
    header = archive._member_header(b"bomb", b"0", 0o644, 0, 1 << 40, b"", -1)
    compressor = zstd.ZstdCompressor()
    data = compressor.compress(header) + b"".join(compressor.compress(bytes(1 << 20)) for _ in range(40))
    with pytest.raises(BadArchive, match="more than"):
        unpacked(data, tmp_path / "out", bytes=10 << 20)
    assert list(tmp_path.iterdir()) == []


def test_frame_that_asks_for_much_memory_is_refused(tmp_path: Path) -> None:
    parameter = zstd.CompressionParameter
    data = zstd.compress(os.urandom(1 << 16), options={parameter.window_log: 30, parameter.content_size_flag: 0})
    compressor = zstd.ZstdCompressor(options={parameter.window_log: 30})
    data = compressor.compress(os.urandom(1 << 16)) + compressor.flush()
    with pytest.raises(BadArchive):
        unpacked(data, tmp_path / "out")


def test_archive_cut_anywhere_is_refused(source: Path, tmp_path: Path) -> None:
    shutil.rmtree(source / "sub")
    output = io.BytesIO()
    pack_folder(source, output)
    whole = output.getvalue()
    for end in range(len(whole)):
        with pytest.raises(BadArchive):
            unpacked(whole[:end], tmp_path / "out")
    tar = zstd.decompress(whole)
    for end in range(0, len(tar), 256):
        with pytest.raises(BadArchive):
            unpacked(zstd.compress(tar[:end]), tmp_path / "out")
    with pytest.raises(BadArchive, match="follows"):
        unpacked(whole + b"x", tmp_path / "out")
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def small_tar() -> bytes:
    output = io.BytesIO()
    with ArchiveWriter(output) as writer:
        writer.add_folder(b"d")
        writer.add_file(b"d/f\xff", 700, [b"x" * 700])
        writer.add_file(b"s", 1 << 20, [b"yy"], extents=[(5, 1), (100, 1)])
        writer.add_hard_link(b"h", b"s")
        writer.add_symlink(b"l" * 120, b"d/f")
        writer.close()
    return zstd.decompress(output.getvalue())


SMALL_TAR = small_tar()


def resummed(tar: bytearray) -> bytes:
    """Put right the sums of all blocks that look like headers, so that fuzzing gets past them."""
    for at in range(0, len(tar) - 511, 512):
        if tar[at + 257 : at + 262] == b"ustar":
            tar[at + 148 : at + 156] = b" " * 8
            tar[at + 148 : at + 156] = b"%06o\0 " % sum(tar[at : at + 512])
    return bytes(tar)


@settings(max_examples=200, deadline=None)
@given(
    changes=st.lists(
        st.tuples(st.integers(0, len(SMALL_TAR) - 1), st.one_of(st.sampled_from(b"0123456789/.\n =\0\xff"), st.integers(0, 255))),
        min_size=1,
        max_size=6,
    )
)
def test_mutated_archive_is_refused_or_stays_inside(changes: list[tuple[int, int]]) -> None:
    tar = bytearray(SMALL_TAR)
    for at, value in changes:
        tar[at] = value
    with tempfile.TemporaryDirectory() as name:
        try:
            unpacked(zstd.compress(resummed(tar)), Path(name, "out"), apparent_bytes=1 << 30)
        except BadArchive:
            assert os.listdir(name) == []
        else:
            assert os.listdir(name) == ["out"]


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=2000))
def test_random_bytes_are_refused(data: bytes) -> None:
    with tempfile.TemporaryDirectory() as name:
        for archive_bytes in (data, zstd.compress(data)):
            with pytest.raises(BadArchive):
                unpacked(archive_bytes, Path(name, "out"))
        assert os.listdir(name) == []


def sparse_member(text: bytes, real_size: int, content: bytes = b"") -> bytes:
    """Return an archive of one sparse file with a map made by hand."""
    text += bytes(-len(text) % 512)
    size = len(text) + len(content)
    tar = archive._member_header(b"s", b"0", 0o644, 0, size, b"", real_size) + text + content
    return zstd.compress(tar + bytes(-size % 512 + 1024))


@pytest.mark.parametrize(
    "text",
    [
        b"2\n100\n1\n0\n1\n",
        b"1\n999999\n2\n",
        b"1\n0\n50\n",
        b"99999999999\n",
        b"3\n0\n",
        b"-1\n",
        b"1\n0x1\n1\n",
        b"\n\n\n",
        b"",
    ],
)
def test_sparse_map_that_lies_is_refused(tmp_path: Path, text: bytes) -> None:
    with pytest.raises(BadArchive):
        unpacked(sparse_member(text, 1000, b"xy"), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


# --- where it goes ---


def test_something_at_the_destination_is_not_touched(tmp_path: Path) -> None:
    data = packed_tar(member("f", data=b"x"))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    (tmp_path / "file").write_text("mine")
    (tmp_path / "link").symlink_to("full")
    for name in ("full", "file", "link"):
        with pytest.raises(Conflict):
            unpacked(data, tmp_path / name)
    assert (tmp_path / "full" / "mine").read_text() == "mine"
    assert len(list(tmp_path.iterdir())) == 3


def test_empty_folder_is_replaced_but_not_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "empty").mkdir()
    unpacked(packed_tar(member("f", data=b"x")), tmp_path / "empty")
    assert (tmp_path / "empty" / "f").read_bytes() == b"x"
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(Conflict, match="working directory"):
        unpacked(packed_tar(member("f", data=b"x")), Path())


def test_missing_parent_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="nowhere"):
        unpacked(packed_tar(member("f", data=b"x")), tmp_path / "nowhere" / "out")


def test_disk_full_is_no_space_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(output, data) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(archive, "write_all", full)
    with pytest.raises(NoSpace):
        unpacked(packed_tar(member("d/f", data=b"x")), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "in").mkdir()
    with pytest.raises(NoSpace):
        pack_folder(tmp_path / "in", tmp_path / "a")
    assert [p.name for p in tmp_path.iterdir()] == ["in"]


def test_progress_that_raises_stops_and_leaves_nothing(tmp_path: Path) -> None:
    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        unpack(io.BytesIO(packed_tar(member("d/f", data=b"x" * 10))), tmp_path / "out", progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("part", "holds"),
    [
        ("a.txt", True),
        ("a:b", False),
        ("NUL", False),
        ("com1.txt", False),
        ("a.", False),
        ("a ", False),
        ("a\\b", False),
        ("ü", True),
    ],
)
def test_names_that_windows_cannot_hold(part: str, holds: bool) -> None:
    assert archive._windows_holds(part) is holds


def test_printable_names_are_safe_for_terminals() -> None:
    assert printable(b"a\x1b[2J\xff\n") == "a\\x1b[2J\\udcff\\n"
    assert printable("größe") == "größe"


def test_large_numbers_are_written_as_records(tmp_path: Path) -> None:
    rng = random.Random(1)
    for size in (8**11 - 1, 8**11, 1 << 44):
        header = archive._member_header(b"f", b"0", 0o644, rng.randrange(1 << 40), size, b"", -1)
        with tarfile.open(fileobj=io.BytesIO(header)) as tar:
            info = tar.next()
            assert info is not None
            assert info.size == size


def test_report_types() -> None:
    report: PackReport = pack_folder(Path(__file__).parent, io.BytesIO())
    check: Callable[[int], None] = [].append
    check(report.files)
    assert len(report.archive_sha256) == 64
