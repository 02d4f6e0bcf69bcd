"""deskgrid demo: a whole grid on this machine, and one job in a virtual machine."""

from __future__ import annotations

import asyncio
import importlib.resources
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from msgspec import Struct

from deskgrid.cli.disk import DiskWords, cached_tiny, import_disk
from deskgrid.cli.job import RunReport, finish_job, submit_job, tell_end
from deskgrid.cli.output import Json, Reporter, make_reporter, print_json, print_lines
from deskgrid.cli.programs import Program, Programs
from deskgrid.cli.signals import terminated_like_interrupted
from deskgrid.cli.worker import join_worker
from deskgrid.client.jobfile import read_job
from deskgrid.errors import DriverUnusable, InvalidInput
from deskgrid.model.jobs import JobState
from deskgrid.model.machines import ContextLabel
from deskgrid.units import format_size

if TYPE_CHECKING:
    from deskgrid.client.grid import Grid
    from deskgrid.client.transport import Credentials

__all__ = ["demo"]

_WORKERS = ("pc-1", "pc-2")
_READY_LIMIT_S = 300.0
"""For probe guests under software emulation on a busy machine."""
_LOOK_S = 0.2
_MARK = "hello.txt"
"""A file of the job's result, by which the folder of an earlier demo is known as ours to replace."""
_SHOWN_BYTES = 2000


class DemoReport(Struct, frozen=True, kw_only=True):
    """What the demo did."""

    run: RunReport
    files: dict[str, int]
    """Size of each file of the result."""
    home: str | None
    """Of the grid that was left running, with --keep."""
    process_ids: tuple[int, ...]


async def demo(
    *,
    keep: Annotated[bool, Parameter(show_default=False)] = False,
    output: Annotated[Path, Parameter(name=["--output", "-o"])] = Path("demo-result"),
    json: Json = False,
) -> int:
    """Start a server and two workers on this machine, run one job in a virtual machine, show its result.

    Nothing is left but the result, and the cache from which a second run starts in seconds and without network.

    For example:

        deskgrid demo
        deskgrid demo --keep                leave the grid running

    Parameters
    ----------
    keep
        Leave server and workers running.
    output
        Folder for the result; that of an earlier demo is replaced.
    """
    _clear(output)
    with (
        terminated_like_interrupted(),
        Programs(Path(tempfile.mkdtemp(prefix="deskgrid-demo-"))) as programs,
        make_reporter(json) as reporter,
    ):
        run = await _run_all(programs, output, reporter)
        programs.kept = keep
        if not keep:
            reporter.begin("stop workers and server")
            await asyncio.to_thread(programs.end)
    report = DemoReport(
        run=run,
        files=_sizes(output),
        home=str(programs.home) if keep else None,
        process_ids=tuple(programs.process_ids) if keep else (),
    )
    if json:
        print_json(report)
    else:
        _show(report, output)
    return 0 if run.job.job.state is JobState.COMPLETED else 1


def _clear(output: Path) -> None:
    """Remove the result of an earlier demo. Raise InvalidInput for anything else that is there."""
    if not output.exists():
        return
    if not (output / _MARK).is_file():
        raise InvalidInput(f"{output} exists and is not from a demo", where="--output", hint="choose another name")
    shutil.rmtree(output)


async def _run_all(programs: Programs, output: Path, reporter: Reporter) -> RunReport:
    """Start the grid, publish the disk, run the job."""
    from deskgrid.client.grid import Grid

    credentials, workers = await _start_grid(programs, reporter)
    disk = await cached_tiny(reporter)
    async with Grid(credentials) as grid:
        await import_disk(grid, disk, "tiny", reporter, DiskWords(label=ContextLabel.CONTEXT), public=True)
        reporter.begin("get the workers ready")
        async with asyncio.timeout(_READY_LIMIT_S):
            await _until_ready(grid, workers)
        with importlib.resources.as_file(importlib.resources.files("deskgrid.cli") / "hello") as folder:
            job = await submit_job(grid, read_job(folder / "job.toml"), reporter)
        report = await finish_job(grid, job.id, output, reporter)
        await tell_end(grid, report, reporter)
    return report


async def _start_grid(programs: Programs, reporter: Reporter) -> tuple[Credentials, list[Program]]:
    """Make and start a server and the workers; return the admin's credentials."""
    from deskgrid.client.grid import login
    from deskgrid.client.transport import save_credentials
    from deskgrid.server.setup import init_server, make_join_link, make_login_link
    from deskgrid.settings import ServerSettings

    reporter.begin("start a server")
    home, settings = programs.home / "server", ServerSettings(listen="127.0.0.1:0")
    admin = await init_server(home, settings)
    server = programs.start("server", "server", "run", "--home", str(home), "--listen", settings.listen)
    await asyncio.to_thread(server.first_line)
    credentials = await login(await make_login_link(home, settings, admin.name), "demo")
    save_credentials(programs.home / "client" / "credentials.json", credentials)
    reporter.begin(f"start {len(_WORKERS)} workers")
    link = await make_join_link(home, settings, uses=len(_WORKERS))
    workers = []
    for name in _WORKERS:
        await join_worker(programs.home / name, link, name)
        workers.append(programs.start(name, "worker", "run", "--home", str(programs.home / name)))
    return credentials, workers


async def _until_ready(grid: Grid, programs: list[Program]) -> None:
    """Return once all workers have told what they can run. Raise DriverUnusable if none can run a VM."""
    while True:
        for program in programs:
            program.require_alive()
        profiles = [worker.profile for worker in await grid.workers() if worker.profile is not None and worker.profile.drivers]
        if len(profiles) == len(programs):
            drivers = [driver for profile in profiles for driver in profile.drivers]
            if any(driver.usable for driver in drivers):
                return
            raise DriverUnusable(f"no virtual machine runs on this PC: {drivers[0].reason}")
        await asyncio.sleep(_LOOK_S)


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*")) if path.is_file()}


def _show(report: DemoReport, output: Path) -> None:
    """Print where the result is and what is in it, and how to go on."""
    print_lines("", f"The result is in {output}:", "")
    print_lines(*(f"  {format_size(size):>8}  {name}" for name, size in report.files.items()), "")
    if _MARK in report.files:
        text = (output / _MARK).read_bytes()[:_SHOWN_BYTES].decode(errors="replace")
        print_lines(f"{output / _MARK}:", "", *(f"  {line}" for line in text.splitlines()), "")
    if report.home is not None:
        numbers = " ".join(str(number) for number in report.process_ids)
        print_lines(
            "The grid goes on. Use it with:",
            f"  export DESKGRID_CLIENT_HOME={report.home}/client",
            "  deskgrid status",
            "End it with:",
            f"  kill {numbers} && sleep 5 && rm -r {report.home}",
        )
