"""Readers that are forked: as confined as new ones, and none is left, whatever ends them or those that wait for them.

`code.interact` stands for a reader's function where the reader is to do what a test says: it does what it reads on its standard input.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import psutil
import pytest

from deskgrid.machines import readers as machines_readers
from deskgrid.machines import results
from deskgrid.machines.readers import Readers, run_reader
from deskgrid.machines.results import extract_results
from deskgrid.machines.sandbox import Finished, python_command

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="elsewhere readers are always new")

LISTING = 3
"""What lists the descriptors has one itself."""
PARENT = "import os; print(os.getppid())"
SECOND_FORK_FAILS = """
import os

def fork(forks=[], real=os.fork):
    forks.append(1)
    if len(forks) == 2:
        raise BlockingIOError("no process is left")
    return real()

os.fork = fork
"""
SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(600)"


@pytest.fixture
async def readers() -> AsyncIterator[Readers]:
    async with Readers("code") as readers:
        yield readers


async def told(readers: Readers, text: str, *, kept: tuple[int, ...] = (), wall_s: float = 60.0) -> tuple[Finished, str]:
    """Let a reader do what the text says; return how it ended and what it printed."""
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as output:
        source.write(f"{text}\n".encode())
        source.seek(0)
        finished = await readers.run("interact", "the argument", stdin=source.fileno(), stdout=output, kept=kept, wall_s=wall_s)
        output.seek(0)
        return finished, output.read().decode().replace(">>> ", "").strip()


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(30):
        while not condition():
            await asyncio.sleep(0.005)


def is_gone(pid: int) -> bool:
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    return True


def zygotes() -> list[psutil.Process]:
    """Return those that we started and that still are."""
    found = []
    for child in psutil.Process().children():
        with suppress(psutil.NoSuchProcess):
            found += [child] if "deskgrid.machines.zygote" in " ".join(child.cmdline()) else []
    return found


async def sleeping(readers: Readers, output: Path) -> tuple[asyncio.Task[Finished], int]:
    """Start a reader that sleeps; return what waits for it, and its process id once it sleeps."""
    source = output.with_name("source")
    source.write_text(f"{SLEEP}\n")

    async def run() -> Finished:
        with source.open("rb") as stdin, output.open("wb") as stdout:
            return await readers.run("interact", "", stdin=stdin.fileno(), stdout=stdout, wall_s=600)

    task = asyncio.create_task(run())
    await until(lambda: output.exists() and output.read_bytes().endswith(b"\n"))
    return task, int(output.read_text().replace(">>> ", ""))


async def cancel(task: asyncio.Task[Finished]) -> None:
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


# ---- what they do


async def test_result_is_that_of_a_new_python_and_as_confined(tmp_path: Path) -> None:
    scratch = tmp_path / "outcome" / "scratch"
    scratch.mkdir(parents=True)
    (scratch / "part").write_bytes(os.urandom(100_000))
    (tmp_path / "outcome" / "report").mkdir()
    alone = await extract_results(tmp_path / "outcome", tmp_path / "alone")
    async with Readers(results.__name__) as readers:
        forked = await asyncio.gather(
            *(extract_results(tmp_path / "outcome", tmp_path / f"forked {number}", run=readers.run) for number in range(8))
        )
        assert len(zygotes()) == 1
    assert set(forked) == {alone}
    assert (tmp_path / "forked 7").read_bytes() == (tmp_path / "alone").read_bytes()
    assert "seccomp" in alone.protections


async def test_confined_reader_can_open_nothing(readers: Readers) -> None:
    confine = (
        f"{PARENT}; from deskgrid.machines import sandbox; held = sandbox.forbid_files(); held = sandbox.allow_computing_only()"
    )
    finished, words = await told(readers, f"{confine}\nopen('/etc/hostname')\nprint(2)")
    assert (finished.code, words.splitlines()) == (0, [str(zygotes()[0].pid), "2"])
    assert b"PermissionError" in finished.errors
    finished, _ = await told(readers, f"{confine}\nimport signal; signal.raise_signal(signal.SIGABRT)")
    assert finished.code == -signal.SIGABRT


async def test_reader_has_its_argument_its_files_and_nothing_of_ours(
    readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SECRET", "x")
    folder = os.open(tmp_path, os.O_RDONLY)
    other, _ = await sleeping(readers, tmp_path / "output")
    try:
        for _ in range(2):
            finished, words = await told(
                readers,
                "import os, sys; print(sys.argv[1], sorted(map(int, os.listdir('/proc/self/fd'))), os.environ.get('SECRET'))\n"
                f"print(os.readlink('/proc/self/fd/{folder}'))",
                kept=(folder,),
            )
            assert finished.code == 0
            assert words.splitlines() == [f"the argument {[0, 1, 2, LISTING, folder]} None", str(tmp_path)]
    finally:
        os.close(folder)
        await cancel(other)


async def test_how_a_reader_ends_is_told(readers: Readers) -> None:
    assert (await told(readers, "import os; os._exit(7)"))[0].code == 7
    assert (await told(readers, "import os; os.kill(os.getpid(), 9)"))[0].code == -signal.SIGKILL
    finished, _ = await told(readers, "import os; os.write(2, b'x' * 9_000_000); os._exit(0)")
    assert finished.code == 0
    assert len(finished.errors) == 8 << 20


# ---- where none can be forked


def change_zygotes(monkeypatch: pytest.MonkeyPatch, change: str) -> None:
    """Let zygotes do this before they serve."""

    def changed(module: str, function: str, *arguments: str) -> list[str]:
        command = python_command(module, function, *arguments)
        if module == "deskgrid.machines.zygote":
            code = command.index("-c") + 1
            command[code] = f"{command[code].removesuffix('main()')}exec({change!r}); main()"
        return command

    monkeypatch.setattr(machines_readers, "python_command", changed)


async def test_what_has_too_many_files_is_read_by_a_new_python(readers: Readers) -> None:
    folders = tuple(os.open("/", os.O_RDONLY) for _ in range(20))
    try:
        assert (await told(readers, PARENT, kept=folders))[1] == str(os.getpid())
    finally:
        for folder in folders:
            os.close(folder)
    assert (await told(readers, PARENT))[1] == str(zygotes()[0].pid)


async def test_without_descriptors_of_ours_a_reader_is_new_and_the_others_go_on(
    readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    task, pid = await sleeping(readers, tmp_path / "output")
    with monkeypatch.context() as patch:
        patch.setattr(socket, "socketpair", fail)
        assert (await told(readers, PARENT))[1] == str(os.getpid())
    assert not is_gone(pid)
    assert (await told(readers, PARENT))[1] == str(zygotes()[0].pid)
    await cancel(task)


async def test_without_processes_a_reader_is_new_and_the_others_go_on(
    readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    change_zygotes(monkeypatch, SECOND_FORK_FAILS)
    task, pid = await sleeping(readers, tmp_path / "output")
    assert (await told(readers, PARENT))[1] == str(os.getpid())
    assert not is_gone(pid)
    assert (await told(readers, PARENT))[1] == str(zygotes()[0].pid)
    await cancel(task)


async def test_zygote_that_does_not_start_costs_no_result(readers: Readers, monkeypatch: pytest.MonkeyPatch) -> None:
    change_zygotes(monkeypatch, "raise SystemExit(1)")
    for _ in range(8):
        assert (await told(readers, PARENT))[1] == str(os.getpid())


async def test_lost_zygote_takes_its_readers_along_and_what_they_read_is_read_anew(readers: Readers, tmp_path: Path) -> None:
    for _ in range(3):
        task, pid = await sleeping(readers, tmp_path / "output")
        zygotes()[0].kill()
        # The new one finds its input at the end, where the first had read it to.
        assert (await task).code == 0
        assert str(pid) not in (tmp_path / "output").read_text()
        await until(lambda pid=pid: is_gone(pid))
        assert (await told(readers, PARENT))[1] == str(os.getpid())
    assert (await told(readers, PARENT))[1] == str(os.getpid()), "after the third we do without"


def test_module_loads_where_there_is_no_fcntl() -> None:
    program = "import sys; sys.modules['fcntl'] = None; import deskgrid.machines.readers"
    subprocess.run([sys.executable, "-c", program], check=True)


# ---- ends


async def test_reader_that_takes_too_long_is_ended(readers: Readers, tmp_path: Path) -> None:
    with pytest.raises(TimeoutError):
        await told(readers, SLEEP, wall_s=0.3)
    task, pid = await sleeping(readers, tmp_path / "output")
    assert (await told(readers, "print(1)"))[1] == "1"
    assert not is_gone(pid)
    await cancel(task)
    assert is_gone(pid)


async def test_zygote_that_ends_no_reader_is_ended_with_all(
    readers: Readers, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machines_readers, "_END_S", 0.2)
    task, pid = await sleeping(readers, tmp_path / "output")
    [zygote] = zygotes()
    zygote.suspend()
    await cancel(task)
    await until(lambda: is_gone(pid) and is_gone(zygote.pid))
    assert (await told(readers, "print(1)"))[1] == "1"


async def test_zygote_ends_when_nothing_was_to_do_and_is_there_again(tmp_path: Path) -> None:
    async with Readers("code", idle_s=0.05) as readers:
        for _ in range(3):
            assert (await told(readers, "print(1)"))[1] == "1"
            await until(lambda: not zygotes())
        task, _ = await sleeping(readers, tmp_path / "output")
        await asyncio.sleep(0.2)
        assert zygotes(), "a reader is at work"
        await cancel(task)


async def test_nothing_is_left_at_the_end(tmp_path: Path) -> None:
    before = sorted(os.listdir("/proc/self/fd"))
    async with Readers("code") as readers:
        task, pid = await sleeping(readers, tmp_path / "output")
        await cancel(task)
    assert not zygotes()
    assert is_gone(pid)
    await until(lambda: sorted(os.listdir("/proc/self/fd")) == before)


def test_killed_worker_leaves_neither_zygote_nor_reader(tmp_path: Path) -> None:
    source = tmp_path / "source"
    source.write_text(f"{SLEEP}\n")
    program = f"""
        import asyncio
        from deskgrid.machines.readers import Readers

        async def main():
            with open({str(source)!r}, "rb") as stdin, open({str(tmp_path / "output")!r}, "wb") as stdout:
                await Readers("code").run("interact", "", stdin=stdin.fileno(), stdout=stdout, wall_s=600)

        asyncio.run(main())
    """
    worker = subprocess.Popen([sys.executable, "-c", textwrap.dedent(program)])
    try:
        asyncio.run(until(lambda: (tmp_path / "output").exists() and (tmp_path / "output").read_bytes().endswith(b"\n")))
        below = psutil.Process(worker.pid).children(recursive=True)
    finally:
        worker.kill()
        worker.wait()
    assert len(below) == 2
    asyncio.run(until(lambda: all(is_gone(process.pid) for process in below)))


async def test_new_python_does_the_same(tmp_path: Path) -> None:
    with tempfile.TemporaryFile() as output:
        finished = await run_reader("code")("interact", "", stdin=None, stdout=output, wall_s=60)
    assert finished.code == 0
