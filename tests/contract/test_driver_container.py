"""The container driver runs real images, unpacked by podman, and keeps the contract of a process job."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import tarfile
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from deskgrid.clock import SystemClock
from deskgrid.errors import BadImage
from deskgrid.machines.container import ContainerDriver, make_places
from deskgrid.machines.container_image import write_archive
from deskgrid.machines.driver import ContextExited, ExitCause, Exited, MachineSpec, Stream
from deskgrid.machines.images import ImageKind, check_image, detect_format
from deskgrid.model.machines import DiskFormat, MachineKind
from deskgrid.testing.driver_contract import (
    NETWORK,
    ContractJob,
    DriverContract,
    Prepare,
    SuspendableDriver,
    events_until_exit,
    output_of,
    read_scratch,
)
from deskgrid.units import MIB

pytestmark = pytest.mark.full

PROGRAMS = ("sh", "cat", "ls", "id", "env", "sleep", "mkdir", "head", "perl")
TALKER = """
use IO::Socket::INET;
$server = IO::Socket::INET->new(LocalAddr => "127.0.0.1", LocalPort => 8080, Listen => 5, ReuseAddr => 1) or die;
if (!fork) { $c = $server->accept; while (sysread($c, $b, 65536)) { syswrite($c, $b) } exit }
$door = IO::Socket::INET->new(PeerAddr => "db:5432") or die "no db";
syswrite($door, "hello from db\\n"); shutdown($door, 1);
mkdir "fetched"; open F, ">fetched/db"; while (sysread($door, $b, 65536)) { print F $b }
"""
EMPTY = ContractJob("", {})


def layer_of(programs: tuple[str, ...]) -> bytes:
    """Return a tar with programs of this PC and the libraries that they need."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w", dereference=True) as archive:
        needed: set[str] = set()
        for name in programs:
            path = os.path.realpath(shutil.which(name) or name)
            archive.add(path, f"bin/{name}")
            needed.update(
                re.findall(r"(/\S+) \(0x", subprocess.run(["ldd", path], capture_output=True, text=True, check=True).stdout)
            )
        for folder in Path("/usr/lib").glob("*/perl-base"):
            archive.add(folder)
        for path in sorted(needed):
            archive.add(path, path.lstrip("/"))
        archive.addfile(tarfile.TarInfo("image-file"))
    return data.getvalue()


@pytest.fixture(scope="session")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("image") / "image.oci"
    write_archive(
        path, layer_of(PROGRAMS), {"Env": ["PATH=/bin", "FROM_IMAGE=yes"], "Cmd": ["/bin/sh", "-c", "echo the image itself"]}
    )
    return path


class TestContainerDriver(DriverContract):
    @pytest.fixture
    def new_driver(self) -> Callable[[], SuspendableDriver]:
        return lambda: ContainerDriver(SystemClock())

    @pytest.fixture
    def spec(self, image: Path) -> MachineSpec:
        return MachineSpec(
            *("job-1/attempt-1", MachineKind.CONTAINER),
            **{"memory_bytes": 256 * MIB, "cpus": 1, "scratch_bytes": 64 * MIB, "processes": 100},
            **{"disk": image, "disk_format": DiskFormat.OCI},
        )

    @pytest.fixture
    def talking(self) -> ContractJob:
        return ContractJob(f"exec perl - <<'END'\n{TALKER}END\n", {})

    async def test_fingerprint_tries_podman(self, driver: ContainerDriver) -> None:
        found = await driver.fingerprint()
        assert found.usable, found.reason
        assert found.kinds == (MachineKind.CONTAINER,)
        assert found.version

    async def test_container_has_its_images_files_and_nothing_of_the_pc(self, driver: ContainerDriver, prepare: Prepare) -> None:
        handle = await prepare(
            EMPTY, command=("/bin/sh", "-c", "ls /; id -u; echo $FROM_IMAGE; echo 1 >/new; cat /etc/hosts; echo r >/scratch/r")
        )
        await driver.start(handle)
        events = await events_until_exit(driver, handle)
        assert ContextExited(0) in events, output_of(events, Stream.STDERR)
        lines = output_of(events, Stream.STDOUT).decode().splitlines()
        assert "image-file" in lines
        assert not {"home", "root", "var", "sys"} & set(lines)
        assert lines[-3:] == ["0", "yes", "127.0.0.1 localhost job"]
        assert read_scratch(driver.scratch(handle), "/r") == b"r\n"

    async def test_root_of_the_container_has_no_rights(self, driver: ContainerDriver, prepare: Prepare) -> None:
        handle = await prepare(EMPTY, command=("/bin/cat", "/proc/self/status"))
        await driver.start(handle)
        told = output_of(await events_until_exit(driver, handle), Stream.STDOUT).decode()
        assert "CapEff:\t0000000000000000" in told
        assert "Seccomp:\t2" in told

    async def test_image_that_grows_past_the_scratch_is_ended(self, driver: ContainerDriver, prepare: Prepare) -> None:
        script = "for i in 1 2 3 4 5 6; do head -c 3000000 /dev/urandom >/big$i; done; sleep 60"
        handle = await prepare(EMPTY, scratch_bytes=8 * MIB, command=("/bin/sh", "-c", script))
        await driver.start(handle)
        end = (await events_until_exit(driver, handle))[-1]
        assert isinstance(end, Exited)
        assert end.cause is ExitCause.LIMIT

    async def test_container_reaches_the_services_of_its_cage(self, driver: ContainerDriver, prepare: Prepare) -> None:
        handle = await prepare(EMPTY, **NETWORK, command=("/bin/cat", "/etc/hosts", "/proc/net/tcp"))
        await driver.start(handle)
        with await driver.open_socket(handle) as listener:
            listener.bind(("10.64.1.1", 5432))
            listener.listen()
            told = output_of(await events_until_exit(driver, handle), Stream.STDOUT).decode()
        assert "10.64.1.1 db" in told
        assert "0101400A:1538" in told  # our listener, in the table of its own network

    async def test_archive_that_is_damaged_is_refused_and_leaves_nothing(
        self, driver: ContainerDriver, spec: MachineSpec, image: Path, tmp_path: Path
    ) -> None:
        bad = tmp_path / "bad.oci"
        data = bytearray(image.read_bytes())
        data[5000:6000] = bytes(1000)
        bad.write_bytes(data)
        with pytest.raises(BadImage):
            await driver.prepare(msgspec.structs.replace(spec, disk=bad), tmp_path / "machine")
        assert not list(tmp_path.glob("machine*"))


def test_archive_is_known_by_its_content(image: Path) -> None:
    assert detect_format(image) is ImageKind.OCI
    assert check_image(image).format is DiskFormat.OCI


def test_links_of_an_image_where_the_sandbox_mounts_are_removed(tmp_path: Path) -> None:
    root, outside = tmp_path / "root", tmp_path / "outside"
    root.mkdir()
    outside.mkdir()
    for name in ("etc", "scratch", "proc"):
        (root / name).symlink_to(outside)
    make_places(root, ["hosts"])
    assert list(outside.iterdir()) == []
    assert (root / "etc" / "hosts").is_file()
    assert not (root / "scratch").is_symlink()
