"""The QEMU driver keeps the contract with the tiny template, and does right by guests that behave badly.

Guests of one sector stand for whatever a guest can do to the machine; they run within a second, where a kernel needs five.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
import socket
import subprocess
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import psutil
import pytest

from deskgrid.clock import SystemClock
from deskgrid.errors import BadImage, DeskgridError
from deskgrid.machines import base, processes, qmp
from deskgrid.machines.base import CHANNEL_LOG
from deskgrid.machines.driver import (
    ContextExited,
    Doorway,
    ExitCause,
    Exited,
    Listening,
    MachineHandle,
    MachineSpec,
    Output,
    Running,
    Stream,
)
from deskgrid.machines.qemu import QemuDriver
from deskgrid.model.machines import DiskFormat, MachineKind, Network
from deskgrid.templates.tiny import TinyBuild
from deskgrid.testing.driver_contract import (
    BOOT_LIMIT_S,
    TICKING,
    ConsoleContract,
    ContractJob,
    Prepare,
    SuspendableDriver,
    attach_viewer,
    events_until_exit,
    output_of,
    read_scratch,
)
from deskgrid.testing.tiny_template import tiny_template
from deskgrid.units import GIB, MIB
from deskgrid.worker.probe import allocated_bytes

POWER_OFF = bytes.fromhex("ba0406 b80020 ef f4ebfd")  # mov dx,0x604; mov ax,0x2000; out dx,ax: what ACPI's power button does
RESET = bytes.fromhex("b0fe e664 f4ebfd")  # mov al,0xfe; out 0x64,al: the keyboard controller's reset line
CHATTER = bytes.fromhex("baf803 b041 ee ebfd")  # mov dx,0x3f8; mov al,'A'; again: out dx,al; jmp again: the console, for ever
ECHO = bytes.fromhex(
    "baf803 b041 ee b400 cd16 ee ebf9"
)  # as above once, then keys; again: mov ah,0; int 0x16; out dx,al; jmp again
IDLE = bytes.fromhex("f4ebfd")  # halt: hlt; jmp halt

NO_JOB = ContractJob("", {})


@pytest.fixture(scope="session")
def tiny() -> TinyBuild:
    return tiny_template()


def boot_disk(path: Path, code: bytes) -> Path:
    """Make a qcow2 disk of one megabyte whose first sector is `code`."""
    raw = path.with_suffix(".raw")
    raw.write_bytes((code.ljust(510, b"\0") + b"\x55\xaa").ljust(MIB, b"\0"))
    subprocess.run(["qemu-img", "convert", "-f", "raw", "-O", "qcow2", raw, path], check=True)
    return path


async def run(driver: QemuDriver, handle: MachineHandle) -> Exited:
    """Start a machine and return how it ended."""
    await driver.start(handle)
    end = (await events_until_exit(driver, handle))[-1]
    assert isinstance(end, Exited)
    return end


def host_addresses() -> list[str]:
    """Return the IPv4 addresses of this machine that mean another one to a guest."""
    found = [address.address for card in psutil.net_if_addrs().values() for address in card if address.family == socket.AF_INET]
    return sorted(address for address in set(found) if not address.startswith("127."))


def gateways() -> list[str]:
    """Return the routers that this machine uses (proc_net(5))."""
    routes = [line.split() for line in Path("/proc/net/route").read_text().splitlines()[1:]]
    return sorted({socket.inet_ntoa(bytes.fromhex(route[2])[::-1]) for route in routes if route[2] != "00000000"})


async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """Carry bytes to the end, and then the end."""
    with contextlib.suppress(OSError):
        while data := await reader.read(1 << 16):
            writer.write(data)
            await writer.drain()
        writer.write_eof()


@contextlib.asynccontextmanager
async def echo_server(driver: QemuDriver, handle: MachineHandle, address: tuple[str, int]) -> AsyncIterator[None]:
    """Listen at an address of the machine's cage and send back what comes."""

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await copy(reader, writer)
        writer.close()

    listener = await driver.open_socket(handle)
    listener.bind(address)
    async with await asyncio.start_server(answer, sock=listener):
        yield


@contextlib.asynccontextmanager
async def forwarded(driver: QemuDriver, handle: MachineHandle, port: int) -> AsyncIterator[int]:
    """Lead a port of ours to a port of the machine."""

    async def lead(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        inside = await driver.open_socket(handle)
        inside.setblocking(False)
        await asyncio.get_running_loop().sock_connect(inside, ("127.0.0.1", port))
        inner_reader, inner_writer = await asyncio.open_connection(sock=inside)
        await asyncio.gather(copy(reader, inner_writer), copy(inner_reader, writer))
        writer.close()
        inner_writer.close()

    async with await asyncio.start_server(lead, "127.0.0.1", 0) as server:
        yield server.sockets[0].getsockname()[1]


async def call(*command: str | Path) -> tuple[int | None, bytes]:
    """Run a program; return its exit code and what it printed."""
    process = await asyncio.create_subprocess_exec(*command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE)
    output, _ = await process.communicate()
    return process.returncode, output


async def seen(driver: QemuDriver, handle: MachineHandle, least: int) -> int:
    """Return how many lines a machine has said, once there are so many."""
    lines = 0
    async with asyncio.timeout(BOOT_LIMIT_S):
        async for event in driver.events(handle):
            if isinstance(event, Output) and event.stream is Stream.STDOUT:
                lines += event.data.count(b"\n")
            if lines >= least:
                return lines
    raise AssertionError("the machine ended")


async def says_more(handle: MachineHandle, lines: int) -> None:
    """Wait until a machine has said so many lines more than it has now."""
    log = Path(handle.workdir) / CHANNEL_LOG
    wanted = log.read_bytes().count(b"\n") + lines
    async with asyncio.timeout(BOOT_LIMIT_S):
        while log.read_bytes().count(b"\n") < wanted:
            await asyncio.sleep(0.02)


def refcounts(image: Path) -> bytes:
    """Return the first block of reference counts."""
    with image.open("rb") as file:
        file.seek(2 << 16)
        return file.read(1 << 16)


class TestQemuDriver(ConsoleContract):
    LONG = frozenset(
        {
            "test_checkpoint_on_a_full_disk_leaves_the_one_before_and_the_machine_goes_on",
            "test_checkpoint_that_nobody_waits_for_any_more_is_followed_by_others",
            "test_disks_whose_counts_a_power_cut_left_behind_are_mended",
            "test_iso_boots_and_without_context_script_the_job_succeeds",
            "test_machine_falls_back_to_its_last_checkpoint_also_when_it_was_told_to_end_with_its_worker",
            "test_machine_that_is_off_has_nothing_to_keep",
            "test_restart_that_was_cut_short_is_done_again",
            "test_result_of_a_machine_that_was_killed_twice_has_each_line_once",
            "test_room_that_a_checkpoint_took_is_given_back_by_the_one_after_the_next",
            "test_saved_machine_goes_on_where_it_was_with_another_worker",
            "test_ssh_into_the_tiny_guest_with_a_key_copies_files_and_finds_services_at_localhost",
            "test_what_is_on_the_screen_can_be_seen",
            "test_who_watches_a_machine_sees_that_it_was_saved",
        }
    )
    """Each boots a machine and more. `make test` has the same on the fake driver, and one of each kind here: a job, a pause, a checkpoint, a cage."""

    @pytest.fixture
    def new_driver(self) -> Callable[[], SuspendableDriver]:
        return lambda: QemuDriver(SystemClock(), accelerator="tcg")

    @pytest.fixture
    def spec(self, tiny: TinyBuild) -> MachineSpec:
        return MachineSpec(
            "job-1/attempt-1", MachineKind.VM, memory_bytes=256 * MIB, cpus=1, scratch_bytes=8 * GIB, disk=tiny.qcow2
        )

    # ---- real guests

    async def test_iso_boots_and_without_context_script_the_job_succeeds(
        self, driver: QemuDriver, spec: MachineSpec, tiny: TinyBuild, tmp_path: Path
    ) -> None:
        context = tmp_path / "context"
        context.mkdir()
        handle = await driver.prepare(
            msgspec.structs.replace(spec, disk=tiny.iso, disk_format=DiskFormat.ISO, context=context), tmp_path / "machine"
        )
        try:
            await driver.start(handle)
            events = await events_until_exit(driver, handle)
            assert events[-1] == Exited(ExitCause.POWERED_OFF)
            assert ContextExited(0) in events
            assert b"no context.sh" in output_of(events, Stream.STDERR)
            assert read_scratch(driver.scratch(handle), "/.deskgrid/exit") == b"0\n"
        finally:
            await driver.destroy(handle)

    async def test_guest_sees_its_disks_environment_and_context_and_changes_only_its_overlay(
        self, driver: QemuDriver, prepare: Prepare, tiny: TinyBuild, tmp_path: Path
    ) -> None:
        before = tiny.qcow2.read_bytes()
        (tmp_path / "secrets").mkdir()
        (tmp_path / "secrets" / "token").write_text("s3cr3t")
        script = (
            "ls /dev/hda /dev/hdb /dev/hdd; grep -c ' /context iso9660 ro' /proc/mounts\n"
            'printf \'<%s>\' "$PLAIN" "$ODD"; echo\n'
            "ls /sys/class/net | tr '\\n' ' '; echo\n"
            "ls -ld /context/secrets /context/secrets/token | cut -c 1-10; cat /context/secrets/token; echo\n"
            # Writing to the first disk must be possible, and end in the overlay.
            "dd if=/dev/zero of=/dev/hda bs=64k count=16 2>/dev/null && sync && echo written\n"
            # Ten megabytes come and go: the image gives them back.
            "dd if=/dev/urandom of=big bs=1M count=10 2>/dev/null && sync && rm big && sync\n"
            "head -c 300000 /dev/zero | tr '\\0' x; echo\n"
            "i=0; while [ $i -lt 3000 ]; do echo line $i; i=$((i+1)); done >&2\n"
        )
        odd = 'it\'s; $(reboot) `x` "y" \\ \n ü'
        handle = await prepare(
            ContractJob(script, {}), environment=(("PLAIN", "value"), ("ODD", odd)), secrets=tmp_path / "secrets"
        )
        await driver.start(handle)
        events = await events_until_exit(driver, handle)
        assert events[-1] == Exited(ExitCause.POWERED_OFF)
        lines = output_of(events, Stream.STDOUT)
        told = f"/dev/hda\n/dev/hdb\n/dev/hdd\n1\n<value><{odd}>\nlo \ndrwx------\n-rw-------\ns3cr3t\nwritten\n".encode()
        assert lines == told + b"x" * 300000 + b"\n"
        assert output_of(events, Stream.STDERR) == b"".join(b"line %d\n" % number for number in range(3000))
        assert tiny.qcow2.read_bytes() == before
        assert driver.scratch(handle).stat().st_blocks * 512 < 5 * MIB

    async def test_full_host_disk_is_told_as_io_error_and_the_guest_gets_no_chance_to_go_on(
        self, prepare: Prepare, tmp_path: Path
    ) -> None:
        driver = FullDiskDriver(SystemClock(), accelerator="tcg")
        handle = await prepare(ContractJob("dd if=/dev/zero of=big bs=1M count=8; sync; echo went on\n", {}))
        end = await run(driver, handle)
        assert end.cause is ExitCause.IO_ERROR
        assert "full" in end.detail
        assert read_scratch(driver.scratch(handle), "/.deskgrid/exit") == b""

    # ---- checkpoints

    async def test_result_of_a_machine_that_was_killed_twice_has_each_line_once(
        self, driver: QemuDriver, new_driver: Callable[[], QemuDriver], prepare: Prepare
    ) -> None:
        script = "i=0; while [ $i -lt 60 ]; do i=$((i + 1)); echo $i >>lines; echo $i; sleep 0.05; done\n"
        handle = await prepare(ContractJob(script, {}))
        await driver.start(handle)
        for least in (10, 25):
            await seen(driver, handle, least)
            await driver.checkpoint(handle)
            await seen(driver, handle, least + 5)
            identity = processes.read_identity(Path(handle.workdir))
            assert identity is not None
            await processes.kill(identity, SystemClock())
            driver = new_driver()
            await driver.restore(handle)
        events = await events_until_exit(driver, handle)
        assert events[-1] == Exited(ExitCause.POWERED_OFF)
        wanted = b"".join(b"%d\n" % number for number in range(1, 61))
        assert output_of(events, Stream.STDOUT) == wanted
        assert read_scratch(driver.scratch(handle), "/lines") == wanted

    async def test_disks_are_flushed_while_a_checkpoint_is_written_and_not_for_the_guest(
        self, driver: QemuDriver, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def ignores_flushes(handle: MachineHandle) -> set[bool]:
            nodes = await qmp.execute(Path(handle.workdir), "query-named-block-nodes", {"flat": True})
            return {node["cache"]["no-flush"] for node in nodes if node["node-name"] in ("disk-file", "scratch-file")}

        async def look(handle: MachineHandle, tag: str) -> None:
            seen_flags.append(await ignores_flushes(handle))
            await drop_state(handle, tag)

        seen_flags: list[set[bool]] = []
        drop_state = driver._drop_state
        monkeypatch.setattr(driver, "_drop_state", look)
        handle = await prepare(TICKING)
        await driver.start(handle)
        await driver.checkpoint(handle)
        await driver.checkpoint(handle)
        assert seen_flags == [{False}] * 3
        assert await ignores_flushes(handle) == {True}

    async def test_memory_of_a_checkpoint_is_in_an_image_of_its_own_of_which_there_is_one(
        self, driver: QemuDriver, new_driver: Callable[[], QemuDriver], prepare: Prepare
    ) -> None:
        handle = await prepare(TICKING)
        await driver.start(handle)
        for _ in range(2):
            await driver.checkpoint(handle)
            assert len(list(Path(handle.workdir).glob("memory-*.qcow2"))) == 1
        await driver.save(handle)
        await new_driver().restore(handle)
        await driver.checkpoint(handle)
        [memory] = Path(handle.workdir).glob("memory-*.qcow2")
        assert memory.stat().st_blocks * 512 > MIB

    async def test_disks_whose_counts_a_power_cut_left_behind_are_mended(
        self, driver: QemuDriver, new_driver: Callable[[], QemuDriver], prepare: Prepare
    ) -> None:
        # A new file each time: blocks of a file written again may lie in clusters that were counted before the checkpoint.
        writing = "dd if=/dev/urandom of=x$i bs=64k count=8 2>&-; sync; echo $i; sleep 0.1"
        script = f"i=0; while [ $i -lt 60 ]; do i=$((i + 1)); {writing}; done; sleep 600\n"
        handle = await prepare(ContractJob(script, {}))
        await driver.start(handle)
        await seen(driver, handle, 1)
        await driver.checkpoint(handle)
        images = [Path(handle.workdir, name) for name in ("disk.qcow2", "scratch.qcow2")]
        counts = [refcounts(image) for image in images]
        await says_more(handle, 3)
        identity = processes.read_identity(Path(handle.workdir))
        assert identity is not None
        await processes.kill(identity, SystemClock())
        # What was written to the counts after the checkpoint never came to the disk, unlike the tables that rely on it.
        for image, before in zip(images, counts, strict=True):
            with image.open("r+b") as file:
                file.seek(2 << 16)
                file.write(before)
        assert (
            subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", images[1]], check=False, capture_output=True).returncode == 2
        )
        later = new_driver()
        await later.restore(handle)
        await later.checkpoint(handle)
        await later.stop(handle, grace_s=0)
        for image in images:
            subprocess.run(["qemu-img", "check", "-q", "-f", "qcow2", image], check=True)

    async def test_restore_waits_for_a_check_that_a_killed_worker_had_begun(self, driver: QemuDriver, prepare: Prepare) -> None:
        handle = await prepare(TICKING)
        await driver.start(handle)
        await driver.save(handle)
        holder = subprocess.Popen(
            ["qemu-io", "-f", "qcow2", driver.scratch(handle)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        with holder:
            assert holder.stdin is not None and holder.stdout is not None
            holder.stdin.write("read 0 512\n")
            holder.stdin.flush()
            holder.stdout.readline()  # it has the lock
            restoring = asyncio.create_task(driver.restore(handle))
            await asyncio.wait({restoring}, timeout=1.5)
            assert not restoring.done()
            holder.stdin.close()
            await restoring
        assert await driver.recover(handle) == Running()

    async def test_room_that_a_checkpoint_took_is_given_back_by_the_one_after_the_next(
        self, driver: QemuDriver, prepare: Prepare
    ) -> None:
        handle = await prepare(TICKING)
        await driver.start(handle)
        await seen(driver, handle, 1)
        taken = []
        for _ in range(5):
            await driver.checkpoint(handle)
            taken.append(allocated_bytes(Path(handle.workdir)))
        assert taken[4] < taken[1] + 16 * MIB
        assert taken[4] < 2 * handle.spec.memory_bytes

    async def test_checkpoint_on_a_full_disk_leaves_the_one_before_and_the_machine_goes_on(
        self, driver: QemuDriver, prepare: Prepare
    ) -> None:
        handle = await prepare(TICKING)
        await driver.start(handle)
        await seen(driver, handle, 1)
        await driver.checkpoint(handle)
        identity = processes.read_identity(Path(handle.workdir))
        assert identity is not None
        bound = driver.scratch(handle).stat().st_size + 8 * MIB
        resource.prlimit(identity.pid, resource.RLIMIT_FSIZE, (bound, bound))
        with pytest.raises(DeskgridError):
            await driver.checkpoint(handle)
        told = await seen(driver, handle, 1)
        await seen(driver, handle, told + 5)
        await processes.kill(identity, SystemClock())
        await driver.restore(handle)
        await seen(driver, handle, 5)

    # ---- network

    async def test_guest_reaches_its_doorway_and_nothing_else_in_the_world(self, driver: QemuDriver, prepare: Prepare) -> None:
        with socket.create_server(("0.0.0.0", 0)) as tcp, socket.socket(type=socket.SOCK_DGRAM) as udp:
            udp.bind(("0.0.0.0", 0))
            port, udp_port = tcp.getsockname()[1], udp.getsockname()[1]
            for address in host_addresses():
                # So that the test could fail.
                socket.create_connection((address, port)).close()
            neighbours = [f"10.0.2.{number}" for number in (1, 2, 3, 4, 16, 255)]
            world = [*gateways(), "1.1.1.1", "8.8.8.8", "192.168.1.1", "169.254.169.254", "10.64.0.1", "10.64.1.2", "10.64.255.254"]
            targets = [*neighbours, *host_addresses(), *world]
            # All at the same time, and the doorway among them: were the guest too slow to reach anything, that one would fail.
            script = (
                "reach() { echo scan | nc -w 3 $1 $2 >/dev/null 2>&1 && echo reached $1 $2; }\n"
                f"for target in {' '.join(targets)} 10.64.1.1; do\n"
                f"    for port in {port} 22 53 80 443; do reach $target $port & done\n"
                f"    timeout 3 tftp -g -r x -l /tmp/$target $target {udp_port} 2>/dev/null && echo reached $target by UDP &\n"
                "    wget -q -T 3 -O - http://$target/ 2>/dev/null && echo reached $target by HTTP &\n"
                "done\n"
                "timeout 3 nslookup localhost 10.0.2.3 2>&1 | grep -q 'NXDOMAIN\\|Name:' && echo reached a name server &\n"
                "wait\n"
                f"reach db {port}; echo scanned\n"
            )
            reach = (Doorway("db", "10.64.1.1", port, "db.job-1"),)
            handle = await prepare(ContractJob(script, {}), network=Network.OVERLAY, reach=reach)
            await driver.start(handle)
            async with echo_server(driver, handle, ("10.64.1.1", port)):
                events = await events_until_exit(driver, handle)
            assert output_of(events, Stream.STDOUT).decode() == f"reached 10.64.1.1 {port}\nreached db {port}\nscanned\n"
            # A connection from the guest would wait here, behind those of before.
            tcp.setblocking(False)
            for _ in host_addresses():
                tcp.accept()[0].close()
            udp.setblocking(False)
            with pytest.raises(BlockingIOError):
                tcp.accept()
            with pytest.raises(BlockingIOError):
                udp.recv(1)

    async def test_ssh_into_the_tiny_guest_with_a_key_copies_files_and_finds_services_at_localhost(
        self, driver: QemuDriver, prepare: Prepare, tmp_path: Path
    ) -> None:
        keygen = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f"]
        subprocess.run([*keygen, tmp_path / "key"], check=True)
        handle = await prepare(
            ContractJob("while [ ! -e end ]; do sleep 0.2; done; cat end\n", {}),
            network=Network.OVERLAY,
            reach=(Doorway("db", "10.64.1.1", 5432, "db.job-1"),),
            offer=(("ssh", 22),),
            ssh_keys=((tmp_path / "key.pub").read_text().strip(),),
        )
        await driver.start(handle)
        reading = driver.events(handle)
        async with asyncio.timeout(BOOT_LIMIT_S):
            while await anext(reading) != Listening(22):
                pass
            async with echo_server(driver, handle, ("10.64.1.1", 5432)), forwarded(driver, handle, 22) as port:
                known = [f"-oIdentityFile={tmp_path}/key", "-oBatchMode=yes", "-oUserKnownHostsFile=/dev/null"]
                options = [*known, "-oStrictHostKeyChecking=no", "-oLogLevel=ERROR"]
                assert await call("ssh", *options, "-p", str(port), "root@127.0.0.1", "echo $HOME; exit 3") == (3, b"/root\n")
                said = await call("ssh", *options, "-p", str(port), "root@127.0.0.1", "echo asked | nc localhost 5432")
                assert said == (0, b"asked\n")
                (tmp_path / "end").write_text("copied\n")
                assert await call("scp", *options, "-P", str(port), tmp_path / "end", "root@127.0.0.1:/scratch/new") == (0, b"")
                assert await call("ssh", *options, "-p", str(port), "root@127.0.0.1", "mv /scratch/new /scratch/end") == (0, b"")
                subprocess.run([*keygen, tmp_path / "other"], check=True)
                options[0] = f"-oIdentityFile={tmp_path}/other"
                assert (await call("ssh", *options, "-p", str(port), "root@127.0.0.1", "id"))[0] == 255
            events = [event async for event in reading]
        assert output_of(events, Stream.STDOUT) == b"copied\n"
        assert events[-1] == Exited(ExitCause.POWERED_OFF)

    # ---- guests of one sector

    @pytest.mark.parametrize(("code", "cause"), [(POWER_OFF, ExitCause.POWERED_OFF), (RESET, ExitCause.RESET)])
    async def test_end_that_nobody_watched_is_known_afterwards(
        self,
        driver: QemuDriver,
        new_driver: Callable[[], SuspendableDriver],
        prepare: Prepare,
        tmp_path: Path,
        code: bytes,
        cause: ExitCause,
    ) -> None:
        handle = await prepare(NO_JOB, disk=boot_disk(tmp_path / "disk.qcow2", code))
        await driver.start(handle)
        identity = processes.read_identity(Path(handle.workdir))
        assert identity is not None
        assert await processes.wait_gone(identity, SystemClock(), limit_s=30)
        end = await new_driver().recover(handle)
        assert isinstance(end, Exited)
        assert end.cause is cause

    async def test_guest_that_writes_without_end_is_cut_off_and_runs_on(
        self, driver: QemuDriver, prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        bound = 256 << 10
        monkeypatch.setattr(base, "LOG_MAX_BYTES", bound)
        handle = await prepare(NO_JOB, disk=boot_disk(tmp_path / "disk.qcow2", CHATTER))
        await driver.start(handle)
        log = Path(handle.workdir) / base.CONSOLE_LOG
        read = 0
        reading = driver.events(handle)
        async with asyncio.timeout(60):
            while read < bound:
                event = await anext(reading)
                read += len(event.data) if isinstance(event, Output) else 0
            waiting = asyncio.ensure_future(anext(reading))
            size = -1
            while size != (size := log.stat().st_size):
                await asyncio.wait({waiting}, timeout=0.5)
        assert not waiting.done()
        assert await driver.recover(handle) == Running()
        await driver.stop(handle, grace_s=0)
        assert await waiting == Exited(ExitCause.STOPPED)
        assert read == bound

    async def test_keys_typed_at_the_screen_reach_a_guest_that_never_boots(
        self, driver: QemuDriver, prepare: Prepare, tmp_path: Path
    ) -> None:
        handle = await prepare(NO_JOB, disk=boot_disk(tmp_path / "disk.qcow2", ECHO))
        await driver.start(handle)
        events = driver.events(handle)
        async with asyncio.timeout(60):
            # It hears, and its firmware changes the screen's size no more.
            assert await anext(events) == Output(Stream.CONSOLE, b"A")
            with await attach_viewer(driver, handle, "password") as viewer:
                assert await asyncio.to_thread(viewer.log_in, "password")
                assert len(await asyncio.to_thread(viewer.look)) == viewer.width * viewer.height * 4
                viewer.type("q")
                assert await anext(events) == Output(Stream.CONSOLE, b"q")
        assert b"password" not in (Path(handle.workdir) / qmp.JOURNAL_OUTPUT).read_bytes()

    async def test_cpu_time_bound_ends_a_machine_without_a_worker(
        self, driver: QemuDriver, prepare: Prepare, tmp_path: Path
    ) -> None:
        busy = bytes.fromhex("ebfe")  # jmp to itself
        handle = await prepare(NO_JOB, disk=boot_disk(tmp_path / "disk.qcow2", busy), cpu_time_s=1.0)
        assert (await run(driver, handle)).cause is ExitCause.KILLED

    async def test_path_longer_than_a_socket_address_can_be_controlled(
        self, driver: QemuDriver, spec: MachineSpec, tmp_path: Path
    ) -> None:
        disk = boot_disk(tmp_path / "disk.qcow2", IDLE)
        handle = await driver.prepare(msgspec.structs.replace(spec, disk=disk), tmp_path / ("long" * 30) / "machine")
        try:
            await driver.start(handle)
            await driver.pause(handle)
            await driver.resume(handle)
            assert await driver.recover(handle) == Running()
        finally:
            await driver.destroy(handle)

    # ---- failures to start

    async def test_command_line_that_qemu_refuses_is_told_with_its_words(self, prepare: Prepare, tmp_path: Path) -> None:
        driver = QemuDriver(SystemClock(), accelerator="no-such-accelerator")
        end = await run(driver, await prepare(NO_JOB))
        assert end.cause is ExitCause.START_FAILED
        assert "no-such-accelerator" in end.detail

    async def test_disk_that_names_another_file_is_refused_and_leaves_nothing(
        self, driver: QemuDriver, spec: MachineSpec, tiny: TinyBuild, tmp_path: Path
    ) -> None:
        disk = tmp_path / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", tiny.qcow2, disk], check=True)
        with pytest.raises(BadImage):
            await driver.prepare(msgspec.structs.replace(spec, disk=disk), tmp_path / "machine")
        assert not (tmp_path / "machine").exists()

    async def test_disk_that_is_garbage_behind_its_header_does_not_start(
        self, driver: QemuDriver, prepare: Prepare, tiny: TinyBuild, tmp_path: Path
    ) -> None:
        disk = tmp_path / "disk.qcow2"
        disk.write_bytes(tiny.qcow2.read_bytes()[:104] + b"\xff" * 4096)
        end = await run(driver, await prepare(NO_JOB, disk=disk))
        assert end.cause is ExitCause.START_FAILED
        assert end.detail

    # ---- what this PC can do

    async def test_fingerprint_finds_an_accelerator_that_really_runs_a_guest(self) -> None:
        found = await QemuDriver(SystemClock()).fingerprint()
        assert found.usable, found.reason
        assert found.accelerator in {"kvm", "tcg", "hvf"}
        assert found.version
        assert bool(found.reason) == (found.accelerator == "tcg")


class FullDiskDriver(QemuDriver):
    """QEMU on whose scratch disk every write finds the host's disk full."""

    async def _command(self, handle: MachineHandle) -> list[str]:
        command = await super()._command(handle)
        full = {"event": "none", "errno": 28, "iotype": "write"}
        for index, word in enumerate(command):
            if word.startswith("{") and '"node-name":"scratch"' in word:
                node = msgspec.json.decode(word)
                node["file"] = {"driver": "blkdebug", "image": node["file"], "inject-error": [full]}
                command[index] = msgspec.json.encode(node).decode()
        return command
