"""What every driver must do, as tests: subclass DriverContract in tests/contract and say how to make a driver and a spec.

Each job is described twice, once as a script for a real guest and once as the plan of the fake, and does the same in both.
A guest needs seconds to boot in software emulation, so what can be claimed of one machine is claimed of one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

import msgspec
import psutil
import pytest
from msgspec import Struct

from deskgrid.errors import MachineFailed, NoSpace
from deskgrid.machines import processes
from deskgrid.machines.driver import (
    Booted,
    Caged,
    Checkpointing,
    ContextExited,
    ContextStarted,
    Doorway,
    Driver,
    ExitCause,
    Exited,
    Gone,
    HasConsole,
    Listening,
    MachineEvent,
    MachineHandle,
    MachineSpec,
    Output,
    Running,
    Saved,
    Stream,
    Suspendable,
    Viewable,
    decode_handle,
    encode_handle,
)
from deskgrid.machines.processes import ProcessIdentity, find_by_token
from deskgrid.machines.qmp import Journal, read_journal
from deskgrid.model.machines import Network
from deskgrid.testing.rfb import Viewer

__all__ = [
    "BROKEN",
    "NETWORK",
    "TALKING",
    "TICKING",
    "CheckpointContract",
    "ConsoleContract",
    "ConsoleDriver",
    "ContractJob",
    "DriverContract",
    "LastingDriver",
    "NetworkedDriver",
    "SuspendableDriver",
    "attach_viewer",
    "disk_bytes",
    "events_until_exit",
    "keepers_of",
    "output_of",
    "read_scratch",
]

BOOT_LIMIT_S = 90.0
"""Generous: a busy machine in software emulation."""
QUIET_S = 0.7
"""How long a frozen machine is watched; it would speak several times in that."""


class SuspendableDriver(Driver, Suspendable, Protocol):
    """The drivers that this suite is for."""


class LastingDriver(SuspendableDriver, Caged, Checkpointing, Viewable, Protocol):
    """Those of them whose machines can be written to the disk: virtual ones, which have a screen, too."""


class ConsoleDriver(LastingDriver, HasConsole, Protocol):
    """Those of them that show their screen to a viewer."""


class NetworkedDriver(SuspendableDriver, Caged, Protocol):
    """Those of them that put machines in cages."""


class Prepare(Protocol):
    """Makes a machine for a job, with changes to the spec; removed at the end of the test whatever happens."""

    async def __call__(self, job: ContractJob, **changes: Any) -> MachineHandle: ...


class ContractJob(Struct, frozen=True):
    """The same job for a guest and for the fake."""

    script: str
    plan: dict[str, object]

    def write(self, folder: Path) -> Path:
        """Write it as a context folder."""
        folder.mkdir()
        (folder / "context.sh").write_text(self.script)
        (folder / "fake.toml").write_text(_as_toml(self.plan))
        return folder


BROKEN = ContractJob(
    script=(
        "printf 'first\\n\\nthird without end'\n"
        "printf 'trouble: \\303\\274\\n' >&2\n"
        "mkdir out; echo result >out/file\n"
        'words=${DESKGRID_CONTEXT:-/context}/data/words.txt; if test -e "$words"; then cat "$words" >out/data; fi\n'
        "test $PWD = /scratch || exit 99\n"
        "exit 7\n"
    ),
    plan={
        "stdout": "first\n\nthird without end",
        "stderr": "trouble: ü\n",
        "files": {"out/file": "result\n", "out/data": "some words\n"},
        "exit_code": 7,
    },
)
TALKING = ContractJob(
    script=("nc -ll -p 8080 -e cat & server=$!\nmkdir fetched; echo hello from db | nc db 5432 >fetched/db\nkill $server\n"),
    plan={"serve": [8080], "fetch": ["db:5432"]},
)
NETWORK: dict[str, Any] = {
    "network": Network.OVERLAY,
    "reach": (Doorway("db", "10.64.1.1", 5432, "db.job-1"),),
    "offer": (("echo", 8080), ("never", 9)),
}
"""What a spec needs for TALKING."""
TICKING = ContractJob(script="i=0; while :; do i=$((i + 1)); echo tick $i; sleep 0.1; done\n", plan={"tick_s": 0.1})


async def events_until_exit(driver: Driver, handle: MachineHandle) -> list[MachineEvent]:
    """Return all events of a machine that ends by itself."""
    async with asyncio.timeout(BOOT_LIMIT_S):
        return [event async for event in driver.events(handle)]


def output_of(events: list[MachineEvent], stream: Stream) -> bytes:
    """Return what was told of one stream."""
    return b"".join(event.data for event in events if isinstance(event, Output) and event.stream is stream)


def keepers_of(handle: MachineHandle) -> list[int]:
    """Return the processes that keep a machine's cage."""
    marks = {"--keep", handle.workdir}
    return [process.pid for process in psutil.process_iter(["cmdline"]) if marks <= set(process.info["cmdline"] or ())]


async def _accept(listener: socket.socket) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    listener.setblocking(False)
    connection, _ = await asyncio.get_running_loop().sock_accept(listener)
    return await asyncio.open_connection(sock=connection)


async def _ask(connection: socket.socket, address: tuple[str, int], data: bytes) -> bytes:
    """Connect, send all, end, and return all that comes back."""
    connection.setblocking(False)
    await asyncio.get_running_loop().sock_connect(connection, address)
    reader, writer = await asyncio.open_connection(sock=connection)
    writer.write(data)
    writer.write_eof()
    answer = await reader.read()
    writer.close()
    return answer


def _without_console(events: list[MachineEvent]) -> list[MachineEvent]:
    """Leave out what comes in pieces of any size."""
    return [event for event in events if not (isinstance(event, Output) and event.stream is Stream.CONSOLE)]


def read_scratch(image: Path, path: str) -> bytes:
    """Return a file of a scratch image, read by e2fsprogs (not by our own reader), or of a result folder."""
    if image.is_dir():
        report = path.removeprefix("/.deskgrid/")
        return (image / "report" / report if report != path else image / "scratch" / path.lstrip("/")).read_bytes()
    program = processes.find_program("debugfs")
    assert program is not None, "debugfs (package e2fsprogs) is needed"
    with _raw(image) as raw:
        return subprocess.run([program, "-R", f"cat {path}", str(raw)], capture_output=True, check=True).stdout


def disk_bytes(image: Path) -> int:
    """Return the size of a scratch image as a guest sees it."""
    with _raw(image) as raw:
        return raw.stat().st_size


@contextlib.contextmanager
def _raw(image: Path) -> Iterator[Path]:
    """Yield a raw image as it is, of a qcow2 one a raw copy, made by QEMU's own program."""
    with image.open("rb") as file:
        if file.read(4) != b"QFI\xfb":
            yield image
            return
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder, "raw")
        subprocess.run(["qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(image), str(raw)], check=True)
        yield raw


def _as_toml(plan: dict[str, Any]) -> str:
    """Write scalars and one level of tables: a scalar of JSON is one of TOML."""
    scalars = {key: value for key, value in plan.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in plan.items() if isinstance(value, dict)}
    lines = [f"{key} = {json.dumps(value)}" for key, value in scalars.items()]
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{json.dumps(key)} = {json.dumps(value)}" for key, value in table.items())]
    return "\n".join(lines)


class DriverContract:
    """The claims. Names of tests say them."""

    caged = True
    """Whether its machines may have a network."""

    def leftovers(self, handle: MachineHandle) -> list[str]:
        """Return what is left of a machine that was destroyed, besides what all drivers may leave."""
        return []

    @pytest.fixture
    def new_driver(self) -> Callable[[], SuspendableDriver]:
        """Return what makes a driver as a restarted worker would: without memory of the one before."""
        raise NotImplementedError

    @pytest.fixture
    def spec(self) -> MachineSpec:
        """Return a spec for a machine that can boot; its context is set by the test."""
        raise NotImplementedError

    @pytest.fixture
    def talking(self) -> ContractJob:
        """Return a job that does as TALKING says, with the programs that are there."""
        return TALKING

    @pytest.fixture
    def driver(self, new_driver: Callable[[], SuspendableDriver]) -> SuspendableDriver:
        """Return the driver of the worker that prepares and starts."""
        return new_driver()

    @pytest.fixture
    async def prepare(self, driver: SuspendableDriver, spec: MachineSpec, tmp_path: Path) -> AsyncIterator[Prepare]:
        """Make machines, and hold each test to leaving no process."""
        handles: list[MachineHandle] = []

        async def make(job: ContractJob, **changes: Any) -> MachineHandle:
            context = job.write(tmp_path / f"job-{len(handles)}")
            changed: MachineSpec = msgspec.structs.replace(spec, context=context, **changes)
            handles.append(await driver.prepare(changed, tmp_path / f"machine-{len(handles)}"))
            return handles[-1]

        yield make
        for handle in handles:
            await driver.destroy(handle)
            assert find_by_token(handle.token) is None
            assert not keepers_of(handle)

    # ---- names and files first

    async def test_prepare_starts_no_process_and_makes_the_scratch_disk(self, driver: SuspendableDriver, prepare: Prepare) -> None:
        handle = await prepare(TICKING)
        assert find_by_token(handle.token) is None
        scratch = driver.scratch(handle)
        assert scratch.is_dir() or disk_bytes(scratch) == handle.spec.scratch_bytes
        assert await driver.recover(handle) == Gone()

    async def test_handle_survives_the_journal(self, prepare: Prepare) -> None:
        handle = await prepare(TICKING, **NETWORK, ssh_keys=("ssh-ed25519 AAAA",))
        assert decode_handle(encode_handle(handle)) == handle

    async def test_network_that_is_not_offered_is_refused_and_leaves_nothing(
        self, driver: SuspendableDriver, spec: MachineSpec, tmp_path: Path
    ) -> None:
        offered = (await driver.fingerprint()).networks
        for network in set(Network) - set(offered):
            with pytest.raises(MachineFailed):
                await driver.prepare(msgspec.structs.replace(spec, network=network), tmp_path / "refused")
            assert not (tmp_path / "refused").exists()

    async def test_prepare_does_not_touch_a_folder_that_is_there(
        self, driver: SuspendableDriver, spec: MachineSpec, tmp_path: Path
    ) -> None:
        (tmp_path / "taken").mkdir()
        (tmp_path / "taken" / "file").write_text("keep")
        with pytest.raises(MachineFailed):
            await driver.prepare(spec, tmp_path / "taken")
        assert (tmp_path / "taken" / "file").read_text() == "keep"

    @pytest.mark.parametrize("steps", [1, 2, 5])
    async def test_prepare_that_is_cancelled_leaves_nothing(
        self, driver: SuspendableDriver, spec: MachineSpec, tmp_path: Path, steps: int
    ) -> None:
        preparing = asyncio.create_task(driver.prepare(spec, tmp_path / "machine"))
        for _ in range(steps):
            await asyncio.sleep(0)
        preparing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await preparing
        assert not list(tmp_path.glob("machine*"))

    # ---- a job from beginning to end

    async def test_job_runs_is_told_in_order_and_leaves_its_result(
        self, driver: SuspendableDriver, new_driver: Callable[[], SuspendableDriver], prepare: Prepare, tmp_path: Path
    ) -> None:
        words = tmp_path / "words"
        words.write_text("some words\n")
        words.chmod(0o444)
        handle = await prepare(BROKEN, data=(("words.txt", words),))
        await driver.start(handle)
        events = await events_until_exit(driver, handle)
        told = [event for event in events if not isinstance(event, Output)]
        assert told == [Booted(), ContextStarted(), ContextExited(7), Exited(ExitCause.POWERED_OFF)]
        assert events[-1] == Exited(ExitCause.POWERED_OFF)
        assert output_of(events, Stream.STDOUT) == b"first\n\nthird without end"
        assert output_of(events, Stream.STDERR) == "trouble: ü\n".encode()
        scratch = driver.scratch(handle)
        assert read_scratch(scratch, "/.deskgrid/exit") == b"7\n"
        assert read_scratch(scratch, "/.deskgrid/stdout") == b"first\n\nthird without end"
        assert read_scratch(scratch, "/.deskgrid/stderr") == "trouble: ü\n".encode()
        assert read_scratch(scratch, "/out/file") == b"result\n"
        assert read_scratch(scratch, "/out/data") == words.read_bytes()
        # A worker that was away sees the same, in its own time.
        later = new_driver()
        assert await later.recover(handle) == Exited(ExitCause.POWERED_OFF)
        again = await events_until_exit(later, handle)
        assert _without_console(again) == _without_console(events)
        assert output_of(again, Stream.CONSOLE) == output_of(events, Stream.CONSOLE)
        with pytest.raises(MachineFailed):
            await later.start(handle)

    # ---- control

    async def test_pause_freezes_resume_thaws_and_a_restarted_worker_can_do_both(
        self, driver: SuspendableDriver, new_driver: Callable[[], SuspendableDriver], prepare: Prepare
    ) -> None:
        handle = await prepare(TICKING)
        await driver.start(handle)
        async with asyncio.timeout(BOOT_LIMIT_S):
            await _next_tick(driver.events(handle))
        later = new_driver()
        assert await later.recover(handle) == Running()
        events = later.events(handle)
        await later.pause(handle)
        await later.pause(handle)
        # What was written before the pause may still be read; then nothing comes.
        pending = asyncio.ensure_future(_next_tick(events))
        while (await asyncio.wait({pending}, timeout=QUIET_S))[0]:
            await pending
            pending = asyncio.ensure_future(_next_tick(events))
        await later.resume(handle)
        await later.resume(handle)
        async with asyncio.timeout(BOOT_LIMIT_S):
            await pending
        await later.stop(handle, grace_s=0.2)
        await later.stop(handle, grace_s=0.2)
        assert find_by_token(handle.token) is None
        assert await later.recover(handle) == Exited(ExitCause.STOPPED)
        assert (await events_until_exit(later, handle))[-1] == Exited(ExitCause.STOPPED)
        await later.pause(handle)
        await later.resume(handle)

    async def test_killed_process_is_told_as_killed(self, driver: SuspendableDriver, prepare: Prepare) -> None:
        handle = await prepare(TICKING)
        identity = await _start_fully(driver, handle)
        os.kill(identity.pid, signal.SIGKILL)
        events = await events_until_exit(driver, handle)
        assert len([event for event in events if isinstance(event, Exited)]) == 1
        assert isinstance(events[-1], Exited)
        assert events[-1].cause is ExitCause.KILLED

    async def test_paused_machine_can_be_stopped(self, driver: SuspendableDriver, prepare: Prepare) -> None:
        handle = await prepare(TICKING)
        await _start_fully(driver, handle)
        await driver.pause(handle)
        await driver.stop(handle, grace_s=0.1)
        assert await driver.recover(handle) == Exited(ExitCause.STOPPED)

    async def test_start_again_while_it_runs_changes_nothing(self, driver: SuspendableDriver, prepare: Prepare) -> None:
        handle = await prepare(TICKING)
        identity = await _start_fully(driver, handle)
        await driver.start(handle)
        assert find_by_token(handle.token) == identity

    # ---- network

    async def test_machine_talks_through_sockets_of_its_cage_and_a_restarted_worker_gets_new_ones(
        self, driver: NetworkedDriver, new_driver: Callable[[], NetworkedDriver], prepare: Prepare, talking: ContractJob
    ) -> None:
        handle = await prepare(talking, **NETWORK)
        await driver.start(handle)
        reading = asyncio.create_task(events_until_exit(driver, handle))
        with await driver.open_socket(handle) as listener:
            listener.bind(("10.64.1.1", 5432))
            listener.listen()
            async with asyncio.timeout(BOOT_LIMIT_S):
                reader, writer = await _accept(listener)
                assert await reader.read() == b"hello from db\n"
                later = new_driver()
                assert await later.recover(handle) == Running()
                watching = later.events(handle)
                while await anext(watching) != Listening(8080):
                    pass
                assert (
                    await _ask(await later.open_socket(handle), ("127.0.0.1", 8080), b"many bytes " * 10000)
                    == b"many bytes " * 10000
                )
                writer.write(b"hello yourself\n")
                writer.close()
                events = await reading
        assert events[-1] == Exited(ExitCause.POWERED_OFF)
        assert [event for event in events if isinstance(event, Listening)] == [Listening(8080)]
        assert read_scratch(driver.scratch(handle), "/fetched/db") == b"hello yourself\n"
        with pytest.raises(MachineFailed):
            await later.open_socket(handle)

    async def test_socket_of_a_machine_without_a_network_or_not_started_is_refused(
        self, driver: NetworkedDriver, prepare: Prepare
    ) -> None:
        handle = await prepare(TICKING)
        await driver.start(handle)
        with pytest.raises(MachineFailed, match="no network"):
            await driver.open_socket(handle)
        with pytest.raises(MachineFailed, match="off"):
            await driver.open_socket(await prepare(TICKING, **NETWORK))

    async def test_killed_machine_takes_its_keeper_along(self, driver: NetworkedDriver, prepare: Prepare) -> None:
        handle = await prepare(TICKING, **NETWORK)
        await driver.start(handle)
        (await driver.open_socket(handle)).close()
        assert keepers_of(handle)
        identity = processes.read_identity(Path(handle.workdir))
        assert identity is not None
        os.kill(identity.pid, signal.SIGKILL)
        events = await events_until_exit(driver, handle)
        assert isinstance(events[-1], Exited)
        async with asyncio.timeout(10):
            while keepers_of(handle):  # noqa: ASYNC110 - another process
                await asyncio.sleep(0.005)

    async def test_secrets_are_for_nobody_else_and_written_over_when_the_machine_is_removed(
        self, driver: SuspendableDriver, prepare: Prepare, tmp_path: Path
    ) -> None:
        secret = b"s3cr3t-" + os.urandom(8).hex().encode()
        given, seen = tmp_path / "given", tmp_path / "seen"
        given.mkdir()
        seen.mkdir()
        (given / "token").write_bytes(secret)
        handle = await prepare(TICKING, secrets=given)
        made = [file for file in Path(handle.workdir).rglob("*") if file.is_file() and secret in file.read_bytes()]
        assert made
        for number, file in enumerate(made):
            assert not file.stat().st_mode & 0o077
            (seen / str(number)).hardlink_to(file)  # what is on the disk, whatever its name
        # Also by whoever knows nothing of the machine but its folder, as of one whose making a kill cut short.
        await driver.destroy(msgspec.structs.replace(handle, spec=msgspec.structs.replace(handle.spec, secrets=None)))
        assert not any(secret in file.read_bytes() for file in seen.iterdir())
        assert not Path(handle.workdir).exists()

    async def test_secrets_are_written_over_when_the_machine_cannot_be_made(
        self, driver: SuspendableDriver, prepare: Prepare, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        secret = b"s3cr3t-" + os.urandom(8).hex().encode()
        given, seen = tmp_path / "given", tmp_path / "seen"
        given.mkdir()
        (given / "token").write_bytes(secret)
        make_files = driver._make_files  # type: ignore[attr-defined]

        def fail(handle: MachineHandle) -> None:
            make_files(handle)
            made = [file for file in Path(handle.workdir).rglob("*") if file.is_file() and secret in file.read_bytes()]
            seen.hardlink_to(made[0])
            raise OSError(errno.ENOSPC, "no space")

        monkeypatch.setattr(driver, "_make_files", fail)
        with pytest.raises(NoSpace):
            await prepare(TICKING, secrets=given)
        assert secret not in seen.read_bytes()

    async def test_destroy_right_after_start_in_a_cage_leaves_nothing(
        self, driver: NetworkedDriver, prepare: Prepare, tmp_path: Path
    ) -> None:
        for _ in range(3):
            handle = await prepare(TICKING, **NETWORK)
            await driver.start(handle)
            await self._destroy_leaves_nothing(driver, handle, tmp_path)

    async def test_destroy_of_a_running_machine_in_a_cage_leaves_nothing(
        self, driver: NetworkedDriver, new_driver: Callable[[], NetworkedDriver], prepare: Prepare, tmp_path: Path
    ) -> None:
        handle = await prepare(TICKING, **NETWORK)
        await _start_fully(driver, handle)
        (await driver.open_socket(handle)).close()
        assert keepers_of(handle)
        await self._destroy_leaves_nothing(new_driver(), handle, tmp_path)

    # ---- removal and recovery

    async def test_destroy_before_start_removes_all_files(
        self, driver: SuspendableDriver, prepare: Prepare, tmp_path: Path
    ) -> None:
        await self._destroy_leaves_nothing(driver, await prepare(TICKING), tmp_path)

    async def test_destroy_right_after_start_removes_process_and_files(
        self, driver: SuspendableDriver, prepare: Prepare, tmp_path: Path
    ) -> None:
        handle = await prepare(TICKING)
        await driver.start(handle)
        await self._destroy_leaves_nothing(driver, handle, tmp_path)

    async def test_destroy_by_a_restarted_worker_removes_process_and_files(
        self, driver: SuspendableDriver, new_driver: Callable[[], SuspendableDriver], prepare: Prepare, tmp_path: Path
    ) -> None:
        handle = await prepare(TICKING)
        await _start_fully(driver, handle)
        await self._destroy_leaves_nothing(new_driver(), handle, tmp_path)

    async def test_destroy_while_events_are_read_ends_them(self, driver: SuspendableDriver, prepare: Prepare) -> None:
        handle = await prepare(TICKING)
        await driver.start(handle)
        reading = asyncio.create_task(events_until_exit(driver, handle))
        await asyncio.sleep(0)
        await driver.destroy(handle)
        assert isinstance((await reading)[-1], Exited)

    async def test_destroy_that_was_cut_short_is_finished_by_recover(
        self, driver: SuspendableDriver, prepare: Prepare, tmp_path: Path
    ) -> None:
        handle = await prepare(TICKING)
        workdir = Path(handle.workdir)
        workdir.rename(workdir.with_name(f"{workdir.name}.removed"))
        assert await driver.recover(handle) == Gone()
        assert not list(tmp_path.glob("machine-*"))

    async def test_machine_whose_process_was_not_yet_written_down_is_found(
        self, driver: SuspendableDriver, new_driver: Callable[[], SuspendableDriver], prepare: Prepare, tmp_path: Path
    ) -> None:
        handle = await prepare(TICKING)
        identity = await _start_fully(driver, handle)
        # As if the worker had been killed between starting the process and writing it down.
        (Path(handle.workdir) / "process.json").unlink()
        later = new_driver()
        assert await later.recover(handle) == Running()
        assert processes.read_identity(Path(handle.workdir)) == identity
        await self._destroy_leaves_nothing(later, handle, tmp_path)

    async def test_another_process_with_the_same_number_is_not_touched(
        self, driver: SuspendableDriver, prepare: Prepare, tmp_path: Path
    ) -> None:
        handle = await prepare(TICKING)
        stranger = await asyncio.create_subprocess_exec("sleep", "600")
        try:
            processes.write_identity(Path(handle.workdir), ProcessIdentity(stranger.pid, "another boot:1"))
            await driver.stop(handle, grace_s=0)
            await self._destroy_leaves_nothing(driver, handle, tmp_path)
            assert stranger.returncode is None
        finally:
            stranger.kill()
            assert await stranger.wait() == -signal.SIGKILL

    async def _destroy_leaves_nothing(self, driver: SuspendableDriver, handle: MachineHandle, folder: Path) -> None:
        await driver.destroy(handle)
        await driver.destroy(handle)
        assert find_by_token(handle.token) is None
        assert not keepers_of(handle)
        assert not list(folder.glob("machine-*"))
        assert not self.leftovers(handle)
        assert await driver.recover(handle) == Gone()


async def _next_tick(events: AsyncIterator[MachineEvent]) -> int:
    """Return the number of the last tick that the next piece of output tells."""
    async for event in events:
        if isinstance(event, Output) and event.stream is Stream.STDOUT:
            return int(event.data.split()[-1])
    raise AssertionError("the machine ended instead of ticking")


async def _ticks_of(driver: Driver, handle: MachineHandle, least: int) -> list[int]:
    """Return all ticks from the first one on, once there are so many."""
    ticks: list[int] = []
    async with asyncio.timeout(BOOT_LIMIT_S):
        async for event in driver.events(handle):
            if isinstance(event, Output) and event.stream is Stream.STDOUT:
                ticks += [int(word) for word in event.data.split() if word.isdigit()]
            if len(ticks) >= least:
                return ticks
    raise AssertionError("the machine ended instead of ticking")


def _began(driver: Driver, handle: MachineHandle) -> bool:
    read: Callable[[Path], Journal] = getattr(driver, "read_journal", read_journal)
    return read(Path(handle.workdir)).began


async def _start_fully(driver: SuspendableDriver, handle: MachineHandle) -> ProcessIdentity:
    """Start a machine and wait until its process has opened its files."""
    await driver.start(handle)
    async with asyncio.timeout(BOOT_LIMIT_S):
        while not _began(driver, handle):  # noqa: ASYNC110 - another process's file
            await asyncio.sleep(0.005)
    identity = find_by_token(handle.token)
    assert identity is not None
    return identity


class CheckpointContract(DriverContract):
    """The claims of drivers with checkpoints, besides those of all."""

    async def test_what_is_on_the_screen_can_be_seen(self, driver: LastingDriver, prepare: Prepare, tmp_path: Path) -> None:
        handle = await prepare(TICKING)
        with pytest.raises(MachineFailed):
            await driver.picture(handle, tmp_path / "early.png")
        await driver.start(handle)
        await _ticks_of(driver, handle, 1)
        await driver.picture(handle, tmp_path / "screen.png")
        image = (tmp_path / "screen.png").read_bytes()
        assert image.startswith(b"\x89PNG\r\n\x1a\n") and b"IEND" in image
        await driver.stop(handle, grace_s=0)
        with pytest.raises(MachineFailed):
            await driver.picture(handle, tmp_path / "late.png")
        assert not list(tmp_path.glob("*ly.png")) and not (tmp_path / "late.png").exists()

    async def test_saved_machine_goes_on_where_it_was_with_another_worker(
        self, driver: LastingDriver, new_driver: Callable[[], LastingDriver], prepare: Prepare
    ) -> None:
        handle = await prepare(TICKING, **(NETWORK if self.caged else {}))
        await driver.start(handle)
        before = await _ticks_of(driver, handle, 3)
        await driver.pause(handle)
        await driver.save(handle)
        assert find_by_token(handle.token) is None
        assert (await events_until_exit(driver, handle))[-1] == Saved()
        later = new_driver()
        assert await later.recover(handle) == Saved()
        await later.restore(handle)
        await later.restore(handle)
        assert await new_driver().recover(handle) == Running()
        ticks = await _ticks_of(later, handle, len(before) + 10)
        assert ticks == list(range(1, len(ticks) + 1))
        if self.caged:
            (await later.open_socket(handle)).close()
        await later.stop(handle, grace_s=0)
        assert await later.recover(handle) == Exited(ExitCause.STOPPED)
        with pytest.raises(MachineFailed):
            await later.restore(handle)

    async def test_killed_machine_goes_on_from_its_last_checkpoint_and_says_nothing_twice(
        self, driver: LastingDriver, new_driver: Callable[[], LastingDriver], prepare: Prepare
    ) -> None:
        handle = await prepare(TICKING)
        identity = await _start_fully(driver, handle)
        for _ in range(3):
            ticks = await _ticks_of(driver, handle, 3)
            await driver.checkpoint(handle)
            if await driver.recover(handle) == Saved():
                await driver.restore(handle)
            await _ticks_of(driver, handle, len(ticks) + 3)
        lost = await _ticks_of(driver, handle, 1)
        identity = find_by_token(handle.token) or identity
        os.kill(identity.pid, signal.SIGKILL)
        assert (await events_until_exit(driver, handle))[-1] == Saved()
        later = new_driver()
        assert await later.recover(handle) == Saved()
        await later.restore(handle)
        ticks = await _ticks_of(later, handle, len(lost) + 5)
        assert ticks == list(range(1, len(ticks) + 1))

    async def test_who_watches_a_machine_sees_that_it_was_saved(self, driver: LastingDriver, prepare: Prepare) -> None:
        handle = await prepare(TICKING)
        await driver.start(handle)
        await _ticks_of(driver, handle, 1)
        watching = asyncio.create_task(events_until_exit(driver, handle))
        await driver.save(handle)
        assert (await watching)[-1] == Saved()

    async def test_restart_that_was_cut_short_is_done_again(
        self, driver: LastingDriver, new_driver: Callable[[], LastingDriver], prepare: Prepare
    ) -> None:
        handle = await prepare(TICKING)
        await driver.start(handle)
        await _ticks_of(driver, handle, 1)
        await driver.save(handle)
        for steps in (1, 3, 8, 20, 60, 200):
            restoring = asyncio.create_task(new_driver().restore(handle))
            for _ in range(steps):
                await asyncio.sleep(0.0005)
            restoring.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await restoring
                break
            assert await new_driver().recover(handle) == Saved()
            assert find_by_token(handle.token) is None
        else:
            await new_driver().restore(handle)
        ticks = await _ticks_of(driver, handle, 5)
        assert ticks == list(range(1, len(ticks) + 1))

    async def test_machine_falls_back_to_its_last_checkpoint_also_when_it_was_told_to_end_with_its_worker(
        self, driver: LastingDriver, new_driver: Callable[[], LastingDriver], prepare: Prepare
    ) -> None:
        handle = await prepare(TICKING)
        identity = await _start_fully(driver, handle)
        assert not await driver.fall_back(handle)
        await _ticks_of(driver, handle, 3)
        await driver.checkpoint(handle)
        if await driver.recover(handle) == Saved():
            await driver.restore(handle)
        for told in (False, True):
            lost = await _ticks_of(driver, handle, 6)
            if told:
                os.kill((find_by_token(handle.token) or identity).pid, signal.SIGTERM)
            assert await driver.fall_back(handle)
            assert find_by_token(handle.token) is None
            driver = new_driver()
            assert await driver.recover(handle) == Saved()
            await driver.restore(handle)
            ticks = await _ticks_of(driver, handle, len(lost) + 3)
            assert ticks == list(range(1, len(ticks) + 1))

    async def test_checkpoint_that_nobody_waits_for_any_more_is_followed_by_others(
        self, driver: LastingDriver, prepare: Prepare
    ) -> None:
        handle = await prepare(TICKING)
        await _start_fully(driver, handle)
        for delay_s in (0.0, 0.02, 0.1, 0.3):
            await _ticks_of(driver, handle, 1)
            keeping = asyncio.create_task(driver.checkpoint(handle))
            await asyncio.sleep(delay_s)
            keeping.cancel()
            try:
                await keeping
            except asyncio.CancelledError:
                await driver.resume(handle)  # as whoever finds it does
            if await driver.recover(handle) == Saved():
                await driver.restore(handle)
        await driver.checkpoint(handle)
        if await driver.recover(handle) == Saved():
            await driver.restore(handle)
        ticks = await _ticks_of(driver, handle, 1)
        ticks = await _ticks_of(driver, handle, len(ticks) + 3)
        assert ticks == list(range(1, len(ticks) + 1))

    async def test_machine_that_is_off_has_nothing_to_keep(self, driver: LastingDriver, prepare: Prepare) -> None:
        handle = await prepare(BROKEN)
        with pytest.raises(MachineFailed):
            await driver.checkpoint(handle)
        with pytest.raises(MachineFailed):
            await driver.restore(handle)
        await driver.start(handle)
        await events_until_exit(driver, handle)
        for action in (driver.checkpoint, driver.save, driver.restore):
            with pytest.raises(MachineFailed):
                await action(handle)
        assert not await driver.fall_back(handle)
        assert await driver.recover(handle) == Exited(ExitCause.POWERED_OFF)


async def attach_viewer(driver: HasConsole, handle: MachineHandle, password: str) -> Viewer:
    """Return a viewer that has not logged in yet."""
    ours, theirs = socket.socketpair()
    try:
        with theirs:
            await driver.attach_console(handle, theirs, password)
    except BaseException:
        ours.close()
        raise
    return Viewer(ours)


class ConsoleContract(CheckpointContract):
    """The claims of drivers whose machines show their screen, besides those of all that keep checkpoints."""

    showing: ContractJob = ContractJob(TICKING.script, {**TICKING.plan, "console": True})

    async def test_console_is_for_who_has_the_newest_password_while_the_machine_lives(
        self, driver: ConsoleDriver, prepare: Prepare
    ) -> None:
        handle = await prepare(self.showing)
        with pytest.raises(MachineFailed):
            await attach_viewer(driver, handle, "too-soon")
        await _start_fully(driver, handle)  # and does not wait until it has booted
        for wrong in ("other", "", "SECRETS1"):
            with await attach_viewer(driver, handle, "secrets1") as viewer:
                assert not await asyncio.to_thread(viewer.log_in, wrong)
        with await attach_viewer(driver, handle, "secrets2") as viewer:
            assert not await asyncio.to_thread(viewer.log_in, "secrets1")
        with await attach_viewer(driver, handle, "secrets3") as viewer:
            assert await asyncio.to_thread(viewer.log_in, "secrets3")
            assert await asyncio.to_thread(viewer.look)
            await driver.stop(handle, grace_s=0)
            await asyncio.to_thread(viewer.until_ended)
        with pytest.raises(MachineFailed):
            await attach_viewer(driver, handle, "too-late")

    async def test_console_of_a_machine_that_went_on_from_its_checkpoint(
        self, driver: ConsoleDriver, new_driver: Callable[[], ConsoleDriver], prepare: Prepare
    ) -> None:
        handle = await prepare(self.showing)
        await _start_fully(driver, handle)
        with await attach_viewer(driver, handle, "secrets1") as viewer:
            assert await asyncio.to_thread(viewer.log_in, "secrets1")
            await driver.save(handle)
            await asyncio.to_thread(viewer.until_ended)
        later = new_driver()
        await later.restore(handle)
        with await attach_viewer(later, handle, "secrets2") as viewer:
            assert await asyncio.to_thread(viewer.log_in, "secrets2")
            assert await asyncio.to_thread(viewer.look)
