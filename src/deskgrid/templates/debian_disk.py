"""Debian disks, made from the distribution's packages by an ordinary user: after a recipe, a qcow2 that boots by itself.

    sector 0        master boot record, GRUB's boot.img
    sectors 1-      GRUB's core.img, before the partition
    1 MiB-          one ext4 partition with the system, known by its label

For PCs of the kind amd64 with a BIOS only. No loop device is used (mmdebstrap's unshare mode). Packages come from where this
machine's apt takes its own and are kept in a cache, package lists too, so that a later build needs no network.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
import re
import struct
import subprocess
import tarfile
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from uuid import NAMESPACE_DNS, uuid5

from msgspec import Struct

from deskgrid.errors import DeskgridError, InvalidInput, OperatorError
from deskgrid.files import locked
from deskgrid.machines.processes import find_program
from deskgrid.machines.work_folders import work_folder
from deskgrid.templates.ext4_times import set_times
from deskgrid.templates.program import program_files, python_files
from deskgrid.units import MIB

__all__ = ["REQUIRED_FILES", "REQUIRED_TOOLS", "DebianRecipe", "Progress", "build_disk", "missing_tools"]

Progress = Callable[[str, float], None]
"""Called with what is being done and the fraction (0 to 1) that is behind us."""

REQUIRED_TOOLS = {
    "apt-get": "apt",
    "mmdebstrap": "mmdebstrap",
    "grub-mkimage": "grub-common",
    "mke2fs": "e2fsprogs",
    "qemu-img": "qemu-utils",
    "unshare": "util-linux",
}
"""Program that the build runs -> Debian package that has it."""
_TOOLS_OF_USERS = {"newuidmap": "uidmap"}
"""What is needed besides by a user who is not root."""
_BOOT_SECTOR = Path("/usr/lib/grub/i386-pc/boot.img")
REQUIRED_FILES = {_BOOT_SECTOR: "grub-pc-bin"}
"""File that the build reads -> Debian package that has it."""

EPOCH = 1_577_836_800
"""Time of what a build itself writes: 2020-01-01. The same packages, files and commands give the same disk, bit for bit."""
_RELEASE = "bookworm"
"""What is built on, on a machine whose own release is none of Debian's; nothing else was tested."""
_GRUB_MODULES = ("biosdisk", "part_msdos", "ext2", "linux", "normal", "boot", "configfile")
_PARTITION_BYTES = 1 * MIB
"""Where the only partition begins."""
_SECTOR_BYTES = 512
_BUILD_LIMIT_S = 1800.0
_LISTS_FRESH_S = 86400.0
"""How long package lists are used again without asking."""
_STAGES = {
    "running apt-get update": ("package lists", 0.02),
    "downloading packages": ("packages", 0.05),
    "extracting archives": ("unpack", 0.15),
    "installing essential": ("install", 0.2),
    "installing remaining": ("install", 0.3),
    "running --customize-hook": ("file system", 0.8),
}
"""What a message of mmdebstrap begins with -> what to say, and the fraction behind us."""


class _NotFetched(OperatorError):
    """Packages or their lists could not be had."""


class DebianRecipe(Struct, frozen=True):
    """What a disk is to hold."""

    name: str
    """Of the machine."""
    label: str
    """Of the file system, at most 16 bytes."""
    packages: tuple[str, ...]
    files: Mapping[str, str | Path]
    """Path from / -> text, or a file to copy, written after the packages are installed. Text that begins with #! can be executed."""
    size_bytes: int
    """Of the whole disk; what is not used takes no room."""
    commands: str = ""
    """For a shell, run after that in the system itself, as root."""
    without: tuple[str, ...] = ()
    """Patterns of paths that packages must not install."""
    ext4: str = ""
    """Features of the file system, as mke2fs -O takes them."""
    own_initrd: bool = False
    """The distribution's initrd is not made; /boot/deskgrid.img is."""
    program: bool = False
    """deskgrid itself is among the files (program.py)."""
    python: Mapping[str, str] = {}
    """Folder in the disk -> the lock file whose Python packages go there, likewise."""


def missing_tools() -> dict[str, str]:
    """Return what this machine lacks for a build: program or file -> Debian package."""
    tools = REQUIRED_TOOLS if os.geteuid() == 0 else REQUIRED_TOOLS | _TOOLS_OF_USERS
    missing = {tool: package for tool, package in tools.items() if find_program(tool) is None}
    return missing | {str(path): package for path, package in REQUIRED_FILES.items() if not path.exists()}


def build_disk(disk: Path, cache: Path, recipe: DebianRecipe, progress: Progress = lambda stage, fraction: None) -> None:
    """Make a disk after a recipe as `disk`, a qcow2 that is not compressed, in half a minute or more.

    The file appears whole or not at all. Packages and their lists are kept in folder `cache`; of several builds with one cache each
    waits for the one before. Raise InvalidInput for a package that Debian does not have, and OperatorError if a tool is missing, with
    the line that installs it, or if packages cannot be fetched.
    """
    _check_tools()
    disk.parent.mkdir(parents=True, exist_ok=True)
    # Not in the folder of the disk, where mmdebstrap's other user may not come, and not in memory, as /tmp may be.
    with work_folder(_large_folder(), "deskgrid-debian-") as work:
        work.chmod(0o755)
        progress("package lists", 0.0)
        raw = _make_disk(work / "disk.raw", _make_boot_loader(work), recipe.size_bytes)
        cache.mkdir(parents=True, exist_ok=True)
        with locked(cache / "lock"):
            began = int(time.time())
            _make_system(raw, work, cache, recipe, progress)
        set_times(raw, _PARTITION_BYTES, changed_since=began, epoch=EPOCH)
        progress("image", 0.95)
        unfinished = disk.with_name(f".{disk.name}.new")
        try:
            # Uncompressed: a compressed base makes each boot three times as slow, and travels compressed anyway.
            _run("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(raw), str(unfinished))
            unfinished.replace(disk)
        finally:
            unfinished.unlink(missing_ok=True)
    progress("done", 1.0)


def _large_folder() -> Path:
    folder = Path("/var/tmp")  # noqa: S108 - only the folder that a new one of ours is made in
    return folder if os.access(folder, os.W_OK) else Path(tempfile.gettempdir())


def _check_tools() -> None:
    missing = missing_tools()
    if missing:
        raise OperatorError(
            f"cannot build a Debian disk without {', '.join(sorted(missing))}",
            hint=f"sudo apt-get install --no-install-recommends {' '.join(sorted(set(missing.values())))}",
        )


def _environment(**more: str) -> dict[str, str]:
    path = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"
    return dict(os.environ, LC_ALL="C", PATH=path, **more)


def _run(tool: str, *arguments: str) -> str:
    """Run a tool and return what it prints; OperatorError with its last words if it fails."""
    command = [find_program(tool) or tool, *arguments]
    try:
        done = subprocess.run(
            command, env=_environment(), capture_output=True, text=True, errors="replace", timeout=_BUILD_LIMIT_S, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise OperatorError(f"{tool} did not run: {error}") from error
    if done.returncode != 0:
        raise OperatorError(f"{tool} failed: {done.stderr.strip()[-2000:]}", hint=f"it was run as: {' '.join(command)}")
    return done.stdout


# ---- the system

_FIRST_BOOT = """\
set -eu
: "${1:?}"  # or it would be the host that is cleaned
rm -f "$1"/etc/ssh/ssh_host_* "$1"/etc/apt/apt.conf.d/*mmdebstrap "$1"/etc/resolv.conf "$1"/var/lib/dbus/machine-id
rm -rf "$1"/run/* "$1"/var/lib/apt/lists/* "$1"/var/cache/apt/* "$1"/var/cache/ldconfig/* "$1"/var/cache/debconf/*-old
find "$1"/var/log -type f -delete  # services want their folders there
mkdir -p "$1"/var/lib/apt/lists/partial "$1"/var/cache/apt/archives/partial
: >"$1/etc/machine-id"
: >"$1/etc/resolv.conf"
"""
"""Makes it a disk that was never booted, without what it had for the build, such as this machine's proxies and mirrors."""
_SOURCES = (
    "# Empty: a machine of a job has no way to packages, unless its owner and its job allow the internet and name a mirror here.\n"
)


def _make_system(disk: Path, work: Path, cache: Path, recipe: DebianRecipe, progress: Progress) -> None:
    """Install Debian into the partition of a disk."""
    release, sources = _apt_sources(cache / "lists")
    archives = cache / "archives"
    lists = cache / f"lists-{hashlib.sha256(chr(10).join(sources).encode()).hexdigest()[:16]}"
    for folder in (archives, lists):
        folder.mkdir(parents=True, exist_ok=True)
    settings = work / "apt.conf"
    settings.write_text(_apt_settings())
    program = program_files(cache) if recipe.program else {}
    for place, lock in recipe.python.items():
        program |= python_files(cache, lock, place)
    own = {"/etc/hostname": f"{recipe.name}\n", "/etc/apt/sources.list": _SOURCES}
    _write_files(work / "files.tar", {**own, **recipe.files, **program})
    (work / "commands").write_text(f"set -eu\n{recipe.commands}")
    mounted = work / "mounted"
    mounted.mkdir()
    if os.geteuid() != 0:
        _give_to_mmdebstrap(disk)

    def build(*, update: bool) -> None:
        known = [f"--setup-hook=sync-in {lists} /var/lib/apt/lists"] if _has_lists(lists) else []
        _mmdebstrap(
            (
                f"--mode={'root' if os.geteuid() == 0 else 'unshare'}",
                *("--variant=minbase", "--architectures=amd64", "--format=null", f"--include={','.join(recipe.packages)}"),
                # Packages stay for the cache; the system is thrown away, so that mmdebstrap need not clean it.
                *("--skip=download/empty", "--skip=essential/unlink", "--skip=cleanup"),
                *(() if update else ("--skip=update",)),
                f"--aptopt={settings}",
                *('--aptopt=APT::Install-Recommends "false"', "--dpkgopt=force-unsafe-io"),
                *(f"--dpkgopt=path-exclude={pattern}" for pattern in recipe.without),
                *known,
                '--setup-hook=mkdir -p "$1"/var/cache/apt/archives/partial',
                f"--setup-hook=sync-in {archives} /var/cache/apt/archives",
                f"--customize-hook=sync-out /var/cache/apt/archives {archives}",
                f"--customize-hook=sync-out /var/lib/apt/lists {lists}",
                f"--customize-hook=tar-in {work / 'files.tar'} /",
                f'--customize-hook=chroot "$1" sh <{work / "commands"}',
                f"--customize-hook={_FIRST_BOOT}",
                f"--customize-hook={_partition_hook(disk, mounted, recipe)}",
                *(release, "-", *sources),
            ),
            progress,
            INITRD="No" if recipe.own_initrd else "Yes",
            SOURCE_DATE_EPOCH=str(EPOCH),
            TMPDIR=str(work),
        )

    _with_lists(lists, build)
    _drop_old_packages(archives)


def _give_to_mmdebstrap(disk: Path) -> None:
    """Let the group of who is root inside mmdebstrap, the first of this user's further ones, write a file; nobody else may."""
    try:
        _run("unshare", "--map-root-user", "--map-auto", "chgrp", "1", str(disk))
    except OperatorError as error:
        raise OperatorError(
            f"this user may not make user namespaces with further users: {error.message}",
            hint="sudo usermod --add-subuids 100000-165535 --add-subgids 100000-165535 $USER",
        ) from error
    disk.chmod(0o660)


def _has_lists(lists: Path) -> bool:
    return any(lists.glob("*Packages*"))


def _with_lists(lists: Path, build: Callable[..., None]) -> None:
    """Build with the package lists of the cache if they are new, else with new ones; with old ones if new ones cannot be had."""
    stamp = lists.with_name(f"{lists.name}.stamp")
    age_s = time.time() - stamp.stat().st_mtime if stamp.exists() else _LISTS_FRESH_S
    if _has_lists(lists) and 0 <= age_s < _LISTS_FRESH_S:
        # What they name may be gone from the servers.
        with contextlib.suppress(_NotFetched):
            return build(update=False)
    try:
        build(update=True)
    except _NotFetched:
        if not _has_lists(lists):
            raise
        return build(update=False)
    stamp.touch()
    return None


def _drop_old_packages(archives: Path) -> None:
    """Keep the newest file of each package."""
    newest: dict[str, Path] = {}
    for file in sorted(archives.glob("*.deb"), key=lambda path: path.stat().st_mtime):
        name = file.name.partition("_")[0]
        if name in newest:
            newest[name].unlink(missing_ok=True)
        newest[name] = file


def _write_files(archive: Path, contents: Mapping[str, str | Path]) -> None:
    """Write a tar of files, for root."""
    with tarfile.open(archive, "w") as tar:
        for path, content in contents.items():
            member = tarfile.TarInfo(path.lstrip("/"))
            member.mtime = EPOCH
            if isinstance(content, str):
                member.size, member.mode = len(content.encode()), 0o755 if content.startswith("#!") else 0o644
                tar.addfile(member, io.BytesIO(content.encode()))
                continue
            with content.open("rb") as source:
                status = os.fstat(source.fileno())
                member.size, member.mode = status.st_size, 0o755 if status.st_mode & 0o100 else 0o644
                tar.addfile(member, source)
    archive.chmod(0o644)


def _partition_hook(disk: Path, mounted: Path, recipe: DebianRecipe) -> str:
    """Return shell that copies the system into the partition."""
    # Without checksums of inodes, for ext4_times.py.
    features = ",".join(("^metadata_csum", "uninit_bg", *((recipe.ext4,) if recipe.ext4 else ())))
    options = f"nodiscard,lazy_itable_init=1,offset={_PARTITION_BYTES}"
    uuid = uuid5(NAMESPACE_DNS, f"{recipe.label}.deskgrid")
    options += f",hash_seed={uuid}"
    # A bind mount of its own leaves out what mmdebstrap has mounted in the system: /dev, /proc, the host's /dev/shm. An empty /tmp hides
    # mmdebstrap's configuration of apt, which must not be deleted: without it mmdebstrap's next apt-get works on the host.
    return (
        f'set -eu; mount --bind "$1" {mounted}; mount -t tmpfs -o mode=1777 tmpfs {mounted}/tmp; '  # noqa: S108 - the system's, not ours
        f"E2FSPROGS_FAKE_TIME={EPOCH} mke2fs -q -F -t ext4 -U {uuid} -L {recipe.label} -m 0 -O {features} -E {options} -d {mounted} {disk} "
        f"{(recipe.size_bytes - _PARTITION_BYTES) >> 10}k; umount {mounted}/tmp {mounted}"  # noqa: S108
    )


def _mmdebstrap(arguments: Sequence[str], progress: Progress, **environment: str) -> None:
    """Run mmdebstrap and tell what it does; OperatorError with its last words if it fails."""
    # Root's mounts (the host's /dev/shm among them) in a namespace of their own: gone with it, even if it is killed.
    own_mounts = ["unshare", "--mount"] if os.geteuid() == 0 else []
    command = [*own_mounts, find_program("mmdebstrap") or "mmdebstrap", *arguments]
    said: deque[str] = deque(maxlen=15)
    reached = 0.0
    try:
        process = subprocess.Popen(
            command,
            env=_environment(**environment),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
        )
    except OSError as error:
        raise OperatorError(f"mmdebstrap did not run: {error}") from error
    limit = threading.Timer(_BUILD_LIMIT_S, process.terminate)
    limit.start()
    try:
        assert process.stderr is not None
        for line in process.stderr:
            said.append(line.rstrip())
            for words, (stage, fraction) in _STAGES.items():
                if line.startswith(f"I: {words}"):
                    reached = max(reached, fraction)
                    progress(stage, reached)
    finally:
        limit.cancel()
        if process.poll() is None:
            process.terminate()  # it cleans up behind itself
        code = process.wait()
        if process.stderr is not None:
            process.stderr.close()
    if code != 0:
        raise _explained([line for line in said if line and not line.startswith("I: ")])


def _explained(said: Sequence[str]) -> DeskgridError:
    """Return the error that mmdebstrap's last words tell of."""
    last = "\n".join(said)[-2000:]
    unknown = re.findall(r"Unable to locate package (\S+)|Package '?([^\s']+)'? has no installation candidate", last)
    if unknown:
        names = ", ".join(dict.fromkeys(first or second for first, second in unknown))
        return InvalidInput(f"Debian has no package {names}", hint="look for the name with: apt-cache search WORD")
    if re.search(r"Could not allocate (?:block|inode)|ext2_lookup|No space left on device.*mke2fs", last):
        return InvalidInput(
            "the disk is too small for what is installed in it", where="--size", hint="choose a larger one, as 8GiB"
        )
    if re.search(r"Failed to fetch|Unable to fetch|Could not (?:resolve|connect)|apt-get update", last):
        return _NotFetched(f"packages could not be fetched: {last}", hint="check the network, then run: sudo apt-get update")
    return OperatorError(f"mmdebstrap failed: {last}")


def _apt_settings() -> str:
    """Return how this machine's apt reaches its sources, such as through a proxy."""
    settings = _run("apt-config", "dump", "--format", '%F "%v";%n', "Acquire").splitlines(keepends=True)
    return "".join(line for line in settings if re.match(r"Acquire::(https?::|Check-|Retries )", line))


def _apt_sources(lists: Path) -> tuple[str, list[str]]:
    """Return which Debian this machine's apt knows, its own if it is one, and in apt's one-line form where from.

    If apt has no package lists, as in a fresh container, they are fetched into `lists`.
    """
    found = _known_sources()
    if found is None:
        (lists / "partial").mkdir(parents=True, exist_ok=True)
        caches = ("-o", "Dir::Cache::pkgcache=", "-o", "Dir::Cache::srcpkgcache=")
        options = ("-o", f"Dir::State::lists={lists}", *caches, "-o", "APT::Sandbox::User=root")
        with contextlib.suppress(OperatorError):
            _run("apt-get", *options, "--quiet", "update")
        found = _known_sources(*options)
    if found is None:
        raise OperatorError(f"apt knows no Debian {_RELEASE} here", hint="run: sudo apt-get update (its sources must have Debian)")
    return found


def _known_sources(*options: str) -> tuple[str, list[str]] | None:
    listing = _run(
        "apt-get",
        *options,
        *("indextargets", "--format", "$(REPO_URI) $(RELEASE) $(COMPONENT)", "Created-By: Packages", "Origin: Debian"),
    ).splitlines()
    for release in dict.fromkeys((_own_release(), _RELEASE)):
        names = "|".join(re.escape(name) for name in (release, f"{release}-updates", f"{release}-security"))
        found = list(dict.fromkeys(line for line in listing if re.fullmatch(rf"\S+ (?:{names}) main", line)))
        if any(line.split()[1] == release for line in found):
            return release, [f"deb {line}" for line in found]
    return None


def _own_release() -> str:
    """Return the code name of this machine's distribution, "bookworm" if it tells none."""
    try:
        match = re.search(r"^VERSION_CODENAME=\"?([a-z]+)", Path("/etc/os-release").read_text(), re.MULTILINE)
    except OSError:
        return _RELEASE
    return match[1] if match else _RELEASE


# ---- the disk


def _make_boot_loader(work: Path) -> bytes:
    core = work / "core.img"
    _run("grub-mkimage", "-O", "i386-pc", "-o", str(core), "-p", "(hd0,msdos1)/boot/grub", *_GRUB_MODULES)
    return core.read_bytes()


def _make_disk(disk: Path, core: bytes, size_bytes: int) -> Path:
    """Make a disk with boot loader and an empty partition."""
    if _SECTOR_BYTES + len(core) > _PARTITION_BYTES:
        raise OperatorError("GRUB does not fit before the partition")
    first, count = _PARTITION_BYTES // _SECTOR_BYTES, (size_bytes - _PARTITION_BYTES) // _SECTOR_BYTES
    # Active; type 83, Linux; cylinders are beyond what they can say.
    partition = struct.pack("<B3sB3sII", 0x80, b"\xfe\xff\xff", 0x83, b"\xfe\xff\xff", first, count)
    record = _BOOT_SECTOR.read_bytes()[:440].ljust(446, b"\0") + partition.ljust(64, b"\0") + b"\x55\xaa"
    with disk.open("wb") as file:
        file.write(record + core)
        file.truncate(size_bytes)
    return disk
