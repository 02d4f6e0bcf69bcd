"""Debian disks: what is refused before a build, what its errors tell, how the disk is laid out. tests/system builds and boots one."""

from __future__ import annotations

import os
import stat
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest

from deskgrid.errors import DeskgridError, InvalidInput, OperatorError
from deskgrid.templates import debian_disk
from deskgrid.templates.debian import debian_recipe
from deskgrid.templates.debian_disk import REQUIRED_FILES, REQUIRED_TOOLS, build_disk, missing_tools
from deskgrid.units import GIB, MIB


@pytest.fixture
def tools(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all of PATH, with every tool in it doing nothing."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name in (*REQUIRED_TOOLS, "apt-config", "newuidmap"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(folder))
    replies(folder, "unshare", 'shift; exec "$@"')
    boot = tmp_path / "boot.img"
    boot.write_bytes(bytes(range(256)) * 2)
    monkeypatch.setattr(debian_disk, "_BOOT_SECTOR", boot)
    monkeypatch.setattr(debian_disk, "REQUIRED_FILES", {boot: "grub-pc-bin"})
    monkeypatch.setattr(debian_disk, "set_times", lambda disk, offset, **times: None)  # there is no file system
    monkeypatch.setattr(debian_disk, "_own_release", lambda: "bookworm")
    replies(folder, "apt-get", "echo http://mirror.example/debian bookworm main; echo http://ubuntu.example bookworm universe")
    replies(folder, "grub-mkimage", 'while [ "$1" != -o ]; do shift; done; echo the core >"$2"')
    return folder


def replies(folder: Path, name: str, script: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{script}\n")


# ---- the recipe


def test_packages_are_installed_once_and_in_one_order() -> None:
    recipe = debian_recipe(["zsh", "apache2", "rsync", "zsh"])
    assert recipe.packages[-2:] == ("apache2", "zsh")
    assert len(recipe.packages) == len(set(recipe.packages))
    assert recipe == debian_recipe(["apache2", "zsh"])


@pytest.mark.parametrize("name", ["", "x", "Apache2", "a b", "a,b", "--no-check", "a;reboot", "../a", "a=1.0", "a\n"])
def test_name_that_no_package_can_have_is_refused(name: str) -> None:
    with pytest.raises(InvalidInput, match="not the name of a package"):
        debian_recipe([name])


@pytest.mark.parametrize("size_bytes", [0, 512 * MIB, 2000 * GIB])
def test_size_out_of_bounds_is_refused_with_the_bounds(size_bytes: int) -> None:
    with pytest.raises(InvalidInput, match="between 1GiB and 1TiB"):
        debian_recipe(size_bytes=size_bytes)


def test_scripts_of_the_template_are_shell() -> None:
    scripts = {path: text for path, text in debian_recipe().files.items() if text.startswith("#!")}
    assert set(scripts) >= {"/etc/deskgrid/start-ssh", "/usr/lib/deskgrid/start-agent"}
    for path, text in {**scripts, "commands": debian_recipe().commands}.items():
        checked = subprocess.run(["sh", "-n"], input=text, text=True, capture_output=True, check=False)
        assert (checked.returncode, checked.stderr) == (0, ""), path


# ---- the disk


def test_disk_has_the_boot_loader_before_its_one_active_partition(tools: Path, tmp_path: Path) -> None:
    disk = debian_disk._make_disk(tmp_path / "disk", b"core" * 1000, 2 * GIB)
    with disk.open("rb") as file:
        record, core = file.read(512), file.read(4000)
    assert record[:440] == (tmp_path / "boot.img").read_bytes()[:440]
    assert struct.unpack("<B3xB3xII", record[446:462]) == (0x80, 0x83, 2048, 2 * GIB // 512 - 2048)
    assert record[462:] == bytes(48) + b"\x55\xaa"
    assert core == b"core" * 1000
    assert (disk.stat().st_size, disk.stat().st_blocks * 512 < MIB) == (2 * GIB, True)


def test_boot_loader_that_does_not_fit_before_the_partition_is_refused(tools: Path, tmp_path: Path) -> None:
    with pytest.raises(OperatorError, match="does not fit"):
        debian_disk._make_disk(tmp_path / "disk", bytes(MIB), 2 * GIB)


def test_files_are_roots_and_scripts_can_be_executed(tmp_path: Path) -> None:
    debian_disk._write_files(tmp_path / "tar", {"/etc/run": "#!/bin/sh\n", "/etc/name": "ü\n"})
    with tarfile.open(tmp_path / "tar") as tar:
        found = [(member.name, member.mode, member.uid, member.size) for member in tar]
    assert found == [("etc/run", 0o755, 0, 10), ("etc/name", 0o644, 0, 3)]


# ---- the build


def test_missing_tools_are_named_with_the_line_that_installs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(debian_disk, "find_program", lambda name: None)
    assert set(missing_tools()) >= set(REQUIRED_TOOLS)
    with pytest.raises(OperatorError, match="mmdebstrap") as caught:
        build_disk(tmp_path / "out" / "debian.qcow2", tmp_path / "cache", debian_recipe())
    assert caught.value.hint.startswith("sudo apt-get install --no-install-recommends apt e2fsprogs")
    assert not list(tmp_path.iterdir())


def test_missing_boot_sector_is_named_with_its_package(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert list(REQUIRED_FILES.values()) == ["grub-pc-bin"]
    monkeypatch.setattr(debian_disk, "REQUIRED_FILES", {tmp_path / "gone": "grub-pc-bin"})
    assert missing_tools()[str(tmp_path / "gone")] == "grub-pc-bin"


def test_users_who_are_not_root_need_the_tools_of_namespaces_besides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    monkeypatch.setattr(debian_disk, "find_program", lambda name: None)
    assert missing_tools()["newuidmap"] == "uidmap"


def test_build_tells_how_far_it_is_and_writes_the_whole_disk_at_the_end(tools: Path, tmp_path: Path) -> None:
    """With an mmdebstrap that only talks."""
    replies(tools, "mmdebstrap", "for i in downloading extracting installing; do echo I: $i packages archives essential >&2; done")
    replies(tools, "qemu-img", 'while [ "$2" ]; do shift; done; echo the disk >"$1"')
    stages: list[tuple[str, float]] = []
    disk = tmp_path / "out" / "debian.qcow2"
    build_disk(disk, tmp_path / "cache", debian_recipe(), lambda stage, fraction: stages.append((stage, fraction)))
    fractions = [fraction for _, fraction in stages]
    assert fractions == sorted(fractions)
    assert (stages[0], stages[1], stages[-1]) == (("package lists", 0.0), ("packages", 0.05), ("done", 1.0))
    assert disk.read_text() == "the disk\n"
    assert [path.name for path in disk.parent.iterdir()] == ["debian.qcow2"]


def test_failed_build_leaves_the_disk_that_was_there(tools: Path, tmp_path: Path) -> None:
    replies(tools, "mmdebstrap", "echo I: running apt-get update >&2; echo E: it rains >&2; exit 25")
    disk = tmp_path / "out" / "debian.qcow2"
    disk.parent.mkdir()
    disk.write_text("an older disk")
    with pytest.raises(OperatorError) as caught:
        build_disk(disk, tmp_path / "cache", debian_recipe())
    assert caught.value.message == "mmdebstrap failed: E: it rains"
    assert (disk.read_text(), len(list(disk.parent.iterdir()))) == ("an older disk", 1)


def test_lists_that_name_packages_which_are_gone_are_fetched_anew(tools: Path, tmp_path: Path) -> None:
    """The first run, with the lists of the cache, ends as apt does then; the second asks for new ones."""
    replies(
        tools,
        "mmdebstrap",
        f'echo "$@" >>{tmp_path}/runs; case "$*" in *--skip=update*) echo "E: Failed to fetch http://x/a.deb 404" >&2; exit 1 ;; esac',
    )
    replies(tools, "qemu-img", 'while [ "$2" ]; do shift; done; echo the disk >"$1"')
    cache = tmp_path / "cache"
    build_disk(tmp_path / "disk", cache, debian_recipe())
    (stamp,) = cache.glob("lists-*.stamp")
    (stamp.with_suffix("") / "deb_Packages").touch()
    build_disk(tmp_path / "disk", cache, debian_recipe())
    runs = (tmp_path / "runs").read_text().splitlines()
    assert ["--skip=update" in run for run in runs if "--mode=" in run] == [False, True, False]


def test_without_network_the_lists_of_the_cache_serve(tools: Path, tmp_path: Path) -> None:
    replies(
        tools, "mmdebstrap", 'case "$*" in *--skip=update*) ;; *) echo "E: Could not resolve mirror.example" >&2; exit 1 ;; esac'
    )
    replies(tools, "qemu-img", 'while [ "$2" ]; do shift; done; echo the disk >"$1"')
    with pytest.raises(OperatorError, match="could not be fetched"):
        build_disk(tmp_path / "disk", tmp_path / "cache", debian_recipe())
    (lists,) = (tmp_path / "cache").glob("lists-*")
    (lists / "deb_Packages").touch()
    build_disk(tmp_path / "disk", tmp_path / "cache", debian_recipe())
    assert (tmp_path / "disk").exists()


def test_lists_that_apt_does_not_have_are_fetched_for_the_build_alone(tools: Path, tmp_path: Path) -> None:
    own = tmp_path / "cache" / "lists"
    replies(
        tools,
        "apt-get",
        f'case "$*" in *lists={own}*update) echo >{own}/fetched ;; *lists={own}*) echo http://mirror.example bookworm main ;; esac',
    )
    replies(tools, "mmdebstrap", 'echo "E: with $*" >&2; exit 1')
    with pytest.raises(OperatorError, match=r"deb http://mirror\.example bookworm main"):
        build_disk(tmp_path / "disk", tmp_path / "cache", debian_recipe())
    assert (own / "fetched").exists()


def test_apt_that_knows_no_debian_is_told(tools: Path, tmp_path: Path) -> None:
    replies(tools, "apt-get", "echo http://ubuntu.example/ubuntu noble main")
    with pytest.raises(OperatorError, match="apt knows no Debian bookworm here"):
        build_disk(tmp_path / "disk", tmp_path / "cache", debian_recipe())


def test_only_the_newest_file_of_a_package_stays_in_the_cache(tmp_path: Path) -> None:
    for age, name in enumerate(["bc_2_amd64.deb", "bc_1_amd64.deb", "bc-doc_1_all.deb"]):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    debian_disk._drop_old_packages(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bc-doc_1_all.deb", "bc_2_amd64.deb"]


def test_user_without_further_user_ids_learns_how_to_get_them(tools: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    replies(tools, "unshare", "echo no line matching user >&2; exit 1")
    disk = tmp_path / "disk"
    disk.touch(0o600)
    with pytest.raises(OperatorError, match="no line matching user") as caught:
        debian_disk._give_to_mmdebstrap(disk)
    assert "usermod --add-subuids" in caught.value.hint
    assert stat.S_IMODE(disk.stat().st_mode) == 0o600


# ---- what mmdebstrap said


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        (
            ["E: Unable to locate package no-such", "E: Unable to locate package nor-this"],
            InvalidInput,
            "no package no-such, nor-this",
        ),
        (["E: Package 'virtual' has no installation candidate"], InvalidInput, "no package virtual"),
        (["mke2fs: Could not allocate block in ext2 filesystem while populating file system"], InvalidInput, "too small"),
        (["E: Failed to fetch http://mirror.example/x.deb  404"], debian_disk._NotFetched, "could not be fetched"),
        (["W: Could not resolve 'mirror.example'", "E: apt-get update failed"], debian_disk._NotFetched, "could not be fetched"),
        (["E: something else"], OperatorError, "mmdebstrap failed: E: something else"),
        ([], OperatorError, "mmdebstrap failed"),
    ],
)
def test_failure_is_told_in_words_of_the_user(said: list[str], kind: type[DeskgridError], told: str) -> None:
    error = debian_disk._explained(said)
    assert type(error) is kind
    assert told in error.message
