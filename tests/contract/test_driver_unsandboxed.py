"""Process jobs without a sandbox, on a PC that has no bubblewrap and whose owner said so: what the driver's contract claims still holds."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from tests.contract.test_driver_process import EMPTY, done, passed_limit, python, said, shell

from deskgrid.clock import SystemClock
from deskgrid.machines import processes
from deskgrid.machines.driver import ContextExited, ExitCause, Exited, MachineHandle, MachineSpec, Output, Stream
from deskgrid.machines.process import SandboxDriver
from deskgrid.model.machines import MachineKind, Network
from deskgrid.settings import WorkerSettings
from deskgrid.testing.driver_contract import (
    ContractJob,
    DriverContract,
    Prepare,
    SuspendableDriver,
    events_until_exit,
    output_of,
    read_scratch,
)
from deskgrid.units import MIB
from deskgrid.worker.control import StatusAnswer
from deskgrid.worker.drivers import make_driver

NEEDED = ("env", "prlimit", "nice", "ionice", "sh")


@pytest.fixture
def no_bubblewrap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave on PATH what jobs need, and no bwrap."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in NEEDED:
        (folder / name).symlink_to(shutil.which(name) or name)
    monkeypatch.setenv("PATH", str(folder))
    assert processes.find_program("bwrap") is None


def running(mark: str) -> list[int]:
    return [process.pid for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or ())]


async def started(driver: SandboxDriver, prepare: Prepare, script: str) -> MachineHandle:
    """Run a job until it says something."""
    handle = await prepare(EMPTY, **shell(script))
    await driver.start(handle)
    async with asyncio.timeout(20):
        async for event in driver.events(handle):
            if isinstance(event, Output):
                return handle
    raise AssertionError("it said nothing")


async def test_pc_without_bubblewrap_refuses_unless_the_owner_said_so(no_bubblewrap: None) -> None:
    found = await make_driver("process", WorkerSettings(), SystemClock()).fingerprint()
    assert not found.usable
    assert "apt-get install bubblewrap" in found.reason


async def test_pc_without_namespaces_refuses_unless_the_owner_said_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = tmp_path / "bwrap"
    broken.write_text("#!/bin/sh\necho 'bwrap: No permissions to create new namespace' >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    assert not (await make_driver("process", WorkerSettings(), SystemClock()).fingerprint()).usable
    found = await make_driver("process", WorkerSettings(unsandboxed=True), SystemClock()).fingerprint()
    assert found.usable and "WITHOUT A SANDBOX" in found.reason


async def test_fingerprint_and_status_say_that_there_is_no_sandbox_and_no_network(no_bubblewrap: None) -> None:
    found = await make_driver("process", WorkerSettings(unsandboxed=True), SystemClock()).fingerprint()
    assert found.usable and found.networks == (Network.NONE,)
    shown = str(StatusAnswer(running=True, name="pc", address="grid", paused=False, drivers=(found,)))
    assert "driver process: usable (WITHOUT A SANDBOX, as the owner allows: bubblewrap is not installed" in shown
    assert "jobs that need a network are not taken" in shown


async def test_where_there_is_a_sandbox_it_is_used_whatever_the_owner_said(tmp_path: Path) -> None:
    driver = SandboxDriver(SystemClock(), unsandboxed=True)
    found = await driver.fingerprint()
    assert found.usable and "WITHOUT" not in found.reason and Network.OVERLAY in found.networks
    spec = MachineSpec("job-1/attempt-1", MachineKind.PROCESS, 256 * MIB, 1, 64 * MIB, command=("/bin/pwd",))
    handle = await driver.prepare(spec, tmp_path / "machine")
    await driver.start(handle)
    assert output_of(await events_until_exit(driver, handle), Stream.STDOUT) == b"/scratch\n"
    await driver.destroy(handle)


@pytest.mark.usefixtures("no_bubblewrap")
class TestWithoutSandbox:
    @pytest.fixture
    def new_driver(self) -> Callable[[], SuspendableDriver]:
        return lambda: SandboxDriver(SystemClock(), unsandboxed=True)

    @pytest.fixture
    async def driver(self, new_driver: Callable[[], SuspendableDriver]) -> SuspendableDriver:
        driver = new_driver()
        assert (await driver.fingerprint()).usable
        return driver

    @pytest.fixture
    def spec(self) -> MachineSpec:
        return MachineSpec(
            "job-1/attempt-1", MachineKind.PROCESS, memory_bytes=256 * MIB, cpus=1, scratch_bytes=64 * MIB, processes=100
        )

    prepare = DriverContract.prepare
    _destroy_leaves_nothing = DriverContract._destroy_leaves_nothing
    leftovers = DriverContract.leftovers

    # ---- the contract, as far as it is not about networks

    test_cancelled_prepare = DriverContract.test_prepare_that_is_cancelled_leaves_nothing
    test_network_is_refused = DriverContract.test_network_that_is_not_offered_is_refused_and_leaves_nothing
    test_pause = DriverContract.test_pause_freezes_resume_thaws_and_a_restarted_worker_can_do_both
    test_killed_process = DriverContract.test_killed_process_is_told_as_killed
    test_paused_stop = DriverContract.test_paused_machine_can_be_stopped
    test_destroy_right_after_start = DriverContract.test_destroy_right_after_start_removes_process_and_files
    test_destroy_by_another = DriverContract.test_destroy_by_a_restarted_worker_removes_process_and_files
    test_destroy_while_read = DriverContract.test_destroy_while_events_are_read_ends_them
    test_found_by_token = DriverContract.test_machine_whose_process_was_not_yet_written_down_is_found

    # ---- its files

    async def test_job_works_in_folders_of_its_own_and_is_told_where_they_are(
        self, driver: SandboxDriver, prepare: Prepare, tmp_path: Path
    ) -> None:
        app = tmp_path / "app"
        app.mkdir()
        (app / "tool").write_text('#!/bin/sh\necho tool "$1"\npwd\necho "$HOME" "$TMPDIR" "$LIBRARY"\nls "$DESKGRID_CONTEXT"\n')
        (app / "tool").chmod(0o755)
        handle = await prepare(
            ContractJob("", {}), command=("/app/tool", "/context/x"), program=app, environment=(("LIBRARY", "/app/lib"),)
        )
        await driver.start(handle)
        events = await events_until_exit(driver, handle)
        own = handle.workdir
        told = output_of(events, Stream.STDOUT).decode().splitlines()
        assert told[:2] == [f"tool {own}/context/x", f"{own}/outcome/scratch"]
        assert told[2] == f"{own}/tmp {own}/tmp {app}/lib"
        assert "context.sh" in told

    async def test_context_sh_runs_and_what_it_leaves_in_its_folder_is_the_result(
        self, driver: SandboxDriver, prepare: Prepare
    ) -> None:
        handle = await prepare(ContractJob("mkdir out; echo result >out/file; echo bad >&2; exit 7\n", {}))
        await driver.start(handle)
        events = await events_until_exit(driver, handle)
        assert ContextExited(7) in events and events[-1] == Exited(ExitCause.POWERED_OFF)
        assert output_of(events, Stream.STDERR) == b"bad\n"
        assert read_scratch(driver.scratch(handle), "/out/file") == b"result\n"

    async def test_it_cannot_become_another_user(self, driver: SandboxDriver, prepare: Prepare) -> None:
        assert "NoNewPrivs:\t1" in await said(driver, prepare, **shell("cat /proc/self/status"))

    # ---- its bounds

    async def test_memory_of_all_processes_together_is_bounded(self, driver: SandboxDriver, prepare: Prepare) -> None:
        code = "import os, time\nfor _ in range(3): os.fork()\nx = bytearray(os.urandom(1 << 20)) * 50\ntime.sleep(60)\n"
        assert "memory" in await passed_limit(driver, prepare, **python(code))

    async def test_number_of_processes_is_bounded(self, driver: SandboxDriver, prepare: Prepare) -> None:
        script = "i=0; while [ $i -lt 200 ]; do setsid sleep 60 & i=$((i+1)); done; sleep 5"
        assert "20 processes" in await passed_limit(driver, prepare, processes=20, **shell(script))

    async def test_cpu_time_counts_also_of_what_the_job_left_alone(self, driver: SandboxDriver, prepare: Prepare) -> None:
        script = "while :; do setsid sh -c 'i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done' & sleep 0.03; done"
        assert "CPU time" in await passed_limit(driver, prepare, cpu_time_s=1.0, **shell(script))

    async def test_size_of_a_file_and_disk_are_bounded(self, driver: SandboxDriver, prepare: Prepare) -> None:
        script = "head -c 3000000 /dev/zero >big; ls -l big | cut -d' ' -f5"
        assert (await said(driver, prepare, file_bytes=MIB, **shell(script))).strip() == str(MIB)
        script = "i=0; while [ $i -lt 40 ]; do head -c 1000000 /dev/urandom >$TMPDIR/$i; i=$((i+1)); done; sleep 60"
        assert "wrote more" in await passed_limit(driver, prepare, scratch_bytes=8 * MIB, **shell(script))

    # ---- its end

    async def test_whole_tree_ends_with_the_job_whatever_it_left_alone(self, driver: SandboxDriver, prepare: Prepare) -> None:
        mark = f"610.{os.getpid()}"
        await said(driver, prepare, **shell(f"(setsid sleep {mark} &) </dev/null >/dev/null 2>&1; setsid sleep {mark} & true"))
        assert not running(mark)

    async def test_whole_tree_ends_with_stop(self, driver: SandboxDriver, prepare: Prepare) -> None:
        mark = f"611.{os.getpid()}"
        handle = await started(driver, prepare, f"trap '' TERM; (setsid sleep {mark} &); sleep {mark} & echo ready; wait; wait")
        assert len(running(mark)) == 2
        await driver.stop(handle, grace_s=0.1)
        assert not running(mark)
        assert (await events_until_exit(driver, handle))[-1] == Exited(ExitCause.STOPPED)

    async def test_whole_tree_ends_when_the_machines_process_was_killed(self, driver: SandboxDriver, prepare: Prepare) -> None:
        mark = f"612.{os.getpid()}"
        handle = await started(driver, prepare, f"trap '' TERM; (setsid sleep {mark} &); sleep {mark} & echo ready; wait")
        identity = processes.find_by_token(handle.token)
        assert identity is not None
        os.kill(identity.pid, 9)
        end = (await events_until_exit(driver, handle))[-1]
        assert isinstance(end, Exited) and end.cause is ExitCause.KILLED
        assert not running(mark)

    async def test_command_that_is_not_there_is_the_jobs_fault(self, driver: SandboxDriver, prepare: Prepare) -> None:
        events, end, _, err = await done(driver, prepare, command=("/nowhere/nothing",))
        assert ContextExited(127) in events and end.cause is ExitCause.POWERED_OFF
        assert "No such file" in err

    async def test_program_can_be_kept(self, driver: SandboxDriver, prepare: Prepare) -> None:
        handle = await prepare(EMPTY, interactive=True, command=("/bin/cat",))
        await driver.start(handle)
        with await driver.connect_program(handle) as stream:
            stream.sendall(b"hello\n")
            assert stream.recv(100) == b"hello\n"
        assert Path(handle.workdir, "unsandboxed").exists()
