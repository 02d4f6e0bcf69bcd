"""An ordinary Debian for tests: systemd, the stock cloud-init, GRUB, and nothing of ours in it.

It stands for the cloud image that a user brings. Like a cloud image it looks for NoCloud data only, boots from its own disk
and takes what it is to do from the context disk. Built once for all tests and kept in the cache of templates:

    sector 0        master boot record, GRUB's boot.img
    sectors 1-      GRUB's core.img, before the partition
    1 MiB-          one ext4 partition with the system

No loop device is used, and an ordinary user can build it (mmdebstrap's unshare mode). Packages come from where this
machine's apt takes its own.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import struct
import subprocess
import tempfile
from pathlib import Path

from deskgrid.errors import OperatorError
from deskgrid.machines.processes import find_program
from deskgrid.testing.tiny_template import template_cache
from deskgrid.units import MIB

__all__ = ["REQUIRED_FILES", "REQUIRED_TOOLS", "cloud_template"]

REQUIRED_TOOLS = {
    "apt-get": "apt",
    "mmdebstrap": "mmdebstrap",
    "grub-mkimage": "grub-common",
    "mke2fs": "e2fsprogs",
    "qemu-img": "qemu-utils",
}
"""Program that the build runs -> Debian package that has it."""
_TOOLS_OF_USERS = {"newuidmap": "uidmap"}
"""What is needed besides by a user who is not root."""
_BOOT_SECTOR = Path("/usr/lib/grub/i386-pc/boot.img")
REQUIRED_FILES = {_BOOT_SECTOR: "grub-pc-bin"}

_RELEASE = "bookworm"
_RELEASES = (_RELEASE, f"{_RELEASE}-updates", f"{_RELEASE}-security")
_PACKAGES = "linux-image-cloud-amd64,zstd,systemd-sysv,udev,dbus,ifupdown,openssh-server,sudo,cloud-init,cloud-guest-utils"
"""What Debian's own cloud images are made of, less editors, manuals and netplan.

A disk whose network is systemd-networkd's works too, but a machine without network card waits 120 s in it for one
(systemd-networkd-wait-online) before cloud-init goes on.
"""
_CLOUD_CONFIG = "datasource_list: [ NoCloud, None ]\n"
_FSTAB = "LABEL=cloudroot / ext4 defaults 0 1\n"
_GRUB_CONFIG = """\
set timeout=0
linux /vmlinuz root=LABEL=cloudroot ro console=tty0 console=ttyS0,115200
initrd /initrd.img
boot
"""
_GRUB_MODULES = ("biosdisk", "part_msdos", "ext2", "linux", "normal", "boot", "configfile")
_FIRST_BOOT = """\
set -eu
rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/apt/apt.conf.d/99mmdebstrap
rm -rf "$1"/var/lib/apt/lists/*
: >"$1/etc/machine-id"
"""
"""Makes it a disk that was never booted, without what it had for the build."""

_DISK_BYTES = 2048 * MIB
_PARTITION_BYTES = 1 * MIB
"""Where the only partition begins."""
_SECTOR_BYTES = 512
_BUILD_LIMIT_S = 1200.0


def cloud_template() -> Path:
    """Return the disk (qcow2, not compressed) made by the present recipe, building it in minutes if need be.

    Raise OperatorError, with the packages to install, if a tool is missing; also if apt knows no Debian bookworm.
    """
    folder = template_cache() / f"cloud-{_recipe()}"
    folder.mkdir(parents=True, exist_ok=True)
    disk = folder / "cloud.qcow2"
    # A lock of its own: whoever wants the tiny template need not wait minutes for this one.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not disk.exists():
            _build(disk)
    return disk


def _recipe() -> str:
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def _build(disk: Path) -> None:
    _check_tools()
    # In /tmp: mmdebstrap's other user must be able to come to the image, and the checkout may be closed to it.
    with tempfile.TemporaryDirectory(prefix="deskgrid-cloud-") as folder:
        work = Path(folder)
        work.chmod(0o755)
        raw = _make_disk(work / "disk.raw", _make_boot_loader(work))
        _make_system(raw, work)
        unfinished = disk.with_suffix(".new")
        _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(unfinished))
        unfinished.replace(disk)


def _check_tools() -> None:
    tools = REQUIRED_TOOLS if os.geteuid() == 0 else REQUIRED_TOOLS | _TOOLS_OF_USERS
    missing = {tool: package for tool, package in tools.items() if find_program(tool) is None}
    missing |= {str(path): package for path, package in REQUIRED_FILES.items() if not path.exists()}
    if missing:
        raise OperatorError(
            f"cannot build the cloud template without {', '.join(sorted(missing))}",
            hint=f"sudo apt-get install --no-install-recommends {' '.join(sorted(set(missing.values())))}",
        )


def _run(tool: str, *arguments: str) -> str:
    """Run a tool and return what it prints; OperatorError with its last words if it fails."""
    command = [find_program(tool) or tool, *arguments]
    environment = dict(os.environ, LC_ALL="C", PATH=f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin")
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, errors="replace", timeout=_BUILD_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OperatorError(f"{tool} did not run: {error}") from error
    if done.returncode != 0:
        raise OperatorError(f"{tool} failed: {done.stderr.strip()[-2000:]}", hint=f"it was run as: {' '.join(command)}")
    return done.stdout


# ---- the system


def _make_system(disk: Path, work: Path) -> None:
    """Install Debian into the partition of a disk."""
    settings = work / "apt.conf"
    settings.write_text(_apt_settings())
    mounted = work / "mounted"
    mounted.mkdir()
    if os.geteuid() != 0:
        # For the user that is root inside mmdebstrap, and as long as the build takes.
        disk.chmod(0o666)
        mounted.chmod(0o777)
    _run(
        "mmdebstrap",
        f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
        *("--variant=minbase", "--architectures=amd64", "--format=null", f"--include={_PACKAGES}"),
        f"--aptopt={settings}",
        *('--aptopt=APT::Install-Recommends "false"', "--dpkgopt=path-exclude=/usr/share/man/*"),
        *_write_hooks(work),
        f"--customize-hook={_FIRST_BOOT}",
        f"--customize-hook={_partition_hook(disk, mounted)}",
        *(_RELEASE, "-", *_apt_sources()),
    )


def _write_hooks(work: Path) -> list[str]:
    """Return options that put our few files into the system."""
    hooks = ['--customize-hook=mkdir -p "$1/boot/grub"']
    files = {
        "/etc/cloud/cloud.cfg.d/90_datasources.cfg": _CLOUD_CONFIG,
        "/etc/fstab": _FSTAB,
        "/etc/hostname": "cloud\n",
        "/boot/grub/grub.cfg": _GRUB_CONFIG,
    }
    for number, (target, text) in enumerate(files.items()):
        source = work / f"file-{number}"
        source.write_text(text)
        source.chmod(0o644)
        hooks.append(f"--customize-hook=upload {source} {target}")
    return hooks


def _partition_hook(disk: Path, mounted: Path) -> str:
    """Return shell that copies the system into the partition."""
    # A bind mount of its own leaves out what mmdebstrap has mounted in the system: /dev, /proc, the host's /dev/shm.
    return (
        f'set -eu; mount --bind "$1" {mounted}; '
        f"mke2fs -q -F -t ext4 -L cloudroot -m 0 -E nodiscard,offset={_PARTITION_BYTES} -d {mounted} {disk} "
        f"{(_DISK_BYTES - _PARTITION_BYTES) >> 10}k; umount {mounted}"
    )


def _apt_settings() -> str:
    """Return how this machine's apt reaches its sources, such as through a proxy."""
    settings = _run("apt-config", "dump", "--format", '%F "%v";%n', "Acquire").splitlines(keepends=True)
    return "".join(line for line in settings if re.match(r"Acquire::(https?::|Check-|Retries )", line))


def _apt_sources() -> list[str]:
    """Return, in apt's one-line form, where this machine takes Debian bookworm from."""
    listing = _run(
        "apt-get", "indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages", "Origin: Debian"
    )
    found = dict.fromkeys(line for line in listing.splitlines() if re.fullmatch(rf"\S+ (?:{'|'.join(_RELEASES)}) main", line))
    if not any(line.split()[1] == _RELEASE for line in found):
        raise OperatorError(f"apt knows no Debian {_RELEASE} here", hint="add it to apt's sources, then run: sudo apt-get update")
    return [f"deb {line}" for line in found]


# ---- the disk


def _make_boot_loader(work: Path) -> bytes:
    core = work / "core.img"
    _run("grub-mkimage", "-O", "i386-pc", "-o", str(core), "-p", "(hd0,msdos1)/boot/grub", *_GRUB_MODULES)
    return core.read_bytes()


def _make_disk(disk: Path, core: bytes) -> Path:
    """Make a disk with boot loader and an empty partition."""
    if _SECTOR_BYTES + len(core) > _PARTITION_BYTES:
        raise OperatorError("GRUB does not fit before the partition")
    first, count = _PARTITION_BYTES // _SECTOR_BYTES, (_DISK_BYTES - _PARTITION_BYTES) // _SECTOR_BYTES
    # Active; type 83, Linux; cylinders are beyond what they can say.
    partition = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", first, count)
    record = _BOOT_SECTOR.read_bytes()[:440].ljust(446, b"\0") + partition.ljust(64, b"\0") + b"\x55\xaa"
    with disk.open("wb") as file:
        file.write(record + core)
        file.truncate(_DISK_BYTES)
    return disk
