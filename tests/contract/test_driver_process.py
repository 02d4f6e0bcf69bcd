"""The process driver keeps the contract, and its sandbox holds: each claim is tried from inside."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import psutil
import pytest

from deskgrid.clock import SystemClock
from deskgrid.errors import InvalidInput, MachineFailed
from deskgrid.machines import process, process_sandbox, processes
from deskgrid.machines.driver import ContextExited, Conversing, ExitCause, Exited, MachineEvent, MachineSpec, Output, Stream
from deskgrid.machines.process import SandboxDriver
from deskgrid.machines.results import extract_results
from deskgrid.model.machines import MachineKind, Network
from deskgrid.testing.driver_contract import (
    NETWORK,
    TICKING,
    ContractJob,
    DriverContract,
    Prepare,
    SuspendableDriver,
    events_until_exit,
    output_of,
    read_scratch,
)
from deskgrid.units import MIB

PYTHON = "/usr/bin/python3"
"""The system's: ours may be in somebody's home, which no sandbox sees."""
EMPTY = ContractJob("", {})
TALKER = """
import socket, threading
server = socket.create_server(("127.0.0.1", 8080))
def echo():
    connection, _ = server.accept()
    while data := connection.recv(65536):
        connection.sendall(data)
    connection.close()
thread = threading.Thread(target=echo, daemon=True)
thread.start()
with socket.create_connection(("{host}", 5432)) as door:
    door.sendall(b"hello from db\\n")
    door.shutdown(socket.SHUT_WR)
    answer = b"".join(iter(lambda: door.recv(65536), b""))
import os
os.mkdir("fetched")
open("fetched/db", "wb").write(answer)
"""


LEAVER = """
import asyncio, sys, time
from pathlib import Path
from deskgrid.clock import SystemClock
from deskgrid.machines.driver import MachineSpec
from deskgrid.machines.process import SandboxDriver
from deskgrid.model.machines import MachineKind

async def leave():
    driver = SandboxDriver(SystemClock())
    spec = MachineSpec("warm", MachineKind.PROCESS, 1 << 28, 1, 1 << 26, interactive=True, command=("/bin/sh", "-c", "sleep 600"))
    handle = await driver.prepare(spec, Path(sys.argv[1]))
    await driver.start(handle)
    (await driver.connect_program(handle)).close()
    print(handle.token, flush=True)

asyncio.run(leave())
time.sleep(600)
"""
"""A worker that keeps a program which never reads its end."""


def python(code: str, **changes: Any) -> dict[str, Any]:
    """Return the changes of a spec that run a piece of Python."""
    return {"command": (PYTHON, "-c", code), **changes}


def shell(script: str, **changes: Any) -> dict[str, Any]:
    """Return the changes of a spec that run a shell script."""
    return {"command": ("/bin/sh", "-c", script), **changes}


async def done(driver: SandboxDriver, prepare: Prepare, **changes: Any) -> tuple[list[MachineEvent], Exited, str, str]:
    """Run a job to its end; return its events, the last one, and what it said."""
    handle = await prepare(EMPTY, **changes)
    await driver.start(handle)
    events = await events_until_exit(driver, handle)
    end = events[-1]
    assert isinstance(end, Exited)
    return events, end, output_of(events, Stream.STDOUT).decode(), output_of(events, Stream.STDERR).decode()


async def said(driver: SandboxDriver, prepare: Prepare, **changes: Any) -> str:
    """Run a job that must succeed; return its stdout."""
    events, end, out, err = await done(driver, prepare, **changes)
    assert end == Exited(ExitCause.POWERED_OFF), err
    assert ContextExited(0) in events, err
    return out


async def passed_limit(driver: SandboxDriver, prepare: Prepare, **changes: Any) -> str:
    """Run a job that must be ended for a limit; return what the user is told."""
    events, end, _, err = await done(driver, prepare, **changes)
    assert end.cause is ExitCause.LIMIT, (end, err)
    assert not [event for event in events if isinstance(event, ContextExited)]
    assert f"deskgrid: the job was ended: {end.detail}" in err
    return end.detail


class TestProcessDriver(DriverContract):
    @pytest.fixture
    def new_driver(self) -> Callable[[], SuspendableDriver]:
        return lambda: SandboxDriver(SystemClock())

    @pytest.fixture
    def spec(self) -> MachineSpec:
        return MachineSpec(
            "job-1/attempt-1", MachineKind.PROCESS, memory_bytes=256 * MIB, cpus=1, scratch_bytes=64 * MIB, processes=100
        )

    @pytest.fixture
    def talking(self) -> ContractJob:
        return ContractJob(f"exec {PYTHON} - <<'END'\n{TALKER.format(host='db')}END\n", {})

    # ---- what it can do here

    async def test_fingerprint_says_that_it_confines(self, driver: SandboxDriver) -> None:
        found = await driver.fingerprint()
        assert found.usable, found.reason
        assert found.kinds == (MachineKind.PROCESS,)
        assert found.networks == (Network.NONE, Network.OVERLAY)

    async def test_without_bubblewrap_it_is_not_usable_and_says_what_to_do(
        self, driver: SandboxDriver, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        find = processes.find_program
        monkeypatch.setattr(processes, "find_program", lambda name: None if name == "bwrap" else find(name))
        found = await driver.fingerprint()
        assert not found.usable
        assert "apt-get install bubblewrap" in found.reason

    async def test_sandbox_without_its_filter_is_found_out(self, driver: SandboxDriver, monkeypatch: pytest.MonkeyPatch) -> None:
        line = process_sandbox.sandbox_line
        monkeypatch.setattr(process, "sandbox_line", lambda *words: [*without(line(*words), "--seccomp", 2)])
        found = await driver.fingerprint()
        assert not found.usable
        assert "Seccomp is 0" in found.reason

    # ---- what it sees

    async def test_job_sees_its_files_and_nothing_of_the_owner(
        self, driver: SandboxDriver, prepare: Prepare, tmp_path: Path
    ) -> None:
        secret = tmp_path / "secret"
        secret.write_text("mine")
        app = tmp_path / "app"
        app.mkdir()
        (app / "tool").write_text("#!/bin/sh\necho tool\n")
        (app / "tool").chmod(0o755)
        out = await said(
            driver,
            prepare,
            program=app,
            **shell(
                f"cat {secret} 2>/dev/null; ls -d /home /root /var /run /sys /opt 2>/dev/null; pwd; /app/tool; ls -A /context /tmp /dev/shm;"
                " for f in /app/x /context/x /usr/x /etc/x /x /dev/x; do (: >$f) 2>/dev/null && echo $f; done; true"
            ),
        )
        assert out.splitlines() == ["/scratch", "tool", "/context:", "context.sh", "fake.toml", "", "/dev/shm:", "", "/tmp:"]

    async def test_job_sees_no_process_but_its_own_and_has_no_rights(self, driver: SandboxDriver, prepare: Prepare) -> None:
        out = await said(
            driver, prepare, **shell("ls /proc | grep -c '^[0-9]'; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; id -u")
        )
        count, *rest = out.split()
        assert int(count) <= 5
        assert rest == ["CapEff:", "0" * 16, "NoNewPrivs:", "1", "Seccomp:", "2", "1000"]

    async def test_settings_of_the_kernel_cannot_be_opened_for_writing(self, driver: SandboxDriver, prepare: Prepare) -> None:
        # For a worker that is root the kernel would allow it, were it not for the mount. Nothing is written, only opened.
        code = (
            "import os\n"
            "for name in ('/proc/sys/kernel/core_pattern', '/proc/sys/vm/overcommit_memory', '/proc/sysrq-trigger'):\n"
            "    try: os.close(os.open(name, os.O_WRONLY)); print('open', name)\n"
            "    except OSError as error: print(error.errno)\n"
        )
        assert set((await said(driver, prepare, **python(code))).split()) <= {"30", "13", "2"}

    async def test_environment_is_clean_and_the_specs_own_wins(
        self, driver: SandboxDriver, prepare: Prepare, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OWNERS_SECRET", "x")
        out = await said(driver, prepare, environment=(("NAME", "a b\n'"), ("HOME", "/scratch")), command=("/usr/bin/env", "-0"))
        found = dict(word.split("=", 1) for word in out.rstrip("\0").split("\0"))
        assert found.pop("NAME") == "a b\n'"
        assert found.pop("HOME") == "/scratch"
        assert set(found) <= {"PATH", "TMPDIR", "USER", "LOGNAME", "LANG", "PWD"}

    async def test_what_a_sandbox_has_no_use_for_is_refused(self, driver: SandboxDriver, prepare: Prepare) -> None:
        code = (
            "import ctypes, fcntl, os, socket, termios\n"
            "libc = ctypes.CDLL(None, use_errno=True)\n"
            "def call(name, *words):\n"
            "    print(name, ctypes.get_errno() if getattr(libc, name)(*words) == -1 else 'done')\n"
            "call('unshare', 0x10000000); call('setns', 0, 0); call('mount', b'x', b'/tmp', b'tmpfs', 0, None)\n"
            "call('ptrace', 0, 0, 0, 0); call('personality', 8); call('chroot', b'/tmp'); call('memfd_create', b'x', 0)\n"
            "for number in (250, 321, 323, 246, 425):\n"
            "    print(number, 'done' if libc.syscall(number, 0, 0, 0, 0, 0) != -1 else ctypes.get_errno())\n"
            "try: os.sched_setaffinity(0, {0, 1}); print('affinity done')\n"
            "except OSError as error: print('affinity', error.errno)\n"
            "for family in (40, 17, 38):\n"
            "    try: socket.socket(family, socket.SOCK_DGRAM); print('family', family, 'done')\n"
            "    except OSError as error: print('family', family, error.errno)\n"
            "try: fcntl.ioctl(1, termios.TIOCSTI, b'x'); print('tiocsti done')\n"
            "except OSError as error: print('tiocsti', error.errno)\n"
            "call('shmget', 1, 1 << 20, 0o1600); call('shmget', 2, 4096, 0o1600)\n"
        )
        if os.uname().machine != "x86_64":
            code = code.replace("(250, 321, 323, 246, 425)", "()")
        lines = (await said(driver, prepare, **python(code))).splitlines()
        assert lines.pop() == "shmget done"  # databases need a small one
        refused = {"memfd_create": "38"}
        assert [line for line in lines if line.split()[-1] != refused.get(line.split()[0], "1")] == []

    # ---- bounds

    async def test_memory_of_all_processes_together_is_bounded(self, driver: SandboxDriver, prepare: Prepare) -> None:
        code = "import os, time\nfor _ in range(3):\n    if not os.fork(): break\nx = bytearray(os.urandom(1) * (40 << 20))\ntime.sleep(60)\n"
        assert "memory" in await passed_limit(driver, prepare, memory_bytes=100 * MIB, **python(code))

    async def test_memory_that_processes_share_counts_once(self, driver: SandboxDriver, prepare: Prepare) -> None:
        code = "import os, time\nx = bytearray(b'1' * (60 << 20))\nfor _ in range(4):\n    if not os.fork(): time.sleep(0.5); os._exit(0)\ntime.sleep(0.5)\n"
        await said(driver, prepare, memory_bytes=150 * MIB, **python(code))

    async def test_one_process_cannot_reserve_memory_without_end(self, driver: SandboxDriver, prepare: Prepare) -> None:
        code = "try: bytearray(20 << 30); print('got it')\nexcept MemoryError: print('refused')\n"
        assert await said(driver, prepare, **python(code)) == "refused\n"

    async def test_number_of_processes_is_bounded(self, driver: SandboxDriver, prepare: Prepare) -> None:
        # The kernel refuses, or (for a worker that is root) we see it and end the job.
        script = "i=0; while [ $i -lt 200 ]; do sleep 60 & i=$((i+1)); done; sleep 5"
        _, end, _, err = await done(driver, prepare, **shell(script, processes=20))
        assert (end.cause is ExitCause.LIMIT and "20 processes" in end.detail) or "fork" in err

    async def test_cpu_time_of_all_processes_together_is_bounded(self, driver: SandboxDriver, prepare: Prepare) -> None:
        script = "while :; do sh -c 'i=0; while [ $i -lt 20000 ]; do i=$((i+1)); done'; done"
        assert "CPU time" in await passed_limit(driver, prepare, cpu_time_s=1.0, **shell(script))

    async def test_cpus_are_bounded(self, driver: SandboxDriver, prepare: Prepare) -> None:
        assert (await said(driver, prepare, **shell("nproc"))).strip() == "1"

    async def test_size_of_a_file_is_bounded(self, driver: SandboxDriver, prepare: Prepare) -> None:
        script = "head -c 3000000 /dev/zero >big; echo $?; ls -l big | cut -d' ' -f5"
        status, size = (await said(driver, prepare, file_bytes=MIB, **shell(script))).split()
        assert (int(status) != 0, int(size)) == (True, MIB)

    @pytest.mark.parametrize("place", ["/scratch", "/tmp", "/dev/shm"])
    async def test_disk_is_bounded(self, driver: SandboxDriver, prepare: Prepare, place: str) -> None:
        script = f"i=0; while [ $i -lt 40 ]; do head -c 1000000 /dev/urandom >{place}/$i; i=$((i+1)); done; sleep 60"
        assert "wrote more" in await passed_limit(driver, prepare, scratch_bytes=8 * MIB, **shell(script))

    async def test_files_without_a_name_count(self, driver: SandboxDriver, prepare: Prepare) -> None:
        code = "import os, time\nfor i in range(30):\n    f = os.open('x', os.O_RDWR | os.O_CREAT); os.unlink('x'); os.write(f, os.urandom(1 << 20))\ntime.sleep(60)\n"
        assert "wrote more" in await passed_limit(driver, prepare, scratch_bytes=8 * MIB, **python(code))

    async def test_output_counts(self, driver: SandboxDriver, prepare: Prepare) -> None:
        script = "for i in 1 2 3 4; do cat /dev/zero | head -c 3000000; done; sleep 60"
        assert "wrote more" in await passed_limit(driver, prepare, scratch_bytes=8 * MIB, **shell(script))

    async def test_tree_too_deep_to_be_measured_is_refused_and_removed(self, driver: SandboxDriver, prepare: Prepare) -> None:
        code = "import os, time\nfor _ in range(3000):\n    os.mkdir('d'); os.chdir('d')\ntime.sleep(60)\n"
        assert "nested" in await passed_limit(driver, prepare, **python(code))

    # ---- ends

    async def test_command_that_is_not_there_is_the_jobs_fault(self, driver: SandboxDriver, prepare: Prepare) -> None:
        events, end, _, err = await done(driver, prepare, command=("/app/nothing",))
        assert ContextExited(127) in events
        assert end.cause is ExitCause.POWERED_OFF
        assert "No such file" in err

    async def test_what_the_job_left_running_ends_with_it(self, driver: SandboxDriver, prepare: Prepare) -> None:
        mark = f"600.{os.getpid()}"
        await said(driver, prepare, **shell(f"setsid sleep {mark} </dev/null >/dev/null 2>&1 & true"))
        assert not [process.pid for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or ())]

    async def test_killed_machine_takes_its_sandbox_along(self, driver: SandboxDriver, prepare: Prepare) -> None:
        mark = f"601.{os.getpid()}"
        handle = await prepare(EMPTY, **shell(f"trap '' TERM; sleep {mark} & echo ready; wait"))
        await driver.start(handle)
        async with asyncio.timeout(20):
            async for event in driver.events(handle):
                if isinstance(event, Output):
                    break
        identity = processes.find_by_token(handle.token)
        assert identity is not None
        os.kill(identity.pid, 9)
        assert (await events_until_exit(driver, handle))[-1].__class__ is Exited
        assert not [process.pid for process in psutil.process_iter(["cmdline"]) if mark in (process.info["cmdline"] or ())]

    async def test_stop_asks_first(self, driver: SandboxDriver, prepare: Prepare) -> None:
        handle = await prepare(
            EMPTY, **shell("trap 'echo bye >/scratch/bye; exit 0' TERM; echo ready; while :; do sleep 0.05; done")
        )
        await driver.start(handle)
        async with asyncio.timeout(20):
            async for event in driver.events(handle):
                if isinstance(event, Output):
                    break
        await driver.stop(handle, grace_s=10)
        assert read_scratch(driver.scratch(handle), "/bye") == b"bye\n"
        assert (await events_until_exit(driver, handle))[-1] == Exited(ExitCause.STOPPED)
        assert not (driver.scratch(handle) / "report" / "exit").exists()

    async def test_many_processes_are_frozen_and_thawed_together(self, driver: SandboxDriver, prepare: Prepare) -> None:
        script = "for i in 1 2 3 4 5; do (while :; do echo $i >>/scratch/n; done) & done; echo ready; wait"
        handle = await prepare(EMPTY, **shell(script))
        await driver.start(handle)
        async with asyncio.timeout(20):
            async for event in driver.events(handle):
                if isinstance(event, Output):
                    break
        await driver.pause(handle)
        file = driver.scratch(handle) / "scratch" / "n"
        before = file.stat().st_size
        await asyncio.sleep(0.3)  # in which they would write much
        assert file.stat().st_size == before
        await driver.resume(handle)
        async with asyncio.timeout(20):
            while file.stat().st_size == before:
                await asyncio.sleep(0.005)

    async def test_pause_right_after_start_does_not_end_it(self, driver: SandboxDriver, prepare: Prepare) -> None:
        handle = await prepare(TICKING)
        await driver.start(handle)
        await driver.pause(handle)
        await driver.resume(handle)
        async with asyncio.timeout(20):
            async for event in driver.events(handle):
                if isinstance(event, Output):
                    break
                assert not isinstance(event, Exited)

    # ---- results

    async def test_result_is_taken_out_like_that_of_a_vm(self, driver: SandboxDriver, prepare: Prepare, tmp_path: Path) -> None:
        handle = await prepare(
            EMPTY, **shell("mkdir out; echo 1 >out/a.root; echo 2 >out/b.txt; ln -s /etc/passwd out/link.root; echo told; exit 4")
        )
        await driver.start(handle)
        await events_until_exit(driver, handle)
        report = await extract_results(driver.scratch(handle), tmp_path / "result", paths=("out/*.root",))
        assert (report.exit_code, report.stdout, report.files) == (4, b"told\n", 3)

    # ---- network

    async def test_services_are_at_localhost_and_in_services_json(self, driver: SandboxDriver, prepare: Prepare) -> None:
        handle = await prepare(
            EMPTY,
            **NETWORK,
            **python(
                TALKER.replace("{host}", "localhost") + "print(open('/context/services.json').read(), os.environ['DESKGRID_DB'])"
            ),
        )
        await driver.start(handle)
        reading = asyncio.create_task(events_until_exit(driver, handle))
        with await driver.open_socket(handle) as listener:
            listener.bind(("10.64.1.1", 5432))
            listener.listen()
            listener.setblocking(False)
            async with asyncio.timeout(20):
                connection, _ = await asyncio.get_running_loop().sock_accept(listener)
                reader, writer = await asyncio.open_connection(sock=connection)
                assert await reader.read() == b"hello from db\n"
                writer.write(b"hello yourself\n")
                writer.close()
                events = await reading
        assert read_scratch(driver.scratch(handle), "/fetched/db") == b"hello yourself\n"
        text, _, variable = output_of(events, Stream.STDOUT).decode().rstrip().rpartition(" ")
        assert json.loads(text)["reach"]["db"]["localhost"] is True
        assert variable == "db:5432"

    async def test_without_a_network_there_is_only_a_loopback_of_its_own(self, driver: SandboxDriver, prepare: Prepare) -> None:
        with socket.create_server(("127.0.0.1", 0)) as server:
            code = f"import socket\nprint(socket.if_nameindex())\ntry: socket.create_connection(('127.0.0.1', {server.getsockname()[1]}))\nexcept OSError as e: print(e.errno)"
            assert (await said(driver, prepare, **python(code))).split("\n")[:2] == ["[(1, 'lo')]", "111"]

    # ---- programs that stay

    async def test_program_is_talked_to_over_one_stream_also_by_a_restarted_worker(
        self, driver: SandboxDriver, new_driver: Callable[[], SandboxDriver], prepare: Prepare
    ) -> None:
        handle = await prepare(EMPTY, interactive=True, command=("/bin/cat",))
        await driver.start(handle)
        assert isinstance(driver, Conversing)
        with await driver.connect_program(handle) as first:
            first.sendall(b"one\n")
            assert first.recv(100) == b"one\n"
        with await new_driver().connect_program(handle) as second:
            second.sendall(b"two\n")
            assert second.recv(100) == b"two\n"
            second.shutdown(socket.SHUT_WR)
            assert second.recv(100) == b""
        assert (await events_until_exit(driver, handle))[-1] == Exited(ExitCause.POWERED_OFF)
        with pytest.raises(MachineFailed, match="off"):
            await driver.connect_program(handle)

    async def test_program_that_is_not_kept_cannot_be_talked_to(self, driver: SandboxDriver, prepare: Prepare) -> None:
        handle = await prepare(TICKING)
        await driver.start(handle)
        with pytest.raises(MachineFailed, match="no program"):
            await driver.connect_program(handle)

    async def test_program_that_is_kept_ends_with_the_process_that_started_it(self, tmp_path: Path) -> None:
        worker = await asyncio.create_subprocess_exec(
            sys.executable, "-c", LEAVER, str(tmp_path / "machine"), stdout=asyncio.subprocess.PIPE
        )
        assert worker.stdout is not None
        token = (await worker.stdout.readline()).decode().strip()
        assert processes.find_by_token(token) is not None
        worker.kill()
        await worker.wait()
        async with asyncio.timeout(20):
            while processes.find_by_token(token) is not None or processes.find_by_token(str(tmp_path / "machine")) is not None:
                await asyncio.sleep(0.02)

    async def test_machine_ends_by_itself_after_its_lifetime_in_which_it_was_not_frozen(
        self, driver: SandboxDriver, prepare: Prepare
    ) -> None:
        handle = await prepare(EMPTY, lifetime_s=1.0, **shell("echo ready; sleep 60"))
        await driver.start(handle)
        await driver.pause(handle)
        await asyncio.sleep(1.5)
        assert processes.find_by_token(handle.token) is not None
        await driver.resume(handle)
        assert (await events_until_exit(driver, handle))[-1] == Exited(ExitCause.LIMIT, "it ran for longer than 1 s")

    async def test_words_of_a_program_that_stays_are_told(self, driver: SandboxDriver, prepare: Prepare) -> None:
        _, end, out, err = await done(driver, prepare, **shell("echo problem >&2; echo answer", interactive=True))
        assert (end.cause, out, err) == (ExitCause.POWERED_OFF, "", "problem\n")

    # ---- input

    @pytest.mark.parametrize(
        "changes",
        [{"interactive": True}, {"command": ("a\0b",)}, {"environment": (("A=B", "x"),)}, {"environment": (("A", "\0"),)}],
    )
    async def test_what_cannot_be_run_is_refused_and_leaves_nothing(
        self, prepare: Prepare, tmp_path: Path, changes: dict[str, Any]
    ) -> None:
        with pytest.raises(InvalidInput):
            await prepare(EMPTY, **changes)
        assert not list(tmp_path.glob("machine-*"))

    async def test_links_in_the_context_are_never_written_through(
        self, driver: SandboxDriver, spec: MachineSpec, tmp_path: Path
    ) -> None:
        context, outside = tmp_path / "context", tmp_path / "outside"
        context.mkdir()
        outside.mkdir()
        (context / "grid").symlink_to(outside)
        (context / "services.json").symlink_to(outside / "services.json")
        credentials = tmp_path / "credentials"
        credentials.write_text("secret")
        changed = msgspec.structs.replace(spec, context=context, credentials=credentials, **NETWORK)
        handle = await driver.prepare(changed, tmp_path / "machine")
        with contextlib.suppress(MachineFailed):
            assert list(outside.iterdir()) == []
        await driver.destroy(handle)


def without(words: list[str], option: str, count: int) -> list[str]:
    """Return a command line without an option of so many words."""
    place = words.index(option)
    return words[:place] + words[place + count :]


assert sys.platform == "linux"
