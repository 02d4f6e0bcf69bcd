"""The tiny template: Debian's cloud kernel, a static busybox and forty lines of shell, in an ISO that boots as CD and as disk.

It is made from the distribution's packages only, by an ordinary user, without network once they are in the cache. The same
packages give the same bytes. The agent is not in it: the worker puts that on every context disk (machines/context.py), so a
published template never goes stale.
"""

from __future__ import annotations

import gzip
import importlib.resources
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

from msgspec import Struct

from deskgrid.archive import zstd
from deskgrid.errors import OperatorError
from deskgrid.templates.cpio import CpioWriter

__all__ = ["REQUIRED_TOOLS", "Progress", "TinyBuild", "build_tiny", "missing_tools"]

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction (0 to 1) that is behind us."""

REQUIRED_TOOLS = {
    "apt-get": "apt",
    "apt-cache": "apt",
    "dpkg-deb": "dpkg",
    "xorriso": "xorriso",
    "qemu-img": "qemu-utils",
}
"""Program that the build runs -> Debian package that has it."""

_KERNEL_METAPACKAGES = ("linux-image-cloud-amd64", "linux-image-virtual")
"""Debian's, which boots fastest of its kernels (LZ4, few drivers) and has what a VM needs: PIIX, sd, sr, iso9660, ext4, virtio;
Ubuntu's (untested), which keeps its modules in a package of their own and compresses them."""
_PACKAGES = ("busybox-static", "isolinux", "syslinux-common")
_MODULES = ("virtio_pci", "virtio_blk", "ata_piix", "sd_mod", "sr_mod", "isofs")
"""Disks as IDE and virtio, and the context's file system; ext4 and serial ports are built in."""
_FOLDERS = ("proc", "sys", "dev", "run", "tmp", "root", "bin", "scratch", "context", "etc", "lib/modules")
_KERNEL_ARGUMENTS = "console=tty0 console=ttyS0,115200 quiet panic=-1 no_timer_check mitigations=off"
_EPOCH = "1577836800"
"""2020-01-01, UTC, in place of every time stamp."""
_TOOL_LIMIT_S = 300.0


class TinyBuild(Struct, frozen=True):
    """The files of a finished build: the same system to attach as CD, or as first disk."""

    iso: Path
    qcow2: Path


def missing_tools() -> dict[str, str]:
    """Return the part of REQUIRED_TOOLS that this machine lacks."""
    return {tool: package for tool, package in REQUIRED_TOOLS.items() if shutil.which(tool) is None}


def build_tiny(output: Path, cache: Path, progress: Progress = lambda stage, fraction: None) -> TinyBuild:
    """Make tiny.iso and tiny.qcow2 in folder `output`, keeping the packages in folder `cache`.

    Takes about 2 s with packages in the cache (no network then). Each file appears whole or not at all. Raise
    OperatorError if a tool or a package is missing, with the line that installs it.
    """
    _check_tools()
    output.mkdir(parents=True, exist_ok=True)
    progress("packages", 0.0)
    packages = _packages(cache)
    with tempfile.TemporaryDirectory(prefix=".tiny-", dir=output) as folder:
        work = Path(folder)
        progress("unpack", 0.4)
        root = _unpack(packages, work / "root")
        progress("file system", 0.6)
        _lay_out(root, work / "iso")
        progress("image", 0.7)
        iso = _make_iso(root, work)
        progress("disk", 0.9)
        # Uncompressed: a compressed base makes each boot three times as slow, and travels compressed anyway.
        _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(iso), str(work / "tiny.qcow2"))
        build = TinyBuild(iso=output / "tiny.iso", qcow2=output / "tiny.qcow2")
        iso.replace(build.iso)
        (work / "tiny.qcow2").replace(build.qcow2)
    progress("done", 1.0)
    return build


def _check_tools() -> None:
    missing = missing_tools()
    if missing:
        raise OperatorError(
            f"cannot build the tiny template without {', '.join(sorted(missing))}",
            hint=f"sudo apt-get install {' '.join(sorted(set(missing.values())))}",
        )


def _run(*command: str, cwd: Path | None = None) -> str:
    """Run a tool and return what it prints; OperatorError with its last words if it fails."""
    environment = dict(os.environ, SOURCE_DATE_EPOCH=_EPOCH, LC_ALL="C", TZ="UTC")
    try:
        done = subprocess.run(
            command, cwd=cwd, env=environment, capture_output=True, text=True, errors="replace", timeout=_TOOL_LIMIT_S
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OperatorError(f"{command[0]} did not run: {error}") from error
    if done.returncode != 0:
        words = " ".join(done.stderr.split())[-400:]
        raise OperatorError(f"{command[0]} failed: {words}", hint=f"it was run as: {' '.join(command)}")
    return done.stdout


# ---- packages


def _packages(cache: Path) -> list[Path]:
    """Return the package files, the kernel's first; downloads into the cache what is not there."""
    cache.mkdir(parents=True, exist_ok=True)
    wanted = [name for name in _PACKAGES if not _cached(cache, name)]
    if not _cached(cache, "linux-image-*"):
        wanted += _kernel_packages()
    if wanted:
        _download(wanted, cache)
    modules = _cached(cache, "linux-modules-*")[-1:]
    return [*(_cached(cache, name)[-1] for name in ("linux-image-*", *_PACKAGES)), *modules]


def _cached(cache: Path, name: str) -> list[Path]:
    return sorted(cache.glob(f"{name}_*.deb"))


def _kernel_packages() -> list[str]:
    """Return the package of this system's kernel for VMs, and that of its modules if they are apart."""
    for meta in _KERNEL_METAPACKAGES:
        kernel = _first_dependency(meta, "linux-image-")
        if kernel is not None:
            modules = _first_dependency(kernel, "linux-modules-")
            return [kernel, modules] if modules else [kernel]
    raise OperatorError(f"apt knows none of the packages {', '.join(_KERNEL_METAPACKAGES)}", hint="run: sudo apt-get update")


def _first_dependency(package: str, prefix: str) -> str | None:
    try:
        listing = _run("apt-cache", "depends", package)
    except OperatorError:
        return None
    match = re.search(rf"Depends: ({re.escape(prefix)}\d[\w.+-]+)", listing)
    return match[1] if match else None


def _download(names: list[str], cache: Path) -> None:
    """Fetch packages, verified by apt, with any user's rights; a broken download leaves nothing in the cache."""
    # As root, apt would fetch as user _apt, who may not write here.
    as_root = ["-o", "APT::Sandbox::User=root"] if os.geteuid() == 0 else []
    with tempfile.TemporaryDirectory(prefix=".download-", dir=cache) as folder:
        try:
            _run("apt-get", "--quiet", *as_root, "download", *names, cwd=Path(folder))
        except OperatorError as error:
            raise OperatorError(error.message, hint="check the network, then run: sudo apt-get update") from error
        for package in Path(folder).glob("*.deb"):
            package.replace(cache / package.name)


def _unpack(packages: list[Path], root: Path) -> Path:
    root.mkdir()
    for package in packages:
        _run("dpkg-deb", "-x", str(package), str(root))
    return root


# ---- the root file system


def _initrd(root: Path) -> bytes:
    archive = CpioWriter()
    for folder in _FOLDERS:
        archive.directory(folder)
    # The kernel opens it for init before /dev is mounted.
    archive.character_device("dev/console", 5, 1)
    archive.file("bin/busybox", _find(root, "busybox").read_bytes(), executable=True)
    archive.file("init", (importlib.resources.files(__package__) / "tiny-init.sh").read_bytes(), executable=True)
    archive.file("etc/passwd", b"root:*:0:0:root:/root:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\n")
    modules = _with_dependencies(root, _MODULES)
    for module in modules:
        archive.file(f"lib/modules/{_plain_name(module)}", _module_bytes(module))
    archive.file("lib/modules/order", "".join(f"{_plain_name(module)}\n" for module in modules).encode())
    return archive.finish()


def _find(root: Path, name: str) -> Path:
    for path in sorted(root.rglob(name)):
        if path.is_file() and not path.is_symlink():
            return path
    raise OperatorError(f"the packages have no {name}", hint="empty the cache folder and build again")


def _with_dependencies(root: Path, names: tuple[str, ...]) -> list[Path]:
    """Return module files such that each comes after what it needs. Modules built into the kernel are left out."""
    found = sorted([*root.rglob("*.ko"), *root.rglob("*.ko.zst")])
    files = {_plain_name(path).removesuffix(".ko").replace("-", "_"): path for path in found}
    ordered: dict[str, Path] = {}

    def visit(name: str) -> None:
        path = files.get(name)
        if path is None or name in ordered:
            return
        for needed in _depends(path):
            visit(needed)
        ordered[name] = path

    for name in names:
        visit(name)
    return list(ordered.values())


def _plain_name(module: Path) -> str:
    return module.name.removesuffix(".zst")


def _module_bytes(module: Path) -> bytes:
    """Return a module as busybox can load it: not compressed."""
    content = module.read_bytes()
    return zstd.decompress(content) if module.suffix == ".zst" else content


def _depends(module: Path) -> list[str]:
    """Return the modules that one needs, from its .modinfo section; so depmod is not needed."""
    match = re.search(rb"\0depends=([^\0]*)\0", _module_bytes(module))
    return [name.replace("-", "_") for name in match[1].decode().split(",") if name] if match else []


# ---- the image


def _lay_out(root: Path, iso: Path) -> None:
    boot = iso / "isolinux"
    boot.mkdir(parents=True)
    shutil.copyfile(_find(root, "vmlinuz-*"), iso / "vmlinuz")
    # The firmware reads slowly in software emulation: gzip saves 0.9 s of a boot from disk, and was better than LZ4.
    (iso / "initrd").write_bytes(gzip.compress(_initrd(root), 9, mtime=0))
    shutil.copyfile(_find(root, "isolinux.bin"), boot / "isolinux.bin")
    shutil.copyfile(_find(root / "usr/lib/syslinux/modules/bios", "ldlinux.c32"), boot / "ldlinux.c32")
    # PROMPT 1 would wait for ever on a serial port.
    (boot / "isolinux.cfg").write_text(
        f"PROMPT 0\nTIMEOUT 0\nDEFAULT tiny\nLABEL tiny\n KERNEL /vmlinuz\n INITRD /initrd\n APPEND {_KERNEL_ARGUMENTS}\n"
    )
    for path in (*iso.rglob("*"), iso):
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (int(_EPOCH), int(_EPOCH)))


def _make_iso(root: Path, work: Path) -> Path:
    iso = work / "tiny.iso"
    _run(
        *("xorriso", "-as", "mkisofs", "-quiet", "-V", "TINY", "-R", "-uid", "0", "-gid", "0"),
        *("-isohybrid-mbr", str(_find(root, "isohdpfx.bin"))),
        *("-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat"),
        *("-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"),
        *("-o", str(iso), str(work / "iso")),
    )
    return iso
