"""Container jobs: the files of an OCI image in the sandbox of process jobs. Linux only.

podman unpacks the image from its archive, in a storage of the machine's own and itself in a bubblewrap sandbox (no network, nothing of the owner's
files; all of its processes end with it); no registry is asked. The container is then run by bubblewrap, not by podman's own runtime: so it has the
same cage, filter, bounds, results and end as a process job. (podman's monitor leaves its parent, crun refuses hosts with hybrid cgroups, and
the runtimes need rights that the cage has given up.) Differences to a process job:

    /          the image's files, a copy of the machine's own, writable; what it grows by counts like /tmp
    user       0, without any right; all of the image's files belong to it
    processes  counted by watching only: the bounds are set from outside of the user namespace
    command    the spec's, else context.sh, else the image's entrypoint with its arguments; the image's variables come first
"""

from __future__ import annotations

import asyncio
import io
import os
import re
import stat
import subprocess
import tarfile
import tempfile
import time
from pathlib import Path

import msgspec
from msgspec import Struct, field

from deskgrid.errors import BadImage, DeskgridError, MachineFailed
from deskgrid.machines import processes
from deskgrid.machines.container_image import write_archive
from deskgrid.machines.driver import MachineHandle, MachineSpec
from deskgrid.machines.folders import OutOfBounds, folder_bytes, remove_tree
from deskgrid.machines.probes import probe_folder
from deskgrid.machines.process import SandboxDriver, program_version
from deskgrid.machines.process_machine import FILTER_FD, STATUS_FD
from deskgrid.machines.process_sandbox import Folders, context_mounts, environment_of, namespace_words, system_mounts
from deskgrid.model.machines import DiskFormat, DriverName, MachineKind, Network

__all__ = ["ContainerDriver"]

_ROOT, _STORAGE, _WORK, _POLICY, _CONFIG = "root", "storage", "unpacking", "policy.json", "image.json"
_UNPACK_S = 1800.0
_POLL_S = 0.1
_MOST_IMAGE_BYTES = 64 << 30
_SEARCH = re.compile(r"/storage/root/(vfs/dir/[0-9a-f]{64})")
_UNPACK = (
    'P="podman --root /storage/root --runroot /tmp/run --tmpdir /tmp/libpod --storage-driver vfs'
    ' --storage-opt vfs.ignore_chown_errors=true --events-backend none --cgroup-manager cgroupfs"\n'
    'id=$($P pull -q oci-archive:/image) && $P image mount "$id" && $P image inspect "$id" --format "{{json .Config}}"\n'
)
"""A fixed text: nothing of a job is in it."""


class _Config(Struct, frozen=True):
    """What we heed of an image's configuration."""

    env: list[str] | None = field(name="Env", default=None)
    entrypoint: list[str] | None = field(name="Entrypoint", default=None)
    command: list[str] | None = field(name="Cmd", default=None)


class ContainerDriver(SandboxDriver):
    """The same protocols as SandboxDriver, for images."""

    name = DriverName.CONTAINER
    kind = MachineKind.CONTAINER

    def _missing(self) -> str:
        missing = super()._missing()
        if not missing and processes.find_program("podman") is None:
            return "podman is not installed (on Debian: sudo apt-get install podman)"
        return missing

    def _version(self) -> str:
        return program_version("podman")

    async def _try_out(self) -> str:
        """Try the sandbox as for a process, and podman on the smallest image there can be."""
        sandbox = SandboxDriver(self._clock, nice=self._nice, overlay=False, probes=self._probes)
        found = await sandbox.fingerprint()
        return found.reason or await asyncio.to_thread(_try_podman, self._probes)

    def _check(self, spec: MachineSpec) -> None:
        super()._check(spec)
        if spec.disk is None or spec.disk_format is not DiskFormat.OCI:
            raise BadImage("is not an image of a container", hint="podman save --format oci-archive IMAGE -o FILE")

    def _make_files(self, handle: MachineHandle) -> None:
        workdir = Path(handle.workdir)
        assert handle.spec.disk is not None
        config = unpack_image(handle.spec.disk, workdir)
        (workdir / _CONFIG).write_bytes(msgspec.json.encode(config))
        super()._make_files(handle)

    def _plan(self, handle: MachineHandle) -> dict[str, object]:
        plan = super()._plan(handle)
        root = Path(handle.workdir) / _ROOT
        variables = dict(word.split("=", 1) for word in _config(handle).env or () if "=" in word and "\0" not in word)
        return {
            **plan,
            "environment": {**environment_of(handle.spec), **variables, **dict(handle.spec.environment)},
            "measured": [*plan["measured"], str(root)],  # type: ignore[misc]
            "disk_bytes": handle.spec.scratch_bytes + folder_bytes(str(root)),
        }

    def _job_line(self, handle: MachineHandle) -> list[str]:
        spec, folders, root = handle.spec, self._folders(handle), Path(handle.workdir) / _ROOT
        make_places(root, [file.name for file in sorted(folders.etc.iterdir())])
        file_bytes = min(filter(None, (spec.file_bytes, spec.scratch_bytes)), default=0)
        return [
            processes.find_program("prlimit") or "prlimit",
            *((f"--fsize={file_bytes}",) if file_bytes else ()),
            *("--memlock=65536", "--msgqueue=65536", "--core=0", "--"),
            *(processes.find_program("bwrap") or "bwrap", *namespace_words(0, network=spec.network is Network.NONE)),
            *("--cap-drop", "ALL", "--bind", str(root), "/"),
            *("--proc", "/proc", "--dev", "/dev", "--bind", str(folders.shared), "/dev/shm"),  # noqa: S108
            *context_mounts(folders),
            *(("--ro-bind", str(folders.program), "/app") if folders.program is not None else ()),
            *("--bind", str(folders.scratch), "/scratch", "--bind", str(folders.tmp), "/tmp"),  # noqa: S108
            *(word for name in _OWN_FILES for word in ("--ro-bind", str(folders.etc / name), f"/etc/{name}")),
            *("--remount-ro", "/proc", "--remount-ro", "/dev", "--chdir", "/scratch"),
            *("--seccomp", str(FILTER_FD), "--json-status-fd", str(STATUS_FD), "--"),
            *_command(handle, folders),
        ]


_OWN_FILES = ("hosts", "resolv.conf", "hostname")


def _config(handle: MachineHandle) -> _Config:
    return msgspec.json.decode((Path(handle.workdir) / _CONFIG).read_bytes(), type=_Config)


def _command(handle: MachineHandle, folders: Folders) -> list[str]:
    if handle.spec.command:
        return list(handle.spec.command)
    if (folders.context / "context.sh").is_file():
        return ["/bin/sh", "/context/context.sh"]
    config = _config(handle)
    command = [*(config.entrypoint or ()), *(config.command or ())]
    if not command or any("\0" in word for word in command):
        raise BadImage("says not what to run, and neither does the job", hint="give the job a command or a context.sh")
    return command


# ---- unpacking


def unpack_image(image: Path, workdir: Path) -> _Config:
    """Unpack an OCI archive to the folder `root` in `workdir`; return its configuration. Raise BadImage, MachineFailed or OSError."""
    storage, work = workdir / _STORAGE, workdir / _WORK
    for folder in (storage, work):
        folder.mkdir(mode=0o700)
    (workdir / _POLICY).write_text('{"default": [{"type": "insecureAcceptAnything"}]}')
    try:
        words = _run_podman(_unpack_line(image, workdir), storage)
        place, _, rest = words.partition("\n")
        match = _SEARCH.fullmatch(place)
        if match is None:
            raise MachineFailed("podman does not say where it unpacked the image")
        unpacked = storage / "root" / match[1]
        unpacked.chmod(0o755)  # images often have none of the right to write
        unpacked.rename(workdir / _ROOT)
        return msgspec.json.decode(rest, type=_Config)
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise BadImage(f"has a strange configuration: {error}", where=str(image)) from error
    finally:
        for folder in (storage, work):
            remove_tree(str(folder))


def _unpack_line(image: Path, workdir: Path) -> list[str]:
    return [
        *(processes.find_program("prlimit") or "prlimit", f"--fsize={_MOST_IMAGE_BYTES}", "--core=0", "--"),
        *(processes.find_program("bwrap") or "bwrap", *namespace_words(0, network=True)),
        # In its own namespace, where it makes folders with the owners and modes of the image.
        *("--cap-add", "ALL"),
        *system_mounts(),
        *("--proc", "/proc", "--dev", "/dev", "--tmpfs", "/etc", "--tmpfs", "/run", "--dir", "/var/tmp"),  # noqa: S108
        *("--ro-bind-try", "/etc/ld.so.cache", "/etc/ld.so.cache", "--ro-bind-try", "/etc/alternatives", "/etc/alternatives"),
        *("--ro-bind", str(workdir / _POLICY), "/etc/containers/policy.json"),
        *("--ro-bind", str(image), "/image", "--bind", str(workdir / _STORAGE), "/storage", "--bind", str(workdir / _WORK), "/tmp"),  # noqa: S108
        *("--bind", str(workdir / _WORK), "/dev/shm", "--remount-ro", "/proc", "--remount-ro", "/dev"),  # noqa: S108
        *("--chdir", "/tmp", "--", "/bin/sh", "-c", _UNPACK),  # noqa: S108
    ]


def _run_podman(line: list[str], storage: Path) -> str:
    """Return what it prints. It is ended if it takes too long or unpacks too much."""
    environment = {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": "/tmp", "TMPDIR": "/tmp"}  # noqa: S108
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(line, stdin=subprocess.DEVNULL, stdout=output, stderr=errors, env=environment)
        deadline = time.monotonic() + _UNPACK_S
        try:
            while child.poll() is None:
                if time.monotonic() > deadline:
                    raise BadImage(f"was not unpacked within {_UNPACK_S:.0f} s")
                if folder_bytes(str(storage)) > _MOST_IMAGE_BYTES:
                    raise BadImage(f"unpacks to more than {_MOST_IMAGE_BYTES} bytes")
                _wait(child)
        except OutOfBounds as error:
            raise BadImage(f"cannot be taken: {error}") from error
        finally:
            child.kill()
            child.wait()
        output.seek(0)
        errors.seek(0)
        if child.returncode:
            raise BadImage(f"cannot be unpacked: {errors.read()[-300:].decode(errors='replace').strip()}")
        return output.read(1 << 20).decode(errors="replace")


def _wait(child: subprocess.Popen[bytes]) -> None:
    try:
        child.wait(_POLL_S)
    except subprocess.TimeoutExpired:
        return


def make_places(root: Path, files: list[str]) -> None:
    """Make folders and files over which the sandbox mounts its own; what an image has in their places and is none of these is removed.

    bubblewrap would follow an image's links while it can still see the PC's files. So it has to find everything there.
    """
    top = os.open(root, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        for name in ("proc", "dev", "tmp", "scratch", "context", "app", "etc"):
            _make_place(top, name, folder=True)
        etc = os.open("etc", os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=top)
        try:
            for name in files:
                if name in _OWN_FILES:
                    _make_place(etc, name, folder=False)
        finally:
            os.close(etc)
    finally:
        os.close(top)


def _make_place(parent: int, name: str, *, folder: bool) -> None:
    wanted = stat.S_IFDIR if folder else stat.S_IFREG
    try:
        found = os.stat(name, dir_fd=parent, follow_symlinks=False)
        if stat.S_IFMT(found.st_mode) == wanted:
            return
        if stat.S_ISDIR(found.st_mode):
            raise BadImage(f"has a folder in the place of /etc/{name}")
        os.unlink(name, dir_fd=parent)
    except FileNotFoundError:
        pass
    if folder:
        os.mkdir(name, 0o755, dir_fd=parent)
    else:
        os.close(os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644, dir_fd=parent))


def _try_podman(place: Path | None) -> str:
    """Return why podman cannot unpack an image here, "" if it can."""
    with probe_folder(place) as folder:
        layer = io.BytesIO()
        with tarfile.open(fileobj=layer, mode="w", format=tarfile.USTAR_FORMAT) as archive:
            archive.addfile(tarfile.TarInfo("probe"))
        image, workdir = folder / "image", folder / "machine"
        workdir.mkdir()
        write_archive(image, layer.getvalue(), {})
        try:
            unpack_image(image, workdir)
            return "" if (workdir / _ROOT / "probe").is_file() else "podman lost a file of the smallest image"
        except (DeskgridError, OSError) as error:
            return f"podman cannot unpack the smallest image: {error}"
