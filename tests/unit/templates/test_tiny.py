"""The tiny template is built the same each time, says what it lacks, and leaves nothing half done."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from deskgrid.errors import OperatorError
from deskgrid.machines.qcow2 import qcow2_virtual_size
from deskgrid.templates import tiny
from deskgrid.templates.tiny import REQUIRED_TOOLS, build_tiny, missing_tools
from deskgrid.testing.tiny_template import template_cache, tiny_template


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_same_packages_give_the_same_bytes_without_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = tiny_template()
    monkeypatch.setattr(tiny, "_download", lambda names, cache: pytest.fail(f"{names} were not in the cache"))
    stages: list[tuple[str, float]] = []
    second = build_tiny(tmp_path, template_cache() / "packages", lambda stage, fraction: stages.append((stage, fraction)))
    assert digest(first.iso) == digest(second.iso)
    assert digest(first.qcow2) == digest(second.qcow2)
    assert qcow2_virtual_size(second.qcow2) == second.iso.stat().st_size
    assert [fraction for _, fraction in stages] == sorted(fraction for _, fraction in stages)
    assert stages[0][1] == 0.0
    assert stages[-1][1] == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["tiny.iso", "tiny.qcow2"]


def test_missing_tools_are_named_with_the_line_that_installs_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert missing_tools() == REQUIRED_TOOLS
    with pytest.raises(OperatorError) as caught:
        build_tiny(tmp_path / "out", tmp_path / "cache")
    assert caught.value.hint == "sudo apt-get install apt dpkg qemu-utils xorriso"
    assert not (tmp_path / "out").exists()


def test_failed_tool_is_told_with_its_words_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = {"xorriso": "#!/bin/sh\necho no room on the disk >&2; exit 3\n"}
    for name, text in bad.items():
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    tiny_template()
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with pytest.raises(OperatorError, match="no room on the disk"):
        build_tiny(tmp_path / "out", template_cache() / "packages")
    assert not list((tmp_path / "out").iterdir())


def test_broken_download_leaves_no_package_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*command: str, cwd: Path | None = None) -> str:
        assert cwd is not None
        (cwd / "busybox-static_1_amd64.deb").write_bytes(b"half a pack")
        raise OperatorError("no network")

    monkeypatch.setattr(tiny, "_run", run)
    with pytest.raises(OperatorError, match="apt-get update"):
        tiny._download(["busybox-static"], tmp_path)
    assert not list(tmp_path.iterdir())


def test_compressed_modules_are_found_unpacked_and_in_order(tmp_path: Path):
    """As Ubuntu ships them."""
    from deskgrid.archive import zstd
    from deskgrid.templates import tiny

    plain = {"libata": b"\0depends=\0", "ata_piix": b"\0depends=libata\0"}
    for name, content in plain.items():
        (tmp_path / f"{name}.ko.zst").write_bytes(zstd.compress(content))
    found = tiny._with_dependencies(tmp_path, ("ata_piix", "built_in"))
    assert [tiny._plain_name(module) for module in found] == ["libata.ko", "ata_piix.ko"]
    assert [tiny._module_bytes(module) for module in found] == list(plain.values())


def test_programs_come_with_the_libraries_that_they_are_linked_to(tmp_path: Path) -> None:
    """As the linker of this system says."""
    program = Path(shutil.which("xorriso") or "")
    said = subprocess.run(["ldd", program], capture_output=True, text=True, check=True).stdout
    needed = tiny._needed(program.read_bytes())
    assert needed
    assert all(name in said for name in needed)
    assert tiny._needed(Path("/bin/sh").read_bytes()) == ["libc.so.6"]


def test_missing_library_is_named(tmp_path: Path) -> None:
    shutil.copy("/bin/sh", tmp_path / "program")
    with pytest.raises(OperatorError, match=r"libc\.so\.6"):
        tiny._add_libraries(tmp_path, tmp_path / "program", {})


def test_ssh_server_is_on_the_medium_and_not_in_the_initrd(tmp_path: Path) -> None:
    extract = ["xorriso", "-osirrox", "on", "-indev", str(tiny_template().iso), "-extract", "/", str(tmp_path / "iso")]
    subprocess.run(extract, capture_output=True, check=True)
    initrd, ssh, rsync = (
        gzip.decompress((tmp_path / "iso" / name).read_bytes()) for name in ("initrd", "ssh.cpio.gz", "rsync.cpio.gz")
    )
    assert b"usr/sbin/dropbear\0" in ssh
    assert b"lib/libc.so.6\0" in ssh
    assert b"usr/bin/rsync\0" in rsync
    assert b"lib/libc.so.6\0" not in rsync
    assert b"usr/sbin/dropbear\0" not in initrd
    assert b"etc/deskgrid/start-ssh\0" in initrd
    assert b"lib/modules/virtio_net.ko\0" in initrd
