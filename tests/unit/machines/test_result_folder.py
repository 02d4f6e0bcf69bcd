"""Results out of a folder: whole and in order, and what a job put there to do harm does none."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from deskgrid.archive import unpack
from deskgrid.errors import BadImage
from deskgrid.machines import results
from deskgrid.machines.ext4 import Run
from deskgrid.machines.folders import MOST_DEPTH, OutOfBounds, folder_bytes, remove_tree
from deskgrid.machines.result_folder import ResultFolder, Unreadable
from deskgrid.machines.results import ExtractLimits, ResultReport, extract_results
from deskgrid.machines.sandbox import Finished, sandbox_status


@pytest.fixture
def outcome(tmp_path: Path) -> Path:
    folder = tmp_path / "outcome"
    (folder / "scratch").mkdir(parents=True)
    (folder / "report").mkdir()
    (folder / "report" / "exit").write_text("7\n")
    (folder / "report" / "stdout").write_bytes(b"first" + b"o" * (1 << 20))
    (folder / "report" / "stderr").write_text("err")
    return folder


async def listed(outcome: Path, *paths: str, **limits: float) -> tuple[ResultReport, list[str]]:
    """Extract; return the report and the names of the members, as tar reads them."""
    output = outcome.with_name("result.tar.zst")
    report = await extract_results(outcome, output, paths=paths or ("**",), limits=ExtractLimits(**limits))
    names = subprocess.run(["tar", "--zstd", "-tf", output], capture_output=True, text=True, check=True).stdout
    return report, names.splitlines()


async def test_report_and_files_come_out_whole(outcome: Path, tmp_path: Path) -> None:
    scratch = outcome / "scratch"
    (scratch / "out" / "deep").mkdir(parents=True)
    (scratch / "out" / "deep" / "a.root").write_bytes(os.urandom(3_000_000))
    (scratch / "run.sh").write_text("#!/bin/sh\n")
    (scratch / "run.sh").chmod(0o4755)
    os.link(scratch / "run.sh", scratch / "second name")
    (scratch / "link").symlink_to("out/deep")
    Path(os.fsdecode(os.fsencode(scratch) + b"/odd\xff\n")).write_bytes(b"odd")
    with (scratch / "holes").open("wb") as file:
        file.write(b"start")
        file.seek(40 << 20)
        file.write(b"end")
    report, _ = await listed(outcome)
    assert (report.exit_code, report.stdout, report.stderr) == (7, b"o" * (1 << 20), b"err")
    assert (report.clean, report.dropped_count) == (True, 0)
    assert report.bytes < 4_000_000  # holes are not read
    target = tmp_path / "unpacked"
    unpack(outcome.with_name("result.tar.zst"), target)
    assert (target / "out" / "deep" / "a.root").read_bytes() == (scratch / "out" / "deep" / "a.root").read_bytes()
    assert (target / "holes").read_bytes() == (scratch / "holes").read_bytes()
    assert stat.S_IMODE((target / "run.sh").stat().st_mode) == 0o755
    assert (target / "run.sh").samefile(target / "second name")
    assert (target / "link").readlink() == Path("out/deep")
    assert set(report.protections) == set(sandbox_status())


async def test_only_what_the_patterns_say_is_taken(outcome: Path) -> None:
    (outcome / "scratch" / "out").mkdir()
    for name in ("a.root", "b.txt"):
        (outcome / "scratch" / "out" / name).write_text(name)
    _, names = await listed(outcome, "out/*.root")
    assert names == ["out/", "out/a.root"]


async def test_links_are_data_and_nothing_outside_is_read(outcome: Path, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "file").write_text("the owner's")
    for name, target in (
        ("folder", secret),
        ("file", secret / "file"),
        ("up", "../.."),
        ("self", "self"),
        ("proc", "/proc/self/fd"),
    ):
        (outcome / "scratch" / name).symlink_to(target)
    report, names = await listed(outcome)
    assert sorted(names) == ["file", "folder", "proc", "self", "up"]
    assert report.bytes == 0


async def test_scratch_that_became_a_link_is_refused(outcome: Path, tmp_path: Path) -> None:
    (outcome / "scratch").rmdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").write_text("x")
    (outcome / "scratch").symlink_to(tmp_path / "other")
    with pytest.raises(BadImage):
        await listed(outcome)


async def test_devices_fifos_and_sockets_are_dropped_without_waiting_for_them(outcome: Path) -> None:
    scratch = outcome / "scratch"
    os.mkfifo(scratch / "fifo")
    if os.geteuid() == 0:
        os.mknod(scratch / "device", 0o600 | stat.S_IFCHR, os.makedev(1, 5))
    folder = os.open(scratch, os.O_PATH)
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(f"/proc/self/fd/{folder}/socket")
    os.close(folder)
    (scratch / "file").write_text("x")
    report, names = await listed(outcome)
    assert names == ["file"]
    assert report.dropped_count == (3 if os.geteuid() == 0 else 2)


async def test_report_that_is_no_file_is_not_read(outcome: Path) -> None:
    (outcome / "report" / "exit").unlink()
    (outcome / "report" / "exit").symlink_to("/etc/hostname")
    (outcome / "report" / "stdout").unlink()
    os.mkfifo(outcome / "report" / "stdout")
    report, _ = await listed(outcome)
    assert (report.exit_code, report.stdout) == (None, b"")


@pytest.mark.parametrize(
    ("limits", "words"), [({"files": 5}, "more than 5 files"), ({"bytes": 50}, "more than 50 bytes"), ({"depth": 3}, "nested")]
)
async def test_what_is_past_a_limit_is_refused(outcome: Path, limits: dict[str, float], words: str) -> None:
    (outcome / "scratch" / "a" / "b" / "c" / "d").mkdir(parents=True)
    for number in range(10):
        (outcome / "scratch" / f"{number}").write_bytes(bytes(10))
    with pytest.raises(BadImage, match=words):
        await listed(outcome, **limits)
    assert not list(outcome.parent.glob("*result*"))


async def test_wide_trees_take_few_descriptors(outcome: Path) -> None:
    for number in range(300):
        (outcome / "scratch" / f"{number:03}" / "x" / "y").mkdir(parents=True)
        (outcome / "scratch" / f"{number:03}" / "x" / "y" / "file").write_text("x")
    report, names = await listed(outcome)
    assert (len(names), report.dropped_count) == (1200, 0)


async def test_deep_trees_take_few_descriptors(outcome: Path) -> None:
    place = outcome / "scratch"
    for _ in range(150):
        place = place / "d"
    place.mkdir(parents=True)
    (place / "file").write_text("x")
    report, names = await listed(outcome, depth=200)
    assert (len(names), report.dropped_count) == (151, 0)


# ---- while it is read, in our own process


def entry(folder: ResultFolder, name: bytes) -> int:
    """Return the number of an entry of the result."""
    return dict(folder.records(folder.root()))[name]


@pytest.fixture
def opened(outcome: Path) -> ResultFolder:
    return ResultFolder(os.open(outcome, os.O_RDONLY | os.O_DIRECTORY))


def test_file_that_vanished_or_became_a_link_is_unreadable(outcome: Path, opened: ResultFolder) -> None:
    file = outcome / "scratch" / "file"
    file.write_text("x")
    number = entry(opened, b"file")
    inode = opened.inode(number)
    file.unlink()
    with pytest.raises(Unreadable):
        opened.runs(inode)
    file.symlink_to("/etc/passwd")
    with pytest.raises(Unreadable):
        opened.runs(inode)
    file.unlink()
    file.write_text("another")
    with pytest.raises(Unreadable, match="replaced"):
        opened.runs(inode._replace(number=inode.number + 1))


def test_file_that_shrank_is_filled_up_with_zeros(outcome: Path, opened: ResultFolder) -> None:
    file = outcome / "scratch" / "file"
    file.write_bytes(b"x" * 100)
    inode = opened.inode(entry(opened, b"file"))
    assert opened.runs(inode) == [Run(0, 0, 100)]
    file.write_bytes(b"yy")
    piece = memoryview(bytearray(100))
    assert opened.read_into(piece, 0) == 2
    assert opened.read_into(piece[2:], 2) == 98
    assert piece == b"yy" + bytes(98)


def test_file_that_grew_is_read_as_long_as_it_was(outcome: Path, opened: ResultFolder) -> None:
    file = outcome / "scratch" / "file"
    file.write_bytes(b"x" * 100)
    inode = opened.inode(entry(opened, b"file"))
    file.write_bytes(b"y" * 1000)
    assert sum(run.length for run in opened.runs(inode)) == 100


def test_folder_that_became_a_link_is_unreadable(outcome: Path, opened: ResultFolder, tmp_path: Path) -> None:
    folder = outcome / "scratch" / "folder"
    folder.mkdir()
    inode = opened.inode(entry(opened, b"folder"))
    folder.rmdir()
    folder.symlink_to(tmp_path)
    with pytest.raises(Unreadable):
        list(opened.records(inode))


@given(
    pieces=st.lists(st.tuples(st.integers(0, 40), st.binary(min_size=1, max_size=9000)), max_size=6), end=st.integers(0, 200_000)
)
def test_runs_have_all_that_is_not_zero(
    tmp_path_factory: pytest.TempPathFactory, pieces: list[tuple[int, bytes]], end: int
) -> None:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "scratch").mkdir()
    file = folder / "scratch" / "file"
    with file.open("wb") as target:
        for place, data in pieces:
            target.seek(place * 4096)
            target.write(data)
        target.truncate(max(end, target.tell()))
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    opened = ResultFolder(descriptor)
    inode = opened.inode(entry(opened, b"file"))
    found = bytearray(inode.size_bytes)
    for run in opened.runs(inode):
        data = memoryview(bytearray(run.length))
        assert opened.read_into(data, run.source) == run.length
        found[run.offset : run.offset + run.length] = data
    assert found == file.read_bytes()
    os.close(descriptor)


# ---- size and removal of hostile folders


def test_size_counts_blocks_once_and_follows_no_link(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "file").write_bytes(os.urandom(1 << 20))
    os.link(folder / "file", folder / "again")
    (folder / "link").symlink_to("/usr")
    with (folder / "holes").open("wb") as file:
        file.truncate(1 << 40)
    assert 1 << 20 <= folder_bytes(str(folder)) < 2 << 20


def test_tree_of_any_depth_without_rights_is_removed(tmp_path: Path) -> None:
    folder = tmp_path / "folder"
    folder.mkdir()
    code = "import os\nfor _ in range(5000):\n    os.mkdir('d'); open('f', 'w').close(); os.chdir('d')\n"
    subprocess.run(["python3", "-c", code], cwd=folder, check=True)
    (folder / "removed-1").mkdir()
    (folder / "removed-2").write_text("")
    (folder / "closed" / "inner").mkdir(parents=True)
    (folder / "closed" / "inner").chmod(0)
    (folder / "closed").chmod(0)
    (folder / "link").symlink_to(tmp_path)
    with pytest.raises(OutOfBounds, match=str(MOST_DEPTH)):
        folder_bytes(str(folder))
    remove_tree(str(folder))
    assert list(tmp_path.iterdir()) == []


def test_results_module_knows_both(outcome: Path) -> None:
    with results._open_image(outcome) as descriptor:
        assert stat.S_ISDIR(os.fstat(descriptor).st_mode)


async def test_folder_of_which_nothing_is_wanted_is_read_without_a_child_and_leaves_no_archive(outcome: Path) -> None:
    async def run(*_: object, **__: object) -> Finished:
        raise AssertionError("a child is asked for")

    report = await extract_results(outcome, outcome.with_name("result.tar.zst"), paths=(), run=run)
    assert (report.exit_code, report.stdout, report.stderr) == (7, b"o" * (1 << 20), b"err")
    assert (report.files, report.archive_bytes) == (0, 0) and not outcome.with_name("result.tar.zst").exists()


async def test_report_that_is_no_file_of_its_folder_is_not_read(outcome: Path, tmp_path: Path) -> None:
    for name in ("exit", "stdout", "stderr"):
        (outcome / "report" / name).unlink()
    (tmp_path / "secret").write_text("0")
    (outcome / "report" / "exit").symlink_to(tmp_path / "secret")
    os.mkfifo(outcome / "report" / "stdout")
    (outcome / "report" / "stderr").mkdir()
    report = await extract_results(outcome, outcome.with_name("result.tar.zst"), paths=())
    assert (report.exit_code, report.stdout, report.stderr) == (None, b"", b"")
    (outcome / "report").rename(outcome / "real")
    (outcome / "report").symlink_to(outcome / "real")
    assert (await extract_results(outcome, outcome.with_name("result.tar.zst"), paths=())).exit_code is None
