"""The protections hold: each is tried by a process that wants to break it."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from deskgrid.machines.sandbox import Confinement, python_command, run_child, run_confined, sandbox_status

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="these protections are Linux's")

ROOMY = Confinement(memory_bytes=1 << 30, cpu_s=30)

READER = """
import ctypes, errno, mmap, os, signal, socket, sys, threading
from deskgrid.machines import sandbox
{before}
sandbox.limit_resources(sandbox.Confinement(memory_bytes=1 << 30, cpu_s=30))
if "files" in {use!r}: sandbox.forbid_files()
if "calls" in {use!r}: sandbox.allow_computing_only()
def attempt():
    {attempt}
try:
    attempt()
except OSError as error:
    os.write(1, b"refused " + errno.errorcode[error.errno].encode())
except RuntimeError as error:
    os.write(1, b"refused " + str(error).encode())
else:
    os.write(1, b"done")
os._exit(0)
"""


def tried(attempt: str, *, use: str = "files calls", before: str = "") -> str:
    """Return what a confined reader gets when it tries something."""
    code = READER.format(attempt=attempt, use=use, before=before)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=False)
    return (done.stdout or done.stderr).decode()


@pytest.mark.parametrize(
    "attempt",
    [
        "open('/etc/hostname')",
        "os.open('/', os.O_RDONLY)",
        "open('/tmp/new', 'w')",
        "os.listdir('/')",
        "os.mkdir('/tmp/new')",
        "os.unlink('/etc/hostname')",
        "os.chmod('/etc/hostname', 0o666)",
        "socket.socket()",
        "socket.socket(socket.AF_UNIX)",
        "os.fork()",
        "os.execv('/bin/true', ['true'])",
        "os.kill(os.getppid(), signal.SIGTERM)",
        "os.pipe()",
        "os.dup(1)",
        "threading.Thread(target=print).start()",
        "mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_EXEC)",
        "os.setuid(0)",
        "os.sched_setaffinity(0, {0})",
    ],
)
def test_reader_can_do_nothing_but_compute(attempt: str) -> None:
    assert tried(attempt).startswith("refused")


@pytest.mark.parametrize(
    "attempt", ["os.write(1, b'')", "os.lseek(0, 0, 0) if False else 0", "bytearray(50 << 20)", "sum(range(10))"]
)
def test_reader_can_compute(attempt: str) -> None:
    assert tried(attempt) == "done"


def test_each_protection_alone_keeps_files_closed() -> None:
    assert tried("open('/etc/hostname')", use="files").startswith("refused")
    assert tried("open('/etc/hostname')", use="calls").startswith("refused")
    assert tried("open('/etc/hostname')", use="") == "done"


def test_threads_started_before_are_confined_too() -> None:
    before = """
go, results = threading.Event(), []
def late():
    go.wait()
    try: open('/etc/hostname')
    except OSError as error: results.append(error)
thread = threading.Thread(target=late); thread.start()
"""
    assert tried("go.set(); thread.join(); raise results[0]", use="calls", before=before) == "refused EPERM"


def test_memory_is_bounded() -> None:
    assert "MemoryError" in tried("bytearray(2 << 30)")


def test_status_names_what_holds_here() -> None:
    assert {"rlimits", "no_new_privs", "seccomp"} <= set(sandbox_status())


def test_child_starts_fast_and_sees_nothing_of_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", "/nowhere")
    monkeypatch.setenv("SECRET", "x")
    command = python_command("deskgrid.machines.sandbox", "report_status")
    times = []
    for _ in range(5):
        start = time.monotonic()
        asyncio.run(run_child(command, wall_s=30))
        times.append(time.monotonic() - start)
    assert min(times) < 1.0  # 0.07 s on a quiet machine


# --- converters ---


async def run(*command: str, confinement: Confinement = ROOMY, wall_s: float = 30.0):
    return await run_confined(command, confinement, wall_s=wall_s)


async def test_converter_reads_only_its_input(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("input")
    (tmp_path / "other").write_text("other")
    confinement = Confinement(memory_bytes=1 << 30, cpu_s=30, readable=(str(tmp_path / "in"),))
    assert (await run("/bin/cat", str(tmp_path / "in"), confinement=confinement)).output == b"input"
    for path in (tmp_path / "other", Path("/etc/hostname"), Path("/proc/self/environ")):
        finished = await run("/bin/cat", str(path), confinement=confinement)
        assert finished.code == 1
        assert b"ermission denied" in finished.errors


async def test_converter_writes_only_its_output_folder(tmp_path: Path) -> None:
    (tmp_path / "in").write_text("input")
    (tmp_path / "out").mkdir()
    confinement = Confinement(
        memory_bytes=1 << 30, cpu_s=30, readable=(str(tmp_path / "in"),), writable=(str(tmp_path / "out"),), file_bytes=100
    )
    copy = ("/bin/cp", str(tmp_path / "in"))
    assert (await run(*copy, str(tmp_path / "out" / "copy"), confinement=confinement)).code == 0
    assert (await run(*copy, str(tmp_path / "copy"), confinement=confinement)).code != 0
    assert not (tmp_path / "copy").exists()
    (tmp_path / "in").write_text("x" * 101)
    assert (await run(*copy, str(tmp_path / "out" / "large"), confinement=confinement)).code != 0


async def test_converter_has_no_network_and_starts_no_program() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        finished = await run("/bin/bash", "-c", f"echo x > /dev/tcp/127.0.0.1/{port}")
        assert finished.code != 0
    finished = await run("/bin/bash", "-c", "/bin/true; echo still here")
    assert b"still here" not in finished.output or b"not permitted" in finished.errors or b"denied" in finished.errors
    finished = await run("/bin/bash", "-c", "exec /bin/true")
    assert finished.code == 126


async def test_output_is_captured_within_bounds() -> None:
    finished = await run(
        "/usr/bin/head",
        "-c",
        "20000000",
        "/dev/zero",
        confinement=Confinement(memory_bytes=1 << 30, cpu_s=30, readable=("/dev/zero",)),
    )
    assert finished.code == 0
    assert len(finished.output) == 8 << 20


def children() -> list[psutil.Process]:
    return psutil.Process().children(recursive=True)


async def test_time_limit_ends_the_process() -> None:
    with pytest.raises(TimeoutError):
        await run("/bin/sleep", "60", wall_s=0.3)
    assert children() == []


async def test_cancelled_child_is_gone_with_its_descriptors() -> None:
    await run("/bin/true")  # what asyncio keeps open for good
    before = len(os.listdir("/proc/self/fd"))
    for talk in ("sleep 60", "while :; do echo yyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyyy; done"):
        task = asyncio.create_task(
            run_child(["/bin/bash", "-c", f"exec 2>&1; {talk}" if "while" in talk else f"exec {talk}"], wall_s=60)
        )
        await asyncio.sleep(0.3)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert children() == []
    await asyncio.sleep(0)
    assert len(os.listdir("/proc/self/fd")) <= before


async def test_processor_time_is_bounded() -> None:
    finished = await run("/bin/bash", "-c", "while :; do :; done", confinement=Confinement(memory_bytes=1 << 30, cpu_s=1))
    assert finished.code < 0


async def test_converter_has_few_descriptors() -> None:
    assert (await run("/bin/sh", "-c", "ulimit -n")).output == b"64\n"
