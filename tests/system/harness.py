"""A whole grid of real processes, driven as a user and an owner would: by the command line."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil

from deskgrid.client.grid import Grid, join, login
from deskgrid.client.transport import load_credentials, save_credentials
from deskgrid.machines.disk_import import prepare_disk
from deskgrid.model import wire
from deskgrid.model.data import DataKind, Disk
from deskgrid.model.ids import JobId, Sha256
from deskgrid.model.machines import ContextLabel
from deskgrid.server.setup import init_server, make_login_link
from deskgrid.settings import ServerSettings
from deskgrid.testing.reaper import follow

LIMIT_S = 60.0
T = TypeVar("T")


def until(condition: Callable[[], Any], *, what: str, limit_s: float = LIMIT_S) -> Any:
    """Poll until `condition` gives something true, and return that; fail after `limit_s`."""
    end = time.monotonic() + limit_s
    while time.monotonic() < end:
        if found := condition():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {limit_s:.0f} s: {what}")


def wait(awaitable: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine to its end, also from a test that has a loop of its own."""
    with ThreadPoolExecutor(1) as thread:
        return thread.submit(asyncio.run, awaitable).result()


def states_of(detail: Any) -> tuple[str, list[str]]:
    """Return the state of a job and those of its attempts."""
    return detail["job"]["state"], [attempt["state"] for attempt in detail["attempts"]]


class Program:
    """One `deskgrid ...` process that runs until it is ended. What it says goes to a file."""

    def __init__(self, arguments: list[str], environment: dict[str, str], log: Path, prefix: tuple[str, ...] = ()) -> None:
        self.arguments, self.environment, self.log, self.prefix = arguments, environment, log, prefix
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with self.log.open("ab") as log:
            command = [*self.prefix, sys.executable, "-m", "deskgrid", *self.arguments]
            self.process = subprocess.Popen(command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        follow(self.process.pid)

    def kill(self, number: signal.Signals = signal.SIGKILL) -> None:
        """End the process (and what runs it, if it was started through another program)."""
        assert self.process is not None
        for child in psutil.Process(self.process.pid).children(recursive=True) if self.prefix else []:
            if "deskgrid" in child.cmdline() and "run" in child.cmdline():
                child.send_signal(number)
        self.process.send_signal(number)
        self.process.wait(LIMIT_S)

    def stop(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    @property
    def alive(self) -> bool:
        return self.process is not None and self.process.poll() is None

    def said(self) -> str:
        return self.log.read_text(errors="replace") if self.log.exists() else ""


class System:
    """A server and workers in one folder, with an admin logged in."""

    def __init__(self, folder: Path, prefix: tuple[str, ...] = ()) -> None:
        self.folder = folder
        self.prefix = prefix
        """In front of every command of the user's."""
        self.programs: list[Program] = []
        self.workers: dict[str, Program] = {}
        self.environment = {
            **{name: value for name, value in os.environ.items() if not name.startswith("DESKGRID_")},
            "DESKGRID_SERVER_HOME": str(folder / "server"),
            "DESKGRID_CLIENT_HOME": str(folder / "client"),
            "DESKGRID_SERVER_RESERVE_BYTES": "1000000",
            "DESKGRID_SERVER_LEASE_S": "3",
            "DESKGRID_SERVER_INTERVAL_S": "1",
            "DESKGRID_SERVER_SWEEP_S": "0.5",
            "DESKGRID_WORKER_RESERVE_BYTES": "1000000",
            "DESKGRID_WORKER_BACKOFF_S": "0.2",
            "DESKGRID_WORKER_MAX_BACKOFF_S": "1",
            "DESKGRID_WORKER_DRIVERS": "fake",
            "DESKGRID_WORKER_CPUS": "2",
        }
        self.server: Program | None = None
        self.address = ""

    # Programs

    def cli(self, *arguments: str | Path, expect: int | None = 0, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run one command to its end."""
        done = subprocess.run(
            [*self.prefix, sys.executable, "-m", "deskgrid", *map(str, arguments)],
            env={**self.environment, **environment},
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        if expect is not None:
            assert done.returncode == expect, f"deskgrid {arguments}: {done.returncode}\n{done.stdout}\n{done.stderr}"
        return done

    def json(self, *arguments: str | Path, expect: int | None = 0) -> Any:
        return json.loads(self.cli(*arguments, "--json", expect=expect).stdout)

    def start_server(self, *, prefix: tuple[str, ...] = (), init: bool = True) -> None:
        if init:
            wait(init_server(self.folder / "server", ServerSettings()))
        self.server = Program(
            ["server", "run", "--listen", "127.0.0.1:0", "--json"], self.environment, self.folder / "server.log", prefix
        )
        self.programs.append(self.server)
        self.server.start()
        self.address = until(self._listening, what="the server listens")
        if init:
            wait(self._login())

    async def _login(self) -> None:
        link = await make_login_link(self.folder / "server", ServerSettings(), "admin")
        save_credentials(self.folder / "client" / "credentials.json", await login(link))

    def _listening(self) -> str:
        assert self.server is not None
        assert self.server.alive, self.server.said()
        for line in self.server.said().splitlines():
            with suppress(ValueError):
                if address := json.loads(line).get("address"):
                    return str(address)
        return ""

    def restart_server(self) -> None:
        """Start the killed server again, on the port that it had."""
        assert self.server is not None
        self.server.arguments[3] = self.address
        self.server.start()
        until(lambda: self.cli("status", "--json", expect=None).returncode == 0, what="the server answers again")

    def add_worker(
        self,
        name: str = "pc",
        *,
        address: str = "",
        prefix: tuple[str, ...] = (),
        start: bool = True,
        owner: str = "",
        **environment: str,
    ) -> Program:
        home = self.folder / name
        wait(self._join(home, name, address or self.address, owner))
        program = Program(
            ["worker", "run", "--home", str(home), "--verbose"],
            {**self.environment, **environment},
            self.folder / f"{name}.log",
            prefix,
        )
        self.programs.append(program)
        self.workers[name] = program
        if start:
            program.start()
        return program

    async def _join(self, home: Path, name: str, address: str, owner: str) -> None:
        async with self.grid() as grid:
            link = await grid.join_link(owner=owner)
        save_credentials(home / "credentials.json", await join(msgspec.structs.replace(link, address=address), name))

    def stop(self) -> None:
        for program in reversed(self.programs):
            program.stop()

    # What is there

    def grid(self) -> Grid:
        return Grid(load_credentials(self.folder / "client" / "credentials.json"))

    def publish(self, name: str = "tiny", content: bytes | None = None) -> None:
        """Publish a small ISO that the fake driver does not read."""
        file = self.folder / f"{name}.iso"
        file.write_bytes(content or bytes(32769) + b"CD001" + bytes(32768))
        wait(self._publish(file, name, ContextLabel.CIDATA))

    def publish_template(self, file: Path, name: str) -> None:
        """Publish a disk that has our agent."""
        wait(self._publish(file, name, ContextLabel.CONTEXT))

    async def _publish(self, file: Path, name: str, label: ContextLabel) -> None:
        with tempfile.TemporaryDirectory() as folder:
            packed = await prepare_disk(file, Path(folder))
            disk = Disk(
                sha256=Sha256(packed.sha256),
                size_bytes=packed.size_bytes,
                virtual_bytes=packed.virtual_bytes,
                format=packed.format,
                context_label=label,
            )
            async with self.grid() as grid:
                await grid.put(packed.path, name, kind=DataKind.DISK, disk=disk)

    def job_file(self, plan: str = "", *, name: str = "job", limits: str = "", **machine: str) -> Path:
        """Write a job whose fake machine follows `plan` (see machines/fake.py)."""
        folder = self.folder / f"{name}-job"
        (folder / "context").mkdir(parents=True)
        (folder / "context" / "context.sh").write_text("echo never run by the fake driver\n")
        (folder / "context" / "fake.toml").write_text(plan)
        fields = {"disk": '"tiny"', "context": '"context"', "scratch": '"64MiB"', **machine}
        lines = "\n".join(f"{key} = {value}" for key, value in fields.items())
        file = folder / "job.toml"
        file.write_text(f'name = "{name}"\n[machine]\n{lines}\n[limits]\n{limits}\n')
        return file

    def submit(self, plan: str = "", *, name: str = "job", limits: str = "", **machine: str) -> int:
        return int(self.json("job", "submit", self.job_file(plan, name=name, limits=limits, **machine))["id"])

    def job(self, number: int) -> Any:
        async def ask() -> wire.JobDetail:
            async with self.grid() as grid:
                return await grid.job(JobId(number))

        return msgspec.to_builtins(wait(ask()))

    def states(self, number: int) -> tuple[str, list[str]]:
        return states_of(self.job(number))

    def until(self, look: Callable[[Grid], Coroutine[Any, Any, T]], *, what: str, limit_s: float = LIMIT_S) -> T:
        """Poll until `look` finds something true at the server, and return that; fail after `limit_s`.

        One connection serves all looks: a new one, let alone a command, costs more than all that is waited for.
        """

        async def come() -> T:
            async with self.grid() as grid, asyncio.timeout(limit_s):
                while not (found := await look(grid)):
                    await asyncio.sleep(0.05)
                return found

        try:
            return wait(come())
        except TimeoutError:
            raise AssertionError(f"not within {limit_s:.0f} s: {what}\n{self.logs()}") from None

    def wait_for(self, number: int, state: str, attempts: list[str] | None = None, limit_s: float = LIMIT_S) -> Any:
        detail: Any = None

        async def there(grid: Grid) -> bool:
            nonlocal detail
            detail = msgspec.to_builtins(await grid.job(JobId(number)))
            found, of = states_of(detail)
            return found == state and (attempts is None or of == attempts)

        try:
            self.until(there, what=f"job {number} is {state} with {attempts}", limit_s=limit_s)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{json.dumps(detail, indent=1)}") from None
        return detail

    def wait_to_print(self, number: int, text: str, limit_s: float = LIMIT_S) -> None:
        """Wait until a job has printed some text."""

        async def has(grid: Grid) -> bool:
            return text.encode() in (await grid.read_log(JobId(number))).data

        self.until(has, what=f"job {number} prints {text!r}", limit_s=limit_s)

    def logs(self) -> str:
        return "\n".join(f"--- {program.log.name}\n{program.said()[-6000:]}" for program in self.programs)

    def machines(self, worker: str = "pc") -> list[psutil.Process]:
        """Return the processes of a worker's machines: those that work in its attempts folder."""
        folder = str(self.folder / worker / "attempts")
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error, OSError):  # others' processes: gone, or in a folder whose name is too long to be told
                if process.status() != psutil.STATUS_ZOMBIE and process.cwd().startswith(folder):
                    found.append(process)
        return found

    def leftovers(self, worker: str = "pc") -> list[str]:
        """Return what an idle worker should not have: processes, working folders, journal entries."""
        home = self.folder / worker
        files = [str(file) for part in ("attempts", "journal") for file in (home / part).glob("*")]
        return [*files, *(f"process {process.pid}" for process in self.machines(worker))]

    def nothing_left(self, worker: str = "pc", limit_s: float = LIMIT_S) -> None:
        try:
            until(lambda: not self.leftovers(worker), what="nothing is left over", limit_s=limit_s)
        except AssertionError:
            raise AssertionError(f"left over: {self.leftovers(worker)}\n{self.logs()}") from None
