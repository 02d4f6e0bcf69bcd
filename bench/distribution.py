"""A disk to many workers at once from a server with a slow link: together, against each from the server alone, and against what is possible at all.

Server and workers are in network namespaces with an address each; the server's link carries 20 MB/s (tc tbf), those of the workers what this
machine can. All share its CPUs, and what 8 or 32 workers check, encrypt and decrypt at that rate is more than two can: so the same is measured with a
slower link, too, for which they suffice. Each worker is a process with the worker's own code for fetching (worker/sharing.py, or the download that is used without it); its job
is leased before. It ends when the blob is whole and its sha256 was checked.

    time         from the word to the last worker's end
    bound        max(F/us, F/dmin, N*F/(us + sum ui)) of Kumar and Ross (2006) for F bytes, N workers: with workers that are fast, F/us
    copies       bytes that left the server's link, by the size of the disk
    alone        the same by plain HTTPS; for the slower links it follows from N*F/us
    CPU          that a worker and its engine used from the word on, and how busy the CPUs of this machine were meanwhile
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import psutil
import structlog
from msgspec import Struct

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]
from report import Figure, arguments, median_of, publish

from deskgrid.client.grid import describe_file
from deskgrid.client.transport import Transport, load_credentials
from deskgrid.clock import SystemClock
from deskgrid.model import wire
from deskgrid.model.data import Blob, DataKind, Disk
from deskgrid.model.jobs import JobSpec, Machine
from deskgrid.model.machines import DiskFormat
from deskgrid.model.workers import Capacity
from deskgrid.settings import WorkerSettings
from deskgrid.swarm.cache import Cache
from deskgrid.testing.grids import played_sync
from deskgrid.testing.natlab import Host, Nat, NatLab
from deskgrid.units import GIB, MIB
from deskgrid.worker.sharing import Sharing

_READY_S = 300.0


class Cell:
    """A grid in the laboratory: a server with a slow link, and places for workers."""

    def __init__(self, folder: Path, lab: NatLab) -> None:
        self.folder, self.lab = folder, lab
        self.environment = {name: value for name, value in os.environ.items() if not name.startswith("DESKGRID_")}
        self.environment |= {
            "DESKGRID_SERVER_HOME": str(folder / "server"),
            "DESKGRID_CLIENT_HOME": str(folder / "client"),
            "DESKGRID_SERVER_RESERVE_BYTES": "0",
        }

    @property
    def hosts(self) -> list[Host]:
        return [host for site in self.lab.sites.values() for host in site]

    def deskgrid(self, *words: str, at: Host | None = None) -> Any:
        """Run a command and return what it answers."""
        host = at or self.lab.server
        done = host.popen(
            [sys.executable, "-m", "deskgrid", *words, "--json"],
            env=self.environment,
            stdout=subprocess.PIPE,
            stdin=subprocess.DEVNULL,
        )
        output, _ = done.communicate(timeout=300)
        if done.returncode:
            raise SystemExit(f"{words} failed")
        return json.loads(output)

    @contextlib.contextmanager
    def serving(self) -> Iterator[None]:
        """Run the server; let its admin log in."""
        link = self.deskgrid("server", "init", "--listen", "9.9.1.1:8470")["login_link"]
        with (self.folder / "server.log").open("wb") as log:
            command = [sys.executable, "-m", "deskgrid", "server", "run", "--json"]
            server = self.lab.server.popen(command, env=self.environment, stdout=subprocess.PIPE, stderr=log)
        try:
            assert server.stdout is not None
            server.stdout.readline()
            self.deskgrid("login", link)
            yield
        finally:
            server.terminate()
            server.wait()

    def slow_down(self, bytes_per_s: float) -> None:
        """Let the server's link carry so much."""
        rate = f"{round(bytes_per_s * 8)}bit"
        self.lab.server.run("tc", "qdisc", "add", "dev", "ext", "root", "tbf", "rate", rate, "burst", "256kb", "latency", "100ms")

    def sent_bytes(self) -> int:
        """Return what has left the server."""
        [link] = json.loads(self.lab.server.run("ip", "-json", "-s", "link", "show", "dev", "ext"))
        return int(link["stats64"]["tx"]["bytes"])

    def worker(self, number: int, blob: Blob, *, together: bool) -> subprocess.Popen[bytes]:
        """Start a worker that waits for the word."""
        home = self.folder / f"w{number}"
        command = [
            sys.executable,
            str(Path(__file__).resolve()),
            "worker",
            str(home),
            blob.sha256,
            str(blob.size_bytes),
            str(int(together)),
        ]
        return self.hosts[number].popen(command, env=self.environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE)


class Measured(Struct, frozen=True):
    """One distribution."""

    seconds: float
    copies: float
    cpu_s: float
    """Of a worker, in the middle."""
    busy: float
    """Of all CPU time that there was."""


def distribute(workers: int, size_bytes: int, rate: float, *, together: bool) -> Measured:
    """Let so many workers fetch a new disk at once, the server sending `rate` bytes a second."""
    sites = {f"s{number}": Nat.NONE for number in range(workers)}
    with tempfile.TemporaryDirectory(dir=_work_folder()) as name, NatLab(sites) as lab:
        cell = Cell(Path(name), lab)
        with cell.serving():
            blob = _publish(cell, size_bytes)
            links = [cell.deskgrid("server", "join-link")["link"] for _ in range(workers)]
            for number, link in enumerate(links):
                cell.deskgrid("worker", "join", link, "--home", str(cell.folder / f"w{number}"), at=cell.hosts[number])
            started = [cell.worker(number, blob, together=together) for number in range(workers)]
            try:
                for one in started:
                    assert one.stdout is not None and one.stdout.readline() == b"ready\n"
                cell.slow_down(rate)
                before, begun, cpu = cell.sent_bytes(), time.monotonic(), psutil.cpu_times()
                for one in started:
                    assert one.stdin is not None
                    one.stdin.write(b"go\n")
                    one.stdin.flush()
                ends = [json.loads(one.stdout.readline()) for one in started]  # type: ignore[union-attr]
                sent, busy = cell.sent_bytes() - before, _busy(cpu, psutil.cpu_times())
            finally:
                for one in started:
                    one.kill()
                    one.wait()
    seconds = max(end["at"] for end in ends) - begun
    return Measured(seconds, sent / size_bytes, median_of([end["cpu_s"] for end in ends]), busy)


def _busy(before: Any, after: Any) -> float:
    spent = {name: getattr(after, name) - getattr(before, name) for name in before._fields if not name.startswith("guest")}
    return float(1.0 - (spent["idle"] + spent.get("iowait", 0.0)) / sum(spent.values()))


def _publish(cell: Cell, size_bytes: int) -> Blob:
    """Put a disk into the grid, with a job for each worker, and wait for its torrent."""
    file = cell.folder / "disk"
    with file.open("wb") as output:
        for _ in range(size_bytes // MIB):
            output.write(os.urandom(MIB))
    words = [sys.executable, str(Path(__file__).resolve()), "publish", str(file), str(len(cell.hosts))]
    done = cell.lab.server.popen(words, env=cell.environment, stdout=subprocess.PIPE)
    output_bytes, _ = done.communicate(timeout=600)
    if done.returncode:
        raise SystemExit("the disk cannot be published")
    file.unlink()
    return Blob(**json.loads(output_bytes))


async def publish_disk(file: Path, workers: int) -> None:
    """Upload a disk and submit jobs: in a process of the server's namespace."""
    from deskgrid.cli.connection import connected

    blob = describe_file(file)
    disk = Disk(sha256=blob.sha256, size_bytes=4, virtual_bytes=4, format=DiskFormat.ISO)
    async with connected() as grid:
        await grid.put(file, "disk", kind=DataKind.DISK, disk=disk)
        for _ in range(workers):
            await grid.submit(JobSpec(machine=Machine(disk="disk")))
    print(json.dumps({"sha256": blob.sha256, "size_bytes": blob.size_bytes}))


async def work(home: Path, blob: Blob, *, together: bool) -> None:
    """Be a worker: lease the job, wait for the word, fetch."""
    async with Transport(load_credentials(home / "credentials.json")) as transport:
        one_job = msgspec.structs.replace(played_sync(room=True), free=Capacity(cpus=1, memory_bytes=GIB, disk_bytes=16 * GIB))
        assert len((await transport.call(wire.SYNC, one_job)).assignments) == 1
        cache = Cache(home / "cache", bound_bytes=64 * GIB)
        cache.open()
        sharing = Sharing(WorkerSettings(share=together), cache, transport, SystemClock(), paused=lambda: False)
        print("ready", flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        begun = os.times()
        giving = asyncio.create_task(sharing.run())
        if together:
            file = await sharing.fetch(blob, lambda _: None)
            assert file is not None, "not fetched together"
        else:
            await transport.download(blob, home / "alone")
        at = time.monotonic()
        times = os.times()
        children = sharing.cpu_s()
        used = times.user + times.system - begun.user - begun.system
        print(json.dumps({"at": at, "cpu_s": used + children}), flush=True)
        await asyncio.to_thread(sys.stdin.readline)
        giving.cancel()
        await asyncio.gather(giving, return_exceptions=True)


def _work_folder() -> str | None:
    return os.environ.get("DESKGRID_BENCH_FOLDER")


class _Case(Struct, frozen=True):
    workers: int
    size_bytes: int
    rate: float
    target: float | None
    runs: int
    alone: bool = False
    """By HTTPS alone, too: once, for that takes N*F/us."""


_CASES = (
    _Case(8, 256 * MIB, 20e6, 1.8, 3, alone=True),
    _Case(8, 256 * MIB, 5e6, 1.8, 1),
    _Case(8, 2 * GIB, 20e6, 1.4, 1, alone=True),
    _Case(32, 256 * MIB, 20e6, 1.8, 1, alone=True),
    _Case(32, 256 * MIB, 1.5e6, 1.8, 1),
)


def figures(*, quick: bool) -> list[Figure]:
    """Run all and return the figures."""
    found = []
    cases = (_Case(4, 64 * MIB, 20e6, None, 1, alone=True),) if quick else _CASES
    for case in cases:
        bound = case.size_bytes / case.rate
        rounds = [distribute(case.workers, case.size_bytes, case.rate, together=True) for _ in range(case.runs)]
        seconds, copies, cpu_s, busy = (median_of([getattr(one, name) for one in rounds]) for name in Measured.__struct_fields__)
        what = f"{case.size_bytes // MIB} MiB to {case.workers} at {case.rate / 1e6:g} MB/s"
        found.append(Figure(f"{what}, together", seconds, "s", bound, seconds / bound, case.target))
        found.append(Figure(f"{what}, copies sent by the server", copies, "copies", 1.0, copies, 1.2))
        found.append(Figure(f"{what}, CPU of a worker per GiB", cpu_s / (case.size_bytes / GIB), "s", None, None, None))
        found.append(Figure(f"{what}, part of the CPUs that was busy", busy, "", None, None, None))
        print(f"{what}: {seconds:.1f} s, {copies:.2f} copies, {cpu_s:.1f} CPU s a worker, CPUs {busy:.0%} busy", flush=True)
        if case.alone:
            alone = distribute(case.workers, case.size_bytes, case.rate, together=False)
            found.append(Figure(f"{what}, each from the server by HTTPS", alone.seconds, "s", bound, alone.seconds / bound, None))
            print(f"{what}, by HTTPS: {alone.seconds:.1f} s", flush=True)
    return found


def main() -> None:
    if sys.argv[1:2] == ["worker"]:
        structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
        home, sha256, size, together = sys.argv[2:6]
        asyncio.run(work(Path(home), Blob(sha256=sha256, size_bytes=int(size)), together=together == "1"))  # type: ignore[arg-type]
        return
    if sys.argv[1:2] == ["publish"]:
        asyncio.run(publish_disk(Path(sys.argv[2]), int(sys.argv[3])))
        return
    options = arguments(__doc__)
    publish("distribution", figures(quick=options.quick), options)


if __name__ == "__main__":
    main()
