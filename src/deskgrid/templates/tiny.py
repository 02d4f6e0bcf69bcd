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
import struct
import subprocess
import tempfile
from collections.abc import Callable, Iterable
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
_NETWORK_MODULES = ("virtio_net",)
_EXTRAS = {
    "ssh": ("usr/sbin/dropbear", "usr/lib/sftp-server"),
    "rsync": ("usr/bin/rsync",),
}
"""Archives on the boot medium, not in the initrd, unpacked in a machine that offers ssh -> programs in them. rsync is apart since it
brings OpenSSL along, so that the server need not wait for it."""
_EXTRA_PACKAGES = (
    *("dropbear-bin", "openssh-sftp-server", "rsync"),
    *("libc6", "libcrypt1", "libtomcrypt1", "libtommath1", "libgmp10", "zlib1g"),
    *("libacl1", "liblz4-1", "libpopt0", "libssl3", "libxxhash0", "libzstd1"),
)
"""Those of the programs, and of the libraries that they need."""
_PT_LOAD, _PT_DYNAMIC, _DT_NEEDED, _DT_STRTAB = 1, 2, 1, 5
_LOADER = "ld-linux-x86-64.so.2"
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
    extra = _fetch(_EXTRA_PACKAGES, cache)
    with tempfile.TemporaryDirectory(prefix=".tiny-", dir=output) as folder:
        work = Path(folder)
        progress("unpack", 0.4)
        root = _unpack(packages, work / "root")
        extra_root = _unpack(extra, work / "extra")
        progress("file system", 0.6)
        _lay_out(root, work / "iso")
        _add_extras(extra_root, work / "iso")
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


def _fetch(names: Iterable[str], cache: Path) -> list[Path]:
    """Return the files of packages; downloads into the cache what is not there."""
    missing = [name for name in names if not _cached(cache, name)]
    if missing:
        _download(missing, cache)
    return [_cached(cache, name)[-1] for name in names]


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
    archive.file("etc/deskgrid/start-ssh", (importlib.resources.files(__package__) / "tiny-ssh.sh").read_bytes(), executable=True)
    archive.file("etc/passwd", b"root:*:0:0:root:/root:/bin/sh\n")
    archive.file("etc/group", b"root:x:0:\n")
    for name, wanted in (("order", _MODULES), ("network", _NETWORK_MODULES)):
        modules = _with_dependencies(root, wanted)
        for module in modules:
            archive.file(f"lib/modules/{_plain_name(module)}", _module_bytes(module))
        archive.file(f"lib/modules/{name}", "".join(f"{_plain_name(module)}\n" for module in modules).encode())
    return archive.finish()


def _add_extras(root: Path, iso: Path) -> None:
    """Put the archives of programs beside the kernel. They are unpacked one after the other, so what one has the next does without."""
    packed: dict[str, Path] = {}
    for name, programs in _EXTRAS.items():
        archive = CpioWriter()
        libraries = {} if packed else {_LOADER: _find_library(root, _LOADER)}
        for program in programs:
            archive.file(program, (root / program).read_bytes(), executable=True)
            _add_libraries(root, root / program, libraries)
        for library in sorted(libraries.keys() - packed.keys()):
            folder = "lib64" if library == _LOADER else "lib"
            archive.file(f"{folder}/{library}", libraries[library].read_bytes(), executable=library == _LOADER)
        packed |= libraries
        _write_packed(iso / f"{name}.cpio.gz", archive.finish())


def _add_libraries(root: Path, program: Path, found: dict[str, Path]) -> None:
    """Add the libraries that a program needs, and those that they need, by the names that it knows them by."""
    for name in _needed(program.read_bytes()):
        if name not in found and name != _LOADER:
            found[name] = _find_library(root, name)
            _add_libraries(root, found[name], found)


def _needed(program: bytes) -> list[str]:
    """Return the libraries that a program is linked to: the DT_NEEDED entries of a 64-bit ELF file (elf(5))."""
    start, size, count = struct.unpack_from("<Q14xHH", program, 32)
    headers = [struct.unpack_from("<II6Q", program, start + number * size) for number in range(count)]
    loaded = [(address, offset) for kind, _, offset, address, *_ in headers if kind == _PT_LOAD]
    dynamic = next((program[offset : offset + length] for kind, _, offset, _, _, length, *_ in headers if kind == _PT_DYNAMIC), b"")
    entries = list(struct.iter_unpack("<qQ", dynamic))
    names = next((value for tag, value in entries if tag == _DT_STRTAB), 0)
    address, offset = max(((address, offset) for address, offset in loaded if address <= names), default=(0, 0))
    begin = names - address + offset
    places = [begin + value for tag, value in entries if tag == _DT_NEEDED]
    return [program[place : program.index(b"\0", place)].decode() for place in places]


def _find_library(root: Path, name: str) -> Path:
    """Return the file of a library, which most often is a link."""
    for path in sorted(root.rglob(name)):
        if path.is_file():
            return path
    raise OperatorError(f"the packages have no {name}", hint="empty the cache folder and build again")


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
    _write_packed(iso / "initrd", _initrd(root))
    shutil.copyfile(_find(root, "isolinux.bin"), boot / "isolinux.bin")
    shutil.copyfile(_find(root / "usr/lib/syslinux/modules/bios", "ldlinux.c32"), boot / "ldlinux.c32")
    # PROMPT 1 would wait for ever on a serial port.
    (boot / "isolinux.cfg").write_text(
        f"PROMPT 0\nTIMEOUT 0\nDEFAULT tiny\nLABEL tiny\n KERNEL /vmlinuz\n INITRD /initrd\n APPEND {_KERNEL_ARGUMENTS}\n"
    )


def _write_packed(path: Path, data: bytes) -> None:
    path.write_bytes(gzip.compress(data, 9, mtime=0))


def _make_iso(root: Path, work: Path) -> Path:
    iso = work / "tiny.iso"
    for path in (*(work / "iso").rglob("*"), work / "iso"):
        path.chmod(0o755 if path.is_dir() else 0o644)
        os.utime(path, (int(_EPOCH), int(_EPOCH)))
    _run(
        *("xorriso", "-as", "mkisofs", "-quiet", "-V", "TINY", "-R", "-uid", "0", "-gid", "0"),
        *("-isohybrid-mbr", str(_find(root, "isohdpfx.bin"))),
        *("-b", "isolinux/isolinux.bin", "-c", "isolinux/boot.cat"),
        *("-no-emul-boot", "-boot-load-size", "4", "-boot-info-table"),
        *("-o", str(iso), str(work / "iso")),
    )
    return iso
