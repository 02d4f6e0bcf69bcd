"""deskgrid job: submit and follow jobs; deskgrid run: all of it in one."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from msgspec import Struct

from deskgrid.cli.array import array_number, array_summary, exit_code, fetch_results, follow_array
from deskgrid.cli.connection import connected
from deskgrid.cli.follow import attempt_summary, decoder, follow_job, job_summary, stream_log
from deskgrid.cli.output import NO_NEGATIVES, Json, Reporter, age, clean, make_reporter, print_json, print_lines, print_table, warn
from deskgrid.cli.set import fetch_set, follow_set, set_code
from deskgrid.cli.submission import NO_OPTIONS, JobOptions, Spec, read_any, read_wanted, submit_any, submit_job
from deskgrid.client.jobfile import JobFile
from deskgrid.client.jobfile_set import SetFile
from deskgrid.errors import Conflict, InvalidInput
from deskgrid.model.ids import ArrayId, JobId
from deskgrid.model.jobs import Array, ArrayState, Job, JobState
from deskgrid.model.wire import JobDetail, JobList, JobSet
from deskgrid.units import format_duration, format_size

if TYPE_CHECKING:
    from deskgrid.archive import UnpackReport
    from deskgrid.client.grid import Grid

__all__ = ["JobOptions", "RunReport", "app", "finish_job", "job_number", "read_wanted", "run", "submit_job", "tell_end"]

app = App(default_parameter=NO_NEGATIVES, name="job", help="Submit and follow jobs.")

_LAST_LINES = 10
"""Of stderr, shown with a job that failed."""


class RunReport(Struct, frozen=True, kw_only=True):
    """How a job ended, and where its result is."""

    job: JobDetail
    folder: str | None
    unpacked: UnpackReport | None


JobName = Annotated[str, Parameter(help="Number of the job, as in 42 or job-42.")]
JobOrArray = Annotated[str, Parameter(help="Number of the job, as in 42 or job-42, or an array, as in array-7.")]
OutputFolder = Annotated[
    Path | None, Parameter(name=["--output", "-o"], help="Folder to make for the result; ./results-JOB by default.")
]


@app.command
async def submit(spec: Spec = None, /, *, options: JobOptions = NO_OPTIONS, json: Json = False) -> int:
    """Submit a job and print its number; of a file with [array] or several jobs that of the array or set, as in array-7.

    For example:

        deskgrid job submit hello.toml
        deskgrid job submit hello.toml --memory 1GiB
        deskgrid job submit --disk tiny --context context/ --wall-time 10m
        deskgrid job submit sweep.toml --table parameters.csv
    """
    wanted = read_any(spec, options)
    async with connected() as grid:
        submitted = await submit_any(grid, wanted, json=json)
    if json:
        print_json(submitted)
    elif isinstance(submitted, Job):
        print_lines(str(submitted.id))
    else:
        print_lines(f"{'array' if isinstance(submitted, Array) else 'set'}-{submitted.id}")
    if isinstance(submitted, Array) and submitted.state is ArrayState.CANCELLED:
        if not json:
            warn(array_summary(submitted))
        return 1
    return 0


async def run(spec: Spec = None, /, *, options: JobOptions = NO_OPTIONS, output: OutputFolder = None, json: Json = False) -> int:
    """Submit a job (or an array, or a set), wait for it and fetch its result.

    The exit code is 0 if the job completed, or all of them, and 1 if not. Interrupted, the jobs themselves go on.

    For example:

        deskgrid run hello.toml
        deskgrid run --disk tiny --context context/ -o out
        deskgrid run hello.toml --json | jq .folder
        deskgrid run sweep.toml -o out
    """
    file = read_any(spec, options)
    _require_new(output)
    if isinstance(file, SetFile) or file.array is not None:
        return await _run_many(file, output, json=json)
    async with connected() as grid:
        with make_reporter(json) as reporter:
            job = await submit_job(grid, file, reporter)
            with _told_that_it_goes_on(job.id):
                folder = output or Path(f"results-{job.id}")
                _require_new(folder)
                report = await finish_job(grid, job.id, folder, reporter)
            await tell_end(grid, report, reporter)
    if json:
        print_json(report)
    elif report.folder is not None:
        print_lines(report.folder)
    return _code(report.job)


async def _run_many(file: JobFile | SetFile, output: Path | None, *, json: bool) -> int:
    """Submit an array or a set, wait for it and fetch all results."""
    async with connected() as grid:
        submitted = await submit_any(grid, file, json=json)
        if isinstance(submitted, Array):
            return await _run_array(grid, submitted.id, output or Path(f"results-array-{submitted.id}"), json=json)
        if isinstance(submitted, JobSet):
            return await _run_set(grid, submitted, output or Path(f"results-set-{submitted.id}"), json=json)
    raise InvalidInput("this is one job")


async def _run_array(grid: Grid, array_id: ArrayId, folder: Path, *, json: bool) -> int:
    with _told_that_it_goes_on(array_id, "array"):
        _require_new(folder)
        array = await follow_array(grid, array_id, json=json)
        fetched = await fetch_results(grid, array_id, folder, json=json)
    if json:
        print_json({"array": array, "folder": str(folder), "results": fetched})
    else:
        warn(array_summary(array))
        print_lines(str(folder))
    return exit_code(array)


async def _run_set(grid: Grid, submitted: JobSet, folder: Path, *, json: bool) -> int:
    with _told_that_it_goes_on(submitted.id, "set"):
        _require_new(folder)
        found = await follow_set(grid, submitted.id, json=json)
        await fetch_set(grid, found, folder, json=json)
    if json:
        print_json({"set": found, "folder": str(folder)})
    else:
        print_lines(str(folder))
    return set_code(found)


@contextmanager
def _told_that_it_goes_on(number: int, noun: str = "job") -> Iterator[None]:
    try:
        yield
    except BaseException:
        warn(f"{noun} {number} goes on: deskgrid {noun} wait {number}, or deskgrid {noun} cancel {number}")
        raise


async def finish_job(grid: Grid, job_id: JobId, folder: Path, reporter: Reporter) -> RunReport:
    """Show a job's phases until it is final, and fetch its result into a new folder if there is one."""
    detail = await follow_job(grid, job_id, reporter)
    if detail.job.result is None:
        return RunReport(job=detail, folder=None, unpacked=None)
    unpacked = await _fetch(grid, detail, folder, reporter)
    return RunReport(job=detail, folder=str(folder), unpacked=unpacked)


async def _fetch(grid: Grid, detail: JobDetail, folder: Path, reporter: Reporter) -> UnpackReport:
    phase = reporter.begin("fetch the result", detail.job.result_bytes)
    return await grid.results(detail.job.id, folder, phase.done)


async def tell_end(grid: Grid, report: RunReport, reporter: Reporter) -> None:
    """Tell how a job ended: why it failed, what of its result was left out."""
    reporter.end()
    reporter.say(job_summary(report.job))
    if report.job.job.state is JobState.FAILED:
        await _tell_failure(grid, report.job, reporter)
    if report.unpacked is not None:
        _tell_left_out(report.unpacked, reporter)


def _code(detail: JobDetail) -> int:
    return 0 if detail.job.state is JobState.COMPLETED else 1


async def _tell_failure(grid: Grid, detail: JobDetail, reporter: Reporter) -> None:
    """Tell every attempt's reason, and the last words of the last one."""
    for attempt in detail.attempts:
        reporter.say(f"  attempt {attempt.number} on {attempt.worker}: {attempt_summary(attempt)}")
    chunk = await grid.read_log(detail.job.id, stream="stderr")
    lines = chunk.data.decode(errors="replace").splitlines()
    for line in lines[-_LAST_LINES:]:
        reporter.say(f"  stderr: {line}")


def _tell_left_out(report: UnpackReport, reporter: Reporter) -> None:
    for name, target in report.refused_links:
        reporter.say(f"  link not made, it leads out of the folder: {name} -> {target}")
    for name, reason in report.dropped:
        reporter.say(f"  left out: {name}: {reason}")
    unnamed = report.left_out - len(report.refused_links) - len(report.dropped)
    if unnamed > 0:
        reporter.say(f"  and {unnamed} more")


def _require_new(folder: Path | None) -> None:
    if folder is not None and folder.exists():
        raise InvalidInput(f"{folder} exists already", where="--output", hint="results go to a new folder: choose another name")


@app.command(name="list")
async def list_(
    *,
    state: JobState | None = None,
    array: str | None = None,
    group: str = "",
    everyone: bool = False,
    limit: int = 100,
    before: int | None = None,
    json: Json = False,
) -> None:
    """List jobs, newest first: those submitted by themselves, or those of an array.

    For example:

        deskgrid job list
        deskgrid job list --array 7 --state failed
        deskgrid job list --state failed
        deskgrid job list --everyone --limit 20 --json

    Parameters
    ----------
    state
        Only jobs in this state.
    array
        The jobs of this array.
    group
        The jobs that are done for this group, of which you are a member.
    everyone
        Also the jobs of others (admins).
    limit
        At most so many.
    before
        Only jobs with a smaller number: the next page.
    """
    async with connected() as grid:
        found = await grid.jobs(
            state=state,
            everyone=everyone,
            limit=limit,
            before=JobId(before) if before else None,
            array=array_number(array) if array else None,
            group=group,
        )
    if json:
        print_json(found.jobs)
        return
    if array:
        _print_array_jobs(found)
    else:
        _print_jobs(found)
    if found.more:
        of = f"--array {array_number(array)} " if array else ""
        warn(f"there are older ones: deskgrid job list {of}--before {found.jobs[-1].id}")


def _print_jobs(found: JobList) -> None:
    rows = [(job.id, job.spec.name, job.owner, job.state.value, age(job.created_at), job.message) for job in found.jobs]
    print_table(("job", "name", "owner", "state", "submitted", "message"), rows, empty="no jobs")


def _print_array_jobs(found: JobList) -> None:
    rows = [(job.id, job.index, _parameters(job), job.state.value, _value(job), job.message) for job in found.jobs]
    print_table(("job", "index", "parameters", "state", "value", "message"), rows, empty="no jobs")


def _parameters(job: Job) -> str:
    return ", ".join(f"{name}={value}" for name, value in job.parameters.items())


def _value(job: Job) -> str:
    return "" if job.value is None else job.value.decode(errors="replace")


@app.command
async def show(job: JobName, /, *, json: Json = False) -> None:
    """Show a job with all its attempts.

    For example:

        deskgrid job show 42
        deskgrid job show 42 --json | jq .attempts
    """
    async with connected() as grid:
        detail = await grid.job(job_number(job))
    if json:
        print_json(detail)
    else:
        _print_job(detail)


def _print_job(detail: JobDetail) -> None:
    job, machine = detail.job, detail.job.spec.machine
    parameters = f", {_parameters(job)}" if job.parameters else ""
    print_lines(
        job_summary(detail),
        *([f"array      array-{job.array_id}, index {job.index}{parameters}"] if job.array_id is not None else []),
        f"name       {job.spec.name}, of {job.owner}, submitted {age(job.created_at)}",
        f"machine    {machine.kind.value}, {machine.cpus} CPUs, {format_size(machine.memory_bytes)} memory, "
        f"{format_size(machine.scratch_bytes)} scratch, network {machine.network.value}",
        f"disk       {f'{machine.disk} (sha256 {job.disk_sha256[:12]})' if job.disk_sha256 else machine.disk or 'none'}",
        f"wall time  {format_duration(job.spec.limits.wall_time_s)}",
        f"result     {'none' if job.result_bytes is None else format_size(job.result_bytes)}",
        *([f"value      {_value(job)}"] if job.value is not None else []),
        "",
    )
    rows = [
        (a.number, a.worker, a.state.value, age(a.leased_at), _took(a.started_at, a.ended_at), _or_dash(a.exit_code), a.reason)
        for a in detail.attempts
    ]
    print_table(("attempt", "worker", "state", "leased", "ran", "exit", "reason"), rows, empty="no attempts yet")


def _took(started_at: float | None, ended_at: float | None) -> str:
    return "-" if started_at is None or ended_at is None else format_duration(max(ended_at - started_at, 0))


def _or_dash(value: object) -> object:
    return "-" if value is None else value


def job_number(name: str) -> JobId:
    """Return the number in `42` or `job-42`. Raise InvalidInput."""
    number = name.removeprefix("job-")
    if not (number.isascii() and number.isdecimal()) or len(number) > 18:
        raise InvalidInput(f"{name[:40]!r} is not a job", hint="as in 42 or job-42; deskgrid job list shows them")
    return JobId(int(number))


def _ids(names: tuple[str, ...]) -> list[tuple[JobId | None, ArrayId | None]]:
    """Return what is named: each a job or an array. Raise InvalidInput."""
    if not names:
        raise InvalidInput("no job is named", hint="numbers of jobs, as deskgrid job list shows them")
    return [(None, array_number(name)) if name.startswith("array-") else (job_number(name), None) for name in names]


@app.command
async def wait(*jobs: JobOrArray, json: Json = False) -> int:
    """Wait until jobs (or all jobs of arrays) are final; the exit code is 0 if all completed.

    For example:

        deskgrid job wait 42
        deskgrid job wait 42 43 array-7 && echo all good
    """
    ids = _ids(jobs)
    async with connected() as grid:

        async def ended(job_id: JobId | None, array_id: ArrayId | None) -> JobDetail | Array:
            if array_id is not None:
                return await grid.wait_array(array_id)
            assert job_id is not None
            return (await grid.wait([job_id]))[0]

        found = await asyncio.gather(*(ended(*one) for one in ids))
    if json:
        print_json(found)
    else:
        print_lines(*(array_summary(one) if isinstance(one, Array) else job_summary(one) for one in found))
    return max(exit_code(one) if isinstance(one, Array) else _code(one) for one in found)


@app.command
async def cancel(*jobs: JobOrArray, json: Json = False) -> None:
    """Cancel jobs, or what has not ended of arrays; what is final stays as it is.

    For example:

        deskgrid job cancel 42
        deskgrid job cancel 42 43 array-7
    """
    ids = _ids(jobs)
    cancelled: list[Job | Array] = []
    async with connected() as grid:
        for job_id, array_id in ids:
            if array_id is not None:
                cancelled.append(await grid.cancel_array(array_id))
            elif job_id is not None:
                cancelled.append(await grid.cancel(job_id))
    if json:
        print_json(cancelled)
    else:
        print_lines(*(array_summary(one) if isinstance(one, Array) else f"job {one.id}: {one.state.value}" for one in cancelled))


@app.command
async def remove(*jobs: JobName, json: Json = False) -> None:
    """Remove jobs that have ended, with their results and all that was kept of them.

    For example:

        deskgrid job remove 42
        deskgrid job remove 42 43 44
    """
    if not jobs:
        raise InvalidInput("no job is named", hint="numbers of jobs, as deskgrid job list shows them")
    numbers = [job_number(job) for job in jobs]
    async with connected() as grid:
        for number in numbers:
            await grid.remove_job(number)
    if json:
        print_json({"removed": numbers})
    else:
        print_lines(*(f"removed job {number}" for number in numbers))


@app.command
async def logs(
    job: JobName,
    /,
    *,
    follow: Annotated[bool, Parameter(name=["--follow", "-f"], show_default=False)] = False,
    stderr: Annotated[bool, Parameter(show_default=False)] = False,
    console: Annotated[bool, Parameter(show_default=False)] = False,
    attempt: int | None = None,
    json: Json = False,
) -> None:
    """Print what a job has printed so far: its stdout, or with an option its stderr or the machine's console.

    For example:

        deskgrid job logs 42
        deskgrid job logs 42 --follow
        deskgrid job logs 42 --console --attempt 1

    Parameters
    ----------
    follow
        Go on until the job ends.
    stderr
        Its stderr.
    console
        The console of its machine: what kernel and boot say.
    attempt
        Of this attempt; the newest by default.
    """
    if stderr and console:
        raise InvalidInput("--stderr and --console exclude each other", hint="ask for one after the other")
    number = job_number(job)
    stream: Literal["stdout", "stderr", "console"] = "stderr" if stderr else "console" if console else "stdout"
    async with connected() as grid:
        if not json:
            await _print_log(grid, number, stream, attempt, follow)
            return
        pieces = [chunk async for chunk in stream_log(grid, number, stream=stream, attempt=attempt, follow=follow)]
    text = b"".join(chunk.data for chunk in pieces).decode(errors="replace")
    print_json({"job": number, "attempt": pieces[-1].number if pieces else attempt, "stream": stream, "text": text})


async def _print_log(grid: Grid, job_id: JobId, stream: str, attempt: int | None, follow: bool) -> None:
    """Print output as it comes; into a file or pipe byte by byte as the job wrote it."""
    number, expected, text = attempt, 0, decoder()
    terminal = sys.stdout.isatty()
    async for chunk in stream_log(grid, job_id, stream=stream, attempt=attempt, follow=follow):
        if number is not None and chunk.number != number:
            warn(f"-- attempt {chunk.number}")
            expected = 0
        if chunk.offset > expected:
            warn(f"-- {chunk.offset - expected} bytes are not kept")
        number, expected = chunk.number, chunk.offset + len(chunk.data)
        if terminal:
            lines = text.decode(chunk.data).split("\n")
            sys.stdout.write("\n".join(clean(line.replace("\t", "    ").rstrip("\r")) for line in lines))
        else:
            sys.stdout.buffer.write(chunk.data)
        sys.stdout.flush()


@app.command
async def results(job: JobName, /, *, output: OutputFolder = None, json: Json = False) -> None:
    """Fetch a job's result into a new folder.

    For example:

        deskgrid job results 42
        deskgrid job results 42 -o out
    """
    number = job_number(job)
    folder = output or Path(f"results-{number}")
    _require_new(folder)
    async with connected() as grid:
        detail = await grid.job(number)
        if detail.job.result is None:
            raise Conflict(f"{job_summary(detail)}; it has no result", hint=f"deskgrid job show {number}")
        with make_reporter(json) as reporter:
            unpacked = await _fetch(grid, detail, folder, reporter)
            reporter.end()
            _tell_left_out(unpacked, reporter)
    if json:
        print_json(RunReport(job=detail, folder=str(folder), unpacked=unpacked))
    else:
        print_lines(str(folder))
