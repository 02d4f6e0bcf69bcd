"""The command line in this process, on a real server in a thread, with a worker played by hand."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
from collections.abc import Callable, Coroutine, Iterator
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

import pytest
import structlog

from deskgrid import archive
from deskgrid.cli.main import main
from deskgrid.client.grid import Grid, describe_file
from deskgrid.client.transport import Credentials, Transport
from deskgrid.model import wire
from deskgrid.model.jobs import AttemptState
from deskgrid.model.machines import DriverName, Fingerprint, MachineKind, Network
from deskgrid.model.workers import Assignment, AttemptReport, Capacity, Profile
from deskgrid.server.chores import do_chores_forever
from deskgrid.server.setup import make_login_link
from deskgrid.settings import ServerSettings
from deskgrid.testing.grids import TestGrid, running_grid
from deskgrid.units import GIB


class Ran(NamedTuple):
    """What a command did."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        """The one JSON document that it printed."""
        return json.loads(self.out)

    @property
    def error(self) -> Any:
        """The error that it told in JSON."""
        return json.loads(self.err)


Deskgrid = Callable[..., Ran]


@pytest.fixture
def deskgrid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Deskgrid:
    """Run one command as if typed in an empty folder by somebody without any settings."""
    for name in ("CLIENT", "SERVER", "WORKER"):
        monkeypatch.setenv(f"DESKGRID_{name}_HOME", str(tmp_path / name.lower()))
    monkeypatch.setenv("DESKGRID_CACHE", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")

    def run(*arguments: str | Path) -> Ran:
        capfd.readouterr()
        code = main([str(argument) for argument in arguments])
        return Ran(code, *capfd.readouterr())

    return run


class Server:
    """A real server with its event loop in a thread."""

    def __init__(self, home: Path, **settings: Any) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever)
        self._thread.start()
        self._running = running_grid(home, ServerSettings(listen="127.0.0.1:0", reserve_bytes=0, **settings))
        self.grid: TestGrid = self.do(self._running.__aenter__())
        chores = do_chores_forever(self.grid.services, Random(1))
        self._chores = asyncio.run_coroutine_threadsafe(chores, self._loop)

    def do(self, work: Coroutine[Any, Any, Any]) -> Any:
        """Run something on the server's loop and return what it gives."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(60)

    def stop(self) -> None:
        self._chores.cancel()
        self.do(self._running.__aexit__(None, None, None))
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def admin(self) -> Grid:
        return Grid(self.do(self.grid.admin()))

    def login_link(self, user: str = "admin") -> str:
        return str(self.do(make_login_link(self.grid.home, self.grid.settings, user)))

    def join_link(self) -> str:
        return str(self.do(self.grid.join_link()))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    # The server shares our stdout here; its log does not belong into what a command prints.
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    started = Server(tmp_path / "grid")
    try:
        yield started
    finally:
        started.stop()
        structlog.reset_defaults()


@pytest.fixture
def user(server: Server, deskgrid: Deskgrid) -> Deskgrid:
    """Run commands as somebody who is logged in as the admin."""
    assert deskgrid("login", server.login_link()).code == 0
    return deskgrid


@pytest.fixture
def disk(user: Deskgrid, tmp_path: Path) -> str:
    """A published disk that nobody boots."""
    image = tmp_path / "tiny.iso"
    image.write_bytes(bytes(32769) + b"CD001" + bytes(32768))
    assert user("disk", "import", image, "--name", "tiny", "--agent").code == 0
    return "tiny"


class Worker:
    """A worker played by hand, on the server's loop."""

    def __init__(self, server: Server, folder: Path) -> None:
        self._server, self._folder = server, folder
        self._credentials: Credentials = server.do(server.grid.worker("lab-7"))
        lent = Capacity(cpus=2, memory_bytes=2 * GIB, disk_bytes=20 * GIB)
        driver = Fingerprint(
            driver=DriverName.FAKE, kinds=tuple(MachineKind), usable=True, networks=tuple(Network), accelerator="none"
        )
        self._profile = Profile(os="linux", arch="x86_64", drivers=(driver,), lent=lent, version="test")

    def sync(self, *reports: AttemptReport) -> wire.SyncAnswer:
        """Report, and take what is there to do if nothing is reported."""
        return self._server.do(self._sync(reports))

    async def _sync(self, reports: tuple[AttemptReport, ...]) -> wire.SyncAnswer:
        free = self._profile.lent if not reports else Capacity(cpus=0, memory_bytes=0, disk_bytes=0)
        request = wire.Sync(profile=self._profile, paused=False, attempts=reports, free=free, cached=())
        async with Transport(self._credentials) as transport:
            return await transport.call(wire.SYNC, request)

    def take(self) -> Assignment:
        """Wait for a job and start it."""
        for _ in range(200):
            taken = self.sync().assignments
            if taken:
                self.sync(AttemptReport(attempt_id=taken[0].attempt_id, state=AttemptState.RUNNING))
                return taken[0]
            threading.Event().wait(0.02)
        raise AssertionError("no job came")

    def say(self, work: Assignment, text: bytes, *, stream: str = "stdout", offset: int = 0) -> None:
        async def send() -> None:
            async with Transport(self._credentials) as transport:
                await transport.call(
                    wire.APPEND_LOG, wire.AppendLog(attempt_id=work.attempt_id, stream=stream, offset=offset, data=text)
                )

        self._server.do(send())

    def succeed(self, work: Assignment, files: dict[str, str]) -> None:
        """End an attempt with a result."""
        self._end(work, AttemptState.SUCCEEDED, exit_code=0, files=files)

    def answer(self, count: int, value: Callable[[int], bytes]) -> None:
        """Do jobs of a warm program, whose value for an index is what is asked here."""
        for _ in range(count):
            work = self.take()
            answer = value(work.index)
            self.sync(AttemptReport(attempt_id=work.attempt_id, state=AttemptState.SUCCEEDED, exit_code=0, value=answer))

    def fail(self, work: Assignment, reason: str) -> None:
        self._end(work, AttemptState.FAILED, exit_code=3, reason=reason, files={})

    def _end(self, work: Assignment, state: AttemptState, *, files: dict[str, str], exit_code: int, reason: str = "") -> None:
        folder, packed = self._folder / f"scratch-{work.attempt_id}", self._folder / f"result-{work.attempt_id}"
        folder.mkdir()
        for name, text in files.items():
            (folder / name).write_text(text)
        archive.pack_folder(folder, packed)
        blob = describe_file(packed)

        async def send() -> None:
            async with Transport(self._credentials) as transport:
                await transport.upload(packed, blob)

        self._server.do(send())
        self.sync(AttemptReport(attempt_id=work.attempt_id, state=state, exit_code=exit_code, reason=reason, result=blob))


@pytest.fixture
def worker(server: Server, tmp_path: Path) -> Worker:
    return Worker(server, tmp_path)


class Owner:
    """Somebody who does things while a command runs in the main thread."""

    def __init__(self, act: Callable[[], None]) -> None:
        self._errors: list[BaseException] = []
        self._act = act
        self._thread = threading.Thread(target=self._run)

    def _run(self) -> None:
        try:
            self._act()
        except BaseException as error:
            self._errors.append(error)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._thread.join(60)
        if self._errors:
            raise self._errors[0]
