"""Results: what a guest left comes out whole, and what it forged does no harm."""

from __future__ import annotations

import asyncio
import errno
import os
import random
import re
import shutil
import stat
import subprocess
from pathlib import Path

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from deskgrid.archive import unpack
from deskgrid.errors import BadImage, InvalidInput, MachineFailed, NoSpace
from deskgrid.machines import results
from deskgrid.machines.disks import create_scratch
from deskgrid.machines.results import ExtractLimits, ResultReport, compile_globs, extract_results
from deskgrid.machines.sandbox import sandbox_status

SIZE = 64 << 20


def debugfs(image: Path, *commands: str) -> None:
    """Change an image as a hostile guest could."""
    script = image.with_suffix(".debugfs")
    script.write_text("\n".join(commands) + "\n")
    subprocess.run(["debugfs", "-w", "-f", str(script), str(image)], check=True, capture_output=True)


@pytest.fixture(scope="module")
def content(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the job left, and the agent's report."""
    folder = tmp_path_factory.mktemp("content")
    (folder / ".deskgrid").mkdir()
    (folder / ".deskgrid" / "exit").write_text("7\n")
    (folder / ".deskgrid" / "stdout").write_bytes(b"first" + b"o" * (1 << 20))
    (folder / ".deskgrid" / "stderr").write_text("err")
    (folder / "out" / "deep").mkdir(parents=True)
    (folder / "out" / "deep" / "a.root").write_bytes(random.Random(1).randbytes(3_000_000))
    (folder / "out" / "b.txt").write_text("text")
    (folder / "run.sh").write_text("#!/bin/sh\n")
    (folder / "run.sh").chmod(0o755)
    (folder / "größe").write_text("utf-8")
    Path(os.fsdecode(os.fsencode(folder) + b"/odd\xff\n")).write_bytes(b"odd")
    (folder / "link").symlink_to("out/b.txt")
    os.link(folder / "run.sh", folder / "second name")
    with (folder / "holes").open("wb") as file:
        file.write(b"start")
        file.seek(40 << 20)
        file.write(b"end")
    return folder


@pytest.fixture(scope="module")
def pristine(content: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    image = tmp_path_factory.mktemp("pristine") / "scratch.img"
    create_scratch(image, SIZE, content=content)
    return image


@pytest.fixture
def image(pristine: Path, tmp_path: Path) -> Path:
    copy = tmp_path / "scratch.img"
    subprocess.run(["cp", "--sparse=always", pristine, copy], check=True)
    return copy


async def extracted(image: Path, *paths: str, **limits: float) -> tuple[ResultReport, Path]:
    """Extract and unpack beside the image."""
    output = image.with_name("result.tar.zst")
    report = await extract_results(image, output, paths=paths or ("**",), limits=ExtractLimits(**limits))
    folder = image.with_name("unpacked")
    shutil.rmtree(folder, ignore_errors=True)
    unpack(output, folder)
    return report, folder


def leftovers(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} - {"scratch.img", "scratch.debugfs"}


async def test_result_is_what_the_job_left_without_the_agents_files(image: Path, content: Path) -> None:
    report, folder = await extracted(image)
    done = subprocess.run(["diff", "-r", "--no-dereference", content, folder], capture_output=True, text=True, check=False)
    assert done.stdout.splitlines() == [f"Only in {content}: .deskgrid"]
    assert stat.S_IMODE((folder / "run.sh").stat().st_mode) == 0o755
    assert (folder / "run.sh").samefile(folder / "second name")
    assert (folder / "holes").stat().st_blocks * 512 < 1 << 20
    assert (folder / "run.sh").stat().st_mtime == int((content / "run.sh").stat().st_mtime)
    assert report.clean
    assert report.dropped == ()


async def test_report_tells_exit_output_sizes_and_protections(image: Path) -> None:
    report, _ = await extracted(image)
    assert report.exit_code == 7
    assert report.stdout == b"o" * (1 << 20)
    assert report.stderr == b"err"
    archive = image.with_name("result.tar.zst")
    assert report.archive_bytes == archive.stat().st_size
    assert subprocess.check_output(["sha256sum", archive]).split()[0].decode() == report.archive_sha256
    assert 3_000_000 < report.bytes < 3_100_000
    assert set(report.protections) == set(sandbox_status())


async def test_same_image_gives_the_same_archive(image: Path) -> None:
    first, _ = await extracted(image)
    second, _ = await extracted(image, threads=1)
    assert first.archive_sha256 == second.archive_sha256


async def test_gnu_tar_reads_the_archive(image: Path, content: Path, tmp_path: Path) -> None:
    await extract_results(image, tmp_path / "r.tar.zst")
    (tmp_path / "gnu").mkdir()
    subprocess.run(["tar", "--zstd", "-xf", tmp_path / "r.tar.zst", "-C", tmp_path / "gnu"], check=True, capture_output=True)
    shutil.copytree(content / ".deskgrid", tmp_path / "gnu" / ".deskgrid")
    subprocess.run(["diff", "-r", "--no-dereference", content, tmp_path / "gnu"], check=True)


@pytest.mark.parametrize(
    ("paths", "expected"),
    [
        (("**",), {"out/deep/a.root", "out/b.txt", "run.sh", "größe", "odd\udcff\n", "link", "second name", "holes"}),
        (("**/*.root",), {"out/deep/a.root"}),
        (("out/*",), {"out/deep/a.root", "out/b.txt"}),
        (("out/*.txt",), {"out/b.txt"}),
        (("out",), {"out/deep/a.root", "out/b.txt"}),
        (("gr?ße", "[!a-k]un.sh"), {"größe", "run.sh"}),
        (("*",), {"out/deep/a.root", "out/b.txt", "run.sh", "größe", "odd\udcff\n", "link", "second name", "holes"}),
        (("nothing",), set()),
        ((".deskgrid/**",), set()),
    ],
)
async def test_patterns_select_files(image: Path, paths: tuple[str, ...], expected: set[str]) -> None:
    _, folder = await extracted(image, *paths)
    assert {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} == expected


@pytest.mark.parametrize("pattern", ["", "/", "../x", "a/../b", "[z-a]", "x" * 5000])
async def test_bad_pattern_is_the_callers_fault(image: Path, pattern: str) -> None:
    with pytest.raises(InvalidInput) as caught:
        await extract_results(image, image.with_name("r"), paths=(pattern,))
    assert not isinstance(caught.value, BadImage)


@pytest.mark.parametrize(
    ("pattern", "matching", "other"),
    [
        ("**", ["a", "a/b", ".x"], []),
        ("a/**", ["a/b", "a/b/c"], ["a", "b/a"]),
        ("**/a", ["a", "x/a", "x/y/a"], ["xa", "a/x"]),
        ("a/**/b", ["a/b", "a/x/b", "a/x/y/b"], ["ab", "a/xb"]),
        ("a*b", ["ab", "axxb", "a\nb"], ["a/b"]),
        ("a?b", ["axb"], ["a/b", "ab"]),
        ("[a-c]x", ["ax", "bx"], ["dx", "/x"]),
        ("[!a]x", ["bx"], ["ax", "/x"]),
        ("[]x", ["[]x"], ["x"]),
        ("a.b", ["a.b"], ["axb"]),
        ("/a/", ["a"], ["b"]),
        ("**/**/**/a", ["a", "x/a"], ["b"]),
    ],
)
def test_globs(pattern: str, matching: list[str], other: list[str]) -> None:
    expression = compile_globs((pattern,))
    assert [name for name in matching if not expression.fullmatch(name)] == []
    assert [name for name in other if expression.fullmatch(name)] == []


@settings(deadline=None)
@given(
    st.lists(st.text(alphabet="a*?[]!-/.\\^", min_size=1, max_size=12), min_size=1, max_size=3),
    st.text(alphabet="ab/.", max_size=12),
)
def test_any_pattern_compiles_or_is_refused(patterns: list[str], name: str) -> None:
    try:
        expression: re.Pattern[str] = compile_globs(tuple(patterns))
    except InvalidInput:
        return
    expression.fullmatch(name)


# --- hostile images ---


async def test_devices_fifos_and_setuid_bits_do_not_come_out(image: Path) -> None:
    debugfs(image, "mknod null c 1 3", "mknod disk b 8 0", "mknod pipe p", "set_inode_field run.sh mode 0106755")
    report, folder = await extracted(image)
    assert {name for name, _ in report.dropped} == {"null", "disk", "pipe"}
    assert stat.S_IMODE((folder / "run.sh").stat().st_mode) == 0o755


async def test_links_come_out_as_links_and_are_never_followed(image: Path) -> None:
    debugfs(
        image,
        "symlink passwd /etc/passwd",
        "symlink up ../../../etc",
        "rm .deskgrid/stdout",
        "symlink .deskgrid/stdout /etc/passwd",
    )
    report, folder = await extracted(image)
    assert report.stdout == b""
    assert not (folder / "passwd").is_symlink()
    listing = subprocess.check_output(["tar", "--zstd", "-tvf", image.with_name("result.tar.zst")]).decode()
    assert "passwd -> /etc/passwd" in listing


@pytest.mark.parametrize("name", [b"../../evil", b"a/b/c/evil"])
async def test_name_with_a_slash_is_dropped(image: Path, name: bytes) -> None:
    debugfs(image, "write /dev/null EVILEVIL__"[: len("write /dev/null ") + len(name)])
    data = image.read_bytes()
    old = b"EVILEVIL__"[: len(name)]
    assert data.count(old) == 1
    image.write_bytes(data.replace(old, name))
    report, _ = await extracted(image)
    assert report.dropped == ((name.decode(), "has a name that no file can have"),)


async def test_folder_that_contains_itself_is_taken_once(image: Path) -> None:
    debugfs(image, "link <2> out/loop", "link out out/deep/loop")
    report, folder = await extracted(image)
    assert {name for name, _ in report.dropped} == {"out/loop", "out/deep/loop"}
    assert (folder / "out" / "b.txt").read_text() == "text"


@pytest.mark.parametrize("code", ["256", "-1", "abc", "", "1 2", "0x1", "9" * 5000])
async def test_exit_file_without_sense_is_no_exit_code(image: Path, tmp_path: Path, code: str) -> None:
    (tmp_path / "exit").write_text(code)
    debugfs(image, "rm .deskgrid/exit", f"write {tmp_path / 'exit'} .deskgrid/exit")
    report = await extract_results(image, tmp_path / "r")
    assert report.exit_code is None


async def test_scratch_without_a_report_is_fine(tmp_path: Path) -> None:
    create_scratch(tmp_path / "scratch.img", SIZE)
    report, folder = await extracted(tmp_path / "scratch.img")
    assert (report.exit_code, report.stdout, report.files) == (None, b"", 0)
    assert list(folder.iterdir()) == []


async def test_damage_is_dropped_only_if_the_guest_was_killed(image: Path) -> None:
    debugfs(image, "set_inode_field out/b.txt block[0] 0", "set_inode_field out/b.txt block[1] 0xffffffff")
    debugfs(image, "set_super_value state 1")
    with pytest.raises(BadImage):
        await extracted(image)
    debugfs(image, "set_super_value state 0")
    report, folder = await extracted(image)
    assert [name for name, _ in report.dropped] == ["out/b.txt"]
    assert not report.clean
    assert (folder / "out" / "deep" / "a.root").exists()


@pytest.mark.parametrize("data", [b"", b"x" * 3000, bytes(1 << 20)])
async def test_what_is_no_file_system_is_refused_and_leaves_nothing(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "scratch.img").write_bytes(data)
    with pytest.raises(BadImage):
        await extract_results(tmp_path / "scratch.img", tmp_path / "r")
    assert leftovers(tmp_path) == set()


async def test_image_that_is_a_link_or_fifo_or_missing_is_refused(image: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(image)
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "fifo", "missing"):
        with pytest.raises(BadImage):
            await extract_results(tmp_path / name, tmp_path / "r")
    assert leftovers(tmp_path) == {"link", "fifo"}


@pytest.mark.parametrize(
    ("limits", "error", "words"),
    [
        ({"bytes": 1_000_000}, BadImage, "bytes"),
        ({"files": 5}, BadImage, "files"),
        ({"depth": 2}, BadImage, "deep"),
        ({"archive_bytes": 100_000}, NoSpace, "allowed"),
        ({"wall_s": 0.02}, BadImage, "0.02 s"),
    ],
)
async def test_limits_refuse_and_leave_nothing(image: Path, limits: dict[str, float], error: type, words: str) -> None:
    with pytest.raises(error, match=words):
        await extract_results(image, image.with_name("r"), limits=ExtractLimits(**limits))
    assert leftovers(image.parent) == set()
    assert psutil.Process().children() == []


async def test_cancelled_extraction_leaves_no_process_file_or_descriptor(image: Path) -> None:
    await extract_results(image, image.with_name("r"))
    image.with_name("r").unlink()
    before = len(os.listdir("/proc/self/fd"))
    for delay in (0.0, 0.02, 0.05):
        task = asyncio.create_task(extract_results(image, image.with_name("r")))
        await asyncio.sleep(delay)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert leftovers(image.parent) == set()
        assert psutil.Process().children() == []
    assert len(os.listdir("/proc/self/fd")) <= before


@pytest.mark.parametrize(
    ("code", "errors", "kind"),
    [(1, b"Traceback\nImportError: x\n", MachineFailed), (-11, b"", MachineFailed), (-24, b"", BadImage), (0, b"{}", BadImage)],
)
def test_end_of_a_broken_child_is_told_apart(code: int, errors: bytes, kind: type) -> None:
    with pytest.raises(kind):
        results._judge(results.Finished(code, b"", errors), 0, ExtractLimits())


def test_want_of_memory_in_the_child_is_the_images_fault() -> None:
    def greedy() -> ResultReport:
        raise MemoryError

    outcome = results._attempt(greedy)
    assert outcome.error == "BadImage"
    assert "memory" in outcome.message


def test_full_disk_in_the_child_is_no_space() -> None:
    def full() -> ResultReport:
        raise OSError(errno.ENOSPC, "No space left on device")

    assert results._attempt(full).error == "NoSpace"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "in" / "d").mkdir(parents=True)
    (folder / "in" / "d" / "f").write_bytes(b"x" * 3000)
    (folder / "in" / "l").symlink_to("d/f")
    options = ["-q", "-F", "-t", "ext4", "-b", "1024", "-I", "256", "-O", "^has_journal", "-N", "32", "-d", folder / "in"]
    subprocess.run(["mke2fs", *options, folder / "image", "1024"], check=True, capture_output=True)
    return (folder / "image").read_bytes()


@settings(max_examples=15, deadline=None)
@given(draw=st.data())
def test_mutated_image_never_breaks_the_worker(tiny: bytes, tmp_path_factory: pytest.TempPathFactory, draw) -> None:
    offsets = [at for at, byte in enumerate(tiny) if byte]
    data = bytearray(tiny)
    for _ in range(draw.draw(st.integers(1, 6))):
        data[offsets[draw.draw(st.integers(0, len(offsets) - 1))]] = draw.draw(st.integers(0, 255))
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "image").write_bytes(data)
    try:
        asyncio.run(extract_results(folder / "image", folder / "r", limits=ExtractLimits(wall_s=20, bytes=1 << 30)))
    except BadImage:
        assert not (folder / "r").exists()
    else:
        unpack(folder / "r", folder / "out")
